"""Ctrl-C, signal handlers and finalizers in blocks, edits and snapshots."""

import os
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
    if store != OLD:
        store.clear()
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
