"""Reads that unpickle while the map may move: one large value, or many keys."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pickle import Unpickler
from typing import Any

import lmdb

from ._gate import Gate, Pin

_CHUNK_KEYS = 128


def is_blob(view: memoryview) -> bool:
    """Whether `view` is the pickle of a bytes object and nothing else.

    That is PROTO 5, BINBYTES and a length of 4 bytes, the bytes, MEMOIZE, STOP.
    """
    return (
        view[:3].tobytes() == b"\x80\x05B"
        and int.from_bytes(view[3:7], "little") == len(view) - 9
        and view[-2:].tobytes() == b"\x94."
    )


class LargeValue(Pin):
    """One stored value, as a file for `pickle.Unpickler`.

    Copying a large value before unpickling it costs more than the unpickling,
    and unpickling it in place would make growth wait for somebody's
    ``__setstate__``. So each piece is copied, in the gate, straight to where
    the unpickler wants it, and the unpickler's own code runs outside.
    """

    __slots__ = ("_gate", "_position", "_txn", "_view")

    def __init__(
        self, gate: Gate, txn: lmdb.Transaction[memoryview], view: memoryview
    ) -> None:
        self._gate = gate
        self._txn: lmdb.Transaction[memoryview] | None = txn
        self._view = view
        self._position = 0
        gate.pin(self)

    def load(self) -> Any:
        """Unpickle the value, and end the transaction."""
        try:
            return Unpickler(self).load()
        finally:
            self.release()  # an exception's traceback could keep it open

    def read(self, size: int) -> bytes:
        return self._gate.shared(self._read, size)

    def readinto(self, buffer: memoryview) -> int:
        return self._gate.shared(self._readinto, buffer)

    def readline(self) -> bytes:
        return self._gate.shared(self._readline)

    def _read(self, size: int) -> bytes:
        start = self._position
        self._position = start + size
        return self._view[start : start + size].tobytes()

    def _readinto(self, buffer: memoryview) -> int:
        start = self._position
        piece = self._view[start : start + len(buffer)]
        size = len(piece)
        buffer[:size] = piece
        self._position = start + size
        return size

    def _readline(self) -> bytes:
        rest = self._view[self._position :]
        size = 128
        while True:
            line = rest[:size].tobytes()
            newline = line.find(b"\n")
            if newline >= 0 or len(line) < size:
                return self._read(newline + 1 or len(line))
            size *= 2

    def detach(self) -> None:
        if self._txn is not None:
            self._view = memoryview(self._view.tobytes())
        self._txn = None

    def release(self) -> None:
        self._view = memoryview(b"")
        self._txn = None


class ManyValues(Pin):
    """The stored values of many keys, as they were at one moment, in chunks."""

    __slots__ = ("_keys", "_rest", "_txn")

    def __init__(
        self, gate: Gate, txn: lmdb.Transaction[bytes], keys: Iterable[bytes]
    ) -> None:
        self._txn: lmdb.Transaction[bytes] | None = txn
        self._keys = iter(keys)
        self._rest: list[tuple[list[bytes], list[bytes | None]]] = []
        gate.pin(self)

    def next_chunk(self) -> tuple[list[bytes], list[bytes | None]]:
        """Return some more keys and their values (None: absent); no keys at the end.

        Call it in the gate.
        """
        if self._txn is None:
            return self._rest.pop() if self._rest else ([], [])
        keys = list(islice(self._keys, _CHUNK_KEYS))
        return keys, list(map(self._txn.get, keys))

    def detach(self) -> None:
        if self._txn is None:
            return
        rest = []
        while (chunk := self.next_chunk())[0]:
            rest.append(chunk)
        self._rest = rest[::-1]
        self._txn = None

    def release(self) -> None:
        self._rest = []
        self._txn = None
