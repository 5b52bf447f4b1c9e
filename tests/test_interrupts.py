"""Ctrl-C at any moment: a KeyboardInterrupt leaves nothing half done or locked."""

import gc
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count

import pytest

from conftest import PATIENCE, times, wait_until_idle_in
from lmdb_object_store import GrowthError, LmdbObjectStore
from moments import (
    KEEPS_TRANSACTION,
    WAITS_FOR_LOCK,
    Parked,
    every_step,
    part_of,
)

LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled


class Bad:
    """It can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("not a number",)


class Unpicklable:
    def __reduce__(self):
        raise ValueError("not this one")


class Slow:
    """Unpickling it waits for `go_on`."""

    started = threading.Event()
    go_on = threading.Event()

    def __setstate__(self, state):
        Slow.started.set()
        assert Slow.go_on.wait(PATIENCE)

    def __getstate__(self):
        return True  # or it would not be called


@pytest.fixture
def open_filled(open_store):
    numbers = count()

    def open_filled():
        store = open_store(
            f"db {next(numbers)}",
            key_encoding="utf-8",
            autoflush_on_read=False,
            map_size=2**19,
            timeout=0,
            sync=False,
        )
        return fill(store)

    return open_filled


def fill(store):
    """Bring the store to where the operations below start from."""
    store.batch_size = 1000
    store.max_map_size = 2**20
    stored = {f"batch {number}": "old" for number in range(3)}
    store.put_many({"a": 1, "put": "old", "large": LARGE, "bad": Bad(), **stored})
    assert store["large"] == LARGE
    store["pending"] = 2
    store["bad pending"] = Bad()
    store["z"] = 0
    store.delete("default")
    return store


def check(store):
    """Whole or absent; what had been accepted is there."""
    assert store.get("a") in (1, None)
    assert store["put"] in ("old", "new")
    assert store["pending"] == 2
    assert store["large"] == LARGE
    assert store.get("z") in (0, None)
    assert store.get("default") in ("new", None)
    found, _ = store.get_many([f"batch {number}" for number in range(3)])
    [_] = set(found.values())


def check_locks(store):
    """Nobody is locked out. To be called in another thread."""
    store["other"] = 3
    store.flush()
    assert store["other"] == 3


def grow_at_once(store):
    """Nobody is counted as a reader who is none. To be called in another thread."""
    size = store.env.info()["map_size"]
    store.max_map_size = 4 * size
    store.put_many({"growth": bytes(size)})
    assert store.env.info()["map_size"] > size


# Every operation, interrupted at every bytecode


def get(store):
    assert (store["a"], store.get("missing")) == (1, None)


def get_large(store):
    assert store["large"] == LARGE


def get_many(store):
    found, missing = store.get_many(["a", "pending", "large", "x"], decode_keys=True)
    assert found == {"a": 1, "pending": 2, "large": LARGE}
    assert missing == ["x"]


def look(store):
    assert "a" in store
    assert store.exists("a")


KEYS = ["a", "bad", "bad pending", "batch 0", "batch 1", "batch 2", "large", "pending"]
KEYS += ["put", "z"]


def keys(store):
    assert list(store) == KEYS
    assert list(reversed(store.keys(start="b"))) == KEYS[:0:-1]


def items(store):
    expected = [("large", LARGE), ("pending", 2), ("put", "old"), ("z", 0)]
    assert list(store.items(start="l")) == expected
    assert list(reversed(store.items(start="l"))) == expected[::-1]


def lengths(store):
    assert (len(store), len(store.keys("b"))) == (10, 5)
    assert store.keys("batch") == set(KEYS[3:6])


def fail_to_compare(store):
    with pytest.raises(RuntimeError, match="Failed to unpickle DB key 'bad'"):
        assert store == dict.fromkeys(KEYS, 1)


def fail_to_pop(store):
    with pytest.raises(RuntimeError, match="Failed to unpickle"):
        store.pop("bad")


def fail_to_get(store):
    with pytest.raises(RuntimeError, match="Failed to unpickle"):
        store["bad"]


def fail_to_get_pending(store):
    with pytest.raises(RuntimeError, match="Failed to unpickle"):
        store["bad pending"]


def fail_to_get_many(store):
    with pytest.raises(RuntimeError, match="Failed to unpickle"):
        store.get_many(["a", "bad"])


def fail_to_put(store):
    with pytest.raises(ValueError, match="not this one"):
        store["put"] = Unpicklable()


READS = [
    *(get, get_large, get_many, look, keys, items, lengths),
    *(fail_to_get, fail_to_get_pending, fail_to_get_many, fail_to_put),
    *(fail_to_compare, fail_to_pop),
]


@pytest.mark.parametrize("read", READS)
def test_a_read_may_be_interrupted_at_every_moment(open_filled, in_thread, read):
    store = open_filled()
    interrupted = 0
    for _, result in every_step(lambda: store, read):
        assert isinstance(result, KeyboardInterrupt | None)
        interrupted += result is not None
    assert interrupted > part_of(20)
    check(store)
    in_thread(lambda: check_locks(store)).result()
    in_thread(lambda: grow_at_once(store)).result()
    store.close()


def put(store):
    store["put"] = "new"


def put_a_batch(store):
    store.batch_size = 1
    store["put"] = "new"


def put_many(store):
    store.put_many({f"batch {number}": "new" for number in range(3)})


def delete(store):
    store.delete("a")


def delete_item(store):
    del store["a"]


def pop(store):
    assert (store.pop("a"), store.pop("a", 2)) == (1, 2)


def pop_a_batch(store):
    store.batch_size = 1
    pop(store)


def popitem(store):
    assert store.popitem() == ("z", 0)


def popitem_a_batch(store):
    store.batch_size = 1
    popitem(store)


def setdefault(store):
    assert store.setdefault("default", "new") == "new"
    assert store.setdefault("a", "new") == 1


def flush(store):
    store["put"] = "new"
    store.flush()


def be_refused(store):
    # The deletion goes through by itself.
    store.max_map_size = store.env.info()["map_size"]
    store.delete("a")
    with pytest.raises(GrowthError):
        store.put_many({f"batch {number}": LARGE for number in range(3)})


WRITES = [
    *(put, put_a_batch, put_many, delete, delete_item, flush, be_refused),
    *(pop, pop_a_batch, popitem, popitem_a_batch, setdefault),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_may_be_interrupted_at_every_moment(open_filled, in_thread, write):
    store = open_filled()
    interrupted = 0
    for _, result in every_step(lambda: fill(store), write):
        # The exception lives on, and with it the frames of its traceback.
        assert isinstance(result, KeyboardInterrupt | None)
        interrupted += result is not None
        check(store)
        in_thread(lambda: check_locks(store)).result()
    assert interrupted > part_of(50)
    in_thread(lambda: grow_at_once(store)).result()
    store.close()


BIG = b"x" * 50_000  # three of these have no room
FEW = ["a", "b", "c", "d"]
ERASE = {
    "clear": (lambda store: store.clear(), []),
    "range": (lambda store: store.delete_many(store.keys(start="b")), ["a"]),
    "list": (lambda store: store.delete_many(FEW[1:]), ["a"]),
}


@pytest.mark.parametrize(
    ("erase", "value"),
    [(erase, b"") for erase in ERASE] + [("clear", BIG), ("range", BIG)],
)
def test_a_deletion_may_be_interrupted_at_every_moment(
    open_store, in_thread, erase, value
):
    store = open_store(
        key_encoding="utf-8",
        autoflush_on_read=False,
        map_size=2**17,
        max_map_size=2**17,
        timeout=0,
        sync=False,
    )
    action, nothing = ERASE[erase]

    def prepare():
        store.clear()
        store.put_many(dict.fromkeys(FEW))
        for key in FEW[1:]:
            store[key] = value
        return store

    def check_locks():
        with suppress(GrowthError):
            store.flush()

    outcomes = []
    for _, result in every_step(prepare, action):
        assert not isinstance(result, Exception)
        outcomes.append(list(store))
        assert outcomes[-1] in (FEW, nothing)
        in_thread(check_locks).result()
    assert len(outcomes) > part_of(100)
    assert FEW in outcomes
    assert outcomes[-1] == nothing
    in_thread(lambda: grow_at_once(store)).result()
    store.close()


def test_growth_may_be_interrupted_at_every_moment(open_filled, in_thread):
    keys = [f"key {number}" for number in range(100)]
    interrupted = 0

    def prepare():
        store = open_filled()
        store.put_many({"slow": Slow(), **dict.fromkeys(keys, 1)})
        Slow.started.clear()
        Slow.go_on.clear()
        reader = in_thread(lambda: store.get_many(["slow", *keys, "large"]))
        assert Slow.started.wait(PATIENCE)
        return store, reader

    def grow(subject):
        subject[0].put_many({f"batch {number}": LARGE for number in range(3)})

    for (store, reader), result in every_step(prepare, grow):
        assert isinstance(result, KeyboardInterrupt | None)
        interrupted += result is not None
        Slow.go_on.set()
        found, missing = reader.result()
        assert (len(found), missing) == (len(keys) + 2, [])
        check(store)
        in_thread(partial(grow_at_once, store)).result()
        store.close()
        shutil.rmtree(store.db_path)  # many of them would fill the disk
    assert interrupted > part_of(100)


def test_close_may_be_interrupted_at_every_moment(open_filled):
    interrupted = 0
    for store, result in every_step(open_filled, LmdbObjectStore.close):
        assert isinstance(result, KeyboardInterrupt | None)
        interrupted += result is not None
        store.close()
        assert store.closed
        with LmdbObjectStore(store.db_path, key_encoding="utf-8") as reopened:
            check(reopened)
        shutil.rmtree(store.db_path)
    assert interrupted > part_of(100)


@pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")
def test_opening_may_be_interrupted_at_every_moment(tmp_path):
    numbers = count()

    def prepare():
        return tmp_path / str(next(numbers))

    interrupted = 0
    for path, result in every_step(prepare, LmdbObjectStore):
        if isinstance(result, KeyboardInterrupt):
            interrupted += 1
            result.__traceback__ = None
        else:
            result.close()
        gc.collect(1)  # what is young
        with LmdbObjectStore(path) as store:  # refused if the file is still open
            store[b"a"] = 1
        shutil.rmtree(path)
    assert interrupted > part_of(50)


@contextmanager
def interrupted_at_return(function):
    """Raise KeyboardInterrupt where a function of the library returns first."""

    def hook(frame, event, _):
        if event == "return" and frame.f_code.co_name == function:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(hook)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("use", [grow_at_once, LmdbObjectStore.close])
def test_what_an_interrupted_read_leaves_does_not_hold_up_others(
    open_filled, in_thread, use
):
    store = open_filled()
    with interrupted_at_return(KEEPS_TRANSACTION):
        try:
            store.get_many(["a", "large"])
        except KeyboardInterrupt:  # refers to the frames of the read
            in_thread(lambda: use(store)).result()
    assert store.closed == (use is LmdbObjectStore.close)


def test_a_store_may_be_closed_wherever_a_read_was_interrupted(open_filled):
    results = []
    for store, result in every_step(open_filled, get_many):
        results.append(result)
        store.close()
        assert store.closed
        shutil.rmtree(store.db_path)
    assert len(results) > part_of(100)


WAITING = {
    "put": (lambda store: store.put("new", 1), "put"),
    "delete": (lambda store: store.delete("a"), WAITS_FOR_LOCK),
    "get_many": (lambda store: store.get_many(["a", "put"]), WAITS_FOR_LOCK),
}


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="the OS can't do that")
@pytest.mark.parametrize(("wait", "function"), WAITING.values(), ids=WAITING)
def test_a_wait_for_the_buffer_may_be_interrupted(
    open_filled, in_thread, wait, function
):
    store = open_filled()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        main = threading.main_thread().ident
        wait_until_idle_in(function, main)
        signal.pthread_kill(main, signal.SIGINT)

    try:
        # It begins its transaction with the buffer locked.
        with Parked(in_thread, "begin", lambda: store.get_many(["a"])):
            interrupting = in_thread(interrupt)
            with pytest.raises(KeyboardInterrupt):
                wait(store)
            interrupting.result()
    finally:
        signal.signal(signal.SIGINT, before)
    check(store)
    in_thread(lambda: check_locks(store)).result()


# All operations, in a storm of interrupts

STORM = """
import random, signal, sys, threading, time
from _thread import interrupt_main
from lmdb_object_store import LmdbObjectStore

LARGE = [random.randbytes(100) for _ in range(3000)]
budget = hits = 0


def handler(*_):
    global budget, hits
    if budget:
        budget -= 1
        hits += 1
        raise KeyboardInterrupt


def fire():
    while not over.wait(random.random() / 2000):
        interrupt_main()


def one_moment(store):
    batch, _ = store.get_many([b"batch %d" % n for n in range(30)])
    assert len(batch) in (0, 30) and len(set(batch.values())) <= 1, batch


store = LmdbObjectStore(sys.argv[1], 20, map_size=2**16, sync=False)
store.put_many({b"large": LARGE, b"blob": bytes(2**18)})
operations = [
    lambda i: store.put(b"key %d" % (i % 50), i),
    lambda i: store.put_many({b"batch %d" % n: i for n in range(30)}),
    lambda i: store.put_many({b"growing": bytes(i)}),
    lambda i: store.get(b"key %d" % (i % 50)),
    lambda i: [store.get(b"large"), store.get(b"blob")],
    lambda i: store.get_many([b"large", *(b"key %d" % n for n in range(50))]),
    lambda i: [b"key 1" in store, store.exists(b"key 2", flush=True)],
    lambda i: store.delete(b"key %d" % (i % 50)),
    lambda i: store.pop(b"key %d" % (i % 50), None),
    lambda i: store.setdefault(b"key %d" % (i % 50), i),
    lambda i: [store.put(b"z", i), store.popitem()],
    lambda i: store.delete_many(store.keys(b"batch") if i % 2 else [b"key 1", b"x"]),
    lambda i: [len(store), *store, *reversed(store.items(b"key"))],
    lambda i: store.flush(),
]
signal.signal(signal.SIGINT, handler)
over = threading.Event()
firing = threading.Thread(target=fire)
firing.start()
end = time.monotonic() + int(sys.argv[2])
while time.monotonic() < end:
    for operation in operations:
        try:
            try:
                budget = 2  # the second one can hit what the first one unwinds
                operation(random.randrange(10**6))
                budget = 0
            except KeyboardInterrupt:
                pass
        except KeyboardInterrupt:
            pass
        budget = 0
    one_moment(store)
over.set()
firing.join()
others = threading.Thread(target=store.put_many, args=({b"more": bytes(2**27)},))
others.start()  # this grows the map, for which nobody may be in the way
others.join(20)
assert not others.is_alive() and store[b"large"] == LARGE
store[b"last"] = 1
store.close(strict=True)
print(hits)
"""


@pytest.mark.usefixtures("_unmeasured")
def test_a_storm_leaves_the_store_whole_and_closable(tmp_path):
    path = str(tmp_path / "db")
    run = [sys.executable, "-c", STORM, path, str(times(1, thorough=4))]
    printed = subprocess.run(run, check=True, timeout=60, stdout=subprocess.PIPE).stdout
    assert int(printed) > 100
    with LmdbObjectStore(path) as store:
        assert store[b"last"] == 1
    verify = [sys.executable, "-m", "lmdb", "verify", path]
    subprocess.run(verify, check=True, timeout=60)
