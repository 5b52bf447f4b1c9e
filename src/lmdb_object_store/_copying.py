"""Copies of a data file: made beside the final name, in a child process.

LMDB's own plain copy takes the lock of writers outside their queue (see `_queue`), and
a copy of any kind is a read transaction, which keeps the map of its process from
moving. So a child process reads the file, and the pages by `read`, not by the map.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from typing import TYPE_CHECKING, Any, NamedTuple

import lmdb
from lmdb import verify as lmdb_verify

from . import _child
from ._child import Parent, Progress
from ._diagnosis import (
    DISK_CODES,
    damaged_error,
    data_path,
    explained,
    is_data_file,
    lock_path,
)
from ._files import identity_of, open_environment, sync_directories
from ._pages import IS_KNOWN, UNREADABLE, DataFile, Meta
from .exceptions import (
    BusyError,
    CorruptedError,
    DiskError,
    ReplacedError,
    WrongFileError,
)

if TYPE_CHECKING:
    from ._environment import Environment

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Options = dict[str, Any]
_Tell = Callable[[int, int], None]

_ATTEMPTS = 10_000
_CHECKS = 3
_BLOCK = 4 * 2**20  # bytes
_PAUSE = 0.1  # seconds


# In the parent process


def copy(
    environment: Environment, target: str, compact: bool, progress: Progress | None
) -> None:
    """Copy a store that is open; FileExistsError if there is something at `target`."""
    path, options = environment.path, environment.options
    timeout, identity = environment.writer.timeout, environment.identity
    has = {name: options[name] for name in options.keys() & {"subdir", "lock"}}
    reading = {**has, "readonly": True}
    with new_store(target, options, path) as part:
        args = path, reading, identity, timeout, part, compact, target
        _child.call(_copy_to, *args, scratch=part, progress=progress)


@contextmanager
def new_store(target: str, options: Options, source: str) -> Iterator[str]:
    """Give the name of an unfinished data file, for `publish`.

    The directory of the store is made, with the mode of `source`, and removed again if
    the block raises.
    """
    in_directory = options.get("subdir", True)
    made = in_directory and _make_directory(target, source)
    final = data_path(target, options)
    try:
        refuse_existing(final)
        if in_directory:
            _refuse_others(target)
        with part_of(final) as part:
            yield part
    except BaseException:
        if made:
            with suppress(OSError):  # somebody has put something else there
                os.rmdir(target)
        raise


def _refuse_others(directory: str) -> None:
    """Raise if a directory has files of others: a copy to "." is a mistake, say."""
    for name in os.listdir(directory):
        if name != "lock.mdb" and not name.endswith((".part", ".part-lock")):
            text = f"{directory!r} has other files: name a directory that is not there."
            raise FileExistsError(errno.EEXIST, text)


def _make_directory(path: str, like: str) -> bool:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    os.chmod(path, os.stat(like).st_mode & 0o7777)
    return True


@contextmanager
def part_of(final: str) -> Iterator[str]:
    """Give the name of an unfinished file, which is removed after the block."""
    part = f"{os.path.realpath(final)}.{secrets.token_hex(4)}.part"
    try:
        yield part
    finally:
        for file in (part, lock_path(part, {"subdir": False})):
            with suppress(FileNotFoundError):
                os.remove(file)


# In any process


def publish(part: str, target: str, options: Options, source: str) -> None:
    """Give a complete data file its final name, and the mode of `source`.

    FileExistsError if there is a file of that name.
    """
    os.chmod(part, os.stat(source).st_mode & 0o7777)
    rename(part, data_path(target, options))
    sync_directories(target, options)


def rename(part: str, final: str) -> None:
    """Give a file its final name; FileExistsError if there is a file of that name."""
    try:
        os.link(part, final)
    except OSError:
        refuse_existing(final)
        os.rename(part, final)  # the file system has no hard links
    else:
        os.remove(part)


def refuse_existing(final: str) -> None:
    if os.path.lexists(final):
        text = f"{final!r} is there already, and nothing is overwritten."
        raise FileExistsError(errno.EEXIST, text)


# In the child process


class _Pinned(NamedTuple):
    """A moment of the file, which a read transaction keeps as it is."""

    txn: lmdb.Transaction[Any]
    meta: Meta
    head: bytes  # the first two pages of a copy


def _copy_to(
    parent: Parent,
    path: str,
    options: Options,
    identity: object,
    timeout: float,
    part: str,
    compact: bool,
    target: str,
) -> None:
    if identity_of(data_path(path, options)) != identity:
        raise ReplacedError(f"{path!r} leads to another file by now.")
    _copy(parent.tell, path, options, timeout, part, compact)
    parent.ask()
    publish(part, target, options, data_path(path, options))


def _copy(
    tell: _Tell, path: str, options: Options, timeout: float, part: str, compact: bool
) -> tuple[int, int]:
    """Copy the file to `part`; return its engine, and the transaction that it shows."""
    env = open_environment(path, options, timeout)
    try:
        file, engine = data_path(path, options), env.lib_version()[0]
        with (
            open(file, "rb", buffering=0) as source,
            open(part, "r+b", buffering=0) as target,
        ):
            try:
                if not IS_KNOWN:
                    env.copyfd(target.fileno(), compact=True)
                    transaction = 1
                else:
                    pages = DataFile(source, engine)
                    pinned = _pin(env, pages)
                    transaction = pinned.meta.transaction
                    if compact:
                        _copy_compactly(tell, env, file, pages, pinned, target)
                    else:
                        _copy_pages(tell, source, pinned, target)
                _sync(target)
            except (OSError, lmdb.Error) as error:
                code = getattr(error, "code", 0)
                # EFAULT: LMDB has written a value that lies beyond the end of the file.
                if code == errno.EFAULT or isinstance(error, lmdb.IncompatibleError):
                    problem = "pages are neither in use nor free, or beyond its end"
                    raise damaged_error(file, problem) from error
                if isinstance(error, OSError) or code in DISK_CODES:
                    text = f"{file!r} could not be copied to {part!r}: {error}"
                    raise DiskError(text) from error
                raise explained(error, path, options) from None
            return engine, transaction
    finally:
        env.close()


def _sync(file: FileIO) -> None:
    if sys.platform == "darwin":  # where fsync leaves them in the disk's own cache
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    os.fsync(file.fileno())


def _pin(env: lmdb.Environment, pages: DataFile) -> _Pinned:
    """Begin a read transaction, and read its meta page.

    1. This process begins transaction 7, and reads the meta page of 7.
    2. Another process commits 8, then overwrites the page of 7 by that of 9.

    Had 9 begun while the page was read, 8 would be the last transaction by now.
    """
    for _ in range(_ATTEMPTS):
        txn = _begin(env)
        number = txn.id()
        pinned = _Pinned(txn, pages.meta(number), pages.meta_pages(number, number))
        if env.info()["last_txnid"] == pinned.meta.transaction == number:
            return pinned
        txn.abort()
    raise BusyError("Other processes write so often that no moment could be copied.")


def _begin(env: lmdb.Environment) -> lmdb.Transaction[Any]:
    while True:
        try:
            return env.begin()
        except lmdb.MapResizedError:  # by another process
            env.set_mapsize(0)


def _copy_pages(tell: _Tell, source: FileIO, pinned: _Pinned, target: FileIO) -> None:
    end = pinned.meta.end
    done = len(pinned.head)
    source.seek(done)
    block = pinned.head
    while block:
        tell(done, end)
        _write(target, block)
        block = source.read(min(_BLOCK, end - done))
        done += len(block)
    target.truncate(end)  # the source may be shorter: see `_files._check_length`
    tell(end, end)


def _write(target: FileIO, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[target.write(rest) :]


def _copy_compactly(
    tell: _Tell,
    env: lmdb.Environment,
    file: str,
    pages: DataFile,
    pinned: _Pinned,
    target: FileIO,
) -> None:
    meta = pinned.meta
    try:
        size = meta.end - pages.count_free_pages(meta) * meta.page_size
    except UNREADABLE as error:
        raise damaged_error(file, "its list of free pages") from error
    copied = threading.Event()

    def watch() -> None:
        while not copied.wait(_PAUSE):
            tell(min(size, os.fstat(target.fileno()).st_size), size)

    tell(0, size)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        env.copyfd(target.fileno(), compact=True, txn=pinned.txn)
    finally:
        copied.set()
        watcher.join()
    _continue_numbers(target, pages.engine, meta.transaction)
    tell(size, size)


def _continue_numbers(target: FileIO, engine: int, transaction: int) -> None:
    """Give a compact copy the number of the transaction that it shows.

    LMDB numbers the copy from 1. A lock file that stays when the copy takes the place
    of the file says another number, by which a process that was about to open the file
    would choose the meta page.
    """
    with open(target.fileno(), "rb", closefd=False) as file:
        copied = DataFile(file, engine)
        head = copied.meta_pages(copied.newest_meta().transaction, transaction)
    target.seek(0)
    _write(target, head)


def problems_of(file: str, tell: _Tell) -> list[str]:
    """Return the findings of LMDB's verifier in a data file that no process changes."""
    size = os.path.getsize(file)

    class Counted(FileIO):
        done = 0

        def read(self, size_: int | None = -1, /) -> bytes:
            content = super().read(size_) or b""
            self.done += len(content)
            if self.done // _BLOCK != (self.done - len(content)) // _BLOCK:
                tell(min(self.done, size), size)
            return content

    vars(lmdb_verify)["open"] = Counted  # verify() tells nothing of its progress
    try:
        return list(lmdb_verify.verify(file, subdir=False))
    except OSError:
        raise
    except lmdb_verify.VerifyError as error:
        return [str(error)]
    except Exception as error:  # the file can have any content
        return [f"the verifier can't read the file: {type(error).__name__}: {error}"]
    finally:
        tell(size, size)


def check(parent: Parent, path: str, options: Options) -> list[str]:
    """Return the findings of LMDB's verifier in a data file that may be in use."""
    file = data_path(path, options)
    env = None
    if os.path.exists(lock_path(path, options)):
        try:
            env = open_environment(path, {**options, "readonly": True})
        except lmdb.ReadersFullError:
            raise  # without a slot, another process may overwrite the pages meanwhile
        except lmdb.Error:
            pass  # the file is not sound, or this user may not lock it
    if env is None:
        before = os.stat(file).st_mtime_ns
        problems = problems_of(file, parent.tell)
        if problems and os.stat(file).st_mtime_ns != before:
            raise BusyError(
                f"{file!r} was written to during the check, so that its findings mean "
                "nothing. Check the file as a user who can open the store, or a copy."
            )
        return problems
    try:
        attempts = 0
        while True:
            # Keeps the pages of this moment, and of later ones, until the check ends.
            txn = _begin(env)
            newest = env.info()["last_txnid"]
            problems = problems_of(file, parent.tell)
            attempts += 1
            if not problems or attempts == _CHECKS:
                return problems
            if env.info()["last_txnid"] == newest:
                return problems
            # The verifier could have read a meta page while that was written.
            txn.abort()
    finally:
        env.close()


def compact(parent: Parent, path: str, options: Options, part: str) -> tuple[int, int]:
    """Put a compact copy in the place of a file that no process has open.

    Returns the bytes before and afterwards.
    """
    lock = lock_path(path, options)
    file = data_path(path, options)
    before = os.stat(file)
    if not is_data_file(file):
        raise WrongFileError(f"{file!r} is no LMDB file.")
    if os.path.islink(file) or before.st_nlink > 1:
        # Stores that are opened by another name have another lock file.
        raise WrongFileError(
            f"{file!r} is a link, or has hard links, as from a copy that was killed: "
            "name the file itself, and remove its other names."
        )
    # LMDB begins a lock file anew that is left of a crash. Then the lock on the file,
    # which a process that opens just now finds taken, is no harm.
    open_environment(path, {**options, "readonly": True}).close()
    with _alone(path, lock):
        pass  # to refuse at once
    size = before.st_size

    def tell_copy(done: int, total: int) -> None:
        parent.tell(size * done // max(1, 2 * total), size)

    def tell_check(done: int, total: int) -> None:
        parent.tell((size + size * done // max(1, total)) // 2, size)

    engine, transaction = _copy(
        tell_copy, path, {**options, "readonly": True}, 0, part, True
    )
    problems = problems_of(part, tell_check)
    if problems:
        raise CorruptedError(
            f"The compact copy of {path!r} is not sound, and the file stays as it is: "
            f"{problems[0]}. See what is wrong by `lmdb-object-store check`."
        )
    after = os.stat(part)
    if (before.st_uid, before.st_gid) != (after.st_uid, after.st_gid):
        os.chown(part, before.st_uid, before.st_gid)
    os.chmod(part, before.st_mode & 0o7777)
    parent.ask()
    with _alone(path, lock):
        with open(file, "rb") as opened:
            same = os.path.samestat(os.fstat(opened.fileno()), before)
            newest = DataFile(opened, engine).newest_meta().transaction
        if not same or newest != transaction:
            raise _open_error(path)  # it was for a moment
        try:
            os.replace(part, file)
        except PermissionError as error:  # so Windows says that the file is open
            raise _open_error(path) from error
        sync_directories(path, options)
    return size, after.st_size


@contextmanager
def _alone(path: str, lock: str) -> Iterator[None]:
    """Keep other processes from opening a store; BusyError if one has it open.

    Each process that has opened the file holds a shared lock on the first byte of the
    lock file (`mdb_env_excl_lock` in LMDB's mdb.c).
    """
    descriptor = os.open(lock, os.O_RDWR)
    try:
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError:
            raise _open_error(path) from None
        yield
    finally:
        os.close(descriptor)


def _open_error(path: str) -> BusyError:
    return BusyError(
        f"{path!r} is open, in this process or in another one. Close the store "
        "everywhere, then compact it."
    )
