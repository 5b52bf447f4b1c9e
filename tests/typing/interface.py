"""What a type checker infers for users of the store. Checked, never run."""

import json
import pickle
from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import lmdb
from typing_extensions import assert_type

from lmdb_object_store import LmdbObjectStore, Snapshot
from lmdb_object_store.keys import KeyEncoding, TupleKeys
from lmdb_object_store.serializers import (
    Bytes,
    Checked,
    Compressed,
    Json,
    KeyedSerializer,
    Pickle,
    Serializer,
    Signed,
)


@dataclass
class User:
    name: str


Decoded = tuple[dict[str, User], list[str]]
AsMypySees = LmdbObjectStore[bytes, User]
BytesAndKeys = tuple[dict[bytes, User], list[str]]


def without_annotations() -> None:
    store = LmdbObjectStore("p")
    assert_type(store, LmdbObjectStore[bytes, Any])
    store[b"a"] = 1
    store.put(b"b", None)
    store.put_many({b"d": 1, b"e": "two"})
    store.put_many([(b"f", 1), (b"g", [2])])
    ages = {b"ann": 40}
    store.put_many(ages)
    assert_type(store[b"a"], Any)
    assert_type(store.get(b"b"), Any | None)
    found, not_found = store.get_many([b"a", b"b"])
    assert_type(found, dict[bytes, Any])
    assert_type(not_found, list[bytes])
    del store[b"a"]
    store["b"] = 1  # type: ignore[arg-type]
    store[5] = 1  # type: ignore[arg-type]
    store.get(None)  # type: ignore[call-overload]


def kinds_of_keys(encoding: str | None, times: KeyEncoding[datetime]) -> None:
    store = LmdbObjectStore("p", key_encoding="utf-8")
    assert_type(store, LmdbObjectStore[str, Any])
    for key in store:
        assert_type(key.upper(), str)
    store[b"b"] = 1  # type: ignore[arg-type]
    by_time = LmdbObjectStore("p", 10, key_encoding=times, subdir=False)
    assert_type(by_time, LmdbObjectStore[datetime, Any])
    by_time["today"] = 1  # type: ignore[arg-type]
    by_tuple = LmdbObjectStore("p", key_encoding=TupleKeys())
    assert_type(by_tuple, LmdbObjectStore[Any, Any])
    for name, number, moment in by_tuple:
        by_tuple[name, number] = by_tuple[5] = moment
    readings: LmdbObjectStore[tuple[str, int, float], User] = LmdbObjectStore(
        "p", key_encoding=TupleKeys()
    )
    readings = LmdbObjectStore[tuple[str, int, float], User](
        "p", key_encoding=TupleKeys()
    )
    for reading, user in readings.items(("sensor", 7), start=("sensor", 7, 1.5)):
        assert_type(reading, tuple[str, int, float])
        assert_type(user, User)
    readings["sensor", 7] = User("a")  # type: ignore[arg-type]
    either: LmdbObjectStore[str | bytes] = LmdbObjectStore("p", key_encoding=encoding)
    either["a"] = either[b"b"] = 1


def kinds_of_values(secret: bytes) -> None:
    raw = LmdbObjectStore("p", serializer=Bytes())
    assert_type(raw, LmdbObjectStore[bytes, bytes])
    raw[b"k"] = "text"  # type: ignore[arg-type]
    utf8 = LmdbObjectStore("p", key_encoding="utf-8", serializer=Signed(Utf8(), secret))
    assert_type(utf8, LmdbObjectStore[str, str])
    packed = LmdbObjectStore("p", serializer=Checked(Compressed(Utf8())))
    assert_type(packed[b"k"], str)
    data = LmdbObjectStore("p", key_encoding=TupleKeys(), serializer=Json())
    assert_type(data[5], Any)
    by_module = LmdbObjectStore("p", serializer=pickle)
    assert_type(by_module[b"k"], Any)
    users: LmdbObjectStore[str, User] = LmdbObjectStore(
        "p", key_encoding="utf-8", serializer=Pickle(allow=[User])
    )
    assert_type(users["ann"], User)
    assert_type(Compressed(), Compressed[Any])
    assert_type(Checked(), Checked[Any])
    LmdbObjectStore("p", serializer=json)  # type: ignore[arg-type]
    LmdbObjectStore("p", serializer=5)  # type: ignore[call-overload]


class Utf8:
    def dumps(self, obj: str) -> bytes:
        return obj.encode()

    def loads(self, raw: bytes) -> str:
        return raw.decode()


def options(path: Path) -> None:
    LmdbObjectStore(path, 100)
    LmdbObjectStore(
        path,
        autoflush_on_read=False,
        key_encoding="utf-8",
        key_errors="surrogateescape",
        str_normalize="NFC",
        batch_bytes=2**20,
        max_map_size=None,
        timeout=1,
        flush_interval=None,
        map_size=2**30,
        subdir=False,
        readonly=False,
        metasync=True,
        sync=True,
        map_async=False,
        mode=0o600,
        create=True,
        readahead=True,
        writemap=False,
        meminit=True,
        max_readers=126,
        max_dbs=0,
        max_spare_txns=0,
        lock=True,
        lib_version=1,
    )
    several: dict[str, Any] = {"map_size": 2**30}
    LmdbObjectStore(path, **several)
    LmdbObjectStore(5)  # type: ignore[call-overload]
    LmdbObjectStore(path, "1000")  # type: ignore[call-overload]
    LmdbObjectStore(path, key_encoding=8)  # type: ignore[call-overload]
    LmdbObjectStore(path, max_map_size="1G")  # type: ignore[call-overload]
    LmdbObjectStore(path, map_size="1G")  # type: ignore[call-overload]
    LmdbObjectStore(path, mapsize=2**30)  # type: ignore[call-overload]


def annotated() -> None:
    store: LmdbObjectStore[str, User] = LmdbObjectStore("p", key_encoding="utf-8")
    assert_type(store["ann"], User)
    values_only: LmdbObjectStore[bytes] = LmdbObjectStore("p")
    assert_type(values_only[b"k"], Any)


def forgotten_key_encoding() -> None:
    # pyright refuses the call; mypy takes bytes for the keys, and refuses str.
    store = LmdbObjectStore[str, User]("p")  # pyright: ignore[reportCallIssue]
    assert_type(store, AsMypySees)  # pyright: ignore[reportAssertTypeFailure]


def point_access(user: User) -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")
    store["ann"] = user
    store.put("ann", user)
    assert_type(store["ann"], User)
    assert_type(store.get("ann"), User | None)
    assert_type(store.get("ann", None), User | None)
    assert_type(store.get("ann", user), User)
    assert_type(store.get("ann", default=0), User | int)
    assert_type("ann" in store, bool)
    assert_type(store.exists("ann"), bool)
    assert_type(store.exists("ann", flush=True), bool)
    store.delete("ann")
    del store["ann"]

    store[b"ann"] = user  # type: ignore[arg-type]
    store["ann"] = "Ann"  # type: ignore[arg-type]
    store[b"ann"]  # type: ignore[index]
    del store[b"ann"]  # type: ignore[arg-type]
    store.put(b"ann", user)  # type: ignore[arg-type]
    store.put("ann", "Ann")  # type: ignore[arg-type]
    store.get(b"ann")  # type: ignore[call-overload]
    store.exists(b"ann")  # type: ignore[arg-type]
    store.delete(b"ann")  # type: ignore[arg-type]
    _ = store.get("ann").name  # type: ignore[union-attr]


def many(user: User) -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")

    def items() -> Iterator[tuple[str, User]]:
        yield "ann", user

    def keys() -> Iterator[str]:
        yield "ann"

    store.put_many({"ann": user})
    store.put_many({"ann": user}.items())
    store.put_many([("ann", user)])
    store.put_many(items())
    ages = {"ann": 40}
    triples = [("ann", user, 40)]
    store.put_many(ages)  # type: ignore[arg-type]
    store.put_many(ages.items())  # type: ignore[arg-type]
    store.put_many(triples)  # type: ignore[arg-type]
    store.put_many(keys())  # type: ignore[arg-type]

    assert_type(store.get_many(["ann"]), BytesAndKeys)
    assert_type(store.get_many(keys()), BytesAndKeys)
    store.get_many([b"ann"])  # type: ignore[list-item]
    store.get_many(5)  # type: ignore[call-overload]


def decoding() -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")
    keys = ["ann"]
    assert_type(store.get_many(keys), tuple[dict[bytes, User], list[str]])
    assert_type(store.get_many(keys, decode_keys=True), Decoded)
    assert_type(store.get_many(keys, decode_not_found=True), BytesAndKeys)
    assert_type(store.get_many(keys, decode_keys=True, decode_not_found=False), Decoded)
    store.get_many(keys, True)  # type: ignore[call-overload]


def mapping(user: User) -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")
    as_mapping: MutableMapping[str, User] = store
    assert_type(as_mapping["ann"], User)
    assert_type(iter(store), Iterator[str])
    assert_type(reversed(store), Iterator[str])
    assert_type(list(store), list[str])
    assert_type(dict(store), dict[str, User])
    assert_type(len(store), int)
    assert_type(bool(store), bool)
    assert_type(repr(store), str)
    assert_type(store == {"ann": user}, bool)
    for name in store:
        assert_type(name, str)


def mapping_without_annotations() -> None:
    store = LmdbObjectStore("p", key_encoding="utf-8")
    assert_type(iter(store), Iterator[str])
    assert_type(store.popitem(), tuple[str, Any])
    assert_type(store.pop("ann"), Any)
    assert_type(store.setdefault("ann", 1), Any)
    assert_type(list(store.items("a")), list[tuple[str, Any]])
    ages = {"ann": 40}
    store.update(ages)
    store.update(LmdbObjectStore[str, int]("q", key_encoding="utf-8"))
    store.update(ages.items(), bob=1)
    store.update(ann=1)
    store |= ages
    store |= LmdbObjectStore[str, int]("q", key_encoding="utf-8")
    store.delete_many(ages)


def views() -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")
    keys: KeysView[str] = store.keys()
    values: ValuesView[User] = store.values()
    items: ItemsView[str, User] = store.items()
    assert_type(iter(keys), Iterator[str])
    for key in store.keys("a", start="an", stop="b"):
        assert_type(key, str)
    for value in store.values(prefix="a", start="an", stop="b"):
        assert_type(value, User)
    for key, value in store.items("a", start=None, stop="b"):
        assert_type(key, str)
        assert_type(value, User)
    assert_type(next(iter(values)), User)
    assert_type(next(iter(items)), tuple[str, User])
    assert_type(next(reversed(store.keys())), str)
    assert_type(next(reversed(store.values())), User)
    assert_type(next(reversed(store.items())), tuple[str, User])
    assert_type(len(store.keys("a")), int)
    assert_type("ann" in store.keys("a"), bool)
    assert_type(store.keys() & {"ann"}, set[str])
    assert_type(store.keys() - {"ann"}, set[str])
    assert_type(store.keys() | {5}, set[str | int])
    assert_type(store.keys().isdisjoint(["ann"]), bool)
    assert_type(store.items() & store.items("a"), set[tuple[str, User]])

    store.keys(b"a")  # type: ignore[arg-type]
    store.keys(5)  # type: ignore[arg-type]
    store.values(start=b"a")  # type: ignore[arg-type]
    store.items(stop=b"a")  # type: ignore[arg-type]
    store.keys("a", "b")  # type: ignore[call-arg]


def changes(user: User) -> None:
    store = LmdbObjectStore[str, User]("p", key_encoding="utf-8")
    assert_type(store.pop("ann"), User)
    assert_type(store.pop("ann", None), User | None)
    assert_type(store.pop("ann", user), User)
    assert_type(store.pop("ann", default=0), User | int)
    assert_type(store.popitem(), tuple[str, User])
    assert_type(store.setdefault("ann", user), User)
    optional = LmdbObjectStore[str, User | None]("p", key_encoding="utf-8")
    assert_type(optional.setdefault("ann"), User | None)
    assert_type(optional.setdefault("ann", user), User | None)
    store.update({"ann": user})
    store.update([("ann", user)])
    store.update(store.items("a"), bob=user)
    store.update(store)
    store.update(bob=user)
    store |= {"ann": user}
    store |= [("ann", user)]
    assert_type(store, LmdbObjectStore[str, User])
    assert_type(store.delete_many(["ann"]), int)
    assert_type(store.delete_many(store.keys("a")), int)
    assert_type(store.delete_many(name for name in store), int)
    store.clear()

    store.pop(b"ann")  # type: ignore[call-overload]
    store.setdefault("ann")  # type: ignore[call-arg]
    store.setdefault("ann", 5)  # type: ignore[arg-type]
    store.setdefault(b"ann", user)  # type: ignore[arg-type]
    store.update({"ann": 5})  # type: ignore[arg-type]
    store.update(bob=5)  # type: ignore[arg-type]
    store.delete_many([b"ann"])  # type: ignore[list-item]
    store.delete_many(5)  # type: ignore[arg-type]
    store |= {"ann": 5}  # type: ignore[arg-type]


def life_cycle() -> None:
    with LmdbObjectStore[str, User]("p", key_encoding="utf-8") as store:
        assert_type(store, LmdbObjectStore[str, User])
        store.flush()
    store.close()
    store.close(strict=True)


def returns_from_inside(store: LmdbObjectStore[str, User]) -> User:
    with store.transaction(), store.edit("ann") as user:
        return user  # an exception is never swallowed, so nothing comes after this


def several_things_at_once(store: LmdbObjectStore[str, User]) -> None:
    with store.transaction() as inside:
        assert_type(inside, LmdbObjectStore[str, User])
    with store.edit("ann") as user:
        assert_type(user, User)
    with store.edit("ann", default=User("Ann")) as user:
        assert_type(user, User)
    store.edit("ann", 1)  # type: ignore[call-overload]
    store.edit(b"ann")  # type: ignore[call-overload]
    with store.snapshot() as snapshot:
        assert_type(snapshot, Snapshot[str, User])
        mapping: Mapping[str, User] = snapshot
        assert_type(snapshot["ann"], User)
        assert_type(snapshot.get("ann"), User | None)
        assert_type(snapshot.get("ann", 1), User | int)
        assert_type(snapshot.get_many(["ann"]), tuple[dict[bytes, User], list[str]])
        assert_type(list(snapshot.keys("a")), list[str])
        assert_type(list(snapshot.items(start="a")), list[tuple[str, User]])
        assert_type(list(reversed(snapshot.values())), list[User])
        assert_type(snapshot.closed, bool)
        snapshot["ann"] = mapping["ann"]  # type: ignore[index]


def attributes(store: LmdbObjectStore[str, User]) -> None:
    assert_type(store.db_path, str)
    assert_type(store.key_encoding, str | KeyEncoding[str] | None)
    assert_type(store.serializer, Serializer[User] | KeyedSerializer[User])
    assert_type(store.key_errors, str)
    assert_type(store.str_normalize, str | None)
    assert_type(store.env, lmdb.Environment)
    assert_type(store.write_buffer, Mapping[bytes, bytes | None])
    assert_type(store.closed, bool)
    assert_type(store.batch_size, int)
    assert_type(store.batch_bytes, int)
    assert_type(store.autoflush_on_read, bool)
    assert_type(store.max_map_size, int | None)
    assert_type(store.timeout, float)
    store.batch_size = 1
    store.batch_bytes = 1
    store.autoflush_on_read = False
    store.max_map_size = None
    store.timeout = 1
    store.db_path = "q"  # type: ignore[misc]
    store.key_encoding = None  # type: ignore[misc]
    store.closed = True  # type: ignore[misc]
    store.write_buffer[b"k"] = None  # type: ignore[index]
    store.batch_size = "1"  # type: ignore[assignment]
    store.max_map_size = 1.5  # type: ignore[assignment]


class UserStore(LmdbObjectStore[str, User]):
    """A subclass that settles the types."""

    def rename(self, key: str, name: str) -> None:
        user = self[key]
        assert_type(user, User)
        user.name = name
        self[key] = user


def subclass() -> None:
    with UserStore("p", key_encoding="utf-8") as store:
        assert_type(store, UserStore)
        assert_type(store.get("ann"), User | None)
        assert_type(list(store.keys("a")), list[str])
        store |= {"ann": User("Ann")}
        assert_type(store, UserStore)
