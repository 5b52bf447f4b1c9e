"""Data files: telling them apart, opening them durably, and comparing two openings."""

from __future__ import annotations

import errno
import os
from typing import Any

import lmdb

from ._locks import poll
from .exceptions import DiskError, ReadersFullError

Identity = tuple[int, int] | str
"""Tells one data file from another, however its path is spelled."""

_ATTEMPTS = 100
"""How often to open a file that another process makes larger at each attempt."""
SLOT_PAUSE = 0.05
"""Seconds after which to look again for a free reader slot."""

_DEFAULTS: dict[str, Any] = {  # of lmdb.open(), as its documentation gives them
    **dict.fromkeys(("metasync", "sync", "readahead", "meminit", "lock"), True),
    **dict.fromkeys(("map_async", "writemap"), False),
    "max_readers": 126,
    "max_dbs": 0,
}
_OF_A_HANDLE = {"readonly", "map_size", "subdir"}
_OF_A_NEW_FILE = {"create", "mode", "max_spare_txns"}
_PROMISED = {"metasync", "sync", "map_async"}
"""A store that can be written to is promised these, unless it asks for less."""


def data_path(path: str, options: dict[str, Any]) -> str:
    return os.path.join(path, "data.mdb") if options.get("subdir", True) else path


def identity_of(file: str) -> Identity | None:
    """Return the identity of `file`, None if there is no such file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    if status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.normcase(os.path.realpath(file))  # a file system without numbers


def open_environment(
    path: str, options: dict[str, Any], timeout: float = 0
) -> lmdb.Environment:
    """Open an environment, and clear the reader slots of dead processes.

    A new file is on disk then, with the entry of its directory. LMDB wants a free
    reader slot: raises `ReadersFullError` if there is none for `timeout` seconds.
    """
    env = _open(path, options, timeout)
    try:
        env.reader_check()
        if not options.get("readonly") and not env.info()["last_txnid"]:
            _sync_directories(path, options)
            env.sync(True)  # after them: on macOS it empties the disk's own cache
    except BaseException:
        env.close()
        raise
    return env


def _open(path: str, options: dict[str, Any], timeout: float) -> lmdb.Environment:
    opened: list[lmdb.Environment] = []
    if not poll(lambda: _has_opened(path, options, opened), timeout, SLOT_PAUSE):
        raise readers_full_error(path)
    return opened[0]


def _has_opened(
    path: str, options: dict[str, Any], opened: list[lmdb.Environment]
) -> bool:
    attempts = 0
    while not opened:
        try:
            opened.append(lmdb.open(path, **options))
        except lmdb.ReadersFullError:
            return False
        except lmdb.MapResizedError:  # by another process, at this moment
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
    return True


def readers_full_error(path: str) -> ReadersFullError:
    return ReadersFullError(
        f"All reader slots of {path!r} are taken. A read takes one for a moment, a "
        "snapshot for as long as it is open. Close snapshots sooner, or end all "
        "processes that use the file and open it with a larger max_readers. (Slots of "
        "processes that were killed can be cleared only by one that has the file "
        "open: it does so when it reads and finds none free.)"
    )


def _sync_directories(path: str, options: dict[str, Any]) -> None:
    """Make the entries of a new data file, and of its directory, durable."""
    file = os.path.realpath(data_path(path, options))
    for directory in {os.path.dirname(file), os.path.dirname(os.path.realpath(path))}:
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except PermissionError:  # always so on Windows, where NTFS takes care
            continue
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # can't be done there
                raise DiskError(f"{directory!r} can't be synced: {error}") from error
        finally:
            os.close(descriptor)


def check_shared(path: str, has: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError unless an open environment has the options that are wanted.

    An option that isn't wanted explicitly can have any value, unless it makes a
    promise: that a flush is durable, that reads are safe.
    """
    readonly = wanted.get("readonly", False)
    promised = {"lock"} if readonly else {"lock", *_PROMISED}
    for name in sorted(promised.union(wanted) - _OF_A_HANDLE - _OF_A_NEW_FILE):
        value: Any = wanted.get(name, _DEFAULTS.get(name))
        if name == "lib_version" and value < 0:  # any engine
            continue
        _check_equal(path, name, has.get(name, _DEFAULTS.get(name)), value)
    if not readonly:
        _check_equal(path, "readonly", bool(has.get("readonly")), False)


def _check_equal(path: str, name: str, has: Any, wanted: Any) -> None:
    if has != wanted:
        raise ValueError(
            f"{path!r} is already open in this process with {name}={has!r}, and all "
            f"stores of a process share one environment for each file; here "
            f"{name}={wanted!r} is wanted. Open it with the same {name}, or close "
            "the other stores first."
        )
