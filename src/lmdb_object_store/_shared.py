"""The shared store: one for each data file and process, used by all its store objects.

`SharedStore` makes the parts and holds the operations that need several of them:

- `Gate`: reads share it; a thread that moves or unmaps the map has it alone.
- `WriteBuffer`: the pending writes, and the open transaction block.
- `Writer`: one writer of the process, and the things that a writer waits for.
- `Environment`: the `lmdb.Environment`, opened again and its map moved as need be.
- `Committer`: the one place that begins, applies and commits.
- `Users`: the store objects that use it; with the last one it is closed.

Locks, in the order in which they may be taken together: fork lock, registry lock,
write lock, gate, lock of a snapshot, buffer lock, lock of the flusher. Under the write
lock alone a process waits for its turn (see `_queue`), then for LMDB's lock. No user
code runs under any of them but LMDB's, which a transaction block holds.

A signal handler or a finalizer can run inside any operation, on the same thread. The
locks are re-entrant, and `Writer.interrupted_here` tells such a call apart: it may
put and delete (which then only buffers), and gets a `BusyError` where it would have
to wait for the call that it interrupted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Any, TypeVar, cast

from ._buffer import ABSENT, Batch, Limits, State, WriteBuffer, size_of
from ._commit import Committer
from ._environment import MUTEX_KNOWS_ITS_OWNER, UNSOUND, Environment, Pick
from ._files import check_shared, writable_options
from ._flusher import flusher
from ._keys import KeyRange
from ._locks import Action, poll, try_locked
from ._reads import Source, is_as_expected, is_stored, last_key_of, pick_all
from ._registry import Handle, Ref, Users
from ._snapshot import SnapshotSource
from ._timed_flush import TimedFlush
from ._transaction import TransactionBlock, current_task
from ._writer import Writer, as_writer, log
from .exceptions import BusyError, GrowthError, ReplacedError

_R = TypeVar("_R")

_EXIT_PATIENCE = 5.0  # seconds that the flush at exit waits for a (daemon) thread
_READ_FLUSH_PAUSE = 1.0  # seconds until reads try again a flush that failed


class SharedStore(Source):
    """An open data file, shared by all threads and store objects of this process."""

    def __init__(
        self,
        path: str,
        options: dict[str, Any],
        cap: int | None,
        timeout: float,
        flush_interval: float | None,
    ) -> None:
        self.path = path
        self.options = options
        self.readonly = bool(options.get("readonly"))
        pending = WriteBuffer(*(["readonly"] if self.readonly else []))
        self.writer = Writer(path, timeout, pending)
        super().__init__(Environment(path, options, cap, self.writer), pending)
        self.committer = Committer(self.environment)
        self.check_open = self.committer.check_open
        self.users = Users(self.pending, self._abandon)
        self.read = self.environment.read
        self.holds = self.environment.holds
        # Guarded by the fork lock.
        self.at_rest = False  # whether, at a fork, no call of LMDB is running
        self.unsound = False  # in a child: whether it can never be used or closed
        self.max_map_size = cap
        self.timed = TimedFlush(self.environment, self.flush_hurried, flush_interval)

    # Options of all its users

    @property
    def max_map_size(self) -> int | None:
        return self.committer.map.cap

    @max_map_size.setter
    def max_map_size(self, cap: int | None) -> None:
        self.committer.map.cap = cap
        self.pending.max_value = self.committer.map.max_value()
        self._read_flush_due = 0.0  # when a read may try again a flush that failed

    @property
    def timeout(self) -> float:
        return self.writer.timeout

    @timeout.setter
    def timeout(self, value: float) -> None:
        self.writer.timeout = value

    def raise_floor(self, map_size: int) -> None:
        """Make the next growth lead to `map_size` bytes at least."""
        self.committer.map.floor = max(self.committer.map.floor, map_size)

    # Writes

    def write(self, key: bytes, raw: bytes | None, limits: Limits) -> None:
        """Buffer a write; where that makes a batch full, flush with it.

        If that flush fails, the write is refused: it has never been in the buffer, so
        no other thread has seen it.
        """
        pending = self.pending
        block = pending.block
        size = len(key) + len(raw or b"")
        fits = not pending.is_full(limits, key not in pending.entries, size)
        if not (fits and pending.accepts):
            if self.writer.interrupted_here():  # all other ways would have to wait
                if pending.add_unless(key, raw, size, block, True):
                    return
                raise self.closed_error()
            if "closing" in pending.refusals:
                raise self.closed_error()
            if block is not None:
                fits = False
            elif (
                not fits
                and limits[0] > 1  # a batch of one is on disk when the write returns
                and (self.writer.thread is not None or pending.size + size >= limits[1])
            ):
                fits, size = self._fits_closely(key, raw, size, limits)
        if not (fits and pending.add_unless(key, raw, size, block)):
            self._write_now(key, raw, limits)

    def _fits_closely(
        self, key: bytes, raw: bytes | None, size: int, limits: Limits
    ) -> tuple[bool, int]:
        """Return whether a write may just be buffered at a second look, and its size.

        While another thread commits, a write does not wait for that commit before the
        buffer holds twice the batch. And the size of the buffer counts overwritten
        values, too.
        """
        pending = self.pending
        twice = limits[0] * 2, limits[1] * 2
        new = key not in pending.entries
        if self.writer.thread is not None and not pending.is_full(twice, new, size):
            return True, size
        if len(pending.entries) + new >= limits[0]:
            return False, size
        exact = size_of({**pending.entries, key: raw})
        exiting = "exiting" in pending.refusals
        return exact < limits[1] and not exiting, exact - pending.size

    @as_writer
    def _write_now(self, key: bytes, raw: bytes | None, limits: Limits) -> None:
        pending = self.pending
        if "closing" in pending.refusals:
            raise self.closed_error()
        size = len(key) + len(raw or b"")
        if pending.is_full(limits, key not in pending.entries, size):
            self.committer.flush({key: raw})
        else:  # the thread has waited for a transaction block, say
            pending.add(key, raw, size)

    @as_writer
    def compare_and_set(
        self, key: bytes, expected: Any, raw: bytes | None, limits: Limits
    ) -> bool:
        """Buffer a write if the stored raw value is as expected; return whether it is.

        None expects no value, ANYTHING any. Comparing and writing are one step for all
        threads.
        """
        self.check_open()
        buffer = self.pending
        size = len(key) + len(raw or b"")
        while True:
            # Only a put can come between now and the swap: this thread is the writer.
            pending = buffer.entries.get(key, ABSENT)
            if not self._holds(key, pending, expected):
                return False
            if not buffer.is_full(limits, key not in buffer.entries, size):
                if buffer.swap(key, pending, raw, size):
                    return True
                continue
            batch = dict(buffer.entries)
            if batch.get(key, ABSENT) is pending:
                self.committer.flush({key: raw}, batch)
                return True

    def _holds(self, key: bytes, pending: Any, expected: Any) -> bool:
        """Return whether the stored value of `key`, or `pending`, is as expected."""
        if pending is not ABSENT:
            return is_as_expected(expected, pending)
        environment = self.environment
        repair = environment.repair_as_writer
        return environment.retry(repair, is_stored, key, expected)

    def _view_as_writer(self, pick: Pick, action: Action[_R], *args: Any) -> _R:
        environment, pending = self.environment, self.pending
        repair, view = environment.repair_as_writer, environment.view
        result: _R = environment.retry(repair, view, pending, pick, action, args)
        return result

    @as_writer
    def compare_and_delete_last(
        self, key: bytes, expected: bytes, limits: Limits
    ) -> bool:
        """Delete an entry as `compare_and_set` does, if no entry comes after it.

        A full buffer is flushed before the deletion rather than with it: during that
        commit another thread could put a later key.
        """
        self.check_open()
        buffer = self.pending
        if buffer.is_full(limits, 1, len(key)):
            with suppress(GrowthError):
                self.committer.flush()
        pending = dict(buffer.entries)
        last = self._view_as_writer(partial(pick_all, buffer), last_key_of)
        if last != key or not self._holds(key, pending.get(key, ABSENT), expected):
            return False
        if buffer.is_full(limits, 1, len(key)):  # a batch of one, or there is no room
            if buffer.entries != pending:
                return False
            self.committer.flush({key: None}, pending)
            return True
        return buffer.delete_last(key, pending, len(key))

    @as_writer
    def write_many(self, batch: Batch) -> None:
        """Flush the pending writes, then write `batch` in one transaction."""
        self.check_open()
        self.committer.flush()  # later puts of other threads count as put later
        if batch:
            self.committer.commit(batch)

    @as_writer
    def delete_many(self, keys: Collection[bytes]) -> int:
        """Delete `keys` in one transaction; return how many existed."""
        self.check_open()
        return self.committer.delete_many(keys)

    @as_writer
    def delete_range(self, keys: KeyRange) -> int:
        """Delete a key range in one transaction; return how many keys existed."""
        self.check_open()
        return self.committer.delete_range(keys)

    @as_writer
    def flush(self) -> None:
        self.check_open()
        self.committer.flush()
        self.committer.tell_refused()

    def flush_for_read(self) -> None:
        """Persist the pending writes, unless that would wait or has just failed."""
        if self.writer.would_wait() or time.monotonic() < self._read_flush_due:
            return
        try:
            self.flush_hurried()
        except Exception:
            self._read_flush_due = time.monotonic() + _READ_FLUSH_PAUSE
            text = "A read could not flush the pending writes of %s; they are kept"
            log.error(text, self.path, exc_info=True)

    @as_writer
    def flush_hurried(self) -> None:
        """Flush, unless that has to wait for a snapshot."""
        self.writer.hurried = True
        try:
            self.committer.flush()
        finally:
            try:
                self.writer.hurried = False
            finally:
                pass

    # Transaction blocks and snapshots

    def current(self) -> SharedStore | TransactionBlock:
        """Return the store or block that the operations of this thread belong to."""
        return self.current_block() or self

    def current_block(self) -> TransactionBlock | None:
        """Return the transaction block that this thread is in, if any."""
        # No cast(), which is a call for each read of a block.
        pending: Any = self.pending
        block: TransactionBlock | None = pending.block
        if block is None or block.thread != get_ident():
            return None
        if block.state is State.ORPHANED:
            block.finish_orphan()
            return None
        if block.state not in (State.OPEN, State.INHERITED):
            return None  # it begins or ends: a signal handler or finalizer is here
        if block.state is State.INHERITED or current_task() is not block.task:
            block.check()
        return block

    def open_snapshot(self, snapshot: SnapshotSource) -> None:
        """Open a snapshot, which has the pending writes, too."""
        self._refuse_in_block("snapshot()")
        if self.writer.interrupted_here():
            raise self.writer.busy_error()
        if not self.options.get("lock", True):
            raise ValueError(
                f"snapshot() needs LMDB's locks, and {self.path!r} was opened with "
                "lock=False: other processes would write over what it shows."
            )
        tracker = self.writer.snapshots
        if self.pending.entries or (tracker.growth_waits and not tracker.opened_here()):
            self.writer.do(self.committer.flush)
        snapshot.open()

    def flush_for_copy(self) -> None:
        """Flush what a copy is to have; raise if the path leads to another file."""
        self._refuse_in_block("copy_to()")
        self.writer.do(self.committer.flush)
        self.environment.check_files()

    def _refuse_in_block(self, call: str) -> None:
        if self.current() is not self:
            raise BusyError(
                f"{call} was called inside a transaction block of {self.path!r}, whose "
                "changes are not in the file yet. Call it before or after the block."
            )

    # The store objects that use it

    def enter(self, handle: Handle, warn: bool, wanted: dict[str, Any]) -> bool:
        """Let one more object use the store; return False if it is being closed.

        An object that writes lets an environment that can only read be opened again.
        """
        refusals = self.pending.refusals
        writes = not wanted.get("readonly")
        if self.readonly and writes and "closing" not in refusals:
            self.writer.do(self._open_for_writing, wanted)
        if "closing" not in refusals:
            has = {**self.options, "lib_version": self.environment.engine}
            check_shared(self.path, has, wanted)
        return self.users.enter(handle, warn)

    def _open_for_writing(self, wanted: dict[str, Any]) -> None:
        if "closing" in self.pending.refusals or not self.readonly:
            return  # another thread was faster
        options = writable_options(self.options, wanted)
        options["lib_version"] = self.environment.engine
        check_shared(self.path, options, wanted)
        self.environment.open_for_writing(options)
        self.options = options
        self.readonly = False
        self.pending.allow("readonly")

    def await_close(self, deadline: float) -> None:
        """Wait until the store is closed, or stays open as a read kept it from that."""
        if self.unsound:
            raise BusyError(f"{self.path!r} can't be opened here: {UNSOUND}.")
        notice = self.writer.notice("opening waits for the end of a close")
        left = deadline - time.monotonic()
        if not poll(self._close_has_ended, left, 0.001, notice=notice):
            raise self._closing_error()

    def _close_has_ended(self) -> bool:
        if "closing" not in self.pending.refusals or self.closed:
            return True
        if self.writer.interrupted_here():
            raise self._closing_error()
        return False

    def _closing_error(self) -> BusyError:
        return BusyError(
            f"The store at {self.path!r} is in the middle of being closed. "
            "Open it again later."
        )

    def leave(self, handle: Ref, owner: object) -> Exception | None:
        """Flush and sync for an object that is closed; close if no other is left.

        The snapshots of `owner` end. Returns the error of the flush, if any.
        """
        if get_ident() in self.gate.readers:
            raise BusyError(
                "close() was called while this thread is reading from the store (by "
                "something that an unpickling runs, for example); close it after the "
                "read."
            )
        if self.current() is not self:
            raise BusyError(
                f"close() was called inside a transaction block of {self.path!r}; "
                "close it after the block."
            )
        if self.writer.interrupted_here():
            raise self.writer.busy_error()
        for snapshot in self.writer.snapshots.all():  # growth may wait for them
            if snapshot.owner is owner:
                snapshot.close()
        error = self._leave(handle)
        if not (self.users.handles or self.closed):
            # The others were dropped in the midst of that: see `_abandon`.
            error = self._leave(handle)
        if error is not None:
            self._log_failure("Final flush", error)
        return error

    @as_writer
    def _leave(self, handle: Ref) -> Exception | None:
        if self.closed:
            return None
        last = self.users.close_after(handle)
        error = None
        try:
            self._finish()
        except Exception as failure:
            error = failure
        if last:
            try:
                self.writer.exclusive(self._close)
            except BusyError:
                self.pending.allow("closing")  # a read keeps the store open
                raise
        else:
            self.users.leave(handle)
        return error

    def _finish(self) -> None:
        try:
            self.committer.flush()
            self.committer.tell_refused()
        finally:
            self.environment.sync()

    def _close(self) -> None:
        flusher.forget(self.timed)
        try:
            self.environment.close()
        finally:
            self.pending.give_up()
            self.writer.snapshots.forget_all()
            self.gate.stop_iterators(self)  # pins go on with their copies

    def _abandon(self, handle: Ref) -> None:
        """Leave for an object that was garbage-collected without being closed."""
        if "exiting" in self.pending.refusals or self.closed:
            return  # as at exit it writes through
        warn = self.users.handles.get(handle, False)
        left = self.users.leave_others(handle)
        if left:
            self.flush_for_read()
        # After that flush the others may be gone. And where no other object was left at
        # first, the handle still counts, though another object may have entered since.
        if not left or self.users.only(handle):
            try:
                self.leave(handle, None)
            except BusyError:
                # Another object is leaving on this thread, which will close the store.
                # Else the store stays open, for the next object.
                self.users.leave(handle)
        if warn:
            self._warn_unclosed()

    def _log_failure(self, action: str, error: Exception) -> None:
        if not (self.closed or "exiting" in self.pending.refusals):
            count, fate = len(self.pending.entries), "kept for its other stores"
        else:
            count, fate = len(self.pending.lost or self.pending.entries), "lost"
        lost = f"{count} pending writes are {fate}" if count else "nothing was pending"
        text = "%s of %s failed, %s: %s"
        log.error(text, action, self.path, lost, error, exc_info=error)

    def _warn_unclosed(self) -> None:
        text = f"LmdbObjectStore {self.path!r} was not closed; use `with` or close()."
        warnings.warn(text, ResourceWarning, stacklevel=2)

    # Exit

    def write_through(self) -> None:
        """Flush with every write from now on."""
        self.pending.refuse("exiting")

    def flush_at_exit(self) -> None:
        """Flush, and write through from now on: the process is about to end.

        Closes nothing: a daemon thread may be reading. A daemon thread may also have
        been stopped with the write lock in its hands, so the wait has an end.
        """
        self.write_through()
        try:
            block = cast("TransactionBlock | None", self.pending.block)
            if block is not None and block.is_here():
                block.finish()  # its generator was never closed, say
            finish = partial(self.writer.do, self._finish)
            # The flusher ends, though another process may hold it up.
            flushes = flusher.is_flusher(self.writer.thread)
            patience = -1 if flushes else _EXIT_PATIENCE
            if not try_locked(self.writer.lock, patience, finish):
                raise BusyError("Another thread is still writing.")
        except Exception as error:
            harmless = isinstance(error, BusyError | ReplacedError)
            if self.pending.entries or not harmless:
                self._log_failure("Flush at exit", error)
        self.writer.log_lines()
        if any(self.users.handles.values()):
            self._warn_unclosed()

    # Fork

    def reset_in_child(self) -> None:
        """Begin anew in a child process made by fork: leave everything to the parent.

        Threads that don't exist here may hold the locks. A read transaction that is
        aborted or closed here would free a reader slot that the parent is using: such
        transactions are forgotten before.
        """
        busy = self.writer.thread is not None or True in self.gate.readers.values()
        at_rest = self.at_rest or not busy
        block: Any = self.pending.block
        txn = None
        if block is not None:
            txn = block.txn or block.committed
            ended = block.state in (State.BEGINNING, State.ENDING, State.CLOSED)
            keeps = block.is_here() and at_rest and not ended
            block.leave_to_parent()
            self.pending.block = block if keeps else None
        why = "it belongs to the parent of this child process"
        self.writer.snapshots.forget_all(why)
        self._reset_parts()
        if at_rest and (txn is None or MUTEX_KNOWS_ITS_OWNER):
            if txn is not None:
                txn.abort()  # or py-lmdb's close would wait for its thread
            self.environment.leave_to_parent()
        else:
            self.give_up()

    def _reset_parts(self) -> None:
        self.gate.reset_in_child()
        self.pending.reset_in_child()
        self.writer.reset_in_child()
        self.users.handles = dict.fromkeys(self.users.handles, False)  # warn of none
        self.timed.interval = self.timed.interval

    def give_up(self) -> None:
        """Close for good in a child that can't even close what it has inherited."""
        self._reset_parts()
        self.unsound = True
        self.pending.block = None
        self.pending.refuse("closing")
        self.environment.give_up()
