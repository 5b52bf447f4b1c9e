"""Values: writing them, and reading them while the map may move."""

from __future__ import annotations

from enum import Enum
from itertools import chain
from pickle import Unpickler, loads
from types import BuiltinFunctionType, FunctionType
from typing import Any

import lmdb

from ._gate import Gate, Pin
from ._keys import Codec, add_note
from ._map_size import MAX_VALUE
from .exceptions import GrowthError, LoadError, SizeError
from .serializers import Json, Pickle, by_key, is_keyed, original, portable

LARGE = 128 * 2**10
"""Bytes from which a value is unpickled out of the map piece by piece.

Below, copying the value first is faster (measured: 64 KiB 3.1 against 3.8 µs, 256 KiB
10.6 against 7.5, 1 MiB 92 against 43).
"""
CHUNK_BYTES = 2**20
"""Bytes of values up to which a chunk is copied without looking at their sizes."""
_CHUNK_KEYS = 512
_CONSTANTS: tuple[type, ...] = (type(None), type(...), type(NotImplemented), slice)
_CONSTANTS += (type, FunctionType, BuiltinFunctionType)
_PICKLE_HEAD = b"\x80"  # of all pickles from protocol 2 on
_Chunk = tuple[list[bytes], list[Any]]
"""Keys and their values: None, or an argument for `Values.load`."""


class Values:
    """How a store object writes and reads values, and shows their keys in errors.

    Attributes
    ----------
    dumps_for : callable
        Returns the bytes of an object: ``dumps_for(key, obj)``.
    by_pickle : bool
        Whether ``pickle.dumps(obj, 5)`` does the same, but faster.
    loads_for : callable
        Returns the object of bytes: ``loads_for(key, raw)``. Runs user code.
    loads : callable or None
        ``loads(raw)``, which does the same, but faster; None if the serializer needs
        the key.
    in_pieces : bool
        Whether large values are unpickled out of the map piece by piece.
    """

    def __init__(self, serializer: Any, codec: Codec) -> None:
        self._serializer = serializer = portable(serializer)
        self.codec = codec
        self.dumps_for, self.loads_for = by_key(serializer)
        self._pickles = type(serializer) is Pickle
        self.in_pieces = self._pickles and serializer.allow is None
        self.by_pickle = self.in_pieces and serializer.protocol == 5
        self.loads = None if is_keyed(serializer) else serializer.loads
        if self.in_pieces:
            self.loads = loads

    def __reduce__(self) -> tuple[Any, ...]:
        return Values, (self._serializer, self.codec)

    @property
    def serializer(self) -> Any:
        """The serializer, as it was given."""
        return original(self._serializer)

    def note_key(self, error: Exception, key: bytes) -> None:
        """Name the key in an error of `dumps_for`."""
        verb = "pickling" if self._pickles else "serializing"
        add_note(error, f"while {verb} the value of {self.codec.describe(key)}")

    def size_error(
        self, key: bytes, size: int, cap: int | None
    ) -> GrowthError | SizeError:
        """Return the error of a value that is too large for LMDB or for the cap."""
        name = self.codec.describe(key)
        if cap is not None and size <= MAX_VALUE:
            return GrowthError(
                f"The value of {name} takes {size} bytes and can never fit below "
                f"max_map_size ({cap} bytes)."
            )
        return SizeError(
            f"The value of {name} takes {size} bytes; LMDB stores values below 4 GiB. "
            "Store it in pieces."
        )

    def load(self, key: bytes, raw: bytes | LargeValue) -> Any:
        """Do the same as `loads_for` for a `LargeValue`, too."""
        if isinstance(raw, LargeValue):
            if self.in_pieces:
                return raw.unpickle()
            raw = raw.take()
        return self.loads_for(key, raw)

    def load_copy(
        self, gate: Gate, key: bytes, raw: bytes, buffered: bool = True
    ) -> Any:
        """Return the object of a pending write, or of a value copied out of the map."""
        try:
            if self.loads is not None:
                return gate.user_code(self.loads, raw)
            return gate.user_code(self.loads_for, key, raw)
        except Exception as error:
            raise self.load_error(key, raw, buffered, error) from error

    def load_error(
        self, key: bytes, raw: bytes | LargeValue, buffered: bool, error: Exception
    ) -> LoadError:
        source = "buffered" if buffered else "DB"
        name = self.codec.describe(key)
        verb = "unpickle" if self._pickles else "load"
        text = f"Failed to {verb} {source} key {name}: {error}"
        first = raw.first if isinstance(raw, LargeValue) else raw[:1]
        if self._pickles and first != _PICKLE_HEAD and self._serializer.protocol > 1:
            text = (
                f"{text.rstrip('.')}. The value is no pickle of this library: another "
                "program, or a store with another serializer=, has probably written "
                "the value. With serializer=Bytes() a store reads the bytes themselves."
            )
        elif first == _PICKLE_HEAD and isinstance(self._serializer, Json):
            text = f"{text.rstrip('.')}. The value begins like a pickle."
        return LoadError(text)


def is_blob(view: memoryview) -> bool:
    """Return whether `view` is the pickle of a bytes object and nothing else."""
    return (  # PROTO 5, BINBYTES and a length of 4 bytes, the bytes, MEMOIZE, STOP
        view[:3].tobytes() == b"\x80\x05B"
        and int.from_bytes(view[3:7], "little") == len(view) - 9
        and view[-2:].tobytes() == b"\x94."
    )


class LargeValue(Pin):
    """One stored value, to be copied, or as a file for `pickle.Unpickler`.

    Copying a large value before unpickling costs more than the unpickling, and
    unpickling in place would make growth wait for a ``__setstate__``. So each piece is
    copied, in the gate, straight to its place, and user code runs outside.
    """

    def __init__(self, gate: Gate, txn: Any, view: memoryview) -> None:
        super().__init__(txn)
        self._gate = gate
        self._view = view
        self.first = view[:1].tobytes()
        self._position = 0
        gate.pins.add(self)

    def unpickle(self) -> Any:
        """Unpickle the value piece by piece, and end the transaction."""
        try:
            return Unpickler(self).load()
        finally:
            self.forget()  # an exception's traceback could keep it open

    def take(self) -> bytes:
        """Return a copy of all bytes, and end the transaction."""
        try:
            return self._gate.read(lambda: self._view.tobytes())
        finally:
            self.forget()

    def read(self, size: int) -> bytes:
        return self._gate.read(self._read, size)

    def readinto(self, buffer: memoryview) -> int:
        return self._gate.read(self._readinto, buffer)

    def readline(self) -> bytes:
        return self._gate.read(self._readline)

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

    def copy_out(self) -> None:
        if self.txn is not None:
            self._view = memoryview(self._view.tobytes())
        self.txn = None

    def forget(self) -> None:
        self._view = memoryview(b"")
        self.txn = None


class ManyValues(Pin):
    """The stored values of many keys, as they were at one moment, in chunks."""

    def __init__(self, gate: Gate, txn: Any, keys: list[bytes], views: bool) -> None:
        super().__init__(txn)
        self._gate = gate
        self._views = views  # whether the transaction gives views of the map
        self._keys = keys
        self._next = 0  # where in the keys to go on
        self._chunk_keys = 8  # so as to copy little at once, if values are large
        self._rest: list[_Chunk] = []  # once copied out, the next one last
        gate.pins.add(self)

    def next_chunk(self) -> _Chunk:
        """Return the next chunk, without keys at the end. Call it in the gate."""
        txn = self.txn
        if txn is None:
            return self._rest.pop() if self._rest else ([], [])
        chunk = self._read(txn, self._next)
        self._next += len(chunk[0])
        return chunk

    def _read(self, txn: Any, start: int) -> _Chunk:
        keys = self._keys[start : start + self._chunk_keys]
        values: list[Any] = list(map(txn.get, keys))
        if self._views:
            values = [None if raw is None else self._keep(txn, raw) for raw in values]
        else:
            sizes = list(map(len, filter(None, values)))
            if sum(sizes) < LARGE:
                self._chunk_keys = _CHUNK_KEYS
            elif max(sizes) >= LARGE:
                self._gate.large_seen = True
                self._chunk_keys = 4
        return keys, values

    def _keep(self, txn: Any, view: memoryview) -> bytes | LargeValue:
        return LargeValue(self._gate, txn, view) if len(view) >= LARGE else bytes(view)

    def copy_out(self) -> None:
        txn = self.txn
        if txn is None:
            return
        try:
            rest = self._rest_of(txn)
        except lmdb.Error:
            rest = []  # an interrupt has ended this read, and the transaction
        # Only now, so that an interrupt before loses nothing.
        self._rest = rest
        self.txn = None

    def _rest_of(self, txn: lmdb.Transaction[Any]) -> list[_Chunk]:
        rest: list[_Chunk] = []
        position = self._next
        while (chunk := self._read(txn, position))[0]:
            for value in chunk[1]:
                if isinstance(value, LargeValue):
                    value.copy_out()
            rest.insert(0, chunk)
            position += len(chunk[0])
        return rest

    def forget(self) -> None:
        self._rest = []
        self.txn = None


def is_immutable(value: object) -> bool:
    """Return whether `value` is of a type whose objects can't be changed in place.

    A type that is equal by value and hashable has to be so, unless it takes attributes;
    enums and frozen dataclasses only seem to.
    """
    if isinstance(value, _CONSTANTS):
        return True
    kind = type(value)
    frozen = getattr(kind, "__dataclass_params__", None)
    if isinstance(value, Enum) or (frozen is not None and frozen.frozen):
        return True
    if kind.__hash__ in (object.__hash__, None) or hasattr(value, "__dict__"):
        return False
    slots = chain.from_iterable(vars(base).get("__slots__", ()) for base in kind.mro())
    can_set = kind.__setattr__ is object.__setattr__
    return not (can_set and any(not name.startswith("_") for name in slots))
