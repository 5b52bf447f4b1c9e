"""Processes that wait to write: one of them killed, stopped, or interrupted."""

import logging
import queue
import signal
import subprocess
import sys
import time

import pytest

from conftest import PATIENCE, hold_up_writers, logging_to, times
from moments import (
    Trip,
    another_has_its_turn,
    handling,
    let_writers_wait,
    notice_soon,
)
from test_faults import ENGINES, run  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="LMDB's lock is another one elsewhere"
)

WRITE = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1]) as store:
    store.put_many({b"theirs": 1})
"""


@pytest.fixture
def store(open_store):
    store = open_store()
    store.put_many({b"stored": 0})
    return store


@pytest.fixture
def first(store):
    """Start a process that waits for LMDB's lock, as the first of the queue."""
    with hold_up_writers(store.db_path) as holder:
        command = [sys.executable, "-c", WRITE, store.db_path]
        with subprocess.Popen(command) as process:
            deadline = time.monotonic() + PATIENCE
            while not another_has_its_turn(store.db_path):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            process.holder = holder
            yield process
            process.kill()
        holder.stdin.close()


@pytest.mark.one_in(2)
@ENGINES
def test_killed_writers_take_no_turn_of_others_with_them(
    run,  # noqa: F811
    lib_version,
):
    run(
        """
        import os, random, sys, time
        from multiprocessing import get_context
        from lmdb_object_store import LmdbObjectStore

        lib_version, seconds, patience = map(int, sys.argv[1:])
        LmdbObjectStore("db", lib_version=lib_version).close()
        parent = os.getpid()
        fork = get_context("fork")
        counts = fork.RawArray("q", 5)
        # On one processor, and where others go first: so a process that is woken
        # often does not run before it is killed.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        def write(number, niceness):
            os.nice(niceness)
            with LmdbObjectStore("db", sync=False) as store:
                while os.getppid() == parent:
                    with store.transaction():
                        store[b"%d" % number] = counts[number]
                    counts[number] += 1

        def start(*arguments):
            process = fork.Process(target=write, args=arguments, daemon=True)
            process.start()
            return process

        start(0, 0)
        start(1, 0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            victims = [start(number, 5) for number in (2, 3, 4)]
            time.sleep(random.random() * 0.03)
            for victim in victims:
                victim.kill()
            for victim in victims:
                victim.join()
            before = counts[:2]
            deadline = time.monotonic() + patience
            while any(new == old for new, old in zip(counts, before)):
                assert time.monotonic() < deadline, "a writer waits for ever"
                time.sleep(0.001)
        print("ok")
        """,
        lib_version,
        times(2, thorough=10),
        round(PATIENCE / 2),
    )


def test_a_wait_for_the_turn_is_logged(store, first, in_thread, monkeypatch):
    lines = queue.Queue()
    notice_soon(monkeypatch)
    with logging_to(lambda record: lines.put(record.getMessage()), logging.WARNING):
        writing = in_thread(lambda: store.put_many({b"ours": 1}))
        line = lines.get(timeout=PATIENCE)
    assert "a write waits for writers of other processes" in line
    first.holder.stdin.close()
    writing.result()


def test_a_stopped_process_keeps_no_other_from_writing(store, first, monkeypatch):
    let_writers_wait(monkeypatch, 0.01)
    first.send_signal(signal.SIGSTOP)
    first.holder.stdin.close()
    store.put_many({b"ours": 1})
    first.send_signal(signal.SIGCONT)
    assert first.wait(PATIENCE) == 0
    assert dict(store) == {b"ours": 1, b"stored": 0, b"theirs": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_wait_for_the_turn_may_be_interrupted(store, first, monkeypatch, error):
    let_writers_wait(monkeypatch, PATIENCE)

    def interrupt(*_):
        raise error

    store.put(b"ours", 1)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(error):
            store.flush()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert list(store.write_buffer) == [b"ours"]
    first.holder.stdin.close()
    assert first.wait(PATIENCE) == 0
    store.flush()
    assert dict(store) == {b"ours": 1, b"stored": 0, b"theirs": 1}


@pytest.mark.parametrize("number", [1, 2], ids=["taken", "given back"])
def test_what_a_signal_handler_raises_as_the_turn_is_taken_comes_out(store, number):
    lockf = pytest.importorskip("fcntl").lockf
    calls = []
    trip = Trip(signal.SIGINT)

    def hook(frame, event, called):
        if event == "c_call" and called is lockf:
            calls.append(called)
            if len(calls) == number:
                trip.now  # noqa: B018 (CPython calls the handler after the function)

    def handler():
        raise TimeoutError

    store.put(b"ours", 1)
    with handling(handler):
        sys.setprofile(hook)
        try:
            with pytest.raises(TimeoutError):
                store.flush()
        finally:
            sys.setprofile(None)
    assert list(store.write_buffer) == [b"ours"]
    store.flush()
    assert dict(store) == {b"ours": 1, b"stored": 0}


def test_writes_without_a_descriptor_to_spare(run):  # noqa: F811
    run(
        """
        import os, resource
        from lmdb_object_store import LmdbObjectStore

        before = os.listdir("/proc/self/fd")
        with LmdbObjectStore("db", key_encoding="utf-8") as store:
            lowest = os.dup(0)
            os.close(lowest)
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            store["written"] = 1
            store.flush()
            assert not store.write_buffer
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            with store.transaction():
                store["written"] += 1
        assert os.listdir("/proc/self/fd") == before
        print("ok")
        """
    )


def test_no_standard_stream_gets_into_the_file(run):  # noqa: F811
    run(
        """
        import os
        from lmdb_object_store import LmdbObjectStore

        with LmdbObjectStore("db", key_encoding="utf-8") as store:
            os.close(0)  # the next descriptor to be given away
            store["written"] = 1
            store.flush()
            assert os.open(os.devnull, os.O_RDONLY) == 0
        print("ok")
        """
    )
