"""Snapshots: the store as it was at one moment, for as long as one likes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pickle import loads
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar, overload

import lmdb

from ._gate import Gate, Pin, under
from ._mapping import _K, _T, _V, StoreMapping
from ._reading import LARGE, Batch, LargeValue, load, unpickle_error
from ._scope import Scope
from ._source import Source
from .exceptions import BusyError, ClosedError

if TYPE_CHECKING:
    from ._environment import SharedEnvironment
    from ._keys import KeyCodec

_R = TypeVar("_R")

_CHUNK_KEYS = 64


class SnapshotSource(Pin, Source):
    """A read transaction that stays open.

    Unlike other pins it can't be detached: who wants to move the map waits until
    it is closed, who closes the environment releases it.
    """

    lasting = True

    def __init__(self, env: SharedEnvironment) -> None:
        super().__init__()
        self.env = env
        # LMDB's transactions are for one thread at a time. Taken in the gate, and
        # a leaf like the buffer lock, so that it can stand in for that.
        self.buffer_lock = RLock()
        self.buffer: Batch = {}  # always empty
        self.settled = 0
        self.thread = get_ident()  # which has opened it
        self.opened = time.monotonic()

    def begin(self, begin: Callable[..., lmdb.Transaction[Any]]) -> None:
        """Open it. Call it in the gate."""
        # A snapshot that has large values gives views of them.
        self._views = self.env.gives_views(True)
        self.txn = begin(None, None, False, self._views)
        self.env.pin(self)

    @property
    def closed(self) -> bool:  # type: ignore[override]
        return self.txn is None

    @property
    def gate(self) -> Gate:
        return self.env

    def closed_error(self) -> ClosedError:
        if self.env.closed:
            return self.env.closed_error()
        return ClosedError(
            f"A snapshot of {self.env.path!r} is closed: it ends with its block."
        )

    def close(self) -> None:
        """End the transaction. Doing it again does nothing."""
        self.env.in_gate(under, self.buffer_lock, self._close)
        self.end_scans()

    def _close(self) -> None:
        txn, self.txn = self.txn, None
        # A large value that is being unpickled keeps it open until its end.
        if txn is not None and not any(pin.txn is txn for pin in self.env.pins()):
            txn.abort()

    def detach(self) -> None:
        pass  # it can't

    def release(self) -> None:
        self.txn = None
        self.buffer_lock = RLock()  # a child's parent may have the other
        self.end_scans()

    def visit(self, action: Callable[..., _R], *args: Any) -> _R:
        # 1. Thread 1 has the lock of a snapshot, and a finalizer of it puts something.
        # 2. Thread 2 has the buffer lock, and a finalizer of it reads the snapshot.
        # 3. Each would wait for the lock of the other.
        if self.env.buffer_lock._is_owned():  # type: ignore[attr-defined]
            raise BusyError(
                "A finalizer or signal handler can't read a snapshot just now: its "
                "thread is in the middle of another operation of the store."
            )
        result: _R = self.env.in_gate(
            under, self.buffer_lock, self._visit, action, args
        )
        return result

    def _visit(self, action: Callable[..., _R], args: tuple[Any, ...]) -> _R:
        if self.txn is None:
            raise self.closed_error()
        return action(self._begin, *args)

    def _begin(self, *_: object) -> lmdb.Transaction[Any] | None:
        return self.txn

    def gives_views(self, values: bool) -> bool:
        return self._views

    # Reads

    def fetch(self, key: bytes) -> bytes | LargeValue | None:
        """Return what is stored under `key`, for `load`, if anything."""
        return self.visit(self._fetch, key)

    def _fetch(self, begin: object, key: bytes) -> bytes | LargeValue | None:
        txn: Any = self.txn
        raw: Any = txn.get(key)
        if raw is not None and self._views:
            return LargeValue(self.env, txn, raw) if len(raw) >= LARGE else bytes(raw)
        kept: bytes | None = raw
        return kept

    def read_many(self, keys: list[bytes]) -> dict[bytes, Any]:
        """Return what is stored under `keys`."""
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
        self, begin: object, keys: list[bytes]
    ) -> list[bytes | LargeValue | None]:
        return [self._fetch(begin, key) for key in keys]

    def load(self, key: bytes, raw: bytes | LargeValue) -> Any:
        """Unpickle what `fetch` returned."""
        try:
            return loads(raw) if type(raw) is bytes else load(raw)
        except Exception as error:
            raise unpickle_error(key, False, error) from error


class SnapshotScope(Scope["Snapshot[_K, _V]"]):
    """The context manager of a snapshot."""

    def __init__(
        self, env: SharedEnvironment, snapshot: Snapshot[_K, _V], source: SnapshotSource
    ) -> None:
        super().__init__()
        self._env = env
        self._snapshot = snapshot
        self._source = source

    def enter(self) -> Snapshot[_K, _V]:
        self._env.open_snapshot(self._source)
        return self._snapshot

    def leave(self, normally: bool) -> None:
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
        source = self._open_source
        raw = source.fetch(key)
        return default if raw is None else source.load(key, raw)

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
