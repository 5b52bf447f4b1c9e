"""What reads and writes in one step, or deletes much: whole for all threads."""

import contextlib
import sys
import threading
from functools import partial
from itertools import count

import lmdb
import pytest

from conftest import PATIENCE, run_all
from lmdb_object_store import GrowthError, UnpickleError
from moments import Parked, is_method

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
BUFFERED = pytest.mark.parametrize("buffered", [False, True], ids=["stored", "pending"])


class Bad:
    """It can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("not a number",)


class Slow:
    """Pickling or unpickling it waits for `go_on`."""

    started = threading.Event()
    go_on = threading.Event()

    def __init__(self):
        self.mark = "slow"

    @staticmethod
    def wait():
        Slow.started.set()
        assert Slow.go_on.wait(PATIENCE)

    def __setstate__(self, state):
        self.wait()
        self.__dict__.update(state)


class SlowToPickle(Slow):
    def __reduce__(self):
        self.wait()
        return str, ("default",)


@pytest.fixture
def slow():
    Slow.started.clear()
    Slow.go_on.set()  # until the store is filled
    yield
    Slow.go_on.set()


class ParkedAt(Parked):
    """Stops at the call of `method` which has that number, counted from 1."""

    def __init__(self, in_thread, method, number, action):
        self._to_come = number
        super().__init__(in_thread, method, action)

    def _hook(self, frame, event, function):
        if event == "c_call" and is_method(function, self._method):
            self._to_come -= 1
            if not self._to_come:
                super()._hook(frame, event, function)


@pytest.fixture
def store(open_store):
    return open_store(key_encoding="utf-8", autoflush_on_read=False, sync=False)


# Somebody changes an entry that is being popped


def pop(store):
    try:
        return store.pop("key")
    except KeyError:
        return "KeyError"


def pop_or_default(store):
    return store.pop("key", "KeyError")  # spelt so to be compared with `pop`


def popitem(store):
    try:
        key, value = store.popitem()
    except KeyError:
        return "KeyError"
    return value if key == "key" else "KeyError"


POPS = [pop, pop_or_default, popitem]


def delete_item(store):
    del store["key"]


CHANGES = {
    "put": (lambda store: store.put("key", "new"), "new"),
    "put_many": (lambda store: store.put_many({"key": "new"}), "new"),
    "delete": (lambda store: store.delete("key"), "KeyError"),
    "del": (delete_item, "KeyError"),
    "delete_many": (lambda store: store.delete_many(["key"]), "KeyError"),
    "range": (lambda store: store.delete_many(store.keys(start="b")), "KeyError"),
    "flush": (lambda store: store.flush(), "slow"),
}


@BUFFERED
@pytest.mark.parametrize("call", POPS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_pop_takes_what_is_there_when_it_deletes(
    store, in_thread, slow, call, change, buffered
):
    changing, expected = CHANGES[change]
    store.put_many({"a": 1, "key": Slow()})
    if buffered:
        store["key"] = Slow()
    Slow.go_on.clear()
    popping = in_thread(lambda: call(store))
    assert Slow.started.wait(PATIENCE)
    assert "key" in store  # it goes when its value has been unpickled
    changing(store)
    Slow.go_on.set()
    popped = popping.result()
    assert getattr(popped, "mark", popped) == expected
    assert "key" not in store


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("default", [SlowToPickle, lambda: [SlowToPickle()]])
def test_setdefault_keeps_what_came_while_it_pickled_the_default(
    store, in_thread, slow, default, flush
):
    Slow.go_on.clear()
    setting = in_thread(lambda: store.setdefault("key", default()))
    assert Slow.started.wait(PATIENCE)
    store["key"] = "theirs"
    if flush:
        store.flush()
    Slow.go_on.set()
    assert setting.result() == "theirs"
    assert store["key"] == "theirs"


def test_setdefault_stores_its_default_if_what_came_has_gone_again(
    store, in_thread, slow
):
    Slow.go_on.clear()
    setting = in_thread(lambda: store.setdefault("key", SlowToPickle()))
    assert Slow.started.wait(PATIENCE)
    store["key"] = "theirs"
    store.flush()
    store.delete("key")
    Slow.go_on.set()
    assert isinstance(setting.result(), SlowToPickle)
    assert store["key"] == "default"


def setdefault(store):
    return store.setdefault("key", "default")


def remove(store):
    try:
        delete_item(store)
    except KeyError:
        return "KeyError"
    return "gone"


# Which of the calls of py-lmdb looks at the key to write it if nothing has changed.
LOOKS = {
    pop: ("get", 2),
    pop_or_default: ("get", 2),
    popitem: ("get", 2),
    setdefault: ("get", 2),
    remove: ("set_key", 1),
}


@pytest.mark.parametrize(
    ("moment", "batch_size", "buffered"),
    [
        ("look", 1000, False),
        ("look", 1, False),
        ("putmulti", 1, False),
        ("putmulti", 1, True),
        ("look", 2, False),
        ("putmulti", 2, False),
        ("putmulti", 2, True),
    ],
)
@pytest.mark.parametrize("change", ["put", "delete"])
@pytest.mark.parametrize("call", LOOKS)
def test_what_is_written_between_the_look_and_the_write_is_not_lost(
    store, in_thread, call, change, moment, batch_size, buffered
):
    old = None if call is setdefault else "old"
    if not buffered or old is None:
        store.put_many({"a": 1, "key": "old"} if old else {"a": 1})
    if buffered:
        store.put("key", old) if old else store.delete("key")
    if batch_size == 2:
        store["0"] = 0  # the next write makes the batch full
    store.batch_size = batch_size
    method, number = LOOKS[call] if moment == "look" else (moment, 1)
    with ParkedAt(in_thread, method, number, lambda: call(store)) as parked:
        changing = in_thread(lambda: CHANGES[change][0](store))
        theirs = "new" if change == "put" else None
        if batch_size > 1:  # else it waits for its turn to be written
            changing.result()
            assert store.get("key") == theirs  # it is seen at once
        result = parked.release()
    changing.result()
    # Either of the two came first.
    mine, left = {
        setdefault: ("default", "default"),
        remove: ("gone", None),
    }.get(call, (old, None))
    after_theirs = {
        setdefault: ("new", "new") if theirs else (mine, left),
        remove: (mine, left) if theirs else ("KeyError", None),
    }.get(call, (theirs or "KeyError", None))
    for _ in range(2):
        assert (result, store.get("key")) in ((mine, theirs), after_theirs)
        store.flush()


@pytest.mark.parametrize("batch_size", [1, 1000])
@pytest.mark.parametrize("known", ["new", "deleted", "pending deletion"])
def test_popitem_leaves_a_key_that_is_not_the_last_any_more(
    store, in_thread, batch_size, known
):
    store.put_many({"a": 1, "key": 2})
    if known == "deleted":
        store.put_many({"z": 3})
        store.delete("z")
        store.flush()
    if known == "pending deletion":
        store.delete("z")
    store.batch_size = batch_size
    with ParkedAt(in_thread, *LOOKS[popitem], store.popitem) as parked:
        putting = in_thread(lambda: store.put("z", 4))
        if batch_size > 1:  # else it waits for its turn to be written
            putting.result()
            assert ("key" in store, "z" in store) == (True, True)
        popped = parked.release()
    putting.result()
    if batch_size > 1 or popped == ("z", 4):
        assert (popped, list(store)) == (("z", 4), ["a", "key"])
    else:
        assert (popped, list(store)) == (("key", 2), ["a", "z"])


def test_popitem_minds_no_key_that_comes_before(store, in_thread):
    store.put_many({"key": 2})
    with ParkedAt(in_thread, *LOOKS[popitem], store.popitem) as parked:
        store["a"] = 1
        assert parked.release() == ("key", 2)
    assert list(store) == ["a"]


@pytest.mark.parametrize("theirs", ["a", "z"])
def test_popitem_comes_to_an_end_whatever_others_put_meanwhile(store, theirs):
    store.put_many({"key": "old"})
    numbers = count()

    def put(frame, event, function):  # as a finalizer might
        if event == "c_call":
            sys.setprofile(None)
            store[f"{theirs} {next(numbers):09}"] = "new"
            sys.setprofile(put)

    sys.setprofile(put)
    try:
        key, value = store.popitem()
    finally:
        sys.setprofile(None)
    assert value == ("old" if theirs == "a" else "new")
    assert key not in store
    assert len(store) == next(numbers)


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("call", [pop, popitem, remove], ids=lambda call: call.__name__)
def test_a_put_at_any_call_comes_before_or_after(store, call, buffered):
    outcomes = set()
    to_come = 0

    def put(frame, event, function):  # as a finalizer might
        nonlocal to_come
        to_come -= event == "c_call"
        if not to_come:
            sys.setprofile(None)
            store["key"] = "new"

    for number in count(1):
        store.put_many({"key": "old"})
        if buffered:
            store["key"] = "old"
        to_come = number
        sys.setprofile(put)
        try:
            result = call(store)
        finally:
            sys.setprofile(None)
        if to_come > 0:
            break
        outcomes.add((result, store.get("key")))
    mine = "gone" if call is remove else "old"
    assert outcomes <= {(mine, "new"), (mine if call is remove else "new", None)}
    assert len(outcomes) == 2


# Many at once


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_threads_pop_each_item_once(open_store, hasty, batch_size):
    store = open_store(batch_size=batch_size, sync=False)
    items = {b"%04d" % number: number for number in range(240)}
    for key, value in items.items():
        store[key] = value
    empty = threading.Event()

    def pop_all():
        mine = []
        with contextlib.suppress(KeyError):
            while True:
                mine.append(store.popitem())
        empty.set()
        return mine

    def flush():
        while not empty.is_set():
            store.flush()

    *popped, _ = run_all(*[pop_all] * 4, flush)
    for mine in popped:
        assert mine == sorted(mine, reverse=True)
    everything = [item for mine in popped for item in mine]
    assert sorted(everything) == sorted(items.items())
    assert len(store) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_threads_agree_on_one_default(open_store, hasty, batch_size):
    store = open_store(batch_size=batch_size, sync=False)
    for number in range(30):
        key = b"%d" % number
        calls = [lambda n=n, key=key: store.setdefault(key, n) for n in range(5)]
        *values, _ = run_all(*calls, store.flush)
        assert set(values) == {store[key]}


def test_a_queue_hands_each_task_to_one_consumer(open_store, hasty):
    store = open_store(batch_size=5, map_size=2**16, sync=False)
    numbers, tasks = count(), 300
    done = []

    def produce():
        while (number := next(numbers)) < tasks:
            store[b"%03d" % number] = (number, "x" * number)

    def consume():
        while len(done) < tasks:
            with contextlib.suppress(KeyError):
                key, (number, text) = store.popitem()
                assert (int(key), len(text)) == (number, number)
                done.append(number)

    run_all(produce, produce, consume, consume, consume)
    assert sorted(done) == list(range(tasks))
    assert not store


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_who_pops_and_puts_counts_right(open_store, hasty, batch_size):
    store = open_store(batch_size=batch_size, sync=False)
    store[b"counter"] = 0

    def increment():
        for _ in range(40):
            while (value := store.pop(b"counter", None)) is None:
                pass
            store[b"counter"] = value + 1

    run_all(*[increment] * 4)
    assert store[b"counter"] == 160


# What fails has changed nothing


@BUFFERED
@pytest.mark.parametrize(
    "call",
    [*POPS, lambda store: store.setdefault("key", 1)],
    ids=[*(pop.__name__ for pop in POPS), "setdefault"],
)
def test_a_value_that_can_not_be_unpickled_stays(store, call, buffered):
    store["key"] = Bad()
    if not buffered:
        store.flush()
    before = dict(store.write_buffer)
    source = "buffered" if buffered else "DB"
    with pytest.raises(UnpickleError, match=f"Failed to unpickle {source} key 'key'"):
        call(store)
    assert "key" in store
    assert store.write_buffer == before


def clear(store):
    return store.clear() or "gone"


def delete_two(store):
    return store.delete_many(["key", "missing"]) and "gone"


@ENGINES
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    "call", [pop, popitem, remove, clear, delete_two], ids=lambda call: call.__name__
)
def test_a_deletion_that_can_not_be_written_changes_nothing(
    open_store, call, buffered, lib_version
):
    store = open_store(
        key_encoding="utf-8",
        autoflush_on_read=False,
        map_size=2**18,
        max_map_size=2**18,
        lib_version=lib_version,
    )
    store.put_many({"key": "older" if buffered else "old"})
    if buffered:
        store["key"] = "old"
    store.batch_size = 1
    pending = store.write_buffer
    with store.env.begin():  # no page that is freed now is used again
        size, numbers = 2000, count()
        while size:  # fill what the store itself would leave for deletions
            try:
                with store.env.begin(write=True) as txn:
                    txn.put(b"filler %d" % next(numbers), bytes(size))
            except lmdb.MapFullError:
                size //= 2
        left = len(store)
        for _ in range(3):
            with pytest.raises(GrowthError):
                call(store)
            assert (store["key"], len(store)) == ("old", left)
            assert store.write_buffer == pending
    assert call(store) in ("old", "gone")
    assert "key" not in store


def test_a_default_that_can_not_be_written_is_not_there(open_store):
    store = open_store(batch_size=1, map_size=2**18, max_map_size=2**18)

    def fill():
        for number in count():
            store.setdefault(b"%d" % number, bytes(3000))

    with pytest.raises(GrowthError):
        fill()
    with pytest.raises(GrowthError, match="can never fit"):
        store.setdefault(b"large", bytes(2**18))
    refused = b"%d" % len(store)
    assert refused not in store
    store.max_map_size = None
    assert store.setdefault(refused, 1) == store[refused] == 1


# Deleting much


ERASE = {
    "clear": lambda store, keys: store.clear(),
    "all": lambda store, keys: store.delete_many(store.keys()),
    "range": lambda store, keys: store.delete_many(store.keys("key")),
    "list": lambda store, keys: store.delete_many(keys),
}
KEYS = [f"key {number}" for number in range(8)]  # no more than the first chunk


def fill(store, generation, ballast=b""):
    """Store something under `KEYS`, half of it pending."""
    store.put_many(dict.fromkeys(KEYS, generation))
    for key in KEYS[::2]:
        store[key] = [generation, ballast]


@pytest.mark.parametrize(
    ("erase", "moment", "number"),
    [
        ("clear", "drop", 1),
        ("range", "delete", 1),
        ("range", "delete", 5),
        *((erase, "commit", 2) for erase in ERASE),  # the first one is the flush's
    ],
)
def test_reads_and_puts_do_not_wait_for_a_deletion(
    store, in_thread, erase, moment, number
):
    fill(store, 1)
    erasing = partial(ERASE[erase], store, KEYS)
    with ParkedAt(in_thread, moment, number, erasing) as parked:
        assert list(store) == list(store.keys("key")) == KEYS
        assert len(store) == len(KEYS)
        assert len(store.get_many(KEYS)[0]) == len(KEYS)
        assert store["key 1"] == 1
        store["other"] = 2
        store["key 3"] = 3  # counts as put later
        assert parked.release() in (len(KEYS), None)
    assert dict(store) == {"key 3": 3, "other": 2}


LITTLE_ROOM = {"map_size": 2**19, "max_map_size": 2**19, "autoflush_on_read": False}


@pytest.mark.parametrize(
    ("options", "ballast"),
    [({}, b""), (LITTLE_ROOM, bytes(150_000))],
    ids=["room", "no room for what is pending"],
)
@pytest.mark.parametrize("erase", ERASE)
def test_nobody_sees_half_a_deletion(open_store, hasty, erase, options, ballast):
    store = open_store(key_encoding="utf-8", sync=False, **options)
    over = threading.Event()
    seen = [set() for _ in range(4)]

    def look(seen, action):
        while not over.is_set():
            seen.add(action())

    def look_in_turn():
        while not over.is_set():
            for keys in (KEYS, KEYS[::-1]):
                before = erasing[-1]
                there = [key in store for key in keys]
                if before is erasing[-1] is not None:  # once one is gone all are
                    assert there == sorted(there, reverse=True)

    erasing = [None]

    def fill_and_erase():
        try:
            for generation in range(10_000):
                if generation > 10 and all(len(lengths) > 1 for lengths in seen):
                    break
                erasing.append(None)
                try:
                    fill(store, generation, ballast)
                except GrowthError:
                    continue  # the pages are still being read; try again
                erasing.append(object())
                assert ERASE[erase](store, KEYS) in (len(KEYS), None)
                assert len(store) == 0
        finally:
            over.set()

    run_all(
        lambda: look(seen[0], lambda: len(store.get_many(KEYS)[0])),
        lambda: look(seen[1], lambda: len(store)),
        lambda: look(seen[2], lambda: len(list(store))),
        lambda: look(seen[3], lambda: len(list(store.items()))),
        look_in_turn,
        fill_and_erase,
    )
    assert seen == [{0, len(KEYS)}] * 4


@pytest.fixture
def mixed(store):
    store.put_many(dict.fromkeys("abcdef", 1))
    store["a"] = 2
    store["g"] = 3
    store.delete("b")
    store.delete("missing")
    return store


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda store: [], ""),
        (lambda store: ["b", "missing", "h"], ""),
        (lambda store: ["a", "b", "c", "g", "h", "c", b"c", "g"], "acg"),
        (lambda store: (key for key in store), "acdefg"),
        (lambda store: dict.fromkeys("abg"), "ag"),
        (lambda store: store, "acdefg"),
        (lambda store: store.keys(), "acdefg"),
        (lambda store: store.keys(""), "acdefg"),
        (lambda store: store.keys("a"), "a"),
        (lambda store: store.keys("b"), ""),
        (lambda store: store.keys(start="b", stop="e"), "cd"),
        (lambda store: store.keys(start="f"), "fg"),
        (lambda store: store.keys(stop="d"), "ac"),
        (lambda store: store.keys(start="e", stop="b"), ""),
        (lambda store: store.keys(start="z"), ""),
        (lambda store: reversed(store.keys(stop="d")), "ac"),
        (lambda store: store.keys() - {"c", "d"}, "aefg"),
    ],
)
def test_delete_many_counts_what_was_there(mixed, choose, expected):
    before = dict(mixed)
    assert list(before) == list("acdefg")
    assert mixed.delete_many(choose(mixed)) == len(expected)
    left = {key: value for key, value in before.items() if key not in expected}
    assert dict(mixed) == left
    assert mixed.write_buffer == {}
    assert mixed.delete_many(choose(mixed)) == 0


def test_delete_many_takes_the_keys_of_another_store(open_store, mixed):
    other = open_store("other", key_encoding="utf-8")
    other.update(a=1, b=2, c=3, z=4)
    assert mixed.delete_many(other.keys(start="b")) == 1
    assert list(mixed) == list("adefg")
    assert list(other) == list("abcz")


def test_delete_many_deletes_nothing_if_its_keys_raise(mixed):
    def keys():
        yield "a"
        raise ValueError("no more")

    for bad in (keys(), ["a", 5], ["a", ""], "a", b"a"):
        with pytest.raises((TypeError, ValueError)):
            mixed.delete_many(bad)
    assert list(mixed) == list("acdefg")


def test_clear_deletes_pending_writes_too(mixed):
    mixed.clear()
    assert (len(mixed), list(mixed), mixed.write_buffer) == (0, [], {})
    mixed.clear()
    mixed["a"] = 1
    assert dict(mixed) == {"a": 1}


@pytest.mark.parametrize("erase", ["range", "list"])
def test_what_is_put_while_others_delete_is_not_lost(open_store, hasty, erase):
    store = open_store(key_encoding="utf-8", batch_size=4, sync=False)
    over = threading.Event()

    def put():
        for number in range(150):
            store[f"key {number % 8}"] = number
            mine = f"mine {number % 5}"
            store[mine] = number
            assert store[mine] == number
        over.set()

    def delete():
        while not over.is_set():
            ERASE[erase](store, KEYS)

    run_all(put, delete, delete)
    ERASE[erase](store, KEYS)
    assert dict(store) == {f"mine {number % 5}": number for number in range(145, 150)}


def test_an_interrupted_clear_leaves_all_or_nothing(open_store):
    cap = 2**18
    to_come = 0

    def interrupt(frame, event, function):
        nonlocal to_come
        if event == "c_return" and is_method(function, "commit"):
            to_come -= 1
            if not to_come:
                raise KeyboardInterrupt

    left = []
    for number in count(1):
        store = open_store(f"db {number}", map_size=cap, max_map_size=cap)
        store.autoflush_on_read = False
        store.put_many({b"stored": 1})
        store.update({b"%d" % key: bytes(cap // 4) for key in range(8)})  # no room
        to_come = number
        sys.setprofile(interrupt)
        try:
            store.clear()
        except KeyboardInterrupt:
            left.append(len(store))
        else:
            break
        finally:
            sys.setprofile(None)
    assert left[-1] == 0  # the last commit was that of the clear
    assert set(left) <= {0, 9}
