"""The results of `keys`, `values` and `items`: views of a key range."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, MappingView, ValuesView
from operator import itemgetter
from typing import Any, Protocol, TypeVar

from ._keys import Codec, KeyRange
from ._reads import Source
from ._scan import Owner, Scan, count
from ._values import Values

NOT_GIVEN: Any = object()
"""In place of an argument, or of a value that is not there."""

_K = TypeVar("_K", covariant=True)
_V = TypeVar("_V", covariant=True)


class _Store(Owner, Protocol):
    """The mapping that a view is of."""

    _path: str
    _codec: Codec
    _values: Values

    @property
    def get(self) -> Any: ...
    def _reading(self) -> Source: ...
    def __contains__(self, key: object) -> bool: ...
    def __len__(self) -> int: ...


class _RangeView(MappingView):
    """A key range of a store, as it is at any time. See `LmdbObjectStore.items`.

    The length is a count of the keys, at one moment; the whole store needs none.
    """

    def __init__(self, store: _Store, **bounds: Any) -> None:
        super().__init__(store)
        source = store._source()
        if source.closed:
            raise source.closed_error()
        self._store = store
        codec = store._codec
        self._names = codec if codec.encoding is not None else None
        self._bounds = {name: key for name, key in bounds.items() if key is not None}
        given = dict(self._bounds)
        prefix = given.pop("prefix", b"")
        encoded = {name: codec.encode_bound(key) for name, key in given.items()}
        keys = KeyRange(encoded.get("start", b""), encoded.get("stop"))
        self.range = keys.overlap(codec.prefix_range(prefix))

    def __len__(self) -> int:
        return count(self._store._source(), self.range)

    def __repr__(self) -> str:
        bounds = "".join(f", {name}={key!r}" for name, key in self._bounds.items())
        return f"<{type(self).__name__} of {self._store._path!r}{bounds}>"

    def _encode(self, key: object) -> bytes | None:
        """Return the bytes of a key of this range, None for everything else."""
        codec = self._store._codec
        if isinstance(key, str) and codec.encoding is None:
            return None  # a set operation may ask about anything
        raw = codec.find(key)
        return raw if raw is not None and self.range.holds(raw) else None

    def _scan(self, reverse: bool, values: Values | None) -> Scan:
        source = self._store._reading()
        if source.closed:
            raise source.closed_error()
        return Scan(source, self.range, reverse, values, self._store)


class StoreKeysView(_RangeView, KeysView[_K]):
    """The keys of a range, with the set operations of ``dict.keys()``."""

    def is_of(self, gate: object) -> bool:
        """Return whether these are keys of an environment as it is now."""
        source = self._store._source()
        return source.gate is gate and not source.lasting

    def __contains__(self, key: object) -> bool:
        """Return whether `key` is in the range and in the store."""
        raw = self._encode(key)
        return raw is not None and raw in self._store

    def __iter__(self) -> Iterator[_K]:
        return self._scan(False, None).keys(self._names)

    def __reversed__(self) -> Iterator[_K]:
        return self._scan(True, None).keys(self._names)


class StoreItemsView(_RangeView, ItemsView[_K, _V]):
    """The pairs of key and value of a range."""

    def __contains__(self, item: object) -> bool:
        """Return whether the key is in the range and has that value."""
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        key, value = item
        if (raw := self._encode(key)) is None:
            return False
        stored = self._store.get(raw, NOT_GIVEN)
        return stored is value or (stored is not NOT_GIVEN and bool(stored == value))

    def __iter__(self) -> Iterator[tuple[_K, _V]]:
        return self._scan(False, self._store._values).items(self._names)

    def __reversed__(self) -> Iterator[tuple[_K, _V]]:
        return self._scan(True, self._store._values).items(self._names)


class StoreValuesView(_RangeView, ValuesView[_V]):
    """The values of a range."""

    def __contains__(self, value: object) -> bool:
        """Return whether the range has that value; reads up to where it is."""
        return any(stored is value or stored == value for stored in self)

    def __iter__(self) -> Iterator[_V]:
        return map(itemgetter(1), self._scan(False, self._store._values).items())

    def __reversed__(self) -> Iterator[_V]:
        return map(itemgetter(1), self._scan(True, self._store._values).items())
