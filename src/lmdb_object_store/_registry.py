"""The open stores of this process: one for each data file, until its last user leaves.

At exit all are flushed.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Protocol

from . import _fork
from ._buffer import WriteBuffer
from ._files import SLOT_PAUSE, identity_of, readers_full_error
from ._flusher import flusher
from ._locks import locked, poll, under_lock
from ._writer import warn_elsewhere
from .exceptions import BusyError, ReadersFullError

_PATIENCE = 1.0  # seconds that the end of the process waits for the flusher's


class Handle:
    """Lives as long as a store object."""

    __slots__ = ("__weakref__",)


Ref = weakref.ref[Handle]


class Users:
    """The store objects that use a shared store.

    Guarded by the lock of the store's buffer. `lost` is called with an object that
    was garbage-collected.
    """

    def __init__(self, buffer: WriteBuffer, lost: Callable[[Ref], None]) -> None:
        self._buffer = buffer
        self._lost = lost
        self.handles: dict[Ref, bool] = {}  # True: warn if it doesn't leave

    @property
    def lock(self) -> RLock:
        return self._buffer.lock

    @under_lock
    def enter(self, handle: Handle, warn: bool) -> bool:
        """Let one more object use the store; return False if the store is closing."""
        if "closing" in self._buffer.refusals:
            return False
        self.handles[weakref.ref(handle, self._lost)] = warn
        return True

    def only(self, handle: Ref) -> bool:
        """Return whether no other object uses the store."""
        return self.handles.keys() <= {handle}

    @under_lock
    def close_after(self, handle: Ref) -> bool:
        """Let the store close if no other object uses it; return whether it does."""
        buffer = self._buffer
        if self.handles.keys() <= {handle}:
            # Directly after that: a signal handler could let another object enter.
            buffer.refusals.add("closing")
            buffer.accepts = False
        return "closing" in buffer.refusals

    @under_lock
    def leave(self, handle: Ref) -> None:
        self.handles.pop(handle, None)

    @under_lock
    def leave_others(self, handle: Ref) -> bool:
        """Forget an object unless it is the last one; return whether it was not."""
        if self.only(handle):
            return False
        self.handles.pop(handle, None)
        return True


class Shared(_fork.Participant, Protocol):
    """The shared store of a data file, as the registry knows it."""

    environment: Any
    users: Users

    def enter(self, handle: Handle, warn: bool, wanted: dict[str, Any]) -> bool: ...
    def await_close(self, deadline: float) -> None: ...
    def write_through(self) -> None: ...
    def flush_at_exit(self) -> None: ...


_Found = tuple[Shared, bool]  # whether the handle has entered the store


class Opening(NamedTuple):
    """A store object that opens a data file."""

    file: str
    make: Callable[[], Any]  # opens the file, if it isn't open
    handle: Handle  # the store is closed when the last of its handles is gone
    warn: bool  # whether to warn if the handle is gone and has not left
    options: dict[str, Any]  # arguments of `lmdb.open` that an open store has to fit
    timeout: float  # seconds to wait for a free reader slot, or the end of a close


class Registry:
    """The open stores, by the identity of their files."""

    def __init__(self) -> None:
        self.lock = RLock()  # held by a thread that opens an environment
        # Guarded by the lock, but for removals.
        self._stores: dict[object, Shared] = {}
        self._opening: set[str] = set()  # the data files that the lock's thread opens
        self._exiting = False
        self._hooked: int | None = None  # process whose multiprocessing knows of this
        self._in_celery = False  # whether Celery does; children inherit that

    def share(self, opening: Opening) -> Any:
        """Return the store of a data file, and enter a handle there."""
        deadline = time.monotonic() + opening.timeout
        while True:
            found: list[_Found] = []
            if not self._find(found, opening):
                self._await_slot(found, opening, deadline)
            store, entered = found[0]
            if entered or store.enter(opening.handle, opening.warn, opening.options):
                return store
            store.await_close(deadline)

    def _await_slot(
        self, found: list[_Found], opening: Opening, deadline: float
    ) -> None:
        text = "%s: opening waits for a free reader slot"
        notice = partial(warn_elsewhere, text, opening.file)
        ready = partial(self._find, found, opening)
        left = deadline - time.monotonic()
        if not poll(ready, left, SLOT_PAUSE, notice=notice):
            raise readers_full_error(opening.file)

    def _find(self, found: list[_Found], opening: Opening) -> bool:
        """Find the store, or make it; return False if no reader slot is free."""
        store = self._stores.get(identity_of(opening.file))
        try:
            if store is None:
                found.append(locked(self.lock, self._find_or_make, opening))
            else:
                found.append((store, False))
        except ReadersFullError:
            return False  # waits without the lock: others open their files meanwhile
        return True

    def _find_or_make(self, opening: Opening) -> _Found:
        file = opening.file
        identity, others = identity_of(file), self._opening
        found = self._stores.get(identity)
        if found is not None:
            return found, False  # another thread was faster
        if file in others or (identity and identity in map(identity_of, others)):
            raise BusyError(
                f"{file!r} is being opened on this thread, which a signal handler or "
                "finalizer has interrupted. Open it there later."
            )
        try:
            self._opening.add(file)
            store: Shared = opening.make()
        finally:
            try:
                self._opening.discard(file)
            finally:
                pass
        store.users.enter(opening.handle, opening.warn)  # before others can find it
        self._stores[store.environment.identity] = store
        if self._exiting:
            store.write_through()
        self._hook_process()
        return store, True

    def forget(self, environment: Any) -> None:
        """Forget the store of an environment that is closed, or whose file is gone."""
        store = self._stores.get(environment.identity)
        if store is not None and store.environment is environment:
            del self._stores[environment.identity]

    def hook_multiprocessing(self) -> None:
        """Prepare for child processes that will be made by fork."""
        if "billiard.process" in sys.modules:
            # Its children import this themselves, but after the fork, so that they
            # would know nothing of the stores that they inherit.
            import multiprocessing.util  # noqa: F401
        self._hook_process()

    def _hook_process(self) -> None:
        # A worker of Celery's pool runs nothing at its end but what has asked for this.
        signals: Any = sys.modules.get("celery.signals")
        if hasattr(signals, "worker_process_shutdown") and not self._in_celery:
            self._in_celery = True
            signals.worker_process_shutdown.connect(self._end_worker, weak=False)
        # A child of multiprocessing runs no atexit functions (on 3.10 to 3.12), but its
        # own finalizers. It forgets those that were registered before its start, and
        # then calls the functions registered for that moment. A child of billiard,
        # which Celery uses, does all that by the functions of multiprocessing.
        util: Any = sys.modules.get("multiprocessing.util")
        if not hasattr(util, "Finalize") or self._hooked == os.getpid():
            return  # it may be half imported
        util.register_after_fork(self, Registry._hook)
        # Not parent_process(): billiard sets the current process only.
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.current_process()._parent_pid is not None:
            self._hook()
        else:
            self._hooked = os.getpid()

    def _hook(self) -> None:
        util = sys.modules["multiprocessing.util"]
        util.Finalize(None, self.flush_all, exitpriority=0)
        self._hooked = os.getpid()

    def _end_worker(self, **_: object) -> None:
        self.flush_all()

    def flush_all(self) -> None:
        """Flush all stores, as the process is about to end."""
        try:
            self._flush_all()
        except BaseException:  # a signal, say: what it has ended must be done again
            self._flush_all()
            raise

    def _flush_all(self) -> None:
        self._exiting = True
        with ExitStack() as stack:  # calls all of them, even if one raises
            stack.callback(flusher.rest, _PATIENCE, False)
            for store in self.participants():
                stack.callback(store.flush_at_exit)

    def participants(self) -> list[Shared]:
        return list(self._stores.values())

    def reset_in_child(self) -> None:
        """Keep the same stores in a child process made by fork."""
        self.lock = RLock()
        self._opening.clear()


registry = Registry()
atexit.register(registry.flush_all)
_fork.arrange(registry)
