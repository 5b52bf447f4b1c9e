"""LMDB's file format, as far as an opening has to know it, read without the map.

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
_BRANCH = 1  # flag of a page
_OVERFLOW = 1  # flag of an entry
_NONE = 2**64 - 1  # in place of the number of the root page: the tree is empty
IS_KNOWN = sys.maxsize > 2**32 and sys.byteorder == "little"
"""Whether the pages of this kind of machine look like that."""


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
    """What one of the two meta pages says: struct MDB_meta."""

    page_size: int  # bytes
    root: int  # page of the list of free pages
    last_page: int
    transaction: int

    @property
    def end(self) -> int:
        """The bytes up to the end of the last page."""
        return (self.last_page + 1) * self.page_size


class DataFile:
    """A data file that is read page by page."""

    def __init__(self, file: BinaryIO, engine: int) -> None:
        self._file = file
        self._engine = engine
        self._header = _HEADER_SIZES[engine]
        file.seek(self._header + 24)
        (self._page_size,) = struct.unpack("=I", file.read(4))

    def meta(self, transaction: int) -> Meta:
        """Return the meta page to which `transaction` belongs."""
        self._file.seek((transaction & 1) * self._page_size + self._header + 24)
        content = self._file.read(112)  # from the first of two trees, of 48 bytes, on
        (root,) = struct.unpack_from("=Q", content, 40)
        return Meta(self._page_size, root, *struct.unpack_from("=QQ", content, 96))

    def missing_pages(self, size: int, transaction: int) -> tuple[int, int] | None:
        """Return how many pages in use lie beyond `size` bytes, and the first of them.

        As of a transaction that a reader keeps as it is; None if another process has
        overwritten its meta page. Pages that are allocated may be free and never
        written. Reads the list of free pages.
        """
        meta = self.meta(transaction)
        if meta.transaction != transaction:
            return None
        pages = range(size // self._page_size, meta.last_page + 1)
        free = set()
        if meta.root != _NONE:
            with suppress(EOFError):  # then a page of the list itself is missing
                for page in self._free_pages(meta.root):
                    if page in pages:
                        free.add(page)
        first = next((page for page in pages if page not in free), 0)
        return pages.stop - pages.start - len(free), first

    def _free_pages(self, number: int) -> Iterator[int]:
        page = self._read(number, 1)
        flags, lower = struct.unpack_from("=HH", page, self._header - 6)
        base = 0 if self._engine == 0 else self._header  # offsets count from there
        entries = (lower + base - self._header) // 2
        for start in struct.unpack_from(f"={entries}H", page, self._header):
            at = base + start
            low, high, kind, key_size = struct.unpack_from("=4H", page, at)
            if flags & _BRANCH:
                yield from self._free_pages(low | high << 16 | kind << 32)
                continue
            at += 8 + key_size + (key_size % 2 if self._engine else 0)
            size = low | high << 16
            content = page[at : at + size]
            if kind & _OVERFLOW:
                (first,) = struct.unpack_from("=Q", page, at)
                pages = -(-(self._header + size) // self._page_size)
                content = self._read(first, pages)[self._header :][:size]
            (count,) = struct.unpack_from("=Q", content)
            yield from struct.unpack_from(f"={count}Q", content, 8)

    def _read(self, number: int, count: int) -> bytes:
        self._file.seek(number * self._page_size)
        content = self._file.read(count * self._page_size)
        if len(content) < count * self._page_size:
            raise EOFError
        return content
