"""Key ranges: iteration in chunks, and counting."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain, islice
from operator import itemgetter, length_hint
from typing import Any, Protocol

import lmdb

from ._buffer import Batch
from ._environment import Begin
from ._gate import Pin
from ._keys import ALL, Codec, KeyRange
from ._locks import locked
from ._reads import Source, adjustment, pick_all
from ._values import LARGE, LargeValue, Values
from .exceptions import ClosedError

_ROOM = 2**18
"""Bytes of small values in a chunk whose sizes are looked at; fits in a CPU's cache."""
_FIRST_CHUNK = 8  # entries: a caller that wants the first one pays for few others
_FACTOR = 16  # by which the next chunk is larger: 100 entries take two chunks
_MAX_CHUNK = 1024
_MAX_KEYS = 4096  # in a chunk without values


class Owner(Protocol):
    """The store object or snapshot that a scan is of."""

    @property
    def closed(self) -> bool: ...
    def _source(self) -> Source: ...


def _entries(txn: Any, keys: KeyRange, reverse: bool, values: bool) -> Any:
    """Iterate over a range and all that comes after: pairs, or only the keys."""
    cursor = txn.cursor()
    if not reverse:
        found = cursor.set_range(keys.low)
    elif keys.high is not None and cursor.set_range(keys.high):
        found = cursor.prev()
    else:
        found = cursor.last()
    if not found:
        return ()
    return (cursor.iterprev if reverse else cursor.iternext)(True, values)


class Scan:
    """One pass over a key range, chunk by chunk.

    Each chunk shows one moment, pending writes included. Between chunks nothing is
    held: anything may be written, and the map may grow. The scan ends with an error
    when its source or its owner is closed.
    """

    def __init__(
        self,
        source: Source,
        keys: KeyRange,
        reverse: bool,
        values: Values | None = None,
        owner: Owner | None = None,
    ) -> None:
        self.source = source
        self.owner = owner
        self._inherited = False  # from the parent process, by a fork
        self._rest = keys
        self._more = True
        self._reverse = reverse
        self._values = values
        self._count = _FIRST_CHUNK
        self._views = False  # whether the last transaction gave views of the map
        self._rows: list[Any] = []  # the last chunk, which may be in use
        self._buffered: Batch = {}  # the part of it that was pending
        # Pending keys in `_rest`, the next one last. The buffer keeps its keys in
        # the order in which they came, and gives them up in `remove` only: so the
        # keys that are new since the last chunk are those beyond `_seen`.
        self._ahead: list[bytes] = []
        self._seen = 0
        self._removals = source.pending.removals
        source.gate.iterators.add(self)

    def keys(self, codec: Codec | None = None) -> Iterator[Any]:
        """Iterate over the keys, named by `codec` or as they are stored."""
        return chain.from_iterable(self._chunks(codec))

    def items(self, codec: Codec | None = None) -> Iterator[tuple[Any, Any]]:
        """Iterate over keys and loaded values, also after a `LoadError`."""
        return chain.from_iterable(self._loading(codec))

    def _loading(self, codec: Codec | None) -> Iterator[Iterator[Any]]:
        values: Any = self._values
        for rows in self._chunks(codec):
            rest = iter(rows)
            while length_hint(rest):  # more than once: an error ends the generator
                yield self._loaded(rest, codec, values)

    def _loaded(
        self, rows: Iterator[Any], codec: Codec | None, values: Values
    ) -> Iterator[Any]:
        loads = values.loads
        for key, raw in rows:
            try:
                if loads is not None and type(raw) is bytes:
                    value = loads(raw)
                else:
                    value = values.load(codec.encode(key) if codec else key, raw)
            except Exception as error:
                stored = codec.encode(key) if codec else key
                buffered = stored in self._buffered
                raise values.load_error(stored, raw, buffered, error) from error
            yield key, value

    def _chunks(self, codec: Codec | None) -> Iterator[list[Any]]:
        while True:
            rows = self._chunk() if self._more and not self._inherited else []
            if codec and rows:
                if self._values:
                    keys, raws = zip(*rows, strict=True)
                    rows = list(zip(codec.names(keys), raws, strict=True))
                else:
                    rows = codec.names(rows)
            # A close sets `closed`, then empties the chunks that iterators are at.
            # Either the emptying comes after this, or the check does after that.
            self._rows = rows
            done = not rows and not self._more  # before it can be emptied
            self._check()
            if done:
                return
            yield rows

    def _check(self) -> None:
        if self._inherited:
            raise ClosedError(
                "This iterator belongs to the parent process, which began it before "
                "the fork. Begin one in this child process."
            )
        if self.source.closed:
            raise self.source.closed_error()
        if self.owner is not None and self.owner.closed:
            raise self.owner._source().closed_error()

    def _chunk(self) -> list[Any]:
        """Return more entries (or keys) in order; none does not mean the end."""
        source, pending = self.source, self.source.pending
        if pending.entries:  # most new keys are sorted in here, without the lock
            self._sort_in(source.gate.read(locked, pending.lock, self._new_pending))
        return self._chunk_of(*source.view(self._pick, self._read))

    def _new_pending(self) -> list[bytes]:
        """Return pending keys that came since the last call. Under the buffer lock."""
        pending = self.source.pending
        if self._removals != pending.removals:
            self._removals = pending.removals
            self._ahead = []
            self._seen = 0
        new = pending.keys_from(self._seen)
        self._seen += len(new)
        return new

    def _sort_in(self, new: list[bytes]) -> None:
        if new:
            low, high = self._rest  # `KeyRange.holds` would be a call for each key
            new = [key for key in new if low <= key and (high is None or key < high)]
            self._ahead += new
            self._ahead.sort(reverse=not self._reverse)

    def _pick(self, begin: Begin) -> tuple[lmdb.Transaction[Any], Batch]:
        self._sort_in(self._new_pending())
        self._views = self.source.gives_views(self._values is not None)
        entries = self.source.pending.entries
        keys = self._ahead[: -self._count - 1 : -1]
        picked = dict(zip(keys, map(entries.__getitem__, keys), strict=True))
        return begin(None, None, False, self._views), picked

    def _read(self, txn: Any, picked: Batch) -> tuple[list[Any], bool, Batch]:
        entries = _entries(txn, self._rest, self._reverse, self._values is not None)
        limited = islice(entries, self._count)
        if self._views and self._values:
            return *self._copy(txn, limited), picked
        rows = list(map(bytes, limited) if self._views else limited)
        return rows, len(rows) == self._count, picked

    def _copy(self, txn: Any, entries: Iterator[Any]) -> tuple[list[Any], bool]:
        """Return entries of limited size, and whether there may be more."""
        low, high = self._rest
        rows: list[Any] = []
        room = _ROOM
        for view, value in entries:
            key = bytes(view)
            if key < low or (high is not None and key >= high):
                return rows, False
            size = len(value)
            room -= size
            if rows and (room < 0 or size >= LARGE):
                return rows, True
            if size >= LARGE:
                return [(key, LargeValue(self.source.gate, txn, value))], True
            rows.append((key, value.tobytes()))
        return rows, len(rows) == self._count

    def _chunk_of(self, rows: list[Any], more: bool, pending: Batch) -> list[Any]:
        """Return the next chunk of stored and pending entries."""
        rest, reverse = self._rest, self._reverse
        key_of: Any = itemgetter(0) if self._values else bytes
        if rows and not rest.holds(key_of(rows[-1])):
            if reverse:
                beyond = bisect_left(rows[::-1], rest.low, key=key_of)
                rows = rows[: len(rows) - beyond]
            else:
                rows = rows[: bisect_left(rows, rest.high, key=key_of)]
            more = False
        # Where either of the two was not read to its end, the chunk ends.
        ends = [key_of(rows[-1])] if more else []
        if len(pending) < len(self._ahead):
            ends.append(next(reversed(pending)))
        if ends:
            rest = rest.beyond(max(ends) if reverse else min(ends), reverse)
            if pending:
                rows = [row for row in rows if not rest.holds(key_of(row))]
                here = [key for key in pending if not rest.holds(key)]
                pending = {key: pending[key] for key in here}
        if pending:
            rows = self._merged(rows, pending)
        # Only now, so that an error before changes nothing.
        del self._ahead[len(self._ahead) - len(pending) :]
        self._buffered = pending
        self._rest = rest
        self._more = bool(ends)
        largest = _MAX_CHUNK if self._values else _MAX_KEYS
        self._count = min(_FACTOR * self._count, largest)
        return rows

    def _merged(self, rows: list[Any], pending: Batch) -> list[Any]:
        stored: Any = rows if self._values else dict.fromkeys(rows, True)
        merged: dict[bytes, Any] = {**dict(stored), **pending}
        keys = [key for key, raw in merged.items() if raw is not None]
        keys.sort(reverse=self._reverse)
        return [(key, merged[key]) for key in keys] if self._values else keys

    def leave_to_parent(self) -> None:
        """Stop for good, in a child process made by fork."""
        self._inherited = True
        self.stop()

    def stop(self) -> None:
        """Forget the rest of the chunk that is in use."""
        self._rows.clear()


class Tally(Pin):
    """The number of entries in a key range, pending writes included, at one moment."""

    def __init__(self, source: Source, keys: KeyRange) -> None:
        super().__init__()
        self._source = source
        self._keys = self._rest = keys
        self._chunk_keys = _FIRST_CHUNK  # it reads beyond the end of a short range
        self._count = 0
        source.gate.pins.add(self)

    def result(self) -> int:
        """Count: with bounds by a scan of the keys, else without."""
        source = self._source
        try:
            while source.view(self._pick, self._step):
                pass
        finally:
            try:
                source.lasting or source.gate.read(self.abort)
            finally:
                self.forget()
        return self._count

    def _pick(self, begin: Begin) -> tuple[Any, Batch | None]:
        if self.txn is None:
            return pick_all(self._source.pending, begin)
        return self.txn, None

    def _step(self, txn: Any, pending: Batch | None) -> bool:
        """Count some keys; return whether more are left."""
        self.txn = None  # `view` aborts the transaction, unless more is to be counted
        if pending is not None:
            self._rest = self._keys
            changes = {key: pending[key] for key in filter(self._keys.holds, pending)}
            self._count = adjustment(txn, changes)
        rest = self._rest
        if rest == ALL:
            self._count += txn.stat()["entries"]
            return False
        keys = list(islice(_entries(txn, rest, False, False), self._chunk_keys))
        self._chunk_keys = min(_FACTOR * self._chunk_keys, _MAX_KEYS)
        if keys and rest.holds(last := bytes(keys[-1])):
            self._count += len(keys)
            self._rest = rest.beyond(last, False)
            self.txn = txn
            return True
        if keys and rest.high is not None:  # the last key is beyond the end
            self._count += bisect_left(keys, rest.high, key=bytes)
        return False

    def copy_out(self) -> None:
        self.txn = None  # it counts once more, from the beginning


def count(source: Source, keys: KeyRange) -> int:
    """Return the number of entries in a key range, at one moment."""
    if keys == ALL and not (source.pending.entries or source.lasting):
        return source.environment.count()
    return Tally(source, keys).result()
