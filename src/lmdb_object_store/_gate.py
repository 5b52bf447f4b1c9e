"""The gate: reads pass it together; growth, adoption and close hold it alone.

LMDB's map can't be moved or unmapped while a read is in it. There are two kinds:

- A thread *in the gate* has a transaction or a view of the map in its hands. It runs
  no user code there, but for signal handlers and finalizers that interrupt it. So it
  leaves within microseconds, and the thread that wants the gate alone waits for it.
- A `Pin` outlives one passage: the value being unpickled piece by piece, the keys of
  one `get_many`. User code runs meanwhile, for as long as it likes, so no thread waits
  for a pin: the thread that has the gate alone makes the pin *copy out* the rest of its
  data, and the pin goes on from the copy.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from functools import partial
from threading import RLock, get_ident
from typing import Any, Generic, Protocol, TypeVar

import lmdb

from ._locks import Action, Args, locked, poll
from .exceptions import BusyError

_R = TypeVar("_R")
_T = TypeVar("_T")

SLICE = 0.05  # seconds for which readers are kept out while a read does not leave


class Pin(ABC):
    """A read that spans several passages of the gate, which knows the pin weakly."""

    __slots__ = ("__weakref__", "txn")

    def __init__(self, txn: lmdb.Transaction[Any] | None = None) -> None:
        self.txn = txn  # None once the pin has copied out or forgotten

    @abstractmethod
    def copy_out(self) -> None:
        """Copy the rest of the data out of the map, and let go of the transaction.

        For the thread that holds the gate alone. A second call does nothing.
        """

    def forget(self) -> None:
        """Let go of the transaction, which another owner ends."""
        self.txn = None

    def abort(self) -> None:
        """End the transaction, in the gate, though something else may refer to it.

        The traceback of a KeyboardInterrupt does, and interactive Python keeps the
        last traceback: LMDB could not reuse the pages that the transaction shows.
        """
        if self.txn is not None:
            self.txn.abort()


class OpenIterator(Protocol):
    """An iterator over a store, as the gate knows it."""

    source: Any  # of its entries
    owner: Any  # the store object or snapshot that it is of

    def stop(self) -> None: ...
    def leave_to_parent(self) -> None: ...


class _InUse(Generic[_T]):
    """Objects that are known as long as others use them."""

    def __init__(self) -> None:
        self.refs: set[weakref.ref[_T]] = set()

    def add(self, one: _T) -> None:
        self.refs.add(weakref.ref(one, self.refs.discard))

    def all(self) -> list[_T]:
        return [one for ref in list(self.refs) if (one := ref()) is not None]


class Gate:
    """Counts the readers, and knows the thread that keeps them out.

    A reader enters itself in `readers`, *then* looks at `holder`; a thread that wants
    the gate alone sets `holder`, *then* looks at `readers`: one always sees the other.

    Entering is ``readers[me] = ...`` directly followed by ``try:``, and leaving is
    the first statement of its ``finally:``. Neither is a call, so no KeyboardInterrupt
    comes between, and no reader stays counted.
    """

    def __init__(self) -> None:
        # Threads that read: True in the gate, False while they run user code.
        self.readers: dict[int, bool] = {}
        self.holder: int | None = None  # the thread that has the gate alone
        self.lock = RLock()  # held by the holder, for readers to wait on
        # Whether to expect large values: if not, reads are spared a memoryview.
        self.large_seen = False
        self.pins: _InUse[Pin] = _InUse()
        # They hold nothing between their steps, but end with their store.
        self.iterators: _InUse[OpenIterator] = _InUse()

    def read(self, action: Action[_R], *args: Any) -> _R:
        """Call `action`, a read that has the map in its hands, and no user code."""
        readers = self.readers
        me = get_ident()
        outer = readers.get(me)
        readers[me] = True
        try:
            if self.holder is not None:
                self.give_way(me, outer)
            return action(*args)
        finally:
            try:
                if outer is None:
                    del readers[me]
                else:
                    readers[me] = outer
            finally:
                pass

    def user_code(self, action: Action[_R], *args: Any) -> _R:
        """Call `action`, a read that may run user code, and count it as a reader."""
        readers = self.readers
        me = get_ident()
        outer = readers.get(me)
        readers[me] = outer or False
        try:
            return action(*args)
        finally:
            try:
                if outer is None:
                    del readers[me]
            finally:
                pass

    def give_way(self, me: int, outer: bool | None) -> None:
        """Leave the gate while another thread holds it alone, then enter again.

        A read nested in one that is in the gate goes on: the holder waits for the
        outer read.
        """
        while not outer and self.holder not in (None, me):
            self.readers[me] = False
            locked(self.lock, bool)
            self.readers[me] = True

    def is_pinned(self, txn: lmdb.Transaction[Any]) -> bool:
        for ref in list(self.pins.refs):
            pin = ref()
            if pin is not None and pin.txn is txn:
                return True
        return False

    def stop_iterators(self, source: object, owner: object = None) -> None:
        """Empty the chunks of the iterators of a closed `source` (and its `owner`)."""
        for one in self.iterators.all():
            if one.source is source and (owner is None or owner is one.owner):
                one.stop()

    def exclusive(
        self, timeout: float, notice: Action[None], action: Action[_R], *args: Any
    ) -> _R:
        """Call `action` when no thread is in the gate and all pins have copied out.

        The caller's thread is not in the gate. To move or close the map, it holds the
        write lock. If a read does not leave in time, a BusyError is raised.
        """
        if self.holder == get_ident():
            return action(*args)
        results: list[_R] = []
        attempt = partial(locked, self.lock, self._try_exclusive, results, action, args)
        # After a failed attempt the other readers read for a while.
        if not poll(attempt, timeout, SLICE, notice=notice):
            text = "A read in progress does not end, so the map can't be moved."
            raise BusyError(text)
        return results[0]

    def _try_exclusive(self, results: list[_R], action: Action[_R], args: Args) -> bool:
        self.holder = get_ident()
        try:
            if not self._drained():
                return False
            results.append(action(*args))
            return True
        finally:
            try:
                self.holder = None
            finally:
                pass

    def _drained(self) -> bool:
        """Wait a moment until no thread is in the gate, and make the pins copy out."""
        if not poll(lambda: True not in self.readers.values(), SLICE, 0.0001):
            return False
        for pin in self.pins.all():
            pin.copy_out()
        return True

    def pause(self) -> bool:
        """Keep all reads out until `resume`; return whether none is in, for a fork."""
        if not self.lock.acquire(timeout=SLICE):
            return False
        self.holder = get_ident()
        return self._drained()

    def resume(self) -> None:
        """Let reads in again. Undoes what an interrupt has left of `pause`, too."""
        if self.holder == get_ident():
            self.holder = None
        try:  # as in `locked`
            self.lock.release()
        except RuntimeError:
            pass  # an interrupt came before the lock was acquired

    def reset_in_child(self) -> None:
        """Begin anew in a child process made by fork.

        To end the transactions of the parent's readers would free slots in use.
        """
        for pin in self.pins.all():
            pin.forget()
        for iterator in self.iterators.all():
            iterator.leave_to_parent()
        self.readers = {}
        self.holder = None
        self.lock = RLock()
        self.pins = _InUse()
        self.iterators = _InUse()
