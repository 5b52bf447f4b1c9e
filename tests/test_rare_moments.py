"""Blocks and snapshots at moments that seldom come, brought about on purpose."""

import logging
import os
import sys
import threading
from contextlib import ExitStack, contextmanager

import lmdb
import pytest

from conftest import PATIENCE, needs_fork
from lmdb_object_store import BusyError, ClosedError, ConflictError, LmdbObjectStore
from moments import (
    LOOKS_BEFORE_POP,
    WAITS_FOR_LMDB,
    WAITS_FOR_READ_OF_SNAPSHOT,
    WAITS_FOR_WRITER,
    Parked,
    at_call,
    is_method,
)

CAP = 2**16
LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled


@pytest.fixture
def store(open_store):
    store = open_store(key_encoding="utf-8")
    store.put_many({"a": 1, "b": 2})
    return store


@contextmanager
def held(in_thread, manager):
    """Keep what `manager` yields open, in another thread."""
    opened, done = threading.Event(), threading.Event()
    yielded = []

    def hold():
        with manager as one:
            yielded.append(one)
            opened.set()
            assert done.wait(PATIENCE)

    worker = in_thread(hold)
    assert opened.wait(PATIENCE)
    try:
        yield yielded[0]
    finally:
        done.set()
        worker.result()


def commit_elsewhere(store, key):
    code = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1]) as env, env.begin(write=True) as txn:\n"
        "    txn.put(sys.argv[2].encode(), b'N.')\n"
    )
    assert (
        os.spawnv(
            os.P_WAIT, sys.executable, [sys.executable, "-c", code, store.db_path, key]
        )
        == 0
    )


def test_a_snapshot_that_ends_while_a_read_waits_for_another(store, in_thread):
    with ExitStack() as stack:
        snapshot = stack.enter_context(store.snapshot())
        with Parked(in_thread, "get", lambda: snapshot["a"]) as first:
            second = in_thread(lambda: snapshot["b"])
            second.wait_until_in(WAITS_FOR_READ_OF_SNAPSHOT)
            stack.close()
            assert first.release() == 1
            with pytest.raises(ClosedError):
                second.result()


def test_a_read_without_a_reader_slot_does_not_wait_for_a_block(open_store, in_thread):
    store = open_store(max_readers=1, timeout=0)
    store.put_many({b"a": 1})
    with held(in_thread, store.snapshot()), store.transaction():
        store[b"b"] = 2
        with pytest.raises(lmdb.ReadersFullError):
            in_thread(lambda: store.get(b"a")).result()


def test_an_environment_that_is_opened_again_ends_snapshots(store):
    with store.snapshot() as snapshot:
        store.env.close()
        assert store["a"] == 1
        with pytest.raises(ClosedError):
            snapshot.get("a")


@pytest.mark.parametrize("change", [{}, {"c": 3}])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_block_outlives_its_environment_unless_others_write(store, change, elsewhere):
    def block():
        with store.transaction():
            store.put_many(change)
            store.env.close()
            assert store["a"] == 1
            if elsewhere:
                commit_elsewhere(store, "d")

    if elsewhere:
        with pytest.raises(ConflictError):
            block()
    else:
        block()
    added = {"d": None} if elsewhere else change
    assert dict(store.items()) == {"a": 1, "b": 2, **added}


def test_a_snapshot_is_not_opened_inside_another_operation(store):
    with at_call("get", lambda: store.snapshot().__enter__()) as results:
        store.get("a")
    assert results == [BusyError]


def test_close_inside_another_operation_leaves_snapshots_open(store):
    with store.snapshot() as snapshot:
        with at_call("putmulti", store.close) as results:
            store.put_many({"c": 3})
        assert results == [BusyError]
        assert snapshot["a"] == 1


def test_a_store_without_locks_gives_no_snapshot(tmp_path):
    LmdbObjectStore(tmp_path).close()
    store = LmdbObjectStore(tmp_path, readonly=True, lock=False)
    with store, pytest.raises(ValueError, match="lock=False"):
        store.snapshot().__enter__()


def test_close_ends_a_snapshot_that_is_opened_while_it_waits(store, in_thread):
    with Parked(in_thread, "commit", lambda: store.put_many({"c": 3})) as writing:
        closing = in_thread(store.close)
        closing.wait_until_in(WAITS_FOR_WRITER)
        with store.snapshot() as snapshot:
            writing.release()
            closing.result()
            with pytest.raises(ClosedError):
                snapshot.get("a")


def test_a_finalizer_reads_a_snapshot_in_the_middle_of_a_read(store, in_thread):
    with store.snapshot() as snapshot:
        with at_call("get", lambda: snapshot["b"]) as results:  # nobody else uses it
            assert store["a"] == 1
        assert results == [2]
        assert in_thread(lambda: snapshot["a"]).result() == 1
        with at_call("get", lambda: snapshot["b"]) as results:  # now it has a lock
            assert snapshot["a"] == 1
        assert results == [2]


def test_a_finalizer_can_not_wait_for_a_snapshot_that_others_use(store, in_thread):
    with store.snapshot() as snapshot:
        assert in_thread(lambda: snapshot["a"]).result() == 1
        with at_call("begin", lambda: snapshot["b"]) as results:  # has the buffer lock
            store.get_many(["a"])
        assert results == [2]
        with (
            Parked(in_thread, "get", lambda: snapshot["a"]),
            at_call("begin", lambda: snapshot["b"]) as results,
        ):
            store.get_many(["b"])
        assert results == [BusyError]
    with held(in_thread, store.snapshot()) as snapshot:
        with at_call("get", lambda: snapshot["b"]) as results:
            assert store["a"] == 1
        assert results == [BusyError]
        assert snapshot["b"] == 2


def test_a_lost_block_lets_the_exception_of_its_body_pass(store, in_thread):
    def nested():
        with store.transaction():
            yield

    def block():
        with store.transaction():
            generator = nested()
            next(generator)
            in_thread(generator.close).result()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    store["c"] = 3
    assert dict(store.items()) == {"a": 1, "b": 2, "c": 3}


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_leaves_the_block_of_another_thread_alone(store, in_thread):
    with held(in_thread, store.transaction()):
        child = os.fork()
        if child == 0:
            os._exit(0)  # here the block's thread has ended
        assert os.waitpid(child, 0)[1] == 0
        assert store["a"] == 1
    store["c"] = 3
    assert store["c"] == 3


def test_a_block_reads_a_large_value(tmp_path):
    with LmdbObjectStore(tmp_path) as store:
        store[b"large"] = [LARGE]
    with LmdbObjectStore(tmp_path) as store, store.transaction():
        for _ in range(2):
            assert store[b"large"] == [LARGE]


def test_a_pop_in_a_block_takes_what_a_signal_handler_has_put(store):
    def put():
        store["a"] = 10

    with store.transaction(), at_call("begin", put, LOOKS_BEFORE_POP):
        assert store.pop("a") == 10
    assert "a" not in store


def test_a_put_while_a_block_begins_in_a_store_near_its_cap(open_store):
    store = open_store("capped", key_encoding="utf-8", map_size=CAP, max_map_size=CAP)
    at_begin = at_call("begin", lambda: store.put("a", 1), WAITS_FOR_LMDB)
    with at_begin as results, store.transaction():
        store["b"] = store["a"] + 1
    assert results == [None]
    assert dict(store) == {"a": 1, "b": 2}


def test_growth_is_logged_when_the_writer_is_free_again(
    open_store, in_thread, monkeypatch
):
    store = open_store("growing", key_encoding="utf-8", map_size=2**16)
    others = []
    logger = logging.getLogger("lmdb_object_store")

    def log(*_):  # as a logging handler may, lets another thread write
        writing = in_thread(lambda: store.put_many({"c": 3}))
        others.append(writing.result())

    monkeypatch.setattr(logger, "log", log)
    grown = []

    def enter_block():  # inside the commit that is tried again after the growth
        with pytest.raises(BusyError), store.transaction():
            pass
        grown.append(store)

    def hook(frame, event, function):
        if event == "c_call" and is_method(function, "set_mapsize"):
            sys.setprofile(None)
            stack.enter_context(at_call("putmulti", enter_block))

    with ExitStack() as stack:
        sys.setprofile(hook)
        store.put_many({"large": LARGE})
    assert grown == [store]
    assert others == [None]
    assert store["c"] == 3


def test_who_waits_long_for_a_block_tells_so(store, in_thread):
    told = threading.Event()
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())
            told.set()

    logger = logging.getLogger("lmdb_object_store")
    handler = Handler()
    logger.addHandler(handler)
    try:
        with held(in_thread, store.transaction()):
            waiting = in_thread(lambda: store.put("c", 3))
            assert told.wait(PATIENCE)
        waiting.result()
    finally:
        logger.removeHandler(handler)
    assert "waits for a transaction block" in messages[0]
    assert store["c"] == 3
