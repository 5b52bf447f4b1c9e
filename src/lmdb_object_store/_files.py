"""Data files: telling them apart, opening them durably, and comparing two openings."""

from __future__ import annotations

import errno
import os
import sys
import time
from contextlib import suppress
from typing import Any, TypedDict

import lmdb

from ._diagnosis import (
    damaged_error,
    data_path,
    is_data_file,
    lock_error,
    lock_path,
    opening_error,
)
from ._locks import poll
from ._pages import IS_KNOWN, UNREADABLE, DataFile
from .exceptions import DiskError, ReadersFullError, ReplacedError, WrongFileError

Identity = tuple[int, int] | str
"""Tells one data file from another, however its path is spelled."""


class LmdbOptions(TypedDict, total=False):
    """All that lmdb.open() takes beside the path."""

    map_size: int
    subdir: bool
    readonly: bool
    metasync: bool
    sync: bool
    map_async: bool
    mode: int
    create: bool
    readahead: bool
    writemap: bool
    meminit: bool
    max_readers: int
    max_dbs: int
    max_spare_txns: int
    lock: bool
    lib_version: int


_ATTEMPTS = 100
"""How often to open a file that another process makes larger at each attempt."""
_SMALL_MAP = 10 * 2**20  # bytes, py-lmdb's own
_LARGE_MAP = 2**30
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


def identity_of(file: str) -> Identity | None:
    """Return the identity of `file`, None if there is no such file."""
    try:
        return _identity(file, os.stat(file))
    except OSError:
        return None


def _identity(file: str, status: os.stat_result) -> Identity:
    if status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.normcase(os.path.realpath(file))  # a file system without numbers


class OpenFiles:
    """The data file and the lock file of an environment, as they were when opened."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self.data = data_path(path, options)
        self.identity = identity_of(self.data) or object()  # if it is gone
        self._lock = lock_path(path, options)
        has_lock = options.get("lock", True)  # a file system can be read-only, too
        self._lock_identity = identity_of(self._lock) if has_lock else None

    def check_data(self) -> int:
        """Raise `ReplacedError` unless the path still leads to the data file.

        Returns its bytes. Costs a call of the system.
        """
        return self._check(self.data, self.identity)

    def check_lock(self) -> None:
        """Do the same as `check_data` for the lock file, if there is one.

        Writers without a common lock file would overwrite each other.
        """
        if self._lock_identity is None:
            return
        try:
            self._check(self._lock, self._lock_identity)
        except ReplacedError:
            self.check_data()  # if that is gone, too, the error names it
            raise

    def _check(self, file: str, identity: object) -> int:
        try:
            status = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            raise self._replaced_error(file, "deleted or moved") from None
        except OSError:
            return 0  # this user may not look
        if identity != _identity(file, status):
            raise self._replaced_error(file, "replaced by another file")
        return status.st_size

    def _replaced_error(self, file: str, fate: str) -> ReplacedError:
        kind = "data file" if file == self.data else "lock file"
        return ReplacedError(
            f"The {kind} {file!r} was {fate} while it was open. Nothing more can be "
            "written, as that could be lost or damage the file; pending writes are "
            "kept. Close the store in all processes, then open it again. Never delete "
            "or replace the files of a store that is open."
        )

    def extend(self, size: int) -> None:
        """Make a shorter data file `size` bytes long. Call it under LMDB's lock.

        Writes the last byte, of a page that nothing was written to: unlike truncate()
        that can't shorten a file that another process has just made longer.
        """
        with open(self.data, "r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < size:
                file.seek(size - 1)
                file.write(b"\0")


def needs_sync(options: dict[str, Any]) -> bool:
    """Return whether a commit leaves something to be synced.

    On macOS LMDB writes the page that completes a commit with O_DSYNC, which leaves it
    in the disk's own cache.
    """
    full = options.get("sync", True) and options.get("metasync", True)
    return not full or options.get("map_async", False) or sys.platform == "darwin"


def open_environment(
    path: str, options: dict[str, Any], timeout: float = 0, cap: int | None = None
) -> lmdb.Environment:
    """Open an environment, and clear the reader slots of dead processes.

    A new file is on disk then, with the entry of its directory. LMDB wants a free
    reader slot: raises `ReadersFullError` if there is none for `timeout` seconds.
    Raises as well if the file is cut off, or not of a kind that a store can use.

    Without a ``map_size`` the map begins large, within `cap`, so that growth comes
    late: or small, where the address space has no room, or where the map takes room on
    the disk, on Windows and by ``writemap``.
    """
    if options.get("map_size"):
        env = _open(path, options, timeout)
    else:
        takes_disk = os.name == "nt" or options.get("writemap")
        size = _SMALL_MAP if takes_disk or sys.maxsize < 2**32 else _LARGE_MAP
        try:
            env = _open(path, {**options, "map_size": min(size, cap or size)}, timeout)
        except lmdb.MemoryError:
            size = min(_SMALL_MAP, cap or size)
            env = _open(path, {**options, "map_size": size}, timeout)
    try:
        env.reader_check()
        if not options.get("readonly") and not env.info()["last_txnid"]:
            sync_directories(path, options)
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
    if wrong := lock_error(path, options):
        raise wrong
    attempts = 0
    lock = lock_path(path, options)
    makes_lock = options.get("lock", True) and not os.path.exists(lock)
    while not opened:
        try:
            opened.append(_open_once(path, options))
        except lmdb.ReadersFullError:
            return False
        except lmdb.MapResizedError:  # by another process, at this moment
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
        except lmdb.Error as error:
            if sys.platform != "linux":
                # While `maintenance.compact` replaces the file, LMDB's named
                # semaphores or mutexes are gone, though there is a lock file.
                gone = getattr(error, "code", 0) == errno.ENOENT and not makes_lock
                if gone and attempts < _ATTEMPTS and os.path.exists(lock):
                    attempts += 1
                    time.sleep(SLOT_PAUSE / _ATTEMPTS)
                    continue
            better = opening_error(error, path, options)
            # The lock file of an LMDB file could be that of another process by now.
            no_data = not is_data_file(data_path(path, options))
            if isinstance(better, WrongFileError) and makes_lock and no_data:
                with suppress(OSError):
                    os.remove(lock)
            if better is error:
                raise
            raise better from error
    return True


def _open_once(path: str, options: dict[str, Any]) -> lmdb.Environment:
    """Open an environment on the file that the path leads to.

    1. An environment that only reads opens the data file, then its lock file.
    2. Meanwhile a compaction puts another data file in the place of the first.
    3. The environment would show the old file for as long as it is open.
    """
    file = data_path(path, options) if options.get("readonly") else ""
    attempts = 0
    while True:
        attempts += 1
        before = identity_of(file) if file else None
        env = lmdb.open(_encodable(path), **options)
        try:
            _check_kind(env, path, options)
            _check_length(env, path, options)
        except BaseException:
            env.close()
            raise
        if not file or identity_of(file) == before or attempts == _ATTEMPTS:
            return env
        env.close()


def _encodable(path: str) -> str | bytes:
    """Return `path` as py-lmdb takes it, which refuses str that is no valid Unicode."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _check_kind(env: lmdb.Environment, path: str, options: dict[str, Any]) -> None:
    if options.get("writemap") and env.lib_version()[0] >= 1:
        raise ValueError(
            "writemap=True can't be used with the LMDB 1.0 engine: a commit that "
            "frees pages can abort the process (seen with 1.0.2). "
            f"Open {path!r} without writemap, or make it with lib_version=0."
        )
    with env.begin() as txn:
        main: Any = env.open_db(None, txn)
        flags = main.flags(txn)
    if any(flags.values()):
        names = " and ".join(name for name in flags if flags[name])
        raise WrongFileError(
            f"{path!r} was made by another program, with {names} set for its main "
            "database: it orders keys, or keeps several values under a key, as a store "
            "doesn't. Copy its entries to a new store by py-lmdb."
        )


def _check_length(env: lmdb.Environment, path: str, options: dict[str, Any]) -> None:
    """Raise if pages that are in use lie beyond the end of the data file.

    A file may be shorter than its last page: pages that were allocated and freed in one
    transaction are never written.
    """
    file = data_path(path, options)
    for _ in range(_ATTEMPTS):
        with env.begin() as txn:
            size = os.stat(file).st_size
            needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            if size >= needed or not IS_KNOWN:
                return
            with open(file, "rb") as opened:
                pages = DataFile(opened, env.lib_version()[0])
                try:
                    missing = pages.missing_pages(size, txn.id())
                except UNREADABLE as error:
                    raise damaged_error(file, "its list of free pages") from error
        if missing is None:
            continue  # another process has written meanwhile
        count, first = missing
        if count:
            problem = f"{count} pages that are in use, from number {first} on"
            problem += ", are cut off, as by an incomplete copy"
            raise damaged_error(file, problem)
        return
    raise damaged_error(file, "its first two pages")


def readers_full_error(path: str) -> ReadersFullError:
    return ReadersFullError(
        f"All reader slots of {path!r} are taken. A read takes one for a moment, a "
        "snapshot for as long as it is open. Close snapshots sooner, or end all "
        "processes that use the file and open it with a larger max_readers. (Slots of "
        "processes that were killed can be cleared only by one that has the file "
        "open: it does so when it reads and finds none free.)"
    )


def sync_directories(path: str, options: dict[str, Any]) -> None:
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


def writable_options(has: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the options by which an environment that only reads becomes writable."""
    refused = {"lock", "readonly", *_PROMISED}
    options = {name: has[name] for name in has.keys() - refused}
    options.update({name: wanted[name] for name in wanted.keys() & _PROMISED})
    options["map_size"] = max(has.get("map_size", 0), wanted.get("map_size", 0))
    return options


def _check_equal(path: str, name: str, has: Any, wanted: Any) -> None:
    if has != wanted:
        raise ValueError(
            f"{path!r} is already open in this process with {name}={has!r}, and all "
            f"stores of a process share one environment for each file; here "
            f"{name}={wanted!r} is wanted. Open it with the same {name}, or close "
            "the other stores first."
        )
