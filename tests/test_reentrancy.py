"""User code that runs inside the store's operations may call the store."""

import gc
import logging
import random
import signal
import threading
import weakref
from contextlib import suppress
from itertools import count

import pytest

from conftest import PATIENCE, times
from lmdb_object_store import BusyError, ClosedError
from moments import Parked, at_call, every_step, handling, part_of

LARGE = b"x" * 150_000  # more than what is copied out of the map before it is unpickled


class WhenPickled:
    """Pickling it calls `action`; it is unpickled as 'pickled'."""

    action = staticmethod(lambda: None)

    def __reduce__(self):
        WhenPickled.action()
        return str, ("pickled",)


class WhenUnpickled:
    """Unpickling it calls `action`."""

    action = staticmethod(lambda: None)

    def __init__(self, ballast=b""):
        self.ballast = ballast

    def __setstate__(self, state):
        WhenUnpickled.action()
        self.__dict__.update(state)


class Link:
    """Unpickling it gets the next one."""

    store = None

    def __init__(self, number):
        self.next = f"link {number + 1}"
        self.ballast = LARGE

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.next = Link.store.get(self.next, "the end")


# What runs inside, and what it must return


def put(store):
    store["put inside"] = 1
    return store["put inside"]


def put_a_batch(store):
    store.batch_size = 1
    return put(store)


def put_many(store):
    store.put_many({"put inside": 1})
    return store["put inside"]


def grow(store):
    store.put_many({"large": LARGE * 20})
    store["large"] = LARGE
    return "large" in store


def delete(store):
    store.delete("deleted")
    return store.get("deleted", "gone")


def delete_item(store):
    del store["deleted"]
    return store.get("deleted", "gone")


def flush(store):
    store.flush()
    return store.write_buffer


def pop(store):
    return store.pop("deleted"), store.pop("deleted", "gone")


def popitem(store):
    store["zz"] = 2
    return store.popitem()


def setdefault(store):
    return store.setdefault("default", 3), store.setdefault("stored", 3)


def delete_many(store):
    store["deleted too"] = 1
    return store.delete_many(store.keys("deleted")) + store.delete_many(["deleted"])


def iterate(store):
    forwards, backwards = list(store.items("st")), list(reversed(store.keys("st")))
    return forwards, backwards, len(store.keys("st")), len(store) > 3


INSIDE = {
    "get": (lambda store: store["stored"], 0),
    "get large": (lambda store: store["large"], LARGE),
    "get buffered": (lambda store: store["pending"], 1),
    "get_many": (
        lambda store: store.get_many(["stored", "pending", "x"], decode_keys=True),
        ({"stored": 0, "pending": 1}, ["x"]),
    ),
    "in": (lambda store: "stored" in store, True),
    "exists": (lambda store: store.exists("stored", flush=True), True),
    "put": (put, 1),
    "put a batch": (put_a_batch, 1),
    "put_many": (put_many, 1),
    "grow": (grow, True),
    "delete": (delete, "gone"),
    "del": (delete_item, "gone"),
    "flush": (flush, {}),
    "pop": (pop, (0, "gone")),
    "popitem": (popitem, ("zz", 2)),
    "setdefault": (setdefault, (3, 0)),
    "delete_many": (delete_many, 2),
    "iterate": (iterate, ([("stored", 0)], ["stored"], 1, True)),
}


# Where it runs: each calls `action` once, inside an operation of `store`


def while_pickling_a_put(store, action):
    WhenPickled.action = action
    store["outer"] = WhenPickled()
    assert store["outer"] == "pickled"


def while_pickling_put_many(store, action):
    WhenPickled.action = action
    store.put_many({"outer": WhenPickled(), "last": 2})
    assert (store["outer"], store["last"]) == ("pickled", 2)


def in_items_of_put_many(store, action):
    def items():
        yield "outer", 1
        action()
        yield "last", 2

    store.put_many(items())
    assert (store["outer"], store["last"]) == (1, 2)


def in_keys_of_get_many(store, action):
    def keys():
        yield "stored"
        action()
        yield "pending"

    assert store.get_many(keys(), decode_keys=True)[0] == {"stored": 0, "pending": 1}


def while_pickling_a_default(store, action):
    WhenPickled.action = action
    store.setdefault("outer", WhenPickled())
    assert store["outer"] == "pickled"


def in_keys_of_delete_many(store, action):
    def keys():
        yield "outer"
        action()
        yield "missing"

    store["outer"] = 1
    assert store.delete_many(keys()) == 1
    assert "outer" not in store


def unpickling(call, ballast, buffered):
    def where(store, action):
        WhenUnpickled.action = action
        store.autoflush_on_read = False
        store["outer"] = WhenUnpickled(ballast)
        if not buffered:
            store.flush()
            store["pending"] = 1
        if call == "get":
            assert store["outer"].ballast == ballast
            return
        if call == "items":
            assert dict(store.items("o"))["outer"].ballast == ballast
            return
        if call in ("pop", "setdefault"):
            taken = getattr(store, call)("outer", None)
            assert taken.ballast == ballast
            assert ("outer" in store) == (call == "setdefault")
            return
        keys = ["outer", "pending", "stored", "large"]
        found, _ = store.get_many(keys, decode_keys=True)
        assert found.pop("outer").ballast == ballast
        assert found == {"pending": 1, "stored": 0, "large": LARGE}

    return where


def in_the_log_of_growth(store, action):
    class Handler(logging.Handler):
        def emit(self, record):
            if "grown" in record.getMessage():
                logger.removeHandler(self)
                action()

    logger = logging.getLogger("lmdb_object_store")
    handler = Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        store["outer"] = LARGE * 10
        store.flush()
        assert handler not in logger.handlers
        assert store["outer"] == LARGE * 10
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


WRITING = {
    "pickling, put": while_pickling_a_put,
    "pickling, put_many": while_pickling_put_many,
    "items of put_many": in_items_of_put_many,
    "pickling, setdefault": while_pickling_a_default,
    "keys of delete_many": in_keys_of_delete_many,
}
READING = {
    f"unpickling, {call}, {size}, {'buffered' if buffered else 'stored'}": unpickling(
        call, ballast, buffered
    )
    for call in ("get", "get_many", "pop", "setdefault", "items")
    for size, ballast in (("small", b""), ("large", LARGE))
    for buffered in (False, True)
}
ANYWHERE = {
    **WRITING,
    "keys of get_many": in_keys_of_get_many,
    "log of growth": in_the_log_of_growth,
    **READING,
}


@pytest.fixture
def store(open_store):
    store = open_store(key_encoding="utf-8", map_size=2**19, timeout=0)
    store.put_many({"stored": 0, "deleted": 0, "large": LARGE})
    assert store["large"] == LARGE
    store["pending"] = 1
    return store


@pytest.mark.one_in(3)
@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("where", ANYWHERE)
def test_user_code_may_call_the_store(store, where, inside):
    call, expected = INSIDE[inside]
    seen = []
    ANYWHERE[where](store, lambda: seen.append(call(store)))
    if inside != "get buffered":  # its key is flushed, or not, by who comes first
        assert seen == [expected]
    assert seen
    store.flush()
    assert store["pending"] == 1


@pytest.mark.parametrize("where", [*WRITING, "keys of get_many"])
def test_user_code_may_close_the_store_before_it_is_used(open_store, store, where):
    with pytest.raises(ClosedError, match="closed"):
        ANYWHERE[where](store, store.close)
    assert store.closed
    assert open_store(key_encoding="utf-8")["pending"] == 1


@pytest.mark.parametrize("where", [w for w in READING if "items" not in w])
def test_close_while_unpickling_is_refused(open_store, store, where):
    def close():
        with pytest.raises(BusyError, match="reading from the store"):
            store.close()

    READING[where](store, close)
    store["after"] = 1
    store.close()
    assert open_store(key_encoding="utf-8")["after"] == 1


@pytest.mark.parametrize("inside", ["pop", "popitem", "delete", "put", "clear"])
@pytest.mark.parametrize("outer", ["pop", "popitem"])
@pytest.mark.parametrize("buffered", [False, True])
def test_an_entry_that_is_popped_may_be_changed_by_its_own_unpickling(
    store, outer, inside, buffered
):
    calls = {
        "pop": lambda: store.pop("zz"),
        "popitem": store.popitem,
        "delete": lambda: store.delete("zz"),
        "put": lambda: store.put("zz", "new"),
        "clear": store.clear,
    }

    def change():
        WhenUnpickled.action = lambda: None
        calls[inside]()

    store["zz"] = WhenUnpickled()
    if not buffered:
        store.flush()
    WhenUnpickled.action = change
    if inside == "put":
        assert store.pop("zz") == "new"
    elif outer == "pop":
        assert store.pop("zz", "gone") == "gone"
    elif inside == "clear":
        with pytest.raises(KeyError):
            store.popitem()
    else:
        assert store.popitem() == ("stored", 0)
    assert "zz" not in store


@pytest.mark.parametrize("ballast", [b"", LARGE])
def test_an_iteration_may_close_the_store_while_it_unpickles(store, ballast):
    store.update(stored=WhenUnpickled(ballast), z=1)
    WhenUnpickled.action = store.close
    values = store.values(start="s")
    with pytest.raises(ClosedError, match="closed"):
        list(values)
    assert store.closed


def test_large_values_may_get_large_values(store):
    store.put_many({f"link {number}": Link(number) for number in range(10)})
    Link.store = store
    link, links = store["link 0"], 0
    while link != "the end":
        link, links = link.next, links + 1
    assert links == 10


def test_a_large_value_survives_growth_from_inside(store):
    sizes = []

    def grow():
        sizes.append(store.env.info()["map_size"])
        store.max_map_size = 2 * sizes[-1]
        store.put_many({f"grow {len(sizes)}": bytes(sizes[-1] * 3 // 4)})

    store.put_many({"outer": [WhenUnpickled(LARGE[n:]) for n in range(2)]})
    WhenUnpickled.action = grow
    assert [part.ballast for part in store["outer"]] == [LARGE[n:] for n in range(2)]
    assert store.env.info()["map_size"] > sizes[1] > sizes[0]


def test_a_log_handler_that_writes_to_the_store_does_not_deadlock(store, in_thread):
    # Logging holds the handler's lock while it writes the record of another thread;
    # so whoever logs the growth waits for that, and must not hold up the flush.
    arrived, go_on = threading.Event(), threading.Event()

    class Handler(logging.Handler):
        def emit(self, record):
            if record.name == "application":
                arrived.set()
                assert go_on.wait(PATIENCE)
                store.flush()

    handler = Handler()
    loggers = [logging.getLogger(name) for name in ("application", "lmdb_object_store")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        growth = {"grow": bytes(2**20)}
        with Parked(in_thread, "set_mapsize", lambda: store.put_many(growth)) as writer:
            application = in_thread(lambda: loggers[0].info("hello"))
            assert arrived.wait(PATIENCE)
            go_on.set()
            writer.release()
        application.result()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


# Signals and finalizers


class Visitor:
    """What a signal handler or a finalizer does with the store, again and again."""

    def __init__(self, store, in_thread):
        self.store = store
        self.in_thread = in_thread
        self.visits = 0
        self.served = self.refused = 0
        self.last = {}

    def __call__(self):
        store = self.store
        self.visits += 1
        self.put("visitor")
        store.delete("deleted")
        assert "deleted" not in store
        assert store.get("missing") is None
        found = store.get_many(["stored", "visitor", "large"], decode_keys=True)[0]
        assert found == {"stored": 0, "visitor": self.visits, "large": LARGE}
        assert dict(store.items("s")) == {"stored": 0}
        assert next(reversed(store.keys("v"))) == "visitor"
        assert len(store) >= 3
        for call in (self.flush, self.put_many, self.delete, self.pop):
            try:
                call()
            except BusyError as error:
                assert "signal handler or finalizer" in str(error)  # noqa: PT017
                self.refused += 1
            else:
                self.served += 1
        assert store["large"] == LARGE

    def put(self, key):
        self.store[key] = self.last[key] = self.visits
        assert self.store[key] == self.visits

    def flush(self):
        self.store.flush()
        # No lock was held, or who holds the write lock could wait for us.
        self.in_thread(lambda: self.put("thread")).result()

    def put_many(self):
        self.store.put_many({"many": self.visits})
        self.last["many"] = self.visits

    def delete(self):
        self.store["deleted"] = 0
        del self.store["deleted"]

    def pop(self):
        self.store["deleted"] = self.visits
        assert self.store.setdefault("deleted") == self.visits
        assert self.store.pop("deleted") == self.visits

    def check(self):
        """Nothing that was accepted is lost."""
        found, _ = self.store.get_many(self.last, decode_keys=True)
        assert found == self.last


def get_all(store):
    keys = ["stored", "large", "missing"]
    assert [store.get(key) for key in keys] == [0, LARGE, None]
    assert store.get_many(keys, decode_keys=True) == (
        {"stored": 0, "large": LARGE},
        ["missing"],
    )


def put_a_few(store):
    for number in range(3):
        store[f"few {number}"] = number
    assert [store[f"few {number}"] for number in range(3)] == [0, 1, 2]


def put_and_delete(store):
    store["doomed"] = 1
    del store["doomed"]
    assert "doomed" not in store


def put_many_over_pending(store):
    store["pending"] = 1
    store.put_many({"pending": 2, "batch": 2})
    assert (store["pending"], store["batch"]) == (2, 2)


def flush_pending(store):
    store["pending"] = 1
    store.flush()
    assert store["pending"] == 1


def pop_one(store):
    store["doomed"] = 1
    assert (store.pop("doomed"), store.pop("doomed", 2)) == (1, 2)


def pop_the_last(store):
    store["zz"] = 1
    assert store.popitem() == ("zz", 1)
    assert "zz" not in store


def set_a_default(store):
    store.delete("default")
    assert [store.setdefault("default", number) for number in range(2)] == [0, 0]


def delete_a_few(store):
    store.put_many({f"few {number}": number for number in range(3)})
    store["few 3"] = 3
    assert store.delete_many(["few 1", "few 5"]) == 1
    assert store.delete_many(store.keys("few")) == 3
    assert not list(store.keys("few"))


def iterate_over_all(store):
    items = dict(store.items())
    assert (items["stored"], items["large"]) == (0, LARGE)
    assert {"stored", "large"} <= {*reversed(store.keys())}
    assert list(store.items("st")) == [("stored", 0)]
    assert (len(store) > 1, len(store.keys("st"))) == (True, 1)


OPERATIONS = [
    get_all,
    put_a_few,
    put_and_delete,
    put_many_over_pending,
    flush_pending,
    pop_one,
    set_a_default,
    delete_a_few,
    iterate_over_all,
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("operation", [*OPERATIONS, pop_the_last])
def test_a_signal_handler_may_use_the_store_at_every_moment(
    open_store, in_thread, operation
):
    store = open_store(key_encoding="utf-8", batch_size=3, sync=False)
    store.put_many({"stored": 0, "large": LARGE})
    visitor = Visitor(store, in_thread)
    with handling(visitor):
        for _, result in every_step(lambda: store, operation):
            assert result is None
            visitor.check()
    assert visitor.visits > part_of(100)
    assert visitor.served > visitor.visits


def test_a_signal_handler_may_use_the_store_at_every_moment_of_growth(
    open_store, in_thread
):
    numbers = count()

    def prepare():
        store = open_store(
            str(next(numbers)), key_encoding="utf-8", map_size=2**19, sync=False
        )
        store.put_many({"stored": 0, "large": LARGE})
        return Visitor(store, in_thread)

    def grow(visitor):
        with handling(visitor):
            visitor.store.put_many({"grow": LARGE * 10, "more": 1})

    served = refused = 0
    for visitor, result in every_step(prepare, grow):
        assert result is None
        assert visitor.store["grow"] == LARGE * 10
        visitor.check()
        visitor.store.close()
        served += visitor.served
        refused += visitor.refused
    assert refused > served > part_of(100)


def test_a_signal_handler_never_sees_half_a_clear(open_store):
    keys = ["a", "b", "c", "d"]
    store = open_store(key_encoding="utf-8", autoflush_on_read=False, sync=False)
    seen = []

    def look():
        seen.append([key in store for key in keys])
        seen.append([key in list(store) for key in keys])
        store["visitor"] = 1
        assert store["visitor"] == 1

    def prepare():
        store.clear()
        store.put_many(dict.fromkeys(keys))
        for key in keys[1:]:
            store[key] = "pending"
        return store

    with handling(look):
        for _, result in every_step(prepare, lambda store: store.clear()):
            assert result is None
            assert list(store) in ([], ["visitor"])
    assert {tuple(look) for look in seen} == {(True,) * 4, (False,) * 4}


def put_over_and_over(store):
    # The buffer counts each of them, until it looks more closely.
    for _ in range(3):
        store.put("accepted", b"x" * 100)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("operation", "writes", "options"),
    [
        (lambda store: store.put("accepted", 1), True, {}),
        (lambda store: store.put("accepted", 1), True, {"batch_size": 2}),
        (put_over_and_over, False, {"batch_bytes": 300}),
        (lambda store: store.put_many({"accepted": 1}), True, {}),
        (lambda store: store.flush(), False, {}),
        (lambda store: store["stored"], False, {}),
        (lambda store: store.get_many(["stored"]), False, {}),
        (lambda store: store.setdefault("accepted", 1), True, {}),
        (lambda store: store.pop("missing", 0), False, {}),
        (lambda store: store.delete_many(store.keys("x")), False, {}),
        (lambda store: list(store.items()), False, {}),
        (len, False, {}),
    ],
    ids=[
        *("put", "put a batch", "overwrite", "put_many", "flush", "get", "get_many"),
        *("setdefault", "pop", "delete_many", "items", "len"),
    ],
)
def test_a_signal_handler_may_close_at_every_moment(
    open_store, operation, writes, options
):
    numbers = count()
    outcomes = []

    def prepare():
        name = str(next(numbers))
        store = open_store(name, key_encoding="utf-8", sync=False, **options)
        store.put_many({"stored": 0})
        store["pending"] = 1
        return store

    def close(store):
        with suppress(BusyError):
            store.close()

    def operate(store):
        with handling(lambda: close(store)):
            return operation(store)

    for store, result in every_step(prepare, operate):
        outcomes.append(type(result))
        refused = isinstance(result, ClosedError)
        assert refused or not isinstance(result, BaseException)
        store.close()
        with open_store(store.db_path, key_encoding="utf-8", sync=False) as reopened:
            assert (reopened["stored"], reopened["pending"]) == (0, 1)
            if writes:
                assert reopened.exists("accepted") is not refused
    assert ClosedError in outcomes


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the OS has no timers")
def test_puts_of_a_signal_handler_are_not_lost_among_long_commits(open_store):
    store = open_store(batch_size=50, map_size=2**19)
    dice = random.Random(1)
    visits = count()
    accepted = []
    running = True

    def put():
        key = b"handler %d" % next(visits)
        store[key] = key
        accepted.append(key)
        if running:
            signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 2e-3))

    before = signal.signal(signal.SIGALRM, lambda *_: put())
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
    try:
        number = 0
        while len(accepted) < 300:
            number += 1
            store[b"%d" % number] = number
            store.put_many({b"batch %d" % n: (number, LARGE) for n in range(4)})
            assert store.get_many([b"batch 1"])[0][b"batch 1"][0] == number
    finally:
        running = False  # an alarm that waits is handled at the end of the next call
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    store.close()
    reopened = open_store()
    assert reopened.get_many(accepted)[0] == {key: key for key in accepted}
    assert reopened.get_many([b"%d" % n for n in range(1, number + 1)])[1] == []


def test_puts_of_a_signal_handler_while_the_store_is_closed(open_store):
    store = open_store(sync=False)
    store[b"a"] = 1
    with at_call("sync", lambda: store.put(b"b", 2)) as results:
        store.close()
    assert results == [ClosedError]
    with open_store() as reopened:
        assert dict(reopened) == {b"a": 1}


class Garbage:
    """A reference cycle whose finalizer calls `action` and makes the next one."""

    action = None

    def __init__(self):
        self.cycle = self

    def __del__(self):
        if Garbage.action is not None:
            Garbage.action()
            Garbage()


class WeaklyFinalized:
    """The same with weakref.finalize."""

    def __init__(self):
        self.cycle = self
        weakref.finalize(self, WeaklyFinalized.finalize).atexit = False

    @staticmethod
    def finalize():
        if Garbage.action is not None:
            Garbage.action()
            WeaklyFinalized()


@pytest.mark.one_in(2)
# Without `popitem`, which looks again after each put: here there would be no end of it.
@pytest.mark.parametrize("kind", [Garbage, WeaklyFinalized])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_finalizer_may_use_the_store_wherever_garbage_is_collected(
    open_store, in_thread, operation, kind
):
    store = open_store(key_encoding="utf-8", batch_size=3, sync=False)
    store.put_many({"stored": 0, "large": LARGE})
    visitor = Visitor(store, in_thread)
    thresholds = gc.get_threshold()
    failures = []
    kept = []

    def action():
        try:
            visitor()
        except BaseException as error:  # which a finalizer can't raise
            failures.append(error)

    gc.collect()
    Garbage.action = action
    kind()
    gc.set_threshold(1)
    try:
        for number in range(30):
            # CPython 3.14 takes freed objects off its count of new ones, and would
            # collect no more: these are not freed.
            gc.disable()
            kept.append([[] for _ in range(100)])
            gc.enable()
            operation(store)
            if number >= times(2, thorough=9) and visitor.visits > 10:
                break
    finally:
        Garbage.action = None
        gc.set_threshold(*thresholds)
        gc.collect()
    for error in failures:
        raise error
    assert visitor.visits > 10
    visitor.check()
