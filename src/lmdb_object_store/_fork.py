"""Forks: the rest of all stores before, and their new beginning in the child.

A store is *at rest* while no call of LMDB is running. In the child each store opens its
file again when it is first used. The *fork lock* is held by a thread that forks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from threading import RLock, get_ident
from typing import Any, Protocol

from ._flusher import flusher
from ._gate import SLICE, Gate
from ._locks import held_here, locked, poll

_PATIENCE = 10.0  # seconds that a fork waits for calls of LMDB to end


class Participant(Protocol):
    """A store, as a fork knows it."""

    gate: Gate
    writer: Any
    at_rest: bool
    unsound: bool

    def reset_in_child(self) -> None: ...
    def give_up(self) -> None: ...


class _Registry(Protocol):
    lock: RLock

    def participants(self) -> Sequence[Participant]: ...
    def hook_multiprocessing(self) -> None: ...
    def reset_in_child(self) -> None: ...


_lock = RLock()
forking: int | None = None
"""The thread that is about to fork: no other begins to write.

A writer enters itself, *then* looks here; a thread that forks enters itself here,
*then* looks for writers: one always sees the other. Finalizers and signal handlers of
this thread wait for no other, as that may wait for the fork.
"""
_paused: list[Participant] = []  # those whose gates it has paused
_owner = os.getpid()  # the process whose all this is


def await_fork() -> None:
    """Wait until no other thread is about to fork."""
    locked(_lock, bool)


def arrange(registry: _Registry) -> None:
    """Take part in all forks of this process."""
    if hasattr(os, "register_at_fork"):
        in_parent = partial(_after_in_parent, registry)
        in_child = partial(_after_in_child, registry)
        os.register_at_fork(before=partial(_before_fork, registry))
        for _ in range(3):
            # Python swallows a KeyboardInterrupt there, and goes on with the next.
            os.register_at_fork(after_in_parent=in_parent, after_in_child=in_child)


def _before_fork(registry: _Registry) -> None:
    """Bring all stores to rest, or as many as can be in a limited time.

    Waits for no transaction block and no snapshot: their threads may wait for this
    one, as with the manager threads of pools.
    """
    global forking
    registry.hook_multiprocessing()  # which may have been imported since
    _lock.acquire()
    registry.lock.acquire(timeout=1)  # no file is half opened, if that succeeds
    # If a signal handler forks in the midst of an operation, that won't go on.
    known = registry.participants()
    stores = [one for one in known if not one.writer.interrupted_here()]
    # Before others wait for the fork. A flush might wait for what is interrupted.
    began = time.monotonic()
    flusher.rest(_PATIENCE, len(stores) == len(known))
    forking = get_ident()
    left = began + _PATIENCE - time.monotonic()
    if not poll(partial(_all_rest, stores), left, 0):
        _pause(stores)


def _all_rest(stores: list[Participant]) -> bool:
    """Keep reads out of all stores, or of none.

    1. A finalizer, in the midst of a read of store 1, reads from store 2.
    2. That read waits, as store 2 is at rest already.
    3. The fork would wait for the read of store 1 to end, and so for itself.
    """
    # Not by the write lock: its holder may wait for the thread that forks.
    writers = [one.writer for one in stores]
    if not poll(lambda: not any(w.is_writing() for w in writers), SLICE, 0.001):
        return False
    if _pause(stores):
        return True
    _resume()
    # Reads go on for a while, and so may the read that kept a store from its rest.
    time.sleep(SLICE)
    return False


def _pause(stores: list[Participant]) -> bool:
    for one in stores:
        _paused.append(one)
        one.at_rest = one.gate.pause() and not one.writer.is_writing()
    return all(one.at_rest for one in stores)


def _resume() -> None:
    while _paused:
        one = _paused[-1]
        one.at_rest = False
        one.gate.resume()
        _paused.pop()


def _after_in_parent(registry: _Registry) -> None:
    """Let others go on; a second call does the rest that an interrupt has prevented."""
    global forking
    if not held_here(_lock):
        return  # it is done
    _resume()
    forking = None
    with suppress(RuntimeError):  # it was not acquired
        registry.lock.release()
    flusher.resume()
    _lock.release()


def _after_in_child(registry: _Registry) -> None:
    """Let all stores begin anew. May be called again, as in the parent."""
    global forking, _lock, _owner
    if _owner == os.getpid():
        return
    forking = None
    _lock = RLock()
    registry.reset_in_child()
    flusher.reset_in_child()
    _paused.clear()
    for one in [one for one in registry.participants() if not one.unsound]:
        try:
            one.reset_in_child()
        except BaseException:
            one.give_up()
            raise
    _owner = os.getpid()
