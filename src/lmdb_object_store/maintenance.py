"""Care for a file: compaction, checks, and saving the rest of a damaged file.

Each function takes the path of a store: a directory, or a data file. No damage of the
file can end the process.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lmdb

from . import _copying
from ._child import Progress, call, make_scratch
from ._diagnosis import data_path, is_lock_file
from ._info import StoreInfo
from ._keys import codec_of
from ._pages import IS_KNOWN
from ._salvage import Entry, Salvage
from ._values import Values
from .exceptions import WrongFileError
from .serializers import Bytes
from .store import LmdbObjectStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .serializers import AnySerializer

__all__ = [
    "CheckReport",
    "SalvageReport",
    "StoreInfo",
    "check",
    "compact",
    "salvage",
]

_Path = str | os.PathLike[str]
_REPORT = 1000  # entries
_BATCH = 10_000  # entries
_BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CheckReport:
    """The findings of `check`.

    Attributes
    ----------
    problems : list of str
        Faults in the structure of the file; empty if the structure is sound.
    bad_values : dict
        Why a value can't be loaded, by its key as bytes.
    values : int or None
        The number of values that were read; None if there was no serializer.
    """

    problems: list[str]
    bad_values: dict[bytes, str]
    values: int | None

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.problems or self.bad_values)


@dataclass(frozen=True)
class SalvageReport:
    """The result of `salvage`.

    Attributes
    ----------
    entries : int
        Entries of the new store.
    expected : int or None
        Entries that the damaged file says it has; None if it can't be read there.
    damage : int
        Pages and entries that could not be read.
    uncertain : int
        Those of `entries` that may be old: the file doesn't tell any more whether they
        were deleted, or have got another value.
    special : int
        Entries that were left out: named databases, and keys with several values.
    """

    entries: int
    expected: int | None
    damage: int
    uncertain: int
    special: int


def compact(path: _Path, *, progress: Progress | None = None) -> int:
    """Take free pages out of a data file; return by how many bytes it got smaller.

    A compact copy is made beside the file, checked by LMDB's verifier, and put in the
    place of the file in one step, with its mode and owner. Needs the disk space for
    that copy meanwhile. A GiB of entries of 100 bytes takes about 16 s, most of that
    for the check; with large values it is faster. If the process is killed, the file is
    the old or the new one, and at most a file that ends with ``.part`` remains.

    Parameters
    ----------
    path : str or os.PathLike
    progress : callable, optional
        Called as ``progress(done, total)``, in bytes. If the call raises, the file
        stays as it is.

    Raises
    ------
    BusyError
        A process has the store open, or had for a moment. (A reader with ``lock=False``
        is not noticed, and goes on reading the old file.)
    CorruptedError
        The file is damaged. It stays as it is.
    FileNotFoundError, WrongFileError, DiskError, OSError
        There is no store, the data file is a link or has hard links (as stores that are
        opened by another name have another lock file), or the copy can't be written.
    NotImplementedError
        On 32 bits, or a big-endian machine, which the verifier doesn't support.
    """
    path, options = _locate(path)
    with _copying.part_of(data_path(path, options)) as part:
        work = _copying.compact
        before, after = call(work, path, options, part, scratch=part, progress=progress)
    return before - after


def check(
    path: _Path,
    *,
    serializer: AnySerializer[Any] | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Look for damage in a data file, which may be in use.

    Runs LMDB's own verifier, ``lmdb.verify``, in a child process: 20 to 80 MB of small
    entries in a second, and more of large ones. The file may be of any kind and have
    any damage.

    Parameters
    ----------
    path : str or os.PathLike
    serializer : object, optional
        That of the store, such as ``Pickle()``, to load each value as well. Unpickling
        can run any code: see `serializers`. The report keeps a text for each value that
        can't be loaded.
    progress : callable, optional
        Called as ``progress(done, total)``, in bytes. An exception ends the check.

    Raises
    ------
    FileNotFoundError, OSError
        There is no data file, or this user can't read the file.
    ReadersFullError, BusyError
        Other processes write, and there is no free reader slot, or this user may not
        write to the lock file.
    WrongFileError
        The file is a lock file of LMDB.
    NotImplementedError
        On 32 bits, or a big-endian machine, which the verifier doesn't support.
    """
    path, options = _locate(path)
    size = os.path.getsize(data_path(path, options))
    total = size if serializer is None else 2 * size
    tell = progress or _tell_nobody
    problems = call(
        _copying.check,
        *(path, options),
        scratch="",
        progress=lambda done, _: tell(done, total),
    )
    bad: dict[bytes, str] = {}
    count = None
    if serializer is not None:
        count = 0
        values = Values(serializer, codec_of(None, "strict", None))
        read = _stored if not problems else _readable
        for key, raw in read(path, options, lambda done: tell(size + done, total)):
            count += 1
            try:
                values.loads_for(key, raw)
            except Exception as error:
                bad[key] = str(values.load_error(key, raw, False, error))
        tell(total, total)
    return CheckReport(problems, bad, count)


def salvage(
    source: _Path, target: _Path, *, progress: Progress | None = None
) -> SalvageReport:
    """Save the readable entries of a damaged or truncated file into a new store.

    Reads `source` page by page, and changes nothing there. No process should write to
    the file meanwhile. Entries whose page can't be found by the tree of keys are looked
    for in all pages of the file. Whether a value itself is damaged only its serializer
    can tell: run `check` on the new store. If the process is killed, at most files that
    end with ``.part`` and ``.part-lock`` remain.

    Parameters
    ----------
    source : str or os.PathLike
    target : str or os.PathLike
        The new store: a directory, or a file if `source` is one. It gets this name when
        it is complete.
    progress : callable, optional
        Called as ``progress(done, total)``, in bytes. If the call raises, there is no
        new store.

    Raises
    ------
    FileExistsError
        There is a store at `target`.
    FileNotFoundError, WrongFileError, DiskError, OSError
        There is no data file, nothing in it is a page of LMDB, or the new store can't
        be written.
    NotImplementedError
        On 32 bits, or a big-endian machine.
    """
    source, options = _locate(source)
    target = os.path.abspath(os.fsdecode(target))
    with open(data_path(source, options), "rb") as file:
        found = Salvage(file, progress)
        with _copying.new_store(target, options, source) as part:
            make_scratch(part)
            with LmdbObjectStore(
                part,
                serializer=Bytes(),
                flush_interval=None,
                subdir=False,
                sync=False,  # until it is closed
                lib_version=found.engine,
            ) as store:
                uncertain = _save(found, store)
                entries = len(store)
            found.finish()
            _copying.publish(part, target, options, file.name)
    return SalvageReport(
        entries, found.expected, found.damage, uncertain, found.special
    )


def _save(found: Salvage, store: LmdbObjectStore[bytes, bytes]) -> int:
    """Put all readable entries into a new store; return how many may be old."""
    longest = store.env.max_key_size()
    batch: dict[bytes, bytes] = {}
    size = uncertain = 0

    def flush() -> None:
        nonlocal size
        store.put_many(batch)
        batch.clear()
        size = 0

    def put(key: bytes, raw: bytes) -> int:
        nonlocal size
        if len(key) > longest:
            found.damage += 1
            return 0
        if len(batch) == _BATCH or size > _BATCH_BYTES:
            flush()
        batch[key] = raw
        size += len(raw)
        return 1

    for key, raw in found.in_tree():
        put(key, raw)
    flush()
    if len(store) + found.special != found.expected:
        for key, raw, is_certain in found.in_loose_pages():
            if key not in batch and key not in store:
                count = put(key, raw)
                uncertain += 0 if is_certain else count
        flush()
    return uncertain


def _stored(
    path: str, options: dict[str, Any], tell: Callable[[int], object]
) -> Iterator[Entry]:
    """Yield the entries of a sound file, with the pending writes of this process."""
    try:
        store = LmdbObjectStore[bytes, bytes](
            path, readonly=True, serializer=Bytes(), **options
        )
    except (lmdb.Error, ValueError):  # this user may not lock the file, say
        yield from _readable(path, options, tell)
        return
    with store:
        size, count = os.path.getsize(data_path(path, options)), len(store)
        for number, entry in enumerate(store.items()):
            if number % _REPORT == 0:
                tell(size * number // max(number, count, 1))
            yield entry


def _readable(
    path: str, options: dict[str, Any], tell: Callable[[int], object]
) -> Iterator[Entry]:
    """Yield the entries of a damaged file that can be found by the tree of keys."""
    with (
        open(data_path(path, options), "rb") as file,
        suppress(WrongFileError),
    ):
        yield from Salvage(file, lambda done, _: tell(done)).in_tree()


def _locate(path: _Path) -> tuple[str, dict[str, Any]]:
    """Return a path, absolute, and the options by which a store is opened there."""
    if not IS_KNOWN:
        raise NotImplementedError(
            "LMDB's verifier, and this module, read the pages of 64-bit, little-endian "
            "machines only."
        )
    path = os.path.abspath(os.fsdecode(path))
    if os.path.basename(path) == "data.mdb" and not os.path.exists(f"{path}-lock"):
        path = os.path.dirname(path)  # whose lock file is that of the data file
    if is_lock_file(path):
        raise WrongFileError(f"{path!r} is a lock file of LMDB.")
    options = {"subdir": os.path.isdir(path)}
    file = data_path(path, options)
    if not os.path.isfile(file):
        raise FileNotFoundError(errno.ENOENT, "There is no data file", file)
    effective = os.access in os.supports_effective_ids
    if not os.access(file, os.R_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, "This user can't read", file)
    return path, options


def _tell_nobody(done: int, total: int) -> None:
    pass
