"""What `keys`, `values` and `items` of a store return."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, MappingView, ValuesView
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from ._ranges import KeyRange, Scan
from ._source import ABSENT

if TYPE_CHECKING:
    from ._gate import Gate
    from ._keys import KeyCodec
    from ._mapping import StoreMapping

_K = TypeVar("_K", covariant=True)
_V = TypeVar("_V", covariant=True)


class _RangeView(MappingView):
    """A key range of a store, as it is at any time: made once, used often.

    A loop reads in order, chunk by chunk; see `LmdbObjectStore.items`. The length
    is a count of the keys (at one moment, and without one where the range is the
    whole store).
    """

    __slots__ = ("_bounds", "_store", "range")

    def __init__(self, store: StoreMapping[Any, Any], **bounds: Any) -> None:
        super().__init__(store)
        source = store._source()
        if source.closed:
            raise source.closed_error()
        self._store = store
        encode = store._codec.encode_bound
        self._bounds = {
            name: bound for name, bound in bounds.items() if bound is not None
        }
        encoded = {name: encode(bound) for name, bound in self._bounds.items()}
        keys = KeyRange(encoded.get("start", b""), encoded.get("stop"))
        self.range = keys.starting_with(encoded.get("prefix", b""))

    def __len__(self) -> int:
        return self._store._source().count(self.range)

    def __repr__(self) -> str:
        bounds = "".join(f", {name}={key!r}" for name, key in self._bounds.items())
        return f"<{type(self).__name__} of {self._store._path!r}{bounds}>"

    def _encode(self, key: object) -> bytes | None:
        """Return the bytes of a key of this range, None for everything else."""
        try:
            raw = self._store._codec.encode(key)
        except (TypeError, ValueError):
            return None  # a set operation may ask about anything
        return raw if self.range.holds(raw) else None

    def _scan(self, reverse: bool, values: bool = True) -> Scan:
        source = self._store._reading()
        if source.closed:
            raise source.closed_error()
        return Scan(source, self.range, reverse, values, self._store)

    def _names(self) -> KeyCodec | None:
        codec = self._store._codec
        return codec if codec.encoding is not None else None


class StoreKeysView(_RangeView, KeysView[_K]):
    """The keys of a range, with the set operations of ``dict.keys()``."""

    __slots__ = ()

    def is_of(self, gate: Gate) -> bool:
        """Whether these are keys of that environment as it is."""
        source = self._store._source()
        return source.gate is gate and not source.lasting

    def __contains__(self, key: object) -> bool:
        """Return whether `key` is in the range and in the store."""
        raw = self._encode(key)
        return raw is not None and raw in self._store

    def __iter__(self) -> Iterator[_K]:
        return self._scan(False, False).keys(self._names())

    def __reversed__(self) -> Iterator[_K]:
        return self._scan(True, False).keys(self._names())


class StoreItemsView(_RangeView, ItemsView[_K, _V]):
    """The pairs of key and value of a range."""

    __slots__ = ()

    def __contains__(self, item: object) -> bool:
        """Return whether the key is in the range and has that value."""
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        key, value = item
        if (raw := self._encode(key)) is None:
            return False
        stored = self._store.get(raw, ABSENT)
        return stored is value or (stored is not ABSENT and bool(stored == value))

    def __iter__(self) -> Iterator[tuple[_K, _V]]:
        return self._scan(False).items(self._names())

    def __reversed__(self) -> Iterator[tuple[_K, _V]]:
        return self._scan(True).items(self._names())


class StoreValuesView(_RangeView, ValuesView[_V]):
    """The values of a range."""

    __slots__ = ()

    def __contains__(self, value: object) -> bool:
        """Return whether the range has that value; reads up to where it is."""
        return any(stored is value or stored == value for stored in self)

    def __iter__(self) -> Iterator[_V]:
        return map(itemgetter(1), self._scan(False).items())

    def __reversed__(self) -> Iterator[_V]:
        return map(itemgetter(1), self._scan(True).items())
