"""The queue of processes that wait to write, before LMDB's own lock.

On Linux that lock is a robust mutex. It can lose a wake-up when a process is killed:

1. Processes 1 and 2 wait for the mutex. Process 3 unlocks it, which wakes process 1.
2. Process 3 locks it again. The mutex says now that no process waits.
3. Process 1 is killed before it has run. The kernel finds the mutex locked by another
   process, and wakes no other.
4. Process 3 unlocks the mutex, sees no waiter, and wakes none. Process 2 goes on only
   when another one has had to wait as well: never, if it is the last.

(`handle_futex_death` in Linux's kernel/futex/core.c wakes another waiter only if the
mutex is free or its owner is dead.) So one process at a time waits for the mutex: the
one that has its turn, which is a POSIX lock on the data file. That lock ends with its
process, and a forked child does not inherit it. LMDB locks no part of the data file. A
lock on the lock file would not do: to close any descriptor of that file would end the
locks that LMDB has there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ._locks import poll

if sys.platform == "linux":
    from fcntl import F_DUPFD_CLOEXEC, LOCK_EX, LOCK_NB, LOCK_UN, fcntl, lockf

_R = TypeVar("_R")

_PATIENCE = 5.0
"""Seconds after which a writer goes on without its turn.

Two processes may wait for the mutex then, as if there was no queue. But the one whose
turn it is may have been stopped, or may wait for a lock that this thread holds.
"""
_AT = 2**62  # the byte that is locked, which no file has


class WriterQueue:
    """The queue for the data file `path`, as one process sees it.

    Where the file can't be locked, a writer does without. So it does when this process
    closes another descriptor of the file meanwhile, which ends the lock.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1

    def begin(
        self, begin: Callable[[None, None, bool], _R], notice: Callable[[], None]
    ) -> _R:
        """Return the write transaction that `begin` begins when its turn has come.

        Call this under the write lock. Costs two calls of the system if no other
        process writes. Calls `notice` once if the wait is long.
        """
        if sys.platform != "linux":
            return begin(None, None, True)
        try:
            if not self._has_turn():
                poll(self._has_turn, _PATIENCE, 0.00005, 0.005, notice)
            return begin(None, None, True)  # kept in no variable: see `locked`
        finally:
            try:
                if self._descriptor >= 0:
                    lockf(self._descriptor, LOCK_UN, 1, _AT)
            except OSError as error:
                _raise_if_foreign(error)

    def _has_turn(self) -> bool:
        """Take the turn if it is free; return False if another process has it."""
        try:
            if self._descriptor < 0:
                self._open()
            lockf(self._descriptor, LOCK_EX | LOCK_NB, 1, _AT)
        except BlockingIOError:
            return False
        except OSError as error:
            _raise_if_foreign(error)
        return True

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            # Not 0 to 2, if these are free: what a program prints would overwrite the
            # file.
            self._descriptor = fcntl(descriptor, F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give the descriptor back. The next transaction opens the file again.

        A child made by fork does so at once: a program that closes all descriptors in
        the child could open another file under the number.
        """
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                os.close(descriptor)


def _raise_if_foreign(error: OSError) -> None:
    """Raise what a signal handler has raised, a TimeoutError perhaps."""
    if error.errno is None:
        raise error
