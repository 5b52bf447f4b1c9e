"""`LmdbObjectStore`: options, keys, values, and the interface."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from pickle import dumps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

import lmdb

from ._buffer import ABSENT
from ._diagnosis import data_path
from ._environment import StandIn
from ._files import LmdbOptions, identity_of
from ._keys import ALL, codec_of
from ._mapping import _K, _T, _V, Snapshot, StoreMapping, refuse_single
from ._reads import ANYTHING, last_key, look_up
from ._registry import Handle, Opening, registry
from ._scope import manager
from ._shared import SharedStore
from ._snapshot import SnapshotScope, SnapshotSource
from ._transaction import BlockScope, TransactionBlock
from ._values import Values, is_immutable
from ._views import NOT_GIVEN, StoreKeysView
from ._writer import log
from .exceptions import BusyError, ClosedError, LostWritesError, ReadOnlyError
from .serializers import PICKLE

if TYPE_CHECKING:
    from _typeshed import SupportsItems, SupportsKeysAndGetItem
    from typing_extensions import Self, Unpack

    from ._child import Progress
    from ._info import StoreInfo
    from .keys import KeyEncoding
    from .serializers import AnySerializer

    _Pairs = SupportsItems[_K, _V] | Iterable[tuple[_K, _V]]

    class _Options(LmdbOptions, total=False):
        """The options that say nothing of keys and values."""

        autoflush_on_read: bool
        key_errors: str
        str_normalize: str | None
        batch_bytes: int
        max_map_size: int | None
        timeout: float
        flush_interval: float | None

else:
    Unpack = dict  # for typing.get_type_hints

_State = tuple[dict[str, Any], "int | None", float, "float | None"]
_TIMEOUT = 60.0
_FLUSH_INTERVAL = 1.0
_ALIASES = {"flag": "readonly=True", "writeback": "edit()"}  # of shelve.open
_ATTEMPTS = 100  # of popitem at an entry that is the last one all the time


class _Closed(StandIn):
    """In place of the shared store, and of its pending writes, once it is closed."""

    accepts = False
    block = None
    closed = True
    entries: Mapping[bytes, bytes | None] = MappingProxyType({})
    current_block = staticmethod(bool)

    @property
    def pending(self) -> _Closed:
        return self


class LmdbObjectStore(StoreMapping[_K, _V], MutableMapping[_K, _V]):
    """A thread-safe, dict-like store of Python objects in one LMDB file.

    Values are pickled, unless `serializer` says otherwise. Unpickling can run any code:
    give a store of a file that others can write to a `serializer` that is safe.

    Writes are buffered and reach the disk in one transaction when `batch_size` or
    `batch_bytes` is reached, after `flush_interval` seconds, at `flush`, at `close`,
    and before reads that have to go to the database (`autoflush_on_read`). Reads always
    see the writes of this process. The map grows by itself.

    Any number of threads may use one store, and so may code that runs inside its
    operations: pickling hooks, finalizers, signal handlers. All stores that a process
    opens on one file share one environment and the pending writes. Other processes may
    open the file, too. A child made by fork may use an inherited store, without the
    parent's pending writes. A store can be pickled.

    Parameters
    ----------
    db_path : str or os.PathLike
        As for `lmdb.open`: a directory, or a file with ``subdir=False``.
    batch_size : int
        Buffered operations (puts and deletions) that trigger a flush, >= 1. While
        another thread writes, up to twice as many are buffered; but with 1 each write
        has been flushed when its call returns.
    autoflush_on_read : bool
        Flush before reads that must go to the database. Can be set later.
    key_encoding : str or KeyEncoding, optional
        A codec such as ``"utf-8"``, which allows str keys. Or an object with
        ``encode(key)`` and ``decode(bytes)``, such as `keys.TupleKeys`, for keys of
        other types. Without it keys are bytes, bytearray or memoryview.
    key_errors : str
        The codec's error handler. ``"ignore"`` and ``"replace"`` can make one
        key of different ones; ``"surrogateescape"`` round-trips any bytes.
    str_normalize : {"NFC", "NFD", "NFKC", "NFKD"}, optional
        The normal form that str keys are brought to before they are encoded.
    batch_bytes : int
        Bytes of buffered keys and values that trigger a flush, >= 1.
    max_map_size : int, optional
        Bytes up to which the map may grow by itself; None sets no limit, or leaves
        that of the stores that have the file open.
    timeout : float
        Seconds until a call that waits raises: growth for open snapshots; growth and
        close for reads that don't end; reads and opening for a free reader slot;
        opening for the end of a close in this process; writes for another thread's
        transaction block. A wait of more than a second is logged. LMDB's own lock,
        which a writer in another process holds, is waited for without a limit.
    flush_interval : float, optional
        Seconds, > 0, after which pending writes are flushed by a thread in the
        background; None leaves that to the other occasions. A process that is killed
        loses no older write, and other processes see all others. A flush that fails
        there is logged, and tried again after pauses that double up to about a minute.
    serializer : object
        How values become bytes: an object or a module with ``dumps(obj)`` and
        ``loads(bytes)``. `serializers` has some. It is called by any thread, without a
        lock. It is an option of the store, not of the file.
    **lmdb_kwargs
        Everything else that `lmdb.open` takes: ``map_size``, ``subdir``,
        ``readonly``, ``lock``, ``sync``, ``writemap``, ``lib_version``, ...
        Refused are ``max_spare_txns`` other than 0, which breaks fork,
        ``lock=False`` without ``readonly``, and ``writemap=True`` with the LMDB
        1.0 engine, which aborts the process.

    Raises
    ------
    TypeError, ValueError
        An option that is unknown, out of its range, or not the one that another
        store of this process has opened the file with.
    ReadersFullError
        No reader slot became free within `timeout` seconds.
    BusyError
        A close of the same file in this process does not end, or this process was
        forked in the middle of an operation that did not end.
    WrongFileError, CorruptedError
        The file is of another kind, or is damaged.
    lmdb.Error
        The environment can't be opened.
    """

    autoflush_on_read: bool

    @overload
    def __init__(
        self: LmdbObjectStore[bytes, _V],
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        key_encoding: None = None,
        serializer: AnySerializer[_V] = PICKLE,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: LmdbObjectStore[str, _V],
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        key_encoding: str,
        serializer: AnySerializer[_V] = PICKLE,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self,
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        key_encoding: KeyEncoding[_K],
        serializer: AnySerializer[_V] = PICKLE,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self,
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        key_encoding: str | None,
        serializer: AnySerializer[_V] = PICKLE,
        **options: Unpack[_Options],
    ) -> None: ...
    def __init__(
        self,
        db_path: str | os.PathLike[str],
        batch_size: int = 1000,
        *,
        autoflush_on_read: bool = True,
        key_encoding: Any = None,
        key_errors: str = "strict",
        str_normalize: str | None = None,
        batch_bytes: int = 64 * 2**20,
        max_map_size: int | None = None,
        timeout: float = _TIMEOUT,
        flush_interval: float | None = _FLUSH_INTERVAL,
        serializer: Any = PICKLE,
        **lmdb_kwargs: Any,
    ) -> None:
        options = lmdb_kwargs
        self._readonly = bool(options.get("readonly"))
        self._batch_size = self._batch_bytes = 1
        self.batch_size = batch_size
        self.batch_bytes = batch_bytes
        self.autoflush_on_read = bool(autoflush_on_read)
        codec = codec_of(key_encoding, key_errors, str_normalize)
        values = Values(serializer, codec)
        path = _checked_path(db_path)
        _check_names(options)
        map_size = options.get("map_size", 0)
        _check_int("map_size", map_size, 0)
        if map_size > sys.maxsize:
            raise ValueError(f"map_size: {map_size} bytes exceed the address space")
        if max_map_size is not None:
            _check_int("max_map_size", max_map_size, map_size or 1)
        _check_timeout(timeout)
        _check_interval(flush_interval)
        if not options.get("lock", True) and not options.get("readonly"):
            raise ValueError(
                "lock=False needs readonly=True: without its locks LMDB writes over "
                "what is being read."
            )
        if options.get("max_spare_txns"):
            raise ValueError(
                "max_spare_txns must be 0: cached transactions don't survive a fork."
            )
        super().__init__(path, values)
        self._options = options
        self._open(max_map_size, timeout, flush_interval, True)

    def _open(
        self,
        cap: int | None,
        timeout: float,
        flush_interval: float | None,
        explicit: bool,
    ) -> None:
        """Use the file's environment, and open it if no store of this process has.

        An `explicit` opening has to be closed, and sets options of the environment.
        """
        path, options = self._path, self._options
        self._handle = Handle()
        make = partial(SharedStore, path, options, cap, timeout, flush_interval)
        file = data_path(path, options)
        opening = Opening(file, make, self._handle, explicit, options, timeout)
        self._shared: SharedStore = registry.share(opening)
        shared = self._shared
        self._pending = shared.pending
        self._codec.max_size = self._max_key = shared.environment.max_key
        shared.raise_floor(options.get("map_size", 0))
        # A default asks for nothing.
        if explicit and cap is not None:
            shared.max_map_size = cap
        if explicit and timeout != _TIMEOUT:
            shared.timeout = timeout
        if explicit and flush_interval != _FLUSH_INTERVAL:
            shared.timed.interval = flush_interval

    def __getstate__(self) -> _State:
        """Flush, and return the path and the options. Raises as `flush` does."""
        self._check_open()
        if not self._shared.readonly:
            self._source().flush()
        state = {**vars(self), "_options": {**self._options, "create": False}}
        del state["_shared"], state["_pending"], state["_handle"]
        return state, self.max_map_size, self.timeout, self.flush_interval

    def __setstate__(self, state: _State) -> None:
        """Open or share the same file; ClosedError if there is none."""
        attributes, max_map_size, timeout, flush_interval = state
        vars(self).update(attributes)
        file = data_path(self._path, self._options)
        if identity_of(file) is None:
            raise ClosedError(
                f"The store at {self._path!r} can't be opened here: there is no {file}."
            )
        self._open(max_map_size, timeout, flush_interval, False)

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
        LoadError
            A RuntimeError: the serializer can't load the stored value.
        """
        if type(key) is not bytes or not 0 < len(key) <= self._max_key:
            key = self._codec.encode(key)
        source: Any = self._shared
        pending = self._pending
        if pending.block is not None:
            source = source.current_block() or source
            pending = source.pending
        entries = pending.entries
        if entries:
            raw = entries.get(key, ABSENT)
            if raw is None:
                return default
            if raw is not ABSENT:
                return self._values.load_copy(source.gate, key, raw)
            if self.autoflush_on_read:
                source.flush_for_read()
        return source.read(key, default, self._values)

    def exists(self, key: _K, *, flush: bool | None = None) -> bool:
        """Return whether there is a value under `key`; no value is loaded.

        ``flush=True`` flushes first, and raises if the flush fails; False never
        flushes; None follows `autoflush_on_read`.
        """
        encoded = self._codec.encode(key)
        source = self._source()
        if flush and not self._readonly:
            source.flush()
        pending = source.pending.entries.get(encoded, ABSENT)
        if pending is not ABSENT:
            return pending is not None
        if flush is None and source.pending.entries and self.autoflush_on_read:
            source.flush_for_read()
        return source.holds(encoded)

    def __contains__(self, key: Any) -> bool:
        """Return whether there is a value under `key`. Never flushes.

        False for all that can't be a key. TypeError: a str without `key_encoding`.
        """
        if type(key) is not bytes or not 0 < len(key) <= self._max_key:
            try:
                key = self._codec.encode(key)
            except (TypeError, ValueError):
                self._codec.find(key)  # raises for a str without `key_encoding`
                self._check_open()
                return False
        source: Any = self._shared
        pending = self._pending
        if pending.block is not None:
            source = source.current_block() or source
            pending = source.pending
        entries = pending.entries
        if entries:
            raw = entries.get(key, ABSENT)
            if raw is not ABSENT:
                return raw is not None
        found: bool = source.holds(key)
        return found

    def __bool__(self) -> bool:
        """Return whether there is any entry. Never flushes."""
        return last_key(self._source()) is not None

    def __repr__(self) -> str:
        try:
            state = f"{len(self)} entries, {len(self._pending.entries)} pending writes"
        except ClosedError:
            state = "closed"
        except BusyError:
            state = "in the midst of something"
        return f"<{type(self).__name__} {self._path!r}, {state}>"

    # Writes

    def put(self, key: _K, obj: _V) -> None:
        """Store `obj` under `key`: serialize it at once, write it with the next flush.

        Later changes of `obj` are not stored. If this put makes a batch full and the
        flush fails, the put is refused: it raises and changes nothing.

        Raises
        ------
        TypeError, SizeError
            A bad key, or a value of 4 GiB or more.
        GrowthError
            The map is at `max_map_size` or can't grow, or can never hold the value.
        DiskError, ReadOnlyError, ClosedError, lmdb.Error
            The flush failed, or the store can't be written to.
        BusyError
            Another thread's transaction block has not ended for `timeout` seconds.
        Exception
            The error of the serializer, with a note that names the key.
        """
        encoded: Any = key
        size = len(encoded) if type(encoded) is bytes else 0
        if not 0 < size <= self._max_key:
            encoded = self._codec.encode(encoded)
            size = len(encoded)
        pending = self._pending
        values = self._values
        try:
            raw = dumps(obj, 5) if values.by_pickle else values.dumps_for(encoded, obj)
        except Exception as error:
            values.note_key(error, encoded)
            raise
        value_size = len(raw)
        if value_size > pending.max_value:
            raise values.size_error(encoded, value_size, self.max_map_size)
        size += value_size
        count = len(pending.entries)
        # From here to the return there is no call, and no jump that is taken: one step
        # for other threads, signal handlers and finalizers. See `WriteBuffer`.
        if pending.accepts and count < self._room:
            total = pending.size + size
            if total < self._batch_bytes:
                pending.entries[encoded] = raw
                pending.size = total
                return
        self._target().write(encoded, raw, self._limits)

    __setitem__ = put

    def put_many(self, items: _Pairs[_K, _V]) -> None:
        """Store many values in one transaction: all of them, or none.

        Pending writes are flushed first. `items` is run and serialized before any
        lock is taken; the serialized values are all in memory then. (`update` needs
        little memory, but is not atomic.) The last one of a duplicate key wins.
        Raises as `put` does; nothing of `items` has been written then.
        """
        batch: dict[bytes, bytes | None] = {}
        encode = self._codec.encode
        longest = self._max_key
        most = self._pending.max_value
        values = self._values
        by_pickle, dumps_for = values.by_pickle, values.dumps_for
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
                batch[key] = raw = dumps(obj, 5) if by_pickle else dumps_for(key, obj)
            except Exception as error:
                values.note_key(error, key)
                raise
            if len(raw) > most:
                raise values.size_error(key, len(raw), self.max_map_size)
        self._target().write_many(batch)

    def delete(self, key: _K) -> None:
        """Delete the value of `key`, if there is one. Buffered, like `put`."""
        encoded: Any = key
        size = len(encoded) if type(encoded) is bytes else 0
        if not 0 < size <= self._max_key:
            encoded = self._codec.encode(encoded)
            size = len(encoded)
        pending = self._pending
        count = len(pending.entries)
        # As in `put`.
        if pending.accepts and count < self._room:
            total = pending.size + size
            if total < self._batch_bytes:
                pending.entries[encoded] = None
                pending.size = total
                return
        self._target().write(encoded, None, self._limits)

    def __delitem__(self, key: _K) -> None:
        """Delete the value of `key`; KeyError if there is none. One step, as `pop`."""
        if not self._compare_and_set(self._codec.encode(key), ANYTHING, None):
            raise self._key_error(key)

    def delete_many(self, keys: Iterable[_K]) -> int:
        """Delete many keys in one transaction; return how many existed.

        Pending writes are flushed first; puts of other threads meanwhile stay. `keys`
        may be any iterable; it is run before any lock is taken. Missing keys are fine.
        A range of this store, as in ``delete_many(store.keys(prefix="tmp:"))``, is
        deleted as it is at that moment, without collecting its keys.

        If it raises, as `put` does or as `keys` is a single key, nothing has been
        deleted.
        """
        target = self._target()
        if isinstance(keys, StoreKeysView) and keys.is_of(self._shared.gate):
            return target.delete_range(keys.range)
        refuse_single("delete_many", keys, self._codec)
        return target.delete_many(set(self._encoded(keys)))

    def clear(self) -> None:
        """Delete everything, in one transaction, as `delete_many` does."""
        self._target().delete_range(ALL)

    # Reading and writing as one step for all threads of this process. A value is
    # loaded without any lock, and again if another thread changes it meanwhile. A value
    # that can't be loaded stays.

    @overload
    def pop(self, key: _K) -> _V: ...
    @overload
    def pop(self, key: _K, default: _V | _T) -> _V | _T: ...
    def pop(self, key: Any, default: Any = NOT_GIVEN) -> Any:
        """Delete `key` and return its value, or `default`; else KeyError.

        One step for all threads of this process. If it raises, as `get` or `put`
        does, nothing has been deleted.
        """
        encoded = self._codec.encode(key)
        target = self._target()
        target.check_open()
        while True:
            raw, buffered = look_up(target, encoded)
            if raw is None:
                if default is NOT_GIVEN:
                    raise self._key_error(key)
                return default
            value = self._values.load_copy(target.gate, encoded, raw, buffered)
            if target.compare_and_set(encoded, raw, None, self._limits):
                return value

    def popitem(self) -> tuple[_K, _V]:
        """Delete the last entry and return its key and value, or raise KeyError.

        One step, as `pop`. (Where others put later keys all the time, the entry may
        have been the last one a moment ago.)
        """
        target = self._target()
        target.check_open()
        attempts = 0
        while (key := last_key(target)) is not None:
            attempts += 1
            raw, buffered = look_up(target, key)
            if raw is None:
                continue  # another thread was faster
            value = self._values.load_copy(target.gate, key, raw, buffered)
            name: Any = self._codec.name(key)
            if attempts < _ATTEMPTS:
                deleted = target.compare_and_delete_last(key, raw, self._limits)
            else:
                deleted = self._compare_and_set(key, raw, None)
            if deleted:
                return name, value
        raise KeyError("popitem(): the store is empty")

    @overload
    def setdefault(
        self: LmdbObjectStore[_K, _T | None], key: _K, default: None = None
    ) -> _T | None: ...
    @overload
    def setdefault(self, key: _K, default: _V) -> _V: ...
    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`; where there is none, store and return `default`.

        One step, as `pop`. Later changes of `default` are not stored.
        """
        encoded = self._codec.encode(key)
        target = self._target()
        target.check_open()
        new = None
        while True:
            raw, buffered = look_up(target, encoded)
            if raw is not None:
                return self._values.load_copy(target.gate, encoded, raw, buffered)
            new = self._dumped(encoded, default) if new is None else new
            if self._compare_and_set(encoded, None, new):
                return default

    def update(
        self, other: _Pairs[_K, _V] | SupportsKeysAndGetItem[_K, _V] = (), /, **more: _V
    ) -> None:
        """Store the values of a mapping, or of pairs, and of keyword arguments.

        One `put` after the other: through the buffer, with bounded memory, and not
        atomic. If it raises, the values before have been stored.
        """
        for key in more:
            self._codec.encode(key)
        pairs: Any = other.items() if isinstance(other, StoreMapping) else other
        super().update(pairs, **more)

    def __ior__(self, other: _Pairs[_K, _V]) -> Self:
        self.update(other)
        return self

    # Several things at once

    def transaction(self) -> AbstractContextManager[Self, None]:
        """Return a context manager: all of its block is done, or nothing.

        It yields the store. All reads and writes of the block through the store belong
        to one LMDB transaction: no other thread or process writes meanwhile, and none
        sees a change before the end. Leaving the block normally commits all changes,
        durably; an exception undoes them and goes on. Writes pending before are
        flushed first and stay.

        A block begins, runs and ends in one thread and one asyncio task. Other threads
        read the state before, and wait if they write. Blocks nest: an inner one joins
        the outer, and an exception that the outer block catches undoes the inner only.
        Iterators that begin inside end with the block.

        The changes are held in memory until the end. If the map is too full for them,
        the map grows then, for which LMDB has to let other processes write.

        Raises
        ------
        GrowthError, DiskError, lmdb.Error, ReadOnlyError, ClosedError
            At the beginning and at the end, as for `flush`. Nothing of the block is
            written if its end raises.
        ConflictError
            At the end: another process has written while the map had to grow. Run the
            block again.
        BusyError
            Called inside another operation, or by another task of the thread. At the
            end: a nested block, of a suspended generator, has not ended.
        ClosedError
            Inside and at the end: the block has been ended from elsewhere, as by
            another thread that closes the generator around it.
        """
        return self._block(lambda: self)

    @overload
    def edit(self, key: _K) -> AbstractContextManager[_V, None]: ...
    @overload
    def edit(self, key: _K, default: _V) -> AbstractContextManager[_V, None]: ...
    def edit(self, key: Any, default: Any = NOT_GIVEN) -> Any:
        """Return a context manager: change a stored object in place.

        It yields the value of `key`, or a copy of `default`, and stores the object when
        the block ends normally. The block is a `transaction`.

        Raises
        ------
        KeyError
            There is no value, and no `default`.
        TypeError
            The value is of a type that can't be changed in place: a number, a str,
            a tuple, None, a frozen dataclass.
        Exception
            As for `get`, `put` and `transaction`. Nothing has changed then.
        """
        encoded: Any = self._codec.encode(key)
        self._target()
        new = None if default is NOT_GIVEN else self._dumped(encoded, default)

        def begin() -> Any:
            source = self._source()
            raw, buffered = look_up(source, encoded)
            if raw is None:
                raw, buffered = new, True
            if raw is None:
                raise self._key_error(key)
            value = self._values.load_copy(source.gate, encoded, raw, buffered)
            if is_immutable(value):
                name = self._codec.describe(encoded)
                raise TypeError(
                    f"The value of {name} can't be changed in place: it is of type "
                    f"{type(value).__name__}. Use transaction(), and store a new value "
                    "in its block."
                )
            return value

        return self._block(begin, lambda value: self.put(encoded, value))

    def snapshot(self) -> AbstractContextManager[Snapshot[_K, _V], None]:
        """Return a context manager: the store as it is now, whatever comes.

        It yields a read-only mapping, which is closed at the end of the block.
        Pending writes are flushed first, and so belong to the snapshot. Any number of
        snapshots can be open at once, in any thread.

        While one is open the map can't grow. A write that needs growth waits for at
        most `timeout` seconds, then raises `SnapshotOpenError`; in a thread that has
        opened a snapshot it raises at once. So does even a read of the store, if
        another process has made the map larger. LMDB can't reuse the pages that a
        snapshot shows, so the file grows with the writes meanwhile.

        Raises
        ------
        GrowthError, DiskError, lmdb.Error, ClosedError
            As for `flush`.
        ValueError
            The store was opened with ``lock=False``.
        BusyError
            Called inside a transaction block, whose changes no snapshot can have.
        """
        self._check_open()
        shared = self._shared
        source = SnapshotSource(shared.environment, self)

        def begin() -> Snapshot[_K, _V]:
            shared.open_snapshot(source)
            return Snapshot(self._path, self._values, source)

        return manager(SnapshotScope(source, begin))

    # The file

    def info(self) -> StoreInfo:
        """Return how large and how full the store is, and its readers. Never flushes.

        Costs a few calls of the system, a look-up for each pending write, and reading
        the list of free pages: 2 MB for each GiB that is free inside the file. Clears
        the reader slots of killed processes. Inside a `transaction` the entries are
        those of the block, and all else is that of the last commit.

        Raises
        ------
        ClosedError, CorruptedError, lmdb.Error
            The store is closed, or the file can't be read.
        """
        from ._info import info_of  # as in `copy_to`

        entries, pending = len(self), self._source().pending.entries
        shared = self._shared
        environment = shared.environment
        return info_of(environment, entries, len(pending), shared.max_map_size)

    def copy_to(
        self,
        path: str | os.PathLike[str],
        *,
        compact: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Copy the store to a new place, as it is at one moment of this call.

        Pending writes are flushed first, and so belong to the copy. Other threads and
        processes may read and write meanwhile, and growth does not wait. As LMDB can't
        reuse the pages of that moment, the file grows with the writes. The copy is made
        under a temporary name, and is on disk when it gets its final name. If this
        process is killed, at most a file that ends with ``.part`` remains. With
        ``lock=False`` no process may write meanwhile.

        A child process reads the file, without memory that grows with the store. It
        needs a reader slot, and the Python interpreter of this process or that of
        `multiprocessing.set_executable`.

        Parameters
        ----------
        path : str or os.PathLike
            A directory, which is made, or a file if the store was opened with
            ``subdir=False``. Nothing that is there is overwritten.
        compact : bool
            Leave out free pages, and write all others in the order of keys. That takes
            longer and makes a smaller file.
        progress : callable, optional
            Called now and then as ``progress(done, total)``, in bytes. If the call
            raises, there is no copy.

        Raises
        ------
        FileExistsError
            There is a store already, or a directory with other files.
        GrowthError, DiskError, ReadersFullError, lmdb.Error, ClosedError
            As for `flush`, and for opening the file. DiskError or OSError also if the
            copy can't be written.
        ReplacedError
            The data file was deleted or replaced.
        CorruptedError
            The file is damaged; see `maintenance.check`.
        BusyError
            Called inside a transaction block, whose changes no copy can have.
        RuntimeError
            The child process can't be started, or was killed.
        """
        from ._copying import copy  # takes long to import

        self._check_open()
        target = _checked_path(path)
        shared = self._shared
        shared.flush_for_copy()
        copy(shared.environment, target, compact, progress)

    # Flush and close

    def flush(self) -> None:
        """Write all pending writes to the database, in one transaction.

        Durable when it returns, unless the store was opened with ``sync=False``,
        ``metasync=False`` or ``map_async=True``. If it raises, as `put` does, all of
        them are still pending, and the next flush can succeed. (Where the map is at
        `max_map_size`, deletions are committed first, by themselves.) Does nothing for
        a store opened with ``readonly=True``.
        """
        if self._readonly:
            self._check_open()
        else:
            self._target().flush()

    def close(self, *, strict: bool = False) -> None:
        """Flush, wait for reads in the database to end, sync and close.

        While other stores of this process have the file open, the file stays open,
        with the writes that could not be flushed. Closing again does nothing. A value
        that another thread is loading at this moment is loaded to its end.

        Raises
        ------
        LostWritesError
            A RuntimeError, with `strict`, after everything is closed: the final flush
            failed. (Else that is only logged.) `write_buffer` holds the lost writes.
        BusyError
            Called while the same thread is inside another operation. Or a read, or
            another thread's transaction block, has not ended for `timeout` seconds.
        """
        shared = self._shared
        if shared.closed:
            return
        error = shared.leave(weakref.ref(self._handle), self)
        lost = shared.pending.lost
        if error is not None and not lost:
            lost = dict(shared.pending.entries)
        stand_in: Any = _Closed(
            self._closed_error,
            closed_error=self._closed_error,
            lost=lost,
            max_map_size=shared.max_map_size,
            max_value=shared.pending.max_value,
            timeout=shared.timeout,
            timed=shared.timed,
        )
        self._pending = self._shared = stand_in  # at once: no call in between
        shared.gate.stop_iterators(shared, self)
        if error is not None and strict:
            raise LostWritesError("Final flush failed during close()") from error

    @property
    def closed(self) -> bool:
        """Whether the store is closed."""
        return self._shared.closed

    def __enter__(self) -> Self:
        """Return the store; ClosedError if it is closed."""
        self._check_open()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Close; raise if that fails, or log if the block itself raises."""
        try:
            self.close(strict=exc_type is None)
        except Exception:
            if exc_type is None:
                raise
            log.error("Could not close %s", self._path, exc_info=True)

    # Attributes

    @property
    def db_path(self) -> str:
        """The path of the environment, absolute."""
        return self._path

    @property
    def key_encoding(self) -> str | KeyEncoding[_K] | None:
        """The codec of str keys, the object that encodes keys, or None."""
        encoding: str | KeyEncoding[_K] | None = self._codec.encoding
        return encoding

    @property
    def serializer(self) -> AnySerializer[_V]:
        """The serializer of the values."""
        serializer: AnySerializer[_V] = self._values.serializer
        return serializer

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
        """The environment, for calls that the store does not wrap.

        ClosedError once the store is closed. After an I/O error another object may
        take its place, and after an opening for writing. Your own transactions must
        end before the map grows, which invalidates them, and before a fork: in the
        child they would end for both. A call of yours in the moment of growth raises
        `lmdb.InvalidParameterError`. In a write transaction of your own call no
        method of the store: other threads flush, and would wait for its end.
        """
        env: lmdb.Environment = self._shared.environment.awake()
        return env

    @property
    def write_buffer(self) -> Mapping[bytes, bytes | None]:
        """A copy of the pending writes, or those a failed close lost; None deletes."""
        return MappingProxyType(dict(self._pending.lost or self._pending.entries))

    @property
    def batch_size(self) -> int:
        """Buffered operations that trigger a flush."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        _check_int("batch_size", value, 1)
        self._batch_size = value
        # A put into a shorter buffer doesn't make it full.
        self._room = -1 if self._readonly else value - 1
        self._limits = value, self._batch_bytes

    @property
    def batch_bytes(self) -> int:
        """Bytes of buffered keys and values that trigger a flush."""
        return self._batch_bytes

    @batch_bytes.setter
    def batch_bytes(self, value: int) -> None:
        _check_int("batch_bytes", value, 1)
        self._batch_bytes = value
        self._limits = self._batch_size, value

    @property
    def max_map_size(self) -> int | None:
        """Bytes up to which the map may grow by itself, or None; a larger map stays.

        A map begins with 1 GiB where no size was asked for: see the README.
        """
        return self._shared.max_map_size

    @max_map_size.setter
    def max_map_size(self, value: int | None) -> None:
        if value is not None:
            _check_int("max_map_size", value, 1)
        self._shared.max_map_size = value

    @property
    def timeout(self) -> float:
        """Seconds that a call waits for others."""
        return self._shared.timeout

    @timeout.setter
    def timeout(self, value: float) -> None:
        _check_timeout(value)
        self._shared.timeout = value

    @property
    def flush_interval(self) -> float | None:
        """Seconds after which pending writes are flushed by themselves, or None."""
        return self._shared.timed.interval

    @flush_interval.setter
    def flush_interval(self, value: float | None) -> None:
        _check_interval(value)
        self._shared.timed.interval = value

    # Helpers

    def _source(self) -> SharedStore | TransactionBlock:
        shared = self._shared
        return shared if self._pending.block is None else shared.current()

    def _target(self) -> SharedStore | TransactionBlock:
        """Return the store or block to write to."""
        shared = self._shared
        if self._readonly and not shared.closed:
            raise ReadOnlyError(
                f"The store at {self._path!r} is read-only: it was opened with "
                "readonly=True."
            )
        return shared if self._pending.block is None else shared.current()

    def _reading(self) -> SharedStore | TransactionBlock:
        source = self._source()
        if source.pending.entries and self.autoflush_on_read:
            source.flush_for_read()
        return source

    def _check_open(self) -> None:
        if self.closed:
            raise self._shared.closed_error()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"The store at {self._path!r} is closed.")

    def _block(self, begin: Any, end: Any = None) -> AbstractContextManager[Any, None]:
        self._target()
        self._check_open()
        shared = self._shared
        return manager(BlockScope(shared.committer, shared.current_block, begin, end))

    def _compare_and_set(self, key: bytes, expected: Any, raw: bytes | None) -> bool:
        return self._target().compare_and_set(key, expected, raw, self._limits)

    def _dumped(self, key: bytes, obj: object) -> bytes:
        # `put` and `put_many` do the same without a call, which costs 4 %.
        values = self._values
        try:
            raw = values.dumps_for(key, obj)
        except Exception as error:
            values.note_key(error, key)
            raise
        if len(raw) > self._pending.max_value:
            raise values.size_error(key, len(raw), self.max_map_size)
        return raw


def _checked_path(path: str | os.PathLike[str]) -> str:
    text = os.fsdecode(path)
    if text in ("", ":memory:"):
        raise ValueError(
            f"db_path must name a directory or a file, not {text!r}. Stores are kept "
            "on disk; tempfile.TemporaryDirectory() makes a place for one program run."
        )
    return os.path.abspath(text)


def _check_names(options: dict[str, Any]) -> None:
    of_lmdb = LmdbOptions.__optional_keys__
    for name in sorted(options.keys() - of_lmdb):
        from difflib import get_close_matches  # takes long to import

        own = LmdbObjectStore.__init__.__kwdefaults__ or ()
        known = {*of_lmdb, "batch_size", *own}
        near = get_close_matches(name, {*known, *_ALIASES}, 1, 0.5)
        hints = [f" Did you mean {_ALIASES.get(hint, hint)}?" for hint in near]
        raise TypeError(f"There is no option {name!r}.{''.join(hints)}")


def _check_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")


def _check_timeout(value: object) -> None:
    if not _number("timeout", value) >= 0:
        raise ValueError(f"timeout must not be negative or NaN, not {value}")


def _check_interval(value: object) -> None:
    if value is not None and not _number("flush_interval", value) > 0:
        raise ValueError(
            f"flush_interval must be more than 0, or None, not {value}. To write "
            "each value at once, use batch_size=1."
        )


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is larger than a float can be") from None
