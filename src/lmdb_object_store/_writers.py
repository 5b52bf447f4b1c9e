"""Who may write: one thread at a time, unless it would wait for itself.

A thread that wants to write waits for the write lock, then for the end of another
thread's transaction block, and if the map has to move, for the snapshots that are
open. It is told so, with an error, where waiting would be for ever: it has been
interrupted in the midst of writing, or has itself opened what it would wait for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from . import _process
from ._gate import SLICE, Gate, is_mine, under
from .exceptions import BusyError, SnapshotOpenError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._snapshot import SnapshotSource
    from ._transaction import Block

log = logging.getLogger("lmdb_object_store")

_R = TypeVar("_R")

_BLOCK_SLICE = 0.005
"""Seconds after which a waiting writer looks again whether a block has ended."""
_NOTICE = 1.0
"""Seconds after which who waits for a block or a snapshot tells so."""


class Writers(Gate):
    """The gate, the write lock, and what else there is to wait for.

    Parameters
    ----------
    path : str
        Of the environment, for messages.
    timeout : float
        As `LmdbObjectStore` documents it.
    """

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__()
        self.path = path
        self.timeout = timeout
        self.write_lock = RLock()
        self.buffer_lock = RLock()

        # Guarded by the write lock.
        self.writer: int | None = None  # the thread that writes
        self.moving = False  # whether the map is to move, and new snapshots wait
        self.hurried = False  # whether not to wait for open snapshots
        self._to_log: list[tuple[Any, ...]] = []  # to be logged without the lock

        # Guarded by the buffer lock.
        self.block: Block | None = None  # if any is open, beginning or ending
        self.closing = False
        self.exiting = False

        # Guarded by the GIL: look at a copy.
        self.open_snapshots: set[SnapshotSource] = set()

    def current(self) -> Self | Block:
        """Return what the operations of this thread belong to."""
        block = self.block
        if block is None or block.thread != get_ident() or not block.open:
            return self
        if block.lost:
            block.finish_lost()
            return self
        block.check()
        return block

    def inside(self) -> bool:
        """Whether this thread is interrupted while it writes, reads or buffers."""
        me = get_ident()
        block = self.block
        return (
            self.writer == me
            or self.readers.get(me, False)
            or is_mine(self.buffer_lock)
            or _process.forks_here()
            # A transaction block that begins or ends.
            or (block is not None and block.thread == me and not block.open)
        )

    def writes(self) -> bool:
        """Whether a thread may call LMDB to write, and does not wait for snapshots."""
        return self.writer is not None and not self.moving

    def as_writer(self, action: Callable[..., _R], *args: Any) -> _R:
        """Call `action` under the write lock; it must not run user code.

        Raises
        ------
        BusyError
            This thread was interrupted while writing or in the gate.
        SnapshotOpenError
            The writer waits for a snapshot that this thread has to close.
        """
        if self.inside():
            raise self._busy_error()
        news: list[tuple[Any, ...]] = []
        block = self.block
        try:
            if block is not None and block.thread == get_ident() and not block.lost:
                return self._as_writer(news, action, args)
            if self.open_snapshots and self._holds_snapshot():
                return self._as_patient_writer(news, action, args)
            result: _R = under(self.write_lock, self._as_writer, news, action, args)
            return result
        finally:
            if news:
                self._log_or_keep(news)

    def _busy_error(self) -> BusyError:
        return BusyError(
            "The store is in the middle of another operation on this thread: a signal "
            "handler or finalizer can get, put and delete there, but not flush, write "
            "many, take snapshots, grow or close."
        )

    def _log_or_keep(self, news: list[tuple[Any, ...]]) -> None:
        block = self.block
        if block is not None and block.thread == get_ident():
            block.news += news  # others wait for its end
        else:
            self.log_all(news)

    def log_all(self, news: list[tuple[Any, ...]]) -> None:
        """Log, while this thread holds nobody up: a logging handler is user code."""
        for line in news:
            log.log(*line)

    def _as_patient_writer(
        self,
        news: list[tuple[Any, ...]],
        action: Callable[..., _R],
        args: tuple[Any, ...],
    ) -> _R:
        """Wait as a thread with an open snapshot has to.

        1. This thread, which has a snapshot open, waits for the write lock.
        2. Its holder has to grow the map, and waits for the snapshot.
        3. Both wait until `timeout` is over, unless this one gives up.
        """
        while True:
            try:
                if self.write_lock.acquire(timeout=SLICE):
                    self._await_block(self._fail_if_moving)
                    return self._as_writer(news, action, args)
            finally:
                try:  # asking first would leave room for an interrupt
                    self.write_lock.release()
                except RuntimeError:
                    pass  # it was not acquired
            self._fail_if_moving()

    def _fail_if_moving(self) -> None:
        if self.moving:
            raise self._snapshot_error()

    def _await_block(self, check: Callable[[], None] | None = None) -> None:
        """Wait for the end of another thread's block, and `check` meanwhile.

        In slices, since no lock can say that a block has ended: it can be ended, or
        lost, by an interrupt or a finalizer in any thread.
        """
        me = get_ident()
        began = time.monotonic()
        told = False
        while (block := self.block) is not None and block.thread != me:
            if block.inherited:
                return  # it keeps nobody else from writing
            if block.lost:
                raise BusyError(
                    f"A transaction block of {self.path!r} has been left in another "
                    "thread than the one that began it, which alone can end it: by "
                    "using the store again, or by ending itself. Nothing can be "
                    "written before that."
                )
            if self.exiting:
                raise BusyError(
                    f"A transaction block of {self.path!r} in another thread will not "
                    "end, as the interpreter ends."
                )
            if check is not None:
                check()
            waited = time.monotonic() - began
            if not told and waited >= _NOTICE:
                told = True
                self._tell("a write waits for a transaction block", block)
            time.sleep(min(0.00005 + waited / 10, _BLOCK_SLICE))

    def _as_writer(
        self,
        news: list[tuple[Any, ...]],
        action: Callable[..., _R],
        args: tuple[Any, ...],
    ) -> _R:
        if self.block is not None:
            self._await_block()
        try:
            self._begin_to_write()
            return action(*args)
        finally:
            try:
                self.writer = None
                news += self._to_log
                self._to_log = []
            finally:
                pass

    def _begin_to_write(self) -> None:
        self.writer = get_ident()
        while _process.fork_is_near():
            self.writer = None
            _process.await_fork()
            self.writer = get_ident()

    # Waiting for snapshots

    def _holds_snapshot(self) -> bool:
        """Whether this thread has opened one of the open snapshots."""
        me = get_ident()
        return any(snapshot.thread == me for snapshot in list(self.open_snapshots))

    def _has_waited_long(self) -> bool:
        """Whether growth has waited `timeout` seconds for a snapshot.

        If so, nobody else waits for that one: a queue of writers would do so one
        after the other.
        """
        now = time.monotonic()
        for snapshot in list(self.open_snapshots):
            snapshot.awaited = snapshot.awaited or now
            if now >= snapshot.awaited + self.timeout:
                return True
        return False

    def _await_snapshots(self) -> None:
        """Wait until the map may move, and let reads go on meanwhile."""
        began = time.monotonic()
        told = False
        try:
            while self.open_snapshots:
                if self.closing or self.exiting:  # they end now, or in a moment
                    for snapshot in list(self.open_snapshots):
                        snapshot.close()
                    break
                hopeless = (
                    self.hurried
                    or self.barred == get_ident()  # and reads wait
                    or self._holds_snapshot()
                )
                if hopeless or self._has_waited_long():
                    raise self._snapshot_error()
                self.moving = True
                if not told and time.monotonic() >= began + _NOTICE:
                    told = True
                    for snapshot in list(self.open_snapshots):
                        self._tell("growth waits for a snapshot", snapshot)
                time.sleep(0.001)  # in slices, as in `_await_block`
        finally:
            try:  # as in Gate
                self.moving = False
                self._begin_to_write()  # after forks
            finally:
                pass

    def _tell(self, what: str, awaited: Block | SnapshotSource) -> None:
        """Log what is being waited for, in another thread: a handler is user code."""
        news = (
            "%s: %s that thread %d opened %.1f s ago",
            *(self.path, what, awaited.thread, time.monotonic() - awaited.opened),
        )
        with suppress(RuntimeError):  # the interpreter is about to end
            threading.Thread(target=log.warning, args=news, daemon=True).start()

    def _snapshot_error(self) -> SnapshotOpenError:
        whose = "one of them by this thread" if self._holds_snapshot() else "for long"
        return SnapshotOpenError(
            f"The map of {self.path!r} has to move, as it is full or another process "
            f"has made it larger, but {len(self.open_snapshots)} snapshots are open, "
            f"{whose}. Close snapshots sooner, or open the store with a larger "
            "map_size, so that it need not grow. What was pending still is; flush "
            "again later."
        )

    def _log_later(self, level: int, what: str) -> None:
        self._to_log.append((level, "%s: %s", self.path, what))
