"""Waits for others: each ends after `timeout` seconds, and is logged before that."""

import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from conftest import PATIENCE, logging_to
from lmdb_object_store import BusyError, LmdbObjectStore
from moments import WAITS_FOR_BLOCK, Parked, notice_soon
from test_readers import hold  # noqa: F401 (a fixture)

MIB = 2**20


@pytest.fixture
def store(open_store):
    store = open_store(key_encoding="utf-8", map_size=MIB, sync=False)
    store.put_many({"a": 1, "b": 2})
    return store


@pytest.fixture
def in_another(in_thread):
    """Keep a context manager open in another thread."""

    @contextmanager
    def in_another(manager):
        entered, leave = threading.Event(), threading.Event()

        def work():
            with manager:
                entered.set()
                assert leave.wait(PATIENCE)
            return threading.get_ident()

        thread = in_thread(work)
        assert entered.wait(PATIENCE)
        try:
            yield
        finally:
            leave.set()
            thread.result()

    return in_another


@pytest.fixture
def next_warning(monkeypatch):
    """Return the next line that the library logs, without a wait of a second before."""
    lines = queue.Queue()
    notice_soon(monkeypatch)
    with logging_to(lambda record: lines.put(record.getMessage()), logging.WARNING):
        yield lambda: lines.get(timeout=PATIENCE)


# A transaction block of another thread

WRITES = {
    "put": lambda store: [store.put(str(number), 0) for number in range(2)],
    "delete": lambda store: store.delete("a"),
    "put_many": lambda store: store.put_many({"c": 3}),
    "del": lambda store: store.__delitem__("a"),
    "pop": lambda store: store.pop("a"),
    "setdefault": lambda store: store.setdefault("c", 3),
    "clear": lambda store: store.clear(),
    "flush": lambda store: store.flush(),
    "transaction": lambda store: store.transaction().__enter__(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_waits_so_long_for_a_block(store, in_another, write):
    store.timeout = 0.05
    with in_another(store.transaction()):
        with pytest.raises(BusyError, match=r"block .* thread \d+ .* \d\.\d s ago"):
            write(store)
        assert dict(store) == {"a": 1, "b": 2}
    store.timeout = PATIENCE
    write(store)


def test_a_block_that_waits_for_a_thread_that_puts(store):
    store.timeout = 0.05
    with ThreadPoolExecutor(1) as pool, store.transaction():
        store["a"] += 1
        putting = pool.submit(store.put, "c", 3)
        with pytest.raises(BusyError, match="Don't wait in a block for a thread"):
            putting.result(PATIENCE)
        store["b"] += 1
    store["c"] = 3
    assert dict(store) == {"a": 2, "b": 3, "c": 3}


def test_writers_of_a_queue_wait_side_by_side(store, in_another, in_thread):
    store.timeout = PATIENCE
    with in_another(store.transaction()):
        first = in_thread(lambda: store.put("c", 3))
        first.wait_until_in(WAITS_FOR_BLOCK)
        store.timeout = 0
        others = [in_thread(lambda: store.put("d", 4)) for _ in range(3)]
    first.result()
    for other in others:  # the block has ended before their turn came
        other.result()
    assert dict(store) == {"a": 1, "b": 2, "c": 3, "d": 4}


def test_a_wait_for_a_block_is_logged(store, in_another, in_thread, next_warning):
    with in_another(store.transaction()):
        writing = in_thread(lambda: store.put("c", 3))
        assert "a write waits for a transaction block" in next_warning()
    writing.result()


# The other waits


def test_a_wait_for_a_snapshot_is_logged(store, in_another, in_thread, next_warning):
    size = store.env.info()["map_size"]
    with in_another(store.snapshot()):
        writing = in_thread(lambda: store.put_many({"c": bytes(size)}))
        assert "growth waits for a snapshot that thread" in next_warning()
    writing.result()


def test_a_wait_for_a_read_is_logged(store, in_thread, next_warning):
    size = store.env.info()["map_size"]
    with Parked(in_thread, "get", lambda: store["a"]) as reading:
        writing = in_thread(lambda: store.put_many({"c": bytes(size)}))
        assert "waits for a read to end" in next_warning()
        assert reading.release() == 1
    writing.result()


def test_a_wait_for_a_reader_slot_is_logged(
    open_store, in_another, in_thread, next_warning
):
    store = open_store(max_readers=1)
    store[b"a"] = 1
    with in_another(store.snapshot()):
        reading = in_thread(lambda: store[b"a"])
        assert "a read waits for a free reader slot" in next_warning()
    assert reading.result() == 1


def test_a_wait_for_a_reader_slot_to_open_is_logged(
    open_store,
    hold,  # noqa: F811
    in_thread,
    next_warning,
):
    store = open_store(max_readers=2)
    store.put_many({b"a": 1})
    holders = [hold(store.db_path, 0, 1, 2) for _ in range(2)]
    store.close()
    opening = in_thread(lambda: LmdbObjectStore(store.db_path))
    assert "opening waits for a free reader slot" in next_warning()
    for holder in holders:
        holder.kill()
    with opening.result() as store:
        assert store[b"a"] == 1


def test_a_wait_for_a_close_is_logged(store, open_store, in_thread, next_warning):
    store["c"] = 3
    with Parked(in_thread, "sync", store.close):
        opening = in_thread(lambda: open_store(key_encoding="utf-8"))
        assert "opening waits for the end of a close" in next_warning()
    assert opening.result()["c"] == 3
