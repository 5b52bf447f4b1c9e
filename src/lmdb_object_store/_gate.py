"""The gate: reads pass it together; growth, adoption and close hold it alone.

LMDB's map can't be moved or unmapped while a transaction is open on it, so
whoever does that must know that no read is in the map. Two kinds of reader are
told apart:

- A thread *in the gate* has a transaction or a view of the map in its hands. It
  calls none of the user's code there (but may be interrupted by a signal handler
  or a finalizer), so it leaves within microseconds, and who wants the gate alone
  waits for it.
- A `Pin` outlives one passage: the value being unpickled piece by piece, the
  keys of one `get_many`. User code runs meanwhile, for as long as it likes, so
  nobody waits for a pin: who has the gate alone makes it *detach*, that is copy
  what it still needs, and it goes on from the copy.
"""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import RLock, get_ident
from typing import Any, TypeVar

import lmdb

from .exceptions import BusyError

_R = TypeVar("_R")

SLICE = 0.05
"""Seconds for which readers are kept out while one of them does not leave."""


def under(lock: RLock, action: Callable[..., _R], *args: Any) -> _R:
    """Call `action` under a lock.

    No exception crosses the ``with``, where a signal could make 3.10 skip its end.
    """
    with lock:
        try:
            # Not kept in a variable: the traceback of a KeyboardInterrupt that comes
            # before the end would keep it, too, and it may be a transaction.
            return action(*args)
        except BaseException as error:
            failure = error
    try:
        raise failure
    finally:
        del failure  # it refers to this frame


def is_mine(lock: RLock) -> bool:
    """Whether this thread holds a lock, as it does if it has been interrupted there."""
    # Private, but what threading.Condition relies on as well.
    return bool(lock._is_owned())  # type: ignore[attr-defined]


class Pin(ABC):
    """A read that spans several passages of the gate. Weakly known to the gate."""

    __slots__ = ("__weakref__", "txn")

    def __init__(self, txn: lmdb.Transaction[Any] | None = None) -> None:
        self.txn = txn  # None once it is detached or released

    @abstractmethod
    def detach(self) -> None:
        """Copy what is still needed out of the map, and end the transaction.

        Called by whoever holds the gate alone; calling it again does nothing.
        """

    def release(self) -> None:
        """Let go of the transaction."""
        self.txn = None

    def end(self) -> None:
        """End the transaction, whoever else refers to it. Call it in the gate.

        The traceback of a KeyboardInterrupt does, and interactive Python keeps the
        last one: LMDB could not use the pages again that the transaction shows.
        """
        if self.txn is not None:
            self.txn.abort()


class Gate:
    """Who reads, and who wants no reads.

    A reader enters itself in `readers`, *then* looks at `barred`; who wants the
    gate alone sets `barred`, *then* looks at `readers`: one always sees the other.

    Entering is ``readers[me] = ...`` directly followed by ``try:``, and leaving
    the first statement of its ``finally:``. CPython (3.10 and later) delivers
    signals at calls and backward jumps only, so no KeyboardInterrupt can come
    between, and no reader stays counted. For the same reason the functions here
    take the work as a callable: a context manager written in Python could be
    interrupted between having entered and the start of its block.

    CPython 3.10 delivers signals also at conditional jumps, and when an exception
    arrives at a handler, before the handler's first instruction (``__exit__`` of a
    ``with`` included) unless that is the start of a ``try``. Hence the ``try:`` at
    the start of each ``finally:`` that must run; for locks see `under`. In 3.13 a
    signal at the end of a loop's ``if`` escapes the ``with`` or ``try`` around it:
    such loops have functions of their own.
    """

    def __init__(self) -> None:
        # Threads that read: True in the gate, False while they run user code.
        self.readers: dict[int, bool] = {}
        # The thread that holds the gate alone.
        self.barred: int | None = None
        # Whether to expect large values: if not, reads are spared a memoryview.
        self.large_seen = False
        # Held while barred, for readers to wait on.
        self._bar = RLock()
        self._pins: set[weakref.ref[Pin]] = set()

    def in_gate(self, action: Callable[..., _R], *args: Any) -> _R:
        """Call `action`, a read that has the map in its hands, and no user code."""
        readers = self.readers
        me = get_ident()
        outer = readers.get(me)
        readers[me] = True
        try:
            if self.barred is not None:
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

    def outside_gate(self, action: Callable[..., _R], *args: Any) -> _R:
        """Call `action`, a read that may run user code, and count it as one."""
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
        """Leave the gate while somebody else holds it alone, then enter again.

        A read nested in one that is in the gate (a signal handler's, say) goes
        on: the holder is still waiting for the outer one.
        """
        while not outer and self.barred not in (None, me):
            self.readers[me] = False
            with self._bar:
                pass
            self.readers[me] = True

    def pin(self, pin: Pin) -> None:
        """Make `pin` detach before the map moves.

        Call it in the gate if it has a transaction.
        """
        self._pins.add(weakref.ref(pin, self._pins.discard))

    def pins(self) -> list[Pin]:
        """Return the pins that are still in use."""
        return [pin for ref in list(self._pins) if (pin := ref()) is not None]

    def alone(self, timeout: float, action: Callable[..., _R], *args: Any) -> _R:
        """Call `action` when no thread is in the gate and all pins are detached.

        The caller's thread is not in the gate. To move the map or to close it, it
        holds the write lock.

        Raises
        ------
        BusyError
            A read did not leave within `timeout` seconds.
        """
        if self.barred == get_ident():
            return action(*args)
        deadline = time.monotonic() + timeout
        results: list[_R] = []
        while not under(self._bar, self._try_alone, results, action, args):
            if time.monotonic() > deadline:
                raise BusyError(
                    "A read in progress does not end, so the map can't be moved."
                )
            time.sleep(SLICE)  # a reader is stuck: let the others read
        return results[0]

    # A fork, in which no call of LMDB may be running

    def stop(self) -> bool:
        """Keep all reads out until `go_on`; return whether none is in.

        As in `alone`, pins are detached.
        """
        if not self._bar.acquire(timeout=SLICE):
            return False
        self.barred = get_ident()
        if not self._drained():
            return False
        for pin in self.pins():
            pin.detach()
        return True

    def go_on(self) -> None:
        """Let reads in again. Undoes what an interrupt has left of `stop`, too."""
        if self.barred == get_ident():
            self.barred = None
        try:  # asking first would leave room for an interrupt
            self._bar.release()
        except RuntimeError:
            pass  # it was not acquired

    def _try_alone(
        self, results: list[_R], action: Callable[..., _R], args: tuple[Any, ...]
    ) -> bool:
        self.barred = get_ident()
        try:
            if not self._drained():
                return False
            for pin in self.pins():
                pin.detach()
            results.append(action(*args))
            return True
        finally:
            try:
                self.barred = None
            finally:
                pass

    def _drained(self) -> bool:
        deadline = time.monotonic() + SLICE
        while True in self.readers.values():
            if time.monotonic() > deadline:
                return False
            # Not a Condition: an interrupt can leave that one's lock held.
            time.sleep(0.0001)
        return True
