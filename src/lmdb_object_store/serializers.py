"""Serializers: how the values of a store become bytes.

A serializer is any object, or a module, that has ``dumps(obj)``, which returns bytes,
and ``loads(raw)``. A serializer that needs the key of the value has
``dumps_for(key, obj)`` and ``loads_for(key, raw)`` instead, with the key as bytes.
`Compressed`, `Checked` and `Signed` go around another serializer.

Several threads may call a serializer at the same time. All of this module allow that.

The serializer is an option of a store object, and not of the file. Two stores on one
file may have different serializers. A store that is sent to another process takes the
serializer along, which must be picklable then. For a module its name is sent.
"""

from __future__ import annotations

import pickle
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from importlib import import_module
from threading import local
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Protocol
from zlib import crc32

from ._allow import Allowed

__all__ = [
    "Bytes",
    "Checked",
    "Compressed",
    "Json",
    "KeyedSerializer",
    "Pickle",
    "Serializer",
    "Signed",
]

if TYPE_CHECKING:
    from hmac import HMAC

    from typing_extensions import TypeVar

    _T = TypeVar("_T", default=Any)
else:
    from typing import TypeVar

    _T = TypeVar("_T")

_PLAIN, _KEYED = ("dumps", "loads"), ("dumps_for", "loads_for")
_SMALL = 64  # bytes, up to which hardly any value shrinks
_MAGIC = b"\x00LOS"  # no pickle and no JSON begins so
_CODECS = {"zlib": b"\x01", "zstd": b"\x02"}
_STORED = b"\x00"
_HEADER = len(_MAGIC) + 1
_RESIDUE = 0x2144DF1C
"""The CRC-32 of anything that its own CRC-32 follows, the lowest byte first."""
_DIGEST = 32  # bytes of SHA-256
_SHORTEST_KEY = 16  # bytes; RFC 2104 wants a key of at least as many as the digest


class Serializer(Protocol[_T]):
    """An object or a module with ``dumps`` and ``loads``."""

    @property
    def dumps(self) -> Callable[[_T], bytes | bytearray | memoryview]:
        """Return the bytes of an object, or raise."""

    @property
    def loads(self) -> Callable[[bytes], _T]:
        """Return the object of bytes that `dumps` has returned, or raise."""


class KeyedSerializer(Protocol[_T]):
    """An object with ``dumps_for`` and ``loads_for``, which get the key, too."""

    @property
    def dumps_for(self) -> Callable[[bytes, _T], bytes | bytearray | memoryview]:
        """Return the bytes of an object to be stored under a key, or raise."""

    @property
    def loads_for(self) -> Callable[[bytes, bytes], _T]:
        """Return the object of the bytes stored under a key, or raise."""


if TYPE_CHECKING:
    AnySerializer = Serializer[_T] | KeyedSerializer[_T]


class Pickle:
    """Python objects, by pickle: the default.

    Unpickling can run any code, unless `allow` says which classes and functions a
    pickle may name. Even then a pickle can ask for more memory than there is. And it
    can call the allowed classes and functions with any arguments, set attributes of the
    objects that they return, and call methods such as ``append`` of these. So don't
    allow a class whose methods can do harm, one that passes on attributes of others (as
    `collections.UserList` does), nor one that returns an object which others use, too.
    Allow a module only if you know all its classes: ``numpy.memmap`` overwrites files.

    Parameters
    ----------
    protocol : int
        The protocol of the pickles that are written. All protocols are read. The
        default is fixed, so that older Python versions can read the values when a new
        version has a higher protocol. With `allow`, bytes need protocol 3, and
        bytearray 5.
    allow : iterable, optional
        The classes, functions and modules that a pickle may name beside plain data
        (None, numbers, str, bytes, tuple, list, dict, set and the like), as objects or
        as names such as ``"datetime.date"``. A module stands for all classes that it
        defines, without its functions and submodules. ``()`` allows plain data only.
        None allows everything.

    Raises
    ------
    TypeError, ValueError
        There is no such protocol, or `allow` has an object that can't be pickled by its
        name.

    Notes
    -----
    A put of an object that `allow` would not let in again raises
    `pickle.PicklingError`. With `allow`, large values are copied before they are
    unpickled. Values that name a class or function are unpickled by Python code, which
    takes about ten times as long (measured with a small object). Objects that a method
    of their class restores, such as `zoneinfo.ZoneInfo`, can't be allowed.
    """

    def __init__(
        self, protocol: int = 5, *, allow: Iterable[Any] | None = None
    ) -> None:
        if not isinstance(protocol, int):
            raise TypeError(
                f"protocol must be an int, not {type(protocol).__name__}: classes that "
                "are allowed go into allow=[...]"
            )
        if not 0 <= protocol <= pickle.HIGHEST_PROTOCOL:
            raise ValueError(
                f"protocol must be from 0 to {pickle.HIGHEST_PROTOCOL}, not {protocol}"
            )
        self._protocol = protocol
        self._allowed = None if allow is None else Allowed(allow)

    @property
    def protocol(self) -> int:
        """The protocol of the pickles that are written."""
        return self._protocol

    @property
    def allow(self) -> tuple[Any, ...] | None:
        """The classes and functions that may be named, and names; None allows all."""
        return None if self._allowed is None else self._allowed.allow

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), allow=self.allow), (self._protocol,)

    def __repr__(self) -> str:
        allow = "" if self.allow is None else f", allow={self.allow!r}"
        return f"Pickle(protocol={self._protocol}{allow})"

    def dumps(self, obj: Any) -> bytes:
        """Return the pickle of `obj`; PicklingError if it can't be pickled."""
        if self._allowed is None:
            return pickle.dumps(obj, self._protocol)
        return self._allowed.dumps(obj, self._protocol)

    def loads(self, raw: bytes) -> Any:
        """Return the object of a pickle; UnpicklingError if it may not be loaded."""
        return pickle.loads(raw) if self._allowed is None else self._allowed.loads(raw)


PICKLE = Pickle()


class Json:
    """Objects that JSON can hold, as UTF-8: safe to read, also by other programs.

    A tuple comes back as a list, and the keys of a dict as str. A put of anything else
    that JSON doesn't have, NaN for example, raises TypeError or ValueError.
    """

    def __init__(self) -> None:
        import json  # here, as the import takes time

        compact = (",", ":")
        encoder = json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, separators=compact
        )
        self._encode = encoder.encode
        self._decode = json.JSONDecoder().decode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __repr__(self) -> str:
        return "Json()"

    def dumps(self, obj: Any) -> bytes:
        """Return `obj` as JSON."""
        return self._encode(obj).encode()

    def loads(self, raw: bytes) -> Any:
        """Return the object of a JSON text; ValueError if it is none."""
        return self._decode(raw.decode())


class Bytes:
    """Bytes as they are: for files of other programs, and values that are ready.

    A put of anything but bytes, bytearray and memoryview raises TypeError.
    """

    def __repr__(self) -> str:
        return "Bytes()"

    def dumps(self, obj: bytes) -> bytes:
        """Return `obj` as bytes; TypeError if it is not bytes-like."""
        if not isinstance(obj, (bytes, bytearray, memoryview)):
            raise TypeError(
                f"serializer=Bytes() stores bytes, not {type(obj).__name__}: encode "
                "the value, or use another serializer"
            )
        return bytes(obj)

    def loads(self, raw: bytes) -> bytes:
        """Return `raw`."""
        return raw


class Compressed(Generic[_T]):
    """The values of another serializer, compressed where that makes them smaller.

    Values that are not compressed, or by another codec, are read, too. So a store that
    has data can be opened with `Compressed`: later puts are compressed.

    Parameters
    ----------
    inner : Serializer or KeyedSerializer
    codec : {"zlib", "zstd"}
        ``"zstd"`` is smaller and faster. It needs Python 3.14 or the package
        ``zstandard``, where the values are read, too.
    level : int, optional
        The codec's level; None is the codec's own default.

    Raises
    ------
    ImportError
        There is no zstd. (At the read of a value, this is the cause of a `LoadError`.)
    TypeError, ValueError
        There is no such codec or level.

    Notes
    -----
    A compressed value is a zero byte, ``LOS``, a byte that says how (1 zlib, 2 zstd),
    and the compressed bytes. A value that begins like this by itself has 0 for that
    byte, and follows as it is. A small value can become much memory when it is
    decompressed: put `Signed` around this where others can write.
    """

    def __init__(
        self,
        inner: AnySerializer[_T] = PICKLE,
        codec: str = "zlib",
        level: int | None = None,
    ) -> None:
        self._inner = portable(inner)
        if codec not in _CODECS:
            raise ValueError(f"codec must be one of {list(_CODECS)}, not {codec!r}")
        if level is not None and not isinstance(level, int):
            raise TypeError(f"level must be an int, not {type(level).__name__}")
        self._dumps, self._loads = by_key(inner)
        self._mark = _MAGIC + _CODECS[codec]
        self._codec = (_Zlib if codec == "zlib" else _Zstd)(level)
        self._options = codec, level

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, *self._options)

    def __repr__(self) -> str:
        codec, level = self._options
        shown = "" if level is None else f", level={level}"
        return f"Compressed({self._inner!r}, {codec!r}{shown})"

    def dumps_for(self, key: bytes, obj: _T) -> bytes:
        """Return the bytes of `obj`, compressed if that makes them smaller."""
        raw = self._dumps(key, obj)
        if len(raw) > _SMALL:
            packed = self._codec.compress(raw)
            if len(packed) + _HEADER < len(raw):
                return self._mark + packed
        return _MAGIC + _STORED + raw if raw.startswith(_MAGIC) else raw

    def loads_for(self, key: bytes, raw: bytes) -> _T:
        """Return the object of compressed bytes, or of others."""
        if not raw.startswith(_MAGIC):
            return self._loads(key, raw)
        how, rest = raw[_HEADER - 1 : _HEADER], raw[_HEADER:]
        if how == _CODECS["zlib"]:
            rest = zlib.decompress(rest)
        elif how == _CODECS["zstd"]:
            rest = _unpacking_zstd().decompress(rest)
        elif how != _STORED:
            raise ValueError("the value is damaged, or compressed in an unknown way")
        return self._loads(key, rest)


class Checked(Generic[_T]):
    """The values of another serializer, with a checksum of key and value.

    A read raises `LoadError` if the value is damaged, stands under another key, or has
    no checksum. The checksum (CRC-32, 4 bytes, behind the value) misses one damaged
    value in four billion. It is no protection against somebody who means to change
    values: see `Signed`. It costs less than 0.5 µs for a small value.

    Pickle stops at its own end. So stores without `Checked` can read such values of
    `Pickle`.

    Parameters
    ----------
    inner : Serializer or KeyedSerializer
    """

    def __init__(self, inner: AnySerializer[_T] = PICKLE) -> None:
        self._inner = portable(inner)
        self._dumps, self._loads = by_key(inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner,)

    def __repr__(self) -> str:
        return f"Checked({self._inner!r})"

    def dumps_for(self, key: bytes, obj: _T) -> bytes:
        """Return the bytes of `obj`, and their checksum."""
        raw = self._dumps(key, obj)
        return raw + crc32(raw, crc32(key)).to_bytes(4, "little")

    def loads_for(self, key: bytes, raw: bytes) -> _T:
        """Return the object, after its checksum has been compared."""
        if crc32(raw, crc32(key)) != _RESIDUE:
            raise ValueError(
                "the checksum doesn't fit: the value is damaged, was put under another "
                "key, or was written without Checked()"
            )
        return self._loads(key, raw[:-4])


class Signed(Generic[_T]):
    """The values of another serializer, signed: for files that others can write to.

    The signature (HMAC-SHA256 of key and value, 32 bytes, behind the value) is checked
    before anything is loaded: a read raises `LoadError` if it doesn't fit. It hides
    nothing. It can't tell that an old value, which was once put under the same key, has
    been put back, nor that a key was deleted. Give each store a signing key of its own,
    or values of one store could be put into the other.

    A store that is pickled, to be sent to another process, takes the signing keys
    along. Such a pickle must be kept as secret as they are.

    Parameters
    ----------
    inner : Serializer or KeyedSerializer
    key : bytes or list of bytes
        At least 16 bytes, from ``secrets.token_bytes(32)`` for example. The first of
        several signing keys signs, and all verify. So they can be changed. A value of
        the third costs three signatures to read, about 1.5 µs each for a small value.

    Raises
    ------
    TypeError, ValueError
        A signing key is not bytes, or too short.
    """

    def __init__(self, inner: AnySerializer[_T], key: bytes | Sequence[bytes]) -> None:
        self._inner = portable(inner)
        keys: list[Any] = list(key) if isinstance(key, (list, tuple)) else [key]
        if not keys or not all(isinstance(k, (bytes, bytearray)) for k in keys):
            raise TypeError("key must be bytes, or a list of bytes")
        if min(map(len, keys)) < _SHORTEST_KEY:
            raise ValueError(
                f"a key must have {_SHORTEST_KEY} bytes or more: make one by "
                "secrets.token_bytes(32), and keep it"
            )
        import hmac  # here, as the import takes time

        self._keys = [bytes(key) for key in keys]
        self._signers = [hmac.new(key, digestmod="sha256") for key in self._keys]
        self._equal = hmac.compare_digest
        self._dumps, self._loads = by_key(inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._inner, self._keys)

    def __repr__(self) -> str:
        return f"Signed({self._inner!r}, key=...)"

    def dumps_for(self, key: bytes, obj: _T) -> bytes:
        """Return the bytes of `obj`, and their signature by the first key."""
        raw = self._dumps(key, obj)
        return raw + _signature(self._signers[0], key, raw)

    def loads_for(self, key: bytes, raw: bytes) -> _T:
        """Return the object, after its signature has been verified."""
        value, signature = memoryview(raw)[:-_DIGEST], raw[-_DIGEST:]
        for signer in self._signers:
            if self._equal(_signature(signer, key, value), signature):
                return self._loads(key, raw[:-_DIGEST])
        raise ValueError(
            "the signature doesn't fit: the value was changed, was put under another "
            "key, or was written with another signing key or without Signed()"
        )


def _signature(signer: HMAC, key: bytes, raw: bytes | memoryview) -> bytes:
    signer = signer.copy()
    # The length keeps the end of the key apart from the beginning of the value.
    signer.update(len(key).to_bytes(4, "big") + key)
    signer.update(raw)
    return signer.digest()


class _Module:
    """A module as a serializer, which can be pickled."""

    def __init__(self, name: str, module: Any = None) -> None:
        self.module = module or import_module(name)
        self.dumps = self.module.dumps
        self.loads = self.module.loads

    def __reduce__(self) -> tuple[Any, ...]:
        return _Module, (self.module.__name__,)

    def __repr__(self) -> str:
        return str(self.module.__name__)


def portable(serializer: Any) -> Any:
    """Return a serializer that can be pickled; TypeError if it is none."""
    if isinstance(serializer, type):
        raise TypeError(
            f"serializer must be an object, not a class: {serializer.__name__}()"
        )
    plain = all(callable(getattr(serializer, name, None)) for name in _PLAIN)
    if plain and isinstance(serializer, ModuleType):
        return _Module(serializer.__name__, serializer)
    if plain or is_keyed(serializer):
        return serializer
    raise TypeError(
        "serializer must have dumps(obj) and loads(bytes), as the module pickle does; "
        f"got {type(serializer).__name__}"
    )


def original(serializer: Any) -> Any:
    """Return the serializer that `portable` was given."""
    return serializer.module if isinstance(serializer, _Module) else serializer


def by_key(
    serializer: AnySerializer[_T],
) -> tuple[Callable[[bytes, _T], bytes], Callable[[bytes, bytes], _T]]:
    """Return ``dumps_for(key, obj)`` and ``loads_for(key, raw)`` of any serializer.

    The former returns bytes, whatever the serializer returns, or raises TypeError.
    """
    any_serializer: Any = serializer
    if type(any_serializer) in (Compressed, Checked, Signed):
        return any_serializer.dumps_for, any_serializer.loads_for
    if type(any_serializer) is Pickle and any_serializer.allow is None:
        return _pickle_by_key(any_serializer.protocol)
    if is_keyed(serializer):
        dumps_for, loads_for = any_serializer.dumps_for, any_serializer.loads_for
    else:
        dumps, loads = any_serializer.dumps, any_serializer.loads
        dumps_for, loads_for = lambda _, obj: dumps(obj), lambda _, raw: loads(raw)

    def as_bytes(key: bytes, obj: _T) -> bytes:
        raw = dumps_for(key, obj)
        return raw if type(raw) is bytes else _as_bytes(raw, serializer)

    return as_bytes, loads_for


def _pickle_by_key(
    protocol: int,
) -> tuple[Callable[..., bytes], Callable[..., Any]]:
    """Return the same as `by_key`, but with a call less on the way."""

    def dumps_for(_: bytes, obj: object) -> bytes:
        return pickle.dumps(obj, protocol)

    def loads_for(_: bytes, raw: bytes) -> Any:
        return pickle.loads(raw)

    return dumps_for, loads_for


def is_keyed(serializer: Any) -> bool:
    """Return whether a serializer needs the key of the value."""
    return all(callable(getattr(serializer, name, None)) for name in _KEYED)


def _as_bytes(raw: Any, serializer: Any) -> bytes:
    if isinstance(raw, (bytes, bytearray, memoryview)):
        return bytes(raw)
    hint = ""
    if isinstance(raw, str):
        hint = (
            ". For JSON use lmdb_object_store.serializers.Json(); else give an object "
            "whose dumps() encodes the text, and whose loads() decodes it"
        )
    raise TypeError(
        f"dumps() of {serializer!r} must return bytes, not {type(raw).__name__}{hint}"
    )


class _Zlib:
    def __init__(self, level: int | None) -> None:
        try:
            zlib.compressobj(-1 if level is None else level)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"level: zlib has no {level}: {error}") from error
        self.compress = partial(zlib.compress, level=-1 if level is None else level)


class _Zstd(local):
    """The zstd codec of one thread: its objects are not for several at once."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]

    def __init__(self, level: int | None = None) -> None:
        if level is None:
            level = 3  # zstd's own
        if sys.version_info >= (3, 14):
            from compression import zstd

            packing = zstd.ZstdCompressor(level)
            self.compress = partial(packing.compress, mode=packing.FLUSH_FRAME)
            self.decompress = zstd.decompress
            return
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(
                "zstd needs Python 3.14, or the package: pip install zstandard"
            ) from error
        try:
            self.compress = zstandard.ZstdCompressor(level).compress
        except OverflowError as error:
            raise ValueError(f"level: zstd has no {level}: {error}") from error
        self.decompress = zstandard.ZstdDecompressor().decompress


@lru_cache(1)
def _unpacking_zstd() -> _Zstd:
    return _Zstd()
