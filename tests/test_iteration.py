"""Iteration while things change: by other threads and in the loop's own body."""

import pickle
import random
import subprocess
import sys
import threading
import tracemalloc
from collections import deque
from functools import partial
from itertools import count, islice, product
from operator import itemgetter
from pathlib import Path

import lmdb
import pytest

from conftest import PATIENCE, needs_fork
from lmdb_object_store import ClosedError, LmdbObjectStore, UnpickleError
from moments import WAITS_FOR_READS, Parked, every_step, handling

LARGE = 150_000  # bytes of a value that isn't copied before it is unpickled
MIB = 2**20
KINDS = ["keys", "values", "items"]
WAYS = list(product(KINDS, [False, True]))  # all ways to iterate, and backwards

NEVER_FLUSHING = {"autoflush_on_read": False, "batch_size": 10**6}

by_kind = pytest.mark.parametrize("kind", KINDS)
by_direction = pytest.mark.parametrize(
    "backwards", [False, True], ids=["forwards", "backwards"]
)


@pytest.fixture(params=["body", "thread"])
def do(request, in_thread):
    """Do something in the loop's body, or meanwhile in another thread."""
    if request.param == "body":
        return lambda action: action()
    return lambda action: in_thread(action).result()


class Hook:
    """Unpickling it calls `act`."""

    act = staticmethod(lambda: None)

    def __init__(self, ballast=None):
        self.ballast = ballast

    def __setstate__(self, state):
        Hook.act()
        self.__dict__.update(state)


@pytest.fixture
def when_unpickled(monkeypatch):
    """Choose what unpickling a `Hook` does."""
    return lambda act: monkeypatch.setattr(Hook, "act", staticmethod(act))


class Pause:
    """Where a thread waits until it may go on."""

    def __init__(self):
        self.reached = threading.Event()
        self.over = threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.over.wait(PATIENCE)


@pytest.fixture
def pause(when_unpickled):
    """Make every unpickling of a `Hook` wait."""
    pause = Pause()
    when_unpickled(pause)
    yield pause
    pause.over.set()


class Broken:
    """Can't be unpickled."""

    def __init__(self, size=0, error=ZeroDivisionError):
        self.error = error
        self.ballast = bytes(size)

    def __setstate__(self, state):
        raise state["error"]("broken")


def key(number):
    return b"%06d" % number


def walk(store, kind, backwards, **bounds):
    view = getattr(store, kind)(**bounds)
    return reversed(view) if backwards else iter(view)


def walks(store):
    """Begin to iterate in every way."""
    return [walk(store, *way) for way in WAYS]


def number(kind, entry):
    """Return the number of an entry, whose value is the number of its key."""
    if kind == "items":
        assert int(entry[0]) == entry[1]
        return entry[1]
    return int(entry)


def entries(contents, kind, backwards=False):
    """Return what iterating over a store with `contents` is to yield."""
    rows = sorted(contents.items(), reverse=backwards, key=itemgetter(0))
    return rows if kind == "items" else [row[kind == "values"] for row in rows]


def survive(iterator):
    """Iterate to the end; yield the messages of values that can't be unpickled."""
    while True:
        try:
            yield next(iterator)
        except UnpickleError as error:
            yield str(error)
        except StopIteration:
            return


# Whatever happens between two steps, or in the middle of one

END = 4_000  # odd numbers below come and go, even ones are there throughout


def around(number):
    return [(number + step) % END | 1 for step in (-600, -40, -1, 1, 3, 40, 600)]


def put(store, number):
    for other in around(number):
        store[key(other)] = other


def overwrite(store, number):
    for other in around(number):
        store[key(other - 1)] = other - 1


def delete(store, number):
    put(store, number + 10)
    for other in around(number):
        store.delete(key(other))


def delete_many(store, number):
    put(store, number + 10)
    store.delete_many(map(key, around(number)))


def put_many(store, number):
    store.put_many({key(other): other for other in around(number)})


def flush(store, number):
    put(store, number)
    store.flush()
    store.delete(key(number | 1))


def grow(store, number):
    put(store, number)
    if number > END // 2 and store.env.info()["map_size"] < 64 * MIB:
        store.put_many({b"~": bytes(2 * MIB)})
        store.delete(b"~")


CHANGES = [put, overwrite, delete, delete_many, put_many, flush, grow]


def fill(store):
    store.put_many({key(number): number for number in range(0, END, 4)})
    for number in range(2, END, 4):
        store[key(number)] = number


def check(numbers, backwards):
    """Check what was seen of a store that was filled and then changed."""
    assert numbers == sorted(set(numbers), reverse=backwards)
    lasting = [number for number in numbers if number % 2 == 0]
    assert lasting == sorted(range(0, END, 2), reverse=backwards)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "options",
    [NEVER_FLUSHING, {"autoflush_on_read": False, "batch_size": 97}, {"batch_size": 1}],
    ids=["never flushing", "flushing sometimes", "flushing always"],
)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_there_throughout_is_seen_once_and_in_order(
    open_store, do, change, options
):
    store = open_store(map_size=MIB, timeout=0, sync=False, **options)
    fill(store)
    seen = {way: [] for way in WAYS}
    rest = {way: walk(store, *way) for way in WAYS}
    dice = random.Random(1)
    while rest:
        way = kind, _ = dice.choice(list(rest))
        step = list(islice(rest[way], dice.choice((1, 7, 100))))
        if not step:
            del rest[way]
            continue
        seen[way] += [number(kind, entry) for entry in step]
        do(partial(change, store, seen[way][-1]))
    for (_, backwards), numbers in seen.items():
        check(numbers, backwards)
    assert change is not grow or store.env.info()["map_size"] > 64 * MIB


@pytest.mark.parametrize("change", [put, delete, put_many, flush, grow])
@pytest.mark.parametrize(
    ("backwards", "moment"),
    [
        *((False, name) for name in ("begin", "cursor", "set_range", "iternext")),
        *((True, name) for name in ("begin", "cursor", "last", "iterprev")),
    ],
)
def test_what_comes_while_a_chunk_is_read_disturbs_nothing(
    open_store, in_thread, backwards, moment, change
):
    store = open_store(map_size=MIB, sync=False, **NEVER_FLUSHING)
    fill(store)
    iterator = walk(store, "items", backwards, stop=None if moment == "last" else b"~")
    seen = []
    if moment != "last":  # where only the first chunk begins
        seen += islice(iterator, 8)
    middle = END // 2 + 100
    with Parked(in_thread, moment, lambda: seen.extend(iterator)) as reader:
        changer = in_thread(lambda: change(store, middle))
        # Growth waits for the chunk, and puts do at its begin.
        if moment != "begin" and change is not grow:
            changer.result()
        reader.release()
        changer.result()
    check([number("items", entry) for entry in seen], backwards)


@by_direction
@pytest.mark.parametrize(
    ("stored", "pending"),
    [
        ({}, {n: n for n in range(3_000)}),
        ({n: n for n in range(3_000)}, dict.fromkeys(range(3_000))),
        ({n: n for n in range(3_000)}, dict.fromkeys(range(5, 2_990))),
        ({n: n for n in range(3_000)}, {n: -n for n in range(1, 3_000, 2)}),
        ({n: n for n in range(0, 3_000, 2)}, {n: n for n in range(1, 3_000, 2)}),
        ({n: n for n in range(1_500)}, {n: n for n in range(1_500, 3_000)}),
        ({}, dict.fromkeys(range(3_000))),
    ],
    ids=[
        *("puts", "deletions of everything", "deletions of whole chunks"),
        *("new values", "puts between", "puts behind", "deletions of nothing"),
    ],
)
def test_pending_writes_are_merged(open_store, stored, pending, backwards):
    store = open_store(sync=False, **NEVER_FLUSHING)
    store.put_many({key(n): value for n, value in stored.items()})
    for n in random.Random(1).sample(list(pending), len(pending)):
        store.delete(key(n))
        if pending[n] is not None:
            store[key(n)] = pending[n]
    contents = {
        key(n): value for n, value in {**stored, **pending}.items() if value is not None
    }
    assert len(store.write_buffer) == len(pending)
    for kind in KINDS:
        assert list(walk(store, kind, backwards)) == entries(contents, kind, backwards)
    assert len(store) == len(contents)
    assert len(store.write_buffer) == len(pending)


@by_direction
@by_kind
def test_what_comes_ahead_is_seen_and_what_comes_behind_is_not(
    open_store, kind, backwards
):
    store = open_store(sync=False, **NEVER_FLUSHING)
    store.put_many({key(n): n for n in range(0, 20_000, 2)})
    iterator = walk(store, kind, backwards)
    seen = [number(kind, next(iterator)) for _ in range(500)]
    new = 11, 19_989
    for n in new:
        store[key(n)] = n
        store.delete(key(n + 2))
    seen += [number(kind, entry) for entry in iterator]
    ahead, behind = new if backwards else reversed(new)
    assert ahead in seen
    assert behind not in seen


@pytest.mark.parametrize("rewrite", [False, True], ids=["cleared", "and written anew"])
def test_clearing_in_the_loop_hides_what_comes_later(open_store, do, rewrite):
    store = open_store(sync=False)
    for kind, backwards in WAYS:
        store.put_many({key(n): n for n in range(9_000)})
        seen = []
        for entry in walk(store, kind, backwards):
            seen.append(number(kind, entry))
            if len(seen) == 100:
                do(store.clear)
                if rewrite:
                    store[key(4_500)] = 4_500
        assert seen == sorted(set(seen), reverse=backwards)
        assert 100 <= len(seen) < 4_500  # the chunk goes on
        assert len(store) == rewrite
        assert not rewrite or seen[-1] == 4_500


@by_direction
def test_threads_iterate_independently(open_store, in_thread, hasty, backwards):
    store = open_store(batch_size=50, map_size=MIB, sync=False)
    fill(store)
    start = threading.Barrier(5)

    def read(kind):
        start.wait(PATIENCE)
        entries = list(walk(store, kind, backwards, stop=b"~"))
        check([number(kind, entry) for entry in entries], backwards)

    def write():
        start.wait(PATIENCE)
        dice = random.Random(1)
        for change in CHANGES * 5:
            change(store, dice.randrange(END))

    workers = [in_thread(partial(read, kind)) for kind in (*KINDS, "items")]
    workers.append(in_thread(write))
    for worker in workers:
        worker.result()


def test_a_signal_handler_that_puts_disturbs_no_step(open_store):
    store = open_store(sync=False, **NEVER_FLUSHING)
    store.put_many({b"1": 1, b"3": 3})

    def prepare():
        store.delete(b"9")
        store.flush()
        store[b"2"] = 2

    def iterate(_):
        with handling(lambda: store.put(b"9", 9)):
            return list(store)

    for _, keys in every_step(prepare, iterate):
        assert keys[:3] == [b"1", b"2", b"3"]


def test_a_put_at_any_call_disturbs_no_loop(open_store):
    store = open_store(sync=False, **NEVER_FLUSHING)
    store.put_many({b"1": 1, b"3": 3})
    store[b"2"] = 2
    numbers = count()

    def put(frame, event, function):  # as a finalizer might
        if event == "c_call":
            sys.setprofile(None)
            store[b"9%d" % next(numbers)] = 9
            sys.setprofile(put)

    sys.setprofile(put)
    try:
        keys = list(islice(store, 3))
    finally:
        sys.setprofile(None)
    assert keys == [b"1", b"2", b"3"]
    assert next(numbers) > 10


def test_a_loop_that_a_finalizer_interrupts_does_not_lock_out_a_clear(
    open_store, in_thread
):
    cap = 2**18
    store = open_store(map_size=cap, max_map_size=cap, **NEVER_FLUSHING)
    store.put_many({b"stored": 1})
    store.update({b"%d" % number: bytes(cap // 4) for number in range(8)})
    inside, go_on = threading.Event(), threading.Event()

    def get(frame, event, function):
        if event == "c_call" and function is len:
            sys.setprofile(None)
            inside.set()
            assert go_on.wait(PATIENCE)
            assert store.get(b"stored") in (1, None)

    def loop():
        sys.setprofile(get)
        try:
            return list(iter(store.keys()))
        finally:
            sys.setprofile(None)

    looping = in_thread(loop)
    assert inside.wait(PATIENCE)
    clearing = in_thread(store.clear)  # there is no room for what is pending
    clearing.wait_until_in(WAITS_FOR_READS)
    go_on.set()
    assert len(looping.result()) in (9, 0)
    clearing.result()
    assert not store


# One moment


@by_direction
@pytest.mark.parametrize("moment", ["cursor", "set_range", "iter"])
@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
def test_a_chunk_shows_one_moment(open_store, in_thread, pending, moment, backwards):
    store = open_store(sync=False, **NEVER_FLUSHING)
    store.put_many({b"a": 1, b"b": 1})
    if pending:
        store[b"a"] = store[b"b"] = 2
    if moment == "iter":
        moment = "iterprev" if backwards else "iternext"
    iterator = walk(store, "values", backwards, stop=b"c")
    with Parked(in_thread, moment, lambda: list(iterator)) as reader:
        store.put_many({b"a": 3, b"b": 3})
        assert reader.release() == ([2, 2] if pending else [1, 1])
    assert list(store.values()) == [3, 3]


@pytest.mark.parametrize("moment", ["begin", "putmulti", "commit", "abort"])
@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
def test_nobody_sees_half_of_a_put_many(open_store, in_thread, pending, moment):
    # With pending writes it is stopped in the middle of the flush before it.
    store = open_store(sync=False)
    before = {b"a": 1, b"m": 1}
    batch = {b"a": 3, b"b": 3, b"z": 3}
    store.put_many(before)
    if pending:
        store[b"a"] = before[b"a"] = 2
        store[b"x"] = before[b"x"] = 2
    after = {**before, **batch}

    def look():
        return [
            *(dict(store.items()), dict(reversed(store.items()))),
            *(len(store), len(store.keys(start=b"a"))),
            store.get_many([b"a", b"b", b"m", b"x", b"z"])[0],
        ]

    with Parked(in_thread, moment, lambda: store.put_many(batch)) as writer:
        # It calls abort() when it has committed.
        now = after if moment == "abort" and not pending else before
        expected = [now, now, len(now), len(now), now]
        assert in_thread(look).result() == expected
        writer.release()
    assert look() == [after, after, len(after), len(after), after]


@pytest.mark.parametrize("moment", ["begin", "putmulti", "commit", "abort"])
def test_a_flush_is_not_seen(open_store, in_thread, moment):
    store = open_store(sync=False, **NEVER_FLUSHING)
    contents = {key(n): n for n in range(2_000)}
    store.put_many(contents)
    for n in range(0, 2_000, 3):
        store.delete(key(n))
        del contents[key(n)]
        store[key(n) + b"+"] = contents[key(n) + b"+"] = -n

    def look():
        rows = list(store.items()), list(reversed(store.keys()))
        return *rows, len(store), len(store.keys(stop=b"~"))

    keys = sorted(contents, reverse=True)
    expected = sorted(contents.items()), keys, len(keys), len(keys)
    with Parked(in_thread, moment, store.flush) as writer:
        assert in_thread(look).result() == expected
        writer.release()
    assert look() == expected


@pytest.mark.parametrize("moment", ["cursor", "set_range"])
@pytest.mark.parametrize("pending", [0, 1, 2], ids="{} pending".format)
def test_the_length_of_a_long_range_shows_one_moment(
    open_store, in_thread, moment, pending
):
    store = open_store(sync=False, **NEVER_FLUSHING)
    size = 20_000
    store.put_many({key(n): n for n in range(1, size - 1)})
    ends = key(0), key(size - 1)
    for end in ends[:pending]:
        store[end] = 0
    before = size - 2 + pending
    measure = partial(len, store.keys(start=b"0"))
    with Parked(in_thread, moment, measure) as reader:
        store.put_many(dict.fromkeys(ends, 1))
        assert reader.release() in {before, size}
    assert len(store) == measure() == size
    with Parked(in_thread, moment, measure) as reader:
        assert store.delete_many(ends) == 2
        assert reader.release() in {size, size - 2}
    assert len(store) == measure() == size - 2


def test_two_keys_never_disagree_while_put_many_writes_both(
    open_store, in_thread, hasty
):
    store = open_store(sync=False, autoflush_on_read=False, batch_size=7)
    pair = b"a", b"b"
    store.put_many(dict.fromkeys(pair, 0))
    done = threading.Event()

    def write():
        for n in count(1):
            store.put_many(dict.fromkeys(pair, n))
            store[b"pending"] = n
            if n % 5 == 0:
                store.delete_many(pair)
            if done.is_set():
                break
        return n

    def read():
        for _ in range(1_000):
            found, _ = store.get_many(pair)
            assert len(set(found.values())) <= 1
            assert len(found) in {0, 2}
            values = list(store.values(stop=b"c"))
            assert values == [*values[:1]] * 2 or not values
            assert len(store.keys(stop=b"c")) in {0, 2}

    writer = in_thread(write)
    try:
        for reader in [in_thread(read), in_thread(read)]:
            reader.result()
    finally:
        done.set()
    assert writer.result() > 10


# Flushing


def last_transaction(store):
    return store.env.info()["last_txnid"]


@pytest.mark.parametrize("autoflush", [False, True])
@by_direction
@by_kind
def test_autoflush_flushes_once_at_the_start(open_store, kind, backwards, autoflush):
    store = open_store(
        batch_size=10**6, autoflush_on_read=autoflush, map_size=8 * MIB, sync=False
    )
    contents = {key(n): n for n in range(2_000)}
    store.update(contents)
    getattr(store, kind)()
    before = last_transaction(store)
    assert len(store.write_buffer) == 2_000
    iterator = walk(store, kind, backwards)
    assert last_transaction(store) - before == autoflush
    assert len(store.write_buffer) == (0 if autoflush else 2_000)
    for entry in iterator:
        n = number(kind, entry)
        store[key(n)] = n
    assert last_transaction(store) - before == autoflush
    assert len(store.write_buffer) == 2_000


# An abandoned iterator holds nothing


def lasting_transactions(store):
    return [
        line for line in store.env.readers().splitlines()[1:] if line.split()[-1] != "-"
    ]


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_an_abandoned_iterator_holds_nothing(open_store, in_thread, large):
    value = bytes(LARGE) if large else 0
    store = open_store(max_readers=2, timeout=0, map_size=4 * MIB, sync=False)
    contents = {key(n): value for n in range(20)}
    store.put_many(contents)
    abandoned = [iterator for _ in range(60) for iterator in walks(store)]
    for steps, iterator in enumerate(abandoned):
        for _ in range(steps % 12):
            next(iterator)
    assert lasting_transactions(store) == []
    in_thread(lambda: store.put_many({b"grow": bytes(8 * MIB)})).result()
    assert store.env.info()["map_size"] > 64 * MIB
    store.delete(b"grow")
    for _ in range(2):
        pages = store.env.info()["last_pgno"]
        store.put_many({b"again": bytes(MIB)})
    assert store.env.info()["last_pgno"] == pages  # old pages are used again
    store.delete(b"again")
    for (kind, backwards), iterator in zip(WAYS, abandoned[-6:], strict=True):
        rest = list(iterator)
        assert rest == entries(contents, kind, backwards)[-len(rest) :]
    in_thread(partial(store.close, strict=True)).result()
    with pytest.raises(ClosedError):
        next(abandoned[1])


def test_a_loop_that_was_left_does_not_keep_old_pages(open_store):
    store = open_store(map_size=4 * MIB, max_map_size=4 * MIB, sync=False)
    store.put_many({key(n): bytes(LARGE) for n in range(10)})
    for kind, backwards in WAYS * 10:
        for _ in walk(store, kind, backwards):
            break
        store.put_many({key(n): bytes(LARGE) for n in range(10)})
    assert len(store) == 10


# Closing


@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
@pytest.mark.parametrize(
    ("large", "size", "steps"),
    [
        *((False, 0, 0), (False, 1, 0), (False, 1, 1), (False, 3, 1)),
        *((False, 30, 2), (False, 30, 8), (False, 30, 30)),
        *((True, 12, 0), (True, 12, 2), (True, 12, 12)),
    ],
)
def test_closing_ends_every_iteration(open_store, do, size, steps, pending, large):
    store = open_store(map_size=16 * MIB, sync=False, **NEVER_FLUSHING)
    value = [0, *range(LARGE // 3)] if large else 0
    for n in range(size):
        store[key(n)] = value
    if not pending:
        store.flush()
    iterators = walks(store)
    for iterator in iterators:
        assert len(list(islice(iterator, steps))) == steps
    do(store.close)
    for iterator in iterators:
        with pytest.raises(ClosedError, match="closed"):
            next(iterator)


@pytest.mark.parametrize("steps", [0, 1, 8, 100])
def test_closing_ends_an_iteration_whose_pending_writes_are_lost(
    open_store, caplog, steps
):
    store = open_store(map_size=MIB, max_map_size=MIB, sync=False, **NEVER_FLUSHING)
    for n in range(0, 200, 2):
        store[key(n)] = n
    store.flush()
    for n in range(1, 200, 2):
        store[key(n)] = bytes(MIB // 20)
    iterators = walks(store)
    for iterator in iterators:
        assert len(list(islice(iterator, steps))) == steps
    store.close()
    assert len(store.write_buffer) == 100
    assert "100 pending writes are lost" in caplog.text
    for iterator in iterators:
        with pytest.raises(ClosedError, match="closed"):
            next(iterator)


@pytest.mark.parametrize("moment", ["begin", "cursor", "set_range", "iternext"])
def test_closing_in_the_middle_of_a_chunk_does_not_cut_it_off(
    open_store, in_thread, moment
):
    store = open_store(sync=False)
    store.put_many({key(n): n for n in range(50)})

    def read():
        try:
            return list(store.items())
        except ClosedError:
            return "closed"

    with Parked(in_thread, moment, read) as reader:
        closer = in_thread(store.close)
        closer.wait_until_in("close")
        assert reader.release() in ("closed", [(key(n), n) for n in range(50)])
        closer.result()


@pytest.mark.parametrize("ballast", [b"", bytes(LARGE)], ids=["small", "large"])
@pytest.mark.parametrize("bystanders", [0, 10])
def test_closing_while_a_value_is_unpickled(
    open_store, in_thread, pause, ballast, bystanders
):
    store = open_store(map_size=16 * MIB, sync=False)
    store.put_many({key(n): bytes(LARGE) for n in range(1, 1 + bystanders)})
    store[key(0)] = Hook(ballast)
    iterator = iter(store.values())
    reader = in_thread(lambda: next(iterator))
    assert pause.reached.wait(PATIENCE)
    in_thread(store.close).result()
    assert reader.running
    pause.over.set()
    assert reader.result().ballast == ballast
    with pytest.raises(ClosedError, match="closed"):
        next(iterator)


# Fork

FORK = """
import os
from itertools import islice
from lmdb_object_store import ClosedError, LmdbObjectStore

store = LmdbObjectStore("db", batch_size=10**6, autoflush_on_read=False, sync=False)
store.put_many({b"%03d" % n: bytes(200_000) for n in range(0, 20, 2)})
for n in range(1, 20, 2):
    store[b"%03d" % n] = n
ways = [
    (turn, kind, steps)
    for turn in (iter, reversed)
    for kind in ("keys", "values", "items")
    for steps in (0, 1, 8, 9, 20)
]
walks = [turn(getattr(store, kind)()) for turn, kind, _ in ways]
seen = [list(islice(walk, way[2])) for walk, way in zip(walks, ways)]
pid = os.fork()
if pid == 0:
    for walk, way in zip(walks, ways):
        try:
            print(*way, "yields", next(walk, "nothing"), flush=True)
        except ClosedError as error:
            assert "Open a store of your own here" in str(error)
        except BaseException as error:
            print(*way, "raises", repr(error), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
for walk, (turn, kind, _), begun in zip(walks, ways, seen):
    everything = begun + list(walk)
    assert everything == list(turn(getattr(store, kind)()))
    assert len(everything) == 20
store.close(strict=True)
"""


@needs_fork
def test_a_forked_child_can_not_go_on_with_an_iteration(tmp_path):
    assert run(FORK, cwd=tmp_path) == ""


def run(script, *arguments, **options):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, check=True, timeout=60, stdout=subprocess.PIPE, text=True, **options
    ).stdout


# Values that can't be unpickled


@pytest.mark.parametrize("size", [0, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
@pytest.mark.parametrize("among", ["small", "large"])
def test_an_iterator_goes_on_after_values_that_can_not_be_unpickled(
    open_store, among, pending, size
):
    store = open_store(key_encoding="utf-8", map_size=32 * MIB, sync=False)
    store.autoflush_on_read = False
    broken = {0, 1, 2, 7, 8, 9, 24, 38, 39}
    contents = {
        f"{n:02}": bytes(LARGE) if among == "large" and n % 3 else n for n in range(40)
    }
    store.put_many({**contents, **{f"{n:02}": Broken(size) for n in broken}})
    if pending:
        for n in broken:
            store[f"{n:02}"] = Broken(size)
    source = "buffered" if pending else "DB"
    for kind, backwards in WAYS:
        expected = entries(contents, kind, backwards)
        for n in broken if kind != "keys" else ():
            message = f"Failed to unpickle {source} key '{n:02}': broken"
            expected[-1 - n if backwards else n] = message
        assert list(survive(walk(store, kind, backwards))) == expected
    assert len(store) == len(store.keys(start="")) == 40
    assert all(name in store.keys(start="") for name in contents)


@pytest.mark.parametrize("error", [StopIteration, LookupError, lmdb.Error, MemoryError])
@pytest.mark.parametrize("size", [0, LARGE], ids=["small", "large"])
def test_whatever_the_unpickling_raises_stops_one_step_only(open_store, error, size):
    store = open_store(sync=False, map_size=16 * MIB)
    bystanders = {key(n): bytes(LARGE) for n in range(10)}
    store.put_many({**bystanders, b"a": Broken(size, error), b"b": 1})
    iterator = iter(store.values(start=b"a"))
    with pytest.raises(UnpickleError, match="DB key 'a': broken") as caught:
        next(iterator)
    assert type(caught.value.__cause__) is error
    assert lasting_transactions(store) == []  # not even while the error is kept
    assert list(iterator) == [1]


# Large values


@pytest.fixture
def mixed():
    """Some MiB of large values, bytes and others, among small ones."""
    values = {}
    for n in range(60):
        values[key(n)] = [
            *(n, bytes([n]) * LARGE, [n, *range(70_000)]),
            *("text" * n, bytes([n]) * (2 * MIB if n == 28 else 20_000), {"n": n}),
        ][n % 6]
    return values


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
@by_direction
def test_large_values_come_out_right_while_the_map_grows(
    open_store, do, mixed, backwards, pending
):
    store = open_store(timeout=0, map_size=32 * MIB, sync=False)
    store.autoflush_on_read = False
    store.put_many(mixed)
    if pending:
        for n in (1, 2, 28, 30):
            store[key(n)] = mixed[key(n)]
    expected = entries(mixed, "items", backwards)
    assert list(walk(store, "items", backwards)) == expected
    iterator = walk(store, "items", backwards)
    seen = list(islice(iterator, 17))
    do(lambda: store.put_many({b"~": bytes(33 * MIB)}))
    do(lambda: store.delete(b"~"))
    assert seen + list(iterator) == expected
    assert store.env.info()["map_size"] > 64 * MIB


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", ["overwrite", "delete", "clear"])
@by_direction
def test_growth_while_a_large_value_is_unpickled(
    open_store, in_thread, pause, mixed, backwards, what
):
    store = open_store(timeout=0, map_size=32 * MIB, sync=False)
    store.put_many({**mixed, b"hook": Hook([1, mixed[key(1)], mixed[key(2)]])})
    iterator = walk(store, "values", backwards, start=b"hook")
    reader = in_thread(lambda: list(iterator))
    assert pause.reached.wait(PATIENCE)

    def change():
        store.put_many({b"grow": bytes(40 * MIB)})
        if what == "clear":
            store.clear()
        elif what == "delete":
            store.delete_many([b"hook", *mixed])
        store.put_many(dict.fromkeys(mixed, bytes(LARGE)))  # over the old pages

    in_thread(change).result()
    assert store.env.info()["map_size"] > 64 * MIB
    assert reader.running
    pause.over.set()
    [value] = reader.result()
    assert value.ballast == [1, mixed[key(1)], mixed[key(2)]]


# User code in the middle of a step


def use_everything(store):
    store[b"inside"] = 1
    assert len(store) == 14
    store.put_many({b"grow": bytes(20 * MIB)})
    store.delete(b"grow")
    store.flush()
    del store[b"inside"]
    assert list(store) == [*map(key, range(12)), b"hook"]
    assert len(list(reversed(store.items(stop=b"hook")))) == 12
    assert store.get_many([key(0), key(11)])[0] == {key(0): 0, key(11): 11}
    store.delete(key(11))


@pytest.mark.parametrize("ballast", [None, bytes(LARGE)], ids=["small", "large"])
@pytest.mark.parametrize("pending", [False, True], ids=["stored", "pending"])
@by_direction
def test_what_is_unpickled_may_use_the_store(
    open_store, when_unpickled, backwards, pending, ballast
):
    store = open_store(timeout=0, sync=False, autoflush_on_read=False)
    store.update({key(n): n for n in range(12)})
    store[b"hook"] = Hook(ballast)
    if not pending:
        store.flush()
    calls = count(1)
    when_unpickled(lambda: next(calls) == 1 and use_everything(store))
    seen = [value for value in walk(store, "values", backwards) if type(value) is int]
    assert next(calls) == 2
    assert [n for n in seen if n != 11] == sorted(range(11), reverse=backwards)
    assert key(11) not in store


@pytest.mark.parametrize("ballast", [None, bytes(LARGE)], ids=["small", "large"])
def test_what_is_unpickled_can_not_drive_the_same_iterator(
    open_store, when_unpickled, ballast
):
    store = open_store(timeout=0, map_size=16 * MIB, sync=False)
    store.put_many({key(n): bytes(LARGE) for n in range(10)})
    store.put_many({b"a": Hook(ballast), b"b": Hook(ballast), b"c": 3})
    iterator = iter(store.values(start=b"a"))
    errors = []

    def advance():
        try:
            next(iterator)
        except ValueError as error:
            errors.append(str(error))

    when_unpickled(advance)
    first, second, third = iterator
    assert errors == ["generator already executing"] * 2  # as with any generator
    assert (first.ballast, second.ballast, third) == (ballast, ballast, 3)


# Memory and cost

IN_USE = """
import sys
from lmdb_object_store import LmdbObjectStore

def in_use():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "RssAnon" in line) * 1024

path, size, pace = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = LmdbObjectStore(path, readonly=True)
before = most = in_use()
for turn, view in (
    (iter, store.items()), (reversed, store.values()), (iter, store.keys())
):
    seen = 0
    for entry in turn(view):
        seen += 1
        if seen % pace == 0:
            most = max(most, in_use())
    assert seen == size
assert len(store.keys(start=b"\\0")) == size
most = max(most, in_use())
store.close()
print(most - before)
"""


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(
    not STATUS.exists() or "RssAnon" not in STATUS.read_text(),
    reason="needs Linux 4.5, which tells what part of the memory is no map",
)
@pytest.mark.parametrize(
    ("size", "value", "pace"),
    [
        (400_000, 0, 4_999),
        (120, bytes(MIB), 1),
        (120, [b"%1000d" % n for n in range(MIB // 1_000)], 1),
    ],
    ids=["small", "large bytes", "large lists"],
)
def test_iterating_takes_little_memory(tmp_path, size, value, pace):
    raw = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    with lmdb.open(str(tmp_path / "db"), map_size=2**30, sync=False) as env:
        for start in range(0, size, 100_000):
            numbers = range(start, min(start + 100_000, size))
            with env.begin(write=True) as txn:
                txn.cursor().putmulti([(b"%09d" % n, raw) for n in numbers])
    assert int(run(IN_USE, tmp_path / "db", size, pace)) < 32 * MIB


def calls(action):
    """Return which methods of py-lmdb `action` calls, and its result."""
    names = []

    def note(frame, event, function):
        kinds = lmdb.Environment, lmdb.Transaction, lmdb.Cursor
        if event == "c_call" and isinstance(function.__self__, kinds):
            names.append(function.__name__)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = action()
    finally:
        sys.setprofile(before)
    return names, result


@pytest.fixture(scope="module")
def small_and_big(tmp_path_factory):
    """A store of a thousand and one of a hundred thousand entries, ten of a kind."""
    stores = []
    for size in (1_000, 100_000):
        path = tmp_path_factory.mktemp("cost") / "db"
        store = LmdbObjectStore(path, map_size=64 * MIB, sync=False)
        others = ((b"az"[n % 2 :][:1] + key(n), n) for n in range(size - 10))
        store.put_many([*others, *((b"m%d" % n, n) for n in range(10))])
        stores.append(store)
    yield stores
    for store in stores:
        store.close()


@by_direction
@by_kind
def test_a_range_costs_the_same_in_a_store_of_any_size(small_and_big, kind, backwards):
    def read(store):
        return [
            list(walk(store, kind, backwards, prefix=b"m")),
            list(walk(store, kind, backwards, start=b"m", stop=b"n")),
            len(store.keys(prefix=b"m")),
            list(islice(walk(store, kind, backwards), 10)),
        ]

    in_small, in_big = (calls(partial(read, store)) for store in small_and_big)
    assert len(in_small[1][0]) == 10
    assert in_small[1][:3] == in_big[1][:3]
    assert in_small[0] == in_big[0]


@pytest.mark.parametrize("pending", [0, 1, 3], ids="{} pending".format)
def test_the_length_of_a_store_costs_the_same_whatever_its_size(small_and_big, pending):
    for store in small_and_big:
        for n in range(pending):
            store.delete(b"missing %d" % n)
    in_small, in_big = (calls(store.__len__) for store in small_and_big)
    assert (in_small[1], in_big[1]) == (1_000, 100_000)
    assert in_small[0] == in_big[0]
    assert in_big[0].count("iternext") == 0
    for store in small_and_big:
        store.flush()


def test_keys_are_read_in_small_chunks(small_and_big):
    _, big = small_and_big
    everything = big.keys(start=b"\0")
    tracemalloc.start()
    try:
        for read in (
            partial(len, everything),
            partial(deque, iter(everything), maxlen=0),
            partial(deque, reversed(everything), maxlen=0),
        ):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read()
            assert tracemalloc.get_traced_memory()[1] - before < MIB
    finally:
        tracemalloc.stop()
