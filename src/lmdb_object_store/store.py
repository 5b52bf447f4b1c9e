"""`LmdbObjectStore`: what users meet. Keys, options and pickling; no locks."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from enum import Enum
from functools import partial
from itertools import chain
from pickle import HIGHEST_PROTOCOL, dumps
from types import (
    BuiltinFunctionType,
    FunctionType,
    MappingProxyType,
    TracebackType,
)
from typing import TYPE_CHECKING, Any, overload

import lmdb

from ._environment import MAX_VALUE, SharedEnvironment
from ._keys import KeyCodec, describe
from ._mapping import _K, _T, _V, StoreMapping, refuse_single
from ._opening import data_path, identity_of
from ._process import Handle, share
from ._ranges import ALL
from ._scope import manager
from ._snapshot import Snapshot, SnapshotScope
from ._source import ABSENT
from ._transaction import Block, BlockScope
from ._views import StoreKeysView
from ._writers import log
from .exceptions import (
    BusyError,
    ClosedError,
    GrowthError,
    LostWritesError,
    ReadOnlyError,
    SizeError,
)

if TYPE_CHECKING:
    from _typeshed import SupportsItems, SupportsKeysAndGetItem
    from typing_extensions import Self

_State = tuple[dict[str, Any], "int | None", float]
_DEFAULT_MAP_SIZE = 10 * 2**20  # py-lmdb's own
_TIMEOUT = 60.0
_CONSTANTS: tuple[type, ...] = (type(None), type(...), type(NotImplemented), slice)
_CONSTANTS += (type, FunctionType, BuiltinFunctionType)
_ATTEMPTS = 100  # of popitem at an entry that is the last one all the time


class _ClosedStore:
    """What a closed store has in place of the environment, which others may use.

    Whatever is called raises `ClosedError`, but for what has no need of the file.
    """

    closed = True
    block = None
    buffer: Mapping[bytes, bytes | None] = MappingProxyType({})
    may_buffer = False

    def __init__(self, env: SharedEnvironment, path: str, failed: bool) -> None:
        self._path = path
        self.lost = env.lost or (dict(env.buffer) if failed else {})
        self.max_map_size = env.max_map_size
        self.max_value = env.max_value
        self.timeout = env.timeout

    def __getattr__(self, name: str) -> Any:
        raise self.closed_error()

    def set_cap(self, max_map_size: int | None) -> None:
        self.max_map_size = max_map_size

    def closed_error(self) -> ClosedError:
        return ClosedError(f"The store at {self._path!r} is closed.")


class LmdbObjectStore(StoreMapping[_K, _V], MutableMapping[_K, _V]):
    """A thread-safe, dict-like store of Python objects in one LMDB file.

    Values are pickled, so never open a file from somebody you don't trust:
    unpickling can run any code.

    Writes are collected in a buffer and reach the disk in one transaction when
    `batch_size` or `batch_bytes` is reached, at `flush`, at `close`, and before
    reads that have to go to the database (`autoflush_on_read`). Reads always see
    what this process wrote. The map grows by itself.

    Any number of threads may use one store, and so may code that runs inside its
    own operations: pickling hooks, finalizers, signal handlers. All stores that a
    process opens on one file share one environment and what is pending. Other
    processes may open the file, too; a child made by fork may use the store that it
    inherits, without what is pending in the parent; and a store can be pickled.

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
        Bytes up to which the map may grow by itself; None sets no limit, or leaves
        that of the stores that have the file open.
    timeout : float
        Seconds for which growth waits for open snapshots, growth and close for reads
        that don't end, reads and opening for a free reader slot, and opening for a
        store of the same file that this process is just closing.
    **lmdb_kwargs
        Everything else that `lmdb.open` takes: ``map_size``, ``subdir``,
        ``readonly``, ``lock``, ``sync``, ``writemap``, ``lib_version``, ...
        Refused are ``max_spare_txns`` other than 0, which breaks fork,
        ``lock=False`` without ``readonly``, and ``writemap=True`` with the LMDB
        1.0 engine, which aborts the process.

    Raises
    ------
    TypeError, ValueError
        An option that is not one of the above, or out of its range, or not what
        another store has opened the file with in this process.
    ReadersFullError
        No reader slot became free within `timeout` seconds.
    BusyError
        This process is just closing a store of the same file, and that does not end;
        or it was forked in the middle of an operation that did not end.
    lmdb.Error
        The environment can't be opened.
    """

    autoflush_on_read: bool

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
        timeout: float = _TIMEOUT,
        **lmdb_kwargs: Any,
    ) -> None:
        self._readonly = bool(lmdb_kwargs.get("readonly"))
        self.batch_size = batch_size
        self.batch_bytes = batch_bytes
        self.autoflush_on_read = bool(autoflush_on_read)
        codec = KeyCodec(key_encoding, key_errors, str_normalize)
        path = os.path.abspath(os.fsdecode(db_path))
        map_size = lmdb_kwargs.get("map_size", 0)
        _check_int("map_size", map_size, 0)
        if max_map_size is not None:
            _check_int("max_map_size", max_map_size, map_size or 1)
            lmdb_kwargs["map_size"] = map_size or min(_DEFAULT_MAP_SIZE, max_map_size)
        _check_timeout(timeout)
        if not lmdb_kwargs.get("lock", True) and not lmdb_kwargs.get("readonly"):
            raise ValueError(
                "lock=False needs readonly=True: without its locks LMDB writes over "
                "what is being read."
            )
        if lmdb_kwargs.get("max_spare_txns"):
            raise ValueError(
                "max_spare_txns must be 0: cached transactions don't survive a fork."
            )
        super().__init__(path, codec)
        self._options = lmdb_kwargs
        self._open(max_map_size, timeout, True)

    def _open(self, cap: int | None, timeout: float, explicit: bool) -> None:
        """Use the environment of the file, and open it if nobody does yet.

        Where that is `explicit`, the store should be closed, and has a say in what the
        environment has as a whole.
        """
        path, options = self._path, self._options
        self._handle = Handle()
        env = share(
            data_path(path, options),
            partial(SharedEnvironment, path, options, cap, timeout),
            self._handle,
            explicit,
            options,
            timeout,
        )
        self._env = env
        self._codec.max_size = self._max_key = env.max_key
        env.raise_floor(options.get("map_size", 0))
        # A default asks for nothing.
        if explicit and cap is not None:
            env.set_cap(cap)
        if explicit and timeout != _TIMEOUT:
            env.timeout = timeout

    def __getstate__(self) -> _State:
        """Return what `__setstate__` needs: path and options, after a flush.

        Raises
        ------
        ClosedError
            The store is closed.
        GrowthError, DiskError, lmdb.Error
            The flush failed.
        """
        if not self._env.shared.readonly:
            self._source().flush()
        state = {**vars(self), "_options": {**self._options, "create": False}}
        del state["_env"], state["_handle"]
        return state, self.max_map_size, self.timeout

    def __setstate__(self, state: _State) -> None:
        """Open the same file here, or share it if this process has it open.

        Raises
        ------
        ClosedError
            There is no such file.
        lmdb.Error
            It can't be opened.
        """
        attributes, max_map_size, timeout = state
        vars(self).update(attributes)
        file = data_path(self._path, self._options)
        if identity_of(file) is None:
            raise ClosedError(
                f"The store at {self._path!r} can't be opened here: there is no {file}."
            )
        self._open(max_map_size, timeout, False)

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
        env: Any = self._env
        if env.block is not None:
            env = env.current()
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
        env = self._source()
        if flush and not self._readonly:
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
        env: Any = self._env
        if env.block is not None:
            env = env.current()
        buffer = env.buffer
        if buffer:
            pending = buffer.get(encoded, ABSENT)
            if pending is not ABSENT:
                return pending is not None
        return env.read(encoded, False, True) is True

    def __bool__(self) -> bool:
        """Return whether there is any entry. Never flushes."""
        return self._source().last_key() is not None

    def __repr__(self) -> str:
        try:
            state = f"{len(self)} entries, {len(self._env.buffer)} pending writes"
        except ClosedError:
            state = "closed"
        except BusyError:
            state = "in the midst of something"
        return f"<{type(self).__name__} {self._path!r}, {state}>"

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
        env: Any = self._env
        try:
            raw = dumps(obj, HIGHEST_PROTOCOL)
        except Exception as error:
            _note_key(error, encoded)
            raise
        size = len(raw)
        if size > env.max_value:
            self._refuse_value(encoded, size)
        size += len(encoded)
        if env.may_buffer:
            count = len(env.buffer)
            with env.buffer_lock:
                # No call in here: a signal handler that comes now could flush, and
                # wait for a thread that waits for this lock; or close the store.
                total = env.buffer_bytes + size
                if count < self._room and total < self._batch_bytes and env.may_buffer:
                    env.buffer[encoded] = raw
                    env.buffer_bytes = total
                    return
        self._target().write(encoded, raw, self._batch_size, self._batch_bytes)

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
        self._target().write_many(batch)

    def delete(self, key: _K) -> None:
        """Delete what is stored under `key`, if anything. Buffered, like `put`."""
        encoded = self._codec.encode(key)
        self._target().write(encoded, None, self._batch_size, self._batch_bytes)

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
        env = self._target()
        if isinstance(keys, StoreKeysView) and keys.is_of(self._env):
            return env.delete_range(keys.range)
        refuse_single("delete_many", keys)
        return env.delete_many(set(map(self._codec.encode, keys)))

    def clear(self) -> None:
        """Delete everything, in one transaction, as `delete_many` does."""
        self._target().delete_range(ALL)

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
        env = self._target()
        env.check_writable()
        while True:
            raw, buffered = env.look_up(encoded)
            if raw is None:
                if default is ABSENT:
                    raise self._key_error(key)
                return default
            value = env.unpickle(encoded, raw, buffered)
            if env.as_writer(env.exchange, encoded, raw, None, self._limits()):
                return value

    def popitem(self) -> tuple[_K, _V]:
        """Delete the last entry and return its key and value, or raise KeyError.

        One step for all threads of this process. (Where others put later keys all
        the time, the entry may have been the last one a moment ago.)

        Raises
        ------
        See `get` and `put`. Nothing has been deleted then.
        """
        env = self._target()
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
        env = self._target()
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
        if isinstance(other, StoreMapping):
            pairs = other.items()  # in one pass
        super().update(pairs, **more)

    def __ior__(self, other: SupportsItems[_K, _V] | Iterable[tuple[_K, _V]]) -> Self:
        """Do `update`."""
        self.update(other)
        return self

    # Several things at once

    def transaction(self) -> AbstractContextManager[Self, None]:
        """Return a context manager: all of its block is done, or nothing.

        It yields the store. Whatever the block reads and writes through the store
        belongs to one LMDB transaction: nobody else writes meanwhile, in no thread
        and no process, and nobody sees anything of the block before its end. Leaving
        it normally commits everything, durably; an exception undoes everything and
        goes on. What is pending before is flushed first and stays.

        The block belongs to its thread, where it begins, runs and ends, and to its
        asyncio task. Other threads read the state before, and wait if they write.
        Blocks nest: an inner one joins the outer, and an exception that the outer
        one catches undoes the inner only. Iterators that begin inside end with the
        block.

        The changes are held in memory until the end. If the map is too full for
        them it grows then, for which LMDB has to let other processes write.

        Raises
        ------
        GrowthError, DiskError, lmdb.Error, ReadOnlyError, ClosedError
            At the beginning, as for `flush`; at the end, as for `put`. Nothing of
            the block is written then.
        ConflictError
            At the end: another process has written while the map had to grow.
            Nothing of the block is written; run it again.
        BusyError
            Called inside another operation, or by another task of the thread. At the
            end: a block nested in it, of a suspended generator, has not ended.
        ClosedError
            Inside and at the end: the block has been ended from elsewhere, as by
            another thread that closes the generator which it is in.
        """
        self._target()
        return manager(BlockScope(self._env.shared, lambda: self))

    @overload
    def edit(self, key: _K) -> AbstractContextManager[_V, None]: ...
    @overload
    def edit(self, key: _K, default: _V) -> AbstractContextManager[_V, None]: ...
    def edit(
        self, key: Any, default: Any = ABSENT
    ) -> AbstractContextManager[Any, None]:
        """Return a context manager: change a stored object in place.

        It yields the value of `key`, or a copy of `default`, and stores what has
        become of it when the block ends normally. The block is a `transaction`.

        Raises
        ------
        KeyError
            There is no value, and no `default`.
        TypeError
            The value is of a type that can't be changed in place: a number, a str,
            a tuple, None, a frozen dataclass.
        Exception
            What `get`, `put` and `transaction` raise. Nothing has changed then.
        """
        encoded: Any = self._codec.encode(key)
        self._target()
        new = None if default is ABSENT else self._pickled(encoded, default)

        def begin() -> Any:
            source = self._source()
            raw, buffered = source.look_up(encoded)
            if raw is None:
                raw, buffered = new, True
            if raw is None:
                raise self._key_error(key)
            value = source.unpickle(encoded, raw, buffered)
            if _is_immutable(value):
                raise TypeError(
                    f"The value of {describe(encoded)} can't be changed in place: it "
                    f"is of type {type(value).__name__}. Use transaction(), and store "
                    "a new value in its block."
                )
            return value

        env = self._env.shared
        return manager(BlockScope(env, begin, lambda value: self.put(encoded, value)))

    def snapshot(self) -> AbstractContextManager[Snapshot[_K, _V], None]:
        """Return a context manager: the store as it is now, whatever comes.

        It yields a read-only mapping, which is closed at the end of the block.
        Pending writes are flushed first, and so belong to it. Any number can be
        open at once, in any thread.

        While one is open the map can't grow: who needs that waits for at most
        `timeout` seconds, and then, or at once in the thread that has opened
        a snapshot, gets a `SnapshotOpenError`; so do even reads of the store, if
        another process has made the map larger. Also, LMDB can't use the pages again
        that it shows, so the file grows with what is written meanwhile.

        Raises
        ------
        GrowthError, DiskError, lmdb.Error
            What is pending could not be flushed.
        ClosedError
            The store is closed.
        ValueError
            The store was opened with ``lock=False``.
        BusyError
            Called inside a transaction block, whose changes no snapshot can have.
        """
        return manager(SnapshotScope(self))

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
        self._target().flush()

    def close(self, *, strict: bool = False) -> None:
        """Flush, wait for reads in the database to end, sync and close.

        While other stores of this process have the same file open, that stays open,
        with what could not be flushed. Closing again does nothing. A value that another
        thread is unpickling at this moment is unpickled to its end.

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
        env: Any = self._env
        if env.closed:
            return
        error = env.leave(weakref.ref(self._handle), self)
        closed: Any = _ClosedStore(env, self._path, error is not None)
        self._env = closed
        env.end_scans(self)
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
            log.error("Could not close %s", self._path, exc_info=True)

    # Attributes

    @property
    def db_path(self) -> str:
        """The path of the environment, absolute."""
        return self._path

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

        ClosedError once the store is closed. It may be replaced by another object
        after an I/O error. Transactions of
        your own must end before the map grows, which invalidates them, and before a
        fork: in the child they would be ended for both.
        """
        return self._env.environment()

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
        # A put into a shorter buffer doesn't make it full.
        self._room = -1 if self._readonly else value - 1

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
    def timeout(self) -> float:
        """Seconds for which growth waits for open snapshots and stuck reads."""
        return self._env.timeout

    @timeout.setter
    def timeout(self, value: float) -> None:
        _check_timeout(value)
        self._env.timeout = value

    # Helpers

    def _source(self) -> SharedEnvironment | Block:
        env = self._env
        return env if env.block is None else env.current()

    def _target(self) -> SharedEnvironment | Block:
        """Return what to write to."""
        env = self._source()
        if self._readonly and not env.closed:
            raise ReadOnlyError(
                f"The store at {self._path!r} is read-only: it was opened with "
                "readonly=True."
            )
        return env

    def _reading(self) -> SharedEnvironment | Block:
        env = self._source()
        if env.buffer and self.autoflush_on_read:
            env.flush_for_read()
        return env

    def _exchange(self, key: bytes, expected: Any, raw: bytes | None) -> bool:
        env = self._target()
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


def _is_immutable(value: object) -> bool:
    """Whether `value` is of a type whose objects can't be changed in place.

    Python has no word for that. But what is equal by value and hashable has to be
    so, unless it takes attributes; enums and frozen dataclasses only seem to.
    """
    if isinstance(value, _CONSTANTS):
        return True
    kind = type(value)
    frozen = getattr(kind, "__dataclass_params__", None)
    if isinstance(value, Enum) or (frozen is not None and frozen.frozen):
        return True
    if kind.__hash__ in (object.__hash__, None) or hasattr(value, "__dict__"):
        return False
    slots = chain.from_iterable(vars(base).get("__slots__", ()) for base in kind.mro())
    can_set = kind.__setattr__ is object.__setattr__
    return not (can_set and any(not name.startswith("_") for name in slots))


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
        raise TypeError(f"timeout must be a number, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"timeout must not be negative or NaN, not {value}")
