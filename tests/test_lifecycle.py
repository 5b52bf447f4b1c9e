"""Closing, in all ways: close(), `with`, garbage collection, a failing constructor."""

import contextlib
import gc
import logging
import pickle
import subprocess
import sys
import threading
import warnings
from typing import ClassVar

import lmdb
import pytest

from conftest import PATIENCE
from lmdb_object_store import ClosedError, LmdbObjectStore, LostWritesError

CAP = 2**20
LOST = r"^Final flush failed during close\(\)$"
TOO_MUCH = {b"key %d" % n: bytes(2**15) for n in range(64)}  # 2 MiB


def overfill(store):
    """Make pending what does not fit below the cap of `store`."""
    for key, value in TOO_MUCH.items():
        store[key] = value


def lost(store):
    return {key: pickle.loads(raw) for key, raw in store.write_buffer.items()}


def errors(caplog):
    return [r for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.fixture
def overfull(open_store):
    """Return a store whose final flush is going to fail."""
    store = open_store(max_map_size=CAP)
    store[b"flushed"] = "flushed"
    store.flush()
    overfill(store)
    return store


# close()


def test_close_writes_what_is_pending(open_store):
    store = open_store()
    store.put_many({b"gone": 0, b"stays": 1})
    store[b"new"] = 2
    store.delete(b"gone")
    store.close()
    assert store.closed
    assert not store.write_buffer
    assert open_store().get_many([b"gone", b"stays", b"new"]) == (
        {b"stays": 1, b"new": 2},
        [b"gone"],
    )


@pytest.mark.parametrize("strict", [False, True])
def test_close_again_does_nothing(open_store, strict):
    store = open_store()
    assert not store.closed
    store.close(strict=strict)
    store.close(strict=strict)
    other = open_store()
    store.close(strict=strict)
    other[b"key"] = 1
    other.flush()


def test_close_by_several_threads_at_once(open_store, in_thread):
    store = open_store()
    store[b"key"] = 1
    start = threading.Barrier(4)

    def close():
        start.wait(PATIENCE)
        store.close(strict=True)
        return store.closed

    workers = [in_thread(close) for _ in range(4)]
    assert [worker.result() for worker in workers] == [True] * 4
    assert open_store()[b"key"] == 1


def test_failed_final_flush_is_logged(overfull, caplog):
    overfull.close()
    [record] = errors(caplog)
    assert record.name == "lmdb_object_store"
    assert record.levelno == logging.ERROR
    assert overfull.db_path in record.getMessage()
    assert f"{len(TOO_MUCH)} pending writes are lost" in record.getMessage()
    assert isinstance(record.exc_info[1], lmdb.MapFullError)


def test_failed_final_flush_raises_with_strict(overfull):
    with pytest.raises(RuntimeError, match=LOST) as info:
        overfull.close(strict=True)
    assert info.type is LostWritesError
    assert isinstance(info.value.__cause__, lmdb.MapFullError)


@pytest.mark.parametrize("strict", [False, True])
def test_failed_close_closes_and_keeps_what_was_lost(overfull, open_store, strict):
    try:
        overfull.close(strict=strict)
    except LostWritesError:
        assert strict
    assert overfull.closed
    assert lost(overfull) == TOO_MUCH
    overfull.close(strict=strict)
    assert lost(overfull) == TOO_MUCH
    again = open_store()
    assert again[b"flushed"] == "flushed"
    again.put_many(lost(overfull))
    assert again.get_many(TOO_MUCH) == (TOO_MUCH, [])


def test_cap_raised_before_close_loses_nothing(overfull, open_store):
    with pytest.raises(lmdb.MapFullError):
        overfull.flush()
    overfull.max_map_size = None
    overfull.close(strict=True)
    assert open_store().get_many(TOO_MUCH) == (TOO_MUCH, [])


@pytest.mark.parametrize("state", ["closed", "failed to close", "read-only, closed"])
@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.put(b"key 1", 1),
        lambda store: store.__setitem__(b"key 1", 1),
        lambda store: store.put_many({b"key 1": 1}),
        lambda store: store.put_many([]),
        lambda store: store.get(b"key 1"),
        lambda store: store[b"key 1"],
        lambda store: store.get_many([b"key 1"]),
        lambda store: store.get_many([]),
        lambda store: store.exists(b"key 1"),
        lambda store: store.exists(b"key 1", flush=True),
        lambda store: b"key 1" in store,
        lambda store: store.delete(b"key 1"),
        lambda store: store.__delitem__(b"key 1"),
        lambda store: store.flush(),
    ],
)
def test_use_after_close_says_closed(open_store, state, use):
    store = open_store(max_map_size=CAP)
    if state == "failed to close":
        overfill(store)
    store.close()
    if state == "read-only, closed":
        store = open_store(readonly=True)
        store.close()
    with pytest.raises(lmdb.Error, match="closed") as info:
        use(store)
    assert info.type is ClosedError


class Watched:
    """An environment that notes when it is synced and closed."""

    def __init__(self, env, calls):
        self._env = env
        self._calls = calls

    def __getattr__(self, name):
        return getattr(self._env, name)

    def sync(self, force=False):
        self._calls.append(f"sync({force})")
        self._env.sync(force)

    def close(self):
        self._calls.append("close")
        self._env.close()


@pytest.fixture
def calls(monkeypatch):
    """Note the syncs and closes of environments opened from here on."""
    calls = []
    real_open = lmdb.open
    monkeypatch.setattr(
        lmdb, "open", lambda *args, **kwargs: Watched(real_open(*args, **kwargs), calls)
    )
    return calls


@pytest.mark.parametrize(
    ("options", "syncs"),
    [
        ({"sync": False}, ["sync(True)"]),
        ({"metasync": False}, ["sync(True)"]),
        ({"writemap": True, "map_async": True, "lib_version": 0}, ["sync(True)"]),
        ({}, ["sync(True)"] if sys.platform == "darwin" else []),
    ],
    ids=str,
)
@pytest.mark.parametrize("written", [True, False])
def test_close_syncs_what_is_not_durable_yet(
    open_store, calls, options, syncs, written
):
    store = open_store(**options)
    if written:
        store[b"a"] = 1
    calls.clear()
    store.close()
    assert calls == [*(syncs if written else []), "close"]


def test_close_syncs_what_was_written_by_the_environment_itself(open_store, calls):
    store = open_store(sync=False)
    with store.env.begin(write=True) as txn:
        txn.put(b"a", b"1")
    calls.clear()
    store.close()
    assert calls == ["sync(True)", "close"]


def test_close_syncs_though_the_final_flush_fails(open_store, calls):
    store = open_store(max_map_size=CAP, sync=False)
    store.put_many({b"flushed": "flushed"})
    overfill(store)
    calls.clear()
    store.close()
    assert calls == ["sync(True)", "close"]


@pytest.mark.parametrize(
    ("cap", "logged", "use"),
    [
        (CAP, "store.close()  # fails", "store.close()"),
        (None, "store.flush()  # grows", "store.flush()"),
    ],
)
def test_logging_handler_may_wait_for_the_store_that_logs(tmp_path, cap, logged, use):
    # The main thread is in a logging handler, holds its lock and is about to use
    # the store. The other thread is in the store and has something to log: if it
    # held a lock of the store now, both would wait for ever.
    script = f"""
import logging, threading
from lmdb_object_store import LmdbObjectStore
handling, store_logs = threading.Event(), threading.Event()

class Handler(logging.Handler):
    def emit(self, record):  # under the handler's own lock, as always
        if record.name == "application":
            handling.set()
            store_logs.wait()
            {use}

def note(record):
    store_logs.set()
    return True

logging.basicConfig(level=logging.INFO, handlers=[Handler()])
logging.getLogger("lmdb_object_store").addFilter(note)

def other():
    handling.wait()
    {logged}

store = LmdbObjectStore("db", map_size={CAP}, max_map_size={cap})
for n in range(64):
    store[b"%d" % n] = bytes(2**15)
thread = threading.Thread(target=other, daemon=True)
thread.start()
logging.getLogger("application").error("hello")
thread.join()
store.close()
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, timeout=PATIENCE, check=True)


# with


def test_leaving_a_with_block_closes(open_store):
    store = open_store()
    with store as entered:
        assert entered is store
        store[b"key"] = 1
    assert store.closed
    assert open_store()[b"key"] == 1


def test_close_inside_a_with_block(open_store):
    with open_store() as store:
        store.close()
    assert store.closed


def test_with_block_raises_on_lost_writes(overfull):
    with pytest.raises(RuntimeError, match=LOST) as info, overfull:
        pass
    assert info.type is LostWritesError
    assert isinstance(info.value.__cause__, lmdb.MapFullError)
    assert overfull.closed
    assert lost(overfull) == TOO_MUCH


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_exception_of_the_with_block_goes_on(overfull, caplog, error):
    raised = error()
    with pytest.raises(error) as info, overfull:
        raise raised
    assert info.value is raised
    assert overfull.closed
    assert lost(overfull) == TOO_MUCH
    [record] = errors(caplog)
    assert "pending writes are lost" in record.getMessage()


def test_exception_of_the_with_block_loses_no_writes(open_store):
    store = open_store()
    store[b"key"] = 1
    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError
    assert open_store()[b"key"] == 1


# Garbage collection


class Cycle:
    """Keeps a store in a reference cycle."""

    def __init__(self, store):
        self.store = store
        self.me = self


def drop(holder, in_thread):
    holder.clear()


def drop_in_a_cycle(holder, in_thread):
    holder[0] = Cycle(holder[0])
    holder.clear()
    gc.collect()


def drop_in_another_thread(holder, in_thread):
    in_thread(holder.clear).result()


def drop_at_the_end_of_a_thread(holder, in_thread):
    local = threading.local()

    def take():
        local.store = holder.pop()

    in_thread(take).result()


def drop_in_an_exception(holder, in_thread):
    def use(store):
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        use(holder.pop())


@pytest.mark.parametrize(
    "drop_it",
    [
        drop,
        drop_in_a_cycle,
        drop_in_another_thread,
        drop_at_the_end_of_a_thread,
        drop_in_an_exception,
    ],
)
def test_dropped_store_is_flushed_and_closed(tmp_path, open_store, in_thread, drop_it):
    holder = [LmdbObjectStore(tmp_path / "db")]
    holder[0][b"key"] = 1
    with pytest.warns(ResourceWarning, match="db' was not closed"):
        drop_it(holder, in_thread)
    assert open_store()[b"key"] == 1


def test_flush_that_fails_for_a_dropped_store_is_logged(tmp_path, open_store, caplog):
    store = LmdbObjectStore(tmp_path / "db", max_map_size=CAP)
    store.put_many({b"flushed": "flushed"})
    overfill(store)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
    [record] = errors(caplog)
    assert f"{len(TOO_MUCH)} pending writes are lost" in record.getMessage()
    assert open_store().get_many([b"flushed", *TOO_MUCH])[0] == {b"flushed": "flushed"}


class DropsItsStore:
    holder: ClassVar = []

    def __init__(self, size):
        self.content = bytes(size)

    def __setstate__(self, state):
        self.holder.clear()
        gc.collect()
        vars(self).update(state)


@pytest.mark.parametrize("size", [0, 2**20])
def test_store_dropped_by_its_own_unpickling_finishes_the_read(
    tmp_path, open_store, size
):
    value = DropsItsStore(size)
    value.holder.append(LmdbObjectStore(tmp_path / "db"))
    value.holder[0].put_many({b"value": value})
    value.holder[0][b"pending"] = 1
    with pytest.warns(ResourceWarning, match="was not closed"):
        assert value.holder[0].get(b"value").content == value.content
    assert not value.holder
    assert open_store()[b"pending"] == 1


def test_store_dropped_in_the_middle_of_another_ones_put(tmp_path, open_store):
    value = DropsItsStore(1)
    dropped = LmdbObjectStore(tmp_path / "dropped")
    dropped[b"key"] = 1
    value.holder.append(dropped)
    del dropped
    store = open_store("other")
    store[b"value"] = value
    with pytest.warns(ResourceWarning, match="dropped' was not closed"):
        assert store[b"value"].content == value.content
    assert open_store("dropped")[b"key"] == 1


@pytest.mark.parametrize("fails", [False, True])
def test_closed_store_is_dropped_without_a_word(tmp_path, caplog, fails):
    store = LmdbObjectStore(tmp_path / "db", max_map_size=CAP)
    if fails:
        overfill(store)
    store.close()
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del store
        gc.collect()
    assert not caught
    assert not caplog.records


# A failing constructor


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, ValueError),
        ({"batch_bytes": 0}, ValueError),
        ({"key_encoding": "no-such-codec"}, ValueError),
        ({"max_map_size": 2**16, "map_size": 2**20}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"max_spare_txns": 1}, ValueError),
        ({"no_such_option": 1}, TypeError),
        ({"max_dbs": "many"}, TypeError),
        ({"readonly": True}, lmdb.Error),
        ({"create": False}, lmdb.Error),
    ],
)
def test_failing_constructor_leaves_nothing_open(tmp_path, open_store, options, error):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(error):
            LmdbObjectStore(tmp_path / "db", **options)
        gc.collect()
    assert not caught
    assert not (tmp_path / "db" / "data.mdb").exists()
    store = open_store()
    store[b"key"] = 1
    store.close(strict=True)


def test_file_that_is_no_database_is_refused(tmp_path, open_store):
    (tmp_path / "db").mkdir()
    data = tmp_path / "db" / "data.mdb"
    data.write_bytes(b"not LMDB" * 2**12)
    with pytest.raises(lmdb.InvalidError):
        LmdbObjectStore(tmp_path / "db")
    assert data.read_bytes() == b"not LMDB" * 2**12
    data.unlink()
    open_store().close(strict=True)


def test_second_constructor_that_fails_leaves_the_first_alone(open_store):
    store = open_store()
    store[b"key"] = 1
    with pytest.raises(ValueError, match="batch_size"):
        open_store(batch_size=0)
    assert store[b"key"] == 1
    store.close(strict=True)


def test_a_closed_store_can_not_be_entered(open_store):
    store = open_store()
    store.close()
    with pytest.raises(ClosedError):
        store.__enter__()
