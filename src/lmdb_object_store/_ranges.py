"""Key ranges: their bounds, iteration in chunks, and counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from operator import itemgetter, length_hint
from pickle import loads
from typing import TYPE_CHECKING, Any, NamedTuple

import lmdb

from ._gate import Pin, under
from ._reading import LARGE, Batch, LargeValue, load, unpickle_error
from .exceptions import ClosedError

if TYPE_CHECKING:
    from ._keys import KeyCodec
    from ._mapping import StoreMapping
    from ._source import Source

CHUNK_BYTES = 2**20
"""Bytes of values up to which a chunk is copied without looking at their sizes."""
_ROOM = 2**18
"""Bytes of values in a chunk, where one looks: what fits in a CPU's cache.

A large value is a chunk by itself.
"""
_FIRST_CHUNK = 8  # entries: whoever wants the first one pays for few others
_MAX_CHUNK = 1024
_MAX_KEYS = 4096  # in a chunk without values


class KeyRange(NamedTuple):
    """The keys from `low` on and before `high` (None: to the end), encoded."""

    low: bytes = b""
    high: bytes | None = None

    def holds(self, key: bytes) -> bool:
        """Whether `key` lies in this range."""
        return self.low <= key and (self.high is None or key < self.high)

    def beyond(self, key: bytes, reverse: bool) -> KeyRange:
        """Return what is left of this range after (or before) `key`."""
        if reverse:
            return KeyRange(self.low, key)
        return KeyRange(key + b"\0", self.high)  # no key comes between the two

    def starting_with(self, prefix: bytes) -> KeyRange:
        """Return the part of this range whose keys begin with `prefix`."""
        low = max(self.low, prefix)
        head = prefix.rstrip(b"\xff")
        if not head:
            return KeyRange(low, self.high)
        end = head[:-1] + bytes([head[-1] + 1])
        return KeyRange(low, end if self.high is None else min(end, self.high))


ALL = KeyRange()


def _entries(txn: Any, keys: KeyRange, reverse: bool, values: bool) -> Any:
    """Iterate over a range and what comes after it: pairs, or only the keys."""
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


class Scan(Pin):
    """One pass over a key range, chunk by chunk.

    Each chunk shows one moment, pending writes included; between chunks nothing
    is held, so anything may be written, and the map may grow, in the midst of it.

    It ends with an error when `owner`, whose view it is of, is closed.
    """

    __slots__ = (
        *("_ahead", "_buffered", "_count", "_inherited", "_more", "_rest", "_reverse"),
        *("_rows", "_seen", "_settled", "_values", "_views", "owner", "source"),
    )

    def __init__(
        self,
        source: Source,
        keys: KeyRange,
        reverse: bool,
        values: bool,
        owner: StoreMapping[Any, Any] | None = None,
    ) -> None:
        super().__init__()
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
        # the order in which they came, and gives them up in `_take_out` only: so
        # what is new since the last chunk is the end of it, beyond `_seen`.
        self._ahead: list[bytes] = []
        self._seen = 0
        self._settled = source.settled
        source.gate.pin(self)

    def keys(self, codec: KeyCodec | None = None) -> Iterator[Any]:
        """Iterate over the keys, named by `codec` or as they are stored."""
        return chain.from_iterable(self._chunks(codec))

    def items(self, codec: KeyCodec | None = None) -> Iterator[tuple[Any, Any]]:
        """Iterate over keys and unpickled values.

        After the error of a value that can't be unpickled it can go on.
        """
        return chain.from_iterable(self._loading(codec))

    def _loading(self, codec: KeyCodec | None) -> Iterator[Iterator[tuple[Any, Any]]]:
        for rows in self._chunks(codec):
            rest = iter(rows)
            while length_hint(rest):  # more than once: an error ends the generator
                yield self._unpickled(rest, codec)

    def _unpickled(
        self, rows: Iterator[tuple[Any, Any]], codec: KeyCodec | None
    ) -> Iterator[tuple[Any, Any]]:
        unpickle = load if self._views else loads
        for key, raw in rows:
            try:
                value = unpickle(raw)
            except Exception as error:
                stored = codec.encode(key) if codec else key
                buffered = stored in self._buffered
                raise unpickle_error(stored, buffered, error) from error
            yield key, value

    def _chunks(self, codec: KeyCodec | None) -> Iterator[list[Any]]:
        while True:
            rows = self._chunk() if self._more and not self._inherited else []
            if codec and rows:
                if self._values:
                    keys, raws = zip(*rows, strict=True)
                    rows = list(zip(codec.names(keys), raws, strict=True))
                else:
                    rows = codec.names(rows)
            # Close ends iterators thus: it sets `closed`, then empties what they
            # are at. Either that comes after this, or the check does after that.
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
        source = self.source
        if source.buffer:  # most of what is new is sorted in here, without the lock
            new = source.gate.in_gate(under, source.buffer_lock, self._new_pending)
            self._sort_in(new)
        return source.visit(self._read)

    def _new_pending(self) -> list[bytes]:
        """Return pending keys that came after those returned before.

        Call it under the buffer lock.
        """
        source = self.source
        if self._settled != source.settled:
            self._settled = source.settled
            self._ahead = []
            self._seen = 0
        new = _end_of(source.buffer, self._seen)
        self._seen += len(new)
        return new

    def _sort_in(self, new: list[bytes]) -> None:
        if new:
            low, high = self._rest
            self._ahead += [
                key for key in new if low <= key and (high is None or key < high)
            ]
            self._ahead.sort(reverse=not self._reverse)

    def _begin_at_once(
        self, begin: Callable[..., lmdb.Transaction[Any]]
    ) -> tuple[lmdb.Transaction[Any], Batch]:
        self._sort_in(self._new_pending())
        buffer = self.source.buffer
        keys = self._ahead[: -self._count - 1 : -1]
        pending = dict(zip(keys, map(buffer.__getitem__, keys), strict=True))
        return begin(None, None, False, self._views), pending

    def _read(self, begin: Callable[..., lmdb.Transaction[Any]]) -> list[Any]:
        source = self.source
        self._views = source.gives_views(self._values)
        try:
            self.txn, pending = under(source.buffer_lock, self._begin_at_once, begin)
            if self._views and self._values:
                rows, more = self._copy(self.txn)
            else:
                entries = self._entries()
                rows = list(map(bytes, entries) if self._views else entries)
                more = len(rows) == self._count
        finally:
            try:  # as in Gate
                if not source.lasting:
                    self.end()
            finally:
                self.txn = None
        return self._chunk_of(rows, more, pending)

    def _entries(self) -> Iterator[Any]:
        entries = _entries(self.txn, self._rest, self._reverse, self._values)
        return islice(entries, self._count)

    def _copy(self, txn: lmdb.Transaction[memoryview]) -> tuple[list[Any], bool]:
        """Read a chunk of limited size; return it and whether there may be more."""
        low, high = self._rest
        rows: list[Any] = []
        room = _ROOM
        for view, value in self._entries():
            key = bytes(view)
            if key < low or (high is not None and key >= high):
                return rows, False
            size = len(value)
            room -= size
            if rows and (room < 0 or size >= LARGE):
                return rows, True
            if size >= LARGE:
                self.txn = None  # it goes on with the value
                return [(key, LargeValue(self.source.gate, txn, value))], True
            rows.append((key, value.tobytes()))
        return rows, len(rows) == self._count

    def _chunk_of(self, rows: list[Any], more: bool, pending: Batch) -> list[Any]:
        """Return the next chunk, of what has been read in the database and buffer."""
        rest, reverse = self._rest, self._reverse
        key_of: Any = itemgetter(0) if self._values else bytes
        if rows and not rest.holds(key_of(rows[-1])):
            rows = [row for row in rows if rest.holds(key_of(row))]
            more = False
        # Where either of the two was not read to its end, the chunk ends.
        ends = [key_of(rows[-1])] if more else []
        if len(pending) < len(self._ahead):
            ends.append(next(reversed(pending)))
        if ends:
            rest = rest.beyond(max(ends) if reverse else min(ends), reverse)
            if pending:
                rows = [row for row in rows if not rest.holds(key_of(row))]
                pending = {
                    key: raw for key, raw in pending.items() if not rest.holds(key)
                }
        if pending:
            rows = self._merged(rows, pending)
        # Only now, so that an error before changes nothing.
        del self._ahead[len(self._ahead) - len(pending) :]
        self._buffered = pending
        self._rest = rest
        self._more = bool(ends)
        self._count = min(4 * self._count, _MAX_CHUNK if self._values else _MAX_KEYS)
        return rows

    def _merged(self, rows: list[Any], pending: Batch) -> list[Any]:
        merged: dict[bytes, Any] = {}
        merged.update(rows if self._values else dict.fromkeys(rows, True))
        merged.update(pending)
        keys = [key for key, raw in merged.items() if raw is not None]
        keys.sort(reverse=self._reverse)
        return [(key, merged[key]) for key in keys] if self._values else keys

    def detach(self) -> None:
        pass  # nothing of it is in the map

    def release(self) -> None:
        super().release()
        self._inherited = True
        self.stop()

    def stop(self) -> None:
        """Forget the chunk that is in use."""
        self._rows.clear()


def _end_of(buffer: Batch, start: int) -> list[bytes]:
    """Return the keys from the `start`-th on, in any order."""
    try:
        return list(islice(reversed(buffer), max(0, len(buffer) - start)))
    except RuntimeError:  # the put of a signal handler or a finalizer came between
        return list(buffer)[start:]


class Tally(Pin):
    """The number of entries in a key range, pending writes included, at one moment."""

    __slots__ = ("_count", "_keys", "_rest", "_source")

    def __init__(self, source: Source, keys: KeyRange) -> None:
        super().__init__()
        self._source = source
        self._keys = self._rest = keys
        self._count = 0
        source.gate.pin(self)

    def result(self) -> int:
        """Count. Only bounds make that a scan, of keys."""
        source = self._source
        try:
            while source.visit(self._step):
                pass
        finally:
            try:  # as in Gate
                source.lasting or source.gate.in_gate(self.end)
            finally:
                self.release()
        return self._count

    def _step(self, begin: Callable[..., lmdb.Transaction[Any]]) -> bool:
        """Count some keys; return whether more are left."""
        if self.txn is None:
            source = self._source
            lock = source.buffer_lock
            self.txn, pending = under(lock, source.begin_with_pending, begin)
            pending = {key: pending[key] for key in filter(self._keys.holds, pending)}
            self._rest = self._keys
            self._count = adjustment(self.txn, pending)
        if self._keys == ALL:
            self._count += self.txn.stat()["entries"]
            return False
        keys = list(islice(_entries(self.txn, self._rest, False, False), _MAX_KEYS))
        if not keys or not self._rest.holds(last := bytes(keys[-1])):
            self._count += sum(map(self._rest.holds, map(bytes, keys)))
            return False
        self._count += len(keys)
        self._rest = self._rest.beyond(last, False)
        return True

    def detach(self) -> None:
        self.txn = None  # it counts once more, from the beginning


def adjustment(txn: lmdb.Transaction[Any], pending: Batch) -> int:
    """Return how many entries `pending` would add to what `txn` shows."""
    puts = len(pending) - list(pending.values()).count(None)
    return puts - sum(map(txn.cursor().set_key, pending))
