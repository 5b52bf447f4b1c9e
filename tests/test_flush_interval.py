"""Pending writes that are flushed by themselves, after `flush_interval` seconds."""

import gc
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import lmdb
import pytest

from conftest import (
    PATIENCE,
    eventually,
    hold_up_writers,
    logging_to,
    needs_fork,
    needs_sigterm,
)
from lmdb_object_store import GrowthError, LmdbObjectStore
from moments import Parked, at_call, every_step, handling, is_writing, outcome, part_of

SOON = 0.01  # seconds
NEVER = 10**6
MIB = 2**20


def on_disk(store):
    """How many entries the file has."""
    with store.env.begin() as txn:
        return txn.stat()["entries"]


def put_too_much(store):
    """Put 2 MiB that are flushed soon, but not before all of that is pending."""
    store.flush_interval = NEVER
    store.update({b"%d" % n: bytes(MIB // 8) for n in range(16)})
    store.flush_interval = SOON


def flushers():
    """The threads that flush."""
    threads = threading.enumerate()
    return [one for one in threads if one.name.startswith("lmdb-object-store")]


# The promise

SERVICE = """
import sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore(sys.argv[1], key_encoding="utf-8")
for n in range(50):
    store[f"key {n}"] = n
print("put", flush=True)
sys.stdin.read()
"""


@needs_sigterm
def test_a_service_that_is_terminated_has_lost_nothing_after_the_interval(
    tmp_path, open_store
):
    path = tmp_path / "db"
    command = [sys.executable, "-c", SERVICE, path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as service:
        assert service.stdout.readline() == "put\n"
        # As another process sees them, too, that has the file open since before.
        reader = open_store(readonly=True)
        eventually(lambda: len(reader) == 50)
        service.terminate()
        assert service.wait(PATIENCE) == -signal.SIGTERM
    assert {key.decode(): value for key, value in reader.items()} == {
        f"key {n}": n for n in range(50)
    }


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.put(b"a", 2),
        lambda store: store.delete(b"a"),
        lambda store: store.pop(b"a"),
        lambda store: store.popitem(),
        lambda store: store.setdefault(b"b", 2),
        lambda store: store.update({b"a": 2, b"b": 3}),
    ],
)
def test_every_write_into_the_buffer_is_flushed(open_store, write):
    store = open_store(flush_interval=SOON)
    store.put_many({b"a": 1})
    for _ in range(3):  # also after a time without a pending write
        write(store)
        expected = dict(store)
        eventually(lambda: not store.write_buffer)
        with store.env.begin() as txn:
            assert txn.stat()["entries"] == len(expected)
        store.put_many({b"a": 1})
        store.delete_many([b"b"])


def test_a_write_in_a_signal_handler_or_finalizer_is_flushed(open_store):
    store = open_store(flush_interval=SOON)
    store.put_many({b"a": 1})
    for method in "begin", "get":
        for number in range(2):
            key = f"{method} {number}".encode()
            with at_call(method, lambda key=key: store.put(key, 1)):
                store.get(b"a")
            store[key + b", after"] = 1  # the first of all starts the thread
            eventually(lambda: not store.write_buffer)
    assert len(store) == 9


def test_several_stores_have_intervals_of_their_own(open_store):
    soon, late, never = (
        open_store(name, flush_interval=interval)
        for name, interval in (("soon", SOON), ("late", NEVER), ("never", None))
    )
    for _ in range(3):
        for store in late, never, soon:
            store.put(os.urandom(8), 1)
        eventually(lambda: not soon.write_buffer)
    assert [on_disk(store) for store in (soon, late, never)] == [3, 0, 0]
    assert len(flushers()) == 1


def test_the_interval_can_be_changed(open_store):
    store = open_store(flush_interval=None)
    other = open_store("other", flush_interval=SOON)
    assert store.flush_interval is None
    store[b"a"] = 1
    store.flush_interval = NEVER
    other[b"a"] = 1
    eventually(lambda: not other.write_buffer)
    assert store.write_buffer
    store.flush_interval = SOON
    assert store.flush_interval == SOON
    eventually(lambda: not store.write_buffer)
    store[b"b"] = 1
    store.flush_interval = None
    store.flush()
    store[b"c"] = 1
    for n in range(3):
        other[b"%d" % n] = 1
        eventually(lambda: not other.write_buffer)
    assert list(store.write_buffer) == [b"c"]


def test_all_stores_of_a_file_have_one_interval(open_store, tmp_path):
    with LmdbObjectStore(tmp_path / "db") as store:
        assert store.flush_interval == 1.0
        with LmdbObjectStore(tmp_path / "db", flush_interval=NEVER):
            assert store.flush_interval == NEVER
        with LmdbObjectStore(tmp_path / "db"):  # a default asks for nothing
            assert store.flush_interval == NEVER
        with LmdbObjectStore(tmp_path / "db", flush_interval=None):
            assert store.flush_interval is None
        store.flush_interval = 5
    assert store.flush_interval == 5
    with pytest.raises(ValueError, match="flush_interval must be more than 0"):
        store.flush_interval = -1


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1", True, []])
def test_an_interval_that_is_none_is_refused(tmp_path, value):
    kind = TypeError if isinstance(value, (str, bool, list)) else ValueError
    with pytest.raises(kind, match="flush_interval must be"):
        LmdbObjectStore(tmp_path / "db", flush_interval=value)
    assert not (tmp_path / "db").exists()


# Failures


def test_a_flush_that_fails_is_logged_and_tried_again(open_store, errors):
    store = open_store(max_map_size=MIB)
    store.put_many({b"before": 1})
    put_too_much(store)
    texts = [errors.get(timeout=PATIENCE).getMessage() for _ in range(3)]
    pauses = [float(text.split(" s: ")[0].split()[-1]) for text in texts]
    assert pauses == [2 * SOON, 4 * SOON, 8 * SOON]
    assert all("db: 16 pending writes wait" in text for text in texts)
    assert all("reached max_map_size" in text for text in texts)
    assert len(store.write_buffer) == 16
    store.max_map_size = 16 * MIB
    eventually(lambda: not store.write_buffer)
    assert len(store) == 17
    store[b"before"] = 2  # and again soon
    eventually(lambda: not store.write_buffer)


def test_the_buffer_stays_bounded_while_flushes_fail(open_store, errors):
    store = open_store(flush_interval=NEVER, max_map_size=MIB, batch_size=16)
    large = bytes(MIB // 8)
    with pytest.raises(GrowthError):
        store.update({b"%d" % n: large for n in range(17)})
    store.flush_interval = SOON
    errors.get(timeout=PATIENCE)
    with pytest.raises(GrowthError):
        store[b"one more"] = large
    assert len(store.write_buffer) == 15
    store.clear()


def test_a_thread_that_cannot_be_started_is_started_with_a_later_write(
    open_store, monkeypatch
):
    eventually(lambda: not flushers() or end_flusher())
    store = open_store(flush_interval=SOON)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "_start_new_thread", refuse, raising=False)
        patch.setattr(threading, "_start_joinable_thread", refuse, raising=False)
        store[b"a"] = 1
        store[b"b"] = 1
        assert not flushers()
    assert list(store.write_buffer) == [b"a", b"b"]
    store[b"c"] = 1
    eventually(lambda: not store.write_buffer)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_after_a_thread_that_could_not_be_started(
    open_store, monkeypatch, in_thread
):
    eventually(lambda: not flushers() or end_flusher())
    store = open_store(flush_interval=SOON)
    store.put_many({b"large": [bytes(2**20)] * 4})
    with monkeypatch.context() as patch:
        patch.setattr(threading, "_start_new_thread", refuse, raising=False)
        patch.setattr(threading, "_start_joinable_thread", refuse, raising=False)
        store[b"a"] = 1
    over = []

    def read():
        while not over:
            assert len(store[b"large"]) == 4

    reading = in_thread(read)
    try:
        for _ in range(5):
            if (child := os.fork()) == 0:
                os._exit(0 if len(store.get(b"large", ())) == 4 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.append(True)
    reading.result()


def test_an_error_of_a_logging_handler_does_not_end_the_thread(open_store, errors):
    full = open_store("full", max_map_size=MIB)
    other = open_store("other", flush_interval=SOON)
    with logging_to(refuse):
        put_too_much(full)
        errors.get(timeout=PATIENCE)
        for number in range(3):
            other[b"%d" % number] = number
            eventually(lambda: not other.write_buffer)
    assert len(full.write_buffer) == 16
    full.clear()


def test_the_flusher_logs_when_others_can_write(open_store, in_thread, caplog):
    caplog.set_level(logging.INFO, "lmdb_object_store")
    store = open_store(flush_interval=SOON, map_size=2**16)
    outcomes = queue.Queue()

    def write_elsewhere(record):
        worker = in_thread(lambda: store.put_many({b"logged": record.getMessage()}))
        outcomes.put(outcome(worker.result))

    with logging_to(write_elsewhere, logging.INFO):
        store[b"large"] = bytes(2**17)
        assert outcomes.get(timeout=2 * PATIENCE) is None
    assert "Map grown" in store[b"logged"]


def test_a_put_during_the_flush_is_flushed_by_the_next(open_store):
    store = open_store(flush_interval=SOON)
    store.put_many({b"a": 0})
    with store.env.begin(write=True):  # the flusher waits for its end
        store[b"a"] = 1
        eventually(lambda: is_writing(store))
        store[b"b"] = 2
    eventually(lambda: not store.write_buffer)
    assert store.env.stat()["entries"] == 2


def test_the_interval_may_be_turned_off_during_a_flush(open_store):
    store = open_store(flush_interval=SOON)
    store.put_many({b"a": 0})
    with store.env.begin(write=True):
        store[b"a"] = 1
        eventually(lambda: is_writing(store))
        store.flush_interval = None
    eventually(lambda: not store.write_buffer)
    store[b"b"] = 2
    assert store.write_buffer.keys() == {b"b"}


def test_the_flusher_leaves_a_block_alone(open_store):
    store = open_store(flush_interval=SOON)
    store[b"a"] = 1  # the block begins with a flush; this remains due
    with store.transaction():
        store[b"b"] = 2
        threading.Event().wait(10 * SOON)
        assert store.env.stat()["entries"] == 1
    store[b"c"] = 3
    eventually(lambda: not store.write_buffer)


@needs_fork
def test_a_signal_handler_may_put_at_every_moment_of_the_first_put(open_store):
    store = open_store(flush_interval=SOON, autoflush_on_read=False, sync=False)
    with handling(lambda: store.put(b"b", 2)):
        for _, result in every_step(end_flusher, lambda _: store.put(b"a", 1)):
            assert result is None
            eventually(lambda: not store.write_buffer)


def test_a_closed_store_is_let_go(open_store):
    store = LmdbObjectStore(open_store().db_path + "2", flush_interval=NEVER)
    store[b"a"] = 1
    store.flush()
    env = weakref.ref(store.env)
    store.close()
    del store
    gc.collect()
    assert env() is None


def test_a_name_in_the_file_is_told_and_all_else_flushed(tmp_path, open_store, errors):
    env = lmdb.open(str(tmp_path / "db"), max_dbs=1, lib_version=0)
    env.open_db(b"name")
    env.close()
    store = open_store(flush_interval=SOON)
    store.update({b"a": 1, b"name": 2, b"z": 3})
    eventually(lambda: not store.write_buffer)
    assert "has named databases" in errors.get(timeout=PATIENCE).getMessage()
    assert errors.empty()
    assert store.get_many([b"a", b"z"])[0] == {b"a": 1, b"z": 3}


def test_a_signal_handler_may_put_first_in_the_midst_of_a_read(open_store):
    eventually(lambda: not flushers() or end_flusher())
    store = open_store(flush_interval=SOON, autoflush_on_read=False)
    with at_call("get", lambda: store.put(b"a", 1)):
        store.get(b"none")
    eventually(lambda: not store.write_buffer)


def refuse(*_, **__):
    raise RuntimeError("can't start new thread")


def end_flusher():
    """Fork: that ends the thread, as nothing is pending."""
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return not flushers()


# Other threads


def test_the_flusher_waits_for_no_writer_and_no_block(open_store, in_thread, errors):
    store = open_store(flush_interval=SOON)
    other = open_store("other", flush_interval=SOON)
    with store.transaction():
        store[b"block"] = 1
        other[b"a"] = 1
        eventually(lambda: not other.write_buffer)
        with at_call("get", lambda: store.put(b"handler", 1)):
            store.get(b"none")
        assert on_disk(other) == 1
    with Parked(in_thread, "putmulti", lambda: store.put_many({b"many": 1})):
        store[b"meanwhile"] = 1
        for n in range(3):
            other[b"b%d" % n] = 1
            eventually(lambda: not other.write_buffer)
        assert list(store.write_buffer) == [b"meanwhile"]
    eventually(lambda: not store.write_buffer)
    assert len(store) == 4
    assert errors.empty()


def test_a_close_waits_for_the_flusher(open_store, hasty):
    caught = []
    threading.excepthook, before = caught.append, threading.excepthook
    try:
        for _ in range(20):
            store = open_store(flush_interval=SOON / 10)
            for n in range(20):
                store[b"%d" % n] = 1
            store.close(strict=True)
            store = open_store(flush_interval=None)
            assert len(store) == 20
            store.clear()
            store.close()
    finally:
        threading.excepthook = before
    assert not caught


def test_a_put_does_not_wait_for_the_flusher(open_store, tmp_path):
    store = open_store(flush_interval=SOON, subdir=False)
    store.put_many({b"a": 1})
    with hold_up_writers(store.db_path) as holder:
        store[b"b"] = 1
        eventually(lambda: is_writing(store))  # the flusher is about to
        store[b"c"] = 1
        assert (store[b"a"], store[b"b"], store[b"c"]) == (1, 1, 1)
        assert list(store.write_buffer) == [b"b", b"c"]
        holder.stdin.close()
    eventually(lambda: not store.write_buffer)


# Forks

FORKS = """
import os, sys, time, warnings
from lmdb_object_store import LmdbObjectStore
rounds = int(sys.argv[1])
store = LmdbObjectStore("db", key_encoding="utf-8", flush_interval=3600, sync=False)
children = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for n in range(rounds):
        store[f"parent {n}"] = n
        child = os.fork()
        if child == 0:
            # It sees what its parent has put before the fork.
            os._exit(0 if store.get(f"parent {n}") == n else 1)
        children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
assert not caught, [str(warning.message) for warning in caught]
store.flush_interval = 0.01
child = os.fork()
if child == 0:
    store["child"] = 1
    while store.write_buffer:
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
store["after"] = 1
while store.write_buffer:
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


@needs_fork
def test_forks_meet_no_second_thread_and_nothing_pending(run, stored):
    run(FORKS, 100, returncode=-signal.SIGKILL)
    entries = stored()
    assert entries.pop("child") == entries.pop("after") == 1
    assert entries == {f"parent {n}": n for n in range(100)}


LIMBO = """
import os, threading
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db")
store[b"a"] = 1
with threading._active_limbo_lock:
    child = os.fork()
    if child == 0:
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
store[b"b"] = 2
store.close()
"""


@needs_fork
@pytest.mark.skipif(
    not hasattr(threading, "_active_limbo_lock"), reason="needs CPython's threading"
)
def test_a_signal_handler_that_interrupts_threading_may_fork(run, stored):
    # A handler that has interrupted threading.enumerate() holds that lock, too.
    run(LIMBO, options=("-W", "ignore::DeprecationWarning"))
    assert stored() == {"a": 1, "b": 2}


IN_A_BLOCK = """
import os, threading, time
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", flush_interval=0.01, sync=False)

def put_and_wait():
    store[b"a"] = 1
    while store.write_buffer:
        time.sleep(0.01)

block = store.transaction()
block.__enter__()
read, write = os.pipe()
if os.fork() == 0:
    os.read(read, 1)  # the parent's block has ended
    thread = threading.Thread(target=put_and_wait)
    thread.start()
    thread.join()
    os._exit(0)
block.__exit__(None, None, None)
os.write(write, b"x")
assert os.wait()[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs LMDB's robust mutexes")
def test_other_threads_of_a_child_forked_in_a_block_are_flushed(run, stored):
    run(IN_A_BLOCK)
    assert stored() == {"a": 1}


@needs_fork
def test_what_a_fork_cannot_flush_is_flushed_after_it(open_store):
    store = open_store(flush_interval=NEVER, autoflush_on_read=False)
    store[b"a"] = 1
    with at_call("get", end_flusher):  # in the midst of a read
        store.get(b"none")
    assert list(store.write_buffer) == [b"a"]
    store.flush_interval = SOON
    eventually(lambda: not store.write_buffer)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forks_do_not_try_again_what_has_just_failed(open_store, errors):
    store = open_store(flush_interval=1, max_map_size=MIB)
    store.update({b"%d" % n: bytes(MIB // 8) for n in range(16)})
    for _ in range(5):
        end_flusher()
    assert "16 pending writes wait" in errors.get_nowait().getMessage()
    assert errors.empty()
    store.clear()


# Python passes over exceptions of the functions that it calls at a fork.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@needs_fork
def test_forks_may_be_interrupted_at_every_moment(open_store):
    store = open_store(flush_interval=SOON, sync=False)
    moments = 0

    def prepare():
        store[b"a"] = 1

    def fork_and_wait(_):
        child = -1
        try:
            child = os.fork()
        finally:
            if child == 0:
                os._exit(0)
        os.waitpid(child, 0)

    for _ in every_step(prepare, fork_and_wait):
        moments += 1
        store[b"b"] = 2
        eventually(lambda: not store.write_buffer)
    assert moments > part_of(50)
    with suppress(ChildProcessError):  # there may be others, which do not end
        while os.waitpid(-1, os.WNOHANG)[0]:  # those whose wait was interrupted
            pass


@needs_fork
def test_a_logging_handler_of_the_flusher_may_fork(open_store):
    store = open_store(max_map_size=MIB)
    codes = queue.Queue()

    def fork_and_wait(record):
        if (child := os.fork()) == 0:
            os._exit(0)
        codes.put(os.waitpid(child, 0)[1])

    with logging_to(fork_and_wait):
        put_too_much(store)
        assert codes.get(timeout=PATIENCE) == 0
    store.max_map_size = None
    eventually(lambda: not store.write_buffer)


# Interrupts


def test_an_interrupted_first_write_leaves_none_unflushed(open_store):
    store = open_store(flush_interval=SOON)
    other = open_store("other", flush_interval=SOON)

    def prepare():
        eventually(lambda: not store.write_buffer)
        return store

    for number, (_, result) in enumerate(
        every_step(prepare, lambda store: store.put(b"interrupted", 1))
    ):
        assert isinstance(result, (KeyboardInterrupt, type(None)))
        if number % 2:
            store[b"after"] = number
        eventually(lambda: not store.write_buffer or store.put(b"after", 1))
    assert outcome(other.close) is None
    gc.collect()


HELD_UP = """
import threading
from conftest import hold_up_writers
from lmdb_object_store import LmdbObjectStore
from moments import is_writing, let_exit_wait
let_exit_wait(0.01)
store = LmdbObjectStore("db", flush_interval=0.01)
store.put_many({b"a": 1})
holder = hold_up_writers("db")
store[b"b"] = 2
pause = threading.Event()
while not is_writing(store):  # the flusher waits for the other process
    pause.wait(0.001)
release = threading.Timer(1.5, holder.stdin.close)
release.daemon = True  # or the interpreter would wait for it before it exits
release.start()
"""


def test_the_exit_waits_for_the_flush_that_another_process_holds_up(run, stored):
    run(HELD_UP)
    assert stored() == {"a": 1, "b": 2}
