"""A snapshot shows one moment for as long as it is open, and growth waits for it."""

import contextlib
import gc
import logging
import mmap
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial

import lmdb
import pytest

from conftest import PATIENCE, needs_fork, run_all
from lmdb_object_store import (
    BusyError,
    ClosedError,
    GrowthError,
    SizeError,
    SnapshotOpenError,
    UnpickleError,
)
from moments import (
    SHARES_SNAPSHOT,
    WAITS_FOR_READ_OF_SNAPSHOT,
    WAITS_FOR_READS,
    WAITS_FOR_WRITER,
    Parked,
    every_step,
    handling,
    is_method,
)

KIB, MIB = 2**10, 2**20
SMALL_MAP = 16 * mmap.PAGESIZE
LARGE = 150 * KIB
"""Bytes of a value that is unpickled piece by piece."""
ENGINES = pytest.mark.parametrize("lib_version", [0, 1])


def small(number):
    return {"number": number, "text": "x" * (number % 40)}


def large(number):
    return [number, bytes([number % 256]) * (LARGE + number)]


def mixed(number):
    return large(number) if number % 9 == 0 else small(number)


VALUES = pytest.mark.parametrize("value", [small, large, mixed])


class Acting:
    """Unpickling it calls `act`."""

    act = staticmethod(lambda: None)

    def __init__(self, ballast=b""):
        self.ballast = ballast

    def __setstate__(self, state):
        self.__dict__.update(state)
        Acting.act()


class Reduced(Acting):
    """The same, without an object to set the state of."""

    def __reduce__(self):
        return Reduced.rebuilt, (self.ballast,)

    @staticmethod
    def rebuilt(ballast):
        Acting.act()
        return Reduced(ballast)


class Bad:
    """It can be pickled, but not unpickled."""

    def __init__(self, ballast=b""):
        self.ballast = ballast

    def __setstate__(self, state):
        raise ZeroDivisionError("unpickled")


@pytest.fixture
def acting(monkeypatch):
    """Set what unpickling an `Acting` does."""

    def acting(action):
        monkeypatch.setattr(Acting, "act", staticmethod(action))

    return acting


class Pause:
    """Stops the thread that calls it, until `go_on`."""

    def __init__(self):
        self.arrived, self.left = threading.Event(), threading.Event()

    def __call__(self):
        self.arrived.set()
        assert self.left.wait(PATIENCE), "nobody let the thread go on"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left.set()

    def reached(self):
        assert self.arrived.wait(PATIENCE), "nobody came"

    go_on = __exit__


def announcing(arrived, name, action):
    """Do `action`; set `arrived` when it first calls a C function of that name."""

    def hook(frame, event, function):
        if event == "c_call" and function.__name__ == name:
            sys.setprofile(None)
            arrived.set()

    sys.setprofile(hook)
    try:
        return action()
    finally:
        sys.setprofile(None)


@pytest.fixture
def store(open_store):
    return open_store(key_encoding="utf-8", map_size=256 * MIB, sync=False)


@pytest.fixture
def run(tmp_path):
    """Run a script in `tmp_path`; return what it printed."""

    def run(script, *arguments):
        result = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


# What it shows


def fill(store, value):
    """Fill a store, in part with what is pending; return what it has."""
    names = [f"{head}:{number:02}" for head in "abé" for number in range(20)]
    if store.key_encoding is None:
        names = [name.encode() for name in names]
    model = {name: value(number) for number, name in enumerate(names)}
    shuffled = random.Random(1).sample(names, len(names))
    store.put_many({name: model[name] for name in shuffled[:40]})
    store.put_many({shuffled[0]: "overwritten", shuffled[41]: "deleted"})
    for name in [shuffled[0], *shuffled[40:]]:
        store[name] = model[name]
    store.delete(shuffled[41])
    del model[shuffled[41]]
    return model


def check(snapshot, model):
    """Compare all that a snapshot can tell with a dict in the order of its keys."""
    names, text = list(model), isinstance(next(iter(model)), str)
    as_key = str if text else str.encode
    raw = {name.encode() if text else name: item for name, item in model.items()}
    missing = [as_key("a"), as_key("b:05+"), as_key("z")]
    assert bool(snapshot)
    assert len(snapshot) == len(model)
    assert snapshot == model
    assert f"{len(model)} entries" in repr(snapshot)
    for name in random.Random(2).sample(names, 20):
        assert snapshot[name] == snapshot.get(name, missing) == model[name]
        assert name in snapshot
    for name in missing:
        assert snapshot.get(name) is None
        assert snapshot.get(name, names) is names
        assert name not in snapshot
        with pytest.raises(KeyError, match="Key not found"):
            snapshot[name]
    asked = [*names[::2], *missing, names[0], missing[0]]
    found = {name: raw[name] for name in list(raw)[::2]}
    assert snapshot.get_many(iter(asked)) == (found, [*missing, missing[0]])
    assert list(snapshot.get_many(asked)[0]) == list(found)
    if text:
        decoded = {name.decode(): item for name, item in found.items()}
        options = {"decode_keys": True}
        assert snapshot.get_many(asked, **options)[0] == decoded
        options = {"decode_not_found": True}
        assert snapshot.get_many([b"a"], **options) == ({}, ["a"])
        options = {"decode_keys": True, "decode_not_found": False}
        assert snapshot.get_many([b"a"], **options) == ({}, [b"a"])
    else:
        with pytest.raises(ValueError, match="key_encoding"):
            snapshot.get_many(asked, decode_keys=True)
    assert list(snapshot) == names
    assert list(reversed(snapshot)) == names[::-1]
    for bounds in (
        {},
        {"prefix": as_key("b:")},
        {"start": as_key("a:05"), "stop": as_key("b:03")},
        {"prefix": as_key("é"), "start": as_key("é:1")},
        {"prefix": as_key("a"), "stop": as_key("a")},
    ):
        check_range(snapshot, model, **bounds)


def check_range(snapshot, model, prefix=None, start=None, stop=None):
    bounds = {"start": start, "stop": stop}
    expected = {
        name: item
        for name, item in model.items()
        if (prefix is None or name.startswith(prefix))
        and (start is None or name >= start)
        and (stop is None or name < stop)
    }
    names, outside = list(expected), [name for name in model if name not in expected]
    keys, values, items = (
        read(prefix, **bounds)
        for read in (snapshot.keys, snapshot.values, snapshot.items)
    )
    assert len(keys) == len(values) == len(items) == len(expected)
    assert list(keys) == names
    assert list(values) == list(expected.values())
    assert list(items) == list(expected.items())
    assert list(reversed(keys)) == names[::-1]
    assert list(reversed(values)) == list(expected.values())[::-1]
    assert list(reversed(items)) == list(expected.items())[::-1]
    for name in names[:3]:
        assert name in keys
        assert expected[name] in values
        assert (name, expected[name]) in items
        assert (name, "other") not in items
    for name in outside[:3]:
        assert name not in keys
        assert (name, model[name]) not in items
    assert keys == expected.keys()
    some = {*names[:3], *outside[:2]}
    assert keys & some == set(names[:3])
    assert keys | some == set(names) | some
    assert keys - some == set(names[3:])
    assert keys ^ some == set(names[3:]) | set(outside[:2])
    assert keys.isdisjoint(outside)


@ENGINES
@VALUES
@pytest.mark.parametrize("options", [{}, {"key_encoding": "utf-8"}], ids=["", "str"])
def test_snapshot_answers_like_a_dict_and_has_what_was_pending(
    open_store, lib_version, value, options
):
    store = open_store(
        lib_version=lib_version, map_size=256 * MIB, sync=False, **options
    )
    model = fill(store, value)
    assert store.write_buffer
    with store.snapshot() as snapshot:
        check(snapshot, model)
        assert not store.write_buffer
        store.clear()
        store.put_many(dict.fromkeys(list(model)[::3], value(7)))
        check(snapshot, model)
    assert store == dict.fromkeys(list(model)[::3], value(7))


def in_a_block(store):
    with store.transaction():
        store["a:00"] = "in a block"
        store.clear()
        store["b:01"] = large(9)


def edit(store):
    with store.edit("edited", default={}) as value:
        value["a"] = 1


CHANGES = {
    "put": lambda store: store.put("a:00", large(3)),
    "delete": lambda store: store.delete("a:01"),
    "del": lambda store: store.__delitem__("a:02"),
    "pop": lambda store: store.pop("a:03"),
    "popitem": lambda store: store.popitem(),
    "put_many": lambda store: store.put_many({f"b:{n:02}": n for n in range(20)}),
    "update": lambda store: store.update({f"n:{n:02}": n for n in range(2000)}),
    "delete_many": lambda store: store.delete_many(store.keys("é")),
    "flush": lambda store: store.flush(),
    "edit": edit,
    "transaction": in_a_block,
    "clear": lambda store: store.clear(),
    "put_many large": lambda store: store.put_many({"a:00": large(5), "a:01": 1}),
}

CHANGE_ELSEWHERE = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1], key_encoding="utf-8") as store:
    store.delete_many(store.keys("a"))
    for number in range(10):
        store.put_many({f"b:{n:02}": bytes([number]) * 150_000 for n in range(8)})
    store.clear()
    store.put_many({f"a:{n:02}": bytes(1000) for n in range(1000)})
"""


@ENGINES
@pytest.mark.parametrize("where", ["here", "thread", "process"])
def test_snapshot_stays_as_it_was_whatever_is_written(
    open_store, in_thread, run, lib_version, where
):
    store = open_store(
        lib_version=lib_version, key_encoding="utf-8", map_size=256 * MIB, sync=False
    )
    model = fill(store, mixed)
    with store.snapshot() as snapshot:
        if where == "process":
            run(CHANGE_ELSEWHERE, store.db_path)
            assert len(store) == 1000
        else:
            for change in CHANGES.values():
                write = partial(change, store)
                write() if where == "here" else in_thread(write).result()
                assert dict(snapshot.items()) == model
            assert store == {"a:00": large(5), "a:01": 1}
        check(snapshot, model)


def test_snapshot_is_taken_when_its_block_begins(store):
    manager = store.snapshot()
    store["before"] = 1
    with manager as snapshot:
        store["after"] = 2
        assert snapshot == {"before": 1}


def test_snapshot_is_a_read_only_mapping(store):
    with store.snapshot() as snapshot:
        assert isinstance(snapshot, Mapping)
        assert not isinstance(snapshot, MutableMapping)
        for name in ("put", "pop", "clear", "flush", "delete", "transaction", "close"):
            assert not hasattr(snapshot, name)
        with pytest.raises(TypeError, match="item assignment"):
            snapshot["key"] = 1
        with pytest.raises(TypeError, match="item deletion"):
            del snapshot["key"]
        with pytest.raises(TypeError, match="unhashable"):
            hash(snapshot)


def test_snapshot_of_an_empty_store(store):
    with store.snapshot() as snapshot:
        store["key"] = 1
        assert not snapshot
        assert snapshot == {}
        assert list(snapshot) == list(reversed(snapshot)) == []
        assert snapshot.get_many(["key"]) == ({}, ["key"])
        assert snapshot.get_many([]) == ({}, [])


def test_snapshot_equals_mappings_of_the_same_items(store):
    store.update(a=1, b=[2])
    with store.snapshot() as snapshot, store.snapshot() as other:
        assert snapshot == store == other == {"a": 1, "b": [2]}
        store["b"] = 2
        assert snapshot == other
        assert snapshot != store
        assert snapshot != {"a": 1}
        assert snapshot != 1


def test_repr_says_what_it_is_of_and_whether_it_is_closed(store):
    store.update(a=1, b=2)
    with store.snapshot() as snapshot:
        assert repr(snapshot) == f"<Snapshot of {store.db_path!r}, 2 entries>"
        assert not snapshot.closed
    assert repr(snapshot) == f"<Snapshot of {store.db_path!r}, closed>"
    assert snapshot.closed


def test_snapshot_takes_keys_as_its_store_does(open_store):
    store = open_store(key_encoding="utf-8", str_normalize="NFC")
    store["é"] = 1
    store[b"\xff"] = 2
    with store.snapshot() as snapshot:
        assert snapshot["e\u0301"] == snapshot["é".encode()] == 1
        assert "e\u0301" in snapshot
        assert list(snapshot.items("e\u0301")) == [("é", 1)]
        assert snapshot.get_many(["e\u0301", "x"], decode_keys=True) == (
            {"é": 1},
            ["x"],
        )
        assert list(snapshot) == ["é", b"\xff"]
        assert snapshot[bytearray(b"\xff")] == snapshot[memoryview(b"\xff")] == 2
        with pytest.raises(ValueError, match="decode"):
            snapshot.get_many([b"\xff"], decode_keys=True)
        for read in (snapshot.get, snapshot.__getitem__):
            with pytest.raises(SizeError):
                read("")
            with pytest.raises(TypeError):
                read(None)
    bytes_only = open_store("bytes")
    with bytes_only.snapshot() as snapshot, pytest.raises(TypeError, match="str keys"):
        snapshot["é"]


@pytest.mark.parametrize("ballast", [0, LARGE])
@pytest.mark.parametrize(
    "read",
    [
        lambda snapshot: snapshot["bad"],
        lambda snapshot: snapshot.get("bad"),
        lambda snapshot: snapshot.get_many(["a", "bad"]),
        lambda snapshot: list(snapshot.values()),
        lambda snapshot: snapshot == {"a": 1, "bad": 2, "c": 3},
    ],
    ids=["[]", "get", "get_many", "values", "=="],
)
def test_value_that_cannot_be_unpickled_is_named(store, ballast, read):
    store.update(a=1, bad=Bad(bytes(ballast)), c=3)
    with store.snapshot() as snapshot:
        store["bad"] = 2
        with pytest.raises(UnpickleError, match="DB key 'bad'") as caught:
            read(snapshot)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        items = iter(snapshot.items())
        assert next(items) == ("a", 1)
        with pytest.raises(UnpickleError):
            next(items)
        assert next(items) == ("c", 3)
        assert list(snapshot) == ["a", "bad", "c"]


def test_snapshot_whose_flush_fails_is_not_opened(open_store):
    store = open_store(map_size=SMALL_MAP, max_map_size=SMALL_MAP)
    for number in range(20):
        store[b"%d" % number] = bytes(4000)
    pending = dict(store.write_buffer)
    manager = store.snapshot()
    with pytest.raises(GrowthError, match="max_map_size"), manager:
        pytest.fail("opened")
    assert store.write_buffer == pending
    store.max_map_size = MIB
    with store.snapshot() as snapshot:
        assert len(snapshot) == 20


def test_snapshot_of_a_closed_store(store):
    manager = store.snapshot()
    store.close()
    with pytest.raises(ClosedError), manager:
        pytest.fail("opened")


def test_snapshot_inside_a_transaction_block_is_refused(store):
    store["key"] = 1
    with store.snapshot() as snapshot, store.transaction():
        store["key"] = 2
        assert snapshot["key"] == 1
        with pytest.raises(BusyError, match="transaction block"), store.snapshot():
            pytest.fail("opened")
    assert store["key"] == 2


def test_snapshots_of_a_read_only_store(open_store, run):
    with open_store(key_encoding="utf-8", map_size=256 * MIB) as store:
        model = fill(store, mixed)
    store = open_store(key_encoding="utf-8", map_size=256 * MIB, readonly=True)
    with store.snapshot() as snapshot:
        run(CHANGE_ELSEWHERE, store.db_path)
        check(snapshot, model)
        with store.snapshot() as later:
            assert len(later) == len(store) == 1000
            assert later["a:77"] == bytes(1000)
        check(snapshot, model)


def test_the_keys_of_a_snapshot_can_be_deleted_and_its_items_put_back(store):
    model = fill(store, mixed)
    with store.snapshot() as snapshot:
        store["a:new"] = 1
        assert store.delete_many(snapshot.keys("a")) == len(snapshot.keys("a")) > 10
        assert list(store.keys("a")) == ["a:new"]
        store.clear()
        store.put_many(snapshot)
        assert store == model
        store.clear()
        store.update(snapshot)
        assert store == model


# Several of them


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
@pytest.mark.parametrize("where", ["here", "threads"])
@ENGINES
def test_snapshots_of_different_moments_are_closed_in_any_order(
    open_store, in_thread, lib_version, order, where
):
    store = open_store(
        lib_version=lib_version, key_encoding="utf-8", map_size=256 * MIB, sync=False
    )

    def call(action):
        return in_thread(action).result() if where == "threads" else action()

    stacks, models, snapshots = [], [], []
    for number in range(5):
        store.update({f"a:{n:02}": mixed(n * number) for n in range(30)})
        store.delete(f"a:{number:02}")
        models.append(dict(store.items()))
        stacks.append(ExitStack())
        enter = partial(stacks[-1].enter_context, store.snapshot())
        snapshots.append(call(enter))
    store.clear()
    for closing in order:
        for snapshot, model in zip(snapshots, models, strict=True):
            if not snapshot.closed:
                assert snapshot == model
        call(stacks[closing].close)
        store.put_many({"filler": large(closing), f"a:{closing:02}": 1})
        assert snapshots[closing].closed
    assert all(snapshot.closed for snapshot in snapshots)


def run_each(actions):
    for action in actions:
        action()


def test_a_context_manager_is_for_one_block(store):
    manager = store.snapshot()
    with manager as snapshot:
        pass
    with pytest.raises(RuntimeError, match="Call the method again"), manager:
        pytest.fail("opened")
    assert snapshot.closed


@ENGINES
def test_snapshots_beyond_max_readers(open_store, in_thread, lib_version):
    store = open_store(lib_version=lib_version, max_readers=6, timeout=0)
    store[b"key"] = 0
    with ExitStack() as stack:
        snapshots = []

        def open_another():
            snapshots.append(stack.enter_context(store.snapshot()))
            store[b"key"] = len(snapshots)

        for _ in range(4):
            open_another()
        with pytest.raises(lmdb.ReadersFullError):
            run_each(6 * [open_another])
        values = [snapshot[b"key"] for snapshot in snapshots]
        assert values == list(range(len(snapshots)))
        with pytest.raises(lmdb.ReadersFullError):
            in_thread(lambda: b"key" in store or store.get(b"other")).result()
        store[b"key"] = "pending"
        assert store[b"key"] == "pending"
        assert [snapshot[b"key"] for snapshot in snapshots] == values
    with store.snapshot() as snapshot:
        assert snapshot[b"key"] == store[b"key"] == "pending"


KEEP_SNAPSHOTS = """
import sys
from contextlib import ExitStack
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore(sys.argv[1], max_readers=6)
stack = ExitStack()
try:
    while True:
        stack.enter_context(store.snapshot())
except Exception as error:
    print(type(error).__name__, flush=True)
sys.stdin.read()
"""


@ENGINES
def test_reader_slots_of_a_killed_process_are_cleared(open_store, lib_version):
    store = open_store(lib_version=lib_version, max_readers=6)
    store[b"key"] = 1
    store.flush()
    command = [sys.executable, "-c", KEEP_SNAPSHOTS, store.db_path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        try:
            assert other.stdout.readline().strip() == b"ReadersFullError"
            store.timeout = 0
            with pytest.raises(lmdb.ReadersFullError), store.snapshot():
                pytest.fail("opened")
        finally:
            other.kill()
    with store.snapshot() as first, store.snapshot() as second:
        assert first[b"key"] == second[b"key"] == 1


# Its end


def advanced(iterator):
    next(iterator)
    next(iterator)
    return partial(next, iterator)


# Each takes an open snapshot and returns what to call when it is closed.
USES = {
    "[]": lambda snapshot: partial(snapshot.__getitem__, "a:00"),
    "get": lambda snapshot: partial(snapshot.get, "missing", 1),
    "in": lambda snapshot: partial(snapshot.__contains__, "a:00"),
    "len": lambda snapshot: partial(len, snapshot),
    "bool": lambda snapshot: partial(bool, snapshot),
    "==": lambda snapshot: partial(snapshot.__eq__, {}),
    "get_many": lambda snapshot: partial(snapshot.get_many, ["a:00", "x"]),
    "get_many of none": lambda snapshot: partial(snapshot.get_many, []),
    "iter": lambda snapshot: partial(iter, snapshot),
    "reversed": lambda snapshot: partial(reversed, snapshot),
    "keys": lambda snapshot: snapshot.keys,
    "values": lambda snapshot: partial(snapshot.values, "a"),
    "items": lambda snapshot: partial(snapshot.items, start="a"),
    "len of a view": lambda snapshot: partial(len, snapshot.items()),
    "len of a range": lambda snapshot: partial(len, snapshot.keys("a")),
    "in keys": lambda snapshot: partial(snapshot.keys().__contains__, "a:00"),
    "in values": lambda snapshot: partial(snapshot.values().__contains__, 0),
    "in items": lambda snapshot: partial(snapshot.items().__contains__, ("a:00", 0)),
    "loop over keys": lambda snapshot: partial(list, snapshot.keys()),
    "loop over values": lambda snapshot: partial(list, snapshot.values("a")),
    "reversed items": lambda snapshot: partial(reversed, snapshot.items()),
    "&": lambda snapshot: partial(snapshot.keys().__and__, {"a:00"}),
    "== of keys": lambda snapshot: partial(snapshot.keys().__eq__, set()),
    "new iterator": lambda snapshot: partial(next, iter(snapshot)),
    "key iterator": lambda snapshot: advanced(iter(snapshot)),
    "value iterator": lambda snapshot: advanced(iter(snapshot.values())),
    "item iterator": lambda snapshot: advanced(reversed(snapshot.items())),
    "item iterator of a range": lambda snapshot: advanced(iter(snapshot.items("b"))),
}
ENDS = {
    "end": lambda store, stack: stack.close(),
    "exception": lambda store, stack: stack.__exit__(*_failure()),
    "close": lambda store, stack: store.close(),
}


def _failure():
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        return sys.exc_info()


def raises_closed(call):
    try:
        call()
    except ClosedError as error:
        return "closed" in str(error)
    return False


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("value", [small, large])
def test_everything_of_a_closed_snapshot_raises(store, end, value):
    store.update({f"{head}:{n:02}": value(n) for head in "ab" for n in range(10)})
    with ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        calls = {name: prepare(snapshot) for name, prepare in USES.items()}
        ENDS[end](store, stack)
        assert [name for name in calls if not raises_closed(calls[name])] == []


def test_the_exception_of_its_block_goes_on(store):
    with pytest.raises(ZeroDivisionError), store.snapshot() as snapshot:
        raise ZeroDivisionError
    assert snapshot.closed
    with pytest.raises(ClosedError, match="ends with its block"):
        len(snapshot)


def test_snapshots_of_a_closed_store_say_so(store):
    with store.snapshot() as snapshot:
        store.close()
        assert snapshot.closed
        with pytest.raises(ClosedError, match="The store at"):
            snapshot["key"]


def in_steps(store, read):
    """Close a snapshot by a signal at each step of a read; return the results."""
    stack = ExitStack()

    def prepare():
        stack.close()
        return stack.enter_context(store.snapshot())

    with handling(stack.close):
        for snapshot, result in every_step(prepare, read):
            yield snapshot.closed, result


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda snapshot: {"a": snapshot["a"], "b": snapshot["b"]}, small),
        (lambda snapshot: {"a": snapshot["a"], "b": snapshot["b"]}, large),
        (lambda snapshot: snapshot.get_many(["a", "b"], decode_keys=True)[0], large),
        (lambda snapshot: dict(snapshot.items()), small),
        (lambda snapshot: dict(snapshot.items()), large),
        (lambda snapshot: dict(snapshot) if len(snapshot.keys("a")) else 0, small),
    ],
    ids=["get", "get large", "get_many", "items", "items large", "range"],
)
def test_snapshot_closed_by_a_signal_handler_at_any_moment(store, read, value):
    model = {"a": value(1), "b": value(2)}
    store.put_many(model)
    outcomes = set()
    for closed, result in in_steps(store, read):
        if isinstance(result, Exception):
            assert isinstance(result, ClosedError), repr(result)
            assert closed
        else:
            assert result == model
        outcomes.add(type(result))
    assert outcomes == {ClosedError, dict}


# Threads


IN_THE_MIDDLE = {
    "get": lambda snapshot: {"a": snapshot["a"], "b": snapshot["b"]},
    "iternext": lambda snapshot: dict(snapshot.items()),
    "iterprev": lambda snapshot: dict(reversed(snapshot.items())),
    "set_range": lambda snapshot: dict(snapshot.items(start="a")),
    "stat": lambda snapshot: len(snapshot) and dict(snapshot),
}


@VALUES
@ENGINES
def test_one_snapshot_serves_several_threads_at_once(
    open_store, in_thread, hasty, lib_version, value
):
    store = open_store(
        lib_version=lib_version, key_encoding="utf-8", map_size=256 * MIB, sync=False
    )
    model = fill(store, value)
    done = threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            store.put_many(dict.fromkeys(list(model)[:5], small(number)))

    def read(seed):
        chance = random.Random(seed)
        names = chance.sample(list(model), 10)
        for name in names:
            assert snapshot[name] == model[name]
        assert snapshot.get_many(names, decode_keys=True) == (
            {name: model[name] for name in names},
            [],
        )
        assert dict(snapshot.items("a")) == {n: model[n] for n in model if n[0] == "a"}
        assert list(reversed(snapshot)) == list(model)[::-1]
        assert len(snapshot.keys(stop="b")) == sum(name < "b" for name in model)

    with store.snapshot() as snapshot:
        writer = in_thread(write)
        try:
            others = [in_thread(partial(read, seed)) for seed in range(5)]
            for seed in range(5, 9):
                read(seed)
            for other in others:
                other.result()
            run_all(*(partial(read, seed) for seed in range(4)))
        finally:
            done.set()
        writer.result()


@pytest.mark.parametrize("moment", ["get", "iternext"])
def test_snapshot_is_read_by_one_thread_at_a_time(store, in_thread, moment):
    model = {"a": 1, "b": 2}
    store.put_many(model)
    turn = threading.Event()

    def open_and_read():
        with store.snapshot() as snapshot:
            snapshots.append(snapshot)
            found = IN_THE_MIDDLE[moment](snapshot)
            assert turn.wait(PATIENCE)
            return found

    snapshots = []
    with Parked(in_thread, moment, open_and_read) as owner:
        others = [in_thread(partial(dict, snapshots[0])) for _ in range(2)]
        others.append(in_thread(lambda: snapshots[0]["a"]))
        for other in others:
            other.wait_until_in(SHARES_SNAPSHOT)
        owner.leave()
        assert [other.result() for other in others] == [model, model, 1]
        turn.set()
        assert owner.release() == model


def test_threads_that_share_a_snapshot_wait_for_each_others_reads(store, in_thread):
    store.put_many({"a": 1, "b": 2})
    reading = threading.Event()

    def read():
        return interrupted("get", lambda: snapshot["b"], reading.set)

    with (
        store.snapshot() as snapshot,
        Parked(in_thread, "get", lambda: snapshot["a"]) as first,
    ):
        second = in_thread(read)
        second.wait_until_in(WAITS_FOR_READ_OF_SNAPSHOT)
        assert not reading.is_set()
        assert first.release() == 1
        assert second.result() == 2
        assert reading.is_set()


@pytest.mark.parametrize("kind", [Acting, Reduced])
@pytest.mark.parametrize("ballast", [b"", bytes(LARGE)], ids=["small", "large"])
def test_values_may_use_the_snapshot_and_the_store_as_they_are_unpickled(
    store, acting, kind, ballast
):
    store.put_many({f"acting {n}": kind(ballast) for n in range(3)})
    store.put_many({"plain": 1, "large": large(1)})
    calls = []

    def use():
        if len(calls) > 20:
            return  # it is nested in itself
        calls.append(None)
        assert snapshot["plain"] == 1
        assert snapshot.get_many(["plain", "large"], decode_keys=True) == (
            {"plain": 1, "large": large(1)},
            [],
        )
        assert len(snapshot) == len(list(snapshot)) == 5
        assert snapshot["acting 1"].ballast == ballast
        store["plain"] = store.get("plain") + 1
        store.flush()
        with store.snapshot() as inner:
            assert inner["plain"] > 1

    acting(use)
    with store.snapshot() as snapshot:
        run_all(*4 * [lambda: snapshot["acting 0"]])
        assert [value.ballast for value in snapshot.values("acting")] == 3 * [ballast]
        assert len(snapshot.get_many([f"acting {n}" for n in range(3)])[0]) == 3
    assert len(calls) > 20


PARKED_READS = {
    "get": lambda snapshot: snapshot["parked"].ballast,
    "get_many": lambda snapshot: snapshot.get_many(["parked"])[0][b"parked"].ballast,
    "items": lambda snapshot: next(iter(snapshot.items("p")))[1].ballast,
    "reversed": lambda snapshot: next(reversed(snapshot.values())).ballast,
}


@ENGINES
@pytest.mark.parametrize("read", PARKED_READS)
@pytest.mark.parametrize("end", ["end", "close"])
def test_large_value_that_is_being_unpickled_comes_out_right_though_it_is_closed(
    open_store, in_thread, acting, lib_version, read, end
):
    store = open_store(
        lib_version=lib_version, key_encoding="utf-8", map_size=64 * MIB, sync=False
    )
    ballast = [Acting(), *(bytes([n]) * LARGE for n in range(8))]
    value = Acting(ballast)
    store.put_many({"filler": bytes(MIB), "parked": value})
    with Pause() as pause, ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        acting(pause)
        reading = in_thread(partial(PARKED_READS[read], snapshot))
        pause.reached()
        ENDS[end](store, stack)
        with contextlib.suppress(ClosedError):
            for number in range(8):
                store.put_many({"filler": bytes([number]) * (3 * MIB), "parked": 1})
        assert reading.running
        pause.go_on()
        assert reading.result()[1:] == ballast[1:]


def test_large_value_of_a_closed_snapshot_does_not_hold_up_growth(
    open_store, in_thread, acting
):
    store = open_store(map_size=4 * MIB, timeout=0, sync=False)
    value = Acting([Acting(), *(bytes([n]) * LARGE for n in range(8))])
    store.put_many({b"parked": value})
    with Pause() as pause:
        acting(pause)
        with store.snapshot() as snapshot:
            reading = in_thread(lambda: snapshot[b"parked"].ballast)
            pause.reached()
        for _ in range(4):
            store.put_many({b"filler": bytes(8 * MIB), b"parked": 1})
        assert store.env.info()["map_size"] > 4 * MIB
        pause.go_on()
        assert reading.result()[1:] == value.ballast[1:]


def test_get_many_of_more_keys_than_a_chunk_is_whole_or_raises(
    store, in_thread, acting
):
    model = {f"{n:03}": small(n) for n in range(300)}
    store.put_many({**model, "005": Acting()})
    with Pause() as pause:
        acting(pause)
        with store.snapshot() as snapshot:
            reading = in_thread(lambda: snapshot.get_many(model))
            pause.reached()
        pause.go_on()
        with pytest.raises(ClosedError):
            reading.result()


@pytest.mark.parametrize("ballast", [b"", bytes(LARGE)], ids=["small", "large"])
@pytest.mark.parametrize("end", ENDS)
def test_value_may_end_the_snapshot_that_it_is_read_from(store, acting, ballast, end):
    store.put_many({"key": Acting(ballast), "other": 1})
    with ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        acting(partial(ENDS[end], store, stack))
        assert snapshot["key"].ballast == ballast
        with pytest.raises(ClosedError):
            snapshot["other"]


def active_readers(store):
    rows = store.env.readers().splitlines()[1:]
    return [row for row in rows if not row.endswith("-")]


MOMENTS = pytest.mark.parametrize("moment", IN_THE_MIDDLE)


def read_or_closed(snapshot, moment):
    try:
        return IN_THE_MIDDLE[moment](snapshot)
    except ClosedError:
        return "closed"


@MOMENTS
@pytest.mark.parametrize("value", [small, large])
def test_read_that_is_in_the_map_when_its_snapshot_ends(
    store, in_thread, moment, value
):
    model = {"a": value(1), "b": value(2)}
    store.put_many({**model, "filler": bytes(MIB)})
    with store.snapshot() as snapshot:
        read = partial(read_or_closed, snapshot, moment)
        reader = Parked(in_thread, moment, read)
    with reader:
        assert snapshot.closed
        for number in range(8):
            store.put_many({"a": number, "b": 0, "filler": bytes([number]) * MIB})
        found = reader.release()
        assert found in ("closed", model, {**model, "filler": bytes(MIB)})
    gc.collect()
    assert not active_readers(store)


@MOMENTS
@pytest.mark.parametrize("value", [small, large])
def test_closing_the_store_waits_for_a_read_that_is_in_the_map(
    store, in_thread, moment, value
):
    model = {"a": value(1), "b": value(2)}
    store.put_many(model)
    with store.snapshot() as snapshot:
        read = partial(read_or_closed, snapshot, moment)
        with Parked(in_thread, moment, read) as reader:
            closing = in_thread(store.close)
            closing.wait_until_in(WAITS_FOR_READS)
            assert closing.running
            assert reader.release() in ("closed", model)
            closing.result()
        assert snapshot.closed


@pytest.mark.parametrize("end", ["end", "close"])
@pytest.mark.parametrize("value", [small, large])
def test_readers_are_told_when_a_snapshot_ends_under_them(
    store, in_thread, hasty, end, value
):
    model = {f"{n:03}": value(n) for n in range(30)}
    store.put_many(model)
    busy = threading.Barrier(5)

    def read(use):
        for _ in range(3):
            assert use() == model
        busy.wait(PATIENCE)
        while True:
            assert use() == model

    with ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        uses = [
            lambda: {name: snapshot[name] for name in model},
            lambda: snapshot.get_many(model, decode_keys=True)[0],
            lambda: dict(snapshot.items()),
            lambda: model if len(snapshot.keys("0")) == 30 else None,
        ]
        readers = [in_thread(partial(read, use)) for use in uses]
        busy.wait(PATIENCE)
        ENDS[end](store, stack)
        for reader in readers:
            with pytest.raises(ClosedError):
                reader.result()


def test_snapshot_does_not_wait_for_a_commit(store, in_thread):
    store.put_many({"key": 1})
    with Parked(in_thread, "commit", lambda: store.put_many({"key": 2})) as writer:
        stack = ExitStack()
        snapshot = in_thread(lambda: stack.enter_context(store.snapshot())).result()
        assert snapshot["key"] == 1
        writer.release()
        with stack, store.snapshot() as later:
            assert (snapshot["key"], later["key"]) == (1, 2)


def test_snapshot_during_a_flush_has_what_is_being_flushed(store, in_thread):
    store["key"] = 1
    with Parked(in_thread, "commit", store.flush) as writer:
        stack = ExitStack()
        opening = in_thread(lambda: stack.enter_context(store.snapshot()))
        opening.wait_until_in(WAITS_FOR_WRITER)
        writer.release()
        with stack:
            assert opening.result() == {"key": 1}


def test_snapshot_during_a_transaction_block_shows_the_state_before(store, in_thread):
    store.update(key=1, other=1)

    def block():
        with store.transaction():
            store["key"] = 2
            store.delete("other")
            pause()

    with Pause() as pause:
        writer = in_thread(block)
        pause.reached()

        def use():
            with store.snapshot() as snapshot:
                return dict(snapshot), snapshot.get_many(["key", "other"])[0]

        assert in_thread(use).result() == (
            {"key": 1, "other": 1},
            {b"key": 1, b"other": 1},
        )
        pause.go_on()
        writer.result()
        assert dict(use()[0]) == {"key": 2}


# Finalizers: what one thread holds must not be what another waits for


def interrupted(method, action, by):
    """Do `action`; `by` runs at its first call of py-lmdb's `method`."""

    def hook(frame, event, function):
        if event == "c_call" and is_method(function, method):
            sys.setprofile(None)
            by()

    sys.setprofile(hook)
    try:
        return action()
    finally:
        sys.setprofile(None)


def or_busy(action):
    try:
        return action()
    except BusyError:
        return "busy"


def test_two_snapshots_read_by_finalizers_of_each_others_reads(store, in_thread):
    store.update(key=1)
    both = threading.Barrier(2)
    with store.snapshot() as first, store.snapshot() as second:

        def read(one, other):
            def finalize():
                both.wait(PATIENCE)
                results.append(or_busy(lambda: other["key"]))

            return interrupted("get", lambda: one["key"], finalize)

        results = []
        workers = [
            in_thread(partial(read, *pair))
            for pair in ((first, second), (second, first))
        ]
        assert [worker.result() for worker in workers] == [1, 1]
        assert set(results) <= {1, "busy"}


@pytest.mark.parametrize("what", ["read", "closed"])
def test_snapshot_used_by_a_finalizer_while_a_finalizer_of_it_puts(
    store, in_thread, what
):
    store.update(key=1)
    both = threading.Barrier(2)
    with ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        close = stack.pop_all().close

        def put():
            both.wait(PATIENCE)
            store["put"] = 2

        def use():
            both.wait(PATIENCE)
            or_busy(close if what == "closed" else partial(snapshot.get, "key"))

        reading = in_thread(
            partial(interrupted, "get", lambda: or_busy(lambda: snapshot["key"]), put)
        )
        many = in_thread(
            partial(interrupted, "begin", lambda: store.get_many(["key"]), use)
        )
        assert many.result() == ({b"key": 1}, [])
        assert reading.result() == 1
        close()
    assert store["put"] == 2


# Fork

FORK = """
import os, subprocess, sys, threading
from contextlib import ExitStack
from lmdb_object_store import ClosedError, LmdbObjectStore
store = LmdbObjectStore(
    "db",
    key_encoding="utf-8",
    map_size=2**28,
    sync=False,
    lib_version=int(sys.argv[1]),
)

def value(n):
    return bytes([n]) * (150_000 if n % 3 == 0 else 300)

model = {f"{n:03}": value(n) for n in range(60)}
store.put_many(model)

def fork(child):
    "Return the exit code of `child`."
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def check():
    "The parent's snapshot is as it was, though all is overwritten meanwhile."
    for _ in range(3):
        assert dict(snapshot.items()) == model
        assert snapshot.get_many(model, decode_keys=True)[0] == model
        assert next(items) in model.items()
        store.clear()
        for number in range(8):
            store.put_many({"filler": bytes([number]) * 2**21, "x": number})

def inherited():
    for use in (
        lambda: snapshot["000"], lambda: len(snapshot), lambda: list(snapshot),
        lambda: next(items), lambda: snapshot.get_many(["000"]), lambda: len(view),
    ):
        try:
            use()
        except ClosedError as error:
            assert "child process" in str(error), error
        else:
            raise AssertionError
    assert snapshot.closed

def own():
    inherited()
    with LmdbObjectStore("db", key_encoding="utf-8", sync=False) as mine:
        for number in range(20):
            mine.put_many({f"{n:03}": bytes([number]) * 9_999 for n in range(60)})
            with mine.snapshot() as inner:
                mine.clear()
                assert len(inner) >= 60
    assert snapshot.closed
"""

FORK_INSIDE = """
with store.snapshot() as snapshot:
    view, items = snapshot.items(), iter(snapshot.items())
    next(items)
    assert fork({child}) == 0
    check()
    assert fork({child}) == 0
    check()
store.close()
"""

FORK_IN_USE = """
stop = threading.Event()

def use():
    while not stop.is_set():
        assert dict(snapshot.items()) == model
        assert snapshot["003"] == model["003"]

with store.snapshot() as snapshot:
    view, items = snapshot.items(), iter(snapshot.items())
    next(items)
    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert fork(inherited) == 0
        check()
    finally:
        stop.set()
    for thread in threads:
        thread.join()
store.close()
"""

FORK_IN_A_VALUE = """
class Forks:
    def __init__(self):
        self.made = True

    def __setstate__(self, state):
        assert fork(inherited) == fork(own) == 0
        check()

large = [Forks(), [value(n) * 4 for n in range(0, 30, 3)]]
store.put_many({"value": large})
with store.snapshot() as snapshot:
    view, items = snapshot.items(stop="v"), iter(snapshot.items())
    next(items)

    def check():
        for number in range(8):
            store.put_many({"value": bytes([number]) * 2**21, "000": number})
        assert dict(view) == model

    assert snapshot["value"][1] == large[1]
    assert dict(view) == model
store.close()
"""

FORK_AND_LEAVE = """
def leave():
    stack.close()
    assert snapshot.closed

def close():
    stack.close()
    store.close()

stack = ExitStack()
snapshot = stack.enter_context(store.snapshot())
view, items = snapshot.items(), iter(snapshot.items())
next(items)
assert fork(leave) == fork(close) == 0
check()
stack.close()
store.close()
"""


@pytest.mark.one_in(4)
@needs_fork
@ENGINES
@pytest.mark.parametrize(
    "script",
    [
        FORK_INSIDE.format(child="inherited"),
        FORK_INSIDE.format(child="own"),
        FORK_IN_USE,
        FORK_IN_A_VALUE,
        FORK_AND_LEAVE,
    ],
    ids=["use", "own store", "in use", "in a value", "leave"],
)
def test_forked_child_leaves_the_snapshots_of_its_parent_alone(
    run, tmp_path, lib_version, script
):
    run(FORK + script, lib_version)
    command = [sys.executable, "-m", "lmdb", "verify", str(tmp_path / "db")]
    audit = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert audit.stdout == "verify: OK\n", audit.stdout + audit.stderr


# Growth waits for snapshots

BIG = {b"big": bytes(MIB)}
"""What doesn't fit into the map of `GROWING`."""
GROWING = {"map_size": SMALL_MAP, "sync": False, "autoflush_on_read": False}
# Longer than what tests wait for anything: who has to wait this long fails.
PATIENT = {**GROWING, "timeout": 4 * PATIENCE}


@pytest.fixture
def waiting(in_thread):
    """Run an action in a thread; return it when it waits for snapshots."""

    def waiting(action):
        arrived = threading.Event()
        worker = in_thread(partial(announcing, arrived, "sleep", action))
        assert arrived.wait(PATIENCE), "it does not wait"
        return worker

    return waiting


class Holder:
    """A thread that has a snapshot open, and does there what it is told."""

    def __init__(self, store, in_thread):
        self._calls = queue.SimpleQueue()
        opened = threading.Event()
        self._thread = in_thread(partial(self._run, store, opened))
        assert opened.wait(PATIENCE)

    def _run(self, store, opened):
        with store.snapshot() as self.snapshot:
            opened.set()
            while (call := self._calls.get(timeout=2 * PATIENCE)) is not None:
                call()

    def start(self, action):
        future = Future()

        def call():
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def do(self, action):
        return self.start(action).result(PATIENCE)

    def close(self):
        self._calls.put(None)
        self._thread.result()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._calls.put(None)


@pytest.fixture
def hold(in_thread):
    return lambda store: Holder(store, in_thread)


def put_a_batch(store):
    store.batch_size = 1
    store.put(b"big", BIG[b"big"])


def flush(store):
    store[b"big"] = BIG[b"big"]
    store.flush()


def end_a_block(store):
    with store.transaction():
        store.update(BIG)


def delete_many(store):
    store[b"big"] = BIG[b"big"]
    store.delete_many([b"gone"])


def setdefault(store):
    store.batch_size = 1
    store.setdefault(b"big", BIG[b"big"])


def open_snapshot(store):
    store[b"big"] = BIG[b"big"]
    with store.snapshot():
        pass


WAYS = {
    "put": put_a_batch,
    "flush": flush,
    "put_many": lambda store: store.put_many(BIG),
    "block": end_a_block,
    "delete_many": delete_many,
    "setdefault": setdefault,
    "snapshot": open_snapshot,
}
KEEPS_PENDING = {"flush", "delete_many", "snapshot"}
GROWS = pytest.mark.parametrize("grow", WAYS)


@ENGINES
@GROWS
def test_growth_waits_for_the_snapshot_of_another_thread(
    open_store, hold, waiting, in_thread, lib_version, grow
):
    store = open_store(lib_version=lib_version, **PATIENT)
    store.put_many({b"key": 1, b"gone": 2})
    with hold(store) as holder:
        growing = waiting(lambda: WAYS[grow](store))

        def read():
            return (
                store[b"key"],
                store.get_many([b"gone", b"none"]),
                list(store.items(stop=b"b")),
                len(store.keys(b"k")),
                b"gone" in store,
            )

        expected = (1, ({b"gone": 2}, [b"none"]), [], 1, True)
        assert in_thread(read).result() == expected
        assert holder.do(read) == expected
        assert holder.do(lambda: dict(holder.snapshot)) == {b"key": 1, b"gone": 2}
        store.batch_size = 1000
        if grow != "block":
            for number in range(20):
                in_thread(lambda n=number: store.put(b"%d" % n, n)).result()
            assert in_thread(lambda: store[b"19"]).result() == 19
        assert store.env.info()["map_size"] == SMALL_MAP
        assert growing.running
        holder.close()
        growing.result()
    assert store.env.info()["map_size"] > SMALL_MAP
    assert store[b"big"] == BIG[b"big"]
    assert store.get(b"19") == (None if grow == "block" else 19)
    assert (b"gone" in store) == (grow != "delete_many")


@GROWS
def test_growth_waits_for_the_last_of_several_snapshots(
    open_store, hold, waiting, grow
):
    store = open_store(**PATIENT)
    with hold(store) as first, hold(store) as second:
        growing = waiting(lambda: WAYS[grow](store))
        first.close()
        assert second.do(lambda: len(second.snapshot)) == 0
        assert growing.running
        second.close()
        growing.result()
    assert store[b"big"] == BIG[b"big"]


def test_growth_tells_what_it_waits_for(open_store, hold, in_thread):
    class Handler(logging.Handler):
        told, record = threading.Event(), None

        def emit(self, record):
            self.record = record
            self.told.set()

    store = open_store(**PATIENT)
    handler, log = Handler(logging.WARNING), logging.getLogger("lmdb_object_store")
    log.addHandler(handler)
    try:
        with hold(store) as holder:
            ident = holder.do(threading.get_ident)
            growing = in_thread(lambda: store.put_many(BIG))
            assert handler.told.wait(PATIENCE)
            assert growing.running
            holder.close()
            growing.result()
    finally:
        log.removeHandler(handler)
    assert handler.record.levelname == "WARNING"
    text = handler.record.getMessage()
    assert store.db_path in text
    assert "growth waits for a snapshot" in text
    assert str(ident) in text


REFUSED = pytest.raises(SnapshotOpenError, match="larger map_size")


@ENGINES
@GROWS
def test_growth_that_has_waited_long_enough_is_refused(
    open_store, hold, lib_version, grow
):
    store = open_store(lib_version=lib_version, **GROWING, timeout=0.05)
    store.put_many({b"key": 1, b"gone": 2})
    store[b"pending"] = 3
    with hold(store) as holder:
        store[b"pending"] = 4
        with REFUSED as caught:
            WAYS[grow](store)
        assert isinstance(caught.value, GrowthError)
        assert isinstance(caught.value, lmdb.MapFullError)
        kept = {b"pending", b"big"} if grow in KEEPS_PENDING else {b"pending"}
        if grow in ("put_many", "block"):
            kept = set()  # what was pending has been flushed before
        assert store.write_buffer.keys() == kept
        assert dict(store.items()) == {
            b"key": 1,
            b"gone": 2,
            b"pending": 4,
            **(BIG if grow in KEEPS_PENDING else {}),
        }
        assert holder.do(lambda: holder.snapshot[b"pending"]) == 3
        holder.close()
    store.flush()
    assert not store.write_buffer
    store.put_many(BIG)
    assert store[b"pending"] == 4


def test_growth_does_not_wait_again_for_a_snapshot_that_it_has_waited_for(
    open_store, hold
):
    store = open_store(**GROWING, timeout=0.05)
    slept = threading.Event()
    with hold(store):
        with REFUSED:
            announcing(slept, "sleep", lambda: store.put_many(BIG))
        assert slept.is_set()
        slept.clear()
        with REFUSED:
            announcing(slept, "sleep", lambda: store.put_many(BIG))
        assert not slept.is_set()


@ENGINES
@GROWS
def test_growth_is_refused_at_once_to_the_thread_that_has_a_snapshot(
    open_store, in_thread, lib_version, grow
):
    store = open_store(lib_version=lib_version, **PATIENT)
    store.put_many({b"key": 1, b"gone": 2})

    def work():
        with store.snapshot() as snapshot:
            with REFUSED:
                WAYS[grow](store)
            assert store.write_buffer.keys() == (
                {b"big"} if grow in KEEPS_PENDING else set()
            )
            assert snapshot == {b"key": 1, b"gone": 2}
            assert b"gone" in store
        WAYS[grow](store)

    in_thread(work).result()
    assert store[b"big"] == BIG[b"big"]


def test_close_ends_the_snapshots_that_its_flush_would_wait_for(open_store, in_thread):
    store = open_store(**PATIENT)
    store[b"key"] = 1

    def work():
        with store.snapshot() as snapshot:
            store.update(BIG)
            store.close(strict=True)
            assert snapshot.closed

    in_thread(work).result()
    assert open_store(map_size=SMALL_MAP) == {b"key": 1, **BIG}


def test_close_ends_the_snapshots_of_others_that_its_flush_would_wait_for(
    open_store, hold, in_thread
):
    store = open_store(**PATIENT)
    store[b"key"] = 1
    with hold(store) as holder:
        store.update(BIG)
        in_thread(lambda: store.close(strict=True)).result()
        with pytest.raises(ClosedError):
            holder.do(lambda: len(holder.snapshot))
    assert open_store(map_size=SMALL_MAP) == {b"key": 1, **BIG}


def test_close_while_growth_waits_for_the_snapshot_of_its_thread(
    open_store, hold, waiting
):
    store = open_store(**PATIENT)
    with hold(store) as holder:
        growing = waiting(lambda: store.put_many(BIG))
        holder.do(lambda: store.close(strict=True))
        with contextlib.suppress(ClosedError):
            growing.result()
        assert store.closed


def test_exit_flushes_though_a_snapshot_is_open(open_store, run):
    run(
        """
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", map_size=2**16)
store[b"key"] = 1

def loop():
    with store.snapshot() as snapshot:
        yield snapshot

suspended = loop()
next(suspended)
store[b"big"] = bytes(2**20)
"""
    )
    assert open_store() == {b"key": 1, **BIG}


def test_new_snapshots_wait_for_growth_that_waits(open_store, hold, waiting, in_thread):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})
    with hold(store) as holder:
        growing = waiting(lambda: store.put_many(BIG))

        def use():
            with store.snapshot() as snapshot:
                return dict(snapshot)

        opening = in_thread(use)
        opening.wait_until_in(WAITS_FOR_WRITER)
        assert holder.do(use) == {b"key": 1}  # it has one already
        assert opening.running
        assert growing.running
        holder.close()
        growing.result()
        assert opening.result() == {b"key": 1, **BIG}


def test_a_second_snapshot_whose_flush_would_wait_for_the_first_is_refused(
    open_store, hold, waiting
):
    store = open_store(**PATIENT)
    with hold(store) as holder:
        growing = waiting(lambda: flush(store))
        manager = store.snapshot()
        with REFUSED:
            holder.do(manager.__enter__)
        holder.close()
        growing.result()
    assert store == BIG


# Who has a snapshot open waits for no writer that waits for it


def begin_a_block(store):
    with store.transaction():
        store[b"refused"] = 1


WRITES = {
    "flush": lambda store: store.flush(),
    "put_many": lambda store: store.put_many({b"refused": 1}),
    "delete_many": lambda store: store.delete_many([b"key"]),
    "range": lambda store: store.delete_many(store.keys(b"k")),
    "clear": lambda store: store.clear(),
    "del": lambda store: store.__delitem__(b"key"),
    "pop": lambda store: store.pop(b"key"),
    "popitem": lambda store: store.popitem(),
    "setdefault": lambda store: store.setdefault(b"refused", 1),
    "block": begin_a_block,
    "exists": lambda store: store.exists(b"key", flush=True),
}
WRITING = pytest.mark.parametrize("write", WRITES)


@WRITING
def test_write_of_a_thread_that_growth_waits_for_is_refused(
    open_store, hold, waiting, write
):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})
    with hold(store) as holder:
        growing = waiting(lambda: store.put_many(BIG))
        with REFUSED:
            holder.do(lambda: WRITES[write](store))
        assert holder.do(lambda: dict(store.items())) == {b"key": 1}
        assert growing.running
        holder.close()
        growing.result()
    assert store == {b"key": 1, **BIG}


@WRITING
@pytest.mark.parametrize("moment", ["putmulti", "block"])
def test_write_that_waits_is_refused_when_growth_begins_to_wait_for_its_thread(
    open_store, hold, in_thread, write, moment
):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})

    def block():
        with store.transaction():
            store.update(BIG)
            pause()

    with hold(store) as holder, ExitStack() as stack:
        arrived = threading.Event()
        if moment == "block":
            pause = stack.enter_context(Pause())
            writer = in_thread(block)
            pause.reached()
            go_on, name = pause.go_on, "sleep"
        else:
            writer = stack.enter_context(
                Parked(in_thread, moment, lambda: store.put_many(BIG))
            )
            go_on, name = writer.leave, "acquire"
            writer.result = writer.release
        refused = holder.start(
            partial(announcing, arrived, name, partial(WRITES[write], store))
        )
        assert arrived.wait(PATIENCE)
        go_on()
        with REFUSED:
            refused.result(PATIENCE)
        holder.close()
        writer.result()
    assert store == {b"key": 1, **BIG}


def test_put_of_a_thread_that_growth_waits_for_only_buffers(open_store, hold, waiting):
    store = open_store(**PATIENT, batch_size=5)
    store.put_many({b"key": 1})
    with hold(store) as holder:
        growing = waiting(lambda: store.put_many(BIG))
        for number in range(9):
            holder.do(lambda n=number: store.put(b"%d" % n, n))
        for write in (
            lambda: store.put(b"9", 9),
            lambda: store.delete(b"9"),
        ):
            with REFUSED:
                holder.do(write)
        assert len(store.write_buffer) == 9
        assert holder.do(lambda: store[b"8"]) == 8
        assert growing.running
        holder.close()
        growing.result()
        store.put(b"9", 9)
    assert store == {b"%d" % n: n for n in range(10)} | {b"key": 1} | BIG


def test_write_of_a_thread_that_has_a_snapshot_waits_for_a_commit(
    open_store, hold, in_thread
):
    store = open_store(sync=False)
    writing = partial(store.put_many, {b"a": 1})
    with hold(store) as holder, Parked(in_thread, "commit", writing) as writer:
        arrived = threading.Event()
        second = partial(announcing, arrived, "acquire", lambda: flush(store))
        waiting = holder.start(second)
        assert arrived.wait(PATIENCE)
        assert not waiting.done()
        writer.release()
        waiting.result(PATIENCE)
    assert store == {b"a": 1, **BIG}


# Reads and other snapshots meanwhile


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.get(b"key"),
        lambda store: store.get_many([b"key"])[0][b"key"],
        lambda store: 1 if store.exists(b"key") else 0,
        lambda store: next(iter(store.items(b"k")))[1],
    ],
    ids=["get", "get_many", "exists", "items"],
)
@pytest.mark.parametrize("whose", ["own", "other"])
def test_the_flush_of_a_read_waits_for_no_snapshot(
    open_store, hold, in_thread, caplog, read, whose
):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})
    with hold(store) as holder:
        store.update(BIG)
        store.autoflush_on_read = True
        use = partial(read, store)
        assert (holder.do(use) if whose == "own" else in_thread(use).result()) == 1
        assert store.write_buffer.keys() == {b"big"}
        holder.close()
    assert "could not flush" in caplog.text
    store.flush()
    assert store == {b"key": 1, **BIG}


@ENGINES
def test_snapshot_that_is_opened_just_before_the_map_moves(
    open_store, in_thread, lib_version
):
    store = open_store(lib_version=lib_version, **PATIENT)
    store.put_many({b"key": 1})
    with ExitStack() as stack:

        def use():
            with store.snapshot() as snapshot:
                pause()
                return dict(snapshot)

        pause = stack.enter_context(Pause())
        opener = stack.enter_context(Parked(in_thread, "begin", use))
        growing = in_thread(lambda: store.put_many(BIG))
        growing.wait_until_in(WAITS_FOR_READS)  # it has waited for all snapshots
        opener.leave()
        pause.reached()
        assert in_thread(lambda: store[b"key"]).result() == 1
        assert growing.running
        pause.go_on()
        assert opener.release() == {b"key": 1}
        growing.result()
    assert store == {b"key": 1, **BIG}


def test_a_block_that_grows_while_a_snapshot_comes_just_before_the_map_moves(
    open_store, in_thread
):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})

    def use():
        with store.snapshot() as snapshot:
            pause()
            return dict(snapshot)

    with Pause() as pause, Parked(in_thread, "begin", use) as opener:
        growing = in_thread(lambda: end_a_block(store))
        growing.wait_until_in(WAITS_FOR_READS)
        opener.leave()
        pause.reached()
        assert growing.running
        pause.go_on()
        assert opener.release() == {b"key": 1}
        growing.result()
    assert store == {b"key": 1, **BIG}


GROW_ELSEWHERE = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1]) as store:
    store.put_many({b"key": 2, b"theirs": bytes(2**20)})
"""


@ENGINES
def test_map_grown_by_another_process_is_adopted_when_snapshots_are_closed(
    open_store, hold, waiting, run, lib_version
):
    store = open_store(lib_version=lib_version, **PATIENT)
    model = {b"key": 1, b"small": small(30)}
    store.put_many(model)
    with hold(store) as holder:
        run(GROW_ELSEWHERE, store.db_path)
        assert holder.do(lambda: dict(holder.snapshot)) == model
        store[b"pending"] = 3
        assert holder.do(lambda: store[b"pending"]) == 3
        for use in (lambda: store[b"key"], store.flush):
            with REFUSED:
                holder.do(use)
        reading = waiting(lambda: store[b"key"])
        assert holder.do(lambda: dict(holder.snapshot)) == model
        assert reading.running
        holder.close()
        assert reading.result() == 2
    with store.snapshot() as snapshot:
        assert snapshot == {**model, b"key": 2, b"theirs": bytes(MIB), b"pending": 3}


def test_map_grown_by_another_process_is_refused_after_the_timeout(
    open_store, hold, run
):
    store = open_store(**GROWING, timeout=0.05)
    store.put_many({b"key": 1})
    with hold(store) as holder:
        run(GROW_ELSEWHERE, store.db_path)
        with REFUSED:
            store.get(b"key")
        assert holder.do(lambda: dict(holder.snapshot)) == {b"key": 1}
        holder.close()
    assert store[b"key"] == 2


# Nothing is left of those that nobody closed


def suspended(store):
    with store.snapshot() as snapshot:
        yield snapshot


def drop_generator(store, in_thread):
    generator = suspended(store)
    next(generator)


def drop_cycle(store, in_thread):
    generator = suspended(store)
    cycle = [generator, next(generator)]
    cycle.append(cycle)
    del generator, cycle
    gc.collect()


def drop_in_another_thread(store, in_thread):
    generators = [suspended(store)]
    next(generators[0])
    in_thread(generators.clear).result()


def drop_manager(store, in_thread):
    assert len(store.snapshot().__enter__()) == 0


def drop_iterator(store, in_thread):
    store.update({b"%02d" % n: n for n in range(30)})
    generator = suspended(store)
    items = iter(next(generator).items())
    next(items)
    del generator
    with pytest.raises(ClosedError):
        next(items)


def drop_thread(store, in_thread):
    in_thread(lambda: next(suspended(store))).result()


@pytest.mark.parametrize(
    "drop",
    [
        drop_generator,
        drop_cycle,
        drop_in_another_thread,
        drop_manager,
        drop_iterator,
        drop_thread,
    ],
)
def test_snapshot_that_was_thrown_away_does_not_hold_up_growth(
    open_store, in_thread, drop
):
    store = open_store(**GROWING, timeout=0)
    drop(store, in_thread)
    assert not active_readers(store)
    store.put_many(BIG)
    assert store[b"big"] == BIG[b"big"]


def test_exception_that_is_kept_does_not_keep_a_snapshot_open(open_store):
    store = open_store(**GROWING, timeout=0)

    def fail():
        with store.snapshot() as snapshot:
            raise ZeroDivisionError(iter(snapshot.items()))

    with pytest.raises(ZeroDivisionError) as kept:
        fail()
    assert not active_readers(store)
    store.put_many(BIG)
    assert store[b"big"] == BIG[b"big"]
    assert kept.tb


def test_growth_waits_for_a_read_that_is_stuck_in_a_closed_snapshot(
    open_store, in_thread
):
    store = open_store(**PATIENT)
    store.put_many({b"key": 1})
    with store.snapshot() as snapshot:
        reader = Parked(in_thread, "get", lambda: snapshot[b"key"])
    with reader:
        growing = in_thread(lambda: store.put_many(BIG))
        growing.wait_until_in(WAITS_FOR_READS)
        assert in_thread(lambda: store[b"key"]).result() == 1
        assert growing.running
        assert reader.release() == 1
        growing.result()
    assert store == {b"key": 1, **BIG}


def test_snapshots_can_be_used_while_growth_waits_for_a_stuck_read_of_the_store(
    open_store, in_thread
):
    store = open_store(**GROWING, timeout=0.2)
    store.put_many({b"key": 1})
    with Parked(in_thread, "get", lambda: store[b"key"]) as reader:
        with pytest.raises(GrowthError, match="does not end"):
            in_thread(lambda: store.put_many(BIG)).result()
        with store.snapshot() as snapshot:
            assert snapshot == {b"key": 1}
        assert reader.release() == 1
    store.put_many(BIG)


def test_growth_under_threads_that_open_snapshots_all_the_time(
    open_store, in_thread, hasty
):
    store = open_store(map_size=SMALL_MAP, max_map_size=MIB // 2, sync=False)
    done = threading.Event()
    sizes = set()

    def read():
        while not done.is_set():
            with store.snapshot() as snapshot:
                number = snapshot.get(b"number", 0)
                assert len(snapshot.keys(b"n:")) == number
                assert all(snapshot[b"n:%d" % n][0] == n for n in range(number))

    def write():
        try:
            for number in range(120):
                store.max_map_size = store.env.info()["map_size"] + MIB // 4
                with store.transaction():
                    store[b"n:%d" % number] = [number, bytes(20 * KIB)]
                    store[b"number"] = number + 1
                sizes.add(store.env.info()["map_size"])
        finally:
            done.set()

    workers = [in_thread(read) for _ in range(3)]
    in_thread(write).result()
    for worker in workers:
        worker.result()
    assert len(sizes) >= 5
