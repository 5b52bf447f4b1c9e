"""Reads that unpickle while the map may move: one large value, or many keys."""

from __future__ import annotations

from pickle import Unpickler, loads
from typing import Any

import lmdb

from ._gate import Gate, Pin
from ._keys import describe
from .exceptions import UnpickleError

Batch = dict[bytes, bytes | None]  # what to write under each key; None deletes it

LARGE = 128 * 2**10
"""Bytes from which a value is unpickled out of the map piece by piece.

Below, copying it first is faster (measured: 64 KiB 3.1 against 3.8 µs, 256 KiB
10.6 against 7.5, 1 MiB 92 against 43).
"""
_CHUNK_KEYS = 512


def is_blob(view: memoryview) -> bool:
    """Whether `view` is the pickle of a bytes object and nothing else.

    That is PROTO 5, BINBYTES and a length of 4 bytes, the bytes, MEMOIZE, STOP.
    """
    return (
        view[:3].tobytes() == b"\x80\x05B"
        and int.from_bytes(view[3:7], "little") == len(view) - 9
        and view[-2:].tobytes() == b"\x94."
    )


def load(raw: bytes | LargeValue) -> Any:
    """Unpickle a value of `ManyValues`."""
    return loads(raw) if isinstance(raw, bytes) else raw.load()


def unpickle_error(key: bytes, buffered: bool, error: Exception) -> UnpickleError:
    """Tell which value can't be unpickled, and where it comes from."""
    source = "buffered" if buffered else "DB"
    return UnpickleError(f"Failed to unpickle {source} key {describe(key)}: {error}")


class LargeValue(Pin):
    """One stored value, as a file for `pickle.Unpickler`.

    Copying a large value before unpickling it costs more than the unpickling,
    and unpickling it in place would make growth wait for somebody's
    ``__setstate__``. So each piece is copied, in the gate, straight to where
    the unpickler wants it, and the unpickler's own code runs outside.
    """

    __slots__ = ("_gate", "_position", "_view")

    def __init__(
        self, gate: Gate, txn: lmdb.Transaction[memoryview], view: memoryview
    ) -> None:
        super().__init__(txn)
        self._gate = gate
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
        return self._gate.in_gate(self._read, size)

    def readinto(self, buffer: memoryview) -> int:
        return self._gate.in_gate(self._readinto, buffer)

    def readline(self) -> bytes:
        return self._gate.in_gate(self._readline)

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
        if self.txn is not None:
            self._view = memoryview(self._view.tobytes())
        self.txn = None

    def release(self) -> None:
        self._view = memoryview(b"")
        self.txn = None


class ManyValues(Pin):
    """The stored values of many keys, as they were at one moment, in chunks."""

    __slots__ = ("_chunk_keys", "_gate", "_keys", "_next", "_rest", "_views")

    def __init__(
        self,
        gate: Gate,
        txn: lmdb.Transaction[Any],
        keys: list[bytes],
        views: bool,
    ) -> None:
        super().__init__(txn)
        self._gate = gate
        self._views = views  # whether the transaction gives views of the map
        self._keys = keys
        self._next = 0  # where in the keys to go on
        self._chunk_keys = 64
        self._rest: list[tuple[list[bytes], list[Any]]] = []  # chunks when detached
        gate.pin(self)

    def next_chunk(self) -> tuple[list[bytes], list[Any]]:
        """Return more keys and what is stored under them; no keys at the end.

        That is None, or for `load`. Call it in the gate.
        """
        txn = self.txn
        if txn is None:
            return self._rest.pop() if self._rest else ([], [])
        keys, values = self._read(txn, self._next)
        self._next += len(keys)
        return keys, values

    def _read(
        self, txn: lmdb.Transaction[Any], start: int
    ) -> tuple[list[bytes], list[Any]]:
        keys = self._keys[start : start + self._chunk_keys]
        values: list[Any] = list(map(txn.get, keys))
        if self._views:
            values = [
                None if view is None else self._keep(txn, view) for view in values
            ]
        else:
            sizes = list(map(len, filter(None, values)))
            if sum(sizes) < LARGE:
                self._chunk_keys = _CHUNK_KEYS
            elif max(sizes) >= LARGE:
                self._gate.large_seen = True
                self._chunk_keys = 4  # don't copy much of that at once
        return keys, values

    def _keep(
        self, txn: lmdb.Transaction[memoryview], view: memoryview
    ) -> bytes | LargeValue:
        if len(view) < LARGE:
            return view.tobytes()
        return LargeValue(self._gate, txn, view)

    def detach(self) -> None:
        txn = self.txn
        if txn is None:
            return
        rest = []
        position = self._next
        while (chunk := self._read(txn, position))[0]:
            for value in chunk[1]:
                if isinstance(value, LargeValue):
                    value.detach()
            rest.append(chunk)
            position += len(chunk[0])
        rest.reverse()
        # Only now, so that an interrupt before loses nothing.
        self._rest = rest
        self.txn = None

    def release(self) -> None:
        self._rest = []
        self.txn = None
