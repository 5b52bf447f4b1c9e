"""Reads over a transaction, and the pending writes of the same moment.

A store (`SharedStore`), an open transaction block (`TransactionBlock`) and a snapshot
(`SnapshotSource`) are sources. They differ in where the two come from. Single keys,
many keys and key ranges are merged in the same way for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import lmdb

from ._buffer import ABSENT, Batch, WriteBuffer
from ._diagnosis import DAMAGED
from ._environment import Begin, Environment, Pick
from ._values import ManyValues, Values
from .exceptions import ClosedError

_R = TypeVar("_R")

ANYTHING: Any = object()
"""In place of an expected raw value: any value will do."""


class Source:
    """Pending writes, over the state that a transaction shows."""

    lasting = False  # whether there is one transaction, which outlasts the reads

    def __init__(self, environment: Environment, pending: WriteBuffer) -> None:
        self.environment = environment
        self.gate = environment.gate
        self.pending = pending

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self.environment.closed

    def closed_error(self) -> ClosedError:
        return self.environment.closed_error()

    def view(self, pick: Pick, action: Callable[..., _R], *args: Any) -> _R:
        """Do `Environment.view` with the pending writes of this source."""
        environment, pending = self.environment, self.pending
        repair, view = environment.repair, environment.view
        result: _R = environment.retry(repair, view, pending, pick, action, args)
        return result

    def fetch(self, key: bytes) -> bytes | None:
        """Return a copy of the value of `key` in the database."""
        return self.environment.fetch(key)

    def gives_views(self, values: bool) -> bool:
        """Return whether a scan gets views of the map."""
        return self.environment.gives_views(values)

    def read_many(self, keys: list[bytes], values: Values) -> dict[bytes, Any]:
        """Return the objects stored under `keys`, pending or not, at one moment."""
        try:
            return self.gate.user_code(self._read_many, keys, values)
        except DAMAGED:  # once more, as in `Environment.retry`
            return self.gate.user_code(self._read_many, keys, values)

    def _read_many(self, keys: list[bytes], values: Values) -> dict[bytes, Any]:
        gate = self.gate

        def pick(begin: Begin) -> tuple[lmdb.Transaction[Any], tuple[Batch, bool]]:
            picked = self.pending.pick(keys)
            views = gate.large_seen
            return begin(None, None, False, views), (picked, views)

        def pin(txn: Any, picked: tuple[Batch, bool]) -> tuple[Batch, ManyValues]:
            return picked[0], ManyValues(gate, txn, keys, picked[1])

        pending, stored = self.view(pick, pin)
        try:
            return self._load_many(pending, stored, len(keys), values)
        finally:
            try:
                gate.read(stored.abort)
            finally:
                stored.forget()

    def _load_many(
        self, pending: Batch, stored: ManyValues, count: int, values: Values
    ) -> dict[bytes, Any]:
        gate = self.gate
        found: dict[bytes, Any] = {}
        while count:
            try:
                chunk, raws = gate.read(stored.next_chunk)
            except lmdb.Error as error:
                raise self.environment.explained(error) from error
            if not chunk:
                raise self.closed_error()  # a fork has made the pin forget
            count -= len(chunk)
            if pending:
                raws = list(map(pending.get, chunk, raws))
            loads: Any = values.loads
            try:
                for key, raw in zip(chunk, raws, strict=True):
                    if raw is not None:
                        quick = loads is not None and type(raw) is bytes
                        found[key] = loads(raw) if quick else values.load(key, raw)
            except Exception as error:
                raise values.load_error(key, raw, key in pending, error) from error
        return found


def look_up(source: Source, key: bytes) -> tuple[bytes | None, bool]:
    """Return the raw value of `key`, if there is one, and whether it is pending."""
    pending = source.pending.entries.get(key, ABSENT)
    if pending is not ABSENT:
        return pending, True
    return source.fetch(key), False


def pick_all(pending: WriteBuffer, begin: Begin) -> tuple[Any, Batch]:
    return begin(), dict(pending.entries)


def last_key(source: Source) -> bytes | None:
    """Return the last key of all. Costs a look at every pending key."""
    return source.view(partial(pick_all, source.pending), last_key_of)


def last_key_of(txn: Any, pending: Batch) -> bytes | None:
    """Return the last key that `txn`, with `pending` over it, shows."""
    put = max((key for key in pending if pending[key] is not None), default=b"")
    stored: bytes
    for stored in txn.cursor().iterprev(True, False):
        if pending.get(stored, ABSENT) is not None:
            return max(stored, put)
    return put or None


def pick_none(begin: Begin) -> tuple[Any, None]:
    return begin(), None


def is_stored(begin: Begin, key: bytes, expected: Any) -> bool:
    """Return whether the value of `key` in the database is as expected."""
    if expected is ANYTHING:
        found: bool = begin().cursor().set_key(key)  # copies no value
        return found
    return is_as_expected(expected, begin().get(key))


def is_as_expected(expected: Any, raw: Any) -> bool:
    """Return whether `raw` is the expected raw value, or None."""
    return expected == raw or (expected is ANYTHING and raw is not None)


def adjustment(txn: lmdb.Transaction[Any], pending: Batch) -> int:
    """Return how many entries `pending` would add to those that `txn` shows."""
    puts = len(pending) - list(pending.values()).count(None)
    return puts - sum(map(txn.cursor().set_key, pending))
