"""Threads share a store: who waits for whom, and what each of them sees."""

import contextlib
import random
import sys
import threading
from itertools import count

import lmdb
import pytest

from conftest import PATIENCE, hold_up_writers, run_all
from lmdb_object_store import ClosedError, GrowthError
from moments import Parked, is_method

LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled


class Slow:
    """Unpickling it waits for `go_on`."""

    started = threading.Event()
    go_on = threading.Event()

    def __init__(self, ballast=b""):
        self.ballast = ballast

    def __setstate__(self, state):
        self.__dict__.update(state)
        Slow.started.set()
        assert Slow.go_on.wait(PATIENCE)


@pytest.fixture
def slow():
    Slow.started.clear()
    Slow.go_on.clear()
    yield
    Slow.go_on.set()


class Meeting:
    """Unpickling it waits until as many threads do as `meet` says."""

    meet = threading.Barrier(1)

    def __init__(self, ballast):
        self.ballast = ballast

    def __setstate__(self, state):
        Meeting.meet.wait(PATIENCE)


# Who waits for whom


def put_and_read(store):
    """Do everything that waits for no commit; see `stored_before`."""
    store["new"] = 1
    store["pending"] = 2
    store["again"] = 1
    store["again"] = 2
    store.delete("deleted")
    return (
        store["new"],
        store["pending"],
        store["again"],
        store.get("deleted"),
        store["stored"],
        store["large"] == LARGE,
        store.get("missing", "nothing"),
        [key in store for key in ("new", "deleted", "stored", "missing")],
        [store.exists(key) for key in ("new", "deleted", "stored", "missing")],
        store.get_many(["new", "deleted", "stored", "pending"], decode_keys=True),
    )


WHAT_IT_READS = (
    *(1, 2, 2, None, 0, True, "nothing"),
    *([True, False, True, False],) * 2,
    ({"new": 1, "stored": 0, "pending": 2}, ["deleted"]),
)


@pytest.fixture
def busy_store(open_store):
    store = open_store(key_encoding="utf-8", map_size=2**24)
    store.put_many({"stored": 0, "deleted": 0, "large": LARGE})
    store["pending"] = 1
    return store


def check_the_outcome(store):
    store.flush()
    assert store.write_buffer == {}
    found = store.get_many(["new", "pending", "again", "deleted"], decode_keys=True)
    assert found == ({"new": 1, "pending": 2, "again": 2}, ["deleted"])


@pytest.mark.parametrize("write", ["flush", "put_many"])
@pytest.mark.parametrize("moment", ["begin", "putmulti"])
def test_puts_and_reads_do_not_wait_for_a_commit(busy_store, in_thread, moment, write):
    writes = {
        "flush": busy_store.flush,
        "put_many": lambda: busy_store.put_many({"batch": 1}),
    }
    with Parked(in_thread, moment, writes[write]) as writer:
        seen = in_thread(lambda: put_and_read(busy_store)).result()
        writer.release()
    assert seen == WHAT_IT_READS
    check_the_outcome(busy_store)


def test_puts_and_reads_do_not_wait_for_a_commit_that_another_process_holds_up(
    busy_store, in_thread
):
    with (
        hold_up_writers(busy_store.db_path) as other,
        Parked(in_thread, "begin", busy_store.flush) as writer,
    ):
        writer.leave()  # ... and wait for the other process
        seen = in_thread(lambda: put_and_read(busy_store)).result()
        other.communicate(timeout=PATIENCE)
        writer.release()
    assert seen == WHAT_IT_READS
    check_the_outcome(busy_store)


def test_a_full_batch_does_not_wait_for_a_commit_but_twice_of_it_does(
    open_store, in_thread
):
    store = open_store(batch_size=10)
    store[b"first"] = 0
    with Parked(in_thread, "putmulti", store.flush) as writer:
        in_thread(
            lambda: [store.put(b"%d" % number, number) for number in range(18)]
        ).result()
        assert len(store.write_buffer) == 19
        done = threading.Event()
        patient = in_thread(lambda: (store.put(b"last", 18), done.set()))
        assert not done.wait(0.2)
        assert len(store.write_buffer) == 19
        writer.release()
    patient.result()
    assert len(store.get_many([b"%d" % number for number in range(18)])[0]) == 18
    assert (store[b"first"], store[b"last"]) == (0, 18)


def test_a_batch_of_one_is_written_when_the_put_returns(open_store, in_thread):
    store = open_store(batch_size=1)
    with Parked(in_thread, "putmulti", lambda: store.put_many({b"first": 0})) as writer:
        done = threading.Event()
        patient = in_thread(lambda: (store.put(b"key", 1), done.set()))
        assert not done.wait(0.2)
        writer.release()
    patient.result()
    assert store.write_buffer == {}


def test_many_bytes_wait_for_a_commit_as_many_puts_do(open_store, in_thread):
    store = open_store(batch_bytes=100_000)
    store[b"first"] = 0
    with Parked(in_thread, "putmulti", store.flush) as writer:
        in_thread(lambda: store.put(b"a", LARGE)).result()
        done = threading.Event()
        patient = in_thread(lambda: (store.put(b"b", LARGE), done.set()))
        assert not done.wait(0.2)
        assert set(store.write_buffer) == {b"first", b"a"}
        writer.release()
    patient.result()
    assert store[b"a"] == store[b"b"] == LARGE


@pytest.mark.parametrize("closing", [False, True], ids=["grow", "close"])
@pytest.mark.parametrize("call", ["get", "get_many"])
@pytest.mark.parametrize("ballast", [b"", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("buffered", [False, True], ids=["stored", "buffered"])
def test_a_slow_unpickling_holds_up_nobody(
    open_store, in_thread, slow, buffered, ballast, call, closing
):
    store = open_store(map_size=2**18, timeout=0, autoflush_on_read=False)
    store.put_many({b"large": LARGE})
    assert store[b"large"] == LARGE
    store[b"slow"] = Slow(ballast)
    if not buffered:
        store.flush()
    calls = {
        "get": lambda: store[b"slow"],
        "get_many": lambda: store.get_many([b"slow", b"large"])[0][b"slow"],
    }
    reader = in_thread(calls[call])
    assert Slow.started.wait(PATIENCE)

    def others():
        store[b"other"] = 1
        store.put_many({b"grow": bytes(2**20)})
        assert store[b"large"] == LARGE
        if closing:
            store.close()

    in_thread(others).result()
    assert reader.running
    Slow.go_on.set()
    assert reader.result().ballast == ballast


@pytest.mark.parametrize("call", ["put_many", "get_many"])
def test_a_slow_iterable_holds_up_nobody(open_store, in_thread, call):
    store = open_store(map_size=2**18, timeout=0)
    store[b"a"] = 1
    started, go_on = threading.Event(), threading.Event()

    def slowly():
        yield (b"a", 2) if call == "put_many" else b"a"
        started.set()
        assert go_on.wait(PATIENCE)

    caller = in_thread(lambda: getattr(store, call)(slowly()))
    assert started.wait(PATIENCE)
    in_thread(lambda: store.put_many({b"a": 3, b"grow": bytes(2**20)})).result()
    go_on.set()
    assert caller.result() == (None if call == "put_many" else ({b"a": 3}, []))
    assert store[b"a"] == (2 if call == "put_many" else 3)


@pytest.mark.parametrize(
    ("threads", "ballast"), [(150, b""), (100, LARGE)], ids=["small", "large"]
)
def test_reads_run_in_parallel(open_store, threads, ballast):
    # LMDB has 126 reader slots by default: small values take none meanwhile.
    store = open_store()
    store.put_many({b"large": LARGE, b"meeting": Meeting(ballast)})
    assert store[b"large"] == LARGE
    Meeting.meet = threading.Barrier(threads)
    run_all(*[lambda: store[b"meeting"]] * threads)


# Nothing is lost


@pytest.mark.parametrize("moment", ["begin", "putmulti"])
@pytest.mark.parametrize("before", [1, None], ids=["put", "deleted"])
@pytest.mark.parametrize("during", [2, None], ids=["put", "deleted"])
@pytest.mark.parametrize("flush", [True, False], ids=["flush", "put_many"])
def test_what_is_written_during_a_commit_counts_after_it(
    open_store, in_thread, moment, before, during, flush
):
    store = open_store()

    def write(value):
        if value is None:
            store.delete(b"key")
        else:
            store[b"key"] = value

    store.put_many({b"key": 0})
    store[b"other"] = 1
    if flush:
        write(before)
        committing = store.flush
    else:
        store.flush()

        def committing():
            store.put_many({b"key": before})

    with Parked(in_thread, moment, committing) as writer:
        in_thread(lambda: write(during)).result()
        writer.release()
    assert store.get(b"key") == during
    assert set(store.write_buffer) <= {b"key"}
    store.close()
    assert open_store().get(b"key") == during


def test_a_put_in_the_middle_of_a_put_many_comes_before_it_or_after_it(open_store):
    store = open_store(autoflush_on_read=False)
    store.put_many({b"key": 0, b"rest": 0})
    store[b"pending"] = 1
    put = []
    seen = []

    def look(frame, event, function):
        if not event.startswith("c_"):
            return
        if not put and is_method(function, "putmulti"):  # commits what was pending
            put.append(True)
            store[b"key"] = "put"
        seen.append(tuple(store.get_many([b"key", b"rest"])[0].values()))

    sys.setprofile(look)
    try:
        store.put_many({b"key": "batch", b"rest": "batch"})
    finally:
        sys.setprofile(None)
    before = [(0, 0), ("put", 0)]
    after = list(dict.fromkeys(seen))[len(before) :]
    assert list(dict.fromkeys(seen))[: len(before)] == before
    assert after in ([("batch", "batch")], [("put", "batch")])


def test_the_last_one_of_a_duplicate_key_wins(open_store):
    store = open_store()
    store[b"a"] = 0
    store.put_many([(b"a", 1), (b"b", 1), (b"a", 2), (b"b", 2), (b"a", 3)])
    assert store.get_many([b"a", b"b"])[0] == {b"a": 3, b"b": 2}


@pytest.mark.parametrize("buffered", [False, True], ids=["stored", "buffered"])
def test_exactly_one_del_of_a_key_succeeds(open_store, hasty, buffered):
    store = open_store()

    def delete():
        try:
            del store[b"key"]
        except KeyError:
            return 0
        return 1

    for _ in range(40):
        store[b"key"] = 1
        if not buffered:
            store.flush()
        assert sum(run_all(*[delete] * 6)) == 1
        assert b"key" not in store


def test_del_of_a_key_that_is_always_there_never_fails(open_store, hasty):
    store = open_store(batch_size=3)
    for number in range(40):
        store[b"key"] = "old"

        def delete():
            del store[b"key"]

        def overwrite(number=number):
            store[b"key"] = "new"
            store[b"%d" % number] = number

        run_all(delete, overwrite, store.flush)
        assert store.get(b"key", "gone") in ("new", "gone")


def test_a_delete_and_a_del_leave_nothing(open_store, hasty):
    store = open_store(batch_size=2)
    for _ in range(40):
        store[b"key"] = 1

        def delete():
            with contextlib.suppress(KeyError):
                del store[b"key"]

        run_all(delete, lambda: store.delete(b"key"), store.flush)
        assert store.get(b"key", "gone") == "gone"


def test_nobody_sees_half_a_put_many(open_store, hasty):
    # Raised step by step, the cap makes the map grow dozens of times.
    store = open_store(map_size=2**16, max_map_size=2**16, batch_size=5)
    keys = [b"%d" % number for number in range(12)]
    store.put_many(dict.fromkeys(keys, (0, b"")))
    stop = threading.Event()
    growths = 0

    def write():
        nonlocal growths
        for generation in range(1, 60):
            value = (generation, b"x" * 600 * generation)
            while True:
                try:
                    store.put_many(dict.fromkeys(keys, value))
                    break
                except GrowthError:
                    store.max_map_size += 2**16
                    growths += 1
        stop.set()

    def put():
        for number in count():
            if stop.is_set():
                return
            with contextlib.suppress(GrowthError):
                store[b"put %d" % (number % 9)] = number

    def read():
        last = 0
        while not stop.is_set():
            found, missing = store.get_many(keys)
            assert not missing
            [value] = set(found.values())
            assert value[0] >= last
            assert len(value[1]) == 600 * value[0]
            last = value[0]
        return last

    *generations, _, _ = run_all(read, read, read, put, write)
    assert growths > 12
    assert all(generations)


def test_many_threads_agree_with_a_dict_of_their_own(open_store, hasty):
    store = open_store(map_size=2**16, batch_size=7, flush_interval=0.001)

    def work(name):
        dice = random.Random(name)
        mine = {}
        for number in range(400):
            key = b"%d %d" % (name, dice.randrange(20))
            match dice.randrange(8):
                case 0:
                    store.delete(key)
                    mine.pop(key, None)
                case 1:
                    if key in mine:
                        del store[key], mine[key]
                    else:
                        with pytest.raises(KeyError):
                            del store[key]
                case 2:
                    batch = {b"%d %d" % (name, n): (number, n) for n in range(5)}
                    store.put_many(batch)
                    mine.update(batch)
                case 3:
                    keys = [b"%d %d" % (name, n) for n in range(20)]
                    assert store.get_many(keys)[0] == mine
                case 4:
                    store.flush()
                case 5:
                    assert store.exists(key) == (key in store) == (key in mine)
                case _:
                    store[key] = mine[key] = "x" * dice.choice([1, 100, 150_000])
            assert store.get(key) == mine.get(key)
        return mine

    everything = {}
    for mine in run_all(*[lambda n=n: work(n) for n in range(6)]):
        everything.update(mine)
    keys = [b"%d %d" % (name, n) for name in range(6) for n in range(20)]
    assert store.get_many(keys)[0] == everything
    store.close()
    assert open_store().get_many(keys)[0] == everything


# Close


@pytest.mark.parametrize("batch_size", [1, 10, 10_000])
def test_close_among_busy_threads_loses_nothing_it_accepted(
    open_store, hasty, batch_size
):
    for turn in range(8):
        name = f"{batch_size} {turn}"
        options = {"map_size": 2**18, "sync": False, "flush_interval": 0.001}
        store = open_store(name, batch_size=batch_size, **options)
        store.put_many({b"small": 1, b"large": LARGE})
        begun = threading.Barrier(6)

        def until_closed(step):
            try:
                for number in count():
                    step(number)
                    if number == 5:
                        begun.wait(PATIENCE)  # noqa: B023
            except ClosedError as error:
                assert "closed" in str(error)  # noqa: PT017

        def put(name):
            accepted = []

            def step(number):
                store[b"%d %d" % (name, number)] = number  # noqa: B023
                accepted.append(b"%d %d" % (name, number))

            until_closed(step)
            return accepted

        def put_many():
            accepted = []

            def step(number):
                batch = {b"many %d %d" % (number, n): n for n in range(3)}
                store.put_many(batch)  # noqa: B023
                accepted.extend(batch)

            until_closed(step)
            return accepted

        def read(number):
            assert store[b"small"] == 1  # noqa: B023
            assert store[b"large"] == LARGE  # noqa: B023
            assert store.get_many([b"small", b"x"]) == ({b"small": 1}, [b"x"])  # noqa: B023

        def close():
            begun.wait(PATIENCE)  # noqa: B023
            store.close()  # noqa: B023

        *accepted, _, _, _ = run_all(
            lambda: put(1),
            lambda: put(2),
            put_many,
            lambda: until_closed(read),
            lambda: until_closed(read),
            close,
        )
        keys = [key for some in accepted for key in some]
        reopened = open_store(name)
        assert reopened.get_many(keys)[1] == []
        reopened.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.put(b"a", 1),
        lambda store: store.put_many({b"a": 1}),
        lambda store: store.delete(b"a"),
        lambda store: store.__delitem__(b"a"),
        lambda store: store.flush(),
        lambda store: store.get(b"a"),
        lambda store: store.get_many([b"a"]),
        lambda store: store.exists(b"a"),
        lambda store: b"a" in store,
    ],
    ids=[
        "put",
        "put_many",
        "delete",
        "del",
        "flush",
        "get",
        "get_many",
        "exists",
        "in",
    ],
)
def test_a_call_after_another_thread_closed_says_so(open_store, in_thread, call):
    store = open_store()
    in_thread(store.close).result()
    with pytest.raises(lmdb.Error, match="closed"):
        call(store)


def test_threads_may_close_at_once(open_store, hasty):
    for turn in range(20):
        store = open_store(str(turn), sync=False)
        store[b"a"] = 1
        run_all(*[store.close] * 4)
        assert store.closed
        with open_store(str(turn)) as reopened:
            assert reopened[b"a"] == 1


def test_a_second_close_returns_when_all_is_closed(open_store, in_thread):
    store = open_store()
    store[b"a"] = 1
    with Parked(in_thread, "putmulti", store.close) as first:
        done = threading.Event()
        second = in_thread(lambda: (store.close(), done.set(), store.closed))
        assert not done.wait(0.2)
        first.release()
    assert second.result()[2]


def test_close_waits_for_a_read_in_the_database(open_store, in_thread):
    store = open_store()
    store.put_many({b"a": 1})
    with Parked(in_thread, "get", lambda: store[b"a"]) as reader:
        closer = in_thread(store.close)
        assert reader.release() == 1
        closer.result()
    assert store.closed
