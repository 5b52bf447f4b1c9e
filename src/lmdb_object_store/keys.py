"""Keys that are no text: encodings, which bring keys to bytes that sort as they do."""

from __future__ import annotations

from collections.abc import Iterable
from math import copysign
from struct import Struct
from typing import Any, Protocol, TypeVar
from uuid import UUID

__all__ = ["KeyEncoding", "TupleKeys"]

_K = TypeVar("_K")

# The type codes of FoundationDB's tuple layer, from its specification
# (design/tuple.md in the repository apple/foundationdb).
_NONE, _BYTES, _STR, _TUPLE = b"\x00", b"\x01", b"\x02", b"\x05"
_LOW_INT, _ZERO, _HIGH_INT = 0x0B, 0x14, 0x1D
"""Of ints: code 0x14 + n has n bytes, up to 8; the two others have a length."""
_DOUBLE, _FALSE, _TRUE, _UUID = b"\x21", b"\x26", b"\x27", b"\x30"
_END = b"\x00"  # of a str, bytes and a tuple
_NUL = b"\x00\xff"  # a zero byte in a str or bytes, and None in a nested tuple
_BARE = (int, float, str, UUID)
"""Types whose objects are keys, and come out, without a tuple around."""

_CODES = [bytes([code]) for code in range(256)]
_SMALL = [_CODES[_ZERO], *(bytes([_ZERO + 1, n]) for n in range(1, 256))]
_COMPLEMENT = bytes(range(255, -1, -1))
_DOUBLES = Struct(">d")
_pack_double = Struct(">cd").pack


class KeyEncoding(Protocol[_K]):
    """An object that can be the `key_encoding` of a store.

    Keys are in the order of their encoded bytes. Keys that are bytes are taken as they
    are, and are not encoded. Several threads may call the methods at the same time. A
    store that is pickled takes the object along.

    An encoding may have two things more. A method ``bounds(prefix)`` returns two bytes
    objects: the first key that begins with a prefix, and the end of these keys. Without
    the method, these are the keys whose bytes begin with those of the prefix. An
    attribute ``strict`` that is true says that ``decode`` raises for all bytes that
    ``encode`` doesn't return. Without the attribute, each decoded key is encoded again:
    if the bytes are others, the key comes out as bytes.
    """

    def encode(self, key: _K, /) -> bytes:
        """Return the bytes of a key; TypeError or ValueError if it can't be one."""

    def decode(self, raw: bytes, /) -> _K:
        """Return the key that `encode` turns into `raw`; ValueError if there is none.

        A key whose bytes can't be decoded comes out as bytes.
        """


class TupleKeys:
    """Numbers, text and tuples as keys, in the order of Python.

    An int, a float, a str, a bool and a `uuid.UUID` can be keys. A tuple of these,
    and of bytes, None and tuples, can be a key, too; a list can't. Elements of one type
    sort as in Python, and tuples from their first element on. Elements of different
    types sort in the order None, bytes, str, tuple, int, float, bool, UUID. So all ints
    come before all floats: use one of the two in one place. The key 5 is the same as
    ``(5,)``, and comes out as 5. But 1, 1.0 and True are three keys, and 0.0 and -0.0
    are two.

    A prefix is a tuple, too: ``store.keys(prefix=("sensor", 7))`` are the keys that are
    tuples and begin with these two elements.

    The bytes are those of FoundationDB's tuple layer. So programs in other languages
    can read them. Keys with other types of that layer, such as floats of 32 bits, come
    out as bytes.

    Notes
    -----
    An int of n bytes takes n + 1, a float 9, a str and bytes 2 more than they have (and
    1 for each zero byte). To encode a key of three elements takes about 1 µs, and to
    decode it about 1.5.
    """

    strict = True

    def __repr__(self) -> str:
        return "TupleKeys()"

    def encode(self, key: Any, /) -> bytes:
        """Return the bytes of a key.

        Raises
        ------
        TypeError
            An element of any other type.
        ValueError
            NaN, which has no place in the order; a str that is no valid Unicode; an int
            of more than 255 bytes.
        """
        if isinstance(key, tuple):
            return _encode(key)
        if isinstance(key, _BARE):
            return _encode((key,))
        raise _type_error(key)

    def decode(self, raw: bytes, /) -> Any:
        """Return the key of `raw`; ValueError if `encode` doesn't return such bytes."""
        levels: list[list[object]] = [[]]
        position = 0
        while position < len(raw):
            # The most frequent elements without a call: text, and numbers of one byte.
            end = raw.find(b"\0", position) if raw[position] == _STR[0] else -1
            if end > 0 and raw[end + 1 : end + 2] != b"\xff":
                levels[-1].append(raw[position + 1 : end].decode())
                position = end + 1
            elif (
                raw[position] == _ZERO + 1 and raw[position + 1 : position + 2] > b"\0"
            ):
                levels[-1].append(raw[position + 1])
                position += 2
            else:
                position = _decode_next(raw, position, levels)
        [elements] = levels  # ValueError: a nested tuple has no end
        bare = len(elements) == 1 and isinstance(elements[0], _BARE)
        return elements[0] if bare else tuple(elements)

    def bounds(self, prefix: object, /) -> tuple[bytes, bytes]:
        """Return the first key that begins with `prefix`, and the end of these keys."""
        raw = self.encode(prefix)
        # No element begins with 255, but a zero byte in a str goes on with it.
        return raw, raw + b"\xff"


def _type_error(value: object) -> TypeError:
    return TypeError(
        "Key must be made of int, float, str, bool and UUID, and tuples of these, "
        f"bytes, None and tuples; got {type(value).__name__}"
    )


def _encode(elements: Iterable[object]) -> bytes:
    raw = b""
    for element in elements:
        kind: Any = type(element)
        value: Any = element
        if kind is str:
            text = value.encode()
            if b"\0" in text:
                text = text.replace(b"\0", _NUL)
            raw += b"\x02" + text + b"\0"
        elif kind is int:
            raw += _SMALL[value] if 0 <= value < 256 else _encode_int(value)
        elif kind is float and value > 0:
            raw += _pack_double(_DOUBLE, -value)  # flips the first bit
        else:
            raw += _encode_rare(value)
    return raw


def _encode_int(value: int) -> bytes:
    size = (value.bit_length() + 7) >> 3
    if size > 255:
        raise ValueError(f"An int of {size} bytes can't be in a key: 255 are the most")
    if value < 0:
        value += (1 << 8 * size) - 1
        head = (
            _CODES[_ZERO - size] if size <= 8 else _CODES[_LOW_INT] + _CODES[255 - size]
        )
    else:
        head = _CODES[_ZERO + size] if size <= 8 else _CODES[_HIGH_INT] + _CODES[size]
    return head + value.to_bytes(size, "big")


def _encode_rare(value: object) -> bytes:
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, int):
        return _encode((int(value),))
    if isinstance(value, float):
        return _DOUBLE + _encode_double(float(value))
    if isinstance(value, str):
        return _encode((str.__str__(value),))
    if isinstance(value, bytes):
        return _BYTES + value.replace(b"\0", _NUL) + _END
    if isinstance(value, UUID):
        return _UUID + value.bytes
    if isinstance(value, tuple):
        return _encode_nested(value)
    raise _type_error(value)


def _encode_nested(value: tuple[object, ...]) -> bytes:
    pieces = [_TUPLE]
    levels = [iter(value)]  # instead of recursion, whose depth is limited
    while levels:
        for element in levels[-1]:
            if isinstance(element, tuple):
                pieces.append(_TUPLE)
                levels.append(iter(element))
                break
            pieces.append(_NUL if element is None else _encode((element,)))
        else:
            pieces.append(_END)
            levels.pop()
    return b"".join(pieces)


def _encode_double(value: float) -> bytes:
    if value != value:
        raise ValueError("NaN can't be in a key: it has no place in the order of keys")
    if copysign(1, value) < 0:
        return _DOUBLES.pack(value).translate(_COMPLEMENT)
    return _DOUBLES.pack(-value)


def _decode_next(raw: bytes, start: int, levels: list[list[object]]) -> int:
    """Decode the element at `start` into the innermost level; return its end."""
    code = raw[start]
    start += 1
    value: object
    if code == _STR[0] or code == _BYTES[0]:
        end = raw.index(0, start)
        while raw[end + 1 : end + 2] == b"\xff":
            end = raw.index(0, end + 2)
        text = raw[start:end].replace(_NUL, b"\0")
        value = text.decode() if code == _STR[0] else text
        start = end + 1
    elif _LOW_INT <= code <= _HIGH_INT:
        value, start = _decode_int(raw, start)
    elif code == _DOUBLE[0]:
        value, start = _decode_double(_take(raw, start, 8)), start + 8
    elif code == _TUPLE[0]:
        levels.append([])
        return start
    elif code != _NONE[0]:
        value, start = _decode_rare(raw, start)
    elif len(levels) == 1:
        value = None
    elif raw[start : start + 1] == b"\xff":
        value, start = None, start + 1
    else:
        value = tuple(levels.pop())  # the end of that tuple
    levels[-1].append(value)
    return start


def _decode_rare(raw: bytes, start: int) -> tuple[object, int]:
    code = raw[start - 1 : start]
    if code in (_FALSE, _TRUE):
        return code == _TRUE, start
    if code == _UUID:
        return UUID(bytes=_take(raw, start, 16)), start + 16
    raise ValueError(f"No element of a key begins with {code!r}")


def _take(raw: bytes, start: int, size: int) -> bytes:
    piece = raw[start : start + size]
    if len(piece) < size:
        raise ValueError("The key is cut off")
    return piece


def _decode_int(raw: bytes, start: int) -> tuple[int, int]:
    size = raw[start - 1] - _ZERO
    negative = size < 0
    size = abs(size)
    least = size
    if size > 8:
        size, least = _take(raw, start, 1)[0], 9
        size = 255 - size if negative else size
        start += 1
    value = int.from_bytes(_take(raw, start, size), "big")
    if negative:
        value -= (1 << 8 * size) - 1
    if size < least or (value.bit_length() + 7) >> 3 != size:
        raise ValueError("The key has an int with more bytes than needed")
    return value, start + size


def _decode_double(raw: bytes) -> float:
    if raw[0] & 0x80:
        value: float = -_DOUBLES.unpack(raw)[0]
    else:
        [value] = _DOUBLES.unpack(raw.translate(_COMPLEMENT))
    if value != value:
        raise ValueError("The key has a NaN")
    return value
