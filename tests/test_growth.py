"""The map grows by itself, and nobody who reads or writes meanwhile notices."""

import logging
import mmap
import os
import random
import re
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import count, pairwise

import lmdb
import pytest

from conftest import PATIENCE
from lmdb_object_store import GrowthError

KIB, MIB = 2**10, 2**20
SMALL_MAP = 16 * mmap.PAGESIZE
FIRST_MAP = 1024 * MIB if os.name == "posix" else 10 * MIB
ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
LARGE = 150 * KIB  # more than what is copied out of the map before it is unpickled

# Growth waits for nobody: with this, waiting would be an error.
AT_ONCE = {"map_size": SMALL_MAP, "timeout": 0}


@pytest.fixture
def growths(caplog):
    """Return the growths that were logged so far, as pairs of sizes."""
    caplog.set_level(logging.INFO, "lmdb_object_store")

    def growths():
        found = []
        for record in caplog.records:
            match = re.search(r"grown from (\d+) to (\d+)", record.getMessage())
            if match:
                assert (record.name, record.levelname) == ("lmdb_object_store", "INFO")
                found.append((int(match[1]), int(match[2])))
        return found

    return growths


class Parked:
    """Stops wherever a thread unpickles it, until `release` is called."""

    waiting = threading.Event()
    released = threading.Event()

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.waiting.set()
        assert self.released.wait(PATIENCE), "nobody released the unpickling"

    @classmethod
    def reset(cls):
        cls.waiting, cls.released = threading.Event(), threading.Event()


class Hook:
    """Calls `act` wherever a thread unpickles it."""

    act = None

    def __reduce__(self):
        return Hook.run, ()

    @staticmethod
    def run():
        Hook.act()


def parked(**attributes):
    value = Parked()
    value.__dict__.update(attributes or {"a": 1})
    return value


@pytest.fixture
def park(in_thread):
    """Run a read in a thread and return it when it is inside an unpickling."""
    Parked.reset()

    def park(action):
        Parked.reset()
        worker = in_thread(action)
        assert Parked.waiting.wait(PATIENCE)
        return worker

    yield park
    Parked.released.set()


def read_freely(action):
    """Run a read that would park, without parking."""
    Parked.reset()
    Parked.released.set()
    return action()


# How far it grows


@pytest.mark.parametrize(
    ("map_size", "values", "cap", "expected"),
    [
        (SMALL_MAP, [2 * SMALL_MAP], None, SMALL_MAP + 64 * MIB),
        (70 * MIB, [60 * MIB, 20 * MIB], None, 140 * MIB),
        (SMALL_MAP, [2 * SMALL_MAP], MIB, MIB),
        (SMALL_MAP, [2 * SMALL_MAP], MIB + 1, MIB),  # whole pages
        (SMALL_MAP, [2 * SMALL_MAP], 65 * MIB, SMALL_MAP + 64 * MIB),
        (SMALL_MAP, [10 * KIB], None, SMALL_MAP),
    ],
)
def test_growth_doubles_or_adds_64_mib_up_to_the_cap(
    open_store, growths, map_size, values, cap, expected
):
    store = open_store(map_size=map_size, max_map_size=cap, sync=False)
    for number, size in enumerate(values):
        store.put(b"%d" % number, bytes(size))
        store.flush()
    assert store.env.info()["map_size"] == expected
    assert growths() == ([(map_size, expected)] if map_size != expected else [])


@ENGINES
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, FIRST_MAP),
        ({"map_size": MIB}, MIB),
        ({"max_map_size": 32 * MIB}, min(32 * MIB, FIRST_MAP)),
        ({"max_map_size": 2 * MIB}, 2 * MIB),
        ({"max_map_size": 4 * 1024 * MIB}, FIRST_MAP),
        ({"writemap": True}, 10 * MIB),
    ],
    ids=str,
)
def test_a_map_begins_large_where_that_costs_nothing(
    open_store, tmp_path, lib_version, options, size
):
    if options.get("writemap") and lib_version:
        pytest.skip("refused with this engine")
    store = open_store(lib_version=lib_version, **options)
    store.put_many({b"a": 1})
    assert store.env.info()["map_size"] == size
    if not options.get("writemap"):
        assert (tmp_path / "db" / "data.mdb").stat().st_size < MIB


LITTLE_ADDRESS_SPACE = """
import resource
from lmdb_object_store import LmdbObjectStore

soft = 300 * 2**20 + int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
for options in ({}, {"max_map_size": 2**29}):
    with LmdbObjectStore(str(options), **options) as store:
        store[b"a"] = 1
        print(store.env.info()["map_size"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that holds")
def test_a_map_begins_small_where_there_is_no_room(run):
    assert run(LITTLE_ADDRESS_SPACE).stdout.split() == [str(10 * MIB)] * 2


@ENGINES
def test_sorted_writes_fill_their_pages(open_store, lib_version):
    store = open_store(lib_version=lib_version, sync=False)
    numbers = list(range(12_000))
    for start in range(0, 12_000, 3_000):
        store.put_many((b"%08d" % n, n) for n in numbers[start : start + 3_000])
    with store.env.begin() as txn:
        size = sum(len(key) + len(value) + 10 for key, value in txn.cursor())
    stat = store.env.stat()
    assert size > 0.95 * stat["leaf_pages"] * stat["psize"]
    store.put_many({b"%08d" % n: -n for n in range(11_999, 13_000)})  # from the last on
    store.put_many({b"%08d" % n: -n for n in range(5_000, 5_010)})
    numbers[5_000:5_010] = [-n for n in range(5_000, 5_010)]
    numbers[11_999:] = [-n for n in range(11_999, 13_000)]
    assert list(store.values()) == numbers
    assert list(store) == [b"%08d" % n for n in range(13_000)]


def test_one_200_mib_value_fits_into_a_64_kib_store(open_store, growths):
    store = open_store(map_size=SMALL_MAP, sync=False)
    blob = bytes(range(256)) * (200 * MIB // 256)
    store[b"blob"] = blob
    store.flush()
    assert store[b"blob"] == blob
    assert len(growths()) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [100, 1400, 3000, MIB])
def test_a_batch_larger_than_the_map_grows_it_once(open_store, growths, size):
    store = open_store(map_size=SMALL_MAP, sync=False)
    value = bytes(size)
    count = (40 if size == 100 else 100) * MIB // size
    store.put_many((b"%08d" % number, value) for number in range(count))
    assert len(growths()) == 1
    assert store.env.stat()["entries"] == count


def test_cap_can_be_changed_at_run_time(open_store, growths):
    store = open_store(map_size=SMALL_MAP, max_map_size=SMALL_MAP)
    for step in range(2, 6):
        store.max_map_size = step * SMALL_MAP
        store.put_many({b"%d" % step: bytes(SMALL_MAP * 3 // 4)})
    sizes = [step * SMALL_MAP for step in range(1, 6)]
    assert growths() == list(pairwise(sizes))
    store.max_map_size = None
    store.put_many({b"more": bytes(MIB)})
    assert growths()[-1] == (5 * SMALL_MAP, 5 * SMALL_MAP + 64 * MIB)


# Under readers and writers


def value_of(key):
    number = int(key)
    size = LARGE if number % 8 == 0 else number % 300
    return [number, (b"%d" % number * size)[:size]]


def test_dozens_of_growths_under_readers_and_writers(
    open_store, in_thread, growths, hasty
):
    # A cap that rises in small steps makes the map grow often.
    store = open_store(map_size=SMALL_MAP, max_map_size=MIB, batch_size=16, sync=False)
    numbers = count()
    written = []
    done = threading.Event()

    def with_room(action, *args):
        refused = True
        while refused and not done.is_set():
            try:
                action(*args)
                refused = False
            except lmdb.MapFullError:
                store.max_map_size += MIB // 4

    def write(several):
        while not done.is_set():
            keys = [b"%d" % next(numbers) for _ in range(8 if several else 1)]
            if several:
                with_room(store.put_many, [(key, value_of(key)) for key in keys])
            else:
                with_room(store.put, keys[0], value_of(keys[0]))
            if not done.is_set():
                written.extend(keys)
            if len(growths()) >= 30:
                done.set()

    def read(seed):
        chance = random.Random(seed)
        while not done.is_set():
            keys = [chance.choice(written) for _ in range(5)] if written else []
            for key in keys[:3]:
                assert store[key] == value_of(key)
                assert key in store
            found, missing = store.get_many([*keys, b"none"])
            assert found == {key: value_of(key) for key in keys}
            assert missing == [b"none"]

    def until_done(action, *args):
        try:
            action(*args)
        finally:
            done.set()

    workers = [in_thread(lambda s=s: until_done(write, s)) for s in (True, False)]
    workers += [in_thread(lambda s=s: until_done(read, s)) for s in range(2)]
    for worker in workers:
        worker.result()
    assert len(growths()) >= 30
    store.max_map_size = None
    store.flush()
    assert all(store[key] == value_of(key) for key in written)


def make_parked_reads():
    """What is stored, and how it is read, by name of the test."""
    small = {b"k": [1, parked(), 2]}
    large = {b"k": [1, parked(), bytes(range(256)) * (LARGE // 256), parked(), 2]}
    inner = {b"k": [1, parked(blob=bytes(range(256)) * (LARGE // 256)), b"x" * LARGE]}
    many = {b"%03d" % n: [n, parked() if n % 100 == 0 else 0] for n in range(400)}
    many_large = {
        b"%d" % n: [n, parked() if n == 3 else 0, b"%d" % n * LARGE] for n in range(8)
    }
    return {
        "small": (small, lambda store: {b"k": store[b"k"]}),
        "large": (large, lambda store: {b"k": store.get(b"k")}),
        "large, nested": (inner, lambda store: {b"k": store.get(b"k")}),
        "many": (many, lambda store: store.get_many(many)[0]),
        "many, large": (many_large, lambda store: store.get_many(many_large)[0]),
    }


PARKED_READS = make_parked_reads()


def plain(value):
    """Make what was read comparable."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return vars(value) if isinstance(value, Parked) else value


@pytest.mark.parametrize("buffered", [False, True], ids=["stored", "buffered"])
@pytest.mark.parametrize("name", PARKED_READS)
def test_growth_does_not_wait_for_an_unpickling(
    open_store, park, growths, name, buffered
):
    values, read = PARKED_READS[name]
    store = open_store(
        map_size=8 * MIB,
        batch_size=10**6,
        autoflush_on_read=False,
        timeout=0,
        sync=False,
    )
    for key, value in values.items():
        store.put(key, value)
    if not buffered:
        store.flush()
        # A store treats large values as such once it has met one.
        assert plain(read_freely(lambda: read(store))) == plain(values)
    reader = park(lambda: read(store))
    # Nothing may be left of the old values where the read still has to go.
    store.put_many({**dict.fromkeys(values), b"big": bytes(10 * MIB)})
    assert len(growths()) == 1
    for number in range(4):
        store.put_many(dict.fromkeys(values, b"%d" % number * (8 * MIB // len(values))))
    assert reader.running
    Parked.released.set()
    assert plain(reader.result()) == plain(values)


@pytest.mark.parametrize(
    "read",
    [
        lambda store: {key: store[key] for key in (b"small", b"large")},
        lambda store: store.get_many([b"small", b"large"])[0],
    ],
    ids=["get", "get_many"],
)
def test_growth_by_the_code_of_an_unpickling(open_store, growths, monkeypatch, read):
    store = open_store(**AT_ONCE, max_map_size=MIB)
    monkeypatch.setattr(Hook, "act", lambda: None)
    store.put_many({b"small": [1, Hook()], b"large": [1, Hook(), b"z" * LARGE, Hook()]})
    values = read(store)
    assert values == {b"small": [1, None], b"large": [1, None, b"z" * LARGE, None]}

    def grow():
        size = store.env.info()["map_size"]
        store.max_map_size = 2 * size + MIB
        store.put_many({b"%d" % size: bytes(size)})

    monkeypatch.setattr(Hook, "act", grow)
    before = len(growths())
    assert read(store) == values
    assert len(growths()) == before + 3


@pytest.mark.parametrize("cap", [None, MIB])
def test_threads_that_read_without_a_pause_hold_up_no_growth_and_no_rollback(
    open_store, in_thread, cap
):
    store = open_store(map_size=SMALL_MAP, max_map_size=cap, sync=False)
    store.put_many({b"%d" % number: number for number in range(100)})
    done = threading.Event()

    def read():
        while not done.is_set():
            for number in range(100):
                assert store[b"%d" % number] == number

    readers = [in_thread(read) for _ in range(3)]
    try:
        for number in range(10):
            with suppress(KeyError), store.transaction():
                store[b"0"] = -1
                raise KeyError
            values = {b"large %d" % n: bytes(5 << number << 10) for n in range(50)}
            with suppress(GrowthError):
                store.put_many(values)
            with suppress(GrowthError), store.transaction():
                store.put_many(values)
    finally:
        done.set()
    for reader in readers:
        reader.result()


def test_growth_while_the_items_of_put_many_come_slowly(open_store, in_thread, growths):
    store = open_store(**AT_ONCE)
    waiting, go_on = threading.Event(), threading.Event()

    def items():
        yield b"first", 1
        waiting.set()
        assert go_on.wait(PATIENCE)
        yield b"last", bytes(MIB)

    slow = in_thread(lambda: store.put_many(items()))
    assert waiting.wait(PATIENCE)
    store.put_many({b"big": bytes(MIB)})
    assert len(growths()) == 1
    assert store.get_many([b"first", b"big"]) == ({b"big": bytes(MIB)}, [b"first"])
    go_on.set()
    slow.result()
    assert store[b"first"] == 1
    assert store[b"last"] == bytes(MIB)


def test_a_slow_log_handler_holds_up_nobody(open_store, in_thread):
    store = open_store(**AT_ONCE)
    waiting, go_on = threading.Event(), threading.Event()

    class Slow(logging.Handler):
        def emit(self, record):
            waiting.set()
            assert go_on.wait(PATIENCE)

    log = logging.getLogger("lmdb_object_store")
    slow, level = Slow(), log.level
    log.addHandler(slow)
    log.setLevel(logging.INFO)
    try:
        growing = in_thread(lambda: store.put_many({b"big": bytes(MIB)}))
        assert waiting.wait(PATIENCE)

        def work():
            store.put(b"k", 1)
            store.flush()
            store.put_many({b"l": 2})
            return store.get_many([b"k", b"l"])[0], len(store[b"big"])

        assert in_thread(work).result() == ({b"k": 1, b"l": 2}, MIB)
    finally:
        go_on.set()
        log.removeHandler(slow)
        log.setLevel(level)
    growing.result()


# Other processes

GROW_ELSEWHERE = """
import sys
from lmdb_object_store import LmdbObjectStore
path, first, last = sys.argv[1], *map(int, sys.argv[2:])
with LmdbObjectStore(path, map_size=65536) as store:
    store.put_many((b"%d" % n, bytes([n]) * 2**20) for n in range(first, last))
"""


def grow_elsewhere(path, first, last):
    command = [sys.executable, "-c", GROW_ELSEWHERE, path, first, last]
    subprocess.run(list(map(str, command)), check=True, timeout=PATIENCE)


def put_and_flush(store):
    store.put(b"3", 3)
    store.flush()
    return store[b"3"]


def put_many(store):
    store.put_many({b"3": 3})
    return store[b"3"]


def delete(store):
    del store[b"3"]
    return b"3" in store


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda store: store[b"3"], b"\3" * MIB),
        (lambda store: store.get_many([b"3", b"x"]), ({b"3": b"\3" * MIB}, [b"x"])),
        (lambda store: b"3" in store, True),
        (lambda store: store.exists(b"3"), True),
        (put_and_flush, 3),
        (put_many, 3),
        (delete, False),
    ],
    ids=["get", "get_many", "in", "exists", "put", "put_many", "del"],
)
@pytest.mark.parametrize("cap", [None, SMALL_MAP], ids=["", "capped"])
def test_a_map_grown_by_another_process_is_adopted(open_store, use, expected, cap):
    store = open_store(map_size=SMALL_MAP, max_map_size=cap)
    store.put_many({b"own": 1})
    grow_elsewhere(store.db_path, 0, 6)
    assert use(store) == expected
    assert store[b"own"] == 1
    assert store.env.info()["map_size"] > SMALL_MAP


def test_a_map_grown_by_another_process_is_adopted_read_only(open_store, tmp_path):
    grow_elsewhere(tmp_path / "db", 0, 1)
    store = open_store(map_size=SMALL_MAP, readonly=True)
    before = store.env.info()["map_size"]
    grow_elsewhere(tmp_path / "db", 1, 100)
    assert store[b"99"] == bytes([99]) * MIB
    assert store[b"0"] == bytes(MIB)
    assert store.env.info()["map_size"] > before


def test_a_map_grown_by_another_process_is_adopted_inside_an_unpickling(
    open_store, park
):
    store = open_store(**AT_ONCE)
    value = [1, parked(), b"z" * LARGE, 2]
    store.put_many({b"k": value})
    read_freely(lambda: store[b"k"])
    reader = park(lambda: store[b"k"])
    grow_elsewhere(store.db_path, 0, 3)
    store.put_many({b"k": b"other" * LARGE})
    assert len(store[b"2"]) == MIB
    assert reader.running
    Parked.released.set()
    assert plain(reader.result()) == plain(value)
