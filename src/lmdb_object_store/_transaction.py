"""Transaction blocks: LMDB's writer, held while user code runs, and its changes."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from threading import get_ident
from typing import Any, TypeVar

import lmdb

from ._buffer import ABSENT, Batch, Limits, State, WriteBuffer
from ._commit import Committer
from ._environment import Pick, drop_transaction
from ._keys import KeyRange
from ._reads import Source, is_as_expected, is_stored, last_key, pick_none
from ._scan import Scan
from ._scope import Scope
from ._values import Values
from .exceptions import BusyError, ClosedError

_R = TypeVar("_R")
_T = TypeVar("_T")

_CHUNK_KEYS = 512
_CLOSED = (State.ORPHANED, State.INHERITED, State.CLOSED)


def current_task() -> object:
    """Return the asyncio task that this thread is running, if any."""
    asyncio: Any = sys.modules.get("asyncio")
    if asyncio is None:
        return None
    # Cheap where no loop runs, unlike current_task. Absent while asyncio is imported.
    running_loop = getattr(asyncio, "_get_running_loop", None)
    if running_loop is None or running_loop() is None:
        return None
    return asyncio.current_task()


_of_thread = threading.local()


class TransactionBlock(Source):
    """The open transaction block of a thread.

    LMDB's writer is open from the beginning, which keeps other processes from
    writing, but the changes are only collected, and applied when the block ends:
    so a map that is too full for them can grow, each key is written once, and
    reads see the state of the last commit, with these changes over it.

    No other thread writes while `WriteBuffer.block` is this block: see `Writer`.
    A `savepoint` stands for a ``with`` statement: the block's own, or a nested one.
    """

    def __init__(self, committer: Committer, savepoint: Batch) -> None:
        self._committer = committer
        super().__init__(committer.environment, WriteBuffer())  # for the changes
        self._writer = committer.writer
        self.state = State.BEGINNING
        self.thread = get_ident()
        self.task = current_task()
        self.opened = time.monotonic()
        self.txn: lmdb.Transaction[Any] | None = None  # until the commit takes it
        self.committed: lmdb.Transaction[Any] | None = None  # from then on
        self.id = 0  # LMDB's number of the transaction
        # For each `with` statement: the changes under its keys before it wrote them.
        self.savepoints = [savepoint]
        self._why = ""
        self._process = os.getpid()
        # So the block ends with its thread, if a generator has not ended it.
        token = vars(_of_thread).setdefault("token", {0})  # takes weak references
        self._thread_end: Any = weakref.ref(token, lambda _: self.finish())

    # Its life

    def is_here(self) -> bool:
        return self.thread == get_ident()

    @property
    def closed(self) -> bool:
        """Whether nothing can be read or written in the block any more."""
        return self.state in _CLOSED

    def closed_error(self) -> ClosedError:
        return ClosedError(
            f"A transaction block of {self.environment.path!r} is closed{self._why}: "
            "iterators and nested blocks that begin in it have to end with it."
        )

    def check(self) -> None:
        """Raise if this is no place for operations of the block."""
        if self.state in _CLOSED:
            raise self.closed_error()
        if self.thread != get_ident() or current_task() is not self.task:
            raise BusyError(
                "A transaction block is open, and this is another asyncio task, or "
                "another thread, than the one that it belongs to. Don't await inside "
                "the block, or run the other task's operation in a thread, where "
                "writes wait for the end of the block, and reads don't."
            )

    def open(self) -> None:
        """Begin; flush the pending writes before. `finish` ends a part of this, too."""
        self._writer.do(self._open)

    def _open(self) -> None:
        committer = self._committer
        committer.check_open()
        committer.buffer.begin_block(self)
        while True:
            committer.flush()
            begin = self.environment.begin
            try:
                # It is kept nowhere else: see `locked`.
                self.txn = self.environment.begin_write()
            except lmdb.Error as error:
                self.environment.repair_as_writer(error, begin)
                continue
            self.id = self.txn.id()
            if committer.buffer.open_block(self):
                return
            drop_transaction(self)  # a signal handler has put something

    def leave(self, savepoint: Batch, failure: type[BaseException] | None) -> None:
        """End a ``with`` statement: commit if it is the outermost, or undo."""
        normally = failure is None
        if self._is_over(savepoint):
            if normally:
                raise self.closed_error()
        elif normally and savepoint is not self.savepoints[-1]:
            self.finish()
            raise BusyError(
                "A transaction block has ended before one that is nested in it, of a "
                "suspended generator perhaps. Nothing of both is written."
            )
        elif normally and len(self.savepoints) > 1:
            self._merge()
        elif normally:
            try:
                self._writer.do(self._commit)
            finally:
                self.finish()
        elif savepoint is self.savepoints[0]:
            self.finish()
        elif failure is GeneratorExit and savepoint:
            # No thread can tell which changes are the generator's.
            self._orphan("a generator was given up inside a nested `with` statement")
        else:
            while self._has(savepoint):
                self._undo()

    def _is_over(self, savepoint: Batch) -> bool:
        """Return whether the block has ended otherwise; complete that end."""
        if self.state is State.INHERITED:
            if savepoint is self.savepoints[0]:
                self._committer.buffer.end_block(self)
        elif self._has(savepoint):
            if not self.is_here():
                why = "another thread has ended its `with` statement, or a nested one"
                self._orphan(why)
            elif self.state is State.ORPHANED:
                self.finish()
            else:
                return False
        return True

    def _has(self, savepoint: Batch) -> bool:
        return any(savepoint is other for other in self.savepoints)

    def _commit(self) -> None:
        self.state = State.ENDING
        if self.pending.entries:
            self._committer.commit(self.pending.entries)
        elif self.txn is None:  # the environment was reopened
            self._committer.check_block()

    def _undo(self) -> None:
        """Undo the changes of the innermost statement: again after an interrupt."""
        savepoint = self.savepoints[-1]
        changes = self.pending.entries
        for key in list(savepoint):  # a signal handler's put can add to it
            if savepoint[key] is ABSENT:
                changes.pop(key, None)
            else:
                changes[key] = savepoint[key]
        self.pending.removals += 1
        self.savepoints.pop()

    def _merge(self) -> None:
        """Make the changes of the innermost statement the next one's."""
        if len(self.savepoints) > 2:  # the outermost is undone without its savepoint
            outer, savepoint = self.savepoints[-2:]
            for key in list(savepoint):
                outer.setdefault(key, savepoint[key])
        self.savepoints.pop()

    def finish(self) -> None:
        """Undo all that is not committed, and let others write. For its own thread.

        A second call does nothing, or the rest that an interrupt has prevented.
        """
        if not self.savepoints or os.getpid() != self._process:
            return  # in a child the parent ends the block
        self.state = State.CLOSED
        try:
            if self.txn is not None:
                # A fork must not come in the midst.
                self.gate.read(drop_transaction, self)
        finally:
            try:
                self._committer.buffer.end_block(self)
                self._end()  # after that: it keeps `finish` from being done again
            finally:
                pass
        self._writer.log_lines()

    def finish_orphan(self) -> None:
        """End a block left in another thread; raise if its outermost statement runs."""
        nested = len(self.savepoints) > 1
        self.finish()
        if nested:
            raise self.closed_error()

    def _end(self) -> None:
        self.txn = self.committed = self.task = self._thread_end = None
        self.gate.stop_iterators(self)
        self.pending.entries = {}
        self.savepoints = []

    def _orphan(self, why: str) -> None:
        """End the block for all but its thread, which alone can end the transaction."""
        self._why = f", as {why}. Nothing of it is written"
        self.state = State.ORPHANED
        self.gate.stop_iterators(self)

    def leave_to_parent(self) -> None:
        """Leave the block to the parent process: in a child, its operations raise."""
        why = ", as it belongs to the parent process, which was forked inside it"
        self._why = self._why or why
        self.state = State.INHERITED
        savepoints = self.savepoints
        self._end()
        self.savepoints = savepoints

    # Reads

    def view(self, pick: Pick, action: Callable[..., _R], *args: Any) -> _R:
        self.check()
        return super().view(pick, action, *args)

    def fetch(self, key: bytes) -> bytes | None:
        self.check()
        return super().fetch(key)

    def read(self, key: bytes, default: Any, values: Values) -> Any:
        return self.environment.read(key, default, values, self)

    def holds(self, key: bytes) -> bool:
        return self.environment.holds(key)

    # Writes: those of `SharedStore`, but kept for the end of the block

    def flush(self) -> None:
        """Do nothing: the changes are written when the block ends."""

    flush_for_read = flush
    check_open = flush  # the store was open when the block began

    def write(self, key: bytes, raw: bytes | None, limits: Limits) -> None:
        if len(self.savepoints) > 1:
            self._note((key,))
        self.pending.entries[key] = raw

    def compare_and_set(
        self, key: bytes, expected: Any, raw: bytes | None, limits: Limits
    ) -> bool:
        self.check()
        while True:
            pending = self.pending.entries.get(key, ABSENT)
            if pending is ABSENT:
                environment = self.environment
                repair = environment.repair
                fits = environment.retry(repair, is_stored, key, expected)
            else:
                fits = is_as_expected(expected, pending)
            if not fits:
                return False
            self._note((key,))
            # Only a signal handler's put can have come between.
            if self.pending.swap(key, pending, raw, 0):
                return True

    def compare_and_delete_last(
        self, key: bytes, expected: bytes, limits: Limits
    ) -> bool:
        is_last = last_key(self) == key
        return is_last and self.compare_and_set(key, expected, None, limits)

    def write_many(self, batch: Batch) -> None:
        self._note(batch)
        self.pending.entries.update(batch)  # in one step for signal handlers, too

    def delete_many(self, keys: Collection[bytes]) -> int:
        wanted = list(keys)
        found: list[bytes] = []
        for start in range(0, len(wanted), _CHUNK_KEYS):
            chunk = wanted[start : start + _CHUNK_KEYS]
            found += self.view(pick_none, self._existing, chunk)
        return self._delete(found)

    def _existing(self, txn: Any, _: None, keys: list[bytes]) -> list[bytes]:
        changes = self.pending.entries
        stored = txn.cursor().set_key
        return [
            key
            for key in keys
            if (changes[key] is not None if key in changes else stored(key))
        ]

    def delete_range(self, keys: KeyRange) -> int:
        return self._delete(Scan(self, keys, False).keys())

    def _delete(self, keys: Iterable[bytes]) -> int:
        deletions: Batch = dict.fromkeys(keys)
        self.write_many(deletions)
        return len(deletions)

    def _note(self, keys: Iterable[bytes]) -> None:
        """Note the changes to restore if the innermost statement fails."""
        if len(self.savepoints) > 1:
            for key in keys:
                before = self.pending.entries.get(key, ABSENT)
                self.savepoints[-1].setdefault(key, before)


class BlockScope(Scope[_T]):
    """A transaction block, or a ``with`` statement nested in one.

    Parameters
    ----------
    outer : callable
        Returns the block that this thread is in, if any.
    begin : callable
        Returns the object that the statement yields. Called inside the block.
    end : callable, optional
        Called with that object, inside the block, when the statement ends normally.
    """

    def __init__(
        self,
        committer: Committer,
        outer: Callable[[], TransactionBlock | None],
        begin: Callable[[], _T],
        end: Callable[[_T], None] | None = None,
    ) -> None:
        self._committer = committer
        self._outer = outer
        self._begin = begin
        self._at_end = end
        self._savepoint: Batch = {}
        self._block: TransactionBlock | None = None

    def enter(self) -> _T:
        self._block = self._outer()
        if self._block is not None:
            self._block.savepoints.append(self._savepoint)
        else:
            self._block = TransactionBlock(self._committer, self._savepoint)
            self._block.open()
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
                block.leave(self._savepoint, type(error))
                raise
        block.leave(self._savepoint, failure)
