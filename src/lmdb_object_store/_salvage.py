"""The readable entries of a damaged data file, page by page and without the map."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from ._child import Progress
from ._pages import (
    BRANCH,
    ENGINES,
    FIXED_LEAF,
    LEAF,
    NONE,
    OVERFLOW,
    UNREADABLE,
    DataFile,
    Meta,
    Node,
    numbers_in,
)
from .exceptions import WrongFileError

_PAGE_SIZES = [2**exponent for exponent in (12, 14, 13, 16, 15, 11, 10, 9)]
_SAMPLE = 1000  # pages
_REPORT = 256  # pages

Entry = tuple[bytes, bytes]


class Salvage:
    """The entries of a data file's main database, whatever is damaged.

    Attributes
    ----------
    engine : int
    expected : int or None
        How many entries there are to be; None if both meta pages are damaged.
    damage : int
        Pages and entries that could not be read.
    special : int
        Entries that were left out: named databases, and those with several values.
    """

    def __init__(self, file: BinaryIO, progress: Progress | None = None) -> None:
        self._size = os.fstat(file.fileno()).st_size
        self._pages, self._meta = _open(file)
        self._progress = progress
        self._done = 0  # pages
        count = self._size // self._pages.page_size + 1
        self._marks = bytearray(count)  # of pages that were found
        self._free = bytearray(count)
        self._doubtful: list[int] = []  # leaves of the tree that the list calls free
        self.engine = self._pages.engine
        self.damage = self.special = 0
        self.expected = None
        if self._meta is not None:
            self.expected = self._meta.entries
            self._mark_free(self._meta.free)
        self._free_is_known = self._meta is not None and not self.damage
        self.damage = 0  # a page that the list of free pages lacks is no entry

    def in_tree(self) -> Iterator[Entry]:
        """Yield the entries of the tree, in order, as far as its pages can be read."""
        if self._meta is not None:
            for number, page in self._leaves(self._meta.main):
                if self._free[number]:
                    self._doubtful.append(number)
                else:
                    yield from self._entries(page)

    def in_loose_pages(self) -> Iterator[tuple[bytes, bytes, bool]]:
        """Yield the entries of pages that may belong to the tree, and whether they do.

        Call this when `in_tree` has ended. The newest pages come first, if the engine
        tells the age of pages.
        """
        loose = []
        for number in range(2, len(self._marks)):
            if not (self._marks[number] or self._free[number]):
                page = self._pages.find(number, [LEAF])
                self._tell()
                if page is not None and not self._is_list(page):
                    loose.append(number)
        # Beyond the last page there may be some of a transaction that never ended.
        known = self._meta.last_page + 1 if self._meta and self._free_is_known else 0
        certain = [number for number in loose if number < known]
        doubtful = [*self._doubtful, *loose[len(certain) :]]
        for number in [*certain, *sorted(doubtful, key=self._age)]:
            page = self._pages.find(number, [LEAF])
            if page is not None:
                for key, value in self._entries(page):
                    yield key, value, number < known and not self._free[number]

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._size, self._size)

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None and self._done % _REPORT == 0:
            done = min(self._size, self._done * self._pages.page_size)
            self._progress(done, self._size)

    def _leaves(self, root: int) -> Iterator[tuple[int, bytes]]:
        stack = [] if root == NONE else [root]
        while stack:
            number = stack.pop()
            page = None
            if number < len(self._marks) and not self._marks[number]:
                page = self._pages.find(number, [LEAF, BRANCH, FIXED_LEAF])
            if page is None:
                self.damage += 1
                continue
            self._marks[number] = True
            self._tell()
            kind = self._pages.kind(page)
            if kind == LEAF:
                yield number, page
            elif kind == BRANCH:
                stack += [node.child for node in self._nodes(page)][::-1]

    def _nodes(self, page: bytes) -> Iterator[Node]:
        try:
            places = self._pages.places(page)
        except struct.error:
            places = [len(page)]
        for place in places:
            try:
                node = self._pages.node(page, place)
            except struct.error:
                self.damage += 1
            else:
                yield node

    def _entries(self, page: bytes) -> Iterator[Entry]:
        for node in self._nodes(page):
            try:
                if node.is_special:
                    self._mark_tree(self._pages.tree(page, node))
                    self.special += 1
                    continue
                value = self._value(page, node)
            except UNREADABLE:
                self.damage += 1
            else:
                yield node.key, value

    def _mark_tree(self, root: int) -> None:
        """Mark the pages of a named database, or of the many values of a key."""
        special = self.special
        for _, page in self._leaves(root):
            for _ in self._entries(page):
                pass
        self.special = special

    def _value(self, page: bytes, node: Node) -> bytes:
        extent = self._pages.extent(page, node)
        if not node.key:
            raise EOFError
        if extent:
            first = self._pages.find(extent.start, [OVERFLOW])
            if first is None or any(self._marks[extent.start : extent.stop]):
                raise EOFError  # or the pages are those of another value
        value = self._pages.value(page, node)
        self._marks[extent.start : extent.stop] = b"\1" * len(extent)
        return value

    def _mark_free(self, root: int) -> None:
        for _, page in self._leaves(root):
            for _, value in self._entries(page):
                try:
                    numbers = numbers_in(value)
                except struct.error:
                    self.damage += 1
                    continue
                for number in numbers:
                    if number < len(self._free):
                        self._free[number] = True

    def _age(self, number: int) -> int:
        page = self._pages.find(number, [LEAF])
        return 0 if page is None else -self._pages.written(page)

    def _is_list(self, page: bytes) -> bool:
        """Return whether a leaf is one of a list of free pages, by its looks."""
        try:
            for place in self._pages.places(page):
                node = self._pages.node(page, place)
                count = len(numbers_in(self._pages.value(page, node)))
                if len(node.key) != 8 or node.size != 8 * (count + 1):
                    return False
        except UNREADABLE:
            return False
        return True


def _open(file: BinaryIO) -> tuple[DataFile, Meta | None]:
    """Return the file as one of pages, and the newer of its meta pages that are whole.

    If both are damaged, the engine and the size of pages are those that fit best.
    """
    forms = [DataFile(file, engine, size) for engine in ENGINES for size in _PAGE_SIZES]
    for pages in forms:
        metas = [meta for number in (0, 1) if (meta := _meta(pages, number))]
        if metas:
            return pages, max(metas, key=lambda meta: meta.transaction)
    pages = max(forms, key=_bytes_of_pages)
    if not _bytes_of_pages(pages):
        raise WrongFileError(f"{file.name!r} is no LMDB file: no page in it is one.")
    return pages, None


def _meta(pages: DataFile, number: int) -> Meta | None:
    """Return meta page `number`, or None if that is damaged."""
    try:
        meta = pages.meta(number)
    except struct.error:
        return None
    whole = pages.is_meta(number) and meta.page_size == pages.page_size
    roots = (meta.main, meta.free)
    if whole and all(root == NONE or root <= meta.last_page for root in roots):
        return meta
    return None


def _bytes_of_pages(pages: DataFile) -> int:
    """Return how many bytes at the beginning look like pages of this form."""
    kinds = [BRANCH, LEAF, OVERFLOW]
    found = sum(pages.find(number, kinds) is not None for number in range(_SAMPLE))
    return found * pages.page_size
