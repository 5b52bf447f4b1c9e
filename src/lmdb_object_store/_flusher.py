"""The thread that flushes pending writes when they have waited for long enough.

One daemon thread serves all stores of the process. A store is *watched* from its first
pending write on, until the thread finds nothing pending there. Before a fork the thread
flushes and ends: so the child has no half of it, and Python finds no second thread, as
the thread need not be started again at once.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from math import inf
from threading import RLock, Thread, get_ident
from typing import Protocol

from ._locks import held_here, locked, poll

LONGEST_PAUSE = 60.0  # seconds until the next try of a flush that failed
_LONGEST_SLEEP = 3600.0  # seconds, far below what threading.TIMEOUT_MAX can be
_JOIN = 1.0  # seconds that a fork waits until Python has forgotten the thread
_GONE = 0.05  # seconds that a fork waits until the system has removed the thread


class Timed(Protocol):
    """The flushes of one store, as the flusher knows them."""

    def flush(self) -> float | None:
        """Flush; return the seconds until the next look, None for never."""


class Flusher:
    """Watches stores, and flushes each when its interval is over.

    The thread sets `_wake_at` to infinity, *then* looks when stores are due; `watch`
    sets when a store is due, *then* looks at `_wake_at`: one always sees the other.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # held while a thread is started; a leaf
        self._thread: Thread | None = None  # resets this when it ends
        self._due: dict[Timed, float] = {}  # by time.monotonic(), of all watched
        self._wake_at = 0.0  # when the thread looks again by itself
        self._signal = threading.Lock()  # released to wake the thread
        self._resting = False  # whether no thread is to run
        self._flushes_last = False  # whether the thread flushes before it rests

    def _start(self) -> None:
        # A signal handler in the midst of that starts no second thread.
        locked(self._lock, bool if held_here(self._lock) else self._start_thread)

    def _start_thread(self) -> None:
        if self._runs() or self._resting:
            return
        name = "lmdb-object-store flusher"
        thread = self._thread = Thread(target=self._run, name=name, daemon=True)
        with suppress(RuntimeError):  # there are too many threads, or this one ends
            thread.start()

    def _runs(self) -> bool:
        # Not is_alive(): an interrupt in it makes a running thread look ended, before
        # Python 3.13. An interrupt can leave a thread that was never started.
        thread = self._thread
        return thread is not None and thread.ident is not None

    def is_flusher(self, thread: int | None) -> bool:
        """Return whether this is the number of the thread that flushes."""
        flusher = self._thread if thread is not None else None
        return flusher is not None and flusher.ident == thread

    def watch(self, timed: Timed, interval: float) -> bool:
        """Flush when the interval is over; return False if no thread can do so."""
        due = time.monotonic() + interval
        self._due[timed] = min(due, self._due.get(timed, inf))
        self._start()
        if due < self._wake_at:
            self._wake()
        return self._runs()

    def forget(self, timed: Timed) -> None:
        """Watch no more, as the store is closed."""
        self._due.pop(timed, None)

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the thread is about to look, anyway
            self._signal.release()

    def _run(self) -> None:
        me = threading.current_thread()
        try:
            resting = False
            while self._thread is me and not resting:
                resting = self._resting  # before the last look
                self._wake_at = inf
                if not resting or self._flushes_last:
                    self._flush_due()
                self._wake_at = min(self._due.copy().values(), default=inf)
                resting = resting and self._resting  # a fork may not have waited
                if not resting:
                    left = max(0.0, self._wake_at - time.monotonic())
                    self._signal.acquire(timeout=min(left, _LONGEST_SLEEP))
        finally:
            self._thread = None if self._thread is me else self._thread

    def _flush_due(self) -> None:
        for timed, due in self._due.copy().items():
            if due <= time.monotonic():
                self._flush(timed)

    def _flush(self, timed: Timed) -> None:
        # Before the flush: a write that comes after the flush sets its own time.
        self._due.pop(timed, None)
        try:
            pause = timed.flush()
        except BaseException:  # SystemExit of a logging handler, say
            pause = LONGEST_PAUSE
        if pause is not None:
            self._due.setdefault(timed, time.monotonic() + pause)

    def rest(self, timeout: float, flush: bool) -> None:
        """End the thread, and start none before `resume`.

        With `flush` the thread flushes all watched stores before, but those where that
        has just failed. Waits for its end for `timeout` seconds at most.
        """
        thread = locked(self._lock, self._rest, flush)
        if thread is None or thread.ident in (None, get_ident()):
            return
        self._wake()
        if poll(lambda: self._thread is not thread, timeout, 0.0001, 0.002):
            # Not for ever: a signal handler that forks may have interrupted
            # threading.enumerate(), whose lock the thread takes at its end.
            thread.join(_JOIN)
            # On Linux before 3.13 that is not yet the end of the system's thread.
            early = sys.platform == "linux" and sys.version_info < (3, 13)
            task = f"/proc/self/task/{thread.native_id}"
            poll(lambda: not (early and os.path.exists(task)), _GONE, 0.0001)

    def _rest(self, flush: bool) -> Thread | None:
        if flush:
            self._due.update(dict.fromkeys(self._due.copy(), 0.0))
        self._flushes_last = flush
        self._resting = True
        return self._thread

    def resume(self) -> None:
        """Let the thread run again, if there is something to be flushed."""
        self._resting = False
        if self._due:
            self._start()

    def reset_in_child(self) -> None:
        """Begin anew in a child process made by fork, where nothing is pending."""
        self._lock = RLock()
        self._thread = None
        self._due = {}
        self._signal = threading.Lock()
        self._resting = False


flusher = Flusher()
