"""Puts and deletions that take no lock: what other threads do at the same time."""

import os
import sys
import threading
from contextlib import suppress
from itertools import count

import pytest

from conftest import times
from lmdb_object_store import BusyError, ClosedError
from moments import (
    GETS_MANY,
    WAITS_FOR_LOCK,
    Parked,
    at_call,
    every_step,
    handling,
    outcome,
)

PENDING = {"key": "pending", "other": 1}

# What another thread does in the middle of a write of this thread, and which values of
# the key it leaves if the write comes before, and if it comes after.


def flush(store):
    store.flush()


def put_many(store):
    store.put_many({"key": "theirs"})


def put(store):
    store["key"] = "theirs"


def pop(store):
    taken.append(store.pop("key", None))


def popitem(store):
    with suppress(KeyError):
        taken.append(store.popitem()[1])


def clear(store):
    store.clear()


def transaction(store):
    with store.transaction():
        taken.append(store.get("key"))
        store["key"] = "theirs"


def setdefault(store):
    store.setdefault("key", "theirs")


def close(store):
    store.close(strict=True)


OTHERS = [flush, put_many, put, pop, popitem, clear, setdefault, close]
WRITES = {
    "put": (lambda store: store.put("key", "new"), "new"),
    "delete": (lambda store: store.delete("key"), None),
}
taken = []


def expected(other, mine):
    """Return what is left, and what was taken, if `other` comes last, and first."""
    default = "theirs" if mine is None else mine
    last, first = {
        flush: ((mine, []), (mine, [])),
        put_many: (("theirs", []), (mine, [])),
        put: (("theirs", []), (mine, [])),
        pop: ((None, [mine]), (mine, ["pending"])),
        popitem: ((None, [mine]), (mine, ["pending"])),
        clear: ((None, []), (mine, [])),
        transaction: (("theirs", [mine]), (mine, ["pending"])),
        setdefault: ((default, []), (mine, [])),
        close: ((mine, []), ("pending", [])),
    }[other]
    if other is popitem and mine is None:
        last = None, [1]  # of the other key
    return last, first


ALL = [*OTHERS, transaction]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("interrupted", "write", "batch_size", "other"),
    [
        *(("write", "put", 1000, other) for other in ALL),
        *(("write", "put", 3, other) for other in ALL),
        *(("write", "delete", 1000, other) for other in ALL),
        *(("other", "put", 1000, other) for other in OTHERS),  # a block is waited for
    ],
)
def test_another_thread_at_each_moment_of_a_write(
    open_store, in_thread, other, write, batch_size, interrupted
):
    # CPython lets other threads run just where it calls signal handlers. So the handler
    # waits for the other thread, unless that waits for a lock of the interrupted one.
    numbers = count()
    write, mine = WRITES[write]
    here, there = (write, other) if interrupted == "write" else (other, write)

    def prepare():
        store = open_store(
            str(next(numbers)), key_encoding="utf-8", sync=False, flush_interval=None
        )
        store.put_many(dict.fromkeys(PENDING, "stored"))
        store["other"], store["key"] = PENDING["other"], PENDING["key"]
        if other is popitem and mine:
            store.delete("other")
        store.batch_size = batch_size
        taken.clear()
        return store

    def do(store):
        workers = []

        def act():
            ended = threading.Event()

            def run():
                try:
                    return outcome(lambda: there(store))
                finally:
                    ended.set()

            workers.append(in_thread(run))
            ended.wait(0.05)

        with handling(act):
            results = [outcome(lambda: here(store))]
        return [*results, *(worker.result() for worker in workers)]

    for store, results in every_step(prepare, do):
        if len(results) < 2 or BusyError in results:
            continue  # `transaction` where the write waits for the lock, say
        refused = ClosedError in results
        assert set(results) <= {None, ClosedError}
        last, first = expected(other, mine)
        if store.closed:
            store = open_store(os.path.basename(store.db_path), key_encoding="utf-8")
            assert (store.get("key"), taken) == (first if refused else last)
        else:
            assert (store.get("key"), taken) in (last, first)
            store.flush()
            assert (store.get("key"), taken) in (last, first)
        store.close(strict=True)


def test_threads_that_switch_at_every_chance_lose_nothing(open_store, in_thread):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        store = open_store(sync=False, batch_size=7, flush_interval=0.001)
        rounds = times(4_000, thorough=40_000)

        def put_all(thread):
            for number in range(rounds):
                key = b"%d" % (number % 50 + 50 * thread)
                store[key] = number
                assert store[key] == number
                if number % 3 == 0:
                    store.delete(key)
                    assert key not in store

        def flush_all():
            while any(putter.running for putter in putters):
                store.flush()
                with store.transaction():
                    store[b"block"] = store.get(b"block", 0) + 1

        putters = [in_thread(lambda n=thread: put_all(n)) for thread in range(3)]
        in_thread(flush_all).result()
        for putter in putters:
            putter.result()
    finally:
        sys.setswitchinterval(interval)
    last = range(rounds - 50, rounds)
    left = {
        b"%d" % (number % 50 + 50 * thread): number
        for number in last
        for thread in range(3)
        if number % 3
    }
    store.close(strict=True)
    found = dict(open_store())
    assert found.pop(b"block") > 0
    assert found == left


TURNS_AWAY_AS_A_PUT_COMES = """
import sys
import threading

from conftest import PATIENCE, eventually
from lmdb_object_store import LmdbObjectStore
from moments import TURNS_AWAY

def hook(frame, event, _):
    if event == "call" and frame.f_code.co_name == TURNS_AWAY:
        sys.setprofile(None)
        store[b"b"] = 2
        put.set()

put = threading.Event()
threading.setprofile(hook)  # of threads that start from here on, as the flusher
with LmdbObjectStore("db", sync=False, flush_interval=0.01) as store:
    store[b"a"] = 1
    assert put.wait(PATIENCE)
    eventually(lambda: not store.write_buffer)
    assert dict(store) == {b"a": 1, b"b": 2}
"""


def test_a_put_as_the_flusher_turns_away_is_flushed(run):
    run(TURNS_AWAY_AS_A_PUT_COMES)


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.get_many([b"b", b"a"])[0],
        lambda store: dict(store.items()),
    ],
    ids=["get_many", "items"],
)
def test_no_write_comes_while_a_read_takes_its_moment(open_store, in_thread, read):
    store = open_store(autoflush_on_read=False)
    store.put_many({b"a": 0, b"b": 0})
    with Parked(in_thread, "begin", lambda: read(store)) as reading:
        writing = in_thread(lambda: store.put(b"a", 1))
        writing.wait_until_in(WAITS_FOR_LOCK)
        assert writing.running
        assert reading.release() == {b"a": 0, b"b": 0}
        writing.result()
    assert read(store) == {b"a": 1, b"b": 0}


WITHOUT_GIL = """
import sys
sys._is_gil_enabled = lambda: False
import threading
from lmdb_object_store import LmdbObjectStore

with LmdbObjectStore("db", batch_size=10, sync=False) as store:
    def put_all(thread):
        for number in range(300):
            store[b"%d %d" % (thread, number)] = number
            store.delete(b"%d %d" % (thread, number - 5))

    threads = [threading.Thread(target=put_all, args=(n,)) for n in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    with store.transaction():
        store[b"block"] = 1
    store[b"last"] = 2
    assert store.write_buffer
with LmdbObjectStore("db") as store:
    print(len(store), store[b"block"], store[b"last"], store[b"2 299"])
"""


def test_where_python_runs_without_the_gil_all_writes_take_the_lock(run):
    assert run(WITHOUT_GIL).stdout.split() == ["17", "1", "2", "299"]


@pytest.mark.parametrize("write", ["put", "delete"])
def test_a_write_of_many_bytes_is_flushed_at_once(open_store, write):
    store = open_store(batch_bytes=25, sync=False)
    store[b"a"] = 1
    assert store.write_buffer
    {"put": lambda: store.put(b"x" * 20, 2), "delete": lambda: store.delete(b"x" * 20)}[
        write
    ]()
    assert not store.write_buffer
    assert (b"x" * 20 in store) is (write == "put")


def test_a_read_inside_the_moment_of_a_read(open_store):
    store = open_store(autoflush_on_read=False)
    store.put_many({b"a": 1})
    store[b"b"] = 2
    with at_call(
        "begin", lambda: (len(store), store.put(b"c", 3)), GETS_MANY
    ) as results:
        found, _ = store.get_many([b"a", b"b", b"c"])
    assert results == [(2, None)]
    assert found == {b"a": 1, b"b": 2}
    store.delete(b"a")  # puts and deletions need no lock again
    assert dict(store) == {b"b": 2, b"c": 3}


def test_a_look_waits_for_the_moment_of_growth(open_store, in_thread):
    store = open_store(map_size=2**16, sync=False)
    store.put_many({b"a": 1})
    grow = in_thread, "set_mapsize", lambda: store.put_many({b"large": bytes(2**20)})
    with Parked(*grow) as growing:
        looking = in_thread(lambda: (b"a" in store, b"b" in store, store.exists(b"a")))
        looking.wait_until_in(WAITS_FOR_LOCK)
        assert looking.running
        growing.release()
        assert looking.result() == (True, False, True)
