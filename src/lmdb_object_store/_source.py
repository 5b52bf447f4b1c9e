"""What can be read: a transaction, and over it writes that are not in it yet.

A store (`SharedEnvironment`), an open transaction block (`Block`) and a snapshot
(`SnapshotSource`) differ in where the two come from. How they are merged, by
single keys, many keys and key ranges, is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pickle import loads
from threading import RLock
from typing import Any, TypeVar

import lmdb

from ._gate import Gate, under
from ._ranges import KeyRange, Scan, Tally
from ._reading import Batch, ManyValues, load, unpickle_error
from .exceptions import ClosedError

_R = TypeVar("_R")

ABSENT: Any = object()


class Source(ABC):
    """A state that reads see: pending writes over what a transaction shows."""

    # Guards the three below. A leaf: no other lock is taken under it.
    buffer_lock: RLock
    buffer: Batch
    buffer_bytes: int  # of keys and values, overwritten ones included
    settled: int  # counts the times that the buffer gave up keys
    closed: bool
    lasting = False  # whether it has one transaction, which outlasts its reads

    @property
    @abstractmethod
    def gate(self) -> Gate:
        """The gate of the environment."""

    @abstractmethod
    def closed_error(self) -> ClosedError:
        """Return what a read raises once this is closed."""

    @abstractmethod
    def visit(self, action: Callable[..., _R], *args: Any) -> _R:
        """Call ``action(begin, *args)`` in the gate, until it works or can't be mended.

        `begin` returns a transaction, which the action ends unless it is `lasting`.
        """

    def visit_as_writer(self, action: Callable[..., _R], *args: Any) -> _R:
        """Do `visit` for who has the write lock."""
        return self.visit(action, *args)

    @abstractmethod
    def gives_views(self, values: bool) -> bool:
        """Whether a scan (of values) is to have views of the map, or gets them anyway.

        Call it in the gate.
        """

    def end_scans(self, owner: object = None) -> None:
        """Empty the chunks that iterators (of `owner`) are at, once it is closed."""
        for pin in self.gate.pins():
            if not isinstance(pin, Scan) or pin.source is not self:
                continue
            if owner is None or pin.owner is owner:
                pin.stop()

    # Reads

    def unpickle(self, key: bytes, raw: bytes, buffered: bool = True) -> Any:
        """Return the object of a pending write, or of what `look_up` returned."""
        try:
            return self.gate.outside_gate(loads, raw)
        except Exception as error:
            raise unpickle_error(key, buffered, error) from error

    def look_up(self, key: bytes) -> tuple[bytes | None, bool]:
        """Return what is stored under `key`, if anything, and whether it is pending."""
        pending = self.buffer.get(key, ABSENT)
        if pending is not ABSENT:
            return pending, True
        return self.visit(lambda begin: begin().get(key)), False

    def read_many(self, keys: list[bytes]) -> dict[bytes, Any]:
        """Return what is stored under `keys`, pending or not, at one moment."""
        return self.gate.outside_gate(self._read_many, keys)

    def _read_many(self, keys: list[bytes]) -> dict[bytes, Any]:
        pending, stored = self.visit(self._begin_many, keys)
        try:
            return self._unpickle_many(pending, stored, len(keys))
        finally:
            try:  # as in Gate
                self.gate.in_gate(stored.end)
            finally:
                stored.release()

    def _unpickle_many(
        self, pending: Batch, stored: ManyValues, count: int
    ) -> dict[bytes, Any]:
        gate = self.gate
        found: dict[bytes, Any] = {}
        while count:
            chunk, raws = gate.in_gate(stored.next_chunk)
            if not chunk:
                raise self.closed_error()  # it has been released: see `begin_anew`
            count -= len(chunk)
            if pending:
                raws = list(map(pending.get, chunk, raws))
            unpickle = load if gate.large_seen else loads
            try:
                for key, raw in zip(chunk, raws, strict=True):
                    if raw is not None:
                        found[key] = unpickle(raw)
            except Exception as error:
                raise unpickle_error(key, key in pending, error) from error
        return found

    def _begin_many(
        self, begin: Callable[..., lmdb.Transaction[Any]], keys: list[bytes]
    ) -> tuple[dict[bytes, Any], ManyValues]:
        # A put waits for the buffer lock, and a flush takes nothing out of the
        # buffer without it: what is pending and the transaction show one moment.
        return under(self.buffer_lock, self._begin_many_at_once, begin, keys)

    def _begin_many_at_once(
        self, begin: Callable[..., lmdb.Transaction[Any]], keys: list[bytes]
    ) -> tuple[dict[bytes, Any], ManyValues]:
        pending = _pick(self.buffer, keys)
        views = self.gate.large_seen
        txn = begin(None, None, False, views)
        return pending, ManyValues(self.gate, txn, keys, views)

    def begin_with_pending(
        self, begin: Callable[..., lmdb.Transaction[Any]]
    ) -> tuple[lmdb.Transaction[Any], Batch]:
        """Return a transaction and a copy of the buffer that show one moment.

        Call it in the gate and under the buffer lock.
        """
        return begin(), dict(self.buffer)

    def last_key(self) -> bytes | None:
        """Return the last key of all. Costs a look at every pending key."""
        return self.visit(self._last)

    def _last(self, begin: Callable[..., lmdb.Transaction[Any]]) -> bytes | None:
        txn: Any
        txn, pending = under(self.buffer_lock, self.begin_with_pending, begin)
        try:
            return _last_key(txn, pending)
        finally:
            try:  # as in Gate
                self.closed or txn.abort()  # see `Pin.end`; a forked child leaves it
            finally:
                pass

    def count(self, keys: KeyRange) -> int:
        """Return how many entries a key range has, at one moment."""
        return Tally(self, keys).result()

    # What reading and writing in one step has in common

    def _holds(self, key: bytes, pending: Any, expected: Any) -> bool:
        """Whether what is stored under `key`, or `pending`, is as expected."""
        if pending is not ABSENT:
            return _is_as(expected, pending)
        return self.visit_as_writer(self._look, key, expected)

    def _look(
        self,
        begin: Callable[..., lmdb.Transaction[memoryview]],
        key: bytes,
        expected: Any,
    ) -> bool:
        txn: Any = begin(None, None, False, True)
        try:
            return _is_as(expected, txn.get(key))
        finally:
            try:  # as in Gate
                self.closed or txn.abort()  # see `Pin.end`; a forked child leaves it
            finally:
                pass

    def _swap(self, key: bytes, pending: Any, raw: bytes | None, size: int) -> bool:
        # From the comparison to the end there is no call (see put), nor a jump,
        # where 3.10 could call a signal handler as well.
        if pending is ABSENT:
            if key not in self.buffer:
                self.buffer[key] = raw
                self.buffer_bytes += size
                return True
        elif self.buffer[key] is pending:
            self.buffer[key] = raw
            self.buffer_bytes += size
            return True
        return False


def _last_key(txn: Any, pending: Batch) -> bytes | None:
    put = max((key for key in pending if pending[key] is not None), default=b"")
    stored: bytes
    for stored in txn.cursor().iterprev(True, False):
        if pending.get(stored, ABSENT) is not None:
            return max(stored, put)
    return put or None


def _pick(batch: Batch, keys: list[bytes]) -> Batch:
    return {key: batch[key] for key in keys if key in batch} if batch else {}


def _is_as(expected: Any, raw: Any) -> bool:
    """Whether `raw`, perhaps a view of the map, is what `exchange` expects."""
    if expected is None or raw is None:
        return expected is raw
    return expected is ABSENT or bytes(raw) == expected
