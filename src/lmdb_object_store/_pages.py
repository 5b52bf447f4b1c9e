"""LMDB's file format, as far as this package has to know it, read without the map.

A page that lies beyond the end of the file raises SIGBUS where the map shows it. The
format is that of the structs in LMDB's mdb.c, on 64 bits and little-endian machines.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

_MAGIC = struct.pack("=I", 0xBEEFC0DE)
_HEADER_SIZES = {0: 16, 1: 24}
"""Bytes before the content of a page, by the major version of the engine."""
ENGINES = {0: "0.9", 1: "1.0"}
BRANCH, LEAF, OVERFLOW, FIXED_LEAF = 1, 2, 4, 0x22  # flags of a page
_DIRTY = 0x10  # another flag, of engine 0.9, that a page may keep
_LARGE = 1  # flag of an entry: the value has pages of its own
_TREE = 2  # of one whose value is another tree
_SPECIAL = 6  # of one that is a named database, or has several values
NONE = 2**64 - 1  # in place of the number of the root page: the tree is empty
_TREES = 24  # where in a meta page the two trees begin, of 48 bytes each
_TRANSACTION = _TREES + 2 * 48 + 8  # where its transaction is
UNREADABLE = (
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,
)
"""Errors of reading a page that is cut off, or damaged."""
IS_KNOWN = sys.maxsize > 2**32 and sys.byteorder == "little"
"""Whether this machine writes pages of this format."""


def engine_of(head: bytes) -> int | None:
    """Return the engine of a file that begins with `head`; None: it's not LMDB's."""
    for engine, size in _HEADER_SIZES.items():
        if head[size : size + 4] == _MAGIC:
            return engine
    return None


def sizes_of(path: str) -> tuple[int, int]:
    """Return the bytes of a data file, and those it has if nothing is cut off.

    0 where that can't be known.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            pages = DataFile(file, engine_of(file.read(64)) or 0)
            full = max(pages.meta(number).end for number in (0, 1))
    except (OSError, struct.error):
        return 0, 0
    return size, full if IS_KNOWN else 0


class Meta(NamedTuple):
    """The content of one of the two meta pages: struct MDB_meta."""

    page_size: int  # bytes
    free: int  # the root page of the list of free pages
    main: int  # the root page of the main database
    entries: int
    last_page: int
    transaction: int

    @property
    def end(self) -> int:
        """The bytes up to the end of the last page."""
        return (self.last_page + 1) * self.page_size


class Node(NamedTuple):
    """An entry of a page of a tree."""

    flags: int
    size: int  # of the value; in a branch a part of `child`
    key: bytes
    at: int  # where in the page the value is, or the number of its first page

    @property
    def child(self) -> int:
        """The number of the page below, in a branch."""
        return self.size | self.flags << 32

    @property
    def is_special(self) -> bool:
        """Whether the entry is a named database, or has several values."""
        return bool(self.flags & _SPECIAL)


class DataFile:
    """A data file that is read page by page. Raises `UNREADABLE` if that is damaged."""

    def __init__(self, file: BinaryIO, engine: int, page_size: int = 0) -> None:
        self._file = file
        self.engine = engine
        self._header = _HEADER_SIZES[engine]
        if not page_size:
            file.seek(self._header + _TREES)
            (page_size,) = struct.unpack("=I", file.read(4))
        self.page_size = page_size

    # Meta pages

    def meta(self, transaction: int) -> Meta:
        """Return the meta page to which `transaction` belongs."""
        self._file.seek((transaction & 1) * self.page_size + self._header + _TREES)
        content = self._file.read(112)
        (page_size,) = struct.unpack_from("=I", content)
        (free,) = struct.unpack_from("=Q", content, 40)
        entries, main, last_page, newest = struct.unpack_from("=4Q", content, 80)
        return Meta(page_size, free, main, entries, last_page, newest)

    def newest_meta(self) -> Meta:
        return max(self.meta(0), self.meta(1), key=lambda meta: meta.transaction)

    def is_meta(self, number: int) -> bool:
        """Return whether page `number`, 0 or 1, is a meta page of the engine."""
        self._file.seek(number * self.page_size + self._header)
        return self._file.read(4) == _MAGIC

    def meta_pages(self, transaction: int, renumbered: int) -> bytes:
        """Return the first two pages of a file that shows `transaction`, renumbered.

        The other meta page says the same, as of the transaction before. LMDB overwrites
        that first.
        """
        page = self.read(transaction & 1, 1)
        at = self._header + _TRANSACTION
        head = b""
        for slot, number in enumerate((renumbered & ~1, (renumbered - 1) | 1)):
            head += struct.pack("=Q", slot) + page[8:at]
            head += struct.pack("=Q", max(0, number)) + page[at + 8 :]
        return head

    # The list of free pages

    def missing_pages(self, size: int, transaction: int) -> tuple[int, int] | None:
        """Return how many pages in use lie beyond `size` bytes, and the first of them.

        As of a transaction that a reader keeps as it is; None if another process has
        overwritten its meta page. Pages that are allocated may be free and never
        written. Reads the list of free pages.
        """
        meta = self.meta(transaction)
        if meta.transaction != transaction:
            return None
        pages = range(size // self.page_size, meta.last_page + 1)
        free: set[int] = set()
        with suppress(EOFError):  # then a page of the list itself is missing
            for numbers in self.free_pages(meta):
                free.update(number for number in numbers if number in pages)
        first = next((page for page in pages if page not in free), 0)
        return pages.stop - pages.start - len(free), first

    def count_free_pages(self, meta: Meta) -> int:
        """Return the length of the list of free pages, which is read."""
        return sum(map(len, self.free_pages(meta)))

    def free_pages(self, meta: Meta) -> Iterator[tuple[int, ...]]:
        """Yield the numbers of free pages, transaction by transaction."""
        if meta.free != NONE:
            yield from self._free_below(meta.free, set())

    def _free_below(self, number: int, seen: set[int]) -> Iterator[tuple[int, ...]]:
        if number in seen:
            raise ValueError(f"page {number} is in the list of free pages twice")
        seen.add(number)
        page = self.read(number, 1)
        for at in self.places(page):
            node = self.node(page, at)
            if self.kind(page) & BRANCH:
                yield from self._free_below(node.child, seen)
            else:
                yield numbers_in(self.value(page, node))

    # Pages of a tree

    def read(self, number: int, count: int) -> bytes:
        start, size = number * self.page_size, count * self.page_size
        if count > 1 and self._file.seek(0, os.SEEK_END) < start + size:
            raise EOFError  # at once, as reading would take that much memory
        self._file.seek(start)
        content = self._file.read(size)
        if len(content) < size:
            raise EOFError
        return content

    def find(self, number: int, kinds: list[int]) -> bytes | None:
        """Return page `number`, or None: there is none, or none of these kinds."""
        try:
            page = self.read(number, 1)
        except (EOFError, OverflowError, OSError):
            return None
        if struct.unpack_from("=Q", page)[0] != number:
            return None
        return page if self.kind(page) in kinds else None

    def kind(self, page: bytes) -> int:
        flags: int = struct.unpack_from("=H", page, self._header - 6)[0]
        return flags & ~(0 if self.engine else _DIRTY)

    def written(self, page: bytes) -> int:
        """Return the transaction that wrote a page, 0 where the engine doesn't say."""
        written: int = struct.unpack_from("=2Q", page)[1] if self.engine else 0
        return written

    def places(self, page: bytes) -> list[int]:
        """Return where in a page of a tree its entries are."""
        (lower,) = struct.unpack_from("=H", page, self._header - 4)
        base = self._header if self.engine else 0  # offsets count from there
        count = (lower + base - self._header) // 2
        places = struct.unpack_from(f"={count}H", page, self._header)
        return [base + place for place in places]

    def node(self, page: bytes, at: int) -> Node:
        low, high, flags, key_size = struct.unpack_from("=4H", page, at)
        key = page[at + 8 : at + 8 + key_size]
        padding = key_size % 2 if self.engine else 0
        return Node(flags, low | high << 16, key, at + 8 + key_size + padding)

    def extent(self, page: bytes, node: Node) -> range:
        """Return the numbers of the pages that a value has of its own."""
        if not node.flags & _LARGE:
            return range(0)
        (first,) = struct.unpack_from("=Q", page, node.at)
        return range(first, first - (-(self._header + node.size) // self.page_size))

    def tree(self, page: bytes, node: Node) -> int:
        """Return the root page of the tree that is the value of a special entry."""
        if not node.flags & _TREE:
            return NONE
        root: int = struct.unpack_from("=Q", self.value(page, node), 40)[0]
        return root

    def value(self, page: bytes, node: Node) -> bytes:
        extent = self.extent(page, node)
        if extent:
            content = self.read(extent.start, len(extent))
            return content[self._header : self._header + node.size]
        content = page[node.at : node.at + node.size]
        if len(content) < node.size:
            raise EOFError
        return content


def numbers_in(content: bytes) -> tuple[int, ...]:
    """Return the numbers of pages in a value of the list of free pages."""
    (count,) = struct.unpack_from("=Q", content)
    return struct.unpack_from(f"={count}Q", content, 8)
