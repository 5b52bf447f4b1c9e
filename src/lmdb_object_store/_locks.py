"""How this package takes locks and waits, so that Ctrl-C leaves no lock held.

CPython runs signal handlers in the main thread, at the end of a call (of a function in
C, too), at the start of a function written in Python, and at a jump backwards. A run
of bytecodes without these is one step for signal handlers and finalizers. A handler
can raise, as Ctrl-C does. The versions differ:

- 3.10: also at a conditional jump that is taken, and where an exception arrives at a
  handler, before the handler's first instruction. The ``__exit__`` of a ``with`` is
  such a handler: it can be skipped. The start of a ``try`` is exempt. Hence the
  ``try:`` at the start of each ``finally:`` that must run.
- 3.13: a signal at the end of the ``if`` of a loop escapes the ``with`` or ``try``
  around the loop. Such loops have functions of their own.
- 3.14: ``with lock:`` calls ``__enter__`` by a call that looks for signals when it
  ends, before the block is protected (python/cpython#148874). A KeyboardInterrupt
  there leaves the lock held for good.

So no lock is taken by ``with``. `locked` and `try_locked` take all of them, except in
`SnapshotSource.fetch`, to save the calls, and in `Gate.pause` and the handlers of
`_fork`, which keep locks over a fork. And all that must be undone is begun and ended in
one function, which gets the work in between as a callable: a context manager written in
Python can be interrupted when it has entered and its block has not begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any, TypeVar, cast

_R = TypeVar("_R")
Method = TypeVar("Method", bound=Callable[..., Any])
Action = Callable[..., _R]
Args = tuple[Any, ...]

NOTICE = 1.0  # seconds after which a wait is logged


def held_here(lock: RLock) -> bool:
    """Return whether this thread, or the code that it interrupts, holds `lock`."""
    # Private, but threading.Condition relies on it as well.
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def locked(lock: RLock, action: Action[_R], *args: Any) -> _R:
    """Call `action` under `lock`.

    The result is kept in no variable: it may be a transaction, and the traceback of
    a KeyboardInterrupt that comes before the end would keep the transaction open.
    """
    if lock._is_owned():  # type: ignore[attr-defined]  # as `held_here`
        return action(*args)
    try:
        lock.acquire()
        return action(*args)
    finally:
        # Whether the lock was acquired is not asked: an interrupt could come between
        # the answer and the release.
        try:
            lock.release()
        except RuntimeError:
            pass  # an interrupt came before the lock was acquired


def under_lock(method: Method) -> Method:
    """Run a method under the `lock` of its object."""

    @wraps(method)
    def call_locked(self: Any, *args: Any) -> Any:
        return locked(self.lock, method, self, *args)

    return cast("Method", call_locked)


def try_locked(lock: RLock, timeout: float, action: Action[Any], *args: Any) -> bool:
    """Call `action` under `lock`; return False if others hold it for `timeout` s."""
    try:
        if not lock.acquire(timeout=timeout):
            return False
        action(*args)
        return True
    finally:
        try:  # as in `locked`
            lock.release()
        except RuntimeError:
            pass  # others held it to the end


def poll(
    ready: Callable[[], bool],
    timeout: float,
    pause: float,
    longest: float = 0,
    notice: Callable[[], None] | None = None,
) -> bool:
    """Wait until `ready` returns True; return False after `timeout` seconds.

    Looks again after `pause` seconds, then after twice as many, up to `longest`. Calls
    `notice` once if that takes longer than `NOTICE` seconds. No thread signals the
    event: a Condition could leave its lock held when an interrupt hits it, and the
    event may be another process's, or come by an interrupt or finalizer in any thread.
    """
    began = time.monotonic()
    while not ready():
        waited = time.monotonic() - began
        if waited >= timeout:
            return False
        if notice is not None and waited >= NOTICE:
            notice()
            notice = None
        time.sleep(pause)
        pause = min(2 * pause, max(pause, longest))
    return True
