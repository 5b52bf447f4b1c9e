"""The reading half of a mapping, which a store and a snapshot share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, overload

from ._keys import ALL, Codec
from ._reads import Source
from ._scan import count
from ._snapshot import SnapshotSource
from ._values import Values
from ._views import NOT_GIVEN, StoreItemsView, StoreKeysView, StoreValuesView

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    _K = TypeVar("_K", default="bytes | bytearray | memoryview | str")
    _V = TypeVar("_V", default=Any)
else:
    from types import GenericAlias
    from typing import TypeVar

    _K = TypeVar("_K")
    _V = TypeVar("_V")
_T = TypeVar("_T")


class StoreMapping(Mapping[_K, _V]):
    """Reads of a `Source`, by keys as the user spells them."""

    if not TYPE_CHECKING:
        # Typing's own would insist on two types: its TypeVars have no defaults yet.
        __class_getitem__ = classmethod(GenericAlias)

    def __init__(self, path: str, values: Values) -> None:
        self._path = path
        self._values = values
        self._codec = values.codec
        self._max_key = values.codec.max_size

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the mapping is closed."""

    @abstractmethod
    def _source(self) -> Source:
        """Return the source of the entries, without flushing."""

    @abstractmethod
    def _reading(self) -> Source:
        """Return the source of the entries, flushed if it should be."""

    def __getitem__(self, key: _K) -> _V:
        """Return the value of `key`; KeyError if there is none. See `get`."""
        value: _V = self.get(key, NOT_GIVEN)
        if value is NOT_GIVEN:
            raise self._key_error(key)
        return value

    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[False] = False,
        decode_not_found: bool | None = None,
    ) -> tuple[dict[bytes, _V], list[_K]]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[True],
        decode_not_found: bool | None = None,
    ) -> tuple[dict[_K, _V], list[_K]]: ...
    def get_many(
        self,
        keys: Iterable[Any],
        *,
        decode_keys: bool = False,
        decode_not_found: bool | None = None,
    ) -> tuple[dict[Any, Any], list[Any]]:
        """Return the values of many keys, all as of one moment.

        Parameters
        ----------
        keys : iterable
            Run to its end before anything is read.
        decode_keys : bool
            Return the found keys as `key_encoding` decodes them instead of bytes.
        decode_not_found : bool, optional
            Return the missing keys decoded; None follows `decode_keys`.

        Returns
        -------
        found : dict
            The values by encoded (or decoded) key, in the order of `keys`.
        not_found : list
            The keys of the input that are missing, as given (or decoded).

        Raises
        ------
        TypeError
            `keys` is a single str or bytes, or holds something that is no key.
        ValueError
            `key_encoding` is None, or a key can't be decoded, where it should be.
        LoadError
            The serializer can't load one of the values.
        """
        refuse_single("get_many", keys, self._codec)
        codec = self._codec
        if decode_not_found is None:
            decode_not_found = decode_keys
        if (decode_keys or decode_not_found) and codec.encoding is None:
            raise ValueError("Decoding requested but key_encoding is not set.")
        given = list(keys)
        encoded = self._encoded(given)
        wanted = dict.fromkeys(encoded)
        found: dict[Any, Any] = self._reading().read_many(list(wanted), self._values)
        not_found: list[Any] = []
        if len(found) < len(wanted):
            names = encoded if decode_not_found else given
            pairs = zip(names, encoded, strict=True)
            not_found = [name for name, key in pairs if key not in found]
            if decode_not_found:
                not_found = list(map(codec.decode, not_found))
        if decode_keys:
            found = {codec.decode(key): value for key, value in found.items()}
        return found, not_found

    def __len__(self) -> int:
        """Return the number of entries, at one moment. Never flushes or scans.

        Costs one look-up for each pending write.
        """
        return count(self._source(), ALL)

    def __eq__(self, other: object) -> bool:
        """Compare keys, as they come out, and values; read all if the lengths agree."""
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        codec = other._codec if isinstance(other, StoreMapping) else None
        for key, value in self.items():
            if codec:
                try:
                    if codec.name(codec.encode(key)) != key:
                        return False  # it may take this spelling, but has another
                except (TypeError, ValueError):
                    return False  # it can't have such a key
            theirs = other.get(key, NOT_GIVEN)
            equal = theirs is not NOT_GIVEN and theirs == value
            if not equal:
                return False
        return True

    # Key ranges

    def __iter__(self) -> Iterator[_K]:
        """Iterate over the keys in order. See `items`."""
        return iter(self.keys())

    def __reversed__(self) -> Iterator[_K]:
        """Iterate over the keys from the last to the first. See `items`."""
        return reversed(self.keys())

    def keys(
        self,
        prefix: _K | tuple[Any, ...] | None = None,
        *,
        start: _K | tuple[Any, ...] | None = None,
        stop: _K | tuple[Any, ...] | None = None,
    ) -> StoreKeysView[_K]:
        """Return a view of the keys (of a range). See `items`. No value is loaded."""
        return StoreKeysView(self, prefix=prefix, start=start, stop=stop)

    def values(
        self,
        prefix: _K | tuple[Any, ...] | None = None,
        *,
        start: _K | tuple[Any, ...] | None = None,
        stop: _K | tuple[Any, ...] | None = None,
    ) -> StoreValuesView[_V]:
        """Return a view of the values (of a key range). See `items`."""
        return StoreValuesView(self, prefix=prefix, start=start, stop=stop)

    def items(
        self,
        prefix: _K | tuple[Any, ...] | None = None,
        *,
        start: _K | tuple[Any, ...] | None = None,
        stop: _K | tuple[Any, ...] | None = None,
    ) -> StoreItemsView[_K, _V]:
        """Return a view of the keys and values (of a key range).

        Keys are in the order of their bytes. They come out decoded where the store has
        a `key_encoding` and the decoded key encodes (and normalizes) to the same bytes
        again, else as bytes.

        The view always shows the store as it is when the view is used. A loop flushes
        at its start, with `autoflush_on_read`. Then it reads chunks of at most a few
        thousand keys or about 2 MiB of values (or one larger value), each as of one
        moment, and holds nothing in between. Any thread may write meanwhile, in the
        loop's body too: every entry that is there throughout comes once. At a value
        that can't be loaded the iterator raises, and can go on with the next one.
        After any other error it has ended.

        Parameters
        ----------
        prefix : optional
            Only keys whose bytes begin with those of `prefix`; with
            `keys.TupleKeys`, only tuples that begin with the elements of `prefix`.
        start, stop : optional
            Only keys from `start` on and before `stop`; no error if they cross.
            Bounds are of the types of keys, but of any length, and compared as
            encoded bytes.

        Raises
        ------
        TypeError
            A bound that is no key.
        ClosedError
            The store is closed, or is closed during the loop.
        """
        return StoreItemsView(self, prefix=prefix, start=start, stop=stop)

    def _encoded(self, keys: Iterable[Any]) -> list[bytes]:
        longest = self._max_key
        encode = self._codec.encode
        return [  # with a call for each key `get_many` would take a tenth longer
            key if type(key) is bytes and 0 < len(key) <= longest else encode(key)
            for key in keys
        ]

    def _key_error(self, key: Any) -> KeyError:
        shown = key if isinstance(key, str) else self._codec.encode(key)
        return KeyError(f"Key not found: {self._codec.describe(shown)}")


class Snapshot(StoreMapping[_K, _V]):
    """A read-only mapping: a store at one moment. See `LmdbObjectStore.snapshot`.

    It reads as the store does: keys, ranges, views, `get_many`. `get` begins no
    transaction, and so is faster than the store's. Any number of threads may use one
    snapshot; their reads run one at a time. Once closed, every method raises
    `ClosedError`.
    """

    def __init__(self, path: str, values: Values, source: SnapshotSource) -> None:
        super().__init__(path, values)
        self._open_source = source

    def _source(self) -> SnapshotSource:
        return self._open_source

    _reading = _source

    @overload
    def get(self, key: _K) -> _V | None: ...
    @overload
    def get(self, key: _K, default: _V | _T) -> _V | _T: ...
    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`, or `default`. See `LmdbObjectStore.get`."""
        if type(key) is not bytes or not 0 < len(key) <= self._max_key:
            key = self._codec.encode(key)
        raw = self._open_source.fetch(key)
        if raw is None:
            return default
        values = self._values
        loads = values.loads
        try:
            if loads is not None and type(raw) is bytes:
                return loads(raw)
            return values.load(key, raw)
        except Exception as error:
            raise values.load_error(key, raw, False, error) from error

    def __contains__(self, key: object) -> bool:
        """Return whether there is a value under `key`."""
        raw = self._codec.find(key)
        return raw is not None and self._open_source.fetch(raw) is not None

    @property
    def closed(self) -> bool:
        """Whether the snapshot is closed."""
        return self._open_source.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} entries"
        return f"<{type(self).__name__} of {self._path!r}, {state}>"


def refuse_single(method: str, keys: object, codec: Codec) -> None:
    single = isinstance(keys, (str, bytes, bytearray, memoryview))
    if not single and isinstance(keys, tuple):
        with suppress(TypeError, ValueError):  # a tuple of keys is none itself
            codec.encode_bound(keys)
            single = True
    if single:
        raise TypeError(
            f"{method}() takes an iterable of keys, not a single "
            f"{type(keys).__name__}, which is a key itself; put the key in a list."
        )
