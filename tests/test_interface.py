"""What each method and attribute of the store promises, call by call."""

import array
import datetime
import decimal
import enum
import fractions
import os
import pathlib
import pickle
import uuid
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field
from types import MappingProxyType

import lmdb
import pytest

from conftest import times
from lmdb_object_store import LmdbObjectStore, UnpickleError

LARGE = 128 * 2**10
"""Pickled bytes from which on a value is unpickled piece by piece."""


@dataclass
class User:
    name: str
    tags: list[str] = field(default_factory=list)


class Colour(enum.Enum):
    RED = "red"


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x == other.x

    def __repr__(self):  # the test's name must be the same in all processes
        return f"Slotted({self.x})"


class BadState:
    """Can be pickled, but not unpickled."""

    def __init__(self, size=0):
        self.padding = bytes(size)

    def __setstate__(self, state):
        raise ValueError("this state is bad")


class BadPickle:
    """Can't be pickled."""

    def __reduce__(self):
        raise ValueError("not for pickling")


class Hooked:
    """Runs a function of the test's choice while it is unpickled."""

    hook = staticmethod(lambda: None)

    def __reduce__(self):
        return _unpickle_hooked, ()


def _unpickle_hooked():
    Hooked.hook()
    return Hooked()


@pytest.fixture
def store(open_store):
    return open_store(key_encoding="utf-8", sync=False)


def stored(store):
    """What the database itself holds, without the pending writes."""
    with store.env.begin() as txn:
        return {key: pickle.loads(raw) for key, raw in txn.cursor()}


def write_raw(store, **items):
    """Write bytes past the store, as another program could."""
    with store.env.begin(write=True) as txn:
        for key, raw in items.items():
            txn.put(key.encode(), raw)


def last_transaction(store):
    return store.env.info()["last_txnid"]


# Values

VALUES = [
    None,
    False,
    0,
    -(2**100),
    1.5,
    float("inf"),
    2 - 3j,
    "",
    "naïve \N{SNOWMAN} \0 \ud800",
    b"",
    bytes(range(256)),
    bytearray(b"abc"),
    (),
    (1, (2, (3,))),
    [[], [None]],
    {},
    {"a": {1: {b"b": [2.5]}}},
    {1, (2,)},
    frozenset({()}),
    range(1, 10, 3),
    slice(1, None, 2),
    Ellipsis,
    datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
    datetime.timedelta(microseconds=-1),
    decimal.Decimal("1.10"),
    fractions.Fraction(1, 3),
    uuid.UUID(int=7),
    pathlib.PurePosixPath("/a/b"),
    array.array("d", [1.0, 2.0]),
    deque([1, 2], maxlen=2),
    defaultdict(list, {"a": [1]}),
    OrderedDict(b=1, a=2),
    Counter("hello"),
    User("Ann", ["admin"]),
    Slotted(5),
    Colour.RED,
    User,
    len,
    os.path.join,
]


def name(value):
    return getattr(value, "__name__", None) or repr(value)[:40]


@pytest.mark.parametrize("value", VALUES, ids=name)
def test_a_value_comes_back_equal_from_buffer_and_database(store, value):
    store.put("k", value)
    buffered = store.get("k", "missing")
    store.flush()
    from_database = store.get("k", "missing")
    found, _ = store.get_many(["k"])
    for loaded in (buffered, from_database, found[b"k"]):
        assert loaded == value
        assert type(loaded) is type(value)


SHARED = ["shared"] * 3
LARGE_VALUES = {
    "bytes": os.urandom(2**20),
    "bytes of the threshold": bytes(LARGE),
    "bytearray": bytearray(os.urandom(300_000)),
    "ascii": "a" * 200_000,
    "many lines": "line\n" * 60_000,
    "not ascii": "\N{SNOWMAN}é" * 80_000,
    "array": array.array("q", range(times(20_000, thorough=50_000))),
    "ints": list(range(times(50_000, thorough=100_000))),
    "big int": 3**900_000,
    "strings": [str(n) for n in range(times(20_000, thorough=30_000))],
    "dict": {f"key {n}": n * 1.5 for n in range(times(10_000, thorough=20_000))},
    "objects": [User(f"user {n}", ["a", "b"]) for n in range(5_000)],
    "references": [SHARED, SHARED, bytes(LARGE), SHARED],
    "nested": [[bytes(100_000), [bytearray(100_000), ["x" * 100_000]]]],
}


@pytest.mark.parametrize("value", LARGE_VALUES.values(), ids=LARGE_VALUES)
def test_a_large_value_comes_back_equal_however_often_it_is_read(store, value):
    store.put("k", value)
    assert len(store.write_buffer[b"k"]) >= LARGE
    assert store["k"] == value
    store.flush()
    for _ in range(3):
        loaded = store["k"]
        assert loaded == value
        assert type(loaded) is type(value)
    assert store.get_many(["k"]) == ({b"k": value}, [])


def test_references_inside_a_large_value_stay_references(store):
    store["k"] = LARGE_VALUES["references"]
    store.flush()
    for _ in range(2):
        first, second, _, third = store["k"]
        assert first is second is third


@pytest.mark.one_in(6)
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", LARGE_VALUES)
def test_large_values_of_older_pickle_protocols_are_read(store, kind, protocol):
    value = LARGE_VALUES[kind]
    if kind == "big int" and protocol < 2:
        pytest.skip("written in decimal, and Python limits how many digits it reads")
    raw = pickle.dumps(value, protocol)
    write_raw(store, a=raw, b=raw)
    assert store["a"] == store["b"] == store["a"] == value
    assert store.get_many([b"a", b"b"]) == ({b"a": value, b"b": value}, [])


def test_many_large_values_are_read_at_once(store):
    values = {b"%03d" % n: bytes([n]) * (LARGE + n) for n in range(100)}
    values[b"small"] = 1
    store.put_many(values)
    store.put(b"pending", bytes(LARGE))
    store.autoflush_on_read = False
    assert store.get_many(values) == (values, [])
    assert store.get_many([*values, b"pending", b"none"]) == (
        {**values, b"pending": bytes(LARGE)},
        [b"none"],
    )


def test_small_and_large_values_mix(store):
    store["small"] = "s"
    store["large"] = "l" * LARGE
    store.flush()
    for _ in range(2):
        assert store["large"] == "l" * LARGE
        assert store["small"] == "s"
        assert "large" in store
        assert "none" not in store
        assert store.get("none") is None


# Put and get


def test_put_and_item_assignment_store_under_the_same_key(store):
    store.put("a", 1)
    store["b"] = 2
    assert (store["a"], store.get("b")) == (1, 2)
    store["a"] = 3
    assert store.get("a") == 3


def test_value_is_pickled_at_the_put(store):
    value = ["before"]
    store["k"] = value
    value.append("after")
    assert store["k"] == ["before"]
    store["k"].append("after")
    assert store["k"] == ["before"]


def test_values_are_pickled_with_the_highest_protocol(store):
    store["k"] = value = {"a": (1, b"2")}
    assert store.write_buffer[b"k"] == pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


@pytest.mark.parametrize("autoflush", [True, False])
def test_missing_key_gives_the_default_or_a_key_error(store, autoflush):
    store.autoflush_on_read = autoflush
    store["pending"] = 1
    assert store.get("k") is None
    assert store.get("k", default := object()) is default
    with pytest.raises(KeyError, match="Key not found: 'k'"):
        store["k"]


def test_stored_none_is_not_a_missing_key(store):
    store["k"] = None
    for _ in ("buffered", "stored"):
        assert store.get("k", "default") is None
        assert store["k"] is None
        assert "k" in store
        assert store.exists("k")
        assert store.get_many(["k"]) == ({b"k": None}, [])
        store.flush()


# Delete


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("how", [LmdbObjectStore.delete, LmdbObjectStore.__delitem__])
def test_deleted_key_is_gone_before_and_after_the_flush(store, how, flushed):
    store.put_many({"k": 1, "other": 2})
    if not flushed:
        store["k"] = 3
    how(store, "k")
    store.autoflush_on_read = False
    for _ in ("pending", "flushed"):
        assert store.get("k", "default") == "default"
        assert "k" not in store
        assert not store.exists("k")
        assert store.get_many(["k", "other"]) == ({b"other": 2}, ["k"])
        with pytest.raises(KeyError):
            store["k"]
        store.flush()
    assert stored(store) == {b"other": 2}


def test_deletion_is_buffered(store):
    store.put_many({"a": 1, "b": 2})
    store.delete("a")
    del store["b"]
    assert store.write_buffer == {b"a": None, b"b": None}
    assert stored(store) == {b"a": 1, b"b": 2}


def test_delete_accepts_a_missing_key(store):
    store.delete("k")
    store.flush()
    store.delete("k")
    assert store.get("k") is None


def test_del_refuses_a_missing_key(store):
    for _ in ("never there", "deletion pending"):
        with pytest.raises(KeyError, match="Key not found: 'k'"):
            del store["k"]
        assert None not in store.write_buffer.values()
        store["k"] = 1
        del store["k"]
        with pytest.raises(KeyError):
            del store["k"]
        store.flush()


def test_put_after_a_deletion_counts(store):
    store.put_many({"k": 1})
    del store["k"]
    store["k"] = 2
    assert store["k"] == 2
    store.flush()
    assert stored(store) == {b"k": 2}


# Existence


@pytest.mark.parametrize("autoflush", [True, False])
def test_in_never_flushes(store, autoflush):
    store.autoflush_on_read = autoflush
    store.put_many({"stored": 1, "gone": 1})
    store["pending"] = 1
    store.delete("gone")
    assert [k in store for k in ("stored", "pending", "gone", "none")] == [
        True,
        True,
        False,
        False,
    ]
    assert store.write_buffer.keys() == {b"pending", b"gone"}


@pytest.mark.parametrize(
    ("flush", "autoflush", "flushed"),
    [
        (None, True, True),
        (None, False, False),
        (True, True, True),
        (True, False, True),
        (False, True, False),
        (False, False, False),
    ],
)
@pytest.mark.parametrize("key", ["stored", "none"])
def test_exists_flushes_as_told(store, flush, autoflush, flushed, key):
    store.put_many({"stored": 1})
    store.autoflush_on_read = autoflush
    store["pending"] = 1
    assert store.exists(key, flush=flush) == (key == "stored")
    assert bool(store.write_buffer) is not flushed


@pytest.mark.parametrize("flush", [None, True, False])
def test_exists_knows_pending_writes(store, flush):
    store["stored"] = 1
    store.flush()
    store["pending"] = 1
    store.delete("stored")
    assert store.exists("pending", flush=flush)
    assert not store.exists("stored", flush=flush)


def test_existence_does_not_unpickle(store):
    store["k"] = BadState()
    for _ in ("buffered", "stored"):
        assert "k" in store
        assert store.exists("k")
        store.flush()


# get_many


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, dict.fromkeys, deque, lambda keys: (key for key in keys)],
    ids=["list", "tuple", "iterator", "dict", "deque", "generator"],
)
def test_get_many_takes_any_iterable_of_keys(store, make):
    store.put_many({"a": 1, "b": 2})
    assert store.get_many(make(["b", "none", "a"])) == ({b"a": 1, b"b": 2}, ["none"])


@pytest.mark.parametrize("keys", ["abc", b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_get_many_refuses_a_single_key(store, keys):
    with pytest.raises(TypeError, match="not a single"):
        store.get_many(keys)


@pytest.mark.parametrize("keys", [None, 5])
def test_get_many_refuses_what_is_not_iterable(store, keys):
    with pytest.raises(TypeError):
        store.get_many(keys)


def test_get_many_without_keys(store):
    assert store.get_many([]) == ({}, [])


def test_get_many_keeps_the_order_of_the_keys(store):
    keys = [f"{n * 7919 % 1000:03}" for n in range(1000)]
    store.put_many((key, key) for key in sorted(keys)[::2])
    store.autoflush_on_read = False
    for key in keys[::5]:
        store[key] = key
    found, not_found = store.get_many(keys, decode_keys=True)
    assert list(found) == [key for key in keys if key in store]
    assert not_found == [key for key in keys if key not in store]
    assert all(key == value for key, value in found.items())


def test_get_many_of_repeated_keys_finds_once_and_misses_each_time(store):
    store["a"] = 1
    assert store.get_many(["x", "a", "x", b"a", "y", b"x"]) == (
        {b"a": 1},
        ["x", "x", "y", b"x"],
    )


@pytest.mark.parametrize(
    ("decode_keys", "decode_not_found", "found", "not_found"),
    [
        (False, None, {b"a": 1, b"b": 2}, ["x", b"y"]),
        (False, False, {b"a": 1, b"b": 2}, ["x", b"y"]),
        (False, True, {b"a": 1, b"b": 2}, ["x", "y"]),
        (True, None, {"a": 1, "b": 2}, ["x", "y"]),
        (True, True, {"a": 1, "b": 2}, ["x", "y"]),
        (True, False, {"a": 1, "b": 2}, ["x", b"y"]),
    ],
)
def test_get_many_decodes_as_told(
    store, decode_keys, decode_not_found, found, not_found
):
    store.put_many({"a": 1})
    store["b"] = 2
    assert store.get_many(
        ["a", "x", b"b", b"y"],
        decode_keys=decode_keys,
        decode_not_found=decode_not_found,
    ) == (found, not_found)


@pytest.mark.parametrize("option", ["decode_keys", "decode_not_found"])
def test_get_many_decodes_only_with_an_encoding(open_store, option):
    store = open_store()
    store[b"k"] = 1
    with pytest.raises(ValueError, match="key_encoding"):
        store.get_many([b"k"], **{option: True})
    assert b"k" in store.write_buffer


def test_not_found_keys_are_the_objects_given(store):
    keys = ["x", b"y", bytearray(b"z"), memoryview(b"w")]
    _, not_found = store.get_many(keys)
    assert all(a is b for a, b in zip(not_found, keys, strict=True))


def test_get_many_passes_on_what_its_keys_raise(store):
    def keys():
        yield "a"
        raise LookupError("no more keys")

    store["a"] = 1
    with pytest.raises(LookupError, match="no more keys"):
        store.get_many(keys())
    assert store["a"] == 1


def test_keys_of_get_many_may_use_the_store(store):
    def keys():
        for key in ("a", "b"):
            store[key] = key
            assert store[key] == key
            yield key
        store.flush()

    assert store.get_many(keys()) == ({b"a": "a", b"b": "b"}, [])


def test_get_many_shows_one_moment(store, in_thread):
    keys = [f"{n:03}" for n in range(500)]
    store.put_many({**dict.fromkeys(keys, "old"), "000": Hooked()})
    store.put("001", "pending")

    def change():
        store.put_many(dict.fromkeys(keys, "new"))

    Hooked.hook = lambda: in_thread(change).result()
    store.autoflush_on_read = False
    try:
        found, _ = store.get_many(keys, decode_keys=True)
    finally:
        Hooked.hook = staticmethod(lambda: None)
    assert [found[key] for key in keys[1:]] == ["pending"] + ["old"] * 498
    assert store["499"] == "new"


# put_many


@pytest.mark.parametrize(
    "make",
    [
        dict,
        UserDict,
        MappingProxyType,
        lambda items: items.items(),
        lambda items: list(items.items()),
        lambda items: [list(pair) for pair in items.items()],
        lambda items: iter(items.items()),
        lambda items: (pair for pair in items.items()),
    ],
    ids=[
        "dict",
        "UserDict",
        "proxy",
        "items",
        "list",
        "lists",
        "iterator",
        "generator",
    ],
)
def test_put_many_takes_mappings_and_pairs(store, make):
    store.put_many(make({"a": 1, b"b": [2]}))
    assert stored(store) == {b"a": 1, b"b": [2]}


@pytest.mark.parametrize("items", [{}, [], iter(())])
def test_put_many_of_nothing_flushes_only(store, items):
    store["k"] = 1
    store.put_many(items)
    assert stored(store) == {b"k": 1}


def test_last_value_of_a_repeated_key_wins(store):
    store.put_many([("a", 1), ("b", 2), (b"a", 3), (bytearray(b"a"), 4)])
    assert stored(store) == {b"a": 4, b"b": 2}


def test_put_many_comes_after_the_pending_writes(store):
    store["a"] = "pending"
    store["c"] = "pending"
    store.delete("b")
    store.put_many({"a": "many", "b": "many"})
    assert not store.write_buffer
    assert stored(store) == {b"a": "many", b"b": "many", b"c": "pending"}


def test_put_many_is_one_transaction(store):
    before = last_transaction(store)
    store.put_many((f"{n}", bytes(100)) for n in range(5 * store.batch_size))
    assert last_transaction(store) == before + 1
    assert len(stored(store)) == 5 * store.batch_size


def test_items_of_put_many_may_use_the_store(store):
    def items():
        for key in ("a", "b"):
            store[key] = "put"
            yield key, store[key] + " many"

    store.put_many(items())
    assert stored(store) == {b"a": "put many", b"b": "put many"}


def broken_off():
    yield "new", 1
    yield "old", 1
    raise LookupError("no more items")


@pytest.mark.parametrize(
    ("items", "error"),
    [
        ([("new", 1), ("old", BadPickle()), ("z", 1)], ValueError),
        ([("new", 1), ("old", 1), (None, 1)], TypeError),
        ([("new", 1), ("old", 1), ("", 1)], ValueError),
        ([("new", 1), ("old", 1), ("x" * 5000, 1)], ValueError),
        ([("new", 1), ("old", 1), ("x", 1, 1)], TypeError),
        ([("new", 1), ("old", 1), ("x",)], TypeError),
        ([("new", 1), ("old", 1), 5], TypeError),
        ([("new", 1), ("old", 1), None], TypeError),
        ("keys", TypeError),
        (5, TypeError),
        (None, TypeError),
        (broken_off, LookupError),
    ],
)
def test_put_many_that_raises_changes_nothing(store, items, error):
    store.put_many({"old": 0})
    store["pending"] = 0
    before = last_transaction(store)
    with pytest.raises(error):
        store.put_many(items() if callable(items) else items)
    assert last_transaction(store) == before
    assert store.write_buffer.keys() == {b"pending"}
    assert store.get_many(["old", "pending", "new", "z"]) == (
        {b"old": 0, b"pending": 0},
        ["new", "z"],
    )


# Flush and buffer


def test_flush_is_one_transaction(store):
    store.put_many({"gone": 0})
    before = last_transaction(store)
    for n in range(100):
        store[f"{n}"] = n
    del store["gone"]
    assert last_transaction(store) == before
    store.flush()
    assert last_transaction(store) == before + 1
    assert stored(store) == {b"%d" % n: n for n in range(100)}
    store.flush()
    assert last_transaction(store) == before + 1


def test_buffer_is_flushed_at_batch_size(open_store):
    store = open_store(batch_size=3)
    for _ in range(5):
        store[b"a"] = 1
    store.delete(b"b")
    assert store.write_buffer.keys() == {b"a", b"b"}
    assert stored(store) == {}
    store[b"c"] = 1
    assert not store.write_buffer
    assert stored(store) == {b"a": 1, b"c": 1}


@pytest.mark.parametrize(
    "delete", [LmdbObjectStore.delete, LmdbObjectStore.__delitem__]
)
def test_deletions_count_for_batch_size(open_store, delete):
    store = open_store(batch_size=3)
    store.put_many({b"a": 1, b"b": 1, b"c": 1})
    delete(store, b"a")
    delete(store, b"b")
    assert len(stored(store)) == 3
    delete(store, b"c")
    assert not store.write_buffer
    assert stored(store) == {}


def test_batch_size_one_writes_through(open_store):
    store = open_store(batch_size=1)
    store[b"k"] = 1
    assert stored(store) == {b"k": 1}
    del store[b"k"]
    assert stored(store) == {}


def test_batch_size_changes_at_run_time(store):
    store["a"] = 1
    store.batch_size = 3
    store["b"] = 1
    assert store.write_buffer
    store["c"] = 1
    assert not store.write_buffer
    store.batch_size = 10_000
    for n in range(2_000):
        store[f"{n}"] = n
    assert len(store.write_buffer) == 2_000


def test_buffer_is_flushed_at_batch_bytes(open_store):
    store = open_store(batch_bytes=10_000)
    store[b"a"] = bytes(4_000)
    store[b"b"] = bytes(4_000)
    assert len(store.write_buffer) == 2
    store[b"c"] = bytes(4_000)
    assert not store.write_buffer
    store[b"d"] = bytes(9_000)  # counted from the flush on
    assert store.write_buffer
    store[b"e"] = bytes(20_000)
    assert not store.write_buffer
    assert stored(store).keys() == {b"a", b"b", b"c", b"d", b"e"}


def test_keys_count_for_batch_bytes(open_store):
    store = open_store(batch_bytes=1_000)
    store.delete(b"a" * 450)
    store.delete(b"b" * 450)
    assert len(store.write_buffer) == 2
    store.delete(b"c" * 450)
    assert not store.write_buffer


def test_overwritten_values_do_not_count_for_batch_bytes(open_store):
    store = open_store(batch_bytes=10_000)
    for n in range(20):
        store[b"a"] = bytes([n]) * 4_000
        store[b"b"] = bytes(1_000)
        store.delete(b"b")
    assert stored(store) == {}
    store[b"c"] = bytes(4_000)
    assert stored(store) == {}
    store[b"b"] = bytes(4_000)
    assert stored(store).keys() == {b"a", b"b", b"c"}


def test_batch_bytes_changes_at_run_time(store):
    store["a"] = bytes(1_000)
    store.batch_bytes = 3_000
    store["b"] = bytes(1_000)
    assert store.write_buffer
    store["c"] = bytes(1_000)
    assert not store.write_buffer


READS = {
    "get": lambda store: store.get("none"),
    "[]": lambda store: store["none"],
    "get_many": lambda store: store.get_many(["none"]),
    "exists": lambda store: store.exists("none"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_autoflush_on_read_changes_at_run_time(store, read):
    store.put_many({"none": None})
    for autoflush in (False, True, False, True):
        store.autoflush_on_read = autoflush
        store["pending"] = autoflush
        read(store)
        assert bool(store.write_buffer) is not autoflush
    assert stored(store)[b"pending"] is True


def test_read_of_a_pending_key_does_not_flush(store):
    store["pending"] = 1
    assert store["pending"] == store.get("pending") == 1
    assert store.exists("pending")
    assert store.write_buffer


def test_own_writes_are_read_whatever_autoflush_on_read_is(store):
    store.autoflush_on_read = False
    store.put_many({"a": "old", "b": "old"})
    store["a"] = "new"
    store.delete("b")
    assert (store["a"], store.get("b"), "b" in store) == ("new", None, False)
    assert store.get_many(["a", "b"]) == ({b"a": "new"}, ["b"])
    assert stored(store) == {b"a": "old", b"b": "old"}


# Errors that name the key


@pytest.mark.parametrize(
    "put",
    [
        lambda store, obj: store.put("user:42", obj),
        lambda store, obj: store.put_many({"user:42": obj}),
        lambda store, obj: store.__setitem__(b"user:42", obj),
    ],
)
def test_pickling_error_is_the_values_own_and_names_the_key(store, put):
    with pytest.raises(ValueError, match="not for pickling") as info:
        put(store, BadPickle())
    assert info.value.__notes__ == ["while pickling the value of 'user:42'"]
    assert not store.write_buffer
    assert store.get("user:42") is None


def test_notes_that_a_pickling_error_brings_are_kept(store):
    error = ValueError("no")
    error.__notes__ = ["my own note"]

    class Bad:
        def __reduce__(self):
            raise error

    with pytest.raises(ValueError, match="no"):
        store["k"] = Bad()
    assert error.__notes__ == ["my own note", "while pickling the value of 'k'"]


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.get("user:42"),
        lambda store: store["user:42"],
        lambda store: store.get_many(["fine", "user:42"]),
    ],
    ids=["get", "[]", "get_many"],
)
def test_unpickling_error_names_the_key_and_the_source(store, read, size):
    store.autoflush_on_read = False
    store["fine"] = 1
    store["user:42"] = BadState(size)
    for source in ("buffered", "DB", "DB"):
        message = f"^Failed to unpickle {source} key 'user:42': this state is bad$"
        with pytest.raises(RuntimeError, match=message) as info:
            read(store)
        assert isinstance(info.value, UnpickleError)
        assert isinstance(info.value.__cause__, ValueError)
        store.flush()
    assert store["fine"] == 1


@pytest.mark.parametrize("position", [0, 1, 50, 998, 999])
def test_get_many_names_the_one_key_that_can_not_be_unpickled(store, position):
    keys = [f"{n:03}" for n in range(1000)]
    store.put_many({**dict.fromkeys(keys, 1), keys[position]: BadState()})
    with pytest.raises(UnpickleError, match=f"DB key '{keys[position]}': this state"):
        store.get_many(keys)


GOOD = pickle.dumps([bytes(100_000), "é" * 100_000, 1], 5)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not a pickle",
        b"\x80\xff.",
        pickle.dumps("cut")[:-2],
        b"cno_such_module\nThing\n.",
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        GOOD.replace(b"\x94", b"\xff"),
        bytes(LARGE),
        b"V" + b"x" * LARGE,  # a line without an end
        b"\x8e" + (2**62).to_bytes(8, "little") + bytes(LARGE),  # claims 4 EiB
    ],
    ids=lambda raw: f"{raw[:8]!r} ({len(raw)})",
)
def test_corrupt_value_raises_an_error_and_can_be_replaced(store, raw):
    write_raw(store, bad=raw, fine=GOOD)
    for _ in range(2):
        for read in (lambda: store["bad"], lambda: store.get_many(["fine", "bad"])):
            with pytest.raises(UnpickleError, match="Failed to unpickle DB key 'bad'"):
                read()
        assert store["fine"][2] == 1
    assert "bad" in store
    store["bad"] = "good"
    assert store["bad"] == "good"
    del store["bad"]
    store.flush()
    assert "bad" not in store


def test_failed_large_read_leaves_no_transaction_open(store):
    write_raw(store, bad=GOOD[:-1])
    errors = []
    for _ in range(200):  # more than there are reader slots
        with pytest.raises(UnpickleError) as info:
            store.get("bad")
        errors.append(info.value)
    assert store.env.readers().count("\n") <= 2


@pytest.mark.parametrize(
    "call",
    [
        lambda store: LmdbObjectStore(store.db_path, 10, True),
        lambda store: store.get_many(["k"], True),
        lambda store: store.exists("k", True),
        lambda store: store.close(True),
    ],
)
def test_options_have_to_be_named(store, call):
    with pytest.raises(TypeError, match="positional argument"):
        call(store)
    assert not store.closed


# Attributes


def test_attributes_tell_the_options(open_store, tmp_path):
    store = open_store(
        "db",
        batch_size=5,
        autoflush_on_read=False,
        key_encoding="latin-1",
        key_errors="replace",
        str_normalize="NFC",
        batch_bytes=1234,
        max_map_size=2**30,
        timeout=2.5,
    )
    assert store.db_path == str(tmp_path / "db")
    assert store.batch_size == 5
    assert store.autoflush_on_read is False
    assert store.key_encoding == "latin-1"
    assert store.key_errors == "replace"
    assert store.str_normalize == "NFC"
    assert store.batch_bytes == 1234
    assert store.max_map_size == 2**30
    assert store.timeout == 2.5
    assert store.closed is False
    store.close()
    assert store.closed is True


def test_attributes_tell_the_defaults(open_store):
    store = open_store()
    assert store.batch_size == 1000
    assert store.autoflush_on_read is True
    assert store.key_encoding is None
    assert store.key_errors == "strict"
    assert store.str_normalize is None
    assert store.batch_bytes == 64 * 2**20
    assert store.max_map_size is None
    assert store.timeout == 60.0


@pytest.mark.parametrize(
    "name",
    [
        "db_path",
        "key_encoding",
        "key_errors",
        "str_normalize",
        "env",
        "write_buffer",
        "closed",
    ],
)
def test_what_can_not_change_at_run_time_can_not_be_set(store, name):
    with pytest.raises(AttributeError):
        setattr(store, name, getattr(store, name))


def test_write_buffer_shows_pending_writes_and_can_not_be_written(store):
    store["put"] = 1
    store.delete("deleted")
    pending = store.write_buffer
    assert dict(pending) == {b"put": pickle.dumps(1, -1), b"deleted": None}
    with pytest.raises(TypeError):
        pending[b"x"] = b""
    with pytest.raises(AttributeError):
        pending.clear()
    assert store["put"] == 1


def test_env_is_the_environment(store):
    store["k"] = 1
    store.flush()
    assert isinstance(store.env, lmdb.Environment)
    assert store.env.stat()["entries"] == 1
