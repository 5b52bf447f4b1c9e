"""Ctrl-C, signal handlers and finalizers in blocks, edits and snapshots."""

import os
import shutil
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count

import lmdb
import pytest

import lmdb_object_store
import moments
from conftest import PATIENCE, run_all, times
from lmdb_object_store import BusyError, ClosedError, LmdbObjectStore
from moments import every_step, handling, part_of

LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled
OLD = {"a": 1, "b": 2, "list": [0]}
KEPT = {"visitor", "number", "objects", "many"}
OPTIONS = {
    "key_encoding": "utf-8",
    "autoflush_on_read": False,
    "map_size": 2**19,
    "max_readers": 4000,  # an interrupted read keeps its slot, though it has ended
    "timeout": 0,
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


def restore(store):
    """Bring the store to where the operations below start from."""
    if {**store, **OLD} != store or not store.keys() <= {*OLD, *KEPT}:
        store.delete_many(store.keys() - KEPT)
        store.put_many(OLD)
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
    store.max_map_size = 4 * size
    store.put_many({"growth": bytes(size)})
    assert store.env.info()["map_size"] > size


def check_readers(store):
    """No transaction is open."""
    lines = store.env.readers().splitlines()[1:]
    assert [line for line in lines if line.split()[-1] != "-"] == []


# Every statement, interrupted at every bytecode


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
    for key in "cd":
        if key in OLD:
            continue
        with store.transaction():
            for other in store:
                if other == "a":
                    store[other] = "new"
            if key == "c":
                break


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


def grow(store):
    with store.transaction():
        store["large"] = LARGE * 2


STATEMENTS = {
    write: {"a": "new", "list": [0]},
    write_many: {"c": 3, "d": 4, "list": [0]},
    loop: {**OLD, "a": "new"},
    nest: {**OLD, "a": "new", "b": "new"},
    nest_and_fail: {**OLD, "a": "new"},
    edit: {**OLD, "list": [0, 1]},
    edit_a_default: {**OLD, "new": {"c": 3}},
}


@pytest.mark.parametrize("statement", [write_many, loop, nest_and_fail, edit])
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
        restore(store)["pending"] = next(numbers)
        return store

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
    assert number > part_of(500)
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def read_a_snapshot(store):
    with store.snapshot() as snapshot:
        assert (snapshot["a"], snapshot.get("x"), "b" in snapshot) == (1, None, True)
        for key in snapshot:
            if key == "b":
                break
        assert dict(reversed(snapshot.items(stop="l"))) == {"a": 1, "b": 2}
        assert snapshot.get_many(["b", "x"], decode_keys=True) == ({"b": 2}, ["x"])


def read_two_snapshots(store):
    with store.snapshot() as before:
        store["a"] = "new"
        with store.snapshot() as after:
            assert (before["large"], after["large"]) == (LARGE, LARGE)
            assert (before["a"], after["a"]) == (1, "new")


@pytest.mark.parametrize("statement", [read_a_snapshot, read_two_snapshots])
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
    options = {**OPTIONS, "map_size": 2**18, "max_map_size": 2**20}

    def prepare():
        return restore(open_store(str(next(numbers)), **options))

    for store, result in every_step(prepare, grow):
        assert not isinstance(result, Exception)
        kept.append(result)
        state = in_thread(partial(state_from_outside, store)).result()
        assert state in (OLD, {**OLD, "large": LARGE * 2})
        check_readers(store)
        in_thread(partial(grow_at_once, store)).result()
        in_thread(store.close).result()
        shutil.rmtree(store.db_path)
    assert state != OLD


# Going on after an interrupt


def change(store):
    store.put_many({"b": "new", "c": 3})
    assert store.delete_many(store.keys(start="c", stop="m")) == 2
    assert store.pop("a") == 1


def change_nested(store):
    with store.transaction():
        store.update(b="new", c=3)


CHANGES = {
    change: [{**OLD, "b": "new", "c": 3}, {"a": 1, "b": "new"}, {"b": "new"}],
    change_nested: [{**OLD, "b": "new", "c": 3}],
}


@pytest.mark.parametrize("operation", CHANGES)
def test_a_block_may_go_on_after_an_interrupt(store, in_thread, operation):
    kept, states = deque(maxlen=20), []

    def action(store):
        with store.transaction():
            store["visitor"] = 1
            try:
                operation(store)
            except KeyboardInterrupt as error:
                kept.append(error)
            store["number"] = 1

    def prepare():
        store.delete_many(KEPT)
        return restore(store)

    around = {"visitor": 1, "number": 1}
    expected = [OLD, {**OLD, **around}]
    expected += [{**state, **around} for state in CHANGES[operation]]
    for _, result in every_step(prepare, action):
        assert isinstance(result, KeyboardInterrupt | ClosedError | None)
        states.append(in_thread(lambda: state_from_outside(store)).result())
        assert states[-1] in (
            expected[:1] if isinstance(result, ClosedError) else expected
        )
        check_readers(store)
    assert all(state in states for state in expected)
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
            return snapshot == OLD and other.submit(lambda: snapshot == OLD).result()

    with ThreadPoolExecutor(1) as other:
        for _, result in every_step(lambda: restore(store), action):
            assert result is True or isinstance(result, KeyboardInterrupt)
            other.submit(int).result()  # what came before has ended then
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
            store["number"] = store.get("number", 0) + 1
            store.put_many({"many": self.visits})
        self.counted += 1

    def edit(self):
        with self.store.edit("objects", []) as numbers:
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
        assert state.pop("number", 0) == self.counted
        assert len(state.pop("objects", [])) == self.edited
        state.pop("many", 0)
        return state


@pytest.mark.parametrize("statement", [nest, edit_a_default])
def test_a_signal_handler_may_use_the_store_at_every_moment(
    store, in_thread, statement
):
    new = STATEMENTS.get(statement, OLD)
    visitor = Visitor(store)
    with handling(visitor):
        for _, result in every_step(lambda: restore(store), statement):
            assert result is None
            assert in_thread(visitor.check).result() == new
    assert visitor.visits > part_of(100)
    assert visitor.served > visitor.refused > visitor.visits
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_a_signal_handler_may_use_the_store_in_what_is_undone(store, in_thread):

    visitor = Visitor(store)
    with handling(visitor):
        for _, result in every_step(lambda: restore(store), nest_and_fail):
            assert result is None
            state = in_thread(lambda: state_from_outside(store)).result()
            state = {key: state[key] for key in state if key not in KEPT}
            assert state == STATEMENTS[nest_and_fail]
    assert visitor.visits > part_of(100)
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_a_signal_handler_may_close_at_every_moment(open_store, in_thread):
    closed = refused = 0
    store = open_store(**OPTIONS)

    def prepare():
        nonlocal store
        if store.closed:
            store = open_store(**OPTIONS)
        restore(store)["pending"] = 1
        return store

    def close():
        nonlocal refused
        try:
            store.close()
        except BusyError:
            refused += 1

    with handling(close):
        for _, result in every_step(prepare, write):
            assert result is None or isinstance(result, ClosedError)
            assert store.closed or result is None
            closed += store.closed
            if store.closed:
                store = open_store(**OPTIONS)
            state = in_thread(partial(state_from_outside, store)).result()
            assert state.pop("pending") == 1
            assert state == (OLD if result else STATEMENTS[write])
            store.delete("pending")
    assert closed > part_of(50)
    assert refused > part_of(50)


# Finalizers


@contextmanager
def finalizing(action):
    """Let a finalizer call `action` wherever this thread calls something, once."""
    tried = set()

    class Garbage:
        def __del__(self):
            action()

    def hook(frame, event, _):
        moment = (frame.f_code, frame.f_lasti, event)
        if moment in tried:
            return
        tried.add(moment)
        sys.setprofile(None)
        Garbage()
        sys.setprofile(hook)

    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("statement", [write_many, nest, edit, read_a_snapshot])
def test_a_finalizer_may_use_the_store_wherever_it_runs(store, in_thread, statement):
    visitor = Visitor(restore(store))
    with finalizing(visitor):
        statement(store)
    assert in_thread(visitor.check).result() == STATEMENTS.get(statement, OLD)
    assert visitor.visits > 50
    in_thread(lambda: grow_at_once(store)).result()
    in_thread(store.close).result()


def test_a_finalizer_may_read_in_another_thread_than_the_block_and_the_snapshot(
    store, in_thread
):
    restore(store)
    visits = count()

    def visit():
        next(visits)
        assert dict(store) == OLD
        with suppress(BusyError):
            assert (snapshot["b"], len(snapshot)) == (2, 3)
            assert dict(snapshot.items()) == OLD

    def read():
        with finalizing(visit), store.snapshot() as other:
            assert store.get_many(OLD, decode_keys=True) == (OLD, [])
            assert list(store) == list(snapshot) == list(other)
            assert store.exists("a")

    with store.snapshot() as snapshot, store.transaction():
        store.update(a="new", c=3)
        in_thread(read).result()
        assert (store["a"], snapshot["a"]) == ("new", 1)
    assert next(visits) > 50
    assert store["a"] == "new"


@pytest.mark.usefixtures("hasty")
def test_finalizers_may_write_while_other_threads_have_blocks(store):
    store.timeout = PATIENCE  # for the other thread's block
    done = [0, 0]

    def work(number):
        for _ in range(3):
            with finalizing(partial(put, number)):
                with store.edit(f"list {number}", []) as numbers:
                    numbers.append(1)
                with store.snapshot() as snapshot:
                    assert len(snapshot[f"list {number}"]) == len(numbers)

    def put(number):
        done[number] += 1
        store[f"put {number}"] = done[number]
        assert store[f"put {number}"] == done[number]

    run_all(partial(work, 0), partial(work, 1))
    for number in range(2):
        assert store[f"list {number}"] == [1, 1, 1]
        assert store[f"put {number}"] == done[number] > 50


# All of it, in a storm of interrupts

STORM = """
import random, signal, sys, threading, time
from _thread import interrupt_main
from lmdb_object_store import LmdbObjectStore

budget = hits = 0


def handler(*_):
    global budget, hits
    if budget:
        budget -= 1
        hits += 1
        raise KeyboardInterrupt


def fire():
    while not over.wait(random.random() / 1000):
        interrupt_main()


def transfer():
    with store.transaction():
        store["from"] -= 1
        store["to"] += 1


def nest():
    with store.transaction():
        store["from"] += 1
        with store.transaction():
            store.put_many({"to": store["to"] - 1})


def append():
    with store.edit("list") as numbers:
        numbers.append(len(numbers))


def look():
    store["pending"] = done["look"]
    with store.snapshot() as snapshot:
        assert snapshot["from"] + snapshot["to"] == 0
        assert dict(snapshot.items())["pending"] == done["look"]
        for number, at in enumerate(snapshot["list"]):
            assert number == at


store = LmdbObjectStore(sys.argv[1], key_encoding="utf-8", map_size=2**18, sync=False)
store.put_many({"from": 0, "to": 0, "list": []})
operations = [transfer, nest, append, look]
done = dict.fromkeys((operation.__name__ for operation in operations), 0)
unsure = dict(done)
last = None
signal.signal(signal.SIGINT, handler)
over = threading.Event()
firing = threading.Thread(target=fire)
firing.start()
end = time.monotonic() + int(sys.argv[2])
while time.monotonic() < end:
    for operation in operations:
        name = operation.__name__
        unsure[name] += 1
        try:
            budget = 1
            operation()
            budget = 0
            done[name] += 1
            unsure[name] -= 1
        except KeyboardInterrupt as error:
            last = error
        budget = 0
    assert store["from"] + store["to"] == 0
over.set()
firing.join()
for name, least in (("list", done["append"]), ("to", done["transfer"] - done["nest"])):
    value = store[name]
    if name == "list":
        assert 0 <= len(value) - least <= unsure["append"]
    else:
        assert -unsure["nest"] <= value - least <= unsure["transfer"]


def others():
    with store.transaction():
        store["more"] = bytes(2**27)  # this grows the map


thread = threading.Thread(target=others, daemon=True)
thread.start()
thread.join(20)
assert not thread.is_alive()
store["last"] = 1
store.close(strict=True)
print(hits)
"""


@pytest.mark.usefixtures("_unmeasured")
def test_a_storm_leaves_every_block_whole_and_the_store_closable(tmp_path):
    path = str(tmp_path / "db")
    run = [sys.executable, "-c", STORM, path, str(times(1, thorough=2))]
    printed = subprocess.run(run, check=True, timeout=60, stdout=subprocess.PIPE).stdout
    assert int(printed) > 100
    with LmdbObjectStore(path, key_encoding="utf-8") as store:
        assert store["last"] == 1
        assert store["from"] + store["to"] == 0
