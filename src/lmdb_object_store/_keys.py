"""Keys: as the user spells them, as LMDB stores them, in messages; and key ranges."""

from __future__ import annotations

import codecs
import reprlib
import struct
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .exceptions import SizeError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 50
_shown = _short.repr  # also of a key that is nested too deep for repr()


def describe(key: bytes | str) -> str:
    """Show a key in a message: as text where printable, else as hex, shortened."""
    if isinstance(key, str):
        raw, text = key.encode("utf-8", "surrogatepass"), key
    else:
        raw, text = key, key.decode("utf-8", "surrogateescape")
    if not text.isprintable():
        return f"0x{raw[:24].hex()}" + (f"... ({len(raw)} bytes)" if raw[24:] else "")
    return f"'{text}'" if len(text) <= 50 else f"'{text[:47]}...' ({len(raw)} bytes)"


def codec_of(encoding: Any, errors: str, normalize: str | None) -> Codec:
    """Return the codec that the options of a store ask for."""
    if encoding is None or isinstance(encoding, str):
        return KeyCodec(encoding, errors, normalize)
    if (errors, normalize) != ("strict", None):
        raise ValueError(
            "key_errors and str_normalize are for codecs, and key_encoding is "
            f"{encoding!r}"
        )
    return ObjectCodec(encoding)


def _size_error(raw: bytes, most: int, shown: str) -> SizeError:
    if not raw:
        return SizeError("Key is empty: LMDB stores keys of at least one byte.")
    return SizeError(
        f"Key is too long: {shown} has {len(raw)} bytes, and this environment takes "
        f"{most} at most. Store a hash of it instead."
    )


def add_note(error: Exception, note: str) -> None:
    """Do the same as ``error.add_note``, which Python 3.10 doesn't have."""
    notes: list[str] = getattr(error, "__notes__", [])
    vars(error)["__notes__"] = [*notes, note]


class KeyCodec:
    """Turns keys into the bytes that LMDB stores, and back into text."""

    def __init__(self, encoding: str | None, errors: str, normalize: str | None):
        try:
            codecs.lookup_error(errors)
            if encoding is not None:
                "".encode(encoding).decode(encoding)
        except LookupError as error:
            raise ValueError(f"key_encoding or key_errors: {error}") from error
        if normalize not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError(
                f"str_normalize must be 'NFC', 'NFD', 'NFKC', 'NFKD' or None, "
                f"not {normalize!r}"
            )
        self.encoding = encoding
        self.errors = errors
        self.normalize = normalize
        self.max_size = 511  # until the environment tells
        self._plain_utf8 = (
            encoding is not None
            and codecs.lookup(encoding).name == "utf-8"
            and (errors, normalize) == ("strict", None)
        )
        self.from_str = self._make_from_str()
        self.describe = describe

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.encoding, self.errors, self.normalize)

    def _make_from_str(self) -> Callable[[str], bytes]:
        encoding, errors = self.encoding, self.errors
        normalize: Any = self.normalize
        if encoding is None:
            return self._refuse_str
        if self._plain_utf8:
            return str.encode
        if normalize is None:
            return lambda key: key.encode(encoding, errors)
        to_normal = unicodedata.normalize
        return lambda key: to_normal(normalize, key).encode(encoding, errors)

    @staticmethod
    def _refuse_str(key: str) -> bytes:
        raise TypeError(
            "str keys are not allowed (set key_encoding='utf-8' or another codec "
            f"to allow them); got {describe(key)}"
        )

    def encode(self, key: object) -> bytes:
        """Return the bytes that stand for `key`, or raise if it can't be a key."""
        try:
            raw = self.from_str(key) if isinstance(key, str) else self.encode_bound(key)
        except UnicodeEncodeError as error:
            raise self._encode_error(error) from None
        if 0 < len(raw) <= self.max_size:
            return raw
        raise _size_error(raw, self.max_size, describe(raw))

    def find(self, key: object) -> bytes | None:
        """Return the bytes of what can be a key, None for everything else.

        TypeError: a str without `encoding`, which is a mistake in the options.
        """
        if isinstance(key, str) and self.encoding is None:
            self._refuse_str(key)
        try:
            return self.encode(key)
        except (TypeError, ValueError):
            return None

    def encode_bound(self, key: object) -> bytes:
        """Return the bytes of a key or of the bound of a key range, of any length."""
        if isinstance(key, str):
            return self.from_str(key)
        if isinstance(key, (bytes, bytearray, memoryview)):
            return bytes(key)
        if key is None:
            raise TypeError("Key cannot be None.")
        raise TypeError(
            f"Key must be bytes-like{' or str' if self.encoding else ''}; "
            f"got {type(key).__name__}"
        )

    def prefix_range(self, prefix: object) -> KeyRange:
        """Return the keys that begin with `prefix`."""
        return starting_with(self.encode_bound(prefix))

    def _encode_error(self, error: UnicodeEncodeError) -> UnicodeEncodeError:
        encoding, key, start, end, reason = error.args
        reason += f". The key {key!r} can't be stored"
        if self.errors == "strict":
            reason += (
                '. For file names open the store with key_errors="surrogateescape"'
            )
        return UnicodeEncodeError(encoding, key, start, end, reason)

    def name(self, raw: bytes) -> bytes | str:
        """Return the key that `encode` turns into `raw`: a text if there is one."""
        if self.encoding is not None:
            try:
                text = self.decode(raw)
                if self._plain_utf8 or self.from_str(text) == raw:
                    return text
            except ValueError:  # no text in that codec
                pass
        return raw

    def names(self, raws: Sequence[bytes]) -> list[Any]:
        """Return the `name` of each of many keys."""
        if self._plain_utf8:
            try:
                return list(map(bytes.decode, raws))
            except UnicodeDecodeError:
                pass
        return list(map(self.name, raws))

    def decode(self, raw: bytes) -> str:
        """Return the text of an encoded key; ValueError if there is none."""
        try:
            return raw.decode(self.encoding or "", self.errors)
        except TypeError as error:  # a handler that only encodes
            raise ValueError(f"Key {describe(raw)} can't be decoded: {error}") from None


class ObjectCodec:
    """Does the same as `KeyCodec`, by an object of the user's.

    Keys that are bytes-like are encoded already.
    """

    errors = "strict"
    normalize = None

    def __init__(self, encoding: Any) -> None:
        methods = (getattr(encoding, name, None) for name in ("encode", "decode"))
        if isinstance(encoding, type) or not all(map(callable, methods)):
            raise TypeError(
                "key_encoding must be the name of a codec, or an object with "
                f"encode(key) and decode(bytes); got {encoding!r}"
            )
        self.encoding = encoding
        self.max_size = 511  # until the environment tells
        self._is_strict = bool(getattr(encoding, "strict", False))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.encoding,)

    def encode(self, key: object) -> bytes:
        raw = self.encode_bound(key)
        if 0 < len(raw) <= self.max_size:
            return raw
        raise _size_error(raw, self.max_size, self.describe(raw))

    def find(self, key: object) -> bytes | None:
        try:
            return self.encode(key)
        except (TypeError, ValueError):
            return None

    def encode_bound(self, key: object) -> bytes:
        if isinstance(key, (bytes, bytearray, memoryview)):
            return bytes(key)
        if key is None:
            raise TypeError("Key cannot be None.")
        try:
            raw: object = self.encoding.encode(key)
        except (TypeError, ValueError) as error:
            add_note(error, f"while encoding the key {_shown(key)}")
            raise
        # Such come from keys of another type: `in` is to be False for these.
        except (AttributeError, LookupError, ArithmeticError, struct.error) as error:
            text = f"{_shown(key)} can't be encoded as a key: {error!r}"
            raise TypeError(text) from error
        if type(raw) is not bytes:
            raise TypeError(
                f"encode() of key_encoding must return bytes, not {type(raw).__name__}"
            )
        return raw

    def prefix_range(self, prefix: object) -> KeyRange:
        bounds = getattr(self.encoding, "bounds", None)
        if bounds is None or isinstance(prefix, (bytes, bytearray, memoryview)):
            return starting_with(self.encode_bound(prefix))
        low, high = bounds(prefix)
        if not (isinstance(low, bytes) and isinstance(high, bytes)):
            raise TypeError("bounds() of key_encoding must return two bytes objects")
        return KeyRange(low, high)

    def name(self, raw: bytes) -> Any:
        try:
            key = self.decode(raw)
            if self._is_strict or self.encode_bound(key) == raw:
                return key
        except Exception:  # no key of that encoding
            pass
        return raw

    def names(self, raws: Sequence[bytes]) -> list[Any]:
        return list(map(self.name, raws))

    def decode(self, raw: bytes) -> Any:
        try:
            return self.encoding.decode(raw)
        except Exception as error:
            raise ValueError(
                f"Key {describe(raw)} can't be decoded: {error}"
            ) from error

    def describe(self, key: bytes | str) -> str:
        name = self.name(key) if isinstance(key, bytes) else key
        if isinstance(name, bytes):
            return describe(name)
        return _shown(name)


Codec = KeyCodec | ObjectCodec


class KeyRange(NamedTuple):
    """The keys from `low` on and before `high` (None: to the end), encoded."""

    low: bytes = b""
    high: bytes | None = None

    def holds(self, key: bytes) -> bool:
        return self.low <= key and (self.high is None or key < self.high)

    def beyond(self, key: bytes, reverse: bool) -> KeyRange:
        """Return the rest of this range after (or before) `key`."""
        if reverse:
            return KeyRange(self.low, key)
        return KeyRange(key + b"\0", self.high)  # no key comes between the two

    def overlap(self, other: KeyRange) -> KeyRange:
        """Return the keys that are in both ranges."""
        highs = [high for high in (self.high, other.high) if high is not None]
        return KeyRange(max(self.low, other.low), min(highs, default=None))


def starting_with(prefix: bytes) -> KeyRange:
    """Return the keys that begin with `prefix`."""
    head = prefix.rstrip(b"\xff")
    end = head[:-1] + bytes([head[-1] + 1]) if head else None
    return KeyRange(prefix, end)


ALL = KeyRange()
