"""The life of an environment: stores that use it, repairs, exit and fork.

It is open as long as a store uses it. A child made by fork leaves what it inherits to
the parent, and opens the file again when it is first used there.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any

import lmdb

from ._gate import SLICE, is_mine, under
from ._opening import (
    check_shared,
    data_path,
    identity_of,
    open_environment,
    readers_full_error,
)
from ._process import Handle, unregister
from ._reading import Batch
from ._source import Source
from ._writers import Writers, log
from .exceptions import BusyError, ClosedError

if TYPE_CHECKING:
    from ._transaction import Block

_EXIT_PATIENCE = 5.0
"""Seconds that the flush at exit waits for another (daemon) thread's commit."""
_CLOSE_SLICE = 0.001
"""Seconds after which to look again whether an environment has been closed."""
_MUTEX_KNOWS_ITS_OWNER = sys.platform == "linux"
"""Whether a child can abort a write transaction that it inherits.

LMDB's lock is a robust mutex on Linux, which only the thread that has locked it can
unlock: in a child that fails. Elsewhere on POSIX it is a semaphore, which the child
would unlock for all (`MDB_USE_POSIX_SEM` in LMDB's mdb.c).
"""
_UNSOUND = (
    "the process was forked in the middle of an operation that did not end in time, or "
    "in a transaction block where the system doesn't allow that. Fork at another time, "
    "or start the process by spawn"
)


class Dormant:
    """What a child made by fork has in place of an environment, until it is used.

    Whatever is called raises, as with an environment that is closed; `repair` then
    opens the file. The inherited environment is closed at that moment, not at the
    fork: most children never use it.
    """

    def __init__(self, inherited: lmdb.Environment) -> None:
        self._inherited = inherited

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._refuse

    def _refuse(self, *_: object, **__: object) -> Any:
        raise lmdb.Error("The environment belongs to the parent process.")

    def close(self) -> None:
        """Close what was inherited, since py-lmdb opens no file twice."""
        self._inherited.close()


class Lifecycle(Writers, Source):
    """An environment from its first store to its last.

    Parameters
    ----------
    path : str
        As for `lmdb.open`, absolute.
    options : dict
        The other arguments of `lmdb.open`.
    timeout
        As `LmdbObjectStore` documents it.
    """

    def __init__(self, path: str, options: dict[str, Any], timeout: float) -> None:
        super().__init__(path, timeout)
        # Constant after construction.
        self.readonly = bool(options.get("readonly"))
        self.options = options
        self._file = data_path(path, options)

        # Guarded by the write lock.
        self._attach(open_environment(path, options))
        engine = self.env.lib_version()[0]
        if options.get("writemap") and engine >= 1:
            self.env.close()
            raise ValueError(
                "writemap=True can't be used with the LMDB 1.0 engine: a commit that "
                "frees pages can abort the process (seen with 1.0.2). "
                f"Open {path!r} without writemap, or make it with lib_version=0."
            )
        self.identity = identity_of(self._file) or object()  # if it is gone already
        self.max_key: int = self.env.max_key_size()
        self._engine = engine
        self._map_size: int = self.env.info()["map_size"]
        self.closed = False
        self._closed_text = "closed"  # when it is

        # Guarded by the fork lock.
        self.at_rest = False  # whether, at a fork, no call of LMDB is running
        self.unsound = False  # in a child: whether it can never be used or closed

        # Guarded by the buffer lock.
        # The stores that use this, and whether to warn if nobody closes them.
        self._handles: dict[weakref.ref[Handle], bool] = {}
        self.buffer: Batch = {}
        self.buffer_bytes = 0  # of keys and values, overwritten ones included
        self.settled = 0  # counts the times that it gave up keys
        self.may_buffer = not self.readonly  # a put may just buffer
        self.lost: Batch = {}  # the buffer of a failed close

    @property
    def shared(self) -> Any:
        """Where a store is closed, this is an error instead (`_ClosedStore`)."""
        return self

    def _attach(self, env: Any) -> None:
        self.env: Any = env
        # A new object each time: it also tells `_repair` what it was that failed.
        self._begin: Callable[..., lmdb.Transaction[Any]] = env.begin

    @abstractmethod
    def _flush(self) -> None:
        """Commit what is pending. As a writer."""

    @abstractmethod
    def flush_for_read(self) -> None:
        """Persist what is pending, unless that would wait or has just failed."""

    @abstractmethod
    def _resize(self, size: int) -> None:
        """Move the map; 0 adopts the size that another process has set."""

    def closed_error(self) -> ClosedError:
        return ClosedError(f"The store at {self.path!r} is {self._closed_text}.")

    def check_writable(self) -> None:
        """Raise if nothing can be written any more."""
        if self.closing:
            raise self.closed_error()

    # The stores that use it

    def enter(self, handle: Handle, warn: bool, wanted: dict[str, Any]) -> bool:
        """Let one more store use this; return False if it is being closed.

        Raises
        ------
        ValueError
            That store wants another environment: see `check_shared`.
        """
        if not self.closing:
            has = {**self.options, "lib_version": self._engine}
            check_shared(self.path, has, wanted)
        return under(self.buffer_lock, self._enter, handle, warn)

    def _enter(self, handle: Handle, warn: bool) -> bool:
        if self.closing:
            return False
        # So it is left by a store that is garbage-collected, too.
        self._handles[weakref.ref(handle, self._abandon)] = warn
        return True

    def await_close(self, deadline: float) -> None:
        """Wait until this is closed, or stays open as a read kept it from closing.

        In slices, as an interrupt of the thread that closes could leave the lock of a
        Condition held.
        """
        if self.unsound:
            raise BusyError(f"{self.path!r} can't be opened here: {_UNSOUND}.")
        while self.closing and not self.closed:
            if self.inside() or time.monotonic() > deadline:
                raise BusyError(
                    f"The store at {self.path!r} is in the middle of being closed. "
                    "Open it again later."
                )
            time.sleep(_CLOSE_SLICE)

    def leave(self, handle: weakref.ref[Handle], owner: object) -> Exception | None:
        """Flush and sync for a store that is closed; close if no other is left.

        Parameters
        ----------
        handle : weakref.ref
        owner : object
            What the snapshots belong to that end with it.

        Returns
        -------
        Exception or None
            What the flush failed with.
        """
        if get_ident() in self.readers:
            raise BusyError(
                "close() was called while this thread is reading from the store "
                "(by something that an unpickling runs, for example); close it "
                "after the read."
            )
        if self.current() is not self:
            raise BusyError(
                f"close() was called inside a transaction block of {self.path!r}; "
                "close it after the block."
            )
        if self.inside():
            raise self._busy_error()
        for snapshot in list(self.open_snapshots):  # growth may wait for them
            if snapshot.owner is owner:
                snapshot.close()
        error = self.as_writer(self._leave, handle)
        if not (self._handles or self.closed):
            # The others were dropped in the midst of that: see `_leave_last`.
            error = self.as_writer(self._leave, handle)
        if error is not None:
            self._log_failure("Final flush", error)
        return error

    def _leave(self, handle: weakref.ref[Handle]) -> Exception | None:
        if self.closed:
            return None
        last = under(self.buffer_lock, self._is_last, handle)
        error = None
        try:
            self._finish()
        except Exception as failure:
            error = failure
        if last:
            try:
                self.alone(self.timeout, self._shut)
            except BusyError:
                under(self.buffer_lock, self._stay_open)
                raise
        else:
            under(self.buffer_lock, self._handles.pop, handle, None)
        return error

    def _stay_open(self) -> None:
        self.closing = False
        self.may_buffer = not (self.readonly or self.exiting)

    def _is_last(self, handle: weakref.ref[Handle]) -> bool:
        if self._handles.keys() <= {handle}:
            self.closing = True
            self.may_buffer = False
        return self.closing

    def _finish(self) -> None:
        try:
            self._flush()
        finally:
            if not self.readonly and self._alive():
                self.env.sync(True)

    def _shut(self) -> None:
        try:
            self.env.close()
        finally:
            unregister(self)
            self.closed = True
            self.lost = self.buffer
            self.buffer = {}
            self.settled += 1
            for snapshot in list(self.open_snapshots):
                snapshot.release()
            self.end_scans()  # other pins go on with their copies

    def _abandon(self, handle: weakref.ref[Handle]) -> None:
        """Leave for a store that was garbage-collected without being closed."""
        if self.exiting or self.closed:
            return  # as at exit it writes through
        warn = self._handles.get(handle, False)
        if under(self.buffer_lock, self._forget, handle):
            self.flush_for_read()
        # The others may be gone meanwhile.
        if self._handles.keys() <= {handle}:
            self._leave_last(handle)
        if warn:
            self._warn_unclosed()

    def _leave_last(self, handle: weakref.ref[Handle]) -> None:
        try:
            self.leave(handle, None)
        except BusyError:
            # Another store is being left on this thread, which will do it. Else it
            # stays open, for the next one.
            under(self.buffer_lock, self._handles.pop, handle, None)

    def _forget(self, handle: weakref.ref[Handle]) -> bool:
        """Forget a handle unless it is the last one; return whether it wasn't."""
        if self._handles.keys() <= {handle}:
            return False
        self._handles.pop(handle, None)
        return True

    def _log_failure(self, what: str, error: Exception) -> None:
        if not (self.closed or self.exiting):
            kept = f"{len(self.buffer)} pending writes are kept for its other stores"
        else:
            kept = f"{len(self.lost or self.buffer)} pending writes are lost"
        log.error(
            "%s of %s failed, %s: %s", what, self.path, kept, error, exc_info=error
        )

    def _warn_unclosed(self) -> None:
        warnings.warn(
            f"LmdbObjectStore {self.path!r} was not closed; use `with` or close().",
            ResourceWarning,
            stacklevel=2,
        )

    # Repair

    def repair(self, error: lmdb.Error, begin: Any) -> None:
        """Make a read that met `error` possible again, or raise it.

        `begin` is what met it. Adopts a map that another process has grown, finds a
        free reader slot, and opens an environment again that an I/O error or a
        refused growth has put out of action, or that a fork has made `Dormant`.
        """
        if isinstance(error, lmdb.ReadersFullError):
            self._await_slot()  # not as a writer: reads wait for no block
        else:
            self.as_writer(self._repair, error, begin)

    def _repair(self, error: lmdb.Error, begin: Any) -> None:
        if self.closed:
            raise self.closed_error() from None
        if begin is not self._begin:
            return  # another thread was faster
        if isinstance(error, lmdb.MapResizedError):
            self._resize(0)
        elif isinstance(error, lmdb.ReadersFullError):
            self._await_slot()
        elif isinstance(error, lmdb.PanicError) or not self._alive():
            self.alone(self.timeout, self._reopen)
        else:
            raise error

    def _await_slot(self) -> None:
        """Wait until LMDB's table of readers has a free slot."""
        deadline = time.monotonic() + self.timeout
        while not self._has_slot(time.monotonic() >= deadline):
            time.sleep(SLICE)  # the process that frees one tells nobody

    def _has_slot(self, last_try: bool) -> bool:
        me = get_ident()
        if self.readers.get(me) or is_mine(self.buffer_lock):
            raise readers_full_error(self.path)  # it has interrupted who can't wait
        try:
            self.alone(self.timeout, self._free_slots)
        except lmdb.ReadersFullError as error:
            mine = [one for one in list(self.open_snapshots) if one.thread == me]
            if last_try or len(mine) >= self.env.info()["max_readers"]:
                raise readers_full_error(self.path) from error
            return False
        except lmdb.Error:
            pass  # for the read that is tried again
        return True

    def _free_slots(self) -> None:
        """Clear the slots of dead processes; raise if none is free.

        Those of this process's reads are, as it has the gate alone.
        """
        self.env.reader_check()
        self._begin()

    def _alive(self) -> bool:
        try:
            self.env.info()
        except lmdb.Error:
            return False
        return True

    def _reopen(self) -> None:
        """Open the same file again."""
        for snapshot in list(self.open_snapshots):
            snapshot.release()
        if self.block is not None:
            self.block.txn = None  # `_begin_writing` looks what has happened meanwhile
        why = "in this child process"
        if not isinstance(self.env, Dormant):
            why = "after an error"
        self.env.close()
        if identity_of(self._file) != self.identity:
            unregister(self)  # another file can get its number now
            raise ClosedError(
                f"The store at {self.path!r} had to be opened again {why}, but its "
                "data file is gone or was replaced by another one."
            )
        options = {**self.options, "map_size": self._map_size, "create": False}
        self._attach(open_environment(self.path, options, self.timeout))
        if why == "after an error":
            self._log_later(logging.WARNING, "Environment reopened after an error")

    def environment(self) -> lmdb.Environment:
        """Return the environment, opened if need be."""
        if isinstance(self.env, Dormant):
            self.visit(lambda begin: begin().abort())
        env: lmdb.Environment = self.env
        return env

    # Exit

    def flush_at_exit(self) -> None:
        """Flush, and write through from now on: the process is about to end.

        Not closed: a daemon thread may be reading. A daemon thread may also have
        been stopped with the write lock in its hands, so the wait has an end.
        """
        self.write_through()
        try:
            block = self.block
            if block is not None and block.thread == get_ident():
                block.finish()  # of a generator that nobody has closed, say
            self._finish_at_exit()
        except Exception as error:
            if self.buffer or not isinstance(error, BusyError):
                self._log_failure("Flush at exit", error)
        if any(self._handles.values()):
            self._warn_unclosed()

    def _finish_at_exit(self) -> None:
        if not self.write_lock.acquire(timeout=_EXIT_PATIENCE):
            raise BusyError("Another thread is still writing.")
        try:
            self.as_writer(self._finish)
        finally:
            try:  # as in Gate
                self.write_lock.release()
            finally:
                pass

    def write_through(self) -> None:
        """Flush with every write from now on."""
        with self.buffer_lock:
            self.exiting = True
            self.may_buffer = False

    # Fork

    def begin_anew(self) -> None:
        """In a child made by fork: leave everything to the parent.

        The pending writes are the parent's, the locks may be held by threads that
        don't exist here, and a read transaction that is aborted or closed here would
        free a reader slot that the parent is using: such are forgotten before.
        """
        at_rest = self.at_rest or not (
            self.writer is not None or True in self.readers.values()
        )
        exiting, block, txn = self.exiting, self.block, None
        if block is not None:
            txn = block.txn or block.used
            block.disinherit()
            if block.thread != get_ident() or not (at_rest and block.open):
                block = None
        for pin in self.pins():
            pin.release()
        for snapshot in list(self.open_snapshots):
            snapshot.release("it belongs to the parent of this child process")
        self._reset(block)
        if exiting:
            self.write_through()
        if at_rest and (txn is None or _MUTEX_KNOWS_ITS_OWNER):
            if txn is not None:
                txn.abort()  # or py-lmdb's close would wait for its thread
            dormant: Any = self.env
            self._attach(dormant if isinstance(dormant, Dormant) else Dormant(dormant))
        else:
            self.give_up()

    def _reset(self, block: Block | None = None) -> None:
        Writers.__init__(self, self.path, self.timeout)
        self.block = block
        self.may_buffer = not self.readonly and block is None
        self.buffer = {}
        self.buffer_bytes = 0
        self.settled += 1
        self.lost = {}
        self._handles = dict.fromkeys(self._handles, False)

    def give_up(self) -> None:
        """In a child that can't even close what it has inherited."""
        self._reset()
        self.unsound = self.closing = self.closed = True
        self.may_buffer = False
        self._begin = self._refuse
        self._closed_text = f"closed in this child process: {_UNSOUND}"
        with suppress(ImportError):
            import ctypes

            # It is never to be deallocated: py-lmdb would close it, and wait for
            # calls to end that no thread here will end.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.env))

    def _refuse(self, *_: object, **__: object) -> lmdb.Transaction[Any]:
        raise self.closed_error()
