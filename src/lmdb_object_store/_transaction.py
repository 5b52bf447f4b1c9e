"""Transaction blocks: LMDB's writer, held while user code runs, and its changes."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar

import lmdb

from ._gate import Gate
from ._ranges import KeyRange, Scan
from ._reading import LARGE, Batch
from ._scope import Scope
from ._source import ABSENT, Source
from .exceptions import BusyError, ClosedError

if TYPE_CHECKING:
    from ._environment import SharedEnvironment

_R = TypeVar("_R")
_T = TypeVar("_T")

_CHUNK_KEYS = 512


def current_task() -> object:
    """Return the asyncio task that this thread is running, if any."""
    asyncio = sys.modules.get("asyncio")
    # Cheap where no loop runs, unlike current_task. Absent while asyncio is imported.
    running_loop = getattr(asyncio, "_get_running_loop", None)
    if asyncio is None or running_loop is None or running_loop() is None:
        return None
    return asyncio.current_task()


class _Life(threading.local):
    """What ends with a thread, in that thread."""

    def __init__(self) -> None:
        self.token = {0}  # of a type that takes weak references


_life = _Life()


class Block(Source):
    """The open transaction block of a thread.

    LMDB's writer is open from the beginning, which keeps other processes from
    writing, but the changes are only collected, and applied when the block ends:
    so a map that is too full for them can grow, each key is written once, and
    reads see what the last commit left, with these changes over it.

    Nobody else writes while `SharedEnvironment.block` refers to this one, as if
    its thread had the write lock; it has not, since a lock would stay locked where
    another thread throws away the generator, say, that the ``with`` statement is in.

    Parameters
    ----------
    env : SharedEnvironment
        The environment that it is going to be the block of.
    level : dict
        What tells its ``with`` statement from those nested in it.
    """

    def __init__(self, env: SharedEnvironment, level: Batch) -> None:
        self.env = env
        self.buffer_lock = RLock()
        self.buffer = {}  # the changes
        self.buffer_bytes = 0
        self.settled = 0
        self.closed = False
        self.open = False  # whether the body runs: neither beginning nor ending
        self.committing = False
        self.lost = False  # by another thread, which can't end the transaction
        self.inherited = False  # from the parent process, by a fork
        self.thread = get_ident()
        self.task = current_task()
        self.opened = time.monotonic()
        self.txn: lmdb.Transaction[Any] | None = None  # until it is used
        self.used: lmdb.Transaction[Any] | None = None  # from then on
        self.id = 0  # of the transaction
        # Of each `with` statement: what its keys had been before it changed them.
        self._levels = [level]
        self.news: list[tuple[Any, ...]] = []  # to be logged after the end
        self._why = ""
        self._process = os.getpid()
        # So it ends with its thread, if a generator has not ended it.
        self._thread_end: Any = weakref.ref(_life.token, lambda _: self.finish())

    # Its life

    def begin(self) -> bool:
        """Let the body begin unless something is pending. Call it under the lock."""
        self.open = not self.env.buffer
        return self.open

    def check(self) -> None:
        """Raise if this is no place for operations of the block."""
        if self.closed:
            raise self.closed_error()
        if get_ident() != self.thread or current_task() is not self.task:
            raise BusyError(
                "A transaction block is open, and this is another asyncio task, or "
                "another thread, than the one that it belongs to. Don't await inside "
                "the block, or run the other task's operation in a thread, where "
                "writes wait for the end of the block, and reads don't."
            )

    def nest(self, level: Batch) -> None:
        """Begin a nested ``with`` statement."""
        self._levels.append(level)

    def leave(self, level: Batch, failure: type[BaseException] | None) -> None:
        """End a ``with`` statement: commit if it is the outermost, or undo."""
        normally = failure is None
        levels = self._levels
        if self.inherited:
            if level is levels[0]:
                self.env.block_ended(self)
            if normally:
                raise self.closed_error()
        elif not any(level is other for other in levels):
            if normally:
                raise self.closed_error()
        elif get_ident() != self.thread:
            self._lose("another thread has ended its `with` statement, or a nested one")
            if normally:
                raise self.closed_error()
        elif self.lost:
            self.finish()
            if normally:
                raise self.closed_error()
        elif normally and level is not levels[-1]:
            self.finish()
            raise BusyError(
                "A transaction block has ended before one that is nested in it, of a "
                "suspended generator perhaps. Nothing of both is written."
            )
        elif normally and len(levels) > 1:
            self._merge()
        elif normally:
            try:
                self.env.as_writer(self.env.commit_block, self)
            finally:
                self.finish()
        elif level is levels[0]:
            self.finish()
        elif failure is GeneratorExit and level:
            # Nobody can tell what of that the generator has written.
            self._lose("a generator was given up inside a nested `with` statement")
        else:
            while any(level is other for other in levels):
                self._undo()

    def finish_lost(self) -> None:
        """End what another thread has lost. For its own thread.

        Raises
        ------
        ClosedError
            A nested statement is still running.
        """
        nested = len(self._levels) > 1
        self.finish()
        if nested:
            raise self.closed_error()

    def _undo(self) -> None:
        """Undo what the innermost statement has changed."""
        # Can be done again, if an interrupt comes before the end.
        level = self._levels[-1]
        for key in list(level):  # a signal handler's put can add to it
            if level[key] is ABSENT:
                self.buffer.pop(key, None)
            else:
                self.buffer[key] = level[key]
        self.settled += 1
        self._levels.pop()

    def _merge(self) -> None:
        """Make what the innermost statement has changed the next one's."""
        if len(self._levels) > 2:  # the outermost is undone without that
            level, outer = self._levels[-1], self._levels[-2]
            for key in list(level):
                outer.setdefault(key, level[key])
        self._levels.pop()

    def finish(self) -> None:
        """Undo what is not committed, and let others write. For its own thread.

        Doing it again does nothing, or what an interrupt has prevented.
        """
        if not self._levels or os.getpid() != self._process:
            return  # a child does `disinherit`
        self.open = False
        self.closed = True
        try:
            if self.txn is not None:
                self.env.in_gate(self.txn.abort)  # a fork must not come in the midst
        finally:
            try:  # as in Gate
                self.env.block_ended(self)
                self.end()  # after that: it keeps `finish` from being done again
            finally:
                pass
        self.env.log_all(self.news)

    def end(self, why: str = "") -> None:
        """Do what is left to do when this is not the environment's block any more."""
        self._why = self._why or why
        self.closed = True
        self.txn = self.used = self.task = self._thread_end = None
        self.end_scans()
        self.buffer = {}
        self._levels = []

    def disinherit(self) -> None:
        """Leave it to the parent process, in a child made by fork.

        Where the child itself was in its body, what follows in there raises.
        """
        self.inherited = True
        levels = self._levels
        self.end(", as it belongs to the parent process, which was forked inside it")
        self._levels = levels

    def _lose(self, why: str) -> None:
        """End it for everybody but its thread, which has to end the transaction."""
        self._why = f", as {why}. Nothing of it is written"
        self.lost = self.closed = True
        self.end_scans()

    @property
    def gate(self) -> Gate:
        return self.env

    def closed_error(self) -> ClosedError:
        return ClosedError(
            f"A transaction block of {self.env.path!r} is closed{self._why}: what "
            "begins in it has to end with it."
        )

    # Reads

    def visit(self, action: Callable[..., _R], *args: Any) -> _R:
        self.check()
        return self.env.visit(action, *args)

    def gives_views(self, values: bool) -> bool:
        return self.env.gives_views(values)

    def read(self, key: bytes, default: Any, probe: bool = False) -> Any:
        """Do what `SharedEnvironment.read` does."""
        # The block's own transaction shows the same, and need not be begun.
        env = self.env
        txn = self.txn
        if txn is None or env.large_seen:
            return env.read(key, default, probe)
        try:
            raw: bytes | None = env.in_gate(txn.get, key)
        except lmdb.Error:  # the environment is out of action
            return env.read(key, default, probe)
        if raw is None:
            return default
        if len(raw) >= LARGE:
            env.large_seen = True
        return probe or self.unpickle(key, raw, False)

    def flush_for_read(self) -> None:
        """Do nothing: a block is written when it ends."""

    # Writes

    def check_writable(self) -> None:
        """Do nothing: that was checked when the block began."""

    def as_writer(self, action: Callable[..., _R], *args: Any) -> _R:
        """Call `action`: its thread is the writer."""
        self.check()
        return action(*args)

    def write(self, key: bytes, raw: bytes | None, *_: int) -> None:
        """Do what `SharedEnvironment.write` does."""
        if len(self._levels) > 1:
            self._note((key,))
        self.buffer[key] = raw

    def exchange(
        self, key: bytes, expected: Any, raw: bytes | None, limits: tuple[int, int]
    ) -> bool:
        """Do what `SharedEnvironment.exchange` does."""
        while True:
            pending = self.buffer.get(key, ABSENT)
            if not self._holds(key, pending, expected):
                return False
            self._note((key,))
            # Only a signal handler's put can have come between.
            if self._swap(key, pending, raw, 0):
                return True

    def remove_last(self, key: bytes, expected: bytes, limits: tuple[int, int]) -> bool:
        """Do what `SharedEnvironment.remove_last` does."""
        return self.last_key() == key and self.exchange(key, expected, None, limits)

    def write_many(self, batch: Batch) -> None:
        """Note many writes, all of them or none."""
        self._note(batch)
        self.buffer.update(batch)  # in one step for signal handlers, too

    def delete_many(self, keys: Collection[bytes]) -> int:
        """Delete `keys`; return how many existed."""
        wanted = list(keys)
        found: list[bytes] = []
        for start in range(0, len(wanted), _CHUNK_KEYS):
            chunk = wanted[start : start + _CHUNK_KEYS]
            found += self.visit(self._existing, chunk)
        return self._delete(found)

    def _existing(
        self, begin: Callable[[], lmdb.Transaction[bytes]], keys: list[bytes]
    ) -> list[bytes]:
        txn = begin()
        try:
            return self._filter(txn.cursor().set_key, keys)
        finally:
            try:  # as in Gate
                txn.abort()
            finally:
                pass

    def _filter(
        self, stored: Callable[[bytes], bool], keys: list[bytes]
    ) -> list[bytes]:
        changes = self.buffer
        return [
            key
            for key in keys
            if (changes[key] is not None if key in changes else stored(key))
        ]

    def delete_range(self, keys: KeyRange) -> int:
        """Delete a key range; return how many existed."""
        return self._delete(Scan(self, keys, False, False).keys())

    def _delete(self, keys: Iterable[bytes]) -> int:
        deletions: Batch = dict.fromkeys(keys)
        self.write_many(deletions)
        return len(deletions)

    def _note(self, keys: Iterable[bytes]) -> None:
        """Keep what has to be restored if the innermost statement fails."""
        if len(self._levels) > 1:
            for key in keys:
                self._levels[-1].setdefault(key, self.buffer.get(key, ABSENT))

    def flush(self) -> None:
        """Do nothing: a block is written when it ends."""


class BlockScope(Scope[_T]):
    """A transaction block, or one nested in it.

    Parameters
    ----------
    env : SharedEnvironment
    begin : callable
        Returns what the statement yields. Called inside.
    end : callable, optional
        Called with that, inside, when the statement ends normally.
    """

    def __init__(
        self,
        env: SharedEnvironment,
        begin: Callable[[], _T],
        end: Callable[[_T], None] | None = None,
    ) -> None:
        self._env = env
        self._begin = begin
        self._at_end = end
        self._level: Batch = {}
        self._block: Block | None = None

    def enter(self) -> _T:
        source = self._env.current()
        if isinstance(source, Block):
            self._block = source
            source.nest(self._level)
        else:
            self._block = Block(self._env, self._level)
            self._env.open_block(self._block)
        self._value = self._begin()
        return self._value

    def leave(self, failure: type[BaseException] | None) -> None:
        block = self._block
        if block is None:
            return
        if failure is None and self._at_end:
            try:
                block.check()
                self._at_end(self._value)
            except BaseException as error:
                block.leave(self._level, type(error))
                raise
        block.leave(self._level, failure)
