"""Commits: the one place that begins, applies and commits a write transaction.

As need be a commit makes the map grow, adopts a map that another process has made
larger, or clears the slots of dead readers. Then it is tried again.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

import lmdb

from ._buffer import Batch, State
from ._diagnosis import DISK_CODES
from ._environment import Environment
from ._keys import ALL, KeyRange, describe
from ._map_size import MapSize
from ._reads import adjustment
from .exceptions import (
    ConflictError,
    DiskError,
    GrowthError,
    NamedDatabaseError,
    ReplacedError,
    SnapshotOpenError,
)

_R = TypeVar("_R")
Transaction: TypeAlias = "lmdb.Transaction[Any]"
Work = Callable[[Transaction], _R]
"""Changes the database by a transaction."""
_Covers = Callable[[bytes], bool]

_EVERYTHING = 2**60  # entries of a deletion whose number isn't known
_NAMED_DATABASE = 48  # bytes of the value under the name: struct MDB_db of mdb.c
_RECYCLE_PAGES = 4  # that `_recycle` needs beside those on the way to a key


class Committer:
    """Writes batches to the database, for the thread that holds the write lock."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.writer = environment.writer
        self.buffer = self.writer.buffer
        self.map = MapSize(environment.page_size)
        self._recycled = -1  # the transaction that `_recycle` committed last

    def check_open(self) -> None:
        """Raise if nothing can be written any more."""
        if "closing" in self.buffer.refusals:
            raise self.environment.closed_error()

    def flush(self, extra: Batch | None = None, pending: Batch | None = None) -> None:
        """Commit the buffer and `extra`, then empty the buffer.

        Puts go on meanwhile: see `WriteBuffer.remove`. If the commit fails, `extra` is
        refused. `pending` is a copy of the buffer, if the caller has one.
        """
        if pending is None:
            pending = dict(self.buffer.entries)
        batch = {**pending, **extra} if extra else pending
        if not batch:
            return
        written = pending
        try:
            self.commit(batch)
        except SnapshotOpenError:
            raise
        except GrowthError:
            if None not in batch.values():
                raise
            done = self._commit_in_parts(pending, batch, extra or {})
            written = _only(pending, done)
        except NamedDatabaseError as error:
            self._flush_others(error, pending, extra or {})
            return
        self.buffer.remove(written)

    def _flush_others(
        self, error: NamedDatabaseError, pending: Batch, extra: Batch
    ) -> None:
        """Refuse the writes at fault, and flush all others.

        Raises if that of `extra` is refused. For the others, see `tell_refused`: what
        flushes just now may have nothing to do with them.
        """
        refused = _only(pending, error.keys)
        if refused:
            self.buffer.refused = {**self.buffer.refused, **refused}
            self.writer.log_later(logging.ERROR, str(error))
        self.buffer.remove(refused)
        self.flush(_without(extra, error.keys), _without(pending, error.keys))
        if error.keys & extra.keys():
            raise error

    def tell_refused(self) -> None:
        """Raise if pending writes were refused since the last call."""
        buffer = self.buffer
        refused, buffer.refused = buffer.refused, {}
        if refused:
            if "closing" in buffer.refusals:
                buffer.lost = {**buffer.lost, **refused}
            raise self._name_error(sorted(refused))

    def _commit_in_parts(self, pending: Batch, batch: Batch, extra: Batch) -> Batch:
        """Commit deletions by themselves: they may make room for the puts.

        Returns the puts if they were committed.
        """
        deletions: Batch = {key: None for key in pending if pending[key] is None}
        wanted: Batch = {key: None for key in extra if batch[key] is None}
        for part in filter(None, (deletions, wanted)):
            self._commit_deletions(sorted(part))
            self.buffer.remove(_only(pending, part))
        puts: Batch = {key: raw for key, raw in batch.items() if raw is not None}
        try:
            self.commit(puts)
        except lmdb.Error:
            if wanted:
                return {}  # the call asked for a deletion, which is done
            raise
        return puts

    def _commit_deletions(self, keys: list[bytes]) -> None:
        """Delete in as few transactions as the free pages allow."""
        try:
            self.commit(dict.fromkeys(keys))
        except GrowthError:
            if len(keys) == 1:
                raise
            middle = len(keys) // 2
            self._commit_deletions(keys[:middle])
            self._commit_deletions(keys[middle:])

    def commit(self, batch: Batch) -> None:
        """Write `batch` in one transaction.

        Each key once and in order: that is fastest and makes the smallest file. And
        LMDB's verifier calls a file damaged in which one transaction wrote a large
        value and then a smaller one under the same key. Raises `NamedDatabaseError`,
        with the keys at fault.
        """
        deletions: list[bytes] = []
        stored: Batch = batch
        if not all(batch.values()):  # three times as fast as `None in`
            stored = {key: raw for key, raw in batch.items() if raw is not None}
            deletions = sorted(batch.keys() - stored.keys())
        puts = sorted(stored.items(), key=itemgetter(0))  # faster than whole pairs
        work = partial(_apply, deletions=deletions, puts=puts)
        try:
            self.write(work, batch, len(batch), 1 if puts else 2)
        except lmdb.IncompatibleError as error:
            raise self._explained(error, partial(_perhaps_names, keys=batch)) from error

    def _explained(
        self, error: lmdb.Error, candidates: Work[list[bytes]]
    ) -> lmdb.Error:
        """Return an error that says which keys are names of named databases."""
        found = self._transact(candidates, commit=False)
        names = sorted(filter(self._is_name, found))
        return self._name_error(names) if names else error

    def _name_error(self, names: list[bytes]) -> NamedDatabaseError:
        error = NamedDatabaseError(
            f"{self.environment.path!r} has named databases, made by another program: "
            f"{', '.join(map(describe, names))}. Nothing can be stored or deleted "
            "under their names, and these writes are refused. Use other keys, or a "
            "file of the store's own."
        )
        error.keys = frozenset(names)
        return error

    def _is_name(self, key: bytes) -> bool:
        overwrite = partial(_apply, deletions=[], puts=[(key, b"")])
        try:
            self._transact(overwrite, commit=False)
        except lmdb.IncompatibleError:
            return True
        return False

    def delete_many(self, keys: Collection[bytes]) -> int:
        ordered, covers = sorted(keys), keys.__contains__
        return self._erase(lambda txn: sum(map(txn.delete, ordered)), covers, len(keys))

    def delete_range(self, keys: KeyRange) -> int:
        work = self._drop if keys == ALL else partial(_delete_range, keys=keys)
        return self._erase(work, keys.holds, _EVERYTHING)

    def _drop(self, txn: Transaction) -> int:
        existed: int = txn.stat()["entries"]
        txn.drop(self.environment.handle.open_db(txn=txn), delete=False)
        return existed

    def _erase(self, work: Work[int], covers: _Covers, count: int) -> int:
        try:
            self.flush()  # later puts of other threads come after the deletion
        except SnapshotOpenError:
            raise
        except (GrowthError, DiskError):
            # There is no room for the pending writes, so some of them have to go, too:
            # at the same moment as the database, as no read comes between.
            return self.writer.exclusive(self._erase_pending, work, covers, count)
        try:
            return self.write(work, {}, count, None) if count else 0
        except lmdb.IncompatibleError as error:
            candidates = partial(_perhaps_names_in, covers=covers)
            raise self._explained(error, candidates) from error

    def _erase_pending(self, work: Work[int], covers: _Covers, count: int) -> int:
        pending = dict(self.buffer.entries)
        erased = {key: pending[key] for key in filter(covers, pending)}
        after: list[int] = []

        def erase(txn: Transaction) -> int:
            existed = adjustment(txn, erased) + work(txn)
            _touch(txn)  # or a commit that changes nothing leaves no trace
            after[:] = txn.id(), txn.stat()["entries"]
            return existed

        try:
            existed = self.write(erase, {}, count, None)
            self.buffer.remove(erased)
        except BaseException:
            # A KeyboardInterrupt may have come after the commit.
            handle = self.environment.handle
            if after == [handle.info()["last_txnid"], handle.stat()["entries"]]:
                self.buffer.remove(erased)
            raise
        return existed

    def write(self, work: Work[_R], batch: Batch, count: int, share: int | None) -> _R:
        """Do `work` in one transaction: put the values of `batch`, or delete.

        The work puts or deletes `count` entries. Where the map has a cap, it has to
        leave one `share`-th of the reserve, or with None the pages that `_recycle`
        needs. A single deletion may use up everything.
        """
        environment = self.environment
        while True:
            begin = environment.begin
            try:
                if self.map.cap is not None:
                    self._keep_reserve(work, batch, count, share)
                if self.buffer.block is None:
                    return self._transact(work)
                return self._transact(partial(self._or_wait, work))
            except (ConflictError, ReplacedError, SnapshotOpenError):
                raise
            except lmdb.MapFullError:
                # A reader that was killed keeps all pages that were freed since.
                if not environment.handle.reader_check() and not self._recycle():
                    self._grow(batch, count)
            except lmdb.Error as error:
                if getattr(error, "code", 0) in DISK_CODES:
                    raise self._disk_error(error) from error
                environment.repair_as_writer(error, begin)

    def _transact(self, work: Work[_R], parent: Any = None, commit: bool = True) -> _R:
        environment = self.environment
        committed = False
        outer = sys.exc_info()[1]
        txn: Any = (
            self._begin() if parent is None else environment.begin(None, parent, True)
        )
        try:
            parent = None  # see `_keep_reserve`
            # First, as LMDB can abort on what writers without a common lock have left.
            environment.files.check_lock()
            result = work(txn)
            if commit:
                size = environment.files.check_data()  # as late as can be
                txn.commit()
                committed = True
        finally:
            try:
                if not committed:  # abort as `drop_transaction` does
                    if (block := self.buffer.block) is not None:
                        block.committed = None
                    _forget_calls(sys.exc_info()[1], outer)
                    txn = weakref.proxy(txn)
            finally:
                try:
                    txn.abort()  # does nothing after the commit
                except ReferenceError:
                    pass  # the transaction is gone
        if commit:
            environment.fill_file(size)
        return result

    def _begin(self) -> Transaction:
        """Begin a write transaction, or take that of the block that ends."""
        block = self.buffer.block
        if block is None or block.state is not State.ENDING:
            return self.environment.begin_write()
        if block.txn is None:
            block.txn = self.environment.begin_write()
            if block.txn.id() != block.id:
                raise ConflictError(
                    f"Another process has written to {self.environment.path!r} while "
                    "room was made for a transaction block. Nothing of the block is "
                    "written: run it again."
                )
        txn, block.txn = block.txn, None
        block.committed = txn
        return txn

    def check_block(self) -> None:
        """Raise if others have written since the block began, which ends now."""
        self._transact(bool, commit=False)

    def _or_wait(self, work: Work[_R], txn: Transaction) -> _R:
        """Do `work`, of a block; wait for open snapshots if the map has to grow.

        LMDB's lock still keeps other processes from writing then.
        """
        try:
            return work(txn)
        except lmdb.MapFullError:
            if self._info("map_size") < self.map.limit():
                self.writer.await_snapshots()
            raise

    def _disk_error(self, error: lmdb.Error) -> DiskError:
        return DiskError(
            f"{error}. The disk under {self.environment.path!r} is probably full, or "
            "failing. Nothing of this was written; pending writes are kept. Free some "
            "space and flush again."
        )

    def _info(self, name: str) -> int:
        value: int = self.environment.handle.info()[name]
        return value

    def _needed(self, batch: Batch, count: int) -> int:
        handle = self.environment.handle
        return self.map.needed(batch, count, {**handle.stat(), **handle.info()})

    def _grow(self, batch: Batch, count: int) -> None:
        size = self._info("map_size")
        wanted = self.map.grown(size, self._needed(batch, count))
        if wanted <= size:
            raise GrowthError(
                f"The map of {self.environment.path!r} is full and has reached "
                f"max_map_size, {self.map.cap} bytes. Raise max_map_size or delete "
                "entries; pending writes are kept."
            )
        self.environment.move_map(wanted)
        text = f"Map grown from {size} to {wanted} bytes"
        self.writer.log_later(logging.INFO, text)

    def _keep_reserve(
        self, work: Work[Any], batch: Batch, count: int, share: int | None
    ) -> None:
        """Raise `lmdb.MapFullError` if `work` would use up the reserve."""
        erases_one = count <= 1 and not any(batch.values())
        if erases_one or not self.map.near_cap(self._needed(batch, count)):
            return
        filler = bytes(self.map.page_size - 64)  # takes a page of its own

        def work_and_fill(txn: Transaction) -> None:
            work(txn)
            pages = _RECYCLE_PAGES + txn.stat()["depth"]
            if share:
                pages = max(8, self.map.reserve() // share)
            txn.cursor().putmulti([(_spare_key(n), filler) for n in range(pages)])

        block = self.buffer.block
        nests = not self.environment.options.get("writemap")  # LMDB can't with it
        rehearsal = partial(self._or_wait, work_and_fill) if block else work_and_fill
        if block and block.state is State.ENDING and block.txn and nests:
            # Else LMDB's lock would be given up between the rehearsal and the work. No
            # variable keeps the transaction: see `drop_transaction`.
            self._transact(rehearsal, block.txn, commit=False)
        else:
            self._transact(rehearsal, commit=False)

    def _recycle(self) -> bool:
        """At the cap, make the pages usable that the last commit has freed.

        LMDB uses them from the second transaction after that on, which never comes if
        the next one always fails. Return whether there is something to gain.
        """
        may_grow = self._info("map_size") < self.map.limit()
        if may_grow or self._info("last_txnid") == self._recycled:
            return False
        try:
            self._transact(_touch)
        except lmdb.Error:
            return False
        if self.buffer.block is not None:
            self.buffer.block.id += 1
        self._recycled = self._info("last_txnid")
        return True


def _forget_calls(error: BaseException | None, outer: BaseException | None) -> None:
    """Clear the variables of calls of this package that `error`, not `outer`, ended."""
    while error is not None and error is not outer:
        traceback = error.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            if frame.f_globals.get("__package__") == __package__:
                with suppress(RuntimeError):  # the call goes on
                    frame.clear()
            traceback = traceback.tb_next
        error = error.__context__


def _only(batch: Batch, keys: Collection[bytes]) -> Batch:
    return {key: raw for key, raw in batch.items() if key in keys}


def _without(batch: Batch, keys: Collection[bytes]) -> Batch:
    return {key: raw for key, raw in batch.items() if key not in keys}


def _apply(
    txn: Transaction, deletions: list[bytes], puts: list[tuple[bytes, Any]]
) -> None:
    for key in deletions:
        txn.delete(key)
    cursor = txn.cursor()
    # Beyond the last key no place is searched for, and leaves are filled to the brim.
    append = bool(puts) and not (cursor.last() and cursor.key() >= puts[0][0])
    cursor.putmulti(puts, True, True, append)


def _perhaps_names(txn: Transaction, keys: Collection[bytes]) -> list[bytes]:
    """Return those of the keys whose values can be those of named databases."""
    return [key for key in keys if len(txn.get(key, b"")) == _NAMED_DATABASE]


def _perhaps_names_in(txn: Transaction, covers: _Covers) -> list[bytes]:
    entries = txn.cursor()
    return [key for key, raw in entries if len(raw) == _NAMED_DATABASE and covers(key)]


def _delete_range(txn: Transaction, keys: KeyRange) -> int:
    before: int = txn.stat()["entries"]
    cursor = txn.cursor()
    cursor.set_range(keys.low)
    while (key := cursor.key()) and keys.holds(key):
        cursor.delete()  # moves on to the next
    return before - txn.stat()["entries"]


def _spare_key(number: int) -> bytes:
    return b"\xff" * 16 + number.to_bytes(4, "big")


def _touch(txn: Transaction) -> None:
    """Change nothing, but so that there is something to commit."""
    key = _spare_key(0)
    txn.put(key, b"", overwrite=False) and txn.delete(key)
