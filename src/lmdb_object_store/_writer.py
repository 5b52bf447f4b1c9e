"""One writer of the process at a time, and the things that a writer waits for.

A thread that wants to write waits for the write lock, then for the end of another
thread's transaction block, and if the map has to move, for the open snapshots. Each
wait ends after `Writer.timeout` seconds, and is logged after one. A thread that would
wait for itself gets an error at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial, wraps
from math import inf
from threading import RLock, get_ident
from typing import Any, Protocol, TypeVar, cast

from . import _fork
from ._buffer import OpenBlock, State, WriteBuffer
from ._gate import SLICE, Gate
from ._locks import Action, Args, Method, held_here, locked, poll, try_locked
from .exceptions import BusyError, SnapshotOpenError

log = logging.getLogger("lmdb_object_store")

_R = TypeVar("_R")
_BUSY = (State.BEGINNING, State.ENDING, State.CLOSED)


class OpenSnapshot(Protocol):
    """A snapshot, as a writer knows it."""

    thread: int  # has opened it
    opened: float  # by time.monotonic()
    awaited: float  # since when growth waits for it
    pending: WriteBuffer  # empty; its lock guards the transaction
    owner: Any  # the store object that it is of

    def close(self) -> None: ...
    def forget(self, why: str = "") -> None: ...


class SnapshotTracker:
    """The open snapshots, which keep the map from moving.

    Guarded by the GIL: look at a copy of `open`.
    """

    def __init__(self) -> None:
        self.open: set[OpenSnapshot] = set()
        self.growth_waits = False  # so new snapshots wait, too

    def all(self) -> list[OpenSnapshot]:
        return list(self.open)

    def opened_here(self) -> int:
        """Return how many of the open snapshots this thread has opened."""
        me = get_ident()
        return [snapshot.thread for snapshot in self.all()].count(me)

    def forget_all(self, why: str = "") -> None:
        """Let go of all transactions, which end with the environment."""
        for snapshot in self.all():
            snapshot.forget(why)

    def kept_growth_waiting(self, timeout: float) -> bool:
        """Return whether growth has waited `timeout` seconds for one snapshot.

        Then no other writer of a queue waits for that snapshot.
        """
        now = time.monotonic()
        for snapshot in self.all():
            snapshot.awaited = snapshot.awaited or now
            if now >= snapshot.awaited + timeout:
                return True
        return False


class Writer:
    """The write lock, its holder, and the waits before and while it is held.

    During a transaction block the block's thread is the writer instead, without the
    lock: a thread that gets the lock waits for the end of the block first. A lock
    would stay locked where another thread throws away the generator that the
    ``with`` statement of the block is in.
    """

    def __init__(self, path: str, timeout: float, buffer: WriteBuffer) -> None:
        self.path = path
        self.timeout = timeout
        self.gate = Gate()
        self.buffer = buffer
        self.snapshots = SnapshotTracker()
        self.lock = RLock()
        # Guarded by the write lock.
        self.thread: int | None = None  # the thread that writes
        self.hurried = False  # whether not to wait for open snapshots
        self.lines: deque[Args] = deque()  # to log in a thread that holds up no other

    def interrupted_here(self) -> bool:
        """Return whether this thread is interrupted in the midst of an operation.

        That is while it writes, reads, buffers or forks, or its block begins or ends.
        """
        me = get_ident()
        block = self.buffer.block
        return (
            self.thread == me
            or self.gate.readers.get(me, False)
            or self.buffer.lock._is_owned()  # type: ignore[attr-defined]  # `held_here`
            or _fork.forking == me
            or (block is not None and block.thread == me and block.state in _BUSY)
        )

    def is_writing(self) -> bool:
        """Return whether a thread may call LMDB to write, and waits for no snapshot."""
        return self.thread is not None and not self.snapshots.growth_waits

    def would_wait(self) -> bool:
        """Return whether a flush would have to wait for others."""
        block = self.buffer.block
        return (
            self.thread is not None
            or (block is not None and block.state is not State.INHERITED)
            or "closing" in self.buffer.refusals
            or self.interrupted_here()
        )

    def do(self, action: Action[_R], *args: Any) -> _R:
        """Call `action` under the write lock; it must not run user code."""
        if self.interrupted_here():
            raise self.busy_error()
        block = self.buffer.block
        began = time.monotonic() if block is not None else 0.0
        try:
            if block is not None and block.is_here() and block.state is State.OPEN:
                return self._write(began, action, args)
            if self.snapshots.open and self.snapshots.opened_here():
                return self._write_or_fail(began, action, args)
            result: _R = locked(self.lock, self._write, began, action, args)
            return result
        finally:
            if self.lines:
                self.log_lines()

    def busy_error(self) -> BusyError:
        return BusyError(
            "The store is in the middle of another operation on this thread: a signal "
            "handler or finalizer can get, put and delete there, but not flush, write "
            "many, take snapshots, grow or close."
        )

    def _write_or_fail(self, began: float, action: Action[_R], args: Args) -> _R:
        """Wait for the write lock as a thread with an open snapshot has to.

        1. This thread, which has a snapshot open, waits for the write lock.
        2. The lock's holder has to grow the map, and waits for the snapshot.
        3. Both wait until `timeout` is over, unless this thread gives up.
        """
        results: list[_R] = []
        write = partial(self._write, began, action, args)
        while not try_locked(self.lock, SLICE, lambda: results.append(write())):
            self._fail_if_growth_waits()
        return results[0]

    def _fail_if_growth_waits(self) -> None:
        if self.snapshots.growth_waits and self.snapshots.opened_here():
            raise self.snapshot_error()

    def _write(self, began: float, action: Action[_R], args: Args) -> _R:
        if (block := self.buffer.block) is not None:
            self._await_block(block, began)
        try:
            self.thread = get_ident()
            if _fork.forking is not None:
                self._begin_after_fork()
            return action(*args)
        finally:
            try:
                self.thread = None
            finally:
                pass

    def _begin_after_fork(self) -> None:
        me = get_ident()
        while _fork.forking not in (None, me):
            self.thread = None
            _fork.await_fork()
            self.thread = me

    def _await_block(self, block: OpenBlock, began: float) -> None:
        """Wait for the end of another thread's block.

        `began` is the time at which the call did: the writers of a queue wait side by
        side.
        """
        left = max(began, block.opened) + self.timeout - time.monotonic()
        notice = partial(self._tell, "a write waits for a transaction block", block)
        if not poll(self._block_has_ended, left, 0.00005, 0.005, notice):
            block = self.buffer.block or block
            since = time.monotonic() - block.opened
            raise BusyError(
                f"A transaction block of {self.path!r} that thread {block.thread} "
                f"opened {since:.1f} s ago does not end, and keeps all others from "
                "writing. Don't wait in a block for a thread that writes; keep blocks "
                "short, or raise the timeout."
            )

    def _block_has_ended(self) -> bool:
        block = self.buffer.block
        if block is None or block.is_here() or block.state is State.INHERITED:
            return True  # one that is inherited keeps no other thread from writing
        if block.state is State.ORPHANED:
            raise BusyError(
                f"A transaction block of {self.path!r} has been left in another thread "
                "than the one that began it, which alone can end it: by using the "
                "store again, or by ending itself. Nothing can be written before that."
            )
        if "exiting" in self.buffer.refusals:
            raise BusyError(
                f"A transaction block of {self.path!r} in another thread will not end, "
                "as the interpreter ends."
            )
        self._fail_if_growth_waits()
        return False

    def await_snapshots(self) -> None:
        """Wait until the map may move, and let reads go on meanwhile."""
        try:
            poll(self._may_move, inf, 0.001, notice=self._notice_snapshots)
        finally:
            try:
                self.snapshots.growth_waits = False
                self._begin_after_fork()  # none waits for the end of this wait
            finally:
                pass

    def _may_move(self) -> bool:
        tracker = self.snapshots
        if not tracker.open:
            return True
        if self.buffer.refusals & {"closing", "exiting"}:
            for snapshot in tracker.all():
                snapshot.close()  # it ends now, or in a moment
            return True
        if (
            self.hurried
            or self.gate.holder == get_ident()  # and reads wait
            or tracker.opened_here()
            or tracker.kept_growth_waiting(self.timeout)
        ):
            raise self.snapshot_error()
        tracker.growth_waits = True
        return False

    def _notice_snapshots(self) -> None:
        for snapshot in self.snapshots.all():
            self._tell("growth waits for a snapshot", snapshot)

    def snapshot_error(self) -> SnapshotOpenError:
        here = self.snapshots.opened_here()
        whose = "one of them by this thread" if here else "for long"
        return SnapshotOpenError(
            f"The map of {self.path!r} has to move, as it is full, another process has "
            "made it larger, or a store opens the file for writing; but "
            f"{len(self.snapshots.open)} snapshots are open, {whose}. Close snapshots "
            "sooner, or open the store with a larger map_size, so that the map need "
            "not grow. Pending writes are kept; flush again later."
        )

    def exclusive(self, action: Action[_R], *args: Any) -> _R:
        """Call `action` when no read is in the map. See `Gate.exclusive`."""
        notice = self.notice("growth or close waits for a read to end")
        return self.gate.exclusive(self.timeout, notice, action, *args)

    def notice(self, text: str) -> Action[None]:
        """Return a function that logs a wait."""
        return partial(warn_elsewhere, "%s: %s", self.path, text)

    def log_later(self, level: int, text: str) -> None:
        """Log when the write lock is free: a logging handler is user code."""
        self.lines.append((level, "%s: %s", self.path, text))

    def log_lines(self) -> None:
        """Log, unless this thread has the lock or is in a block: others may wait."""
        block = self.buffer.block
        here = block is not None and block.is_here()
        if here or held_here(self.lock) or self.interrupted_here():
            return
        with suppress(IndexError):  # another thread was faster
            while self.lines:
                log.log(*self.lines.popleft())

    def _tell(self, text: str, awaited: OpenBlock | OpenSnapshot) -> None:
        text += " that thread %d opened %.1f s ago"
        since = time.monotonic() - awaited.opened
        warn_elsewhere("%s: " + text, self.path, awaited.thread, since)

    def reset_in_child(self) -> None:
        """Begin anew in a child process made by fork."""
        self.lock = RLock()
        self.thread = None
        self.hurried = False
        self.lines = deque()
        self.snapshots = SnapshotTracker()


def warn_elsewhere(*line: Any) -> None:
    """Log a warning in another thread, as this one may hold up others."""
    with suppress(RuntimeError):  # the interpreter is about to end
        threading.Thread(target=log.warning, args=line, daemon=True).start()


def as_writer(method: Method) -> Method:
    """Run a method as the `writer` of its object does: one thread at a time."""

    @wraps(method)
    def do_as_writer(self: Any, *args: Any) -> Any:
        return self.writer.do(method, self, *args)

    return cast("Method", do_as_writer)
