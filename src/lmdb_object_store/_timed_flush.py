"""When the pending writes of one store are flushed by themselves."""

from __future__ import annotations

import time
from collections.abc import Callable

from ._environment import Environment
from ._flusher import LONGEST_PAUSE, flusher
from ._locks import locked, try_locked
from ._writer import log

_BUSY_PAUSE = 0.05  # seconds until the next look whether others write


class TimedFlush:
    """The flushes of one store that come by themselves.

    Where nothing is watched, the buffer is refused the fast way of a put, by
    "unwatched": the write that comes next tells the flusher.
    """

    def __init__(
        self,
        environment: Environment,
        flush: Callable[[], None],
        interval: float | None,
    ) -> None:
        self._environment = environment
        self._writer = writer = environment.writer
        self._buffer = writer.buffer
        self._flush = flush  # as a writer, without waiting for snapshots
        self._buffer.watch = self._watch
        self.interval = interval

    @property
    def interval(self) -> float | None:
        """Seconds after which a write is flushed, None for never."""
        return self._interval

    @interval.setter
    def interval(self, value: float | None) -> None:
        self._interval = value
        self._pause = 0.0  # after a flush that has failed
        # When to try again, if the buffer still has as many removals.
        self._retry = 0.0, -1
        if value is None:
            self._buffer.allow("unwatched")
            return
        self._buffer.refuse("unwatched")
        if self._buffer.entries:
            locked(self._buffer.lock, self._buffer.watch_first)

    def _watch(self) -> bool:
        interval = self._interval
        return interval is not None and flusher.watch(self, interval)

    def flush(self) -> float | None:
        """Flush for the flusher; return seconds until the next look, None for never."""
        interval, buffer = self._interval, self._buffer
        if interval is None or self._environment.closed:
            return None
        retry, removals = self._retry
        if time.monotonic() < retry and buffer.removals == removals:
            return max(interval, _BUSY_PAUSE)  # what could not be flushed still waits
        flushed: list[bool] = []
        try:
            try_locked(self._writer.lock, 0, self._flush_at_once, flushed)
        except Exception as error:
            self._put_off(interval, error)
            return max(interval, _BUSY_PAUSE)
        finally:
            self._writer.log_lines()
        if not flushed:
            return _BUSY_PAUSE
        self._pause = 0.0
        if not buffer.unwatch():
            return interval
        if self._interval is None:  # it was set meanwhile
            buffer.allow("unwatched")
        return None

    def _flush_at_once(self, flushed: list[bool]) -> None:
        """Flush unless that would wait. Under the lock, so that no block begins."""
        if not self._writer.would_wait():
            self._flush()
            flushed.append(True)

    def _put_off(self, interval: float, error: Exception) -> None:
        """Try again after a pause that doubles, or when others have flushed."""
        longest = max(interval, LONGEST_PAUSE)
        self._pause = min(2 * (self._pause or interval), longest)
        self._retry = time.monotonic() + self._pause, self._buffer.removals
        text = "%s: %d pending writes wait for another flush in %g s: %s"
        count, path = len(self._buffer.entries), self._writer.path
        log.error(text, path, count, self._pause, error, exc_info=error)
