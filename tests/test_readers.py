"""LMDB's table of readers: slots of dead processes, and more readers than slots."""

import subprocess
import sys
import threading
from contextlib import ExitStack

import lmdb
import pytest

from conftest import PATIENCE, run_all
from lmdb_object_store import LmdbObjectStore, ReadersFullError
from moments import (
    GETS_MANY,
    GETS_ONE,
    WAITS_FOR_SLOT,
    WAITS_FOR_SLOT_TO_OPEN,
    Parked,
    at_call,
)
from test_faults import ENGINES, verify

# Holds read transactions in as many threads, and says so.
HOLD = """
import sys, threading
import lmdb
path, lib_version, count, max_readers = sys.argv[1], *map(int, sys.argv[2:])
env = lmdb.open(path, max_readers=max_readers, lib_version=lib_version)
held = []
threads = [
    threading.Thread(target=lambda: held.append(env.begin())) for _ in range(count)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(held), flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that holds read transactions of a store."""

    def __init__(self, path, lib_version, count, max_readers):
        arguments = [path, lib_version, count, max_readers]
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert int(self._process.stdout.readline()) == count

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def hold():
    with ExitStack() as stack:

        def hold(*arguments):
            holder = Holder(*arguments)
            stack.callback(holder.kill)
            return holder

        yield hold


def slots(store):
    return max(0, len(store.env.readers().strip().splitlines()) - 1)


@ENGINES
def test_130_dead_readers_are_cleared_when_a_store_opens(open_store, hold, lib_version):
    options = {"lib_version": lib_version, "max_readers": 200}
    with lmdb.open(str(open_store(**options).db_path) + "2", **options) as env:
        holder = hold(env.path(), lib_version, 130, 200)
        holder.kill()
        assert len(env.readers().splitlines()) > 130
        script = "import sys; from lmdb_object_store import LmdbObjectStore as Store; "
        script += "Store(sys.argv[1], max_readers=200).close()"
        subprocess.run([sys.executable, "-c", script, env.path()], check=True)
        assert len(env.readers().splitlines()) <= 2


@ENGINES
def test_a_table_full_of_dead_readers_is_cleared_by_a_read(
    open_store, hold, lib_version
):
    store = open_store(lib_version=lib_version)
    store.put_many({b"key": 1})
    hold(store.db_path, lib_version, 126, 126).kill()
    assert slots(store) == 126
    assert store[b"key"] == 1
    assert slots(store) <= 1
    with store.snapshot() as snapshot:
        assert snapshot[b"key"] == 1


@ENGINES
def test_dead_readers_are_cleared_before_the_map_grows(open_store, hold, lib_version):
    store = open_store(lib_version=lib_version, map_size=2**20)
    store.put_many({b"key": 1})
    hold(store.db_path, lib_version, 3, 126).kill()
    for n in range(50):  # each frees what the last one has written
        store.put_many({b"key": bytes([n]) * 2**17})
    assert store.env.info()["map_size"] == 2**20
    verify(store.db_path)


def test_more_threads_than_slots_take_turns(open_store, hasty):
    store = open_store(max_readers=3)
    store.put_many({b"%d" % n: n for n in range(50)})
    assert store[b"0"] == 0

    def read():
        for n in range(50):
            assert store[b"%d" % n] == n
            assert len(store.get_many([b"1", b"2"])[0]) == 2
        assert list(store.values()) == [store[key] for key in store]

    run_all(*[read] * 12)


def test_a_read_takes_the_turn_of_one_that_ends(open_store, in_thread):
    store = open_store(max_readers=2)
    store.put_many({b"key": 1})
    read = lambda: store[b"key"]  # noqa: E731
    with (
        Parked(in_thread, "get", read) as first,
        Parked(in_thread, "get", read) as second,
    ):
        third = in_thread(read)
        third.wait_until_in(WAITS_FOR_SLOT)
        assert third.running
        assert first.release() == second.release() == third.result() == 1


def test_a_snapshot_waits_for_the_end_of_another(open_store, in_thread):
    store = open_store(max_readers=1)
    store.put_many({b"key": 1})

    def look():
        with store.snapshot() as snapshot:
            return snapshot[b"key"]

    with store.snapshot():
        waiting = in_thread(look)
        waiting.wait_until_in(WAITS_FOR_SLOT)
        assert waiting.running
    assert waiting.result() == 1


def test_a_thread_that_has_all_slots_itself_is_told_at_once(open_store):
    store = open_store(max_readers=2)
    store.put_many({b"key": 1})
    with store.snapshot(), store.snapshot() as snapshot:
        with pytest.raises(ReadersFullError, match="larger max_readers"):
            store[b"key"]
        with pytest.raises(lmdb.ReadersFullError), store.snapshot():
            pytest.fail("opened")
        assert snapshot[b"key"] == 1
        store[b"key"] = 2
        store.flush()  # no slot is needed for that
    assert store[b"key"] == 2


def test_a_table_full_of_living_readers(open_store, hold):
    store = open_store(max_readers=4, timeout=0)
    store.put_many({b"key": 1})
    holder = hold(store.db_path, 0, 4, 4)
    for use in (
        lambda: store[b"key"],
        lambda: list(store),
        lambda: len(store.keys(b"k")),
        lambda: store.pop(b"key"),
        lambda: store.__delitem__(b"key"),
        lambda: store.get_many([b"key"]),
    ):
        with pytest.raises(ReadersFullError, match=r"slots of .* are taken"):
            use()
    store.timeout = 60
    holder.kill()
    assert store.pop(b"key") == 1


def test_opening_waits_for_a_slot(open_store, hold, in_thread, tmp_path):
    store = open_store(max_readers=2)
    store.put_many({b"key": 1})
    path = store.db_path
    first = hold(path, 0, 1, 2)
    second = hold(path, 0, 1, 2)
    store.close()
    with pytest.raises(ReadersFullError, match="larger max_readers"):
        LmdbObjectStore(path, timeout=0)
    opening = in_thread(lambda: LmdbObjectStore(path))
    opening.wait_until_in(WAITS_FOR_SLOT_TO_OPEN)
    first.kill()
    second.kill()
    with opening.result() as store:
        assert store[b"key"] == 1


def test_a_signal_handler_inside_a_read_does_not_wait_for_a_slot(open_store):
    store = open_store(max_readers=1)
    store.put_many({b"key": 1})
    with at_call("get", lambda: store[b"other"], GETS_ONE) as results:
        assert store[b"key"] == 1
    # CPython lets go of the interrupted transaction after the handler, or before.
    assert results in ([ReadersFullError], [KeyError])
    with at_call("begin", lambda: store[b"other"], GETS_MANY) as results:
        assert store.get_many([b"key"])[0] == {b"key": 1}
    assert results == [ReadersFullError]


def test_a_file_that_is_closed_while_a_read_waits_for_a_slot(open_store, in_thread):
    store = open_store(max_readers=1)
    store.put_many({b"key": 1})
    opened, ended = threading.Event(), threading.Event()

    def hold_slot():
        with store.snapshot():
            opened.set()
            assert ended.wait(PATIENCE)

    holding = in_thread(hold_slot)
    assert opened.wait(PATIENCE)
    waiting = in_thread(lambda: store[b"key"])
    waiting.wait_until_in(WAITS_FOR_SLOT)
    store.close()
    with pytest.raises(lmdb.Error, match="closed"):
        waiting.result()
    ended.set()
    holding.result()


def test_a_file_that_is_opened_again_waits_for_a_slot(open_store, hold, in_thread):
    store = open_store(max_readers=2)
    store.put_many({b"key": 1})
    holder = hold(store.db_path, 0, 2, 2)
    store.env.close()
    reading = in_thread(lambda: store[b"key"])
    reading.wait_until_in(WAITS_FOR_SLOT_TO_OPEN)
    holder.kill()
    assert reading.result() == 1
