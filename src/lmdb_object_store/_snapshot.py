"""Snapshots: the store as it was at one moment, for as long as one likes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pickle import loads
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar, overload

import lmdb

from ._gate import Gate, is_mine, under
from ._mapping import _K, _T, _V, StoreMapping
from ._reading import LARGE, Batch, LargeValue, load, unpickle_error
from ._scope import Scope
from ._source import Source
from .exceptions import BusyError, ClosedError

if TYPE_CHECKING:
    from ._environment import SharedEnvironment
    from ._keys import KeyCodec
    from .store import LmdbObjectStore

_R = TypeVar("_R")

_CHUNK_KEYS = 64


class SnapshotSource(Source):
    """A read transaction that stays open.

    It is no pin, as it can't be detached: who wants to move the map waits until it
    is closed, who closes the environment releases it.
    """

    lasting = True

    def __init__(
        self, env: SharedEnvironment, owner: LmdbObjectStore[Any, Any]
    ) -> None:
        self.env = env
        self.owner = owner  # which ends it when it is closed; kept open so long
        self._why = "it ends with its block"
        self.txn: lmdb.Transaction[Any] | None = None
        self._open: set[SnapshotSource] = set()  # where it is found while it is open
        # LMDB's transactions are for one thread at a time. Taken in the gate, and
        # a leaf like the buffer lock, for which it stands in.
        self.buffer_lock = RLock()
        self.buffer: Batch = {}  # always empty
        self.settled = 0
        self.thread = 0  # which has opened it
        self.opened = 0.0
        self.awaited = 0.0  # since when growth waits for it
        self._lock_free = True  # whether only that thread uses it, without the lock
        self._shared = False  # whether the others can be sure that it takes the lock
        self._views = False
        self.closed = True
        self._get: Callable[[bytes], Any] | None = None  # unless it is open

    def begin(
        self,
        begin: Callable[..., lmdb.Transaction[Any]],
        open_ones: set[SnapshotSource],
    ) -> None:
        """Open it, and enter it among the open ones. Call it in the gate."""
        if self.env.closing:
            raise self.env.closed_error()
        self.thread = get_ident()
        self.opened = time.monotonic()
        # A snapshot that has large values gives views of them.
        self._views = self.env.gives_views(True)
        self.txn = begin(None, None, False, self._views)
        self._open = open_ones
        self._open.add(self)
        self._get = partial(self._copy, self.txn) if self._views else self.txn.get
        self.closed = False

    @property
    def gate(self) -> Gate:
        return self.env

    def closed_error(self) -> ClosedError:
        if self.owner.closed:
            return self.owner._source().closed_error()
        return ClosedError(f"A snapshot of {self.env.path!r} is closed: {self._why}.")

    def close(self) -> None:
        """End it, without waiting. Doing it again does nothing.

        Who is in the midst of using the transaction has it to the end. After an
        interrupt it goes on where it was.
        """
        self.closed = True
        self._get = None
        self._open.discard(self)
        self.end_scans()
        if get_ident() == self.thread and not self.env.readers.get(self.thread):
            self.env.in_gate(self._end_unused)
        self.txn = None

    def _end_unused(self) -> None:
        txn, lock = self.txn, self.buffer_lock
        large_values = (pin for pin in self.env.pins() if isinstance(pin, LargeValue))
        used = any(value.txn is txn for value in large_values)
        try:
            if txn is not None and lock.acquire(blocking=False) and not used:
                txn.abort()  # see `Pin.end`
        finally:
            try:  # asking first would leave room for an interrupt
                lock.release()
            except RuntimeError:
                pass  # it was not acquired

    def release(self, why: str = "") -> None:
        """Forget the transaction, which ends with the environment."""
        self._why = why or self._why
        self.closed = True
        self._open.discard(self)
        self.txn = None
        self._get = None
        self.buffer_lock = RLock()  # in a forked child nobody may release the other
        self.end_scans()

    def visit(self, action: Callable[..., _R], *args: Any) -> _R:
        me = get_ident()
        outer = self.env.readers.get(me)
        if me != self.thread and not self._shared:
            self._share(outer)
        self._check_locks(outer)
        result: _R = self.env.in_gate(
            under, self.buffer_lock, self._visit, action, args
        )
        return result

    def _visit(self, action: Callable[..., _R], args: tuple[Any, ...]) -> _R:
        txn = self.txn
        if self.closed or txn is None:
            raise self.closed_error()
        return action(lambda *_: txn, *args)

    def _check_locks(self, outer: bool | None) -> None:
        """Raise if waiting for the lock could be a deadlock.

        1. Thread 1 has the lock of a snapshot, and a finalizer of it puts something.
        2. Thread 2 has the buffer lock, and a finalizer of it reads the snapshot.
        3. Each would wait for the lock of the other. Two snapshots are no better.
        """
        locks = [self.env.buffer_lock]
        if outer:  # only in the gate is the lock of a snapshot taken
            locks += [other.buffer_lock for other in list(self.env.open_snapshots)]
        if any(is_mine(lock) for lock in locks if lock is not self.buffer_lock):
            raise self._busy_error()

    def _busy_error(self) -> BusyError:
        return BusyError(
            "A finalizer or signal handler can't read a snapshot just now: its thread "
            "is in the middle of another operation of the store."
        )

    def gives_views(self, values: bool) -> bool:
        return self._views

    # Reads

    def fetch(self, key: bytes) -> Any:
        """Return what is stored under `key`, for `load`, if anything."""
        # What `visit` does, without the lock as long as one thread has it.
        env = self.env
        readers = env.readers
        me = get_ident()
        outer = readers.get(me)
        if me != self.thread and not self._shared:
            self._share(outer)
        readers[me] = True
        try:
            if env.barred is not None:
                env.give_way(me, outer)
            get = self._get
            if get is None:
                raise self.closed_error()
            if self._lock_free:
                return get(key)
            self._check_locks(outer)
            return under(self.buffer_lock, self._fetch, key)
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
            finally:
                pass

    def _fetch(self, key: bytes) -> Any:
        get = self._get  # again, as `close` may have come before the lock
        if get is None:
            raise self.closed_error()
        return get(key)

    def _share(self, outer: bool | None = None) -> None:
        """Let other threads in than the one that has opened this.

        That one enters the gate, *then* looks at `_lock_free`; here it is the other
        way round: one always sees the other.
        """
        self._check_locks(outer)
        if outer:
            raise self._busy_error()
        self._lock_free = False
        while self.env.readers.get(self.thread, False):
            time.sleep(0.0001)  # as in Gate
        self._shared = True

    def _copy(
        self, txn: lmdb.Transaction[memoryview], key: bytes
    ) -> bytes | LargeValue | None:
        view: memoryview | None = txn.get(key)
        if view is None:
            return None
        return LargeValue(self.env, txn, view) if len(view) >= LARGE else bytes(view)

    def read_many(self, keys: list[bytes]) -> dict[bytes, Any]:
        """Return what is stored under `keys`."""
        if self.closed:
            raise self.closed_error()
        found = {}
        for start in range(0, len(keys), _CHUNK_KEYS):
            chunk = keys[start : start + _CHUNK_KEYS]
            for key, raw in zip(
                chunk, self.visit(self._fetch_many, chunk), strict=True
            ):
                if raw is not None:
                    found[key] = self.load(key, raw)
        return found

    def _fetch_many(
        self, begin: Callable[[], lmdb.Transaction[bytes]], keys: list[bytes]
    ) -> list[bytes | LargeValue | None]:
        txn: Any = begin()
        get = partial(self._copy, txn) if self._views else txn.get
        return list(map(get, keys))

    def load(self, key: bytes, raw: bytes | LargeValue) -> Any:
        """Unpickle what `fetch` returned."""
        try:
            return load(raw)
        except Exception as error:
            raise unpickle_error(key, False, error) from error


class SnapshotScope(Scope["Snapshot[_K, _V]"]):
    """The time for which a snapshot is open."""

    def __init__(self, store: LmdbObjectStore[_K, _V]) -> None:
        self._store = store
        self._source = SnapshotSource(store._env.shared, store)

    def enter(self) -> Snapshot[_K, _V]:
        store = self._store
        self._source.env.open_snapshot(self._source)
        return Snapshot(store._path, store._codec, self._source)

    def leave(self, failure: type[BaseException] | None) -> None:
        self._source.close()


class Snapshot(StoreMapping[_K, _V]):
    """A read-only mapping: a store at one moment. See `LmdbObjectStore.snapshot`.

    It gives the same answers for as long as it is open, whatever is written
    meanwhile, in the ways of the store: keys, ranges, views, `get_many`. Any number
    of threads may use it; their reads of it run one at a time.

    Every method raises `ClosedError` once it is closed.
    """

    def __init__(self, path: str, codec: KeyCodec, source: SnapshotSource) -> None:
        super().__init__(path, codec)
        self._open_source = source

    def _source(self) -> SnapshotSource:
        return self._open_source

    _reading = _source

    @overload
    def get(self, key: _K) -> _V | None: ...
    @overload
    def get(self, key: _K, default: _V | _T) -> _V | _T: ...
    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of `key`, or `default`.

        Begins no transaction, and so takes less time than `LmdbObjectStore.get`,
        which documents the errors.
        """
        if type(key) is not bytes or not 0 < len(key) <= self._max_key:
            key = self._codec.encode(key)
        raw = self._open_source.fetch(key)
        if raw is None:
            return default
        try:
            return loads(raw) if type(raw) is bytes else raw.load()
        except Exception as error:
            raise unpickle_error(key, False, error) from error

    def __contains__(self, key: object) -> bool:
        """Return whether there is a value under `key`."""
        return self._open_source.fetch(self._codec.encode(key)) is not None

    @property
    def closed(self) -> bool:
        """Whether the snapshot is closed."""
        return self._open_source.closed

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self)} entries"
        return f"<{type(self).__name__} of {self._path!r}, {state}>"
