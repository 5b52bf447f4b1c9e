"""What puts an environment out of action, or a map out of date, and how it goes on."""

from __future__ import annotations

import subprocess
import sys
import threading

import lmdb
import pytest

from conftest import PATIENCE
from lmdb_object_store import (
    BusyError,
    ClosedError,
    GrowthError,
    LmdbObjectStore,
    SizeError,
)
from moments import SIZES_RECORD, WAITS_FOR_WRITER, Parked, limit_values

LARGE = b"x" * 2**18


class Nested:
    """A large value that reads another one when it is unpickled."""

    store = None

    def __init__(self, inner):
        self.state = {"inner": inner, "ballast": [LARGE]}

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        self.inner = state["inner"] and Nested.store.get(state["inner"])


@pytest.fixture
def nested(open_store):
    """Open a store with few reader slots and a chain of values, one in another."""
    store = Nested.store = open_store(max_readers=2)
    for number in range(5):
        store[b"%d" % number] = Nested(b"%d" % (number - 1) if number else b"")
    store.flush()
    store.get(b"0")  # from now on large values are expected, and read in pieces
    yield store
    Nested.store = None


def test_large_values_in_each_other_need_no_more_slots_than_there_are(nested):
    value = nested[b"4"]
    for _ in range(4):
        value = value.inner
    assert value.inner == b""


def test_slots_that_others_hold_are_told_of(open_store):
    store = open_store(max_readers=1, timeout=0)
    store[b"k"] = 1
    store.flush()
    with store.env.begin(), pytest.raises(lmdb.ReadersFullError):
        store.get(b"k")
    assert store.get(b"k") == 1


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_growth_gives_up_on_a_read_that_does_not_end(open_store, in_thread, timeout):
    store = open_store(map_size=2**16, timeout=timeout)
    store[b"k"] = 1
    store.flush()
    with Parked(in_thread, "get", lambda: store.get(b"k")) as reader:
        store[b"large"] = LARGE
        with pytest.raises(GrowthError, match="does not end"):
            store.flush()
        assert in_thread(lambda: store.get(b"k")).result() == 1  # others read on
        with pytest.raises(BusyError):
            store.close()
        assert store.write_buffer.keys() == {b"large"}
        assert reader.release() == 1
    store.close()
    assert open_store(map_size=2**16).get(b"large") == LARGE


def test_a_read_that_ends_late_lets_growth_go_on(open_store, in_thread):
    store = open_store(map_size=2**16)
    store[b"k"] = 1
    store.flush()
    with Parked(in_thread, "get", lambda: store.get(b"k")) as reader:
        store[b"large"] = LARGE
        leave = threading.Timer(0.2, reader.leave)
        leave.start()
        store.flush()
        leave.join(PATIENCE)
        assert reader.release() == 1
    assert store.get(b"large") == LARGE


@pytest.mark.parametrize("read", ["get", "get_many", "exists"])
def test_damage_is_told_of(open_store, tmp_path, read):
    store = open_store()
    store.put_many((b"%04d" % number, number) for number in range(1000))
    with (tmp_path / "db" / "data.mdb").open("r+b") as file:
        size = file.seek(0, 2)
        pages = store.env.stat()["psize"] * 2  # the two meta pages stay
        file.seek(pages)
        file.write(bytes(size - pages))
    with pytest.raises(lmdb.Error):
        getattr(store, read)([b"0001"] if read == "get_many" else b"0001")


def test_an_environment_that_the_user_has_closed_is_opened_again(open_store):
    store = open_store()
    store[b"k"] = 1
    store.flush()
    store.env.close()
    assert store.get(b"k") == 1


def test_growth_fails_while_the_user_writes_and_works_afterwards(open_store, in_thread):
    store = open_store(map_size=2**16)
    store[b"k"] = 1
    store.flush()
    store[b"large"] = LARGE
    # A write transaction of the user's on another thread, begun between the
    # attempt to write and the growth of the map.
    with Parked(in_thread, "set_mapsize", store.flush) as writer:
        with store.env.begin(write=True):
            writer.leave()
            with pytest.raises(GrowthError, match="write transaction"):
                writer.release()
        assert store.get(b"k") == 1
    store.flush()
    assert store.get(b"large") == LARGE


def test_a_value_that_lmdb_cannot_store_is_refused(open_store, monkeypatch):
    store = open_store()
    limit_values(monkeypatch, store, 1000)
    for write in (store.put, lambda key, value: store.put_many([(key, value)])):
        with pytest.raises(SizeError, match="below 4 GiB"):
            write(b"k", bytes(1000))
    assert b"k" not in store


def test_threads_that_meet_a_dead_environment_open_it_once(
    open_store, in_thread, caplog
):
    store = open_store()
    store[b"k"] = 1
    store.flush()
    store[b"pending"] = 2
    with Parked(in_thread, "begin", store.flush) as writer:
        store.env.close()
        readers = [in_thread(lambda: store.get(b"k")) for _ in range(2)]
        for reader in readers:
            reader.wait_until_in(WAITS_FOR_WRITER)
        writer.release()
        assert [reader.result() for reader in readers] == [1, 1]
    assert caplog.text.count("reopened") == 1


def grow_elsewhere(path):
    grow = (
        "import lmdb, sys\n"
        "env = lmdb.open(sys.argv[1], map_size=2**26)\n"
        "with env.begin(write=True) as txn: txn.put(b'large', bytes(2**20))"
    )
    command = [sys.executable, "-c", grow, path]
    subprocess.run(command, check=True, timeout=PATIENCE)


def test_a_map_grown_elsewhere_is_adopted_unless_a_read_does_not_end(
    open_store, in_thread
):
    store = open_store(map_size=2**16, timeout=0)
    store[b"k"] = 1
    store.flush()
    with Parked(in_thread, "get", lambda: store.get(b"k")) as reader:
        grow_elsewhere(store.db_path)
        with pytest.raises(BusyError, match="does not end"):
            store.get(b"k")
        assert reader.release() == 1
    assert store.get(b"k") == 1


@pytest.mark.parametrize("ballast", [b"", [LARGE]], ids=["small", "large"])
def test_get_many_survives_several_growths(open_store, in_thread, ballast):
    values = {b"%d" % n: Waits(n, ballast if n > 990 else b"") for n in range(1000)}
    store = open_store(map_size=2**16, sync=False)
    store.put_many(values)
    store.get(b"999")  # from now on large values are expected, and read in pieces
    Waits.arrived, Waits.leave = threading.Event(), threading.Event()
    reader = in_thread(lambda: store.get_many(values))
    assert Waits.arrived.wait(PATIENCE)
    for _ in range(2):
        size = store.env.info()["map_size"]
        store.put_many({b"grow": bytes(size)})
        assert store.env.info()["map_size"] > size
    Waits.leave.set()
    found, not_found = reader.result()
    assert not_found == []
    assert [found[key].number for key in values] == list(range(1000))
    assert found[b"999"].ballast == ballast


class Waits:
    arrived = leave = threading.Event()
    leave.set()

    def __init__(self, number, ballast):
        self.number = number
        self.ballast = ballast

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.arrived.set()
        assert self.leave.wait(PATIENCE)


def fill_to_the_brim(env):
    for count in range(1000, 0, -1):
        items = [(b"%04d" % number, bytes(1500)) for number in range(count)]
        try:
            with env.begin(write=True) as txn:
                txn.cursor().putmulti(items)
        except lmdb.MapFullError:
            continue
        return


def test_a_map_that_others_have_filled_to_the_brim_says_so(open_store):
    store = open_store(map_size=2**18, max_map_size=2**18)
    fill_to_the_brim(store.env)
    store.delete(b"0001")
    with pytest.raises(GrowthError, match="max_map_size"):
        store.flush()
    assert store.write_buffer == {b"0001": None}
    store.max_map_size = 2**19
    store.flush()
    assert b"0001" not in store


def test_a_put_is_refused_if_the_store_closes_just_before_it_is_buffered(open_store):
    store = open_store(batch_bytes=300)
    store.put(b"k", bytes(150))

    def handler(frame, event, _):  # like one for a signal, at a chosen moment
        if event == "return" and frame.f_code.co_name == SIZES_RECORD:
            sys.setprofile(None)
            store.close()

    sys.setprofile(handler)
    try:
        with pytest.raises(ClosedError):  # it takes a closer look at the size
            store.put(b"k", b"x" * 150)
    finally:
        sys.setprofile(None)
    assert store.closed
    assert open_store().get(b"k") == bytes(150)


class ClosesItsStore:
    def __getstate__(self):
        return {"ballast": 1}

    def __setstate__(self, state):
        try:
            with Nested.store:
                raise LookupError("of the block")
        except LookupError as error:
            self.error = error


def test_the_error_of_a_block_goes_on_though_the_store_cannot_be_closed(
    open_store, caplog
):
    store = Nested.store = open_store()
    store[b"k"] = ClosesItsStore()
    store.flush()
    assert str(store[b"k"].error) == "of the block"
    assert "Could not close" in caplog.text
    assert not store.closed
    Nested.store = None


@pytest.mark.parametrize("times", [1, 10**9])
def test_a_file_that_grows_while_it_is_opened_is_opened_again(
    tmp_path, monkeypatch, times
):
    opened = []

    def open_or_fail(*args, **options):
        opened.append(args)
        if len(opened) <= times:
            raise lmdb.MapResizedError
        return real_open(*args, **options)

    real_open = lmdb.open
    monkeypatch.setattr(lmdb, "open", open_or_fail)
    if times > 1:
        with pytest.raises(lmdb.MapResizedError):
            LmdbObjectStore(tmp_path)
    else:
        with LmdbObjectStore(tmp_path) as store:
            store[b"k"] = 1
        assert len(opened) == 2


def test_two_reads_that_meet_the_same_error(open_store, in_thread):
    store = open_store()
    store.put_many({b"key": 1})
    store.env.close()
    with Parked(in_thread, "info", lambda: store[b"key"]) as first:
        second = in_thread(lambda: store[b"key"])
        second.wait_until_in(WAITS_FOR_WRITER)
        assert first.release() == second.result() == 1
