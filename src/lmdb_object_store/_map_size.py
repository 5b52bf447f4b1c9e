"""How large a map should be: arithmetic without LMDB."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

MAX_VALUE = 2**32 - 1
"""Bytes of the largest value that LMDB stores (MAXDATASIZE in LMDB's mdb.c)."""
_GROWTH = 64 * 2**20  # bytes by which a map grows at least
_MIN_PAGES = 14  # of the smallest map that takes an entry and keeps the reserve


class MapSize:
    """The sizes of one environment's map, present and future, in bytes.

    Guarded by the write lock, but for `cap`, which any thread may change.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.cap: int | None = None  # of automatic growth
        self.floor = 0  # the least size that the next growth leads to

    def limit(self) -> float:
        """Return the largest size that `cap` allows."""
        return inf if self.cap is None else self.cap - self.cap % self.page_size

    def max_value(self) -> int:
        """Return the size of the largest value that can ever be committed."""
        if self.cap is None:
            return MAX_VALUE
        # Beside the value an otherwise empty file holds two meta pages, a leaf (old
        # and new) and the list of free pages. Small values fit in leaves.
        pages = self.cap // self.page_size
        if pages < _MIN_PAGES:
            return 0
        room = max(1, pages - self.reserve() - 8 - pages // 512)
        return min(MAX_VALUE, room * self.page_size)

    def reserve(self) -> int:
        """Return the number of pages below the cap that only deletions may use.

        A deletion copies the pages on the way to its key, may merge their neighbours,
        and lists the pages that it frees. It can't use those of the last commit.
        """
        pages = (self.cap or 0) // self.page_size
        return min(max(8, pages // 4), 32 + pages // 256)

    def needed(
        self, batch: Mapping[bytes, bytes | None], count: int, tree: Mapping[str, int]
    ) -> int:
        """Estimate the map size that a write needs, rather above than below.

        Too low an estimate would make the map grow twice, and use up the reserve.
        `count` entries are put, with the values of `batch`, or deleted. `tree` has the
        figures of `lmdb.Environment.stat` and `lmdb.Environment.info`.
        """
        page = self.page_size
        # Every page on the way to a key is written anew ...
        touched = min(count * tree["depth"], tree["branch_pages"] + tree["leaf_pages"])
        pages = tree["last_pgno"] + 1 + touched + 8
        size = 0
        for key, raw in batch.items():
            node = len(key) + len(raw or b"") + 16
            if node > page // 2:
                pages += node // page + 1
                node = len(key) + 24
            # ... leaves, and the branches above them, are half full, at worst, or
            # less where they hold two or three entries.
            size += page if node > page // 4 else 2 * node
            size += 4 * (len(key) + 16)
        return (pages + pages // 512) * page + size

    def near_cap(self, needed: int) -> bool:
        """Return whether a write that needs so large a map may reach the cap."""
        return needed + self.reserve() * self.page_size > (self.cap or 0)

    def grown(self, size: int, needed: int) -> int:
        """Return the size to grow to from `size`; not more than `size` at the cap."""
        wanted = max(2 * size, size + _GROWTH, self.floor, needed)
        return int(min(wanted - wanted % self.page_size, self.limit()))
