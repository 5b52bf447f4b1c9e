"""The open environments of this process, and what its end and its forks mean to them.

There is one for each data file. At exit all are flushed. Before a fork they come to
rest, that is no call of LMDB is running, and in the child they begin anew: each opens
its file again when it is first used.

Locks, in this order and before those of an environment: the *fork lock*, held by a
thread that forks, and the *registry lock*, by one that opens an environment.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any

from ._gate import SLICE, is_mine, under
from ._opening import identity_of
from .exceptions import BusyError, ReadersFullError

if TYPE_CHECKING:
    from ._environment import SharedEnvironment
    from ._lifecycle import Lifecycle

_WRITERS_SLICE = 0.001
"""Seconds after which a thread that forks looks again whether others still write.

It can't wait for the write lock: the thread that has it may wait for who forks.
"""
_PATIENCE = 10.0
"""Seconds that a fork waits for calls of LMDB to end."""


class Handle:
    """What an environment knows of a store that uses it: that it is alive."""

    __slots__ = ("__weakref__",)


# Guarded by the registry lock, but for removals. By `identity`.
_open: dict[object, SharedEnvironment] = {}
_registry_lock = RLock()
_making: set[str] = set()  # the data files that the lock's thread is opening
_exiting = False
_owner = os.getpid()  # the process whose these are
_hooked: int | None = None  # the process whose multiprocessing knows of us


def share(
    file: str,
    make: Callable[[], SharedEnvironment],
    handle: Handle,
    warn: bool,
    wanted: dict[str, Any],
    timeout: float,
) -> SharedEnvironment:
    """Return the environment of a data file, and enter a handle there.

    Parameters
    ----------
    file : str
        The path of the data file.
    make : callable
        Opens the environment, if it isn't open.
    handle : Handle
        The environment is closed when the last of these is gone, or leaves it.
    warn : bool
        Whether to warn if it has not left by then.
    wanted : dict
        The arguments of `lmdb.open` that an environment has to fit that is open.
    timeout : float
        Seconds to wait for a free reader slot, which LMDB needs to open a file, and
        for the end of a close.

    Raises
    ------
    ReadersFullError
        There is none.
    ValueError
        It doesn't fit.
    BusyError
        It is just being closed, and that does not end; or a child process can't
        open it.
    """
    deadline = time.monotonic() + timeout
    while True:
        env = _open.get(identity_of(file))
        try:
            if env is None:
                env = under(_registry_lock, _find_or_make, file, make, handle, warn)
        except ReadersFullError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(SLICE)  # without the lock: others open their files meanwhile
            continue
        if env.enter(handle, warn, wanted):
            return env
        env.await_close(deadline)


def _find_or_make(
    file: str, make: Callable[[], SharedEnvironment], handle: Handle, warn: bool
) -> SharedEnvironment:
    env = _open.get(identity_of(file))
    if env is not None:
        return env  # another thread was faster
    if any(file == other or _is_same(file, other) for other in _making):
        raise BusyError(
            f"{file!r} is being opened on this thread, which a signal handler or "
            "finalizer has interrupted. Open it there later."
        )
    try:
        _making.add(file)
        env = make()
    finally:
        try:  # as in Gate
            _making.discard(file)
        finally:
            pass
    env.enter(handle, warn, env.options)  # before it can be found
    _open[env.identity] = env
    if _exiting:
        env.write_through()
    _hook_multiprocessing()
    return env


def _is_same(file: str, other: str) -> bool:
    identity = identity_of(file)
    return identity is not None and identity == identity_of(other)


def unregister(env: Lifecycle) -> None:
    """Forget an `env` that is closed, or whose file is gone."""
    if _open.get(env.identity) is env:
        del _open[env.identity]


# Exit


def _hook_multiprocessing() -> None:
    # A child of multiprocessing ends without running atexit functions (3.10 to
    # 3.12), but runs its own finalizers. It forgets those that were registered
    # before its start, and then calls what was registered for that moment.
    util: Any = sys.modules.get("multiprocessing.util")
    if not hasattr(util, "Finalize") or _hooked == os.getpid():
        return  # it may be half imported
    util.register_after_fork(_flush_all, _hook)
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        _hook()
    else:
        _set_hooked()


def _hook(_: object = None) -> None:
    sys.modules["multiprocessing.util"].Finalize(None, _flush_all, exitpriority=0)
    _set_hooked()


def _set_hooked() -> None:
    global _hooked
    _hooked = os.getpid()


def _flush_all() -> None:
    global _exiting
    _exiting = True
    with ExitStack() as stack:  # calls all of them, whatever one raises
        for env in list(_open.values()):
            stack.callback(env.flush_at_exit)


# Fork

_fork_lock = RLock()
_forking: int | None = None  # the thread that forks: no other begins to write
_at_bar: list[SharedEnvironment] = []  # those that it keeps reads out of


def fork_is_near() -> bool:
    """Whether another thread is about to fork, so that this one must not write.

    Who writes says so, *then* looks here; who forks sets `_forking`, *then* looks
    for writers: one always sees the other.
    """
    return _forking is not None and _forking != get_ident()


def forks_here() -> bool:
    """Whether this thread is about to fork, and so must not wait for others.

    A finalizer or signal handler could, for who waits for the fork.
    """
    return _forking == get_ident()


def await_fork() -> None:
    """Wait until no other thread is about to fork."""
    with _fork_lock:
        pass


def _before_fork() -> None:
    """Bring all environments to rest, or as many as can be in a limited time.

    Nobody waits for transaction blocks and snapshots: who forks may be what their
    threads wait for, as with the manager threads of pools.
    """
    global _forking
    _hook_multiprocessing()  # which may have been imported since
    _fork_lock.acquire()
    _registry_lock.acquire(timeout=1)  # nothing is half opened, if that succeeds
    # If a signal handler forks in the midst of an operation, that won't go on.
    envs = [env for env in list(_open.values()) if not env.inside()]
    _forking = get_ident()
    deadline = time.monotonic() + _PATIENCE
    while not _all_rest(envs, time.monotonic() >= deadline):
        pass


def _all_rest(envs: list[SharedEnvironment], hurry: bool) -> bool:
    """Keep reads out of all environments, or of none.

    1. A finalizer, in the midst of a read of store 1, reads from store 2.
    2. That waits, as store 2 is at rest already.
    3. We would wait for the read of store 1 to end, and so for ourselves.
    """
    if not hurry and any(env.writes() for env in envs):
        time.sleep(_WRITERS_SLICE)
        return False
    for env in envs:
        _at_bar.append(env)
        env.at_rest = env.stop() and not env.writes()
    if hurry or all(env.at_rest for env in envs):
        return True
    _go_on()
    time.sleep(SLICE)  # reads go on, and so may what kept one of them
    return False


def _go_on() -> None:
    while _at_bar:
        env = _at_bar[-1]
        env.at_rest = False
        env.go_on()
        _at_bar.pop()


def _after_fork_in_parent() -> None:
    """Let others go on. Doing it again does what an interrupt has prevented."""
    global _forking
    if not is_mine(_fork_lock):
        return  # it is done
    _go_on()
    _forking = None
    with suppress(RuntimeError):  # it was not acquired
        _registry_lock.release()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    """Let all environments begin anew. May be called again, as in the parent."""
    global _forking, _fork_lock, _registry_lock, _owner
    if _owner == os.getpid():
        return
    _forking = None
    _fork_lock = RLock()
    _registry_lock = RLock()
    _at_bar.clear()
    _making.clear()
    for env in [env for env in _open.values() if not env.unsound]:
        try:
            env.begin_anew()
        except BaseException:
            env.give_up()
            raise
    _owner = os.getpid()


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
    for _ in range(3):
        # Python swallows a KeyboardInterrupt there, and goes on with the next.
        os.register_at_fork(
            after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
        )
