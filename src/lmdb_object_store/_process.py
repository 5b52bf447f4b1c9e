"""The open environments of this process, and what its end and its forks mean to them.

At exit all are flushed. A child made by fork gives up what it inherits.
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from .exceptions import BusyError

if TYPE_CHECKING:
    from ._environment import SharedEnvironment

_open: dict[int, SharedEnvironment] = {}
_inherited: list[SharedEnvironment] = []  # the parent's
_exiting = False
_hooked: int | None = None  # the process whose multiprocessing knows of us


def register(env: SharedEnvironment) -> None:
    """Take care of `env` until `unregister`."""
    _open[id(env)] = env
    if _exiting:
        env.write_through()
    # A child of multiprocessing ends without running atexit functions (3.10 to
    # 3.12), but runs its own finalizers. It forgets those that were registered
    # before its start, and then calls what was registered for that moment.
    util = sys.modules.get("multiprocessing.util")
    if util is None or _hooked == os.getpid():
        return
    if sys.modules["multiprocessing.process"].parent_process() is None:
        util.register_after_fork(_flush_all, _hook)
        _set_hooked()
    else:
        _hook()


def unregister(env: SharedEnvironment) -> None:
    """Forget a closed `env`."""
    _open.pop(id(env), None)


def let_go(identity: tuple[int, int] | None) -> None:
    """Close what was inherited of a data file, so that it can be opened here.

    py-lmdb opens no file twice. Not done at the fork: closing frees the reader
    slots of the parent's own transactions, and most children don't use the store.

    Raises
    ------
    BusyError
        That would do harm to the parent.
    """
    for env in _inherited:
        if env.identity == identity:
            if not env.at_rest:
                raise BusyError(
                    f"This process was forked in the middle of an operation, or in a "
                    f"transaction block, of the store at {env.path!r} and can't open "
                    "it. Fork at another time, or start the process by spawn."
                )
            env.env.close()


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


def _disinherit_all() -> None:
    for env in _open.values():
        env.disinherit()
    _inherited.extend(_open.values())
    _open.clear()


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disinherit_all)
