"""Ctrl-C, signal handlers and finalizers in blocks, edits and snapshots."""

import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from itertools import count

import lmdb
import pytest

import lmdb_object_store
import moments
from conftest import PATIENCE
from lmdb_object_store import BusyError, ClosedError, LmdbObjectStore
from moments import every_step, handling

LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled
OLD = {"a": 1, "b": 2, "list": [0]}
KEPT = {"visitor", "counter", "edited", "many"}
OPTIONS = {
    "key_encoding": "utf-8",
    "autoflush_on_read": False,
    "map_size": 2**19,
    "growth_timeout": 0,
    "sync": False,
}


@pytest.fixture(autouse=True)
def _in_with_statements(monkeypatch):
    """Interrupt the functions of this file, too."""
    library = os.path.dirname(lmdb_object_store.__file__)
    monkeypatch.setattr(moments, "_LIBRARY", (library, __file__))
    monkeypatch.setattr(moments, "_ROUNDS", 1)


@pytest.fixture(autouse=True)
def _unraisable(monkeypatch):
    kinds = set()
    monkeypatch.setattr(sys, "unraisablehook", lambda args: kinds.add(args.exc_type))
    yield
    assert kinds <= {KeyboardInterrupt}  # that can hit a finalizer, which swallows it


@pytest.fixture
def store(open_store):
    return open_store(**OPTIONS)


def restore(store, pending=None):
    """Bring the store to where the operations below start from."""
    if {**store, **OLD} != store or not store.keys() <= {*OLD, *KEPT}:
        store.delete_many(store.keys() - KEPT)
        store.put_many(OLD)
    if pending:
        store["pending"] = pending
    return store


def state_from_outside(store):
    """Nobody is locked out. For another thread."""
    with store.transaction():
        state = dict(store.items())
        store["other"] = 1
    with store.snapshot() as snapshot:
        assert snapshot == {**state, "other": 1}
    store.delete("other")
    return state


def grow_at_once(store):
    """Nobody is counted as a reader who is none. For another thread."""
    size = store.env.info()["map_size"]
    store.put_many({"growth": bytes(size)})
    assert store.env.info()["map_size"] > size


def check_readers(store):
    """No transaction is open."""
    lines = store.env.readers().splitlines()[1:]
    assert [line for line in lines if line.split()[-1] != "-"] == []


# Every statement, interrupted at every bytecode


def begin(store):
    with store.transaction():
        pass


def write(store):
    with store.transaction():
        store["a"] = "new"
        store.delete("b")


def write_many(store):
    with store.transaction() as yielded:
        yielded.put_many({"c": 3, "d": 4})
        yielded.delete_many(["a", "x"])
        assert yielded.pop("b") == 2


def loop(store):
    with store.transaction():
        for key in store:
            if key != "list":
                store[key] = "new"
        while "b" in store:
            if store.get("b"):
                store.popitem()


def loop_around(store):
    for key in "cd":
        if key in OLD:
            continue
        with store.transaction():
            if key == "d":
                store[key] = 4


def fail(store):
    with suppress(ZeroDivisionError), store.transaction():
        store.update(a="new", c=3)
        store["d"] = 1 / 0


def give_up(store):
    with store.transaction():
        store["a"] = "new"
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            return store.get("a")
        finally:
            store["b"] = "new"


def nest(store):
    with store.transaction():
        store["a"] = "new"
        with store.transaction():
            store["b"] = "new"


def nest_and_fail(store):
    with store.transaction():
        store["a"] = "new"
        with suppress(ZeroDivisionError), store.transaction():
            store["b"] = "doomed"
            store["c"] = 1 / 0


def edit(store):
    with store.edit("list") as numbers:
        numbers.append(1)


def edit_a_default(store):
    with store.edit("new", {}) as new:
        new["c"] = 3


def edit_and_fail(store):
    with suppress(ZeroDivisionError), store.edit("list") as numbers:
        numbers.append(1 / 0)


def grow(store):
    with store.transaction():
        store["large"] = LARGE * 10


STATEMENTS = {
    begin: OLD,
    write: {"a": "new", "list": [0]},
    write_many: {"c": 3, "d": 4, "list": [0]},
    loop: {"a": "new"},
    loop_around: {**OLD, "d": 4},
    fail: OLD,
    give_up: {**OLD, "a": "new", "b": "new"},
    nest: {**OLD, "a": "new", "b": "new"},
    nest_and_fail: {**OLD, "a": "new"},
    edit: {**OLD, "list": [0, 1]},
    edit_a_default: {**OLD, "new": {"c": 3}},
    edit_and_fail: OLD,
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_block_may_be_interrupted_at_every_moment(store, in_thread, statement):
    new = STATEMENTS[statement]
    kept, states = deque(maxlen=20), []
    for _, result in every_step(lambda: restore(store), statement):
        assert not isinstance(result, Exception)
        kept.append(result)  # and with it the frames of its traceback
        states.append(in_thread(lambda: state_from_outside(store)).result())
        assert states[-1] in (OLD, new)
        check_readers(store)
    assert KeyboardInterrupt in map(type, kept)
    assert OLD in states
    assert states[-1] == new
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_the_beginning_of_a_block_with_something_pending_may_be_interrupted(
    store, in_thread
):
    numbers = count(1)
    kept = deque(maxlen=20)

    def prepare():
        return restore(store, next(numbers))

    def look():
        state = state_from_outside(store)
        store.delete("pending")
        store.flush()
        return state

    for number, (_, result) in enumerate(every_step(prepare, write), 1):
        assert not isinstance(result, Exception)
        kept.append(result)
        state = in_thread(look).result()
        assert state.pop("pending") == number
        assert state in (OLD, STATEMENTS[write])
        check_readers(store)
    assert number > 500
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def read_a_snapshot(store):
    with store.snapshot() as snapshot:
        assert (snapshot["a"], snapshot.get("x"), "b" in snapshot) == (1, None, True)
        assert snapshot.get_many(["b", "x"], decode_keys=True) == ({"b": 2}, ["x"])


def read_a_snapshot_in_order(store):
    with store.snapshot() as snapshot:
        for key in snapshot:
            if key == "b":
                break
        assert len(snapshot) == len(snapshot.keys()) == 4
        assert dict(reversed(snapshot.items(stop="list"))) == {"a": 1, "b": 2}


def read_two_snapshots(store):
    with store.snapshot() as before:
        store["a"] = "new"
        with store.snapshot() as after:
            assert (before["large"], after["large"]) == (LARGE, LARGE)
            assert (before["a"], after["a"]) == (1, "new")


def fail_in_a_snapshot(store):
    with suppress(ZeroDivisionError), store.snapshot() as snapshot:
        next(iter(snapshot.items()))
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        *(read_a_snapshot, read_a_snapshot_in_order),
        *(read_two_snapshots, fail_in_a_snapshot),
    ],
)
def test_a_snapshot_may_be_interrupted_at_every_moment(store, in_thread, statement):
    store.put_many({**OLD, "large": LARGE})
    kept = deque(maxlen=20)

    def prepare():
        store["a"] = 1
        return store

    for _, result in every_step(prepare, statement):
        assert not isinstance(result, Exception)
        kept.append(result)
        check_readers(store)
        in_thread(lambda: state_from_outside(store)).result()
    assert KeyboardInterrupt in map(type, kept)
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_the_growth_of_a_block_may_be_interrupted_at_every_moment(
    open_store, in_thread
):
    numbers = count()
    kept = deque(maxlen=20)

    def prepare():
        return restore(open_store(str(next(numbers)), **OPTIONS))

    for store, result in every_step(prepare, grow):
        assert not isinstance(result, Exception)
        kept.append(result)
        state = in_thread(lambda: state_from_outside(store)).result()  # noqa: B023
        assert state in (OLD, {**OLD, "large": LARGE * 10})
        check_readers(store)
        in_thread(lambda: grow_at_once(store)).result()  # noqa: B023
        in_thread(store.close).result()
        shutil.rmtree(store.db_path)
    assert state != OLD


# Going on after an interrupt


def put_many(store):
    store.put_many({"a": "new", "c": 3})


def delete_many(store):
    store.delete_many(["a", "b"])


def delete_range(store):
    store.delete_many(store.keys(stop="c"))


def pop(store):
    assert store.pop("a") == 1


def popitem(store):
    assert store.popitem() == ("list", [0])


def setdefault(store):
    assert store.setdefault("c", 3) == 3


def iterate(store):
    assert dict(store.items(stop="c")) == {"a": 1, "b": 2}


INSIDE = {
    put_many: {**OLD, "a": "new", "c": 3},
    delete_many: {"list": [0]},
    delete_range: {"list": [0]},
    pop: {"b": 2, "list": [0]},
    popitem: {"a": 1, "b": 2},
    setdefault: {**OLD, "c": 3},
    iterate: OLD,
    nest: STATEMENTS[nest],
    nest_and_fail: STATEMENTS[nest_and_fail],
    edit: STATEMENTS[edit],
}


@pytest.mark.parametrize("operation", INSIDE)
def test_a_block_may_go_on_after_an_interrupt(store, in_thread, operation):
    kept, states = deque(maxlen=20), []

    def action(store):
        with store.transaction():
            store["first"] = 1
            try:
                operation(store)
            except KeyboardInterrupt as error:
                kept.append(error)
            store["z"] = 1

    def clear_and_restore():
        store.delete_many(["first", "z"])
        return restore(store)

    around = {"first": 1, "z": 1}
    expected = [OLD, {**OLD, **around}, {**INSIDE[operation], **around}]
    for _, result in every_step(clear_and_restore, action):
        assert not isinstance(result, Exception)
        states.append(in_thread(lambda: state_from_outside(store)).result())
        assert states[-1] in expected
        check_readers(store)
    assert expected[1] in states
    assert states[-1] == expected[2]
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_a_snapshot_may_be_read_after_an_interrupt(store, in_thread):
    kept = deque(maxlen=20)

    def action(store):
        with store.snapshot() as snapshot:
            try:
                assert snapshot["a"] == 1
                list(snapshot.items())
                snapshot.get_many(["a"])
            except KeyboardInterrupt as error:
                kept.append(error)
            return snapshot == OLD and in_thread(lambda: snapshot == OLD).result()

    for _, result in every_step(lambda: restore(store), action):
        assert result is True or isinstance(result, KeyboardInterrupt)
        check_readers(store)
    assert result
    assert len(kept) == 20
    in_thread(lambda: grow_at_once(store)).result()


# Signal handlers


class Visitor:
    """What a signal handler does with the store, again and again."""

    def __init__(self, store):
        self.store = store
        self.visits = self.served = self.refused = 0
        self.counted = self.edited = 0

    def __call__(self):
        self.visits += 1
        store = self.store
        store["visitor"] = self.visits
        assert store["visitor"] == self.visits
        store.delete("missing")
        assert "missing" not in store
        assert len(store) >= 2
        calls = (self.count, self.edit, self.fail, self.read, store.flush)
        for call in calls:
            try:
                call()
            except lmdb.Error:
                self.refused += 1
            else:
                self.served += 1

    def count(self):
        with self.store.transaction() as store:
            store["counter"] = store.get("counter", 0) + 1
            store.put_many({"many": self.visits})
        self.counted += 1

    def edit(self):
        with self.store.edit("edited", []) as numbers:
            numbers.append(1)
        self.edited += 1

    def fail(self):
        with suppress(ZeroDivisionError), self.store.transaction() as store:
            store["doomed"] = 1 / 0

    def read(self):
        with self.store.snapshot() as snapshot:
            assert len(snapshot) >= 2
            assert "doomed" not in snapshot

    def check(self):
        """Nothing is lost that was accepted. For another thread."""
        state = state_from_outside(self.store)
        assert state.pop("visitor", self.visits) == self.visits
        assert state.pop("counter", 0) == self.counted
        assert len(state.pop("edited", [])) == self.edited
        state.pop("many", 0)
        return state


@pytest.mark.parametrize(
    "statement", [write, write_many, nest, edit, edit_a_default, read_a_snapshot]
)
def test_a_signal_handler_may_use_the_store_at_every_moment(
    store, in_thread, statement
):
    new = STATEMENTS.get(statement, OLD)
    visitor = Visitor(store)
    with handling(visitor):
        for _, result in every_step(lambda: restore(store), statement):
            assert result is None
            assert in_thread(visitor.check).result() == new
    assert visitor.visits > 100
    assert visitor.served > visitor.refused > visitor.visits
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


@pytest.mark.parametrize("statement", [fail, nest_and_fail, edit_and_fail])
def test_a_signal_handler_may_use_the_store_in_what_is_undone(
    store, in_thread, statement
):
    new = STATEMENTS[statement]

    visitor = Visitor(store)
    with handling(visitor):
        for _, result in every_step(lambda: restore(store), statement):
            assert result is None
            state = in_thread(lambda: state_from_outside(store)).result()
            assert {key: state[key] for key in state if key not in KEPT} == new
    assert visitor.visits > 100
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


@pytest.mark.parametrize("statement", [write, edit, read_a_snapshot])
def test_a_signal_handler_may_close_at_every_moment_of_a_block(open_store, statement):
    new = STATEMENTS.get(statement, OLD)
    numbers = count()
    outcomes = []

    stores = []

    def prepare():
        store = restore(open_store(str(next(numbers)), **OPTIONS))
        store["pending"] = 1
        stores.append(store)
        return store

    def close():
        with suppress(BusyError):
            stores[-1].close()

    with handling(close):
        for store, result in every_step(prepare, statement):
            assert result is None or isinstance(result, ClosedError)
            outcomes.append(type(result))
            close()
            with LmdbObjectStore(store.db_path, **OPTIONS) as reopened:
                assert reopened.pop("pending") == 1
                assert reopened == (OLD if result else new)
            shutil.rmtree(store.db_path)
    assert ClosedError in outcomes
