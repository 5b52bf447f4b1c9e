"""Entries as lines of JSON, and the entries of other stores.

A line is an object with a key and a value. The key is in ``"key"`` or, as base64 of its
bytes, in ``"key64"``. The value is in ``"value"`` or, as base64 of the bytes that the
serializer made, in ``"raw"``.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import shelve
from collections.abc import Callable, Iterator
from contextlib import closing
from dbm import whichdb
from importlib import import_module
from typing import Any, Protocol

from .keys import TupleKeys
from .store import LmdbObjectStore

Store = LmdbObjectStore[Any, Any]

_TABLES = "SELECT name, sql FROM sqlite_master WHERE type = 'table'"

# How the command line and its files write the keys of a store


class Keys(Protocol):
    """A form of keys, which fits an option `key_encoding` of the store."""

    @property
    def encoding(self) -> Any:
        """Return that option."""

    def parse(self, text: str) -> Any:
        """Return the key of an argument; ValueError if it is none."""

    def show(self, key: Any) -> str:
        """Return the key for a person to read."""

    def to_json(self, key: Any) -> Any:
        """Return the key for JSON; ValueError if JSON can't hold the key."""

    def from_json(self, content: Any) -> Any:
        """Return the key of which `to_json` made `content`; ValueError if no key."""

    def adopt(self, key: Any) -> Any:
        """Return the key for that of another store; ValueError if there is none."""


class TextKeys:
    """Keys that are text, in a codec."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    def parse(self, text: str) -> str:
        return text

    def show(self, key: str | bytes) -> str:
        if isinstance(key, bytes):
            return f"0x{key.hex()}"
        return key if key.isprintable() else ascii(key)

    def to_json(self, key: str | bytes) -> str:
        return self.from_json(key)

    def from_json(self, content: Any) -> str:
        if isinstance(content, str):
            return content
        raise ValueError(f"a key must be text, not {content!r}")

    def adopt(self, key: Any) -> str:
        if isinstance(key, str):
            return key
        raise ValueError(
            f"The key {key!r} is no text. All kinds of keys can be imported into a new "
            "store with --key-encoding tuple."
        )


class HexKeys:
    """Keys of any bytes, as hexadecimal digits."""

    encoding = None

    def parse(self, text: str) -> bytes:
        try:
            return bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise ValueError(f"{text!r} are not the digits of a key") from None

    def show(self, key: bytes) -> str:
        return key.hex()

    to_json = show

    def from_json(self, content: Any) -> bytes:
        return self.parse(str(content))

    def adopt(self, key: Any) -> bytes:
        if isinstance(key, bytes):
            return key
        raise ValueError(f"The key {key!r} is not bytes: leave out --key-encoding hex.")


class JsonKeys:
    """Keys that are tuples, numbers and text, as JSON: ``["sensor", 7]``."""

    def __init__(self) -> None:
        self.encoding = TupleKeys()

    def parse(self, text: str) -> Any:
        try:
            return self.from_json(json.loads(text))
        except ValueError:
            raise ValueError(
                f"{text!r} is no key in JSON: write text as '\"text\"', and a tuple as "
                "'[\"sensor\", 7]'"
            ) from None

    def show(self, key: Any) -> str:
        try:
            text = json.dumps(self.to_json(key), ensure_ascii=False)
        except ValueError:
            return repr(key)
        return text if text.isprintable() else ascii(text)

    def to_json(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return list(map(self.to_json, key))
        if is_plain(key):
            return key
        raise ValueError(f"JSON has no {type(key).__name__}")

    def from_json(self, content: Any) -> Any:
        if isinstance(content, list):
            return tuple(map(self.from_json, content))
        return content

    def adopt(self, key: Any) -> Any:
        return (key,) if isinstance(key, bytes) else key  # bytes are taken as encoded


# Lines


def is_plain(value: Any) -> bool:
    """Return whether JSON gives `value` back as it is."""
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(
            map(is_plain, value.values())
        )
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (str, int, bool)


def as_json(value: Any) -> str:
    """Return `value` as JSON, in ASCII if a terminal or UTF-8 can't have the text."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def key_fields(key: Any, keys: Keys) -> dict[str, Any]:
    """Return the field of a line that has the key."""
    try:
        return {"key": keys.to_json(key)}
    except ValueError:
        raw = key if isinstance(key, bytes) else keys.encoding.encode(key)
        return {"key64": base64.b64encode(raw).decode()}


def line_of(key: Any, value: Any, keys: Keys, raw: bool) -> str:
    """Return an entry as a line; ValueError if JSON can't hold the value as it is."""
    fields = key_fields(key, keys)
    if raw:
        return as_json({**fields, "raw": base64.b64encode(value).decode()})
    if is_plain(value):
        return as_json({**fields, "value": value})
    raise ValueError(
        f"JSON can't hold the value of {keys.show(key)} as it is: something in it is "
        "no text, finite number, list, dict with text as keys, True, False or None. "
        "Export the stored bytes by --raw."
    )


def parse_line(line: bytes, keys: Keys) -> tuple[Any, Any, bool]:
    """Return key, value, and whether the value is in bytes; ValueError."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ValueError(
            "it is no text in UTF-8. Stores of other libraries need --from"
        ) from None
    fields = set(content) if isinstance(content, dict) else set()
    if len(fields & {"key", "key64"}) != 1 or len(fields & {"value", "raw"}) != 1:
        raise ValueError('it must have "key" or "key64", and "value" or "raw"')
    if "key64" in content:
        key = _from_base64(content["key64"])
    else:
        key = keys.from_json(content["key"])
    if "raw" in content:
        return key, _from_base64(content["raw"]), True
    return key, content["value"], False


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise ValueError(f"{text!r} is no base64") from None


# Other stores


def pairs_of(
    kind: str, path: str, table: str | None, keys: Keys
) -> Iterator[tuple[Any, Any]]:
    """Yield the entries of another store, or of one table, by its own library.

    FileNotFoundError, ValueError: there is none. (The libraries would make a new one.)
    """
    read, file = OTHERS[kind]
    is_file = os.path.isfile(os.path.join(path, file) if file else path)
    if not (whichdb(path) if kind == "shelve" else is_file):
        if os.path.exists(path):
            raise ValueError(f"{path!r} is not of {kind}")
        raise FileNotFoundError(errno.ENOENT, "There is no such store", path)
    for key, value in read(path, table):
        yield key if kind == "lmdbm" else keys.adopt(key), value


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}: pip install {name}") from error


def _shelve(path: str, table: str | None) -> Iterator[tuple[Any, Any]]:
    with shelve.open(path, "r") as shelf:
        yield from shelf.items()


def _sqlitedict(path: str, table: str | None) -> Iterator[tuple[Any, Any]]:
    import sqlite3

    try:
        with closing(sqlite3.connect(path)) as connection:
            found = connection.execute(_TABLES).fetchall()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path!r} is not of sqlitedict: {error}") from error
    tables = [name for name, text in found if "key TEXT PRIMARY KEY" in text]
    if table is None and len(tables) == 1:
        [table] = tables
    if table not in tables:
        raise ValueError(f"{path!r} has these tables: {tables}. Name one by --table")
    library = _library("sqlitedict").SqliteDict
    with library(path, table, flag="r") as old:
        yield from old.items()


def _diskcache(path: str, table: str | None) -> Iterator[tuple[Any, Any]]:
    gone = object()
    with _library("diskcache").Cache(path) as cache:
        for key in cache:
            value = cache.get(key, gone)
            if value is not gone:  # the entry has not expired
                yield key, value


def _lmdbm(path: str, table: str | None) -> Iterator[tuple[Any, Any]]:
    with _library("lmdbm").Lmdb.open(path, "r") as old:
        yield from old.items()


_Read = Callable[[str, str | None], Iterator[tuple[Any, Any]]]
OTHERS: dict[str, tuple[_Read, str]] = {
    "shelve": (_shelve, ""),
    "sqlitedict": (_sqlitedict, ""),
    "diskcache": (_diskcache, "cache.db"),
    "lmdbm": (_lmdbm, "data.mdb"),
}
"""Readers of other libraries' stores, and the file in the directory of such a store."""
