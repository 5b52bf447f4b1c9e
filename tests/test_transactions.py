"""Transaction blocks and edits: all of a block is done, or nothing of it."""

import asyncio
import collections
import datetime
import decimal
import enum
import gc
import logging
import mmap
import operator
import os
import pathlib
import pickle
import random
import subprocess
import sys
import threading
import types
import uuid
from array import array
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

import pytest

from conftest import PATIENCE, Worker, needs_fork
from lmdb_object_store import (
    BusyError,
    ClosedError,
    ConflictError,
    GrowthError,
    LmdbObjectStore,
    ReadOnlyError,
    SnapshotOpenError,
    UnpickleError,
)
from moments import (
    WAITS_FOR_BLOCK,
    WAITS_FOR_LMDB,
    WAITS_FOR_SNAPSHOTS,
    WAITS_FOR_WRITER,
    Parked,
)

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])

MIB = 2**20
SMALL_MAP = 16 * mmap.PAGESIZE
LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled

START = {"a": 1, "b": [2], "c": "three", "m:1": 10, "m:2": 20, "m:3": 30, "z": None}


class Abort(Exception):  # noqa: N818
    pass


class Bad:
    """It can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("not a number",)


@pytest.fixture
def store(open_store):
    store = open_store(key_encoding="utf-8", sync=False)
    store.put_many(START)
    return store


def on_disk(store):
    """What LMDB has, whatever the store says."""
    with store.env.begin() as txn:
        return {key.decode(): pickle.loads(raw) for key, raw in txn.cursor()}


def assert_is(store, expected):
    """Ask the store, in every way, for all that it has."""
    pairs = sorted(expected.items())
    keys = [key for key, _ in pairs]
    for forwards, found in [
        (pairs, store.items()),
        (keys, store.keys()),
        ([value for _, value in pairs], store.values()),
        (keys, store),
    ]:
        assert list(found) == forwards
        assert list(reversed(found)) == forwards[::-1]
        assert len(found) == len(keys)
    for bounds in {"prefix": "m:"}, {"start": "b", "stop": "m:3"}, {"start": "m:2"}:
        some = [pair for pair in pairs if is_within(pair[0], **bounds)]
        assert list(store.items(**bounds)) == some
        assert list(reversed(store.items(**bounds))) == some[::-1]
        assert list(store.keys(**bounds)) == [key for key, _ in some]
        assert len(store.values(**bounds)) == len(some)
    for key in {*START, *keys, "none"}:
        missing = key not in expected
        assert store.get(key, "missing") == expected.get(key, "missing")
        assert (key in store) is not missing
        for flush in None, True, False:
            assert store.exists(key, flush=flush) is not missing
        assert (key in store.keys()) is not missing  # noqa: SIM118
        with pytest.raises(KeyError) if missing else nullcontext():
            assert store[key] == expected[key]
    wanted = [*keys, "none"]
    assert store.get_many(wanted, decode_keys=True) == (expected, ["none"])
    assert bool(store) is bool(expected)
    assert store == expected
    assert f"{len(expected)} entries, 0 pending" in repr(store)


def is_within(key, prefix="", start="", stop="\U0010ffff"):
    return key.startswith(prefix) and start <= key < stop


# What is done in a block, and what it leaves


def change_view(store):
    """Use a view after a change that it must show."""
    view = store.keys("m:")
    store["m:0"] = 0
    assert list(view) == ["m:0", "m:1", "m:2", "m:3"]


def edit(store):
    with store.edit("b") as value:
        value.append(3)


def edit_twice(store):
    edit(store)
    edit(store)


def edit_default(store):
    with store.edit("new", {}) as value:
        value["key"] = 1


def nest(store):
    with store.transaction():
        store["a"] += 1


def delete_and_put(store):
    del store["a"]
    assert "a" not in store
    store["a"] = 2


def iterate_and_change(store):
    for key in store:
        store[key] = key


def count_deleted(store):
    return store.delete_many(["a", "b", "none"])


def pop_missing(store):
    with pytest.raises(KeyError):
        store.pop("none")
    with pytest.raises(KeyError):
        del store["none"]
    return store.pop("none", "default")


def pop_all(store):
    return [store.popitem() for _ in list(store)]


def popitem_of_nothing(store):
    store.clear()
    with pytest.raises(KeyError):
        store.popitem()


def without(*keys):
    return {key: value for key, value in START.items() if key not in keys}


# By name: the operation, what is there after it, and what it returns.
OPERATIONS = {
    "put": (lambda store: store.put("new", 9), {**START, "new": 9}, None),
    "put over": (lambda store: store.put("a", [2]), {**START, "a": [2]}, None),
    "[]": (lambda store: operator.setitem(store, "m:", 0), {**START, "m:": 0}, None),
    "put_many": (
        lambda store: store.put_many({"a": 5, "y": 6}),
        {**START, "a": 5, "y": 6},
        None,
    ),
    "put_many pairs": (
        lambda store: store.put_many([("a", 5), ("a", 6)]),
        {**START, "a": 6},
        None,
    ),
    "update": (lambda store: store.update(a=5, y=6), {**START, "a": 5, "y": 6}, None),
    "|=": (
        lambda store: operator.ior(store, {"a": 5}) and None,
        {**START, "a": 5},
        None,
    ),
    "delete": (lambda store: store.delete("a"), without("a"), None),
    "delete missing": (lambda store: store.delete("none"), START, None),
    "del": (lambda store: operator.delitem(store, "m:2"), without("m:2"), None),
    "delete_many": (count_deleted, without("a", "b"), 2),
    "delete_many of a range": (
        lambda store: store.delete_many(store.keys("m:")),
        without("m:1", "m:2", "m:3"),
        3,
    ),
    "delete_many from": (
        lambda store: store.delete_many(store.keys(start="m:2")),
        without("m:2", "m:3", "z"),
        3,
    ),
    "delete_many of all": (lambda store: store.delete_many(store.keys()), {}, 7),
    "clear": (lambda store: store.clear(), {}, None),
    "clear and put": (
        lambda store: store.clear() or store.put("a", 5) or store.put("q", 6),
        {"a": 5, "q": 6},
        None,
    ),
    "pop": (lambda store: store.pop("b"), without("b"), [2]),
    "pop missing": (pop_missing, START, "default"),
    "popitem": (lambda store: store.popitem(), without("z"), ("z", None)),
    "popitem put": (
        lambda store: store.put("zz", 1) or store.popitem(),
        START,
        ("zz", 1),
    ),
    "popitem until empty": (pop_all, {}, sorted(START.items(), reverse=True)),
    "popitem of nothing": (popitem_of_nothing, {}, None),
    "setdefault": (
        lambda store: store.setdefault("new", [1]),
        {**START, "new": [1]},
        [1],
    ),
    "setdefault stored": (lambda store: store.setdefault("a", 5), START, 1),
    "edit": (edit, {**START, "b": [2, 3]}, None),
    "edit twice": (edit_twice, {**START, "b": [2, 3, 3]}, None),
    "edit a default": (edit_default, {**START, "new": {"key": 1}}, None),
    "nest": (nest, {**START, "a": 2}, None),
    "delete and put": (delete_and_put, {**START, "a": 2}, None),
    "put and delete": (
        lambda store: store.put("new", 1) or operator.delitem(store, "new"),
        START,
        None,
    ),
    "iterate and change": (iterate_and_change, {key: key for key in START}, None),
    "change under a view": (change_view, {**START, "m:0": 0}, None),
    "flush": (
        lambda store: store.put("a", 5) or store.flush(),
        {**START, "a": 5},
        None,
    ),
    "large": (lambda store: store.put("l", LARGE), {**START, "l": LARGE}, None),
}
EACH_OPERATION = pytest.mark.parametrize(
    ("operation", "after", "result"), OPERATIONS.values(), ids=OPERATIONS
)

EXCEPTIONS = pytest.mark.parametrize(
    "exception",
    [
        Abort,
        KeyboardInterrupt,
        SystemExit,
        GeneratorExit,
        StopIteration,
        asyncio.CancelledError,
    ],
)


@EACH_OPERATION
def test_an_operation_is_seen_inside_and_undone_or_committed(
    store, operation, after, result
):
    def block():
        with store.transaction() as yielded:
            assert yielded is store
            assert operation(store) == result
            assert_is(store, after)
            assert on_disk(store) == START
            yield

    generator = block()
    next(generator)
    with suppress(Abort):
        generator.throw(Abort())
    assert_is(store, START)
    assert on_disk(store) == START
    assert not list(block())[1:]
    assert on_disk(store) == after
    assert_is(store, after)


@EACH_OPERATION
def test_an_exception_in_a_nested_block_undoes_the_nested_one(
    store, operation, after, result
):
    with store.transaction():
        store.put_many({"a": 100, "b": ["outer"], "zzz": 0})
        del store["c"]
        before = dict(store)
        with suppress(Abort), store.transaction():
            operation(store)
            raise Abort
        assert_is(store, before)
    assert_is(store, before)
    assert on_disk(store) == before


def change_and_raise(store, manager, error):
    with manager:
        store["a"] = 6
        store.delete_many(["b", "c"])
        raise error


@EXCEPTIONS
def test_every_exception_undoes_a_block(store, exception):
    error = exception("why")
    with pytest.raises(exception) as caught:
        change_and_raise(store, store.transaction(), error)
    assert caught.value is error
    assert_is(store, START)


@EXCEPTIONS
@pytest.mark.parametrize("begin", ["transaction", "edit"])
def test_an_exception_undoes_a_nested_block_or_a_generators_end_all(
    store, exception, begin
):
    def block():
        with store.transaction():
            store["a"] = 5
            manager = store.transaction() if begin == "transaction" else store.edit("b")
            with pytest.raises(exception):
                change_and_raise(store, manager, exception)
            assert_is(store, {**START, "a": 5})

    if exception is GeneratorExit:  # nobody can tell what the generator has written
        with pytest.raises(ClosedError):
            block()
        assert_is(store, START)
    else:
        block()
        assert_is(store, {**START, "a": 5})


@EXCEPTIONS
def test_every_exception_undoes_an_edit(store, exception):
    with pytest.raises(exception):
        change_and_raise(store, store.edit("b"), exception)
    assert_is(store, START)


def test_an_operation_that_raises_does_not_undo_the_block(store):
    with store.transaction():
        store["a"] = 5
        with pytest.raises(TypeError):
            store.put_many([("b", 6), (None, 7)])
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            store["c"] = lambda: None
        assert_is(store, {**START, "a": 5})
    assert_is(store, {**START, "a": 5})


@pytest.mark.parametrize("leave", ["return", "break", "continue"])
def test_a_jump_out_of_the_block_commits(store, leave):
    def jump():
        for _ in range(1):
            with store.transaction():
                store["a"] = 5
                if leave == "return":
                    return
                if leave == "break":
                    break
                continue

    jump()
    assert_is(store, {**START, "a": 5})


@pytest.mark.parametrize("sizes", [(0, 100), (0, 40_000), (100_000, 400_000)])
@ENGINES
def test_reads_merge_many_changes_of_all_sizes(open_store, lib_version, sizes):
    chance = random.Random(sum(sizes))
    store = open_store(key_encoding="utf-8", lib_version=lib_version, sync=False)
    numbers = range(30 if sizes[0] else 1500 if sizes[1] == 100 else 300)
    names = [f"{chance.choice('am')}{number:04}" for number in numbers]

    def value():
        return chance.randbytes(chance.randint(*sizes))

    expected = {key: value() for key in chance.sample(names, len(names) // 2)}
    store.put_many(expected)
    with store.transaction():
        for key in chance.sample(names, len(names) // 2):
            if chance.random() < 0.4:
                store.delete(key)
                expected.pop(key, None)
            else:
                store[key] = expected[key] = value()
        pairs = sorted(expected.items())
        assert list(store.items()) == pairs
        assert list(reversed(store.items())) == pairs[::-1]
        assert list(store.keys("m")) == [key for key, _ in pairs if key > "m"]
        assert len(store) == len(pairs)
        assert len(store.keys("m")) == sum(key > "m" for key in expected)
        assert store.get_many(names, decode_keys=True)[0] == expected
        assert all(store.get(key) == expected.get(key) for key in names)
    assert on_disk(store) == expected


# What was pending before, and what reaches the disk when


def test_what_is_pending_is_flushed_first_and_stays(store):
    store.batch_size = 100
    store["a"] = 5
    store.delete("b")
    with suppress(Abort), store.transaction():
        assert not store.write_buffer
        assert on_disk(store) == {**without("b"), "a": 5}
        store["a"] = 6
        raise Abort
    assert on_disk(store) == {**without("b"), "a": 5}


def test_a_block_is_one_transaction_whatever_is_flushed_in_it(store):
    store.batch_size = 2
    before = store.env.info()["last_txnid"]
    with store.transaction():
        for number in range(10):
            store[f"{number}"] = number
            store.flush()
            assert store.exists("a", flush=True)
        store.put_many({"many": 1})
        assert store.env.info()["last_txnid"] == before
        assert not store.write_buffer
    assert store.env.info()["last_txnid"] == before + 1


def test_a_block_that_changes_nothing_writes_nothing(store):
    before = store.env.info()["last_txnid"]
    with store.transaction():
        assert store["a"] == 1
    assert store.env.info()["last_txnid"] == before


def test_puts_are_buffered_again_after_a_block(store):
    with store.transaction():
        store["a"] = 5
    store["b"] = 6
    assert store.write_buffer.keys() == {b"b"}


def test_a_value_is_pickled_when_it_is_put(store):
    value = [1]
    with store.transaction():
        store["b"] = value
        value.append(2)
        assert store["b"] == [1]
    assert store["b"] == [1]


# At the beginning


@pytest.mark.parametrize("begin", ["transaction", "edit"])
def test_a_closed_store_raises_at_entry(store, begin):
    manager = store.transaction() if begin == "transaction" else store.edit("b")
    store.close()
    with pytest.raises(ClosedError, match="closed"), manager:
        pytest.fail("the block ran")


@pytest.mark.parametrize("begin", ["transaction", "edit"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_read_only_store_has_no_blocks(store, open_store, begin, shared):
    if not shared:
        store.close()
    reader = open_store(key_encoding="utf-8", readonly=True)
    with pytest.raises(ReadOnlyError, match="read-only"):
        reader.transaction() if begin == "transaction" else reader.edit("b")
    assert_is(reader, START)


def test_another_task_can_not_enter_what_was_made_before(store):
    manager = store.transaction()

    async def other():
        with pytest.raises(BusyError, match="another asyncio task"), manager:
            pytest.fail("the block ran")

    async def main():
        with store.transaction():
            store["a"] = 5
            await asyncio.create_task(other())

    asyncio.run(main())
    assert_is(store, {**START, "a": 5})


def test_what_is_pending_and_has_no_room_raises_at_entry(open_store):
    store = open_store(map_size=SMALL_MAP, max_map_size=SMALL_MAP, sync=False)
    for number in range(SMALL_MAP // 1000 + 1):
        store.put(b"%d" % number, bytes(1000))
    pending = store.write_buffer
    with pytest.raises(GrowthError), store.transaction():
        pytest.fail("the block ran")
    assert store.write_buffer == pending
    store.max_map_size = MIB
    with store.transaction():
        store[b"a"] = 1
    assert store.env.stat()["entries"] == len(pending) + 1


GROW_ELSEWHERE = """
with LmdbObjectStore(path, lib_version=lib_version, map_size=65536) as store:
    store.put_many((b"%d" % n, bytes(2**20)) for n in range(80))
"""


@pytest.fixture
def elsewhere():
    """Run a script in another process, to its end."""

    def elsewhere(store, script, lib_version=0):
        head = "from lmdb_object_store import LmdbObjectStore\nimport sys\n"
        head += "path, lib_version = sys.argv[1], int(sys.argv[2])\n"
        command = [sys.executable, "-c", head + script, store.db_path, lib_version]
        subprocess.run(list(map(str, command)), check=True, timeout=PATIENCE)

    return elsewhere


@ENGINES
def test_a_map_grown_by_another_process_is_adopted(open_store, elsewhere, lib_version):
    store = open_store(map_size=SMALL_MAP, lib_version=lib_version)
    store.put_many({b"own": 1})
    elsewhere(store, GROW_ELSEWHERE, lib_version)
    with store.transaction():
        store[b"own"] += len(store)
    assert store[b"own"] == 82


# Other threads


def everything(store):
    """Every kind of read."""
    assert_is(store, dict(store))
    with store.snapshot() as snapshot:
        assert dict(snapshot) == dict(store)
    return dict(store)


@pytest.mark.parametrize("autoflush", [True, False])
def test_other_threads_read_the_state_before_and_do_not_wait(
    store, in_thread, autoflush
):
    store.autoflush_on_read = autoflush
    with store.transaction():
        store["a"] = 5
        del store["b"]
        store["new"] = LARGE
        assert in_thread(lambda: everything_but_flushing(store)).result() == START
        with suppress(Abort), store.transaction():
            store.clear()
            assert in_thread(lambda: everything_but_flushing(store)).result() == START
            raise Abort
    assert in_thread(lambda: dict(store)).result() == {
        **without("b"),
        "a": 5,
        "new": LARGE,
    }


def everything_but_flushing(store):
    """Every kind of read that doesn't ask for a flush."""
    found, missing = store.get_many([*START, "new"], decode_keys=True)
    assert missing == ["new"]
    assert found == {key: store[key] for key in START}
    assert list(reversed(store.items())) == list(store.items())[::-1]
    assert len(store) == len(store.keys()) == len(found)
    assert store
    assert store.exists("b")
    assert "new" not in store
    assert "7 entries" in repr(store)
    with store.snapshot() as snapshot:
        assert dict(snapshot) == found
    return dict(store)


def add_one(store):
    with store.transaction():
        store["a"] += 1


def edit_other(store):
    with store.edit("b") as value:
        value.append("other")


def delete_item(store):
    del store["a"]


BLOCK = {**without("c"), "a": 5, "b": [6]}  # what the block leaves, before ...

WAITING = {
    "put": (lambda store: store.put("a", 7), {**BLOCK, "a": 7}, None),
    "put_many": (lambda store: store.put_many({"c": 7}), {**BLOCK, "c": 7}, None),
    "update": (lambda store: store.update(c=7), {**BLOCK, "c": 7}, None),
    "delete": (
        lambda store: store.delete("b"),
        {key: BLOCK[key] for key in BLOCK if key != "b"},
        None,
    ),
    "del": (delete_item, {key: BLOCK[key] for key in BLOCK if key != "a"}, None),
    "pop": (
        lambda store: store.pop("a"),
        {key: BLOCK[key] for key in BLOCK if key != "a"},
        5,
    ),
    "popitem": (
        lambda store: store.popitem(),
        {key: BLOCK[key] for key in BLOCK if key != "z"},
        ("z", None),
    ),
    "setdefault": (lambda store: store.setdefault("q", 7), {**BLOCK, "q": 7}, 7),
    "delete_many": (
        lambda store: store.delete_many(["a", "c"]),
        {key: BLOCK[key] for key in BLOCK if key != "a"},
        1,
    ),
    "delete_many of a range": (
        lambda store: store.delete_many(store.keys("m:")),
        {key: BLOCK[key] for key in BLOCK if not key.startswith("m:")},
        3,
    ),
    "clear": (lambda store: store.clear(), {}, None),
    "flush": (lambda store: store.flush(), BLOCK, None),
    "exists, flushed": (lambda store: store.exists("c", flush=True), BLOCK, False),
    "transaction": (add_one, {**BLOCK, "a": 6}, None),
    "edit": (edit_other, {**BLOCK, "b": [6, "other"]}, None),
}


@pytest.mark.parametrize(
    ("write", "after", "result"), WAITING.values(), ids=WAITING.keys()
)
def test_writes_of_other_threads_wait_for_the_end(
    store, in_thread, write, after, result
):
    with store.transaction():
        store["a"] = 5
        writer = in_thread(lambda: write(store))
        writer.wait_until_in(WAITS_FOR_BLOCK)
        store["b"] = [6]
        del store["c"]
        assert_is(store, BLOCK)
        assert writer.running
    assert writer.result() == result
    assert dict(store) == after


def test_writes_of_other_threads_go_on_after_an_undone_block(store, in_thread):
    with suppress(Abort), store.transaction():
        store["a"] = 5
        writers = [in_thread(lambda: add_one(store)) for _ in range(3)]
        writers[0].wait_until_in(WAITS_FOR_BLOCK)
        raise Abort
    for writer in writers:
        writer.result()
    assert store["a"] == 4


def test_a_full_buffer_waits_for_the_end(store, in_thread):
    store.batch_size = 1
    with store.transaction():
        store["a"] = 5
        writer = in_thread(lambda: store.put("b", 7))
        writer.wait_until_in(WAITS_FOR_BLOCK)
    writer.result()
    assert on_disk(store) == {**START, "a": 5, "b": 7}


def test_close_in_another_thread_waits_for_the_end(store, in_thread, open_store):
    with store.transaction():
        store["a"] = 5
        closer = in_thread(store.close)
        closer.wait_until_in(WAITS_FOR_BLOCK)
        store["b"] = 6
        assert store["b"] == 6
        assert not store.closed
    closer.result()
    assert store.closed
    assert_is(open_store(key_encoding="utf-8"), {**START, "a": 5, "b": 6})


def test_a_thread_that_waits_for_one_block_may_wait_for_another(store, in_thread):
    entered, leave = threading.Event(), threading.Event()

    def second():
        with store.transaction():
            store["a"] += 1
            entered.set()
            assert leave.wait(PATIENCE)

    with store.transaction():
        store["a"] += 1
        block = in_thread(second)
        block.wait_until_in(WAITS_FOR_BLOCK)
    assert entered.wait(PATIENCE)
    writer = in_thread(lambda: store.put("b", 7))
    writer.wait_until_in(WAITS_FOR_BLOCK)
    assert store["a"] == 2
    leave.set()
    block.result()
    writer.result()
    assert dict(store) == {**START, "a": 3, "b": 7}


def test_a_block_ends_though_another_thread_unpickles(store, in_thread):
    started, go_on = threading.Event(), threading.Event()
    Slow.pause = lambda: started.set() or go_on.wait(PATIENCE)
    store.put_many({"slow": Slow()})
    reader = in_thread(lambda: store["slow"])
    assert started.wait(PATIENCE)
    add_one(store)
    assert reader.running
    go_on.set()
    reader.result()


class Slow:
    """Unpickling it calls `pause`."""

    pause = None

    def __reduce__(self):
        return Slow.load, ()

    @staticmethod
    def load():
        Slow.pause()


# Other processes

SERVE = """
import sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore(
    sys.argv[1], key_encoding="utf-8", lib_version=int(sys.argv[2]), sync=False
)
block = store.transaction()
def add(key, number):
    with store.transaction():
        store[key] = store.get(key, 0) + number
for line in sys.stdin:
    print("begun", flush=True)
    print(repr(eval(line)), flush=True)
store.close()
"""


class Process:
    """Another process, which evaluates expressions with a store of its own."""

    def __init__(self, path, lib_version):
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, path, str(int(lib_version))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, expression):
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        assert self._line() == "begun"

    def result(self):
        return eval(self._line())

    def ask(self, expression):
        self.begin(expression)
        return self.result()

    def _line(self):
        return Worker(self._process.stdout.readline).result().rstrip("\n")

    def end(self):
        try:
            self._process.stdin.close()
            assert self._process.wait(PATIENCE) == 0
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@pytest.fixture
def process_of():
    """Start processes; they end after the test."""
    processes = []

    def start(store):
        processes.append(Process(store.db_path, store.env.lib_version() >= (1,)))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


@pytest.fixture
def process(store, process_of):
    return process_of(store)


def test_another_process_reads_the_state_before(store, process):
    with store.transaction():
        store["a"] = 5
        store["b"] = LARGE
        assert process.ask("dict(store)") == START
        assert process.ask("store['a'], len(store), 'q' in store") == (1, 7, False)
    assert process.ask("store['a']") == 5


@pytest.mark.skipif(os.name == "nt", reason="needs a pipe that holds up a copy")
def test_a_rollback_waits_for_no_copy_of_the_environment(store, in_thread):
    store["large"] = bytes(MIB)
    store.flush()
    reading, writing = os.pipe()
    copying = in_thread(lambda: store.env.copyfd(writing))
    os.read(reading, 1)  # it has begun

    def undone():
        with suppress(Abort), store.transaction():
            store["large"] = 0
            raise Abort

    in_thread(undone).result()
    assert copying.running
    draining = in_thread(
        lambda: [None for _ in iter(lambda: os.read(reading, MIB), b"")]
    )
    copying.result()
    os.close(writing)
    draining.result()
    os.close(reading)
    assert store["large"] == bytes(MIB)


@pytest.mark.parametrize("undone", [False, True], ids=["committed", "undone"])
def test_another_process_waits_for_the_end_to_write(store, process, undone):
    process.ask("len(store)")
    with suppress(Abort), store.transaction():
        seen = store["a"]
        process.begin("add('a', 1)")
        assert store["a"] == seen
        store["a"] = seen + 10
        if undone:
            raise Abort
    process.result()
    assert store["a"] == (2 if undone else 12)


def test_a_block_waits_for_the_block_of_another_process(store, process, in_thread):
    process.ask("block.__enter__() and None")
    process.ask("store.put('a', 10)")
    writer = in_thread(lambda: add_one(store))
    writer.wait_until_in(WAITS_FOR_LMDB)
    assert store["a"] == 1
    process.ask("block.__exit__(None, None, None)")
    writer.result()
    assert store["a"] == 11


# Nested blocks


def test_nested_blocks_join_the_outer_one(store):
    before = store.env.info()["last_txnid"]
    with store.transaction():
        store["a"] = 5
        with store.transaction() as inner:
            assert inner is store
            store["a"] += 1
            with store.transaction():
                store["a"] += 1
            assert store["a"] == 7
        assert on_disk(store) == START
    assert on_disk(store) == {**START, "a": 7}
    assert store.env.info()["last_txnid"] == before + 1


def test_an_outer_exception_undoes_what_nested_blocks_have_done(store):
    with suppress(Abort), store.transaction():
        with store.transaction():
            store["a"] = 5
        with store.edit("b") as value:
            value.append(3)
        raise Abort
    assert_is(store, START)


def test_a_middle_block_undoes_what_it_and_its_inner_one_did(store):
    with store.transaction():
        store["a"] = "outer"
        with suppress(Abort), store.transaction():
            store["a"] = "middle"
            store["b"] = "middle"
            with store.transaction():
                store["a"] = "inner"
                del store["c"]
            with suppress(Abort), store.transaction():
                store["z"] = "inner"
                raise Abort
            assert_is(
                store, {**without("c"), "a": "inner", "b": "middle"}
            )  # but not "z"
            raise Abort
        assert_is(store, {**START, "a": "outer"})
    assert_is(store, {**START, "a": "outer"})


def test_an_exception_out_of_all_blocks_undoes_all(store):
    with suppress(Abort), store.transaction():
        store["a"] = 5
        with store.transaction(), store.edit("b") as value:
            value.append(3)
            raise Abort
    assert_is(store, START)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("read_inside", [False, True])
def test_an_iterator_of_the_outer_block_across_an_undo(store, reverse, read_inside):
    numbers = [f"n{number:03}" for number in range(200)]
    store.put_many(dict.fromkeys(numbers[::4], "stored"))
    with store.transaction():
        store.put_many(dict.fromkeys(numbers[::3], "outer"))
        store.delete_many(numbers[::20])
        expected = sorted(store.items("n"), reverse=reverse)
        view = store.items("n")
        iterator = reversed(view) if reverse else iter(view)
        found = [next(iterator)]
        with suppress(Abort), store.transaction():
            store.put_many(dict.fromkeys(numbers[1::2], "inner"))
            store.delete_many(store.keys("n1"))
            if read_inside:
                found += [next(iterator) for _ in range(7)]  # a chunk's rest
            raise Abort
        found += iterator
        assert found == expected


def test_an_iterator_of_an_inner_block_that_is_undone_goes_on_in_the_outer(store):
    store.put_many({f"n{number:03}": 0 for number in range(0, 100, 2)})
    with store.transaction():
        store["n001"] = "outer"
        with suppress(Abort), store.transaction():
            store.put_many({f"n{number:03}": "inner" for number in range(51, 100, 2)})
            iterator = iter(store.keys("n"))
            assert next(iterator) == "n000"
            raise Abort
        assert list(iterator) == ["n001", *(f"n{n:03}" for n in range(2, 100, 2))]


def test_a_suspended_nested_block_ends_with_the_outer_one(store):
    def generate():
        with store.transaction():
            store["a"] = "generator"
            yield

    generator = generate()
    with suppress(Abort), store.transaction():
        next(generator)
        assert store["a"] == "generator"
        raise Abort
    assert_is(store, START)
    with pytest.raises(ClosedError, match=r"transaction block .* is closed"):
        next(generator)
    assert_is(store, START)
    store["a"] = 5
    assert store["a"] == 5


def test_a_block_that_ends_before_a_nested_one_raises_and_writes_nothing(store):
    kept = []
    with pytest.raises(BusyError, match="nested"), store.transaction():
        suspended(store, kept)
    assert_is(store, START)
    close_generator(kept)
    assert_is(store, START)


def test_a_block_around_a_suspended_one_takes_it_along(store):
    def generate():
        with store.transaction():
            store["b"] = "generator"
            yield

    generator = generate()
    with store.transaction():
        store["a"] = 5
        with suppress(Abort), store.transaction():
            next(generator)
            store["c"] = "later"
            raise Abort
        assert_is(store, {**START, "a": 5})
        generator.close()
        assert_is(store, {**START, "a": 5})
    assert_is(store, {**START, "a": 5})


# What can't be done inside


def test_snapshot_inside_raises(store):
    with store.transaction():
        store["a"] = 5
        with pytest.raises(BusyError, match="inside a transaction block"):
            store.snapshot().__enter__()
        with store.transaction(), pytest.raises(BusyError), store.snapshot():
            pytest.fail("the block ran")
    assert store["a"] == 5


def test_close_inside_raises(store):
    with store.transaction():
        store["a"] = 5
        with pytest.raises(BusyError, match="inside a transaction block"):
            store.close()
        with pytest.raises(BusyError):
            store.close(strict=True)
        assert not store.closed
        assert store["a"] == 5
    assert_is(store, {**START, "a": 5})


def test_the_stores_own_block_may_end_inside(open_store, in_thread, caplog):
    with (
        open_store() as store,
        pytest.raises(BusyError),
        store.transaction(),
        store,
    ):
        store[b"a"] = 5
    assert store.closed
    assert open_store().get(b"a") is None


@pytest.mark.parametrize("open_inside", [False, True], ids=["before", "inside"])
def test_a_snapshot_is_read_inside_a_block_as_it_was(store, in_thread, open_inside):
    with ExitStack() as stack:
        if open_inside:
            stack.enter_context(store.transaction())
            snapshot = in_thread(lambda: stack.enter_context(store.snapshot())).result()
        else:
            snapshot = stack.enter_context(store.snapshot())
            stack.enter_context(store.transaction())
        store["a"] = 5
        del store["b"]
        assert dict(snapshot) == START
        assert snapshot["a"] == 1
        assert store["a"] == 5


# asyncio


def use_snapshot(store):
    with store.snapshot():
        pass


# Each of these raises in another task.
USES = {
    "get": lambda store: store.get("a"),
    "[]": lambda store: store["a"],
    "in": lambda store: "a" in store,
    "exists": lambda store: store.exists("a"),
    "exists, flushed": lambda store: store.exists("a", flush=True),
    "exists, not flushed": lambda store: store.exists("a", flush=False),
    "len": len,
    "bool": bool,
    "iter": list,
    "reversed": lambda store: list(reversed(store)),
    "keys": lambda store: list(store.keys("m:")),
    "values": lambda store: list(store.values(start="b")),
    "items": lambda store: list(store.items()),
    "reversed items": lambda store: list(reversed(store.items(stop="z"))),
    "len of a range": lambda store: len(store.keys("m:")),
    "in a range": lambda store: "m:1" in store.keys("m:"),
    "get_many": lambda store: store.get_many(["a", "b"]),
    "==": lambda store: store == START,
    "put": lambda store: store.put("a", 7),
    "put_many": lambda store: store.put_many({"a": 7}),
    "put_many of nothing": lambda store: store.put_many({}),
    "update": lambda store: store.update(a=7),
    "delete": lambda store: store.delete("a"),
    "del": delete_item,
    "delete_many": lambda store: store.delete_many(["a"]),
    "delete_many of a range": lambda store: store.delete_many(store.keys()),
    "clear": lambda store: store.clear(),
    "pop": lambda store: store.pop("a"),
    "popitem": lambda store: store.popitem(),
    "setdefault": lambda store: store.setdefault("q", 7),
    "flush": lambda store: store.flush(),
    "transaction": add_one,
    "edit": edit_other,
    "snapshot": use_snapshot,
    "close": lambda store: store.close(),
}
EACH_USE = pytest.mark.parametrize("use", USES.values(), ids=USES)


@EACH_USE
def test_another_task_of_the_thread_is_refused_until_the_end(store, use):
    async def refused():
        with pytest.raises(BusyError, match="another asyncio task"):
            use(store)
        assert "in the midst of something" in repr(store)

    async def main():
        with store.transaction():
            store["a"] = 5
            await asyncio.create_task(refused())
            assert_is(store, {**START, "a": 5})
        await asyncio.create_task(served())

    async def served():
        use(store)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["get", "len", "put", "pop", "flush", "transaction"])
def test_a_callback_of_the_loop_is_refused_until_the_end(store, name):
    async def main():
        loop = asyncio.get_running_loop()

        def call():
            answered = loop.create_future()

            def callback():
                try:
                    USES[name](store)
                except Exception as error:
                    answered.set_result(error)
                else:
                    answered.set_result(None)

            loop.call_soon(callback)
            return answered

        with store.transaction():
            store["a"] = 5
            assert isinstance(await call(), BusyError)
            assert_is(store, {**START, "a": 5})
        assert await call() is None

    asyncio.run(main())


def test_a_task_goes_on_in_its_block_after_it_awaited(store):
    async def main():
        with store.transaction():
            store["a"] = 5
            await asyncio.sleep(0)
            store["b"] = store["a"]
            await asyncio.sleep(0)

    asyncio.run(main())
    assert_is(store, {**START, "a": 5, "b": 5})


def test_a_cancelled_task_undoes_its_block(store):
    async def block(begun):
        with store.transaction():
            store["a"] = 5
            begun.set()
            await asyncio.Event().wait()

    async def main():
        begun = asyncio.Event()
        task = asyncio.create_task(block(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_is(store, START)

    asyncio.run(main())


def test_tasks_that_do_not_await_in_their_blocks_take_turns(store):
    async def add():
        for _ in range(10):
            add_one(store)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(add() for _ in range(5)))

    asyncio.run(main())
    assert store["a"] == 51


def test_a_loop_started_inside_a_block_is_refused(store):
    async def read():
        return store["a"]

    with store.transaction():
        store["a"] = 5
        with pytest.raises(BusyError):
            asyncio.run(read())
    assert asyncio.run(read()) == 5


def test_reads_in_to_thread_do_not_wait_and_writes_do(store):
    async def main():
        with store.transaction():
            store["a"] = 5
            read = partial(everything_but_flushing, store)
            assert await asyncio.to_thread(read) == START
            written = asyncio.create_task(asyncio.to_thread(store.put, "b", 7))
            await asyncio.sleep(0)
            assert await asyncio.to_thread(store.get, "b") == [2]
        await written

    asyncio.run(main())
    assert_is(store, {**START, "a": 5, "b": 7})


def test_an_iterator_of_a_block_is_refused_in_another_task(store):
    async def use(iterator):
        with pytest.raises(BusyError, match="another asyncio task"):
            next(iterator)

    async def main():
        with store.transaction():
            store["a"] = 5
            await asyncio.create_task(use(iter(store.items())))
            assert next(iter(store.items())) == ("a", 5)

    asyncio.run(main())


# Iterators


def make_iterators(store):
    return [
        iter(store),
        reversed(store),
        iter(store.keys("n")),
        iter(store.values("n")),
        iter(store.items("n")),
        reversed(store.items("n")),
    ]


@pytest.fixture
def many(open_store):
    """A store with more entries than fit in one chunk of an iterator."""
    store = open_store(key_encoding="utf-8", sync=False)
    store.put_many({f"n{number:04}": number for number in range(1000)})
    return store


@pytest.mark.parametrize("steps", [0, 1, 8, 100])
def test_iterators_begun_outside_do_not_see_the_block(many, steps):
    expected = list(map(list, make_iterators(many)))
    iterators = make_iterators(many)
    found = [list(islice(iterator, steps)) for iterator in iterators]
    with many.transaction():
        many.put_many({f"n{number:04}x": "block" for number in range(1000)})
        many.delete_many(f"n{number:04}" for number in range(0, 1000, 2))
        for seen, iterator in zip(found, iterators, strict=True):
            seen += islice(iterator, 500)
    assert found == [entries[: steps + 500] for entries in expected]


def test_iterators_begun_outside_go_on_after_the_block(many):
    iterators = make_iterators(many)
    first = list(map(next, iterators))
    with many.transaction():
        many["o"] = 0
        many.delete_many(f"n{number:04}" for number in range(0, 1000, 2))
    rest = list(map(list, iterators))
    fresh = list(map(list, make_iterators(many)))
    assert [entries[-490:] for entries in rest] == [list_[-490:] for list_ in fresh]
    assert not any(map(operator.contains, rest, first))


@pytest.mark.parametrize("steps", [0, 1, 100])
@pytest.mark.parametrize("undone", [False, True], ids=["committed", "undone"])
def test_iterators_begun_inside_end_with_the_block(many, steps, undone):
    with suppress(Abort), many.transaction():
        many["n0000"] = 0
        iterators = make_iterators(many)
        for iterator in iterators:
            assert len(list(islice(iterator, steps))) == steps
        if undone:
            raise Abort
    for iterator in iterators:
        with pytest.raises(ClosedError, match="closed"):
            next(iterator)
    assert len(list(many)) == 1000


def test_iterators_begun_inside_are_refused_in_another_thread(many, in_thread):
    with many.transaction():
        for iterator in make_iterators(many):
            with pytest.raises(BusyError, match="another thread"):
                in_thread(partial(next, iterator)).result()
        many["n0500"] = "block"
        assert many["n0500"] == "block"
    assert many["n0500"] == "block"


def test_an_iterator_sees_what_its_loop_changes(store):
    with store.transaction():
        seen = []
        for key in store:
            seen.append(key)
            if key.startswith("m:"):
                store["n" + key] = 0
                store.delete("z")
        assert seen == ["a", "b", "c", "m:1", "m:2", "m:3", "z"]
        assert "nm:1" in store
        assert "z" not in store


def test_a_view_outlives_the_block(store):
    view = store.items("m:")
    with store.transaction():
        inner = store.keys("m:")
        store["m:4"] = 40
        assert ("m:4", 40) in view
        assert len(view) == 4
    assert list(inner) == [key for key, _ in view] == ["m:1", "m:2", "m:3", "m:4"]


# Blocks that their thread, or this process, leaves


def suspended(store, kept):
    """Begin a block in a generator, and keep that."""

    def generate():
        with store.transaction():
            store["a"] = "generator"
            yield

    generator = generate()
    next(generator)
    kept.append(generator)


def test_a_block_ends_with_its_thread(store, in_thread):
    kept = []
    in_thread(lambda: suspended(store, kept)).result()
    in_thread(lambda: add_one(store)).result()
    assert_is(store, {**START, "a": 2})
    with pytest.raises((BusyError, ClosedError)):
        next(kept[0])
    assert_is(store, {**START, "a": 2})


def test_the_generator_of_a_thread_that_has_ended_may_be_closed(store, in_thread):
    kept = []
    in_thread(lambda: suspended(store, kept)).result()
    kept.pop().close()
    add_one(store)
    assert_is(store, {**START, "a": 2})


def test_writers_wait_for_the_end_of_a_thread(store, in_thread):
    kept, begun, leave = [], threading.Event(), threading.Event()

    def run():
        suspended(store, kept)
        begun.set()
        assert leave.wait(PATIENCE)

    runner = in_thread(run)
    assert begun.wait(PATIENCE)
    writer = in_thread(lambda: add_one(store))
    writer.wait_until_in(WAITS_FOR_BLOCK)
    leave.set()
    runner.result()
    writer.result()
    assert_is(store, {**START, "a": 2})


class Owner:
    """A thread that begins blocks, and then does what it is told."""

    def __init__(self, store):
        self._store = store
        self.kept = []
        self._begun, self._told = threading.Event(), threading.Event()
        self._worker = Worker(self._run)
        assert self._begun.wait(PATIENCE)

    def _run(self):
        suspended(self._store, self.kept)
        self._begun.set()
        assert self._told.wait(PATIENCE)
        return self._action()

    def do(self, action):
        self._action = action
        self._told.set()
        return self._worker.result()


def close_generator(kept):
    kept.pop().close()


def throw_into_generator(kept):
    with pytest.raises(Abort):
        kept.pop().throw(Abort())


def drop_generator(kept):
    kept.clear()


def collect_generator(kept):
    kept.append(kept)
    del kept[:][:]
    kept.clear()
    gc.collect()


@pytest.mark.parametrize(
    "leave",
    [close_generator, throw_into_generator, drop_generator, collect_generator],
)
@pytest.mark.parametrize("then", ["write", "read", "end"])
def test_a_block_left_in_another_thread(store, in_thread, leave, then):
    owner = Owner(store)
    try:
        leave(owner.kept)
        assert in_thread(lambda: dict(store)).result() == START
        for write in add_one, lambda store: store.put("q", 1), LmdbObjectStore.flush:
            with pytest.raises(BusyError, match="another thread"):
                in_thread(partial(write, store)).result()
    finally:
        actions = {
            "write": lambda: add_one(store),
            "read": lambda: store["a"],
            "end": lambda: None,
        }
        owner.do(actions[then])
    add_one(store)
    assert_is(store, {**START, "a": 3 if then == "write" else 2})


def test_leaving_normally_in_another_thread_raises(store, in_thread):
    owner = Owner(store)
    try:
        with pytest.raises(ClosedError, match="another thread"):
            next(owner.kept[0])
    finally:
        owner.do(lambda: None)
    assert_is(store, START)


def test_a_block_whose_nested_one_ends_in_another_thread_is_written_or_raises(
    store, in_thread
):
    kept = []
    try:
        with store.transaction():
            store["b"] = "outer"
            suspended(store, kept)
            in_thread(lambda: close_generator(kept)).result()
    except ClosedError:
        expected = START
    else:
        expected = {**START, "b": "outer"}
    assert_is(store, expected)


def test_a_writer_that_waits_when_the_block_is_left_elsewhere_is_told(store, in_thread):
    owner = Owner(store)
    try:
        writer = in_thread(lambda: add_one(store))
        writer.wait_until_in(WAITS_FOR_BLOCK)
        close_generator(owner.kept)
        with pytest.raises(BusyError, match="another thread"):
            writer.result()
    finally:
        owner.do(lambda: None)
    add_one(store)
    assert_is(store, {**START, "a": 2})


@pytest.fixture
def run(tmp_path):
    """Run a script in `tmp_path`, by an interpreter of its own; return what it says."""

    def run(script, *arguments):
        (tmp_path / "script.py").write_text(script, "utf-8")
        result = subprocess.run(
            [sys.executable, "script.py", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


FORK = """
import os, sys
from lmdb_object_store import ClosedError, LmdbObjectStore

def open_store():
    return LmdbObjectStore(
        "db", key_encoding="utf-8", lib_version=int(sys.argv[1]), map_size=2**16
    )

def wait_for(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def refused(action):
    try:
        action()
    except ClosedError as error:
        return "parent process" in str(error)

store = open_store()
store.put_many({"a": 1, "large": bytes(10000)})
pid = None
try:
    with store.transaction():
        store["a"] = 5
        iterator = iter(store)
        pid = os.fork()
        if pid:
            wait_for(pid)
            assert store["a"] == 5
            assert next(iterator) == "a"
            store["b"] = bytes(100000)  # it has to grow
        else:
            inside()
except Exception as error:
    if pid != 0:
        raise
    after(error)
    sys.exit()
if pid == 0:
    after(None)
    sys.exit()
assert store["a"] == 5 and len(store) == 3
store["c"] = 1
store.close(strict=True)
with open_store() as store:
    assert len(store) == 4 and store["b"] == bytes(100000)
"""

IN_CHILD = {
    "normally": """
def inside():
    pass
def after(error):
    assert isinstance(error, ClosedError), repr(error)
    assert "parent" in str(error), error
    assert store["a"] == 1
""",
    "by an exception": """
def inside():
    raise ZeroDivisionError
def after(error):
    assert isinstance(error, ZeroDivisionError), repr(error)
    assert store["a"] == 1
    store["a"] = 7  # never written, as the process ends at once
    os._exit(0)
""",
    "at its exit": """
def inside():
    sys.exit()
""",
    "at once": """
def inside():
    os._exit(0)
""",
    "using the store": """
def inside():
    for action in (
        lambda: store["a"], lambda: store.put("a", 6), store.flush, lambda: len(store),
        lambda: store.put_many({"a": 6}), lambda: store.transaction().__enter__(),
        lambda: list(store), lambda: next(iterator), store.clear, store.close,
        lambda: store.edit("new", []).__enter__(), store.snapshot().__enter__,
        lambda: open_store().get("a"), lambda: "a" in store,
    ):
        assert refused(action)
    os._exit(0)
""",
}


@pytest.mark.one_in(4)
@needs_fork
@ENGINES
@pytest.mark.parametrize("how", IN_CHILD)
def test_a_child_forked_inside_leaves_the_block_to_the_parent(run, how, lib_version):
    run(IN_CHILD[how] + FORK, lib_version)


OTHERS = """
import threading

def inside():
    with LmdbObjectStore("other") as other:
        with other.transaction():
            other[b"a"] = 1
        assert other[b"a"] == 1

    def read_in_thread():
        found.append(store["a"])
        store["b"] = 5
        found.append(store["b"])

    found = []
    thread = threading.Thread(target=read_in_thread)
    thread.start()
    thread.join()
    assert found == [1, 5]
    os._exit(0)
"""


@needs_fork
@ENGINES
def test_a_child_forked_inside_can_use_other_stores_and_other_threads(run, lib_version):
    run(OTHERS + FORK, lib_version)


# Context managers


def test_an_exit_stack_commits(store):
    with ExitStack() as stack:
        assert stack.enter_context(store.transaction()) is store
        store["a"] = 5
        stack.enter_context(store.edit("b")).append(3)
        assert on_disk(store) == START
    assert on_disk(store) == {**START, "a": 5, "b": [2, 3]}


def test_an_exit_stack_undoes(store):
    with suppress(Abort), ExitStack() as stack:
        stack.enter_context(store.transaction())
        store["a"] = 5
        stack.enter_context(store.edit("b")).append(3)
        raise Abort
    assert_is(store, START)


def test_an_exit_stack_may_be_closed_later(store):
    with ExitStack() as stack:
        stack.enter_context(store.transaction())
        store["a"] = 5
        later = stack.pop_all()
    assert on_disk(store) == START
    later.close()
    assert on_disk(store) == {**START, "a": 5}


def test_a_context_manager_of_ones_own(store):
    @contextmanager
    def counted():
        with store.transaction():
            yield
            store["a"] += 1

    with counted():
        store["b"] = 5
    with suppress(Abort), counted():
        store["b"] = 6
        raise Abort
    assert_is(store, {**START, "a": 2, "b": 5})


@pytest.mark.parametrize("begin", ["transaction", "edit"])
def test_a_context_manager_works_once(store, begin):
    manager = store.transaction() if begin == "transaction" else store.edit("b")
    with manager:
        store["a"] = 5
        with pytest.raises(RuntimeError, match="again for each `with`"), manager:
            pytest.fail("the block ran")
        assert store["a"] == 5
    assert store["a"] == 5
    with pytest.raises(RuntimeError, match="again for each `with`"), manager:
        pytest.fail("the block ran")
    add_one(store)
    assert store["a"] == 6


def test_a_context_manager_that_is_not_used_does_nothing(store, in_thread):
    manager = store.transaction()
    edited = store.edit("b")
    in_thread(lambda: add_one(store)).result()
    del manager, edited
    assert_is(store, {**START, "a": 2})


def test_looking_at_a_context_manager_does_not_end_its_block(store):
    manager = store.transaction()
    with manager:
        store["a"] = 5
        assert hasattr(manager, "__exit__")
        assert store["a"] == 5
    assert store["a"] == 5


# Growth


@pytest.fixture
def growths(caplog):
    """Return how often the map has grown."""
    caplog.set_level(logging.INFO, "lmdb_object_store")
    return lambda: sum("grown from" in line.getMessage() for line in caplog.records)


@ENGINES
def test_a_block_too_large_for_the_map_grows_it_once(open_store, growths, lib_version):
    store = open_store(map_size=SMALL_MAP, lib_version=lib_version, sync=False)
    store.put_many({b"stored": 0, b"deleted": 1})
    before = store.env.info()["last_txnid"]
    runs = 0
    with store.transaction():
        runs += 1
        for number in range(3000):
            store[b"%d" % number] = bytes(1000)
        store.put(b"large", bytes(MIB))
        store[b"stored"] += 1
        del store[b"deleted"]
        assert growths() == 0
    assert (runs, growths()) == (1, 1)
    assert store.env.info()["last_txnid"] == before + 1
    assert len(store) == 3002
    assert store[b"stored"] == 1
    assert store[b"2999"] == bytes(1000)


def test_growth_at_the_end_lets_other_threads_read(open_store, in_thread):
    store = open_store(map_size=SMALL_MAP, sync=False)
    store.put_many({b"a": 1})

    def grow():
        with store.transaction():
            store[b"a"] = bytes(MIB)

    with Parked(in_thread, "set_mapsize", grow) as growing:
        reader = in_thread(lambda: store[b"a"])
        writer = in_thread(lambda: store.put(b"b", 2))
        writer.wait_until_in(WAITS_FOR_WRITER)
        growing.release()
        # The read may have come before the end, or after it.
        assert reader.result() in (1, bytes(MIB))
        writer.result()
    assert dict(store) == {b"a": bytes(MIB), b"b": 2}


@ENGINES
def test_a_block_too_large_for_the_cap_writes_nothing(open_store, lib_version):
    store = open_store(
        map_size=SMALL_MAP,
        max_map_size=2 * SMALL_MAP,
        lib_version=lib_version,
        sync=False,
    )
    store.put_many({b"stored": 0})

    def block():
        with store.transaction():
            for number in range(SMALL_MAP // 250):
                store[b"%d" % number] = bytes(1000)
            store[b"stored"] = 1
            del store[b"0"]

    with pytest.raises(GrowthError, match="max_map_size"):
        block()
    assert dict(store) == {b"stored": 0}
    assert not store.write_buffer
    with store.transaction():
        store[b"stored"] = 2
    assert dict(store) == {b"stored": 2}
    store.max_map_size = None
    with store.transaction():
        store[b"large"] = bytes(MIB)
    assert len(store) == 2


def test_a_value_too_large_for_the_cap_is_refused_inside(open_store):
    store = open_store(map_size=SMALL_MAP, max_map_size=SMALL_MAP)
    with store.transaction():
        store[b"a"] = 1
        with pytest.raises(GrowthError, match="can never fit"):
            store[b"b"] = bytes(SMALL_MAP)
    assert dict(store) == {b"a": 1}


@ENGINES
@pytest.mark.parametrize("size", [10, 300, 1000, 3000, 9000])
def test_blocks_fill_a_capped_store_and_empty_it(open_store, lib_version, size):
    store = open_store(
        map_size=SMALL_MAP,
        max_map_size=8 * SMALL_MAP,
        lib_version=lib_version,
        sync=False,
    )

    def fill():
        for block in count():
            try:
                with store.transaction():
                    for number in range(5):
                        store[b"%06d %d" % (block, number)] = bytes(size)
            except GrowthError:
                return block
        return None

    blocks = fill()
    assert len(store) == 5 * blocks > 0
    for block in range(blocks):
        with store.transaction():
            for number in range(5):
                del store[b"%06d %d" % (block, number)]
    assert len(store) == 0
    with store.transaction():
        store[b"a"] = bytes(size)
    assert dict(store) == {b"a": bytes(size)}


@ENGINES
def test_a_block_may_replace_all_at_the_cap(open_store, lib_version):
    store = open_store(
        map_size=SMALL_MAP,
        max_map_size=16 * SMALL_MAP,
        lib_version=lib_version,
        sync=False,
    )
    entries = 3 * SMALL_MAP // 1000
    for step in range(20):
        with store.transaction():
            store.clear()
            store.put_many((b"%d" % n, [step, bytes(1000)]) for n in range(entries))
        assert {value[0] for value in store.values()} == {step}
    assert len(store) == entries


class ParkedAtEnd(Parked):
    """Stops where it first calls `method` after the body of its block."""

    def __init__(self, in_thread, method, block):
        self._ending = False
        super().__init__(in_thread, method, partial(block, self._end))

    def _end(self):
        self._ending = True

    def _hook(self, frame, event, function):
        if self._ending:
            super()._hook(frame, event, function)


# Not by a store, which would wait for the parked process if that has its turn.
COMMIT_ELSEWHERE = """
import lmdb, pickle
with lmdb.open(path, lib_version=lib_version, map_size=65536) as env:
    with env.begin(write=True) as txn:
        txn.put(b"hits", pickle.dumps(pickle.loads(txn.get(b"hits")) + 1))
"""


@pytest.mark.parametrize("method", ["set_mapsize", "begin"])
@ENGINES
def test_a_commit_of_another_process_while_a_block_grows(
    open_store, in_thread, elsewhere, lib_version, method
):
    store = open_store(map_size=SMALL_MAP, lib_version=lib_version, sync=False)
    store.put_many({b"hits": 0})
    runs = []

    def block(end):
        with store.transaction():
            runs.append(store[b"hits"])
            store[b"hits"] += 10
            for number in range(30):
                store[b"%d" % number] = bytes(100_000)
            end()

    with ParkedAtEnd(in_thread, method, block) as writer:
        # LMDB's lock is free at this moment.
        elsewhere(store, COMMIT_ELSEWHERE, lib_version)
        with pytest.raises(ConflictError, match="run it again"):
            writer.release()
    assert dict(store) == {b"hits": 1}
    block(lambda: None)
    assert runs == [0, 1]
    assert store[b"hits"] == 11
    assert len(store) == 31


@ENGINES
def test_growth_in_another_process_while_a_block_grows(
    open_store, in_thread, elsewhere, lib_version
):
    store = open_store(map_size=SMALL_MAP, lib_version=lib_version, sync=False)
    store.put_many({b"hits": 0})

    def block():
        with store.transaction():
            store[b"hits"] += 10
            store[b"large"] = bytes(MIB)

    with Parked(in_thread, "set_mapsize", block) as writer:
        elsewhere(store, GROW_ELSEWHERE, lib_version)
        with pytest.raises(ConflictError):
            writer.release()
    assert len(store) == 81
    assert store[b"hits"] == 0
    block()
    assert store[b"hits"] == 10


@ENGINES
def test_near_the_cap_a_block_that_fits_is_not_disturbed(
    open_store, process_of, lib_version
):
    store = open_store(
        key_encoding="utf-8",
        map_size=MIB,
        max_map_size=MIB,
        lib_version=lib_version,
        sync=False,
    )
    store.put_many({f"{number}": bytes(4000) for number in range(90)} | {"a": 1})
    process = process_of(store)
    for number in range(10):
        process.ask("len(store)")
        with store.transaction():
            store[f"{number}"] = bytes(4001)
            process.begin("add('a', 1)")
            store["a"] += 1
        process.result()
    assert store["a"] == 21


def test_nobody_writes_between_where_the_other_process_waits(store, process):
    # The growing block gets LMDB's lock back first or fails: it is never overwritten.
    process.ask("len(store)")
    with suppress(ConflictError), store.transaction():
        seen = store["a"]
        process.begin("add('a', 1)")
        store["large"] = bytes(11 * MIB)
        store["a"] = seen + 10
    process.result()
    assert store["a"] == (12 if "large" in store else 2)


def test_the_end_of_a_block_waits_for_a_snapshot(open_store, in_thread):
    store = open_store(map_size=SMALL_MAP, sync=False)
    store.put_many({b"a": 1})

    def grow():
        with store.transaction():
            store[b"a"] = bytes(MIB)

    with store.snapshot() as snapshot:
        growing = in_thread(grow)
        growing.wait_until_in(WAITS_FOR_SNAPSHOTS)
        assert store[b"a"] == snapshot[b"a"] == 1
        assert growing.running
    growing.result()
    assert store[b"a"] == bytes(MIB)


def test_another_process_waits_while_the_end_of_a_block_does(
    open_store, in_thread, process_of
):
    store = open_store(key_encoding="utf-8", sync=False, map_size=10 * MIB)
    store.put_many(START)
    process = process_of(store)
    process.ask("len(store)")

    def grow():
        with store.transaction():
            store["large"] = bytes(11 * MIB)
            store["a"] += 10

    with store.snapshot():
        growing = in_thread(grow)
        growing.wait_until_in(WAITS_FOR_SNAPSHOTS)
        process.begin("add('a', 1)")
        threading.Event().wait(0.2)  # if it didn't wait, that would be enough
        assert store["a"] == 1
    with suppress(ConflictError):
        growing.result()
    process.result()
    assert store["a"] == (12 if "large" in store else 2)


@pytest.mark.parametrize("own", [False, True], ids=["another thread's", "its own"])
def test_a_snapshot_that_stays_open_undoes_a_block_that_has_to_grow(
    open_store, in_thread, own
):
    store = open_store(map_size=SMALL_MAP, sync=False, timeout=PATIENCE if own else 0)
    store.put_many({b"a": 1})
    manager = store.snapshot()
    snapshot = manager.__enter__() if own else in_thread(manager.__enter__).result()
    try:
        with pytest.raises(SnapshotOpenError), store.transaction():
            store[b"a"] = bytes(MIB)
        assert store[b"a"] == snapshot[b"a"] == 1
        with store.transaction():
            store[b"a"] = 2
        assert (store[b"a"], snapshot[b"a"]) == (2, 1)
    finally:
        manager.__exit__(None, None, None)
    with store.transaction():
        store[b"a"] = bytes(MIB)
    assert store[b"a"] == bytes(MIB)


# Edits


class Color(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


@dataclass(frozen=True)
class Frozen:
    value: int


@dataclass
class Data:
    values: list = field(default_factory=list)


class Plain:
    def __init__(self):
        self.values = []

    def __eq__(self, other):
        return vars(self) == vars(other)

    __hash__ = None


class Slotted:
    __slots__ = ("values",)


class ListOfItsOwn(list):
    pass


def a_function():
    pass


IMMUTABLE = [
    7,
    "text",
    b"bytes",
    (1, [2]),
    Point(1, 2),
    None,
    frozenset({1}),
    1.5,
    True,
    1j,
    range(3),
    ...,
    slice(3),
    datetime.datetime(2024, 2, 29),
    datetime.date(2024, 2, 29),
    datetime.timedelta(1),
    decimal.Decimal("1.5"),
    Color.RED,
    Frozen(1),
    uuid.UUID(int=1),
    pathlib.PurePosixPath("path"),
    pathlib.Path("path"),
    a_function,
    len,
    Plain,
]


@pytest.mark.parametrize("value", IMMUTABLE, ids=lambda value: type(value).__name__)
def test_an_immutable_value_cannot_be_edited(store, value):
    store["key"] = value
    before = dict(store)
    for manager in store.edit("key"), store.edit("other", value):
        with (
            pytest.raises(TypeError, match=r"changed in place.*Use transaction\(\)"),
            manager,
        ):
            pytest.fail("the block ran")
    assert_is(store, before)


def test_the_error_of_an_immutable_value_names_key_and_type(store):
    with pytest.raises(TypeError, match=r"'a'.* type int"), store.edit("a"):
        pytest.fail("the block ran")


def set_slot(value):
    value.values = [1]


MUTABLE = {
    "list": ([], lambda value: value.append(1), [1]),
    "dict": ({}, lambda value: value.update(a=1), {"a": 1}),
    "set": (set(), lambda value: value.add(1), {1}),
    "bytearray": (bytearray(), lambda value: value.extend(b"x"), bytearray(b"x")),
    "deque": (
        collections.deque(),
        lambda value: value.append(1),
        collections.deque([1]),
    ),
    "Counter": (
        collections.Counter(),
        lambda value: value.update("a"),
        collections.Counter("a"),
    ),
    "defaultdict": (
        collections.defaultdict(list),
        lambda value: value["a"].append(1),
        {"a": [1]},
    ),
    "dataclass": (Data(), lambda value: value.values.append(1), Data([1])),
    "namespace": (
        types.SimpleNamespace(),
        lambda value: setattr(value, "a", 1),
        types.SimpleNamespace(a=1),
    ),
    "array": (array("i"), lambda value: value.append(1), array("i", [1])),
    "list of its own": (ListOfItsOwn(), lambda value: value.append(1), [1]),
}


@pytest.mark.parametrize(("value", "change", "expected"), MUTABLE.values(), ids=MUTABLE)
def test_a_mutable_value_is_edited(store, value, change, expected):
    before = pickle.dumps(value)
    store["key"] = value
    for manager in store.edit("key"), store.edit("other", value):
        with manager as edited:
            change(edited)
    assert store["key"] == store["other"] == expected
    assert pickle.dumps(value) == before
    assert set(on_disk(store)) == {*START, "key", "other"}


@pytest.mark.parametrize("kind", [Plain, Slotted])
def test_an_object_is_edited(store, kind):
    with store.edit("key", kind()) as value:
        value.values = [1]
    with store.edit("key") as value:
        value.values.append(2)
    assert store["key"].values == [1, 2]


def test_an_edit_without_value_and_default_raises(store):
    with pytest.raises(KeyError, match="Key not found: 'none'"), store.edit("none"):
        pytest.fail("the block ran")
    assert_is(store, START)


def test_none_is_a_default(store):
    with pytest.raises(TypeError, match="NoneType"), store.edit("none", None):
        pytest.fail("the block ran")


def test_the_default_is_not_used_where_there_is_a_value(store):
    with store.edit("b", ["default"]) as value:
        assert value == [2]
        value.append(3)
    assert store["b"] == [2, 3]


def test_the_default_is_stored_though_nothing_is_changed(store):
    with store.edit("new", []):
        pass
    assert store["new"] == []


@pytest.mark.parametrize("key", [None, 7, ""])
def test_a_bad_key_cannot_be_edited(store, key):
    with pytest.raises((TypeError, ValueError)), store.edit(key, []):
        pytest.fail("the block ran")
    assert_is(store, START)


@pytest.mark.parametrize("pending", [False, True])
def test_a_value_that_cannot_be_unpickled_cannot_be_edited(store, pending):
    if pending:
        store["bad"] = Bad()
    else:
        store.put_many({"bad": Bad()})
    with pytest.raises(UnpickleError, match="'bad'"), store.edit("bad"):
        pytest.fail("the block ran")
    assert "bad" in store
    add_one(store)
    assert store["a"] == 2


def test_a_default_that_cannot_be_pickled_raises(store):
    with (
        pytest.raises((AttributeError, pickle.PicklingError), match="lambda"),
        store.edit("new", [lambda: None]),
    ):
        pytest.fail("the block ran")
    assert_is(store, START)


def spoil(store):
    with store.edit("b") as value:
        store["c"] = 6
        value.append(lambda: None)


def test_a_result_that_cannot_be_pickled_undoes_the_edit(store):
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        spoil(store)
    assert_is(store, START)


def test_a_result_that_cannot_be_pickled_undoes_a_nested_edit_only(store):
    with store.transaction():
        store["a"] = 5
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            spoil(store)
        assert_is(store, {**START, "a": 5})
    assert_is(store, {**START, "a": 5})


def test_a_result_too_large_for_the_cap_undoes_the_edit(open_store):
    store = open_store(map_size=SMALL_MAP, max_map_size=SMALL_MAP)
    store.put_many({b"list": []})
    with pytest.raises(GrowthError), store.edit(b"list") as value:
        value.append(bytes(SMALL_MAP))
    assert dict(store) == {b"list": []}


def test_an_edit_is_a_block(store, in_thread):
    with store.edit("b") as value:
        store["a"] = 5
        value.append(store["a"])
        assert store["b"] == [2]
        assert in_thread(lambda: store["a"]).result() == 1
        writer = in_thread(lambda: edit_other(store))
        writer.wait_until_in(WAITS_FOR_BLOCK)
    writer.result()
    assert_is(store, {**START, "a": 5, "b": [2, 5, "other"]})


def test_an_edit_sees_what_is_pending_and_what_the_block_has_done(store):
    store["b"] = ["pending"]
    with store.edit("b") as value:
        assert value == ["pending"]
    with store.transaction():
        store["b"] = ["block"]
        with store.edit("b") as value:
            value.append("edit")
        assert store["b"] == ["block", "edit"]
    assert store["b"] == ["block", "edit"]


def test_edits_nest(store):
    store["x"] = {}
    with store.edit("b") as first, store.edit("x") as second:
        first.append(3)
        second["key"] = first
    assert store["b"] == [2, 3]
    assert store["x"] == {"key": [2, 3]}


def test_an_inner_edit_that_fails_leaves_the_outer_one(store):
    store["x"] = {}
    with store.edit("b") as first:
        with suppress(Abort), store.edit("x") as second:
            first.append(3)
            second["key"] = 1
            raise Abort
        with pytest.raises(TypeError), store.edit("a"):
            pytest.fail("the block ran")
        with pytest.raises(KeyError), store.edit("none"):
            pytest.fail("the block ran")
    assert_is(store, {**START, "b": [2, 3], "x": {}})


def test_an_outer_edit_that_fails_undoes_the_inner_one(store):
    with suppress(Abort), store.edit("b") as first:
        with store.edit("x", {}) as second:
            second["key"] = 1
        first.append(3)
        raise Abort
    assert_is(store, START)


def test_an_edited_value_that_was_deleted_meanwhile_is_stored(store):
    with store.edit("b") as value:
        del store["b"]
        value.append(3)
    assert store["b"] == [2, 3]


@pytest.mark.parametrize("size", [10, 200_000])
@ENGINES
def test_large_values_are_edited(open_store, size, lib_version):
    store = open_store(map_size=SMALL_MAP, lib_version=lib_version, sync=False)
    expected = []
    for number in range(10):
        with store.edit(b"list", []) as value:
            assert value == expected
            value.append(bytes([number]) * size)
        expected.append(bytes([number]) * size)
    assert store[b"list"] == expected


# Many writers

COUNT = """
import sys, threading
from lmdb_object_store import LmdbObjectStore

how, threads, rounds = sys.argv[1], *map(int, sys.argv[2:])
store = LmdbObjectStore("db", key_encoding="utf-8", sync=False)
print("ready", flush=True)
sys.stdin.readline()

def count():
    for _ in range(rounds):
        if how == "transaction":
            with store.transaction():
                store["hits"] = store.get("hits", 0) + 1
        else:
            with store.edit("hits", [0]) as hits:
                hits[0] += 1

workers = [threading.Thread(target=count) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
store.close(strict=True)
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("how", "rounds"),
    [("transaction", 500), ("edit", 500)],
)
def test_threads_of_processes_count_together(tmp_path, open_store, how, rounds):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT, how, "4", str(rounds)],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert Worker(process.stdout.readline).result() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=3 * PATIENCE)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    hits = open_store(key_encoding="utf-8")["hits"]
    total = hits if how == "transaction" else hits[0]
    assert total == 4 * 4 * rounds
