"""What an error of LMDB means, with the path, and what to do about the cause."""

from __future__ import annotations

import errno
import os
from typing import Any

import lmdb

from ._pages import ENGINES, engine_of, sizes_of
from .exceptions import CorruptedError, WrongFileError

DAMAGED = (lmdb.CorruptedError, lmdb.PageNotFoundError)
_EXPLAINED = (CorruptedError, WrongFileError)
DISK_CODES = {errno.EIO, errno.ENOSPC, errno.EFBIG, -30772}  # MDB_SHORT_WRITE of 1.0
DISK_CODES.add(getattr(errno, "EDQUOT", errno.ENOSPC))
DISK_CODES |= {39, 112} if os.name == "nt" else set()  # ERROR_(HANDLE_)DISK_FULL


def data_path(path: str, options: dict[str, Any]) -> str:
    return os.path.join(path, "data.mdb") if options.get("subdir", True) else path


def lock_path(path: str, options: dict[str, Any]) -> str:
    subdir = options.get("subdir", True)
    return os.path.join(path, "lock.mdb") if subdir else f"{path}-lock"


def explained(error: lmdb.Error, path: str, options: dict[str, Any]) -> lmdb.Error:
    """Return an error that says more than `error`, or `error` itself."""
    if isinstance(error, DAMAGED):
        problem = str(error)
        if not options.get("lock", True):
            problem += "; or another process writes, which lock=False does not allow"
        return damaged_error(data_path(path, options), problem)
    return _with(error, _more(error, path, options))


def opening_error(error: lmdb.Error, path: str, options: dict[str, Any]) -> lmdb.Error:
    """Do the same as `explained` for an error of `lmdb.open`."""
    if isinstance(error, _EXPLAINED):
        return error
    wrong = _wrong_kind(path, options)
    if wrong is None and "data format" in str(error):
        wrong = (
            "has a data format that this build of LMDB doesn't know: a newer LMDB has "
            "written the file, or its first two pages are damaged."
        )
    mismatch = isinstance(error, lmdb.VersionMismatchError)
    if wrong is None and (mismatch or isinstance(error, lmdb.InvalidError)):
        wrong = _wrong_format(path, options)
        if wrong is None and not mismatch:
            return damaged_error(data_path(path, options), "its first two pages")
    if wrong is not None:
        return WrongFileError(f"{path!r} {wrong}")
    if isinstance(error, lmdb.MemoryError):
        size = max(options.get("map_size", 0), sizes_of(data_path(path, options))[0])
        return _with(
            error,
            f"A map of {size} bytes, of map_size or of the file, does not fit into the "
            "address space that the process has left (see `ulimit -v`): choose a "
            "smaller map_size.",
        )
    return explained(error, path, options)


def _with(error: lmdb.Error, more: str) -> lmdb.Error:
    """Return an error like `error` with one more sentence, if there is one."""
    if not more:
        return error
    better = type(error)(f"{str(error).rstrip('.')}. {more}")
    vars(better).update(vars(error))  # its code, say
    return better


def damaged_error(file: str, problem: str) -> CorruptedError:
    """Return the error for a file with `problem`, or that is cut off."""
    size, full = sizes_of(file)
    if size < full:
        problem += f"; it has {size} bytes, and should have {full}"
    return CorruptedError(
        f"{file!r} is damaged: {problem}. Write nothing more to it. See what is wrong "
        "by `lmdb-object-store check`. Restore a backup, or save what can still be "
        "read by `lmdb-object-store salvage`."
    )


def _wrong_kind(path: str, options: dict[str, Any]) -> str | None:
    subdir = options.get("subdir", True)
    if subdir and os.path.isfile(path):
        kind = _kind_of(path)
        if kind == "an LMDB file" and os.path.basename(path) == "data.mdb":
            return f"is in a store: open its directory, {os.path.dirname(path)!r}."
        if kind == "an LMDB file":
            return "is a data file, not a directory: open it with subdir=False."
        return f"is {kind}: a store is a directory, or a file with subdir=False."
    if not subdir and os.path.basename(path) == "lock.mdb":
        return f"is a lock file of LMDB: open its directory, {os.path.dirname(path)!r}."
    if not subdir and os.path.isdir(path):
        return "is a directory: open it without subdir=False, or name a file."
    if options.get("readonly") and _is_empty(data_path(path, options)):
        return "has an empty data file, which only a store that writes can fill."
    return None


def _is_empty(file: str) -> bool:
    try:
        return os.path.getsize(file) == 0
    except OSError:
        return False


def _wrong_format(path: str, options: dict[str, Any]) -> str | None:
    file = data_path(path, options)
    kind = _kind_of(file)
    if kind != "an LMDB file":
        return f"can't be opened: {file!r} is {kind}."
    engine, wanted = engine_of(_head(file)), options.get("lib_version", -1)
    if wanted >= 0 and engine != wanted:
        return (
            f"was made by LMDB {ENGINES[engine or 0]}, and lib_version={wanted} asks "
            "for another engine: leave lib_version out, and the right one is taken."
        )
    return None


def lock_error(path: str, options: dict[str, Any]) -> WrongFileError | None:
    """Return an error if others would use another lock file for the same data file."""
    if options.get("subdir", True) or not options.get("lock", True):
        return None
    directory, name = os.path.split(path)
    lock = os.path.join(directory, "lock.mdb")
    if name != "data.mdb" or not os.path.exists(lock):
        return None
    return WrongFileError(
        f"{path!r} is in a store, {directory!r}, whose lock file is lock.mdb. With "
        "subdir=False it would get another lock file, so that nothing kept writers "
        "apart: open the directory."
    )


def is_data_file(file: str) -> bool:
    """Return whether `file` begins as a data file of LMDB."""
    return engine_of(_head(file)) is not None


def _kind_of(file: str) -> str:
    if is_lock_file(file):
        return "a lock file of LMDB"
    head = _head(file)
    if engine_of(head) is not None:
        return "an LMDB file"
    if head.startswith(b"SQLite format 3\0"):
        return "an SQLite database"
    return "no LMDB file"


def is_lock_file(file: str) -> bool:
    # To open and close it would give up all locks that this process has on the file.
    return os.path.basename(file) == "lock.mdb" or file.endswith("-lock")


def _head(file: str) -> bytes:
    if is_lock_file(file):
        return b""
    try:
        with open(file, "rb") as opened:
            return opened.read(64)
    except OSError:
        return b""


def _more(error: lmdb.Error, path: str, options: dict[str, Any]) -> str:
    if isinstance(error, lmdb.LockError):
        return (
            f"Another process with the number of this one, {os.getpid()}, has "
            f"{path!r} open: in another PID namespace, as of a container. LMDB tells "
            "processes apart by their numbers. Let containers that share a store share "
            "the PID namespace."
        )
    if isinstance(error, lmdb.IncompatibleError):
        return (
            "A key is the name of a named database, which another program made: "
            "nothing can be stored or deleted under it."
        )
    lock = lock_path(path, options)
    if isinstance(error, lmdb.VersionMismatchError):
        return (
            f"Another build of LMDB has made the lock file {lock!r}, and a program has "
            "it open; or the data file is of a format that this build does not know. "
            "End that program, or let both use the same build."
        )
    if (
        getattr(error, "code", 0) in (errno.EACCES, errno.EPERM, errno.EROFS)
        and options.get("readonly")
        and options.get("lock", True)
        and os.access(data_path(path, options), os.R_OK)
    ):
        return (
            f"LMDB writes to the lock file {lock!r} even to read, and this user may "
            "not. If no process writes to the store meanwhile, open it with lock=False."
        )
    return ""
