"""How large and how full a store is: figures that cost no scan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ._diagnosis import damaged_error
from ._environment import Begin, Environment
from ._pages import ENGINES, IS_KNOWN, UNREADABLE, DataFile
from .exceptions import BusyError

_ATTEMPTS = 10_000


@dataclass(frozen=True)
class StoreInfo:
    """The figures of a store, from `LmdbObjectStore.info`. Sizes are in bytes.

    Attributes
    ----------
    entries : int
        Entries, with what is pending, as ``len(store)``.
    pending_writes : int
        Writes of this process that are not in the file yet.
    file_size : int
        The length of the data file.
    disk_size : int
        Bytes that the data file takes on the disk: fewer if it has holes.
    used : int
        Bytes of the pages in use: of the entries, and of the trees.
    free : int
        Bytes of the other pages, which the next writes use.
    map_size : int
        The size to which the file can grow before the map has to.
    max_map_size : int or None
        The size up to which the map may grow by itself, or None.
    engine : str
        The version of LMDB's file format, "0.9" or "1.0".
    page_size : int
    depth : int
        Levels of the tree of keys; 0 without an entry.
    readers : int
        Reads and snapshots that are in progress, of all processes, but not this call.
    dead_readers : int
        Reader slots of processes that were killed; this call has cleared them.
    max_readers : int
        Reader slots, of all processes.
    last_transaction : int
        The number of the last commit.
    """

    entries: int
    pending_writes: int
    file_size: int
    disk_size: int
    used: int
    free: int
    map_size: int
    max_map_size: int | None
    engine: str
    page_size: int
    depth: int
    readers: int
    dead_readers: int
    max_readers: int
    last_transaction: int


def info_of(
    environment: Environment, entries: int, pending_writes: int, cap: int | None
) -> StoreInfo:
    """Return the figures of an open environment."""
    for _ in range(_ATTEMPTS):
        figures = environment.retry(environment.repair, _figures, environment)
        if figures is not None:
            return StoreInfo(
                entries=entries,
                pending_writes=pending_writes,
                max_map_size=cap,
                engine=ENGINES[environment.engine],
                page_size=environment.page_size,
                **figures,
            )
    raise BusyError(f"Other processes write to {environment.path!r} without a pause.")


def _figures(begin: Begin, environment: Environment) -> dict[str, int] | None:
    """Return the figures of the last commit; None if there is a newer one by now."""
    handle = environment.handle
    environment.files.check_data()
    dead = handle.reader_check()
    readers = _count_readers(handle.readers())
    txn: Any = begin()
    number, tree = txn.id(), txn.stat()
    with open(environment.files.data, "rb") as file:
        status = os.fstat(file.fileno())
        if IS_KNOWN:
            pages = DataFile(file, environment.engine)
            meta = pages.meta(number)
            if not handle.info()["last_txnid"] == meta.transaction == number:
                return None  # the meta page could be that of a later commit
            try:
                used = meta.last_page + 1 - pages.count_free_pages(meta)
            except UNREADABLE as error:
                problem = "its list of free pages"
                raise damaged_error(environment.files.data, problem) from error
        if not IS_KNOWN:  # without the pages of the list, and of named databases
            used = 2 + sum(tree[f"{kind}_pages"] for kind in _KINDS)
    info = handle.info()
    size = used * environment.page_size
    return {
        "file_size": status.st_size,
        "disk_size": 512 * getattr(status, "st_blocks", -(-status.st_size // 512)),
        "used": size,
        "free": max(0, status.st_size - size),
        "map_size": info["map_size"],
        "depth": tree["depth"],
        "readers": readers,
        "dead_readers": dead,
        "max_readers": info["max_readers"],
        "last_transaction": number,
    }


_KINDS = ("branch", "leaf", "overflow")


def _count_readers(table: str) -> int:
    """Count the lines of LMDB's table of readers that end with a transaction."""
    return sum(line[-1:].isdigit() for line in table.splitlines())
