"""A store whose map may not grow any further: what is refused, what still works."""

import contextlib
import itertools
import logging
import mmap
import random

import lmdb
import pytest

from conftest import times
from lmdb_object_store import LmdbObjectStore

KIB = mmap.PAGESIZE // 4  # What fits is a matter of pages, which are not all 4 KiB.
MIB = KIB * 2**10
CAPS = [64 * KIB, 68 * KIB, 96 * KIB, 128 * KIB, 512 * KIB, 2 * MIB, 8 * MIB]

# LMDB 1.0 takes no writemap.
ENGINES = pytest.mark.parametrize(
    "engine",
    [{"lib_version": 0}, {"lib_version": 1}, {"lib_version": 0, "writemap": True}],
    ids=["0.9", "1.0", "0.9, writemap"],
)


@pytest.fixture
def open_capped(open_store):
    names = map(str, itertools.count())

    def open_capped(cap, batch_size=10, **options):
        return open_store(
            next(names),
            batch_size=batch_size,
            map_size=64 * KIB,
            max_map_size=cap,
            sync=False,
            **options,
        )

    return open_capped


def key_of(number):
    return b"%08d" % number


def fill(store, size, start=0):
    """Put values until one is refused; return the first refused key's number."""
    number = start
    with contextlib.suppress(lmdb.MapFullError):
        while True:
            store.put(key_of(number), b"x" * size)
            number += 1
    return number


def entries(store):
    """Return what is in the file, whatever is pending."""
    return store.env.stat()["entries"]


# What is refused


def test_a_refused_put_has_changed_nothing(open_capped):
    store = open_capped(256 * KIB)
    refused = fill(store, 5 * KIB)
    before = dict(store.write_buffer)
    assert len(before) == store.batch_size - 1
    stored = entries(store)
    for key in (key_of(refused), key_of(0), *before):
        if key in before:  # which makes the buffer full by its bytes only
            store.batch_bytes = 10
        with pytest.raises(lmdb.MapFullError, match="max_map_size"):
            store.put(key, "new")
        assert store.write_buffer == before
        assert entries(store) == stored
    assert key_of(refused) not in store
    assert store[key_of(0)] == b"x" * 5 * KIB
    store.max_map_size = None


def test_the_buffer_stays_within_its_limits(open_capped):
    store = open_capped(64 * KIB, 20)
    refused = fill(store, KIB)
    for number in range(refused, refused + 50):
        with pytest.raises(lmdb.MapFullError):
            store.put(key_of(number), b"x" * KIB)
        assert len(store.write_buffer) < 20
    store.batch_size, store.batch_bytes = 10**6, 100 * KIB
    refused = fill(store, KIB, refused)
    pending = sum(len(key) + len(raw) for key, raw in store.write_buffer.items())
    assert 98 * KIB < pending < 100 * KIB
    with pytest.raises(lmdb.MapFullError):
        store.put(key_of(refused), b"x" * 10 * KIB)
    store.put(key_of(refused), b"")
    store.max_map_size = None


def test_a_failed_flush_keeps_everything_and_can_be_repeated(open_capped):
    store = open_capped(128 * KIB, 1000)
    values = {key_of(number): [number, "x" * KIB] for number in range(400)}
    for key, value in values.items():
        store.put(key, value)
    before = dict(store.write_buffer)
    for _ in range(3):
        with pytest.raises(lmdb.MapFullError, match="max_map_size"):
            store.flush()
        assert store.write_buffer == before
        assert entries(store) == 0
    store.max_map_size = 8 * MIB
    store.flush()
    assert not store.write_buffer
    assert store.get_many(values) == (values, [])


def test_reads_go_on_and_log_that_the_buffer_is_stuck(open_capped, caplog):
    store = open_capped(128 * KIB, 1000)
    store.put_many({b"stored": 1, b"changed": 1, b"deleted": 1})
    for number in range(400):
        store.put(key_of(number), [number, "x" * KIB])
    store.put(b"changed", 2)
    reads = [
        (lambda: store.get(b"stored"), 1),
        (lambda: store[b"stored"], 1),
        (lambda: store.get(b"none"), None),
        (lambda: b"stored" in store, True),
        (lambda: store.exists(b"stored"), True),
        (lambda: store.exists(b"none"), False),
        (lambda: store.exists(b"stored", flush=False), True),
        (lambda: store[b"changed"], 2),
        (lambda: store[key_of(7)][0], 7),
        (
            lambda: store.get_many([b"changed", b"stored", b"none"]),
            ({b"changed": 2, b"stored": 1}, [b"none"]),
        ),
    ]
    for read, expected in reads:
        assert read() == expected
    assert len(store.write_buffer) == 401
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors
    assert all(r.name == "lmdb_object_store" for r in errors)
    assert isinstance(errors[0].exc_info[1], lmdb.MapFullError)
    for key in (b"stored", b"none", b"changed"):
        with pytest.raises(lmdb.MapFullError):
            store.exists(key, flush=True)
    store.max_map_size = None
    assert store[b"stored"] == 1
    assert not store.write_buffer


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize(
    "cap", [*CAPS, times(32, thorough=64) * MIB], ids=lambda cap: f"{cap // KIB}K"
)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_value_is_refused_at_once_or_fits(open_capped, engine, cap, used):
    store = open_capped(cap, 1000, **engine)
    if used:
        store.put_many({b"other": 1})
        store.delete(b"other")
        store.flush()
    fits, never = 0, cap
    while never - fits > KIB:
        size = (fits + never) // 2
        try:
            store.put(b"k", bytes(size))
        except lmdb.MapFullError:
            never = size
        else:
            fits = size
    store.flush()  # the largest that was accepted
    assert len(store[b"k"]) == fits
    assert fits > (cap // 2 if cap >= MIB else 0)


def test_put_many_that_can_not_fit_changes_nothing(open_capped):
    store = open_capped(512 * KIB)
    store.put_many({b"a": 1, b"b": 2})
    store.put(b"b", 3)
    huge = {b"c": 1, b"a": bytes(MIB)}  # one value that can never fit
    many = {key_of(number): bytes(KIB) for number in range(1000)} | {b"a": 0}
    for items in (huge, many):
        with pytest.raises(lmdb.MapFullError):
            store.put_many(items)
        assert store.get_many([b"a", b"b", b"c", key_of(0)]) == (
            {b"a": 1, b"b": 3},
            [b"c", key_of(0)],
        )
        assert not [key for key in items if key in store.write_buffer]
    store.put_many({b"a": 4})
    assert store[b"a"] == 4


# Deleting at the cap


@pytest.mark.one_in(12)
@ENGINES
@pytest.mark.parametrize("cap", CAPS, ids=lambda cap: f"{cap // KIB}K")
@pytest.mark.parametrize("batch_size", [1, 10, 1000])
def test_a_full_store_can_delete(open_capped, engine, cap, batch_size):
    for size in (
        KIB // 100,
        KIB // 2,
        1400 * KIB // 1000,
        2 * KIB + 50,
        cap // 20,
        cap // 5,
    ):
        if not 4 <= cap // size <= 4000 or (size > 4 * KIB and cap < 96 * KIB):
            continue  # takes long, or does not fit
        store = open_capped(cap, batch_size, **engine)
        full = fill(store, size)
        assert full > 0
        one = full // 2
        store.delete(key_of(one))
        assert key_of(one) not in store
        for number in range(full):
            if number % 2:
                store.delete(key_of(number))
            elif key_of(number) in store:
                del store[key_of(number)]
        store.flush()
        assert entries(store) == 0
        assert not store.write_buffer
        store.close()


@pytest.mark.parametrize("lib_version", [0, 1])
@pytest.mark.parametrize("size", [KIB // 2, KIB, 2 * KIB])
@pytest.mark.parametrize("cap", CAPS[1:4], ids=lambda cap: f"{cap // KIB}K")
def test_deleting_several_at_once_leaves_room_to_delete(
    open_capped, lib_version, cap, size
):
    keys = [b"%0500d" % number for number in range(cap // size)]
    for several in range(2, 9):
        store = open_capped(cap, 1000, lib_version=lib_version)
        refused = True
        while refused:
            try:
                store.put_many(dict.fromkeys(keys, b"x" * size))
                refused = False
            except lmdb.MapFullError:
                keys.pop()
        for key in keys[:: max(1, len(keys) // several)]:
            store.delete(key)
        store.flush()
        for key in keys:
            store.delete(key)
            store.flush()
        assert entries(store) == 0
        store.close()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("lib_version", [0, 1])
@pytest.mark.parametrize(
    ("size", "counts"),
    [
        (4 * KIB // 3, range(400, 454)),  # two in each leaf
        (4 * KIB - 10, range(100, 130)),  # two pages, for the header of the first
    ],
    ids=["leaves", "pages"],
)
def test_a_batch_that_just_fits_leaves_room_to_delete(
    open_capped, lib_version, size, counts
):
    fitted = []
    for count in counts:
        store = open_capped(MIB, 1, lib_version=lib_version)
        with contextlib.suppress(lmdb.MapFullError):
            store.put_many({key_of(number): b"x" * size for number in range(count)})
            fitted.append(count)
        for number in range(entries(store)):
            store.delete(key_of(number))
        assert entries(store) == 0
        store.close()
    assert 0 < len(fitted) < len(counts)  # the edge is among them


@pytest.mark.one_in(8)
@ENGINES
@pytest.mark.parametrize("cap", CAPS, ids=lambda cap: f"{cap // KIB}K")
def test_full_and_empty_again_and_again(open_capped, engine, cap):
    for size in (max(KIB // 5, cap // 4000), KIB * 4 // 3, cap // 20):
        store = open_capped(cap, max(5, cap // size // 20), **engine)
        first = fill(store, size)
        for _ in range(times(2, thorough=4)):
            for number in range(first):
                store.delete(key_of(number))
            store.flush()
            assert entries(store) == 0
            refilled = min(fill(store, size), first)
            # Some more or less; in the smallest maps a batch may be much.
            assert refilled >= (0.8 * first if cap > 128 * KIB else 1)
            assert all(store[key_of(n)] == b"x" * size for n in range(refilled))
        store.max_map_size = None


@pytest.mark.parametrize("lib_version", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_random_work_at_the_cap_never_gets_stuck(open_capped, lib_version, seed):
    chance = random.Random(seed)
    cap = chance.choice(CAPS[:5])
    largest = chance.choice([KIB // 20, KIB // 2, 2 * KIB, 6 * KIB, cap // 8])
    store = open_capped(
        cap, chance.choice([1, 3, 10, 100, 1000]), lib_version=lib_version
    )
    key_size = chance.choice([4, 100, 400])
    model = {}
    for _ in range(600):
        # Rather full than empty, with bursts of deletions.
        if model and chance.random() < 0.3:
            for key in chance.sample(sorted(model), min(len(model), 5)):
                if chance.random() < 0.5:
                    store.delete(key)
                else:
                    del store[key]
                del model[key]
        else:
            key = chance.randbytes(key_size)
            value = chance.randbytes(chance.randrange(largest))
            try:
                store.put(key, value)
            except lmdb.MapFullError:
                assert key not in store
            else:
                model[key] = value
        if chance.random() < 0.05:
            found, missing = store.get_many(model)
            assert (found, missing) == (model, [])
    for key in model:
        store.delete(key)
    store.flush()
    assert entries(store) == 0
    store.put(b"small", 1)
    store.flush()
    assert store[b"small"] == 1


def test_deletions_of_a_batch_that_does_not_fit_are_committed(open_capped):
    store = open_capped(MIB, 10**6)
    values = {key_of(number): b"x" * KIB for number in range(300)}
    store.put_many(values)
    gone = [key_of(number) for number in range(0, 300, 3)]
    for key in gone:
        store.delete(key)
    pending = {b"new%05d" % number: b"y" * KIB for number in range(2000)}
    for key, value in pending.items():
        store.put(key, value)
    with pytest.raises(lmdb.MapFullError):
        store.flush()
    assert store.write_buffer.keys() == pending.keys()
    assert entries(store) == 200
    assert not any(key in store for key in gone)
    for number in range(2000):
        assert store[b"new%05d" % number] == b"y" * KIB


def test_deletions_make_room_for_the_puts_of_their_batch(open_capped):
    store = open_capped(MIB, 10**6)
    count = 350
    store.put_many({key_of(number): b"x" * KIB for number in range(count)})
    for number in range(count):
        store.delete(key_of(number))
    for number in range(count):
        store.put(b"new%d" % number, b"y" * KIB)
    store.flush()
    assert not store.write_buffer
    assert entries(store) == count


@pytest.mark.parametrize("part", [0.3, 0.45])
@ENGINES
def test_a_large_value_finds_its_room_again(open_capped, engine, part):
    store = open_capped(8 * MIB, **engine)
    value = bytes(int(8 * MIB * part))
    for _ in range(8):
        store.put(b"k", value)
        store.flush()
        assert store[b"k"] == value
        store.delete(b"k")
        store.flush()


def test_closing_a_full_store_raises_and_tells_what_was_lost(open_capped):
    store = open_capped(64 * KIB)
    refused = fill(store, 2 * KIB)
    lost = dict(store.write_buffer)
    with pytest.raises(RuntimeError, match=r"Final flush failed during close\(\)") as e:
        store.close(strict=True)
    assert isinstance(e.value.__cause__, lmdb.MapFullError)
    assert store.closed
    assert store.write_buffer == lost
    assert len(lost) == min(9, refused)
    with LmdbObjectStore(store.db_path) as again:
        assert entries(again) == refused - len(lost)


# Deleting much at the cap


@pytest.mark.one_in(6)
@ENGINES
@pytest.mark.parametrize("cap", CAPS, ids=lambda cap: f"{cap // KIB}K")
@pytest.mark.parametrize("batch_size", [1, 10, 10_000])
def test_a_full_store_can_be_cleared(open_capped, engine, cap, batch_size):
    for size in (KIB // 50, KIB // 2, 2 * KIB, cap // 8, cap // 3):
        if not 3 <= cap // size <= 1500:
            continue  # takes long
        store = open_capped(cap, batch_size, **engine, autoflush_on_read=False)
        for erase in (store.clear, lambda store=store: store.delete_many(store.keys())):
            full = 0
            with contextlib.suppress(lmdb.MapFullError):
                while full < 2 * cap // size:  # what just buffers is never refused
                    store.put(key_of(full), b"x" * size)
                    full += 1
            assert erase() in (full, None)
            assert (len(store), list(store), store.write_buffer) == (0, [], {})
        store.put(b"new", 1)
        store.flush()
        assert store[b"new"] == 1
        store.close()


@ENGINES
@pytest.mark.parametrize("step", [1, -1], ids=["last is pending", "last is stored"])
def test_a_full_store_can_be_popped_empty(open_capped, engine, step):
    store = open_capped(128 * KIB, 10, **engine, autoflush_on_read=False)
    accepted = []
    with contextlib.suppress(lmdb.MapFullError):
        for number in itertools.count(500, step):
            store.put(key_of(number), bytes(6 * KIB))
            accepted.append(key_of(number))
    assert store.write_buffer  # which does not fit
    popped = [store.popitem()[0] for _ in accepted]
    assert popped == sorted(accepted, reverse=True)
    assert not store


@pytest.mark.parametrize("lib_version", [0, 1])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_deleted_at_the_cap_is_counted_right(open_capped, lib_version, seed):
    chance = random.Random(seed)
    store = open_capped(512 * KIB, 10**6, lib_version=lib_version)
    store.autoflush_on_read = False
    model = dict.fromkeys(map(key_of, range(100)), 1)
    store.put_many(model)
    for number in chance.sample(range(150), 100):
        if chance.random() < 0.3:
            store.delete(key_of(number))
            model.pop(key_of(number), None)
        else:
            model[key_of(number)] = bytes(30 * KIB)
            store.put(key_of(number), model[key_of(number)])
    middle = store.keys(start=key_of(30), stop=key_of(120))
    gone = [key for key in sorted(model) if key_of(30) <= key < key_of(120)]
    assert store.delete_many(chance.choice([middle, [*gone, b"missing"]])) == len(gone)
    for key in gone:
        del model[key]
    assert dict(store) == model
    store.clear()
    assert len(store) == 0
