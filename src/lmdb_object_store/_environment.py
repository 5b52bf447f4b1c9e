"""One LMDB environment with its write buffer, its locks and its growth.

Everything that belongs to a data file rather than to the `LmdbObjectStore` that
opened it lives in one `SharedEnvironment` per file and process.

Locks, in the order in which they may be taken together, after those of `_process`:

- *write lock*: one writer of the process. Held over commits, growth and close;
  never while user code runs. During a transaction block its thread is the writer
  instead, without the lock: who gets that waits for the end of the block first.
- *gate* (see `_gate`): reads share it, who moves or unmaps the map has it alone.
- *buffer lock*, a leaf: the write buffer and its byte count, for a few bytecodes.
  So a put waits for no commit.
- *snapshot lock*, another leaf, of each snapshot that several threads use.

A signal handler or a finalizer can run inside any of this, on the same thread.
The locks are re-entrant, `as_writer` and `inside` tell such a call apart: it may
put and delete (which then only buffers), and gets a `BusyError` for what would
have to wait for the call that it interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from math import inf
from pickle import loads
from threading import get_ident
from typing import Any, TypeVar

import lmdb

from ._gate import Gate, under
from ._lifecycle import Lifecycle
from ._ranges import ALL, CHUNK_BYTES, KeyRange, adjustment
from ._reading import LARGE, Batch, LargeValue, is_blob, unpickle_error
from ._snapshot import SnapshotSource
from ._source import ABSENT
from ._transaction import Block
from ._writers import log
from .exceptions import (
    BusyError,
    ConflictError,
    DiskError,
    GrowthError,
    SnapshotOpenError,
)

_R = TypeVar("_R")
_GROWTH = 64 * 2**20
_DISK_CODES = {errno.EIO, errno.ENOSPC, errno.EFBIG}
_DISK_CODES.add(getattr(errno, "EDQUOT", errno.ENOSPC))
_DISK_CODES.add(-30772)  # MDB_SHORT_WRITE of LMDB 1.0
# ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL
_DISK_CODES |= {39, 112} if os.name == "nt" else set()
MAX_VALUE = 2**32 - 1  # MAXDATASIZE in LMDB's mdb.c
_EVERYTHING = 2**60
"""The entries of a deletion whose number isn't known."""
_RECYCLE_PAGES = 4
"""Pages that `_recycle` needs beside those on the way to a key."""
_MIN_PAGES = 14
"""Pages of the smallest map that takes an entry and keeps the reserve."""
_ATTEMPTS = 100
"""How often `_swap_last` looks again at what others put meanwhile."""
_READ_FLUSH_PAUSE = 1.0
"""Seconds for which reads leave a buffer alone that they could not flush."""


class SharedEnvironment(Lifecycle):
    """An open environment, shared by all threads of this process.

    Parameters
    ----------
    path : str
        As for `lmdb.open`, absolute.
    options : dict
        The other arguments of `lmdb.open`.
    max_map_size, timeout
        As `LmdbObjectStore` documents them.
    """

    def __init__(
        self,
        path: str,
        options: dict[str, Any],
        max_map_size: int | None,
        timeout: float,
    ) -> None:
        super().__init__(path, options, timeout)
        # Guarded by the write lock.
        self._page_size: int = self.env.stat()["psize"]
        self._floor = 0  # bytes of map that the next growth makes at least
        self._recycled = -1  # the transaction that `_recycle` committed last
        self._read_flush_due = 0.0  # when a read may try again what failed

        self.set_cap(max_map_size)

    @property
    def gate(self) -> Gate:
        return self

    def raise_floor(self, map_size: int) -> None:
        """Make the next growth lead to `map_size` bytes at least."""
        self._floor = max(self._floor, map_size)

    def set_cap(self, max_map_size: int | None) -> None:
        """Change how far the map may grow by itself."""
        self.max_map_size = max_map_size
        self.max_value = MAX_VALUE
        if max_map_size is not None:
            # Beside the value an otherwise empty file holds two meta pages, a leaf
            # (old and new) and the list of free pages. Small ones fit in leaves.
            pages = max_map_size // self._page_size
            room = max(1, pages - self._reserve_pages() - 8 - pages // 512)
            room *= self._page_size if pages >= _MIN_PAGES else 0
            self.max_value = min(MAX_VALUE, room)
        self._read_flush_due = 0.0

    def _reserve_pages(self) -> int:
        """Pages below the cap that only deletions may use.

        A deletion copies the pages on the way to its key, may merge their
        neighbours, and lists every page that it frees, at 8 bytes each. It can't
        use pages that the last commit has freed.
        """
        pages = (self.max_map_size or 0) // self._page_size
        return min(max(8, pages // 4), 32 + pages // 256)

    # Reads

    def read(self, key: bytes, default: Any, probe: bool = False) -> Any:
        """Return the object stored under `key` in the database, or `default`.

        With `probe`, return True instead of the object. The write buffer is the
        caller's business: it looks there first, since a flush empties the
        buffer only after its commit.
        """
        readers = self.readers
        me = get_ident()
        outer = readers.get(me)
        begin = self._begin
        txn: Any = None
        readers[me] = True
        try:
            try:
                if self.barred is not None:
                    self.give_way(me, outer)
                    begin = self._begin
                views = self.large_seen
                if views:
                    txn = begin(None, None, False, True)
                    raw = txn.get(key)
                else:
                    raw = begin().get(key)
                if raw is None:
                    return default
                large = len(raw) >= LARGE
                if large:
                    self.large_seen = True
                if probe:
                    return True
                if views:
                    if not large:
                        raw = raw.tobytes()
                    elif is_blob(raw):
                        return loads(raw)  # runs no user code
                    else:
                        raw = LargeValue(self, txn, raw)
                txn = None
            except lmdb.Error as error:
                txn = None
                readers[me] = outer or False
                self.repair(error, begin)
                return self._read_copy(key, default, probe)
            readers[me] = outer or False  # out of the gate: user code from here
            try:
                return loads(raw) if type(raw) is bytes else raw.load()
            except Exception as error:
                raise unpickle_error(key, False, error) from error
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
                txn = None  # or the traceback of a KeyboardInterrupt keeps it open
            finally:
                pass

    def _read_copy(self, key: bytes, default: Any, probe: bool) -> Any:
        """Do what `read` does, as often as need be."""
        raw: bytes | None = self.visit(lambda begin: begin().get(key))
        if raw is None:
            return default
        return probe or self.unpickle(key, raw, False)

    def _repairing(
        self,
        repair: Callable[[lmdb.Error, Any], None],
        action: Callable[..., _R],
        args: tuple[Any, ...],
    ) -> _R:
        while True:
            begin = self._begin
            try:
                return self.in_gate(action, begin, *args)
            except lmdb.Error as error:
                repair(error, begin)

    def count(self, keys: KeyRange) -> int:
        if self.buffer or keys != ALL:
            return super().count(keys)
        entries: int = self.visit(lambda begin: begin().stat()["entries"])
        return entries

    def gives_views(self, values: bool) -> bool:
        # If what doesn't fit in leaves is more than one chunk.
        return (
            values and self.env.stat()["overflow_pages"] * self._page_size > CHUNK_BYTES
        )

    def visit(self, action: Callable[..., _R], *args: Any) -> _R:
        return self._repairing(self.repair, action, args)

    def visit_as_writer(self, action: Callable[..., _R], *args: Any) -> _R:
        return self._repairing(self._repair, action, args)

    # Writes

    def write(
        self, key: bytes, raw: bytes | None, batch_size: int, batch_bytes: int
    ) -> None:
        """Buffer a write; where that makes a batch full, flush with it.

        If that flush fails, the write is refused: it has never been in the
        buffer, so no other thread can have seen it.
        """
        block = self.block
        count = len(self.buffer) + (key not in self.buffer)
        size = len(key) + len(raw or b"")
        total = self.buffer_bytes + size
        must_wait = must_flush = count >= batch_size or total >= batch_bytes
        inside = False
        if must_flush or not self.may_buffer:
            self.check_writable()
            # Don't wait for another thread's commit, within reason.
            patient = (
                self.writer is not None
                and not self.exiting
                and block is None
                and count < 2 * batch_size
                and total < 2 * batch_bytes
            )
            inside = self.inside()
            must_wait = not patient and not inside
            if must_wait and count < batch_size and not self.exiting and block is None:
                # Overwritten values are counted twice, so look closely.
                total = _size({**self.buffer, key: raw})
                size = total - self.buffer_bytes
                must_wait = total >= batch_bytes
        if not must_wait:
            with self.buffer_lock:  # no call in here: see put
                # Unless another thread's transaction block has begun meanwhile.
                if not self.closing and (inside or self.block is block):
                    self.buffer[key] = raw
                    self.buffer_bytes += size
                    return
        self.as_writer(self._write_now, key, raw, (batch_size, batch_bytes))

    def _write_now(
        self, key: bytes, raw: bytes | None, limits: tuple[int, int]
    ) -> None:
        self.check_writable()
        size = len(key) + len(raw or b"")
        if self._is_full(limits, key not in self.buffer, size):
            self._flush({key: raw})
        else:  # it has waited for a transaction block, say
            under(self.buffer_lock, self._add, key, raw, size)

    def _add(self, key: bytes, raw: bytes | None, size: int) -> None:
        self.buffer[key] = raw
        self.buffer_bytes += size

    def exchange(
        self, key: bytes, expected: Any, raw: bytes | None, limits: tuple[int, int]
    ) -> bool:
        """Buffer a write if what is there is as expected; return whether it is.

        Looking and writing are one step for all threads. Call it `as_writer`.

        Parameters
        ----------
        key, raw
            What to write; None deletes.
        expected
            The raw value that has to be there, None for nothing, ABSENT for any.
        limits
            The operations and the bytes that make a batch full.
        """
        self.check_writable()
        while True:
            # Only a put can come between now and the swap: we are the writer.
            pending = self.buffer.get(key, ABSENT)
            if not self._holds(key, pending, expected):
                return False
            size = len(key) + len(raw or b"")
            if not self._is_full(limits, key not in self.buffer, size):
                if under(self.buffer_lock, self._swap, key, pending, raw, size):
                    return True
                continue
            batch = dict(self.buffer)
            if batch.get(key, ABSENT) is pending:
                self._flush({key: raw}, batch)
                return True

    def _is_full(self, limits: tuple[int, int], count: int, size: int) -> bool:
        """Whether to flush, if `count` more keys and `size` more bytes are put."""
        return (
            len(self.buffer) + count >= limits[0]
            or self.buffer_bytes + size >= limits[1]
            or self.exiting
        )

    def remove_last(self, key: bytes, expected: bytes, limits: tuple[int, int]) -> bool:
        """Delete an entry as `exchange` does, if none comes after it.

        A full buffer is flushed before rather than with it: while that is committed,
        somebody could put a key that comes after it.
        """
        self.check_writable()
        if self._is_full(limits, 1, len(key)):
            with suppress(GrowthError):
                self._flush()
        pending = dict(self.buffer)
        if self.visit_as_writer(self._last) != key or not self._holds(
            key, pending.get(key, ABSENT), expected
        ):
            return False
        if self._is_full(limits, 1, len(key)):  # a batch of one, or there is no room
            if self.buffer != pending:
                return False
            self._flush({key: None}, pending)
            return True
        return under(self.buffer_lock, self._swap_last, key, pending, len(key))

    def _swap_last(self, key: bytes, pending: Batch, size: int) -> bool:
        for _ in range(_ATTEMPTS):
            if self.buffer == pending:  # as in `_swap`
                self.buffer[key] = None
                self.buffer_bytes += size
                return True
            now = dict(self.buffer)
            for other, raw in now.items():
                if other >= key and raw is not pending.get(other, ABSENT):
                    return False
            pending = now
        return False

    def delete_many(self, keys: Collection[bytes]) -> int:
        """Delete `keys` in one transaction; return how many existed."""
        work = partial(_delete, keys=sorted(keys))
        return self.as_writer(self._erase, work, keys.__contains__, len(keys))

    def delete_range(self, keys: KeyRange) -> int:
        """Delete a key range in one transaction; return how many existed."""
        whole = keys == ALL
        work = self._drop if whole else partial(_delete_range, keys=keys)
        return self.as_writer(self._erase, work, keys.holds, _EVERYTHING)

    def _erase(
        self,
        work: Callable[[lmdb.Transaction[Any]], int],
        covers: Callable[[bytes], bool],
        count: int,
    ) -> int:
        self.check_writable()
        try:
            self._flush()  # as in `_write_many`
        except SnapshotOpenError:
            raise
        except (GrowthError, DiskError):
            # There is no room for what is pending, so some of it has to go, too.
            # With the database, at one moment for all: no read comes between.
            return self.alone(self.timeout, self._erase_pending, work, covers, count)
        return self._write(work, {}, count, None) if count else 0

    def _erase_pending(
        self,
        work: Callable[[lmdb.Transaction[Any]], int],
        covers: Callable[[bytes], bool],
        count: int,
    ) -> int:
        pending = dict(self.buffer)
        erased = {key: pending[key] for key in filter(covers, pending)}
        after: list[int] = []

        def erase(txn: lmdb.Transaction[Any]) -> int:
            existed = adjustment(txn, erased) + work(txn)
            _touch(txn)  # or a commit that changes nothing leaves no trace
            after[:] = txn.id(), txn.stat()["entries"]
            return existed

        try:
            existed = self._write(erase, {}, count, None)
            self._settle(pending, erased)
        except BaseException:
            # A KeyboardInterrupt may have come after the commit.
            if after == [self.env.info()["last_txnid"], self.env.stat()["entries"]]:
                self._settle(pending, erased)
            raise
        return existed

    def _drop(self, txn: lmdb.Transaction[Any]) -> int:
        existed: int = txn.stat()["entries"]
        txn.drop(self.env.open_db(txn=txn), delete=False)
        return existed

    def write_many(self, batch: Batch) -> None:
        """Flush what is pending, then write `batch` in one transaction."""
        self.as_writer(self._write_many, batch)

    def _write_many(self, batch: Batch) -> None:
        self.check_writable()
        self._flush()  # what other threads put from here on counts as put later
        if batch:
            self._commit(batch)

    def flush(self) -> None:
        """Persist what is pending."""
        self.as_writer(self._checked_flush)

    def _checked_flush(self) -> None:
        self.check_writable()
        self._flush()

    def flush_for_read(self) -> None:
        """Persist what is pending, unless that would wait or has just failed."""
        if (
            self.writer is not None
            or self.block is not None
            or self.closing
            or self.inside()
            or time.monotonic() < self._read_flush_due
        ):
            return
        try:
            self.as_writer(self._flush_hurried)
        except Exception:
            self._read_flush_due = time.monotonic() + _READ_FLUSH_PAUSE
            log.error(
                "A read could not flush the pending writes of %s; they are kept",
                self.path,
                exc_info=True,
            )

    def _flush_hurried(self) -> None:
        # A read waits for no open snapshot.
        self.hurried = True
        try:
            self._flush()
        finally:
            try:  # as in Gate
                self.hurried = False
            finally:
                pass

    def _flush(self, extra: Batch | None = None, pending: Batch | None = None) -> None:
        """Commit the buffer and `extra`, then empty the buffer.

        Puts go on meanwhile: only what is still the same object is taken out.
        `pending` is a copy of the buffer, if the caller has one.
        """
        if pending is None:
            pending = dict(self.buffer)
        batch = {**pending, **extra} if extra else pending
        if not batch:
            return
        try:
            self._commit(batch)
        except SnapshotOpenError:
            raise
        except GrowthError:
            # Deletions by themselves may make the room that the puts need.
            deletions: Batch = {key: None for key in pending if pending[key] is None}
            wanted: Batch = {key: None for key in extra or {} if batch[key] is None}
            if not deletions and not wanted:
                raise
            for part in filter(None, (deletions, wanted)):
                self._commit_deletions(sorted(part))
                self._settle(pending, part)
            batch = {key: raw for key, raw in batch.items() if raw is not None}
            try:
                self._commit(batch)
            except lmdb.Error:
                if wanted:
                    return  # what was asked for is done
                raise
        self._settle(pending, batch)

    def _settle(self, pending: Batch, committed: Batch) -> None:
        """Take out of the buffer what was `pending` when `committed` began."""
        under(self.buffer_lock, self._take_out, pending, committed)

    def _take_out(self, pending: Batch, committed: Batch) -> None:
        # Between comparing and taking out there is no call and no allocation: a
        # signal handler's or finalizer's put must not come between.
        empty: Batch = {}
        if committed.keys() >= pending.keys() and self.buffer == pending:
            self.buffer = empty
            self.buffer_bytes = 0
            self.settled += 1
            return
        buffer = self.buffer
        for key, raw in pending.items():
            if key in committed and key in buffer and buffer[key] is raw:
                del buffer[key]
                self.settled += 1
        self.buffer_bytes = _size(dict(buffer))

    def _commit_deletions(self, keys: list[bytes]) -> None:
        """Delete in as few transactions as the pages left allow."""
        try:
            self._commit(dict.fromkeys(keys))
        except GrowthError:
            if len(keys) == 1:
                raise
            middle = len(keys) // 2
            self._commit_deletions(keys[:middle])
            self._commit_deletions(keys[middle:])

    def _commit(self, batch: Batch) -> None:
        """Write `batch` in one transaction, whatever it takes.

        Each key once and in order: that is fastest, makes the smallest file, and
        LMDB's verifier calls a file damaged in which one transaction wrote a
        large value and then a smaller one under the same key.
        """
        deletions: list[bytes] = []
        keys = sorted(batch)
        if None in batch.values():
            deletions = [key for key in keys if batch[key] is None]
            keys = [key for key in keys if batch[key] is not None]
        puts = list(zip(keys, map(batch.__getitem__, keys), strict=True))
        work = partial(_apply, deletions=deletions, puts=puts)
        reserve = self._reserve_pages()
        if not puts:
            reserve = max(8, reserve // 2)
        self._write(work, batch, len(batch), reserve)

    def _write(
        self,
        work: Callable[[lmdb.Transaction[Any]], _R],
        batch: Batch,
        count: int,
        reserve: int | None,
    ) -> _R:
        """Do `work` in one transaction, whatever it takes.

        It puts what `batch` has, and writes or deletes `count` entries in all. If
        that is not a single deletion, at the cap it has to leave `reserve` pages,
        or just those that `_recycle` needs.
        """
        free = count <= 1 and not any(batch.values())
        while True:
            begin = self._begin
            try:
                if not free and self._near_cap(batch, count):
                    self._rehearse(work, reserve)
                return _transact(self._begin_writing, self._or_wait(work))
            except (ConflictError, SnapshotOpenError):
                raise
            except lmdb.MapFullError:
                # A reader that was killed keeps what has been freed since.
                if not self.env.reader_check() and not self._recycle():
                    self._grow(batch, count)
            except lmdb.Error as error:
                if getattr(error, "code", 0) in _DISK_CODES:
                    raise DiskError(
                        f"{error}. The disk under {self.path!r} is probably full, or "
                        "failing. Nothing of this was written; what was pending "
                        "still is. Free some space and flush again."
                    ) from error
                self._repair(error, begin)

    def _begin_writing(self) -> lmdb.Transaction[Any]:
        block = self.block
        if block is None or not block.committing:
            return self._begin(write=True)
        if block.txn is None:
            block.txn = self._begin(write=True)
            if block.txn.id() != block.id:
                raise ConflictError(
                    f"Another process has written to {self.path!r} while room was made "
                    "for a transaction block. Nothing of the block is written: run it "
                    "again."
                )
        txn, block.txn = block.txn, None
        block.used = txn
        return txn

    def _or_wait(
        self, work: Callable[[lmdb.Transaction[Any]], _R]
    ) -> Callable[[lmdb.Transaction[Any]], _R]:
        """Return `work` as a transaction block does it.

        It waits for open snapshots while LMDB's lock still keeps other processes
        from writing, rather than when the map is about to grow.
        """
        if self.block is None:
            return work

        def work_or_wait(txn: lmdb.Transaction[Any]) -> _R:
            try:
                return work(txn)
            except lmdb.MapFullError:
                if self.env.info()["map_size"] < self._cap():
                    self._await_snapshots()
                raise

        return work_or_wait

    def _near_cap(self, batch: Batch, count: int) -> bool:
        return (
            self.max_map_size is not None
            and self._needed(batch, count) + self._reserve_pages() * self._page_size
            > self.max_map_size
        )

    def _rehearse(
        self,
        work: Callable[[lmdb.Transaction[Any]], Any],
        reserve: int | None,
    ) -> None:
        """Raise `lmdb.MapFullError` if `work` would use up the reserve."""
        filler = bytes(self._page_size - 64)  # takes a page of its own

        def work_and_fill(txn: lmdb.Transaction[Any]) -> None:
            work(txn)
            pages = reserve or _RECYCLE_PAGES + txn.stat()["depth"]
            puts = [(_spare_key(number), filler) for number in range(pages)]
            txn.cursor().putmulti(puts)

        begin = self._begin_writing
        block = self.block
        nests = not self.options.get("writemap")  # LMDB can't with it
        if block is not None and block.committing and block.txn is not None and nests:
            # Else LMDB's lock would be given up between the rehearsal and the work.
            begin = partial(self._begin, None, block.txn, True)
        _transact(begin, self._or_wait(work_and_fill), commit=False)

    def _needed(self, batch: Batch, count: int) -> int:
        """Estimate the map size that a write needs, rather above than below.

        Below would mean to grow twice, and near the cap to use up the reserve.
        """
        page = self._page_size
        stat = self.env.stat()
        # Every page on the way to a key is written anew ...
        touched = min(count * stat["depth"], stat["branch_pages"] + stat["leaf_pages"])
        pages: int = self.env.info()["last_pgno"] + 1 + touched + 8
        size = 0
        for key, raw in batch.items():
            node = len(key) + len(raw or b"") + 16
            if node > page // 2:
                pages += node // page + 1
                node = len(key) + 24
            # ... leaves are half full, at worst, or less where they hold two or
            # three entries, and so are the branches above them.
            size += page if node > page // 4 else 2 * node
            size += 4 * (len(key) + 16)
        return (pages + pages // 512) * page + size

    def _recycle(self) -> bool:
        """At the cap, make the pages usable that the last commit has freed.

        LMDB uses them from the second transaction after it on, which never comes
        if the next one always fails. Return whether there is something to gain.
        """
        info = self.env.info()
        if info["map_size"] < self._cap() or info["last_txnid"] == self._recycled:
            return False
        try:
            _transact(self._begin_writing, _touch)
        except lmdb.Error:
            return False
        if self.block is not None:
            self.block.id += 1
        self._recycled = self.env.info()["last_txnid"]
        return True

    def _cap(self) -> float:
        cap = self.max_map_size
        return inf if cap is None else cap - cap % self._page_size

    def _grow(self, batch: Batch, count: int) -> None:
        size = self.env.info()["map_size"]
        wanted = max(2 * size, size + _GROWTH, self._floor, self._needed(batch, count))
        wanted = int(min(wanted - wanted % self._page_size, self._cap()))
        if wanted <= size:
            raise GrowthError(
                f"The map of {self.path!r} is full and has reached max_map_size, "
                f"{self.max_map_size} bytes. Raise max_map_size or delete entries; "
                "what was pending still is."
            )
        self._resize(wanted)
        self._log_later(logging.INFO, f"Map grown from {size} to {wanted} bytes")

    def _resize(self, size: int) -> None:
        """Move the map; 0 adopts the size that another process has set."""
        try:
            moved = False
            while not moved:
                self._await_snapshots()
                block = self.block
                if block is not None and block.committing and block.txn is not None:
                    block.txn.abort()
                    block.txn = None
                moved = self.alone(self.timeout, self._set_map_size, size)
        except (lmdb.Error, MemoryError) as error:
            if not size or isinstance(error, SnapshotOpenError):
                raise
            raise GrowthError(
                f"The map of {self.path!r} is full and could not be grown to {size} "
                f"bytes: {error} What was pending still is; flush again later."
            ) from error

    def _set_map_size(self, size: int) -> bool:
        if self.open_snapshots:
            return False  # since a moment
        try:
            self.env.set_mapsize(size)
        except lmdb.Error:
            if not self._alive():
                self._reopen()
            raise
        self._map_size = self.env.info()["map_size"]
        self._attach(self.env)
        return True

    # Transaction blocks and snapshots

    def open_block(self, block: Block) -> None:
        """Begin a transaction block of this thread; flush what is pending before.

        It may be begun in part if this raises; then `Block.finish` ends it.
        """
        self.as_writer(self._open_block, block)

    def _open_block(self, block: Block) -> None:
        self.check_writable()
        with self.buffer_lock:
            self.block = block
            self.may_buffer = False
        while True:
            self._flush()
            begin = self._begin
            try:
                # Kept nowhere else: see `under`.
                block.txn = begin(write=True)
            except lmdb.Error as error:
                self._repair(error, begin)
                continue
            block.id = block.txn.id()
            if under(self.buffer_lock, block.begin):
                return
            block.txn.abort()  # a signal handler has put something

    def commit_block(self, block: Block) -> None:
        """Commit what a block has changed. Call it `as_writer`."""
        block.committing = True
        block.open = False
        if block.buffer:
            self._commit(block.buffer)
        elif block.txn is None:  # the environment was reopened
            self._begin_writing().abort()

    def block_ended(self, block: Block) -> None:
        """Let others write."""
        with self.buffer_lock:
            if self.block is block:
                may_buffer = not (self.readonly or self.closing or self.exiting)
                self.may_buffer, self.block = may_buffer, None

    def open_snapshot(self, snapshot: SnapshotSource) -> None:
        """Open a snapshot, which has what is pending, too."""
        if self.current() is not self:
            raise BusyError(
                f"snapshot() was called inside a transaction block of {self.path!r}, "
                "whose changes no snapshot can have; take it before or after."
            )
        if self.inside():
            raise self._busy_error()
        if not self.options.get("lock", True):
            raise ValueError(
                f"snapshot() needs LMDB's locks, and {self.path!r} was opened with "
                "lock=False: other processes would write over what it shows."
            )
        if self.buffer or (self.moving and not self._holds_snapshot()):
            self.as_writer(self._flush)
        self.visit(snapshot.begin, self.open_snapshots)


def _spare_key(number: int) -> bytes:
    return b"\xff" * 16 + number.to_bytes(4, "big")


def _size(batch: Batch) -> int:
    return sum(len(key) + len(raw or b"") for key, raw in batch.items())


def _transact(
    begin: Callable[[], lmdb.Transaction[Any]],
    work: Callable[[lmdb.Transaction[Any]], _R],
    commit: bool = True,
) -> _R:
    """Call ``work(txn)`` in a write transaction."""
    txn = begin()
    try:
        result = work(txn)
        if commit:
            txn.commit()
        return result
    finally:
        try:  # as in Gate
            txn.abort()  # does nothing after the commit
        finally:
            pass


def _apply(
    txn: lmdb.Transaction[Any],
    deletions: list[bytes],
    puts: list[tuple[bytes, Any]],
) -> None:
    for key in deletions:
        txn.delete(key)
    txn.cursor().putmulti(puts)


def _delete(txn: lmdb.Transaction[Any], keys: list[bytes]) -> int:
    return sum(map(txn.delete, keys))


def _delete_range(txn: lmdb.Transaction[Any], keys: KeyRange) -> int:
    before: int = txn.stat()["entries"]
    cursor = txn.cursor()
    cursor.set_range(keys.low)
    while (key := cursor.key()) and keys.holds(key):
        cursor.delete()  # moves on to the next
    return before - txn.stat()["entries"]


def _touch(txn: lmdb.Transaction[Any]) -> None:
    """Change nothing, but so that there is something to commit."""
    key = _spare_key(0)
    txn.put(key, b"", overwrite=False) and txn.delete(key)
