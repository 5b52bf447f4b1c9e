"""Serializers: how values become bytes, and what becomes of bytes that are wrong."""

import json
import marshal
import os
import pickle
import random
import sys
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cloudpickle
import lmdb
import msgpack
import orjson
import pytest

from conftest import needs_fork, run_all, times
from lmdb_object_store import LmdbObjectStore, LoadError, UnpickleError
from lmdb_object_store.serializers import (
    Bytes,
    Checked,
    Compressed,
    Json,
    Pickle,
    Signed,
)

SECRET = b"a key of thirty-two bytes, or so"
KIB = 2**10
MIB = 2**20


class Inverted:
    """JSON, as bytes that are no text."""

    def dumps(self, obj):
        return bytes(255 - byte for byte in orjson.dumps(obj))

    def loads(self, raw):
        return orjson.loads(bytes(255 - byte for byte in raw))


class OfTheKey:
    """A serializer that gets the key."""

    def dumps_for(self, key, obj):
        return key + orjson.dumps(obj)

    def loads_for(self, key, raw):
        assert raw.startswith(key)
        return orjson.loads(raw[len(key) :])


SERIALIZERS = {
    "pickle": Pickle(),
    "pickle 2": Pickle(2),
    "plain data": Pickle(allow=()),
    "json": Json(),
    "zlib": Compressed(),
    "zstd": Compressed(Json(), "zstd", 9),
    "checked": Checked(),
    "signed": Signed(Json(), SECRET),
    "nested": Signed(Compressed(Checked(Pickle(allow=())), "zstd"), [SECRET]),
    "compressed last": Compressed(Signed(Checked(orjson), SECRET)),
    "the module pickle": pickle,
    "marshal": marshal,
    "cloudpickle": cloudpickle,
    "msgpack": msgpack,
    "orjson": orjson,
    "an object": Inverted(),
    "an object with the key": OfTheKey(),
}
each_serializer = pytest.mark.parametrize(
    "serializer",
    [pytest.param(one, id=name) for name, one in SERIALIZERS.items()],
)
VALUES = {
    "small": {"name": "Ada", "tags": ["a", "b"], "ratio": 0.5, "none": None},
    "large": {"text": "0123456789" * 50 * KIB, "number": 7},
    "incompressible": random.Random(0).randbytes(300 * KIB).hex(),
}


def one_edit(store, key):
    with store.edit(key) as value:
        pass
    return value


def in_a_block(store, key):
    with store.transaction():
        return store[key]


def from_a_snapshot(store, key):
    with store.snapshot() as snapshot:
        many, _ = snapshot.get_many([key])
        assert snapshot[key] == many[key] == dict(snapshot.items())[key]
        return snapshot[key]


def in_another_thread(store, key):
    with store.snapshot() as snapshot:
        return run_all(lambda: snapshot[key])[0]


def popped(store, key):
    value = store.pop(key)
    store[key] = value
    return value


def popped_last(store, key):
    _, value = store.popitem()
    store[key] = value
    return value


READS = {
    "[]": lambda store, key: store[key],
    "get": lambda store, key: store.get(key),
    "get_many": lambda store, key: store.get_many([key])[0][key],
    "items": lambda store, key: dict(store.items())[key],
    "values": lambda store, key: next(reversed(store.values())),
    "setdefault": lambda store, key: store.setdefault(key, None),
    "pop": popped,
    "popitem": popped_last,
    "transaction": in_a_block,
    "snapshot": from_a_snapshot,
    "snapshot in another thread": in_another_thread,
}


def put_by_edit(store, key, value):
    with store.edit(key, value):
        pass


PUTS = {
    "put": lambda store, key, value: store.put(key, value),
    "put_many": lambda store, key, value: store.put_many({b"other": {}, key: value}),
    "setdefault": lambda store, key, value: store.setdefault(key, value),
    "edit": put_by_edit,
}


# All of them


@pytest.mark.one_in(3)
@each_serializer
@pytest.mark.parametrize("size", VALUES)
def test_each_way_to_read_gives_what_was_put(open_store, serializer, size):
    store = open_store(serializer=serializer, sync=False, autoflush_on_read=False)
    assert store.serializer is serializer
    value = VALUES[size]
    store.put_many({b"a": value, b"empty": {}})
    store[b"k"] = value
    for read in READS.values():
        assert read(store, b"k") == value  # pending, for those that don't flush
        store.flush()
        assert read(store, b"k") == value
    with store.edit(b"new", {"value": 1}) as new:
        new["value"] = value
    assert store[b"new"] == {"value": value}
    assert store[b"empty"] == {}
    assert store.setdefault(b"other", [value]) == [value]
    assert (b"k", value) in store.items()


@each_serializer
def test_what_another_serializer_has_written_raises_and_names_the_key(
    open_store, serializer
):
    store = open_store(serializer=serializer, autoflush_on_read=False)
    raw_store = open_store(serializer=Bytes())
    raw_store[b"k"] = raw = b"\xff\xfe no value of any of them"
    for stored in (False, True):
        if stored:
            store.flush()
        for name, read in READS.items():
            flushes = "snapshot" in name or name == "transaction"
            source = "DB" if stored or flushes else "buffered"
            with pytest.raises(LoadError, match=rf"Failed to \w+ {source} key 'k': "):
                read(store, b"k")
            assert raw_store[b"k"] == raw
            if flushes:
                raw_store[b"k"] = raw


def test_the_error_is_a_runtime_error_with_its_cause(open_store):
    store = open_store(serializer=Json())
    open_store(serializer=Bytes())[b"k"] = b"{"
    with pytest.raises(LoadError, match="Failed to load buffered key 'k': ") as caught:
        store[b"k"]
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    assert UnpickleError is LoadError
    open_store()[b"k"] = [1]
    with pytest.raises(LoadError, match="The value begins like a pickle"):
        store[b"k"]


def test_bytes_that_are_no_pickle_are_told_with_the_option(open_store):
    open_store(serializer=Json())[b"k"] = [1]
    with pytest.raises(LoadError, match=r"no pickle.*another serializer=.*Bytes\(\)"):
        open_store()[b"k"]


def test_two_stores_on_one_file_have_their_own(open_store):
    as_json, raw = open_store(serializer=Json()), open_store(serializer=Bytes())
    as_json[b"k"] = {"a": [1, None, "é"]}
    assert raw[b"k"] == '{"a":[1,null,"é"]}'.encode()
    raw[b"k"] = b"[5]"
    assert as_json.pop(b"k") == [5]


@each_serializer
def test_a_store_takes_its_serializer_along(open_store, serializer):
    store = open_store(serializer=serializer)
    store[b"k"] = VALUES["small"]
    other = pickle.loads(pickle.dumps(store))
    assert other[b"k"] == VALUES["small"]
    assert type(other.serializer) is type(serializer)
    assert repr(other.serializer) == repr(serializer) or "object at" in repr(serializer)
    other[b"k"] = [1]
    assert store[b"k"] == [1]
    other.close()


def value_of(store, key):
    return store[key]


def test_a_store_takes_its_serializer_to_another_process(open_store):
    nested = Signed(Compressed(orjson), SECRET)
    store = open_store(serializer=nested)
    store[b"k"] = VALUES["small"]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(value_of, store, b"k").result(60) == VALUES["small"]


ON_DISK = [
    (
        Compressed(Bytes()),
        b"value " * 20,
        "004c4f5301789c2b4bcc294d5528a33b0900a55a2cc5",
    ),
    (
        Compressed(Bytes()),
        b"value " * 20,
        "004c4f530228b52ffd20786d00003076616c75652001002f692902",
    ),
    (Compressed(Bytes()), b"\0LOS", "004c4f5300004c4f53"),
    (Checked(Bytes()), b"value", "76616c7565e6f355c6"),
    (
        Signed(Bytes(), SECRET),
        b"value",
        "76616c7565c2e01a9ad71c0e2fd7948f92ab9747a5bd554241cd0f06a9e7a13e5ddd1f95c5",
    ),
]


@pytest.mark.parametrize(("serializer", "value", "on_disk"), ON_DISK)
def test_values_of_other_machines_and_releases_are_read(
    open_store, serializer, value, on_disk
):
    store, raw = open_store(serializer=serializer), open_store(serializer=Bytes())
    raw[b"key"] = bytes.fromhex(on_disk)
    assert store[b"key"] == value
    if not value.startswith(b"value "):  # compression may have got better
        store[b"key"] = value
        assert raw[b"key"].hex() == on_disk


# What can be one, and what it may return


class OnlyDumps:
    def dumps(self, obj):
        return b""


@pytest.mark.parametrize(
    "wrong", [None, 5, "json", OnlyDumps(), random, lambda obj: b""]
)
def test_what_is_no_serializer_is_refused(open_store, tmp_path, wrong):
    for serializer in (
        lambda: wrong,
        lambda: Compressed(wrong),
        lambda: Checked(wrong),
        lambda: Signed(wrong, SECRET),
    ):
        with pytest.raises(TypeError, match=r"serializer must have dumps\(obj\) and"):
            open_store(serializer=serializer())
    assert not os.listdir(tmp_path)


def test_a_class_is_refused_with_the_call_that_was_meant(open_store):
    with pytest.raises(TypeError, match=r"not a class: Json\(\)"):
        open_store(serializer=Json)
    with pytest.raises(TypeError, match=r"not a class: Pickle\(\)"):
        Checked(Pickle)


class Returns:
    def __init__(self, raw):
        self.raw = raw

    def dumps(self, obj):
        return self.raw

    def loads(self, raw):
        return raw


@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("serializer", [json, Checked(json)])
def test_text_is_refused_at_the_put_and_told_how_to_wrap(open_store, put, serializer):
    store = open_store(serializer=serializer)
    told = r"dumps\(\) of .*json.* return bytes.*Json\(\)"
    with pytest.raises(TypeError, match=told):
        PUTS[put](store, b"a", [1])
    assert len(store) == 0


class ReturnsFor(Returns):
    def dumps_for(self, key, obj):
        return self.raw

    def loads_for(self, key, raw):
        return raw


@pytest.mark.parametrize("Returns", [Returns, ReturnsFor])
def test_other_bytes_are_made_bytes(open_store, Returns):  # noqa: N803
    buffer = bytearray(b"before")
    store = open_store(serializer=Returns(buffer))
    store[b"k"] = 1
    buffer[:] = b"after!"
    assert store[b"k"] == b"before"
    store = open_store(serializer=Returns(memoryview(b"a-b-c")[::2]))
    store[b"k"] = 1
    assert store[b"k"] == b"abc"
    before = dict(store)
    for wrong in (None, 5, "text"):
        store = open_store(serializer=Returns(wrong))
        with pytest.raises(TypeError, match="must return bytes, not"):
            store[b"k"] = 1
    assert dict(store) == before


def test_an_empty_value_is_a_value(open_store):
    store = open_store(serializer=Bytes(), autoflush_on_read=False)
    for _ in ("pending", "stored"):
        for read in READS.values():
            store[b"k"] = b""
            assert read(store, b"k") == b""
        assert b"k" in store
        store.flush()
    assert store.setdefault(b"new", b"") == b""
    assert store[b"new"] == b""


class FromTheStore:
    """Unpickling that changes the store, and makes its map move."""

    def __init__(self):
        self.store = None

    def dumps(self, obj):
        return pickle.dumps(obj)

    def loads(self, raw):
        store = self.store
        store.put_many({b"grow%d" % len(store): bytes(store.env.info()["map_size"])})
        return pickle.loads(raw)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "read", ["[]", "get_many", "items", "pop", "setdefault", "transaction"]
)
@pytest.mark.parametrize("size", [10, MIB])
def test_the_map_may_move_while_values_are_loaded(open_store, read, size):
    serializer = FromTheStore()
    store = open_store(serializer=serializer, map_size=2**20)
    value = random.randbytes(size)
    store.put_many({b"k": value, b"l": value})
    serializer.store = open_store()
    before = store.env.info()["map_size"]
    if read == "items":
        assert dict(store.items(prefix=b"k")) == {b"k": value}
    elif read == "transaction":
        with store.transaction():
            assert store.get(b"m") is None
        assert store.get_many([b"k", b"l"])[0] == {b"k": value, b"l": value}
    else:
        assert READS[read](store, b"k") == value
    assert store.env.info()["map_size"] > before
    assert serializer.store[b"l"] == value


@pytest.mark.parametrize(
    ("serializer", "copies"),
    [(Bytes(), 1), (Checked(Bytes()), 2), (Signed(Bytes(), SECRET), 2)],
)
def test_large_values_that_are_no_pickles_are_copied(open_store, serializer, copies):
    store = open_store(serializer=serializer, sync=False)
    store[b"k"] = value = bytes(8 * MIB)
    store.flush()
    for read in ("[]", "get_many", "items"):
        assert READS[read](store, b"k") == value  # a store that has seen large values
        tracemalloc.start()
        found = READS[read](store, b"k")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == value
        assert peak < (8 * copies + 1) * MIB


# Pickle


def test_the_protocol_is_fixed(open_store):
    raw = open_store(serializer=Bytes())
    for serializer, head in ((None, 5), (Pickle(), 5), (Pickle(3), 3), (Pickle(4), 4)):
        options = {} if serializer is None else {"serializer": serializer}
        store = open_store(**options)
        store[b"k"] = [1]
        store.put_many({b"m": [1]})
        with store.edit(b"e", [1]):
            pass
        heads = {value[:2] for value in raw.values()}
        assert heads == {bytes([0x80, head])}
        assert repr(store.serializer) == f"Pickle(protocol={head})"


@pytest.mark.parametrize("protocol", [-1, pickle.HIGHEST_PROTOCOL + 1])
def test_an_unknown_protocol_is_refused(protocol):
    with pytest.raises(TypeError, match=r"must be an int, not list.*allow=\[...\]"):
        Pickle([Bytes])
    with pytest.raises(ValueError, match=f"from 0 to .*, not {protocol}"):
        Pickle(protocol)


# Json


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1, 2}, b"bytes", len, "\ud800", {(1, 2): 3}],
    ids=repr,
)
@pytest.mark.parametrize("put", PUTS)
def test_what_json_cannot_hold_is_refused_at_the_put(open_store, value, put):
    store = open_store(serializer=Json())
    with pytest.raises((TypeError, ValueError)) as caught:
        PUTS[put](store, b"key", [value])
    assert caught.value.__notes__[-1] == "while serializing the value of 'key'"
    assert len(store) == 0


def test_json_keeps_what_it_has(open_store):
    store = open_store(serializer=Json())
    store[b"k"] = ("é", {1: 2.5, "n": None}, [True, 10**30], "\u2028😀")
    assert store[b"k"] == ["é", {"1": 2.5, "n": None}, [True, 10**30], "\u2028😀"]


# Bytes


@pytest.mark.parametrize("value", ["text", 5, None, [b"bytes"]])
def test_bytes_takes_nothing_else(open_store, value):
    store = open_store(serializer=Bytes())
    with pytest.raises(TypeError, match=f"stores bytes, not {type(value).__name__}"):
        store[b"k"] = value
    assert len(store) == 0


def test_bytes_reads_the_file_of_another_program(open_store, tmp_path):
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as txn:
        txn.put(b"image-000000001", b"\xff\xd8\xff\xe0 JPEG")
        txn.put(b"large", bytes(MIB))
    store = open_store(serializer=Bytes(), readonly=True)
    assert store[b"image-000000001"] == b"\xff\xd8\xff\xe0 JPEG"
    assert dict(store.items()) == {
        b"image-000000001": b"\xff\xd8\xff\xe0 JPEG",
        b"large": bytes(MIB),
    }


def test_bytes_like_values_are_copied(open_store):
    store = open_store(serializer=Bytes())
    for value in (bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a-b-c")[::2]):
        store[b"k"] = value
        assert store[b"k"] == b"abc"
        assert type(store[b"k"]) is bytes


# Compressed

CODECS = pytest.mark.parametrize("codec", ["zlib", "zstd"])


@CODECS
def test_what_shrinks_is_stored_smaller_and_the_rest_as_it_is(open_store, codec):
    store = open_store(serializer=Compressed(Bytes(), codec))
    raw = open_store(serializer=Bytes())
    incompressible = random.randbytes(1000)
    store.put_many({b"zeros": bytes(MIB), b"small": b"aaaa", b"noise": incompressible})
    assert len(raw[b"zeros"]) < 10_000
    assert raw[b"small"] == b"aaaa"
    assert raw[b"noise"] == incompressible
    assert store[b"zeros"] == bytes(MIB)
    assert store[b"noise"] == incompressible


@CODECS
def test_a_value_that_looks_compressed_comes_back(open_store, codec):
    store = open_store(serializer=Compressed(Bytes(), codec))
    store[b"zeros"] = bytes(1000)
    compressed = open_store(serializer=Bytes())[b"zeros"]
    for value in (compressed, compressed[:5], compressed[:4], compressed[:3], b""):
        store[b"k"] = value
        assert store[b"k"] == value


def test_compression_can_be_switched_on_off_and_over(open_store):
    plain, zlib_, zstd = open_store(), open_store(serializer=Compressed()), None
    plain[b"old"] = "old" * 100
    zlib_[b"zlib"] = "zlib" * 100
    zstd = open_store(serializer=Compressed(codec="zstd"))
    zstd[b"zstd"] = "zstd" * 100
    for store in (zlib_, zstd):
        assert dict(store.items()) == {
            key: key.decode() * 100 for key in (b"old", b"zlib", b"zstd")
        }
    for key, value in zstd.items():  # off again
        plain[key] = value
    assert plain[b"zlib"] == "zlib" * 100


@CODECS
@pytest.mark.parametrize("how", ["cut off", "unknown", "changed"])
def test_a_damaged_compressed_value_raises(open_store, codec, how):
    store = open_store(serializer=Compressed(Bytes(), codec))
    raw = open_store(serializer=Bytes())
    store[b"k"] = bytes(1000)
    value = bytearray(raw[b"k"])
    if how == "cut off":
        del value[-4:]
    elif how == "unknown":
        value[4] = 77
    else:
        value[5] ^= 0xFF
    raw[b"k"] = value
    with pytest.raises(LoadError, match="'k'"):
        store[b"k"]


def test_unknown_codecs_and_levels_are_refused():
    with pytest.raises(ValueError, match=r"\['zlib', 'zstd'\], not 'lz4'"):
        Compressed(codec="lz4")
    for codec, level in (("zlib", 10), ("zlib", 2**40), ("zstd", 99), ("zstd", 2**40)):
        with pytest.raises(ValueError, match="level"):
            Compressed(codec=codec, level=level)
    with pytest.raises(TypeError, match="level must be an int, not str"):
        Compressed(level="9")


def test_a_higher_level_makes_smaller_values():
    text = Path(__file__).read_bytes()
    sizes = {}
    for codec in ("zlib", "zstd"):
        for level in (1, 9):
            serializer = Compressed(Bytes(), codec, level)
            assert repr(serializer) == f"Compressed(Bytes(), {codec!r}, level={level})"
            sizes[level] = len(serializer.dumps_for(b"", text))
        assert sizes[9] < sizes[1] < len(text)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="3.14 has zstd itself")
def test_without_zstd_the_error_says_what_to_install(run):
    run("""
import sys
from lmdb_object_store.serializers import Compressed
sys.modules["zstandard"] = None
try:
    Compressed(codec="zstd")
except ImportError as error:
    assert "pip install zstandard" in str(error), error
else:
    sys.exit("no error")
""")


@CODECS
def test_threads_compress_at_the_same_time(open_store, codec):
    store = open_store(serializer=Compressed(Bytes(), codec), sync=False)

    def work(thread):
        for number in range(times(100, thorough=1000)):
            value = b"%d-%d," % (thread, number) * 200
            store[b"%d" % thread] = value
            assert store[b"%d" % thread] == value

    run_all(*(lambda thread=thread: work(thread) for thread in range(4)))


# Checked


def test_a_value_under_another_key_does_not_fit(open_store):
    store, raw = open_store(serializer=Checked()), open_store(serializer=Bytes())
    store.put_many({b"a": "value", b"b": "other"})
    raw[b"b"] = raw[b"a"]
    assert store[b"a"] == "value"
    with pytest.raises(LoadError, match=r"'b': the checksum doesn't fit") as caught:
        store[b"b"]
    assert isinstance(caught.value.__cause__, ValueError)


def test_plain_pickle_reads_checked_and_signed_values(open_store):
    plain = open_store()
    for serializer in (Checked(), Signed(Pickle(), SECRET)):
        store = open_store(serializer=serializer)
        store.put_many({b"k": [1, "two"], b"large": VALUES["large"]})
        assert plain[b"k"] == [1, "two"]
        assert plain[b"large"] == VALUES["large"]
        plain[b"k"] = 3
        with pytest.raises(LoadError, match="doesn't fit"):
            store[b"k"]


@pytest.mark.parametrize("raw", [b"", b"abc", b"\x80\x05N.", bytes(100)])
def test_a_value_without_a_checksum_is_refused(open_store, raw):
    open_store(serializer=Bytes())[b"k"] = raw
    for serializer in (Checked(Bytes()), Signed(Bytes(), SECRET)):
        with pytest.raises(LoadError, match="doesn't fit"):
            open_store(serializer=serializer)[b"k"]


def test_each_changed_byte_is_noticed(open_store):
    store, raw = open_store(serializer=Checked()), open_store(serializer=Bytes())
    store[b"k"] = {"name": "Ada", "age": 36}
    value = raw[b"k"]
    for position in range(len(value)):
        changed = bytearray(value)
        changed[position] ^= random.randrange(1, 256)
        raw[b"k"] = changed
        with pytest.raises(LoadError, match="the checksum doesn't fit"):
            store[b"k"]


_READ_ALL = """
import os, pickle, sys
from lmdb_object_store import LmdbObjectStore
from lmdb_object_store.serializers import Checked, Pickle

kind, names, before = sys.argv[1], sys.argv[2].split(), sys.argv[3]
with open(before, "rb") as file:
    before = pickle.load(file)


def wrong(name):
    found = right = 0
    options = dict(key_encoding="utf-8", readonly=True, lock=False, subdir=False)
    serializer = Checked() if kind == "checked" else Pickle()
    with LmdbObjectStore(name, serializer=serializer, **options) as store:
        for key, value in before.items():
            try:
                found += store.get(key, value) != value
                right += store[key] == value
            except Exception:
                pass
        items = iter(store.items())
        while True:
            try:
                key, value = next(items)
            except StopIteration:
                break
            except RuntimeError:
                continue
            except Exception:  # LMDB itself has met the damage
                break
            found += key in before and value != before[key]
    return found, right


for name in names:
    child = os.fork()  # LMDB crashes on some damaged files
    if not child:
        code = 3  # can't be opened
        try:
            found, right = wrong(name)
            code = 1 if found else 0 if right > len(before) / 2 else 2
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_fork
@pytest.mark.parametrize("kind", ["checked", "plain"])
def test_no_damaged_file_gives_a_wrong_value(tmp_path, run, kind):
    rng = random.Random(7)
    serializer = Checked() if kind == "checked" else Pickle()
    before = {
        f"key:{number:04}": {"number": number, "text": "ab" * rng.randrange(1500)}
        for number in range(100)
    }
    file = tmp_path / "whole"
    with LmdbObjectStore(
        file, subdir=False, key_encoding="utf-8", serializer=serializer
    ) as store:
        store.put_many(before)
        size = store.env.stat()["psize"]
    whole = file.read_bytes()
    names = []
    for number in range(times(40, thorough=400)):
        data = bytearray(whole)
        if number % 2:
            for _ in range(rng.randrange(1, 65)):
                data[rng.randrange(2 * size, len(data))] ^= rng.randrange(1, 256)
        else:
            page = size * rng.randrange(2, len(data) // size)
            part = rng.choice([512, size])
            damage = [bytes(part), rng.randbytes(part), b"\xff" * part]
            data[page : page + part] = rng.choice(damage)
        names.append(f"damaged{number}")
        (tmp_path / names[-1]).write_bytes(data)
    (tmp_path / "before").write_bytes(pickle.dumps(before))
    codes = run(_READ_ALL, kind, " ".join(names), "before").stdout.split()
    assert len(codes) == len(names)
    assert codes.count("0") + codes.count("1") > len(names) / 2  # else it shows nothing
    if kind == "checked":
        assert codes.count("1") == 0
    else:
        assert codes.count("1") > len(names) / 4


# Signed

ran = []


def run_code():
    ran.append(True)


class RunsCode:
    def __reduce__(self):
        return run_code, ()


def test_nothing_is_loaded_before_the_signature_is_verified(open_store):
    store = open_store(serializer=Signed(Pickle(), SECRET))
    raw = open_store(serializer=Bytes())
    store[b"k"] = "value"
    forged = [
        pickle.dumps(RunsCode()),
        pickle.dumps(RunsCode()) + bytes(32),
        pickle.dumps(RunsCode()) + raw[b"k"][-32:],
    ]
    for value in forged:
        raw[b"k"] = value
        for read in READS.values():
            with pytest.raises(LoadError, match="the signature doesn't fit"):
                read(store, b"k")
    assert not ran
    assert open_store()[b"k"] is None  # it would have run
    assert ran


def test_a_signed_value_belongs_to_its_key(open_store):
    store = open_store(serializer=Signed(Bytes(), SECRET))
    raw = open_store(serializer=Bytes())
    store.put_many({b"ab": b"c", b"a": b"bc"})
    assert raw[b"ab"][-32:] != raw[b"a"][-32:]
    raw[b"a"] = raw[b"ab"]
    with pytest.raises(LoadError, match="'a': the signature doesn't fit"):
        store[b"a"]


def test_keys_are_rotated(open_store):
    old, new = SECRET, SECRET[::-1]
    store = open_store(serializer=Signed(Json(), old))
    store.put_many({b"a": 1, b"b": 2})
    both = open_store(serializer=Signed(Json(), [new, old]))
    assert both[b"a"] == 1
    both[b"a"] = both[b"a"]
    only_new = open_store(serializer=Signed(Json(), [new]))
    assert only_new[b"a"] == 1
    with pytest.raises(LoadError, match="another signing key"):
        only_new[b"b"]
    with pytest.raises(LoadError, match="another signing key"):
        store[b"a"]


def test_signing_keys_are_checked_and_not_shown():
    for key in (b"", b"short", [SECRET, b"short"], [b""]):
        with pytest.raises(ValueError, match="16 bytes or more"):
            Signed(Pickle(), key)
    for key in ("a text of more than sixteen letters", [], ["text" * 8], None, 5):
        with pytest.raises(TypeError, match="key must be bytes"):
            Signed(Pickle(), key)
    shown = repr(Signed(Checked(), bytearray(SECRET)))
    assert shown == "Signed(Checked(Pickle(protocol=5)), key=...)"


# From one form to another, in place

FORMS = ["pickle", "json", "msgpack", "zlib", "checked", "signed", "nested"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_values_move_in_place_or_stay_as_they_were(open_store, source, target):
    old = open_store(serializer=SERIALIZERS[source])
    new = open_store(serializer=SERIALIZERS[target])
    values = {b"%03d" % n: {"number": n, "text": "x" * n} for n in range(300)}
    old.put_many(values)

    def move(until):
        with new.transaction():
            for number, (key, value) in enumerate(old.items()):
                if number == until:
                    raise KeyboardInterrupt
                new[key] = value

    with pytest.raises(KeyboardInterrupt):
        move(until=200)
    assert dict(old.items()) == values
    move(until=None)
    assert dict(new.items()) == values
