"""Random use of the store, compared with a sorted dict after every step."""

import math
import mmap
import operator
import pickle
import shutil
import tempfile
import unicodedata
from functools import partial
from itertools import islice

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from lmdb_object_store import ClosedError, LmdbObjectStore

FORM = "NFC"
NAMES = [
    "a",
    "b",
    "key/\N{SNOWMAN}",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "e\N{COMBINING ACUTE ACCENT}",  # the same key as the one before
    "\0",
    "x" * 500,
]
NO_NAMES = [  # keys that come out as bytes
    "e\N{COMBINING ACUTE ACCENT}".encode(),  # not in that form
    b"a\xff",
    b"\xed\xa0\x80",
    b"\xff",
    b"\xff" * 511,
]
MANY = [f"many {n}" for n in range(60)]
BOUNDS = ["", b"", "k", "m", "many 1", bytearray(b"many 4"), b"a\xff"]
BOUNDS += ["x" * 3_000, b"\xff" * 600]
OPERATIONS = [operator.and_, operator.or_, operator.sub, operator.xor]
OPERATIONS += [operator.le, operator.lt, operator.eq, operator.ge]


def encoded(key):
    return unicodedata.normalize(FORM, key).encode() if isinstance(key, str) else key


def named(key):
    """Return how the encoded key is to come out."""
    try:
        name = key.decode()
    except UnicodeDecodeError:
        return key
    return name if unicodedata.is_normalized(FORM, name) else key


RANKS = {key: n for n, key in enumerate(sorted(map(encoded, NAMES + NO_NAMES + MANY)))}

texts = st.sampled_from([*NAMES, *MANY[::8]])
keys = st.one_of(texts, texts.map(encoded), st.sampled_from(NO_NAMES))
bounds = st.one_of(keys, st.sampled_from(BOUNDS))
ranges = st.fixed_dictionaries(
    {}, optional={"prefix": bounds, "start": bounds, "stop": bounds}
)
kinds = st.sampled_from(["keys", "values", "items"])


def values_of(sizes):
    sizes = st.sampled_from(sizes)
    return st.one_of(
        st.none(),
        st.integers(),
        st.builds(lambda size, fill: bytes([fill]) * size, sizes, st.integers(0, 255)),
        st.builds(lambda size, fill: chr(fill) * size, sizes, st.integers(65, 999)),
        st.lists(st.integers(0, 2**40), max_size=20),
    )


values = values_of([0, 10, 1_000, 5_000, 20_000, 150_000])
fillings = st.builds(
    lambda names, often, seldom: {
        name: (name, seldom if n % 4 == 0 else often) for n, name in enumerate(names)
    },
    st.sampled_from([MANY, MANY[::2], MANY[1::2], MANY[20:40]]),
    values_of([0, 10, 1_000, 5_000, 20_000]),
    values_of([20_000, 150_000]),
)
items = st.one_of(
    st.dictionaries(keys, values, max_size=8),
    st.lists(st.tuples(keys, values), max_size=8),
    fillings,
)
iterators = st.tuples(
    kinds, st.one_of(st.just({}), ranges), st.booleans(), st.integers(0, 5)
)


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError


def pairs_of(items):
    return list(items.items() if isinstance(items, dict) else items)


def in_range(key, prefix=b"", start=b"", stop=None):
    prefix, start = encoded(prefix), encoded(start)
    before_stop = stop is None or key < encoded(stop)
    return key.startswith(bytes(prefix)) and start <= key and before_stop


def broken_off(pairs):
    yield from pairs
    raise ZeroDivisionError


class Walk:
    """An open iterator, and what it may yield and has to.

    A key's rank is its place in the iterator's order.
    """

    def __init__(self, view, kind, is_reversed, model, holds, pace):
        self.iterator = reversed(view) if is_reversed else iter(view)
        self.kind = kind
        self.pace = pace  # by how many entries it moves on in each step
        self.sign = -1 if is_reversed else 1
        self.holds = holds  # whether a key is in the range
        self.values = {}  # all that a key has had since this was opened, by rank
        self.throughout = {self.rank(key) for key in filter(holds, model)}
        # Where it may be, by rank; values alone can leave that open.
        self.places = {-math.inf}

    def rank(self, key):
        return self.sign * RANKS[key]

    def observe(self, model):
        present = {self.rank(key): model[key] for key in filter(self.holds, model)}
        self.throughout &= present.keys()
        for rank, value in present.items():
            seen = self.values.setdefault(rank, [value])
            if seen[-1] is not value:
                seen.append(value)

    def advance(self, count):
        """Check some entries; return whether there may be more."""
        entries = list(islice(self.iterator, count))
        for entry in entries:
            self.move(self.ranks_of(entry))
        if len(entries) < count:
            self.move({math.inf})
        return len(entries) == count

    def ranks_of(self, entry):
        if self.kind == "values":
            return {rank for rank, seen in self.values.items() if entry in seen}
        key = entry if self.kind == "keys" else entry[0]
        assert key == named(encoded(key))
        rank = self.rank(encoded(key))
        assert self.kind == "keys" or entry[1] in self.values[rank]
        return {rank} & self.values.keys()

    def move(self, ranks):
        self.places = {
            rank
            for rank in ranks
            for place in self.places
            if place < rank and not any(place < r < rank for r in self.throughout)
        }
        assert self.places, "an entry out of order, twice, left out or never there"


class StoreAsDict(RuleBasedStateMachine):
    """The store must show what `model` holds, whatever has been flushed or refused."""

    steps = 0  # in all examples

    def __init__(self):
        super().__init__()
        self.path = tempfile.mkdtemp()
        self.model = {}  # by encoded key
        self.walks = []
        self.store = None

    @initialize(
        lib_version=st.sampled_from([0, 1]),
        batch_size=st.sampled_from([1, 20, 1_000, 2_000]),
        batch_bytes=st.sampled_from([3_000, 2**20, 2**26]),
        autoflush=st.booleans(),
        pages=st.sampled_from([None, 64, 256]),
        stored=st.one_of(items, fillings),
        pending=fillings,
        iterators=st.lists(iterators, min_size=1, max_size=3),
    )
    def begin(self, stored, pending, iterators, pages, autoflush, **options):
        self.options = {
            **options,
            "autoflush_on_read": autoflush,
            "max_map_size": pages and pages * mmap.PAGESIZE,
            "key_encoding": "utf-8",
            "str_normalize": FORM,
            "sync": False,
        }
        self.open()
        self.put_many(stored)
        self.update(pending, {})
        for iterator in iterators:
            self.open_iterator(iterator)

    def open(self):
        options = {**self.options, "map_size": 16 * mmap.PAGESIZE}  # so that it grows
        self.store = LmdbObjectStore(self.path, **options)

    def with_room(self, action, *args, pairs=()):
        """Call `action`; as long as it is refused for want of room, make some.

        `pairs` are what it puts one after the other.
        """
        while True:
            try:
                return action(*args)
            except lmdb.MapFullError:
                for key, value in pairs:  # those before the refused one are stored
                    if self.stored() == self.model:
                        break
                    self.model[encoded(key)] = value
                self.agrees()  # otherwise a refused write has changed nothing
                self.go_on()
                assert self.store.max_map_size < 2**30
                self.options["max_map_size"] += self.store.max_map_size // 2
                self.store.max_map_size = self.options["max_map_size"]

    # Writes

    @rule(key=keys, value=values)
    def put(self, key, value):
        self.with_room(self.store.put, key, value)
        self.model[encoded(key)] = value

    @rule(key=keys)
    def delete(self, key):
        self.store.delete(key)  # needs no room, even in a full map
        self.model.pop(encoded(key), None)

    @rule(key=keys)
    def delete_existing(self, key):
        if encoded(key) in self.model:
            del self.store[key]
            del self.model[encoded(key)]
        else:
            with pytest.raises(KeyError):
                del self.store[key]

    @rule(key=keys, strict=st.booleans())
    def pop(self, key, strict):
        default = object()
        expected = self.model.pop(encoded(key), default)
        if expected is default and strict:
            with pytest.raises(KeyError):
                self.store.pop(key)
        else:
            args = () if strict else (default,)
            assert self.store.pop(key, *args) == expected

    @rule()
    def popitem(self):
        if self.model:
            last = max(self.model)
            assert self.store.popitem() == (named(last), self.model.pop(last))
        else:
            with pytest.raises(KeyError):
                self.store.popitem()

    @rule(key=keys, value=values)
    def setdefault(self, key, value):
        result = self.with_room(self.store.setdefault, key, value)
        assert result == self.model.setdefault(encoded(key), value)

    @rule(items=items, more=st.dictionaries(texts, values, max_size=3))
    def update(self, items, more):
        if more:
            update = partial(self.store.update, items, **more)
        else:
            update = partial(operator.ior, self.store, items)
        pairs = [*pairs_of(items), *more.items()]
        result = self.with_room(update, pairs=pairs)
        assert result is (None if more else self.store)
        self.model.update((encoded(key), value) for key, value in pairs)

    @rule(unwanted=st.lists(keys, max_size=20))
    def delete_many(self, unwanted):
        existing = self.model.keys() & set(map(encoded, unwanted))
        assert self.store.delete_many(unwanted) == len(existing)
        for key in existing:
            del self.model[key]

    @rule(bounds=ranges, collect=st.booleans())
    def delete_range(self, bounds, collect):
        view = self.store.keys(**bounds)
        existing = self.within(bounds)
        if bounds:
            unwanted = (key for key in view) if collect else view
            assert self.store.delete_many(unwanted) == len(existing)
        else:
            self.store.clear()
        for key in existing:
            del self.model[key]

    @rule(items=items)
    def put_many(self, items):
        self.with_room(self.store.put_many, items)
        self.model.update((encoded(key), value) for key, value in pairs_of(items))

    @rule(pairs=st.lists(st.tuples(keys, values), max_size=8), key=keys)
    def put_many_that_fails(self, pairs, key):
        pending = dict(self.store.write_buffer)
        for bad in (broken_off(pairs), [*pairs, (key, Unpicklable())]):
            # A value that can never fit may be met first.
            with pytest.raises((ZeroDivisionError, lmdb.MapFullError)):
                self.store.put_many(bad)
        assert self.store.write_buffer == pending

    @rule()
    def flush(self):
        self.with_room(self.store.flush)
        assert not self.store.write_buffer

    # Reads

    @rule(key=keys, flush=st.sampled_from([None, False]))
    def get(self, key, flush):
        default = object()
        expected = self.model.get(encoded(key), default)
        assert self.store.exists(key, flush=flush) == (expected is not default)
        assert (key in self.store) == (expected is not default)
        assert self.store.get(key, default) == expected
        if expected is default:
            with pytest.raises(KeyError):
                self.store[key]
        else:
            assert self.store[key] == expected

    @rule(wanted=st.lists(keys))
    def get_many(self, wanted):
        found, not_found = self.store.get_many(wanted)
        assert found == {
            encoded(key): self.model[encoded(key)]
            for key in wanted
            if encoded(key) in self.model
        }
        assert not_found == [key for key in wanted if encoded(key) not in self.model]
        wanted = [name for name in wanted if isinstance(name, str)]
        found, not_found = self.store.get_many(wanted, decode_keys=True)
        names = [named(encoded(name)) for name in wanted]
        assert found == {k: v for k, v in self.named({}).items() if k in names}
        assert not_found == [name for name in names if name not in found]

    def within(self, bounds):
        """Return the part of the model that is in a range."""
        return {k: self.model[k] for k in sorted(self.model) if in_range(k, **bounds)}

    def named(self, bounds):
        return {named(key): value for key, value in self.within(bounds).items()}

    @rule(bounds=ranges, kind=kinds)
    def read_range(self, bounds, kind):
        view = getattr(self.store, kind)(**bounds)
        expected = list(getattr(self.named(bounds), kind)())
        pending = dict(self.store.write_buffer)
        assert len(view) == len(expected)
        assert bool(view) == bool(expected)
        assert self.store.write_buffer == pending
        assert list(view) == expected
        assert list(reversed(view)) == expected[::-1]

    @rule(bounds=ranges, key=keys, value=values)
    def probe_range(self, bounds, key, value):
        expected = self.within(bounds)
        assert (key in self.store.keys(**bounds)) == (encoded(key) in expected)
        for probe in (value, self.model.get(encoded(key), value)):
            assert (probe in self.store.values(**bounds)) == (
                probe in expected.values()
            )
            assert ((key, probe) in self.store.items(**bounds)) == (
                (encoded(key), probe) in expected.items()
            )

    @rule(
        bounds=ranges,
        others=st.lists(keys),
        operation=st.sampled_from(OPERATIONS),
    )
    def compare_as_sets(self, bounds, others, operation):
        view = self.store.keys(**bounds)
        expected = set(self.named(bounds))
        others = {named(encoded(key)) for key in others}
        assert operation(view, others) == operation(expected, others)
        assert operation(others, view) == operation(others, expected)
        assert view.isdisjoint(others) == expected.isdisjoint(others)
        assert view == expected
        assert self.store.items(**bounds) == self.named(bounds).items()

    @rule(key=keys)
    def compare(self, key):
        same = self.named({})
        assert self.store == same
        assert self.store != {**same, named(encoded(key)): object()}
        assert self.store != {**same, "none of the keys": None}
        assert list(self.store) == list(same)
        assert list(reversed(self.store)) == list(reversed(same))

    def stored(self):
        """Return everything, without flushing."""
        autoflush = self.store.autoflush_on_read
        self.store.autoflush_on_read = False
        found, not_found = self.store.get_many(RANKS)
        self.store.autoflush_on_read = autoflush
        assert set(not_found) == RANKS.keys() - found.keys()
        return found

    @invariant()
    def count_step(self):
        StoreAsDict.steps += 1

    @invariant()
    def agrees(self):
        pending = dict(self.store.write_buffer)
        assert self.stored() == self.model
        assert len(self.store) == len(self.model)
        assert bool(self.store) == bool(self.model)
        shown = f"{len(self.model)} entries, {len(pending)} pending writes"
        assert shown in repr(self.store)
        assert self.store.write_buffer == pending

    # Iterators, which other rules come between

    @rule(iterator=iterators)
    def open_iterator(self, iterator):
        kind, bounds, is_reversed, pace = iterator
        view = getattr(self.store, kind)(**bounds)
        pending = dict(self.store.write_buffer)
        holds = partial(in_range, **bounds)
        walk = Walk(view, kind, is_reversed, self.model, holds, pace)
        if not self.store.autoflush_on_read:
            assert self.store.write_buffer == pending
        elif self.store.max_map_size is None:
            assert not self.store.write_buffer
        self.walks = [*self.walks[-3:], walk]

    @precondition(lambda self: self.walks)
    @rule(which=st.integers(0, 3), count=st.integers(1, 30))
    def advance_iterator(self, which, count):
        walk = self.walks[which % len(self.walks)]
        if not walk.advance(count):
            self.walks.remove(walk)

    @invariant()
    def go_on(self):
        for walk in self.walks[:]:
            walk.observe(self.model)
            if not walk.advance(walk.pace):
                self.walks.remove(walk)

    # The rest

    @rule(autoflush=st.booleans())
    def set_autoflush(self, autoflush):
        self.store.autoflush_on_read = autoflush

    @rule()
    def reopen(self):
        self.close()
        for walk in self.walks:
            with pytest.raises(ClosedError):
                next(walk.iterator)
        self.walks.clear()
        self.open()

    def close(self):
        self.with_room(self.store.flush)
        self.store.close(strict=True)
        with lmdb.open(self.path, readonly=True) as env, env.begin() as txn:
            raw = dict(txn.cursor())
        assert {key: pickle.loads(value) for key, value in raw.items()} == self.model

    def teardown(self):
        try:
            if self.store is not None:
                self.close()
        finally:
            shutil.rmtree(self.path)


@pytest.fixture(scope="module", autouse=True)
def count_steps():
    yield
    print(f"The state machine ran {StoreAsDict.steps} steps.")  # pytest -rP shows it


# Reducing a failure to its essence takes Hypothesis up to five minutes.
TestStoreAsDict = pytest.mark.timeout(400)(StoreAsDict.TestCase)
TestStoreAsDict.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
