"""Keys: what the user gives, what LMDB stores, what a message shows."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable
from typing import Any

from .exceptions import SizeError


def describe(key: bytes | str) -> str:
    """Show a key in a message: as text where printable, else as hex, shortened."""
    if isinstance(key, str):
        raw, text = key.encode("utf-8", "surrogatepass"), key
    else:
        raw, text = key, key.decode("utf-8", "surrogateescape")
    if not text.isprintable():
        return f"0x{raw[:24].hex()}" + (f"... ({len(raw)} bytes)" if raw[24:] else "")
    return f"'{text}'" if len(text) <= 50 else f"'{text[:47]}...' ({len(raw)} bytes)"


class KeyCodec:
    """Turns keys into the bytes that LMDB stores, and back into text.

    Parameters
    ----------
    encoding, errors, normalize
        As `LmdbObjectStore` documents them.

    Raises
    ------
    TypeError, ValueError
        An unknown codec, error handler or normal form.
    """

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
        self.max_size = 511  # until the environment tells (`use_limit`)
        self.from_str = self._make_from_str()

    def _make_from_str(self) -> Callable[[str], bytes]:
        encoding, errors = self.encoding, self.errors
        normalize: Any = self.normalize
        if encoding is None:
            return self._refuse_str
        if normalize is not None:
            to_normal = unicodedata.normalize
            return lambda key: to_normal(normalize, key).encode(encoding, errors)
        if errors == "strict" and codecs.lookup(encoding).name == "utf-8":
            return str.encode
        return lambda key: key.encode(encoding, errors)

    @staticmethod
    def _refuse_str(key: str) -> bytes:
        raise TypeError(
            "str keys are not allowed (set key_encoding='utf-8' or another codec "
            f"to allow them); got {describe(key)}"
        )

    def encode(self, key: object) -> bytes:
        """Return the bytes that stand for `key`.

        Raises
        ------
        TypeError
            Not bytes-like, nor a str where a key encoding is set.
        UnicodeEncodeError
            A str that the codec can't encode.
        SizeError
            Empty, or longer than LMDB's limit.
        """
        if isinstance(key, str):
            raw = self.from_str(key)
        elif isinstance(key, (bytes, bytearray, memoryview)):
            raw = bytes(key)
        elif key is None:
            raise TypeError("Key cannot be None.")
        else:
            raise TypeError(
                f"Key must be bytes-like{' or str' if self.encoding else ''}; "
                f"got {type(key).__name__}"
            )
        if 0 < len(raw) <= self.max_size:
            return raw
        if not raw:
            raise SizeError("Key is empty: LMDB stores keys of at least one byte.")
        raise SizeError(
            f"Key is too long: {describe(raw)} has {len(raw)} bytes, and this "
            f"environment takes {self.max_size} at most. Store a hash of it instead."
        )

    def decode(self, raw: bytes) -> str:
        """Return the text of an encoded key.

        Raises
        ------
        ValueError
            It is no text in that codec.
        """
        try:
            return raw.decode(self.encoding or "", self.errors)
        except TypeError as error:  # a handler that only encodes
            raise ValueError(f"Key {describe(raw)} can't be decoded: {error}") from None
