"""Snapshots: the store as it was at one moment, for as long as one likes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf
from threading import RLock, get_ident
from typing import Any, TypeVar

import lmdb

from ._buffer import WriteBuffer
from ._diagnosis import DAMAGED, damaged_error
from ._environment import Begin, Environment, Pick
from ._locks import held_here, locked, poll, try_locked
from ._reads import Source, pick_none
from ._scan import Owner
from ._scope import Scope
from ._values import LARGE, LargeValue, Values
from .exceptions import BusyError, ClosedError

_R = TypeVar("_R")
_T = TypeVar("_T")

_CHUNK_KEYS = 64
_DAMAGED = (*DAMAGED, lmdb.BadTxnError)  # a transaction that has met damage is bad


class SnapshotSource(Source):
    """A read transaction that stays open.

    It is no pin, as it can't be copied out: a thread that wants to move the map waits
    for its end; a thread that closes the environment makes it forget the transaction.
    """

    lasting = True

    def __init__(self, environment: Environment, owner: Owner) -> None:
        # The buffer stays empty. LMDB's transactions are for one thread at a time, and
        # the buffer's lock guards this one: taken in the gate, and a leaf.
        super().__init__(environment, WriteBuffer())
        self._writer = environment.writer
        self.owner = owner  # which ends it when it is closed; kept open so long
        self._why = "it ends with its block"
        self.txn: lmdb.Transaction[Any] | None = None
        self.thread = 0  # has opened it
        self.opened = 0.0
        self.awaited = 0.0  # since when growth waits for it
        self._lock_free = True  # whether only that thread uses it, without the lock
        self._shared = False  # whether the others can be sure that it takes the lock
        self._views = False
        self._get: Callable[[bytes], Any] | None = None  # unless it is open

    def open(self) -> None:
        self.environment.retry(self.environment.repair, self._open)

    def _open(self, begin: Begin) -> None:
        if "closing" in self._writer.buffer.refusals:
            raise self.environment.closed_error()
        self.thread = get_ident()
        self.opened = time.monotonic()
        # A snapshot that has large values gives views of them.
        self._views = self.environment.gives_views(True)
        self.txn = begin(None, None, False, self._views)
        self._writer.snapshots.open.add(self)
        self._get = partial(self._copy, self.txn) if self._views else self.txn.get

    @property
    def closed(self) -> bool:
        return self._get is None

    def closed_error(self) -> ClosedError:
        if self.owner.closed:
            return self.owner._source().closed_error()
        path = self.environment.path
        return ClosedError(f"A snapshot of {path!r} is closed: {self._why}.")

    def close(self) -> None:
        """End the snapshot, without waiting. A second call completes the first.

        A thread that is just using the transaction keeps it to the end of that read.
        """
        self._get = None
        self._writer.snapshots.open.discard(self)
        self.gate.stop_iterators(self)
        if get_ident() == self.thread and not self.gate.readers.get(self.thread):
            self.gate.read(try_locked, self.pending.lock, 0, self._abort_unused)
        self.txn = None

    def _abort_unused(self) -> None:
        txn = self.txn
        large = [pin for pin in self.gate.pins.all() if isinstance(pin, LargeValue)]
        if txn is not None and not any(value.txn is txn for value in large):
            txn.abort()  # see `Pin.abort`

    def forget(self, why: str = "") -> None:
        """Let go of the transaction, which ends with the environment."""
        self._why = why or self._why
        self._get = None
        self._writer.snapshots.open.discard(self)
        self.txn = None
        self.pending.lock = RLock()  # in a child made by fork no thread holds the old
        self.gate.stop_iterators(self)

    def view(self, pick: Pick, action: Callable[..., _R], *args: Any) -> _R:
        me = get_ident()
        outer = self.gate.readers.get(me)
        if me != self.thread and not self._shared:
            self._share(outer)
        self._check_locks(outer)
        lock = self.pending.lock
        result: _R = self.gate.read(locked, lock, self._view, pick, action, args)
        return result

    def _view(self, pick: Pick, action: Callable[..., _R], args: tuple[Any, ...]) -> _R:
        txn: Any = self.txn
        if self._get is None or txn is None:
            raise self.closed_error()
        _, picked = pick(lambda *_: txn)
        try:
            return action(txn, picked, *args)
        except _DAMAGED as error:
            raise damaged_error(self.environment.files.data, str(error)) from error

    def _check_locks(self, outer: bool | None) -> None:
        """Raise if waiting for the lock could be a deadlock.

        1. Thread 1 has the lock of a snapshot, and a finalizer in it puts something.
        2. Thread 2 has the buffer lock, and a finalizer in it reads the snapshot.
        3. Each would wait for the lock of the other. So with two snapshots.
        """
        locks = [self._writer.buffer.lock]
        if outer:  # only in the gate is the lock of a snapshot taken
            locks += [other.pending.lock for other in self._writer.snapshots.all()]
        if any(held_here(lock) for lock in locks if lock is not self.pending.lock):
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
        """Return the stored value of `key`, for `Values.load`, if there is one."""
        # As `view`, but without the lock as long as only one thread uses it.
        gate = self.gate
        readers = gate.readers
        me = get_ident()
        outer = readers.get(me)
        if me != self.thread and not self._shared:
            self._share(outer)
        readers[me] = True
        try:
            if gate.holder is not None:
                gate.give_way(me, outer)
            get = self._get
            if get is None:
                raise self.closed_error()
            if self._lock_free:
                return get(key)
            return self._fetch(key, outer)
        except _DAMAGED as error:
            raise damaged_error(self.environment.files.data, str(error)) from error
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
            finally:
                pass

    def _fetch(self, key: bytes, outer: bool | None) -> Any:
        """Fetch under the lock: by `locked` only if another thread has it just now."""
        lock: Any = self.pending.lock
        if not lock._is_owned():
            try:
                if lock.acquire(False):
                    return self._get_now(key)
            finally:
                try:  # as in `locked`
                    lock.release()
                except RuntimeError:
                    pass
            self._check_locks(outer)
        return locked(lock, self._get_now, key)

    def _get_now(self, key: bytes) -> Any:
        get = self._get  # again, as `close` may have come before the lock
        if get is None:
            raise self.closed_error()
        return get(key)

    def _share(self, outer: bool | None) -> None:
        """Let in other threads than the opener.

        The opener enters the gate, *then* looks at `_lock_free`; this thread sets
        `_lock_free`, *then* looks for the opener in the gate: one sees the other.
        """
        self._check_locks(outer)
        if outer:
            raise self._busy_error()
        self._lock_free = False
        poll(lambda: not self.gate.readers.get(self.thread), inf, 0.0001)
        self._shared = True

    def _copy(self, txn: Any, key: bytes) -> bytes | LargeValue | None:
        view: memoryview | None = txn.get(key)
        if view is None:
            return None
        return LargeValue(self.gate, txn, view) if len(view) >= LARGE else bytes(view)

    def read_many(self, keys: list[bytes], values: Values) -> dict[bytes, Any]:
        if self.closed:
            raise self.closed_error()
        found = {}
        loads: Any = values.loads
        for start in range(0, len(keys), _CHUNK_KEYS):
            chunk = keys[start : start + _CHUNK_KEYS]
            raws = self.view(pick_none, self._fetch_many, chunk)
            try:
                for key, raw in zip(chunk, raws, strict=True):
                    if raw is not None:
                        quick = loads is not None and type(raw) is bytes
                        found[key] = loads(raw) if quick else values.load(key, raw)
            except Exception as error:
                raise values.load_error(key, raw, False, error) from error
        return found

    def _fetch_many(self, txn: Any, _: None, keys: list[bytes]) -> list[Any]:
        get = partial(self._copy, txn) if self._views else txn.get
        return list(map(get, keys))


class SnapshotScope(Scope[_T]):
    """The time for which a snapshot is open. `begin` opens it."""

    def __init__(self, source: SnapshotSource, begin: Callable[[], _T]) -> None:
        self._source = source
        self._begin = begin

    def enter(self) -> _T:
        return self._begin()

    def leave(self, failure: type[BaseException] | None) -> None:
        self._source.close()
