"""Stop a thread, or deliver a signal, at a chosen moment inside the library."""

from __future__ import annotations

import _thread
import gc
import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, TypeVar

import lmdb

import conftest
import lmdb_object_store
from conftest import PATIENCE
from lmdb_object_store import LmdbObjectStore, _fork, _locks, _queue, _shared

# All that the tests know of the inside of the library stands from here to "Moments".

# The functions that a thread is in at a moment that nothing outside shows, for
# `Worker.wait_until_in`.
WAITS_FOR_WRITER = "do"  # until another thread doesn't write any more
WAITS_FOR_BLOCK = "_await_block"  # for the end of another thread's transaction block
WAITS_FOR_SNAPSHOTS = "await_snapshots"  # as the map has to move
WAITS_FOR_READS = "exclusive"  # as the map moves now, or the file is closed
WAITS_FOR_READ_OF_SNAPSHOT = "locked"  # that another thread does in the same snapshot
WAITS_FOR_LOCK = "locked"  # of any part
SHARES_SNAPSHOT = "_share"  # reads first in a snapshot that another thread has used
WAITS_FOR_SLOT = "_await_slot"  # of LMDB's table of readers, to read
WAITS_FOR_SLOT_TO_OPEN = "_open"  # to open the file
WAITS_FOR_CLOSE = "await_close"  # of the same file, to open it anew
WAITS_FOR_LMDB = "_open"  # another process writes, and a block is to begin
WAITS_FOR_FORK = "await_fork"  # of another thread, to write
FORKS = "_before_fork"  # has to fork, and waits for all that does not rest
FORK_KEEPS_WRITERS = "_all_rest"  # no other thread begins to write any more
FORK_WAITS_FOR_READS = "_drained"
FORK_BARS_READS = "pause"  # for a moment, again and again

# The functions that call py-lmdb, for `at_call`.
GETS_ONE = "read"  # a value for `store[key]` and `get`
GETS_MANY = "pick"  # values for `get_many`
LOOKS_BEFORE_POP = "is_stored"  # at the value that `pop` is about to take
KEEPS_TRANSACTION = "is_pinned"  # for the values of `get_many`, while user code runs
# These only pass the call on: that function has called them.
_BETWEEN = ("begin_write", "begin")

# The function that the flusher calls before it forgets a store.
TURNS_AWAY = "refuse"

# The function that returns just before a put takes its place in the buffer.
SIZES_RECORD = "size_of"


def is_writing(store: LmdbObjectStore[Any, Any]) -> bool:
    """Whether a thread has begun to write to the file."""
    return store._shared.writer.thread is not None  # noqa: SLF001


def limit_values(monkeypatch: Any, store: LmdbObjectStore[Any, Any], size: int) -> None:
    """Let LMDB take no value of `size` bytes: the real limit takes 8 GiB to reach."""
    monkeypatch.setattr(store._pending, "max_value", size)  # noqa: SLF001


def notice_soon(monkeypatch: Any) -> None:
    """Let all waits be logged almost at once."""
    monkeypatch.setattr(_locks, "NOTICE", 0.01)


def let_forks_wait(seconds: float) -> None:
    """Let a fork wait so long for calls of LMDB to end."""
    _fork._PATIENCE = seconds  # noqa: SLF001


def let_writers_wait(monkeypatch: Any, seconds: float) -> None:
    """Let a writer wait so long for its turn among the processes."""
    monkeypatch.setattr(_queue, "_PATIENCE", seconds)


def another_has_its_turn(path: str) -> bool:
    """Whether another process is the first that waits for LMDB's lock."""
    queue = _queue.WriterQueue(os.path.join(path, "data.mdb"))
    try:
        return not queue._has_turn()  # noqa: SLF001
    finally:
        queue.close()


def let_exit_wait(seconds: float) -> None:
    """Let the end of the interpreter wait so long for writers."""
    _shared._EXIT_PATIENCE = seconds  # noqa: SLF001


def fail_to_begin_anew() -> None:
    """Let the first store that a fork's child should get anew fail."""
    real = _shared.SharedStore.reset_in_child

    def fail_once(env: Any) -> None:
        _shared.SharedStore.reset_in_child = real
        raise MemoryError

    _shared.SharedStore.reset_in_child = fail_once


# Moments

_T = TypeVar("_T")
_LIBRARY = os.path.dirname(lmdb_object_store.__file__)
_ROUNDS = 2
_ONE_IN = 32
_TOOL = 4  # of sys.monitoring; coverage.py and debuggers have other numbers


class Parked:
    """A thread that stops where it first calls `method` of py-lmdb.

    It stops before the call; so at "putmulti", for example, in the middle of
    a commit. The end of a `with` block lets it go on, if `release` has not.
    """

    def __init__(
        self, in_thread: Callable[..., Any], method: str, action: Callable[[], Any]
    ) -> None:
        self._method = method
        self._action = action
        self._arrived = threading.Event()
        self._leave = threading.Event()
        self._thread = in_thread(self._run)
        assert self._arrived.wait(PATIENCE), f"{method}() was never called"

    def _run(self) -> Any:
        sys.setprofile(self._hook)
        try:
            return self._action()
        finally:
            sys.setprofile(None)

    def _hook(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and is_method(function, self._method):
            sys.setprofile(None)
            self._arrived.set()
            assert self._leave.wait(PATIENCE), "nobody let the thread go on"

    def leave(self) -> None:
        """Let the thread go on."""
        self._leave.set()

    def release(self) -> Any:
        """Let the thread go on to its end, and return its result."""
        self.leave()
        return self._thread.result()

    def __enter__(self) -> Parked:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


def is_method(function: Any, name: str) -> bool:
    """Whether a C function is the method `name` of one of py-lmdb's objects."""
    return function.__name__ == name and isinstance(
        function.__self__, (lmdb.Environment, lmdb.Transaction, lmdb.Cursor)
    )


@contextmanager
def handling(action: Callable[[], Any]) -> Iterator[None]:
    """Let SIGINT call `action`."""
    before = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Trip(int):
    # Reading an attribute gives CPython no occasion to look for signals, as a
    # call would: the signal waits for the code that is stepped through.
    now = property(_thread.interrupt_main)


def outcome(action: Callable[[], Any]) -> Any:
    """Return the result of `action`, or the class of its exception."""
    try:
        return action()
    except Exception as error:
        return type(error)


@contextmanager
def at_call(
    method: str, action: Callable[[], Any], function: str | None = None
) -> Iterator[list[Any]]:
    """Let a signal handler do `action` where `method` of py-lmdb is called first.

    With `function`, where that function of the library calls it. Yields a list for
    the outcome.
    """
    results: list[Any] = []
    trip = Trip(signal.SIGINT)

    def hook(frame: Any, event: str, called: Any) -> None:
        if event != "c_call" or not is_method(called, method):
            return
        while frame.f_code.co_name in _BETWEEN:
            frame = frame.f_back
        if function in (None, frame.f_code.co_name):
            sys.setprofile(None)
            trip.now  # noqa: B018 (CPython calls the handler after the method)

    with handling(lambda: results.append(outcome(action))):
        sys.setprofile(hook)
        try:
            yield results
        finally:
            sys.setprofile(None)
    assert results, f"{method}() was never called"


def every_step(
    prepare: Callable[[], _T], action: Callable[[_T], Any]
) -> Iterator[tuple[_T, Any]]:
    """Do ``action(prepare())`` with a SIGINT at each of its bytecodes in turn.

    Only bytecodes of the library count, the first `_ROUNDS` times that they run.
    CPython runs the signal handler where it next looks for signals, as it would
    for one from outside. Yields what was prepared and the result of `action`, or
    its exception, until `action` ends before the signal. For the main thread.

    Without ``--thorough``, one moment in `_ONE_IN` gets its signal, at equal distances
    from a first one that ``--seed`` chooses for each test: so none of the longer
    stretches between two steps of an operation is left out.
    """
    moments = _Moments()
    reached = True
    while reached:
        subject = prepare()
        gc.disable()  # no finalizer of something else is to run in between
        try:
            reached, result = _with_signal(moments, partial(action, subject))
        finally:
            gc.enable()
        yield subject, result


def part_of(number: int) -> int:
    """Return how many of so many moments `every_step` tries at least."""
    return number if conftest.THOROUGH else number // _ONE_IN


class _Moments:
    """The moments of an operation: a bytecode that runs for the nth time each."""

    def __init__(self) -> None:
        self._seen: set[tuple[Any, int, int]] = set()
        self._one_in = 1 if conftest.THOROUGH else _ONE_IN
        test = os.environ["PYTEST_CURRENT_TEST"]  # pytest sets it
        dice = random.Random(f"{conftest.SEED} {test}")
        self._numbers = count(dice.randrange(self._one_in))

    def take(self, code: Any, offset: int, number: int) -> bool:
        """Whether a moment has not been there yet, and is to be tried."""
        moment = (code, offset, number)
        if number > _ROUNDS or moment in self._seen:
            return False
        self._seen.add(moment)
        return next(self._numbers) % self._one_in == 0


def _with_signal(moments: _Moments, action: Callable[[], Any]) -> tuple[bool, Any]:
    """Call `action` with a signal at the next moment that is to be tried."""
    trip = Trip(signal.SIGINT)
    here = threading.get_ident()
    reached = False
    rounds: Counter[tuple[Any, int]] = Counter()

    def is_next(code: Any, offset: int) -> bool:
        nonlocal reached
        rounds[code, offset] += 1
        if not moments.take(code, offset, rounds[code, offset]):
            return False
        reached = True
        return True

    # The hooks trip the signal as the last thing that they do themselves: after
    # the return from a call CPython may look for signals.

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if event == "call":
            if not frame.f_code.co_filename.startswith(_LIBRARY):
                return None
            frame.f_trace_opcodes = True
        elif event == "opcode" and is_next(frame.f_code, frame.f_lasti):
            sys.settrace(None)
            trip.now  # noqa: B018
        return trace

    def instruction(code: Any, offset: int) -> Any:
        if not code.co_filename.startswith(_LIBRARY):
            return sys.monitoring.DISABLE
        # Of this thread: while another one runs the library, this one may be anywhere,
        # as in a lock of the standard library that an interrupt would leave locked.
        if threading.get_ident() == here and is_next(code, offset):
            sys.monitoring.set_events(_TOOL, 0)
            trip.now  # noqa: B018
        return None

    monitored = sys.version_info >= (3, 12)
    if monitored:
        event = sys.monitoring.events.INSTRUCTION
        sys.monitoring.use_tool_id(_TOOL, __name__)
        sys.monitoring.register_callback(_TOOL, event, instruction)
    before = sys.gettrace()
    try:
        if monitored:
            sys.monitoring.set_events(_TOOL, event)
        else:
            sys.settrace(trace)
        result = action()
        for _ in range(3):
            pass  # where a signal that still waits is handled
    except BaseException as error:
        result = error
    finally:
        if monitored:
            sys.monitoring.set_events(_TOOL, 0)
            sys.monitoring.free_tool_id(_TOOL)
        else:
            sys.settrace(before)
    return reached, result
