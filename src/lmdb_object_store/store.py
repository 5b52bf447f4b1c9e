"""`LmdbObjectStore`: what users meet. Keys, options and pickling; no locks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pickle import HIGHEST_PROTOCOL, dumps
from types import GenericAlias, MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import lmdb

from ._environment import ABSENT, MAX_VALUE, SharedEnvironment, log
from ._keys import KeyCodec, describe
from ._process import register
from ._ranges import ALL
from ._views import StoreItemsView, StoreKeysView, StoreValuesView
from .exceptions import ClosedError, GrowthError, LostWritesError, SizeError

if TYPE_CHECKING:
    from _typeshed import SupportsItems, SupportsKeysAndGetItem
    from typing_extensions import Self, TypeVar

    _K = TypeVar("_K", default="bytes | bytearray | memoryview | str")
    _V = TypeVar("_V", default=Any)
    _T = TypeVar("_T")
else:
    from typing import TypeVar

    _K = TypeVar("_K")
    _V = TypeVar("_V")

_DEFAULT_MAP_SIZE = 10 * 2**20  # py-lmdb's own
_ATTEMPTS = 100  # of popitem at an entry that is the last one all the time


class LmdbObjectStore(MutableMapping[_K, _V]):
    """A thread-safe, dict-like store of Python objects in one LMDB file.

    Values are pickled, so never open a file from somebody you don't trust:
    unpickling can run any code.

    Writes are collected in a buffer and reach the disk in one transaction when
    `batch_size` or `batch_bytes` is reached, at `flush`, at `close`, and before
    reads that have to go to the database (`autoflush_on_read`). Reads always see
    what this process wrote. The map grows by itself.

    Any number of threads may use one store, and so may code that runs inside its
    own operations: pickling hooks, finalizers, signal handlers. Other processes
    may open the same file, each with a store of its own; a child made by fork has
    to open its own, too.

    Parameters
    ----------
    db_path : str or os.PathLike
        Where the environment lives, as for `lmdb.open`: a directory, or a file
        with ``subdir=False``.
    batch_size : int
        Buffered operations (puts and deletions) that trigger a flush, >= 1.
    autoflush_on_read : bool
        Flush before reads that must go to the database. Can be set later.
    key_encoding : str, optional
        A codec such as ``"utf-8"``, which allows str keys. Without it keys are
        bytes, bytearray or memoryview.
    key_errors : str
        The codec's error handler. ``"ignore"`` and ``"replace"`` can make one
        key of different ones; ``"surrogateescape"`` round-trips any bytes.
    str_normalize : {"NFC", "NFD", "NFKC", "NFKD"}, optional
        The normal form that str keys are brought to before they are encoded.
    batch_bytes : int
        Bytes of buffered keys and pickled values that trigger a flush, >= 1.
    max_map_size : int, optional
        Bytes up to which the map may grow by itself; None sets no limit.
    growth_timeout : float
        Seconds for which growth (and close) wait for reads that don't end.
    **lmdb_kwargs
        Everything else that `lmdb.open` takes: ``map_size``, ``subdir``,
        ``readonly``, ``lock``, ``sync``, ``writemap``, ``lib_version``, ...
        Refused are ``max_spare_txns`` other than 0, which breaks fork,
        ``lock=False`` without ``readonly``, and ``writemap=True`` with the LMDB
        1.0 engine, which aborts the process.

    Raises
    ------
    TypeError, ValueError
        An option that is not one of the above, or out of its range.
    lmdb.Error
        The environment can't be opened.
    """

    autoflush_on_read: bool

    if not TYPE_CHECKING:
        # Typing's own would insist on two types: its TypeVars have no defaults yet.
        __class_getitem__ = classmethod(GenericAlias)

    def __init__(
        self,
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        autoflush_on_read: bool = True,
        key_encoding: str | None = None,
        key_errors: str = "strict",
        str_normalize: str | None = None,
        batch_bytes: int = 64 * 2**20,
        max_map_size: int | None = None,
        growth_timeout: float = 60.0,
        **lmdb_kwargs: Any,
    ) -> None:
        self.batch_size = batch_size
        self.batch_bytes = batch_bytes
        self.autoflush_on_read = bool(autoflush_on_read)
        codec = self._codec = KeyCodec(key_encoding, key_errors, str_normalize)
        self._db_path = os.path.abspath(os.fsdecode(db_path))
        map_size = lmdb_kwargs.get("map_size")
        if max_map_size is not None:
            _check_int("max_map_size", max_map_size, map_size or 1)
            lmdb_kwargs["map_size"] = map_size or min(_DEFAULT_MAP_SIZE, max_map_size)
        _check_timeout(growth_timeout)
        if not lmdb_kwargs.get("lock", True) and not lmdb_kwargs.get("readonly"):
            raise ValueError(
                "lock=False needs readonly=True: without its locks LMDB writes over "
                "what is being read."
            )
        if lmdb_kwargs.get("max_spare_txns"):
            raise ValueError(
                "max_spare_txns must be 0: cached transactions don't survive a fork."
            )
        self._env = SharedEnvironment(
            self._db_path, lmdb_kwargs, max_map_size, growth_timeout
        )
        codec.max_size = self._max_key = self._env.env.max_key_size()
        # At exit the module's own atexit function flushes; here the handle may
        # still be in use.
        finalizer = weakref.finalize(self, self._env.abandon)
        finalizer.atexit = False
        register(self._env)

    # Reads

    @overload
    def get(self, key: _K) -> _V | None: ...
    @overload
    def get(self, key: _K, default: _V | _T) -> _V | _T: ...
    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`, or `default`.

        One dict look-up for a pending write, else one LMDB read.

        Raises
        ------
        TypeError, SizeError
            A key of another type than the store takes, empty or too long.
        UnpickleError
            A RuntimeError: the stored value can't be unpickled.
        """
        if type(key) is not bytes or not 0 < len(key) <= self._max_key:
            key = self._codec.encode(key)
        env = self._env
        buffer = env.buffer
        if buffer:
            raw = buffer.get(key, ABSENT)
            if raw is None:
                return default
            if raw is not ABSENT:
                return env.unpickle(key, raw)
            if self.autoflush_on_read:
                env.flush_for_read()
        return env.read(key, default)

    def __getitem__(self, key: _K) -> _V:
        """Return the value of `key`; KeyError if there is none. See `get`."""
        value = self.get(key, ABSENT)
        if value is ABSENT:
            raise self._key_error(key)
        return value

    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[False] = False,
        decode_not_found: Literal[False] | None = None,
    ) -> tuple[dict[bytes, _V], list[_K]]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[False] = False,
        decode_not_found: Literal[True],
    ) -> tuple[dict[bytes, _V], list[str]]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[True],
        decode_not_found: Literal[True] | None = None,
    ) -> tuple[dict[str, _V], list[str]]: ...
    @overload
    def get_many(
        self,
        keys: Iterable[_K],
        *,
        decode_keys: Literal[True],
        decode_not_found: Literal[False],
    ) -> tuple[dict[str, _V], list[_K]]: ...
    def get_many(
        self,
        keys: Iterable[Any],
        *,
        decode_keys: bool = False,
        decode_not_found: bool | None = None,
    ) -> tuple[dict[Any, Any], list[Any]]:
        """Return what is stored under many keys, all as of one moment.

        Parameters
        ----------
        keys : iterable
            Any iterable of keys. It is run before anything is read.
        decode_keys : bool
            Return the found keys as str instead of bytes.
        decode_not_found : bool, optional
            Return the missing keys as str; None follows `decode_keys`.

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
            Decoding is asked for and `key_encoding` is None, or a key does not
            decode.
        UnpickleError
            One of the values can't be unpickled.
        """
        _refuse_single("get_many", keys)
        codec = self._codec
        if decode_not_found is None:
            decode_not_found = decode_keys
        if (decode_keys or decode_not_found) and codec.encoding is None:
            raise ValueError("Decoding requested but key_encoding is not set.")
        given = list(keys)
        longest = self._max_key
        encode = codec.encode
        encoded = [
            key if type(key) is bytes and 0 < len(key) <= longest else encode(key)
            for key in given
        ]
        env = self._env
        if env.buffer and self.autoflush_on_read:
            env.flush_for_read()
        wanted = dict.fromkeys(encoded)
        found: dict[Any, Any] = env.read_many(list(wanted))
        not_found: list[Any] = []
        if len(found) < len(wanted):
            pairs = zip(given, encoded, strict=True)
            not_found = [
                codec.decode(key) if decode_not_found else name
                for name, key in pairs
                if key not in found
            ]
        if decode_keys:
            found = {codec.decode(key): value for key, value in found.items()}
        return found, not_found

    def exists(self, key: _K, *, flush: bool | None = None) -> bool:
        """Return whether there is a value under `key`; nothing is unpickled.

        Parameters
        ----------
        key
            As for `get`.
        flush : bool, optional
            True flushes first, and raises if that fails; False never flushes;
            None follows `autoflush_on_read`.
        """
        encoded = self._codec.encode(key)
        env = self._env
        if flush and not env.readonly:
            env.flush()
        pending = env.buffer.get(encoded, ABSENT)
        if pending is not ABSENT:
            return pending is not None
        if flush is None and env.buffer and self.autoflush_on_read:
            env.flush_for_read()
        return env.read(encoded, False, True) is True

    def __contains__(self, key: object) -> bool:
        """Return whether there is a value under `key`. Never flushes."""
        encoded: Any = key
        if type(encoded) is not bytes or not 0 < len(encoded) <= self._max_key:
            encoded = self._codec.encode(encoded)
        env = self._env
        buffer = env.buffer
        if buffer:
            pending = buffer.get(encoded, ABSENT)
            if pending is not ABSENT:
                return pending is not None
        return env.read(encoded, False, True) is True

    def __len__(self) -> int:
        """Return the number of entries, at one moment. Never flushes or scans.

        Costs one look-up for each pending write.
        """
        return self._env.count(ALL)

    def __bool__(self) -> bool:
        """Return whether there is any entry. Never flushes."""
        return self._env.last_key() is not None

    def __eq__(self, other: object) -> bool:
        """Return whether a mapping has the same keys, as they come out, and values.

        Reads everything, unless the lengths differ.
        """
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other):
            return False
        codec = other._codec if isinstance(other, LmdbObjectStore) else None
        for key, value in self.items():
            if codec:
                try:
                    if codec.name(codec.encode(key)) != key:
                        return False  # it may take this spelling, but has another
                except (TypeError, ValueError):
                    return False  # it can't have such a key
            theirs = other.get(key, ABSENT)
            equal = theirs is not ABSENT and theirs == value
            if not equal:
                return False
        return True

    def __repr__(self) -> str:
        try:
            state = f"{len(self)} entries, {len(self._env.buffer)} pending writes"
        except ClosedError:
            state = "closed"
        return f"<{type(self).__name__} {self._db_path!r}, {state}>"

    # Key ranges

    def __iter__(self) -> Iterator[_K]:
        """Iterate over the keys in order. See `items`."""
        return iter(self.keys())

    def __reversed__(self) -> Iterator[_K]:
        """Iterate over the keys from the last to the first. See `items`."""
        return reversed(self.keys())

    def keys(
        self,
        prefix: _K | None = None,
        *,
        start: _K | None = None,
        stop: _K | None = None,
    ) -> StoreKeysView[_K]:
        """Return a view of the keys, or of a range of them. See `items`.

        It has the set operations of ``dict.keys()``. Nothing is unpickled.
        """
        return StoreKeysView(self, prefix=prefix, start=start, stop=stop)

    def values(
        self,
        prefix: _K | None = None,
        *,
        start: _K | None = None,
        stop: _K | None = None,
    ) -> StoreValuesView[_V]:
        """Return a view of the values, or of those of a key range. See `items`."""
        return StoreValuesView(self, prefix=prefix, start=start, stop=stop)

    def items(
        self,
        prefix: _K | None = None,
        *,
        start: _K | None = None,
        stop: _K | None = None,
    ) -> StoreItemsView[_K, _V]:
        """Return a view of keys and values, or of those of a key range.

        Keys are in the order of their bytes, and come out as they would be put
        in: as str where the store has a `key_encoding` and the bytes are a text
        that encodes (and normalizes) to them again, else as bytes.

        The view shows the store as it is whenever it is used. A loop over it
        (flushes once at its start, with `autoflush_on_read`, and) reads a chunk
        at a time, at most a few thousand keys or about 2 MiB of values (or one
        larger value), each as of one moment, and holds nothing in between: whatever
        is written meanwhile, in the loop's body too, it yields every entry that is
        there throughout once. A value that can't be unpickled raises; asked for the
        next one, the iterator goes on. After any other error it has ended.

        Parameters
        ----------
        prefix : optional
            Only keys whose bytes begin with those of `prefix`.
        start, stop : optional
            Only keys from `start` on, and only those before `stop`; none if `start`
            is not before `stop`. Bounds are of the types of keys, but of any length,
            and compared as encoded bytes.

        Raises
        ------
        TypeError
            A bound that is no key.
        ClosedError
            The store is closed, or is closed during the loop.
        """
        return StoreItemsView(self, prefix=prefix, start=start, stop=stop)

    # Writes

    def put(self, key: _K, obj: _V) -> None:
        """Store `obj` under `key`.

        It is pickled at once, so later changes of `obj` are not stored, and
        written with the next flush. If this put makes a batch full and the flush
        fails, the put is refused: it raises and changes nothing.

        Raises
        ------
        TypeError, SizeError
            A bad key, or a value of 4 GiB or more.
        GrowthError
            The map is at `max_map_size` or can't grow, or the value alone can
            never fit below `max_map_size`.
        DiskError, lmdb.Error
            The flush failed.
        ReadOnlyError, ClosedError
            The store can't be written to.
        Exception
            Whatever pickling `obj` raises.
        """
        encoded: Any = key
        if type(encoded) is not bytes or not 0 < len(encoded) <= self._max_key:
            encoded = self._codec.encode(encoded)
        env = self._env
        try:
            raw = dumps(obj, HIGHEST_PROTOCOL)
        except Exception as error:
            _note_key(error, encoded)
            raise
        size = len(raw)
        if size > env.max_value:
            self._refuse_value(encoded, size)
        size += len(encoded)
        count = len(env.buffer)
        with env.buffer_lock:
            # No call in here: a signal handler that comes now could flush, and
            # wait for a thread that waits for this lock; or close the store.
            total = env.buffer_bytes + size
            if count < self._room and total < self._batch_bytes and env.may_buffer:
                env.buffer[encoded] = raw
                env.buffer_bytes = total
                return
        env.write(encoded, raw, self._batch_size, self._batch_bytes)

    __setitem__ = put

    def put_many(self, items: SupportsItems[_K, _V] | Iterable[tuple[_K, _V]]) -> None:
        """Store many values in one transaction: all of them, or none.

        Pending writes are flushed first. `items` is run and pickled before any
        lock is taken; the pickled values are all in memory then. (`update` needs
        little memory, but is not atomic.) The last one of a duplicate key wins.

        Raises
        ------
        See `put`. Nothing of `items` has been written then.
        """
        batch: dict[bytes, bytes | None] = {}
        encode = self._codec.encode
        longest = self._max_key
        most = self._env.max_value
        pairs = items.items() if hasattr(items, "items") else items
        for item in pairs:
            try:
                key, obj = item
            except (TypeError, ValueError):
                raise TypeError(
                    f"put_many() takes a mapping or pairs of key and value, not "
                    f"{type(item).__name__}"
                ) from None
            if type(key) is not bytes or not 0 < len(key) <= longest:
                key = encode(key)
            try:
                batch[key] = raw = dumps(obj, HIGHEST_PROTOCOL)
            except Exception as error:
                _note_key(error, key)
                raise
            if len(raw) > most:
                self._refuse_value(key, len(raw))
        self._env.write_many(batch)

    def delete(self, key: _K) -> None:
        """Delete what is stored under `key`, if anything. Buffered, like `put`."""
        encoded = self._codec.encode(key)
        self._env.write(encoded, None, self._batch_size, self._batch_bytes)

    def __delitem__(self, key: _K) -> None:
        """Delete what is stored under `key`; KeyError if there is nothing.

        Looking and deleting are one step for all threads of this process.
        """
        if not self._exchange(self._codec.encode(key), ABSENT, None):
            raise self._key_error(key)

    def delete_many(self, keys: Iterable[_K]) -> int:
        """Delete many keys in one transaction; return how many existed.

        Pending writes are flushed first; what other threads put meanwhile stays.
        `keys` is run before any lock is taken. A range of this store, as in
        ``delete_many(store.keys(prefix="tmp:"))``, is deleted as it is at that
        moment, without collecting its keys.

        Parameters
        ----------
        keys : iterable
            Any iterable of keys; missing ones are fine.

        Raises
        ------
        TypeError, SizeError
            `keys` is a single str or bytes, or holds something that is no key.
        GrowthError, DiskError, lmdb.Error, ReadOnlyError, ClosedError
            As for `put`. Nothing has been deleted then.
        """
        env = self._env
        if isinstance(keys, StoreKeysView) and keys._store._env is env:
            return env.delete_range(keys._range)
        _refuse_single("delete_many", keys)
        return env.delete_many(set(map(self._codec.encode, keys)))

    def clear(self) -> None:
        """Delete everything, in one transaction, as `delete_many` does."""
        self._env.delete_range(ALL)

    # Reading and writing as one step for all threads of this process. A value is
    # unpickled without any lock; if somebody else changes it meanwhile, that is
    # done again. One that can't be unpickled stays.

    @overload
    def pop(self, key: _K) -> _V: ...
    @overload
    def pop(self, key: _K, default: _V | _T) -> _V | _T: ...
    def pop(self, key: Any, default: Any = ABSENT) -> Any:
        """Delete `key` and return its value, or `default`; else KeyError.

        One step for all threads of this process.

        Raises
        ------
        See `get` and `put`. Nothing has been deleted then.
        """
        encoded = self._codec.encode(key)
        env = self._env
        env.check_writable()
        while True:
            raw, buffered = env.look_up(encoded)
            if raw is None:
                if default is ABSENT:
                    raise self._key_error(key)
                return default
            value = env.unpickle(encoded, raw, buffered)
            if self._exchange(encoded, raw, None):
                return value

    def popitem(self) -> tuple[_K, _V]:
        """Delete the last entry and return its key and value, or raise KeyError.

        One step for all threads of this process. (Where others put later keys all
        the time, the entry may have been the last one a moment ago.)

        Raises
        ------
        See `get` and `put`. Nothing has been deleted then.
        """
        env = self._env
        env.check_writable()
        attempts = 0
        while (key := env.last_key()) is not None:
            attempts += 1
            raw, buffered = env.look_up(key)
            if raw is None:
                continue  # another thread was faster
            value = env.unpickle(key, raw, buffered)
            if (
                env.as_writer(env.remove_last, key, raw, self._limits())
                if attempts < _ATTEMPTS
                else self._exchange(key, raw, None)
            ):
                name: Any = self._codec.name(key)
                return name, value
        raise KeyError("popitem(): the store is empty")

    @overload
    def setdefault(
        self: LmdbObjectStore[_K, _T | None], key: _K, default: None = None
    ) -> _T | None: ...
    @overload
    def setdefault(self, key: _K, default: _V) -> _V: ...
    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`; where there is none, store `default` first.

        One step for all threads of this process. What is returned then is
        `default` itself, whose later changes are not stored.

        Raises
        ------
        See `get` and `put`.
        """
        encoded = self._codec.encode(key)
        env = self._env
        env.check_writable()
        new = None
        while True:
            raw, buffered = env.look_up(encoded)
            if raw is not None:
                return env.unpickle(encoded, raw, buffered)
            new = new or self._pickled(encoded, default)
            if self._exchange(encoded, None, new):
                return default

    def update(
        self,
        other: SupportsItems[_K, _V]
        | SupportsKeysAndGetItem[_K, _V]
        | Iterable[tuple[_K, _V]] = (),
        /,
        **more: _V,
    ) -> None:
        """Store what a mapping, or pairs, and keyword arguments hold.

        One `put` after the other: through the buffer, with bounded memory, and not
        atomic. `put_many` is.

        Raises
        ------
        See `put`. What came before has been stored then.
        """
        for key in more:
            self._codec.encode(key)
        pairs: Any = other
        if isinstance(other, LmdbObjectStore):
            pairs = other.items()  # in one pass
        super().update(pairs, **more)

    def __ior__(self, other: SupportsItems[_K, _V] | Iterable[tuple[_K, _V]]) -> Self:
        """Do `update`."""
        self.update(other)
        return self

    # Flush and close

    def flush(self) -> None:
        """Write everything that is pending to the database, in one transaction.

        Durable when it returns, unless the store was opened with ``sync=False``,
        ``metasync=False`` or ``map_async=True``. If it raises, everything is
        still pending, and the next flush can succeed. (Where the map is at
        `max_map_size`, deletions are committed first, by themselves.)

        Raises
        ------
        GrowthError, DiskError, lmdb.Error, ReadOnlyError, ClosedError
            As for `put`.
        """
        self._env.flush()

    def close(self, *, strict: bool = False) -> None:
        """Flush, wait for reads in the database to end, sync and close.

        Closing again does nothing. A value that another thread is unpickling
        at this moment is unpickled to its end.

        Parameters
        ----------
        strict : bool
            Raise what the final flush failed with, after everything is closed,
            instead of logging it only.

        Raises
        ------
        LostWritesError
            A RuntimeError, with `strict`; `write_buffer` still holds what was lost.
        BusyError
            Called while the same thread is inside another operation.
        """
        error = self._env.close()
        if error is not None and strict:
            raise LostWritesError("Final flush failed during close()") from error

    @property
    def closed(self) -> bool:
        """Whether the store is closed."""
        return self._env.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; raise what that fails with unless the block itself raises."""
        try:
            self.close(strict=exc_type is None)
        except Exception:
            if exc_type is None:
                raise
            log.error("Could not close %s", self._db_path, exc_info=True)

    # Attributes

    @property
    def db_path(self) -> str:
        """The path of the environment, absolute."""
        return self._db_path

    @property
    def key_encoding(self) -> str | None:
        """The codec of str keys, or None."""
        return self._codec.encoding

    @property
    def key_errors(self) -> str:
        """The error handler of that codec."""
        return self._codec.errors

    @property
    def str_normalize(self) -> str | None:
        """The normal form of str keys, or None."""
        return self._codec.normalize

    @property
    def env(self) -> lmdb.Environment:
        """The environment, for what the store does not wrap.

        It may be replaced by another object after an I/O error. Transactions of
        your own must end before the map grows: growing invalidates them.
        """
        return self._env.env

    @property
    def write_buffer(self) -> Mapping[bytes, bytes | None]:
        """A copy of the pending writes: pickled values, None for a deletion.

        After a failed close, what was lost.
        """
        return MappingProxyType(dict(self._env.lost or self._env.buffer))

    @property
    def batch_size(self) -> int:
        """Buffered operations that trigger a flush."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        _check_int("batch_size", value, 1)
        self._batch_size = value
        self._room = value - 1  # a put into a shorter buffer doesn't make it full

    @property
    def batch_bytes(self) -> int:
        """Bytes of buffered keys and pickled values that trigger a flush."""
        return self._batch_bytes

    @batch_bytes.setter
    def batch_bytes(self, value: int) -> None:
        _check_int("batch_bytes", value, 1)
        self._batch_bytes = value

    @property
    def max_map_size(self) -> int | None:
        """Bytes up to which the map may grow by itself, or None.

        A map that is larger already stays as it is.
        """
        return self._env.max_map_size

    @max_map_size.setter
    def max_map_size(self, value: int | None) -> None:
        if value is not None:
            _check_int("max_map_size", value, 1)
        self._env.set_cap(value)

    @property
    def growth_timeout(self) -> float:
        """Seconds for which growth and close wait for reads that don't end."""
        return self._env.growth_timeout

    @growth_timeout.setter
    def growth_timeout(self, value: float) -> None:
        _check_timeout(value)
        self._env.growth_timeout = value

    # Helpers

    def _exchange(self, key: bytes, expected: Any, raw: bytes | None) -> bool:
        env = self._env
        return env.as_writer(env.exchange, key, expected, raw, self._limits())

    def _limits(self) -> tuple[int, int]:
        return self._batch_size, self._batch_bytes

    def _pickled(self, key: bytes, obj: object) -> bytes:
        # put and put_many do the same without a call, which costs 4 %.
        try:
            raw = dumps(obj, HIGHEST_PROTOCOL)
        except Exception as error:
            _note_key(error, key)
            raise
        if len(raw) > self._env.max_value:
            self._refuse_value(key, len(raw))
        return raw

    def _refuse_value(self, key: bytes, size: int) -> None:
        cap = self._env.max_map_size
        if cap is not None and size <= MAX_VALUE:
            raise GrowthError(
                f"The value of {describe(key)} takes {size} bytes and can never fit "
                f"below max_map_size ({cap} bytes)."
            )
        raise SizeError(
            f"The value of {describe(key)} takes {size} bytes; LMDB stores values "
            "below 4 GiB. Store it in pieces."
        )

    def _key_error(self, key: Any) -> KeyError:
        shown = key if isinstance(key, str) else self._codec.encode(key)
        return KeyError(f"Key not found: {describe(shown)}")


def _refuse_single(method: str, keys: object) -> None:
    if isinstance(keys, (str, bytes, bytearray, memoryview)):
        raise TypeError(
            f"{method}() takes an iterable of keys, not a single "
            f"{type(keys).__name__}; put the key in a list."
        )


def _note_key(error: Exception, key: bytes) -> None:
    # What add_note() does, which 3.10 doesn't have.
    notes: list[str] = getattr(error, "__notes__", [])
    vars(error)["__notes__"] = [*notes, f"while pickling the value of {describe(key)}"]


def _check_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")


def _check_timeout(value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"growth_timeout must be a number, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"growth_timeout must not be negative or NaN, not {value}")
