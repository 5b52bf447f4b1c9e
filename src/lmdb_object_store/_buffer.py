"""Pending writes, and what keeps a put from being just buffered."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import islice
from threading import RLock
from typing import Any, Protocol, TypeVar

import lmdb

from ._locks import Action, locked, under_lock
from ._map_size import MAX_VALUE

_R = TypeVar("_R")

Batch = dict[bytes, bytes | None]
"""Writes, in a buffer or of one transaction: raw values by key; None deletes a key."""
Limits = tuple[int, int]
"""The operations and the bytes that make a batch full."""
ABSENT: Any = object()
"""In place of a raw value: nothing is pending under the key."""
_ATTEMPTS = 100  # of `delete_last`, where other threads put all the time
_HELD = frozenset({"held"})
_HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


class State(Enum):
    """The stages of a transaction block."""

    BEGINNING = "beginning"
    OPEN = "open"  # its body runs
    ENDING = "ending"
    ORPHANED = "orphaned"  # left in another thread, which can't end the transaction
    INHERITED = "inherited"  # it belongs to the parent of this process
    CLOSED = "closed"


class OpenBlock(Protocol):
    """The transaction block of a thread, as other parts know it."""

    state: State
    thread: int  # has begun the block
    opened: float  # by time.monotonic()
    txn: lmdb.Transaction[Any] | None  # until the commit takes it
    committed: lmdb.Transaction[Any] | None  # from then on
    id: int  # LMDB's number of the transaction

    def is_here(self) -> bool: ...


class WriteBuffer:
    """Pending writes by key, in the order in which the keys came.

    All changes are made under `lock`, but for those of most puts. Under it no lock is
    taken but the flusher's, no user code is run, and of LMDB's calls only one, which
    begins a read transaction.

    `LmdbObjectStore.put` looks at `accepts`, stores and counts in one run of bytecodes
    that no other thread can interrupt (see `_locks`). So a put needs no lock: it comes
    before or after

    - whatever compares and takes out in such a run, too, as `remove` does,
    - whatever sets `accepts` to False *before* it looks at the entries.

    Without the GIL all puts go by the lock. (A trace function written in Python, as of
    a debugger, lets other threads run between any two lines. Under such a tracer a put
    can come into the midst of the two above, and be lost in the close of another
    thread.)
    """

    def __init__(self, *refusals: str) -> None:
        self.lock = RLock()
        self.entries: Batch = {}
        self.size = 0  # bytes of keys and values, overwritten values included
        self.removals = 0  # how often keys were taken out
        self.max_value = MAX_VALUE  # bytes of the largest value that can be written
        self.block: OpenBlock | None = None  # also while it begins and ends
        # Why a put may not just buffer: "readonly", "transaction", "closing",
        # "exiting", "held": see `hold_still`, "unwatched": the flusher has to be told
        # of the first write, and "threads": they interrupt each other anywhere.
        self.refusals = set(refusals) if _HAS_GIL else {*refusals, "threads"}
        self.accepts = not self.refusals
        self.watch: Callable[[], bool] = bool  # tells the flusher, if that runs
        self.refused: Batch = {}  # the writes that a flush has refused by themselves
        self.lost: Batch = {}  # the entries that a failed close has left

    @under_lock
    def refuse(self, reason: str) -> None:
        self.accepts = False
        self.refusals.add(reason)

    @under_lock
    def allow(self, reason: str) -> None:
        self.refusals.discard(reason)
        self.accepts = not self.refusals

    def hold_still(self, action: Action[_R], *args: Any) -> _R:
        """Call `action` while no other thread puts a write here or takes one out."""
        result: _R = locked(self.lock, self._hold_still, action, args)
        return result

    def _hold_still(self, action: Action[_R], args: tuple[Any, ...]) -> _R:
        if "held" in self.refusals:  # by this thread, which has the lock
            return action(*args)
        try:
            self.accepts = False
            self.refusals |= _HELD
            return action(*args)
        finally:
            try:  # without a call, so that no interrupt leaves a half of this undone
                self.refusals -= _HELD
                self.accepts = not self.refusals
            finally:
                pass

    def watch_first(self) -> None:
        """Have the write that comes next flushed in time. Under the lock."""
        if "unwatched" in self.refusals and self.watch():
            self.allow("unwatched")

    @under_lock
    def unwatch(self) -> bool:
        """Let the flusher forget the buffer unless something is pending."""
        self.refuse("unwatched")
        if self.entries:
            self.allow("unwatched")
            return False
        return True

    def is_full(self, limits: Limits, count: int, size: int) -> bool:
        """Return whether `count` more keys and `size` more bytes make a batch full."""
        return (
            len(self.entries) + count >= limits[0]
            or self.size + size >= limits[1]
            or "exiting" in self.refusals
        )

    @under_lock
    def begin_block(self, block: OpenBlock) -> None:
        self.block = block
        self.refuse("transaction")

    @under_lock
    def open_block(self, block: OpenBlock) -> bool:
        """Let the body of `block` begin unless something is pending."""
        if self.entries:
            return False
        block.state = State.OPEN
        return True

    @under_lock
    def end_block(self, block: OpenBlock) -> None:
        refusals = self.refusals - {"transaction"}
        accepts = not refusals
        if self.block is block:  # all or nothing: from here on there is no call
            self.refusals, self.accepts, self.block = refusals, accepts, None

    @under_lock
    def add(self, key: bytes, raw: bytes | None, size: int) -> None:
        if not self.accepts:
            self.watch_first()
        self.entries[key] = raw
        self.size += size

    @under_lock
    def add_unless(
        self, key: bytes, raw: bytes | None, size: int, block: Any, inside: bool = False
    ) -> bool:
        """Buffer a write unless the store closes, or a block other than `block` began.

        A write `inside` another operation of its thread can't wait for a block.
        """
        if not self.accepts:
            self.watch_first()
        if "closing" in self.refusals or not (inside or self.block is block):
            return False
        self.entries[key] = raw
        self.size += size
        return True

    @under_lock
    def swap(self, key: bytes, pending: Any, raw: bytes | None, size: int) -> bool:
        """Buffer a write if `pending`, or nothing (ABSENT), still is under the key."""
        if not self.accepts:
            self.watch_first()
        # From the comparison to the end there is no call (see `put`), nor a jump,
        # where 3.10 could call a signal handler as well.
        if pending is ABSENT:
            if key not in self.entries:
                self.entries[key] = raw
                self.size += size
                return True
        elif self.entries[key] is pending:
            self.entries[key] = raw
            self.size += size
            return True
        return False

    @under_lock
    def delete_last(self, key: bytes, pending: Batch, size: int) -> bool:
        """Buffer the deletion of the last key of all; return whether that was done.

        Not if the key, or a later one, was put since `pending` was copied.
        """
        if not self.accepts:
            self.watch_first()
        for _ in range(_ATTEMPTS):
            if self.entries == pending:  # as in `swap`
                self.entries[key] = None
                self.size += size
                return True
            now = dict(self.entries)
            for other, raw in now.items():
                if other >= key and raw is not pending.get(other, ABSENT):
                    return False
            pending = now
        return False

    @under_lock
    def remove(self, written: Batch) -> None:
        """Take out writes that a commit has written, or refused for good.

        Puts went on meanwhile: only entries that are still the same object go.
        """
        # Between comparing and taking out there is no call and no allocation, so no put
        # of another thread, a signal handler or a finalizer comes between.
        empty: Batch = {}
        if self.entries == written:
            self.entries = empty
            self.size = 0
            self.removals += 1
            return
        entries = self.entries
        for key, raw in written.items():
            if key in entries and entries[key] is raw:
                del entries[key]
                self.removals += 1
        before = self.size  # a put that comes from here on may be counted twice
        left = size_of(dict(entries))
        self.size += left - before

    def give_up(self) -> None:
        """Keep the entries as lost, for the environment is closed."""
        self.lost = self.entries or self.lost
        self.entries = {}
        self.removals += 1

    def reset_in_child(self) -> None:
        """Begin anew in a child process made by fork."""
        self.lock = RLock()
        self.entries = {}
        self.size = 0
        self.removals += 1
        self.refused = {}
        self.lost = {}
        self.refusals.discard("closing")
        if self.block is None:
            self.refusals.discard("transaction")
        self.accepts = not self.refusals

    def pick(self, keys: Iterable[bytes]) -> Batch:
        entries = self.entries
        return {key: entries[key] for key in keys if key in entries} if entries else {}

    def keys_from(self, start: int) -> list[bytes]:
        """Return the keys from the `start`-th on, in any order."""
        entries = self.entries
        try:
            return list(islice(reversed(entries), max(0, len(entries) - start)))
        except RuntimeError:  # a put came between
            return list(entries)[start:]


def size_of(batch: Batch) -> int:
    """Return the bytes of the keys and values of `batch`."""
    return sum(len(key) + len(raw or b"") for key, raw in batch.items())
