"""One `lmdb.Environment`, kept in working order.

The environment is opened again after an I/O error and in a child made by fork. Its map
is moved when it is full or when another process has made it larger. Reads and writes
that meet such a state are tried again.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Any, NoReturn, TypeVar, cast

import lmdb

from . import _files
from ._buffer import OpenBlock, State, WriteBuffer
from ._diagnosis import DAMAGED, explained
from ._locks import Action, Args, held_here, poll
from ._queue import WriterQueue
from ._registry import registry
from ._values import CHUNK_BYTES, LARGE, LargeValue, Values, is_blob
from ._writer import Writer
from .exceptions import (
    ClosedError,
    GrowthError,
    ReplacedError,
    SnapshotOpenError,
)

_R = TypeVar("_R")

Begin = Callable[..., "lmdb.Transaction[Any]"]
"""Begins a transaction: ``env.begin`` of an `lmdb.Environment`."""
Pick = Callable[[Begin], tuple[Any, Any]]
"""Begins a transaction, and picks pending writes of the same moment; returns both."""
Repair = Callable[[lmdb.Error, Begin], None]
"""`Environment.repair`, or `repair_as_writer` in a thread that holds the write lock."""

MUTEX_KNOWS_ITS_OWNER = sys.platform == "linux"
"""Whether a child can abort a write transaction that it inherits.

LMDB's lock is a robust mutex on Linux, which a child can't unlock for the parent.
Elsewhere on POSIX it is a semaphore, which the child would unlock for all
(`MDB_USE_POSIX_SEM` in LMDB's mdb.c).
"""
UNSOUND = (
    "the process was forked in the middle of an operation that did not end in time, or "
    "in a transaction block where the system doesn't allow that. Fork at another time, "
    "or start the process by spawn"
)


def drop_transaction(block: OpenBlock) -> None:
    """Abort the write transaction of `block`, by letting go of it.

    py-lmdb's abort() waits until no other call in the environment is running: for ever,
    where two threads read without a pause, and while the user copies the environment.
    """
    txn: Any = weakref.proxy(cast("lmdb.Transaction[Any]", block.txn))
    try:
        block.txn = None
    finally:
        try:
            txn.abort()  # if a debugger, say, refers to it
        except ReferenceError:
            pass  # the transaction is gone


class StandIn:
    """In place of an object that can't be used: raises, but for some attributes."""

    def __init__(self, error: Callable[[], Exception], **attributes: Any) -> None:
        vars(self).update(attributes)
        self._error = error

    def __getattr__(self, *_: object) -> NoReturn:
        raise self._error()

    __call__ = __getattr__


def _count_entries(begin: Begin) -> int:
    entries: int = begin().stat()["entries"]
    return entries


class Environment:
    """The open environment of a data file.

    Guarded by the write lock; the parts that readers use change only while the gate is
    held alone.
    """

    def __init__(
        self, path: str, options: dict[str, Any], cap: int | None, writer: Writer
    ) -> None:
        self.path = path
        self.options = options
        self.writer = writer
        self.gate = writer.gate
        self._readers = self.gate.readers
        self._attach(_files.open_environment(path, options, cap=cap))
        self.files = _files.OpenFiles(path, options)
        self._queue = WriterQueue(self.files.data)
        self.identity = self.files.identity
        self.engine: int = self.handle.lib_version()[0]
        self.max_key: int = self.handle.max_key_size()
        self.page_size: int = self.handle.stat()["psize"]
        info = self.handle.info()
        self._map_size: int = info["map_size"]
        self._synced: int = info["last_txnid"]  # the last transaction that is durable
        self.closed = False
        self._closed_text = "closed"  # when it is

    def _attach(self, handle: Any) -> None:
        self.handle: Any = handle
        # A new object each time: it also tells `repair` which handle has failed.
        self.begin: Begin = handle.begin

    @property
    def dormant(self) -> bool:
        """Whether `handle` stands in for that of the parent process."""
        return isinstance(self.handle, StandIn)

    def closed_error(self) -> ClosedError:
        return ClosedError(f"The store at {self.path!r} is {self._closed_text}.")

    def begin_write(self) -> lmdb.Transaction[Any]:
        """Begin a write transaction when the turn of this process has come."""
        return self._queue.begin(self.begin, self._tell_of_queue)

    def _tell_of_queue(self) -> None:
        self.writer.notice("a write waits for writers of other processes")()

    # Reads

    def read(
        self, key: bytes, default: Any, values: Values, block: OpenBlock | None = None
    ) -> Any:
        """Return the object stored under `key`, or `default`.

        The caller looks into the write buffer first, since a flush empties the buffer
        only after its commit. The transaction of `block`, which shows the same state as
        a new one, spares the block's thread to begin one.
        """
        readers = self._readers
        me = get_ident()
        outer = readers.get(me)
        begin = self.begin
        gate = self.gate
        loads: Any = values.loads
        txn: Any = None
        readers[me] = True
        try:
            try:
                if gate.holder is not None:
                    gate.give_way(me, outer)
                    begin = self.begin
                views = gate.large_seen
                if views:
                    txn = begin(None, None, False, True)
                    raw = txn.get(key)
                else:
                    # No variable keeps the transaction: see `drop_transaction`.
                    raw = (begin() if block is None else block.txn or begin()).get(key)
                if raw is None:
                    return default
                large = len(raw) >= LARGE
                if large:
                    gate.large_seen = True
                if large and not views:
                    # The first of all: read again, without a copy beside the object.
                    views, raw = True, None
                    txn = begin(None, None, False, True)
                    raw = txn.get(key)
                    if raw is None:
                        return default  # deleted meanwhile, by another process
                    large = len(raw) >= LARGE
                if views:
                    if not large:
                        raw = raw.tobytes()
                    elif values.in_pieces and is_blob(raw):
                        return loads(raw)  # runs no user code
                    else:
                        raw = LargeValue(gate, txn, raw)
                txn = None
            except lmdb.Error as error:
                txn = None
                readers[me] = outer or False
                # See `retry`. What the transaction of a block has met, it keeps.
                if block is None and not isinstance(error, DAMAGED):
                    self.repair(error, begin)
                raw = self.fetch(key)
                if raw is None:
                    return default
                return values.load_copy(gate, key, raw, False)
            readers[me] = outer or False  # out of the gate: user code from here
            try:
                if type(raw) is not bytes:
                    return values.load(key, raw)
                return values.loads_for(key, raw) if loads is None else loads(raw)
            except Exception as error:
                raise values.load_error(key, raw, False, error) from error
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
                txn = None  # or the traceback of a KeyboardInterrupt keeps it open
            finally:
                pass

    def holds(self, key: bytes) -> bool:
        """Return whether there is a value under `key`; no value is copied."""
        # As `read`, but by a cursor.
        readers = self._readers
        me = get_ident()
        outer = readers.get(me)
        begin = self.begin
        readers[me] = True
        try:
            if self.gate.holder is not None:
                self.gate.give_way(me, outer)
                begin = self.begin
            return begin().cursor().set_key(key)
        except lmdb.Error as error:
            readers[me] = outer or False
            if not isinstance(error, DAMAGED):  # see `retry`
                self.repair(error, begin)
            return self.fetch(key) is not None
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
            finally:
                pass

    def fetch(self, key: bytes) -> bytes | None:
        raw: bytes | None = self.retry(self.repair, lambda begin: begin().get(key))
        return raw

    def count(self) -> int:
        # By a transaction: `lmdb.Environment.stat` shows the commit of another process
        # a moment before reads see it. First without `retry`: a fifth faster.
        begin = self.begin
        try:
            return self.gate.read(_count_entries, begin)
        except lmdb.Error:
            return self.retry(self.repair, _count_entries)

    def view(
        self, begin: Begin, pending: WriteBuffer, pick: Pick, action: Any, args: Args
    ) -> Any:
        """Call ``action(txn, picked, *args)`` with a transaction; see `retry`.

        ``pick(begin)`` returns both. It is called while no other thread puts a write
        into `pending` or takes one out. So both show one moment. The transaction ends
        with the view, unless a pin goes on with it.
        """
        txn: Any = None
        pinned = False
        try:
            txn, picked = pending.hold_still(pick, begin)
            result = action(txn, picked, *args)
            pinned = bool(self.gate.pins.refs) and self.gate.is_pinned(txn)
            return result
        finally:
            try:
                # See `Pin.abort`. In a forked child the transaction is the parent's.
                if not (pinned or txn is None or self.closed):
                    txn.abort()
            finally:
                pass

    def retry(self, repair: Repair, action: Action[_R], *args: Any) -> _R:
        """Call ``action(begin, *args)`` in the gate until that works, or never will.

        A file that looks damaged is read once more, in a new transaction:

        1. A read takes the number of the newest transaction, and is interrupted.
        2. Another process commits twice, and writes the meta page of that number anew.
        3. The read copies the meta page meanwhile, half of the old and half of the new.
        """
        looks_damaged = False
        while True:
            begin = self.begin
            try:
                return self.gate.read(action, begin, *args)
            except lmdb.Error as error:
                if looks_damaged or not isinstance(error, DAMAGED):
                    repair(error, begin)
                looks_damaged = isinstance(error, DAMAGED)

    def gives_views(self, values: bool) -> bool:
        """Return whether a scan, of `values` or keys, is to have views of the map."""
        if not values:
            return False
        pages: int = self.handle.stat()["overflow_pages"]  # values that fit in no leaf
        return pages * self.page_size > CHUNK_BYTES

    # Repair

    def repair(self, error: lmdb.Error, begin: Begin) -> None:
        """Make a read that met `error` possible again, or raise `error`.

        Adopts a map that another process has grown, waits for a free reader slot, and
        opens an environment again that an I/O error or a refused growth has put out of
        action, or that is `dormant` after a fork. `begin` is that of the failed read.
        """
        if isinstance(error, lmdb.ReadersFullError):
            self._await_slot()  # not as a writer: reads wait for no block
        else:
            self.writer.do(self.repair_as_writer, error, begin)

    def repair_as_writer(self, error: lmdb.Error, begin: Begin) -> None:
        """Do the same as `repair` for a thread that holds the write lock."""
        if self.closed:
            raise self.closed_error() from None
        if begin is not self.begin:
            return  # another thread was faster
        if isinstance(error, lmdb.MapResizedError):
            self.move_map(0)
        elif isinstance(error, lmdb.ReadersFullError):
            self._await_slot()
        elif isinstance(error, lmdb.PanicError) or not self.is_alive():
            self.writer.exclusive(self._reopen)
        else:
            raise self.explained(error)

    def explained(self, error: lmdb.Error) -> lmdb.Error:
        """Return an error that says more than `error`, or `error` itself."""
        return explained(error, self.path, self.options)

    def _await_slot(self) -> None:
        notice = self.writer.notice("a read waits for a free reader slot")
        timeout, pause = self.writer.timeout, _files.SLOT_PAUSE
        if not poll(self._has_slot, timeout, pause, notice=notice):
            raise _files.readers_full_error(self.path)

    def _has_slot(self) -> bool:
        if self.gate.readers.get(get_ident()) or held_here(self.writer.buffer.lock):
            raise _files.readers_full_error(self.path)  # the outer read can't wait
        try:
            self.writer.exclusive(self._free_slots)
        except lmdb.ReadersFullError as error:
            mine = self.writer.snapshots.opened_here()
            if mine >= self.handle.info()["max_readers"]:
                raise _files.readers_full_error(self.path) from error
            return False
        except lmdb.Error:
            pass  # for the read that is tried again
        return True

    def _free_slots(self) -> None:
        """Clear the slots of dead processes; raise if no slot is free."""
        self.handle.reader_check()
        self.begin()  # no read has a slot: this thread has the gate alone

    def is_alive(self) -> bool:
        try:
            self.handle.info()
        except lmdb.Error:
            return False
        return True

    def _reopen(self) -> None:
        self.writer.snapshots.forget_all()
        if (block := self.writer.buffer.block) is not None:
            block.txn = None  # the block's commit looks whether others wrote meanwhile
        self._queue.close()  # in a child the path may lead to another file by now
        self.handle.close()
        dormant = self.dormant
        why = "in this child process" if dormant else "after an error"
        try:
            self.check_files()
        except ReplacedError as error:
            registry.forget(self)  # another file can get its number now
            raise ClosedError(
                f"The store at {self.path!r} had to be opened again {why}, but its "
                "data file or lock file is gone or was replaced by another one."
            ) from error
        self._open()
        if not dormant:
            text = "Environment reopened after an error"
            self.writer.log_later(logging.WARNING, text)

    def _open(self) -> None:
        options = {**self.options, "map_size": self._map_size, "create": False}
        self._attach(_files.open_environment(self.path, options, self.writer.timeout))

    def awake(self) -> Any:
        """Return the `lmdb.Environment`, opened if need be."""
        if self.dormant or not self.is_alive():
            self.retry(self.repair, lambda begin: begin().abort())
        return self.handle

    def move_map(self, size: int) -> None:
        """Make the map `size` bytes large; 0 adopts the size of another process."""
        try:
            self._without_snapshots(self._set_map_size, size)
        except (lmdb.Error, MemoryError) as error:
            if not size or isinstance(error, SnapshotOpenError):
                raise
            raise GrowthError(
                f"The map of {self.path!r} is full and could not be grown to {size} "
                f"bytes: {error} Pending writes are kept; flush again later."
            ) from error

    def _without_snapshots(self, action: Action[None], *args: Any) -> None:
        """Call `action`, which moves the map, when no snapshot and no read is in it."""
        moved = False
        while not moved:
            self.writer.await_snapshots()
            block = self.writer.buffer.block
            if block is not None and block.state is State.ENDING and block.txn:
                drop_transaction(block)
            moved = self.writer.exclusive(self._move, action, args)

    def _move(self, action: Action[None], args: Args) -> bool:
        if self.writer.snapshots.open:
            return False  # opened a moment ago
        action(*args)
        return True

    def _set_map_size(self, size: int) -> None:
        try:
            self.handle.set_mapsize(size)
        except lmdb.Error:
            if not self.is_alive():
                self._reopen()
            raise
        self._map_size = self.handle.info()["map_size"]
        self._attach(self.handle)

    def open_for_writing(self, options: dict[str, Any]) -> None:
        """Open an environment again that can only read, with `options` for writing."""
        self._without_snapshots(self._open_for_writing, options)

    def _open_for_writing(self, options: dict[str, Any]) -> None:
        self.check_files()  # the path can lead to another file by now
        before = self.options, self._map_size
        self.options = options
        self._map_size = max(options["map_size"], self._map_size)
        self.handle.close()
        try:
            self._open()
            self.files = _files.OpenFiles(self.path, options)
        except BaseException:
            self.options, self._map_size = before  # the next read opens it so again
            raise

    def sync(self) -> None:
        """Make all commits durable; raise if the file is not at its path any more.

        Nothing is done if nothing was committed since the last time, or the opening.
        """
        try:
            newest = self.handle.info()["last_txnid"]
        except lmdb.Error:
            return  # out of action
        if newest != self._synced and not self.options.get("readonly"):
            if _files.needs_sync(self.options):
                self.handle.sync(True)
            self.check_files()
            self._synced = newest

    def check_files(self) -> None:
        """Raise `ReplacedError` unless the files are still at their paths."""
        self.files.check_lock()
        self.files.check_data()

    def fill_file(self, size: int) -> None:
        """Extend a data file that had `size` bytes before the last commit, if need be.

        See `_check_length`: so no other program takes the file for a part of it.
        """
        if (self.handle.info()["last_pgno"] + 1) * self.page_size > size:
            with suppress(OSError, lmdb.Error):  # it may be short
                self._fill_file()

    def _fill_file(self) -> None:
        size = (self.handle.info()["last_pgno"] + 1) * self.page_size
        if os.stat(self.files.data).st_size >= size:
            return
        txn = self.begin_write()
        try:
            last_page = self.handle.info()["last_pgno"]
            self.files.extend((last_page + 1) * self.page_size)
        finally:
            try:
                del txn  # see `drop_transaction`
            finally:
                pass

    def close(self) -> None:
        """Close the environment for good. Call it with the gate held alone."""
        try:
            self.handle.close()
        finally:
            try:
                self._queue.close()
            finally:
                registry.forget(self)
                self.closed = True

    # Fork

    def leave_to_parent(self) -> None:
        """In a child: use the environment of the parent no more.

        py-lmdb opens no file twice, so the environment is closed when the child first
        uses the store. Not at the fork: most children never use the store.
        """
        self._readers = self.gate.readers
        self._queue.close()
        if not self.dormant:
            text = "The environment belongs to the parent process."
            error = partial(lmdb.Error, text)
            close = self.handle.close
            self._attach(StandIn(error, begin=StandIn(error), close=close))

    def give_up(self) -> None:
        """In a child that can't even close the environment that it has inherited."""
        self._readers = self.gate.readers
        self._queue.close()
        self.closed = True
        self._closed_text = f"closed in this child process: {UNSOUND}"
        with suppress(ImportError):
            import ctypes

            # Never to be deallocated: py-lmdb would close it, and wait for calls that
            # no thread here will end.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.handle))
        refuse = StandIn(self.closed_error, inherited=self.handle)
        self._attach(StandIn(self.closed_error, begin=refuse))
