"""Random use of the store, compared with a sorted dict after every step."""

import math
import mmap
import operator
import pickle
import shutil
import tempfile
import unicodedata
from contextlib import ExitStack
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

from conftest import Worker, times
from lmdb_object_store import (
    BusyError,
    ClosedError,
    LmdbObjectStore,
    SnapshotOpenError,
)

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
sources = st.integers(0, 3)  # an open snapshot or the store


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
lengths = st.integers(0, 12)  # of transaction blocks, in steps
iterators = st.tuples(
    sources, kinds, st.one_of(st.just({}), ranges), st.booleans(), st.integers(0, 5)
)
endings = st.sampled_from([None, ZeroDivisionError, KeyboardInterrupt, SystemExit])
blocks = st.tuples(fillings, lengths, endings)


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError


def pairs_of(items):
    return list(items.items() if isinstance(items, dict) else items)


def in_range(key, prefix=b"", start=b"", stop=None):
    prefix, start = encoded(prefix), encoded(start)
    before_stop = stop is None or key < encoded(stop)
    return key.startswith(bytes(prefix)) and start <= key and before_stop


def within(model, bounds):
    """Return the part of a model that is in a range."""
    return {k: model[k] for k in sorted(model) if in_range(k, **bounds)}


def shown(model, bounds):
    return {named(key): value for key, value in within(model, bounds).items()}


def all_of(mapping):
    found, not_found = mapping.get_many(RANKS)
    assert set(not_found) == RANKS.keys() - found.keys()
    return found


def broken_off(pairs):
    yield from pairs
    raise ZeroDivisionError


class Opened:
    """A transaction block or a snapshot, and the model when it was opened."""

    def __init__(self, manager, model):
        self.stack = ExitStack()
        self.yielded = self.stack.enter_context(manager)
        self.model = dict(model)


class Walk:
    """An open iterator, and what it may yield and has to.

    It is of the store, or of `origin`: a snapshot or a transaction block. A key's
    rank is its place in the iterator's order.
    """

    def __init__(self, origin, view, kind, is_reversed, model, holds, pace):
        self.origin = origin
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
    """The store must show what `model` holds, whatever has been flushed or refused.

    A snapshot must show what the model was when it was opened, and a transaction
    block that fails brings that back.
    """

    steps = 0  # in all examples

    def __init__(self):
        super().__init__()
        self.path = tempfile.mkdtemp()
        self.model = {}  # by encoded key
        self.walks = []
        self.blocks = []  # the outermost first
        self.snapshots = []
        self.store = None

    @initialize(
        lib_version=st.sampled_from([0, 1]),
        batch_size=st.sampled_from([1, 20, 1_000, 2_000]),
        batch_bytes=st.sampled_from([3_000, 2**20, 2**26]),
        autoflush=st.booleans(),
        pages=st.sampled_from([None, 64, 256]),
        snapshot_before=st.sets(st.sampled_from(["stored", "blocks"])),
        stored=st.one_of(items, fillings),
        pending=fillings,
        blocks=st.one_of(
            st.lists(blocks, max_size=1), st.tuples(blocks, blocks, blocks)
        ),
        iterators=st.lists(iterators, min_size=1, max_size=3),
    )
    def begin(
        self,
        snapshot_before,
        stored,
        pending,
        blocks,
        iterators,
        pages,
        autoflush,
        **options,
    ):
        self.options = {
            **options,
            "autoflush_on_read": autoflush,
            "max_map_size": pages and pages * mmap.PAGESIZE,
            "key_encoding": "utf-8",
            "str_normalize": FORM,
            "sync": False,
            "flush_interval": None,
        }
        self.open()
        if "stored" in snapshot_before:
            self.open_snapshot()
        self.put_many(stored)
        self.update(pending, {})
        if "blocks" in snapshot_before:
            self.open_snapshot()
        for filling, length, ending in blocks:
            self.begin_block(length, ending)
            self.update(filling, {})
        for iterator in iterators:
            self.open_iterator(iterator)

    def open(self):
        options = {**self.options, "map_size": 16 * mmap.PAGESIZE}  # so that it grows
        self.store = LmdbObjectStore(self.path, **options)
        self.reads_flush = True

    def with_room(self, action, *args, pairs=()):
        """Call `action`; as long as it is refused for want of room, make some.

        `pairs` are what it puts one after the other.
        """
        while True:
            try:
                return action(*args)
            except lmdb.MapFullError as error:
                for key, value in pairs:  # those before the refused one are stored
                    if self.stored() == self.model:
                        break
                    self.model[encoded(key)] = value
                self.check_all()
                self.make_room(error)

    def without_snapshots(self, action, *args):
        """Call `action`, which needs no room unless a snapshot keeps it all."""
        try:
            return action(*args)
        except lmdb.MapFullError:
            self.check_all()
            assert self.snapshots
            self.close_snapshots()
        return action(*args)

    def check_all(self):
        self.agrees()
        self.go_on()

    def make_room(self, error):
        if self.snapshots:
            self.close_snapshots()
        else:
            assert not isinstance(error, SnapshotOpenError)
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
        self.without_snapshots(self.store.delete, key)
        self.model.pop(encoded(key), None)

    @rule(key=keys)
    def delete_existing(self, key):
        delete = partial(self.without_snapshots, operator.delitem, self.store, key)
        if encoded(key) in self.model:
            delete()
            del self.model[encoded(key)]
        else:
            with pytest.raises(KeyError):
                delete()

    @rule(key=keys, strict=st.booleans())
    def pop(self, key, strict):
        default = object()
        args = () if strict else (default,)
        pop = partial(self.without_snapshots, self.store.pop, key, *args)
        if strict and encoded(key) not in self.model:
            with pytest.raises(KeyError):
                pop()
        else:
            assert pop() == self.model.pop(encoded(key), default)

    @rule()
    def popitem(self):
        popitem = partial(self.without_snapshots, self.store.popitem)
        if self.model:
            last = max(self.model)
            assert popitem() == (named(last), self.model.pop(last))
        else:
            with pytest.raises(KeyError):
                popitem()

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
        count = self.without_snapshots(self.store.delete_many, unwanted)
        assert count == len(existing)
        for key in existing:
            del self.model[key]

    @rule(bounds=ranges, collect=st.booleans())
    def delete_range(self, bounds, collect):
        def delete():
            view = self.store.keys(**bounds)
            return self.store.delete_many((key for key in view) if collect else view)

        existing = within(self.model, bounds)
        if bounds:
            assert self.without_snapshots(delete) == len(existing)
        else:
            self.without_snapshots(self.store.clear)
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

    @rule(
        key=keys,
        default=st.sampled_from([(), (None,), ([],), ([1, 2],)]),
        number=st.integers(),
        error=endings,
    )
    def edit(self, key, default, number, error):
        def append():
            with self.store.edit(key, *default) as value:
                value.append(number)
                self.agrees()  # so far it is a copy
                if error:
                    raise error

        if encoded(key) in self.model or default:
            before = self.model.get(encoded(key), *default)
            refusal = error if isinstance(before, list) else TypeError
        else:
            refusal = KeyError
        if refusal:
            with pytest.raises(refusal):
                self.with_room(append)
        else:
            self.with_room(append)
            self.model[encoded(key)] = [*before, number]

    @rule()
    def flush(self):
        self.with_room(self.store.flush)
        assert not self.store.write_buffer

    # Reads, of the store and of snapshots

    def source(self, which):
        """Return a snapshot or the store, and what it must show."""
        sources = [(opened.yielded, opened.model) for opened in self.snapshots]
        sources += [(self.store, self.model)]
        return sources[which % len(sources)]

    @rule(which=sources, key=keys, flush=st.sampled_from([None, False]))
    def get(self, which, key, flush):
        source, model = self.source(which)
        default = object()
        expected = model.get(encoded(key), default)
        assert (key in source) == (expected is not default)
        assert source.get(key, default) == expected
        if expected is default:
            with pytest.raises(KeyError):
                source[key]
        else:
            assert source[key] == expected
        assert self.store.exists(key, flush=flush) == (encoded(key) in self.model)

    @rule(which=sources, wanted=st.lists(keys))
    def get_many(self, which, wanted):
        source, model = self.source(which)
        found, not_found = source.get_many(wanted)
        assert found == {
            encoded(key): model[encoded(key)] for key in wanted if encoded(key) in model
        }
        assert not_found == [key for key in wanted if encoded(key) not in model]
        wanted = [name for name in wanted if isinstance(name, str)]
        found, not_found = source.get_many(wanted, decode_keys=True)
        names = [named(encoded(name)) for name in wanted]
        assert found == {k: v for k, v in shown(model, {}).items() if k in names}
        assert not_found == [name for name in names if name not in found]

    @rule(which=sources, bounds=ranges, kind=kinds)
    def read_range(self, which, bounds, kind):
        source, model = self.source(which)
        view = getattr(source, kind)(**bounds)
        expected = list(getattr(shown(model, bounds), kind)())
        pending = dict(self.store.write_buffer)
        assert len(view) == len(expected)
        assert bool(view) == bool(expected)
        assert self.store.write_buffer == pending
        assert list(view) == expected
        assert list(reversed(view)) == expected[::-1]

    @rule(which=sources, bounds=ranges, key=keys, value=values)
    def probe_range(self, which, bounds, key, value):
        source, model = self.source(which)
        expected = within(model, bounds)
        assert (key in source.keys(**bounds)) == (encoded(key) in expected)
        for probe in (value, model.get(encoded(key), value)):
            assert (probe in source.values(**bounds)) == (probe in expected.values())
            assert ((key, probe) in source.items(**bounds)) == (
                (encoded(key), probe) in expected.items()
            )

    @rule(
        which=sources,
        bounds=ranges,
        others=st.lists(keys),
        operation=st.sampled_from(OPERATIONS),
    )
    def compare_as_sets(self, which, bounds, others, operation):
        source, model = self.source(which)
        view = source.keys(**bounds)
        expected = set(shown(model, bounds))
        others = {named(encoded(key)) for key in others}
        assert operation(view, others) == operation(expected, others)
        assert operation(others, view) == operation(others, expected)
        assert view.isdisjoint(others) == expected.isdisjoint(others)
        assert view == expected
        assert source.items(**bounds) == shown(model, bounds).items()

    @rule(which=sources, key=keys)
    def compare(self, which, key):
        source, model = self.source(which)
        same = shown(model, {})
        assert source == same
        assert source != {**same, named(encoded(key)): object()}
        assert source != {**same, "none of the keys": None}
        assert list(source) == list(same)
        assert list(reversed(source)) == list(reversed(same))
        assert (source == self.store) == (model == self.model)

    def stored(self):
        """Return everything, without flushing."""
        autoflush = self.store.autoflush_on_read
        self.store.autoflush_on_read = False
        found = all_of(self.store)
        self.store.autoflush_on_read = autoflush
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
        entries = f"{len(self.model)} entries, {len(pending)} pending writes"
        assert entries in repr(self.store)
        assert self.store.write_buffer == pending
        for snapshot in self.snapshots:
            assert all_of(snapshot.yielded) == snapshot.model
            assert len(snapshot.yielded) == len(snapshot.model)

    # Iterators, which other rules come between

    @rule(iterator=iterators)
    def open_iterator(self, iterator):
        which, kind, bounds, is_reversed, pace = iterator
        source, model = self.source(which)
        view = getattr(source, kind)(**bounds)
        pending = dict(self.store.write_buffer)
        opened = [*self.snapshots, *self.blocks]
        origin = next((each for each in opened if each.yielded is source), None)
        holds = partial(in_range, **bounds)
        walk = Walk(origin, view, kind, is_reversed, model, holds, pace)
        if source is not self.store or not self.store.autoflush_on_read:
            assert self.store.write_buffer == pending
        elif self.store.max_map_size is None and self.reads_flush:
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
            if walk.origin in self.snapshots:
                walk.observe(walk.origin.model)
            else:
                walk.observe(self.model if walk.origin else self.committed)
            if not walk.advance(walk.pace):
                self.walks.remove(walk)

    def end_walks(self, origin):
        for walk in [walk for walk in self.walks if walk.origin is origin]:
            with pytest.raises(ClosedError):
                next(walk.iterator)
            self.walks.remove(walk)

    # Transaction blocks, with other rules inside

    @property
    def committed(self):
        return self.blocks[0].model if self.blocks else self.model

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(length=lengths, ending=endings)
    def begin_block(self, length, ending):
        block = self.with_room(lambda: Opened(self.store.transaction(), self.model))
        assert block.yielded is self.store
        block.steps_left, block.ending = length, ending
        if not self.blocks:
            self.last_txn = self.store.env.info()["last_txnid"]
        self.blocks.append(block)

    @precondition(lambda self: self.blocks)
    @invariant()
    def leave_block(self):
        block = self.blocks[-1]
        block.steps_left -= 1
        if block.steps_left < 0:
            if block.ending:
                self.fail_in_block(block.ending)
            else:
                self.end_block()
            self.check_all()

    def end_block(self):
        block = self.blocks.pop()
        try:
            block.stack.close()
        except lmdb.MapFullError as error:
            assert not self.blocks
            self.model = block.model
            self.end_walks(block)
            self.check_all()
            self.make_room(error)
        else:
            self.end_walks(block)

    def fail_in_block(self, error):
        block = self.blocks.pop()
        with pytest.raises(error), block.stack:
            raise error
        self.model = block.model
        self.end_walks(block)

    @precondition(lambda self: self.blocks)
    @rule()
    def refuse_in_block(self):
        with pytest.raises(BusyError), self.store.snapshot():
            pass
        with pytest.raises(BusyError):
            self.store.close()

    @precondition(lambda self: self.blocks)
    @rule()
    def read_in_another_thread(self):
        assert Worker(self.stored).result() == self.committed
        names = Worker(lambda: list(self.store)).result()
        assert names == list(shown(self.committed, {}))

    @precondition(lambda self: self.blocks)
    @invariant()
    def nothing_is_written(self):
        assert not self.store.write_buffer
        assert self.store.env.info()["last_txnid"] == self.last_txn

    # Snapshots

    @precondition(lambda self: len(self.snapshots) < 3 and not self.blocks)
    @rule()
    def open_snapshot(self):
        self.reads_flush = False  # when it has just kept the map from growing
        snapshot = self.with_room(lambda: Opened(self.store.snapshot(), self.model))
        assert not self.store.write_buffer
        self.snapshots.append(snapshot)

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 2))
    def close_snapshot(self, which):
        self.snapshots[which % len(self.snapshots)].stack.close()
        self.forget_closed()

    def close_snapshots(self):
        for snapshot in self.snapshots:
            snapshot.stack.close()
        self.forget_closed()

    def forget_closed(self):
        for snapshot in [s for s in self.snapshots if s.yielded.closed]:
            with pytest.raises(ClosedError):
                len(snapshot.yielded)
            self.snapshots.remove(snapshot)
            self.end_walks(snapshot)

    # The rest

    @rule(autoflush=st.booleans())
    def set_autoflush(self, autoflush):
        self.store.autoflush_on_read = autoflush

    @precondition(lambda self: not self.blocks)
    @rule()
    def reopen(self):
        self.close()
        self.forget_closed()
        assert not self.snapshots
        self.end_walks(None)
        assert not self.walks
        self.open()

    def close(self):
        self.with_room(self.store.flush)
        self.store.close(strict=True)
        with lmdb.open(self.path, readonly=True) as env, env.begin() as txn:
            raw = dict(txn.cursor())
        assert {key: pickle.loads(value) for key, value in raw.items()} == self.model

    def teardown(self):
        try:
            while self.blocks:
                self.end_block()
            if self.store is not None:
                self.close()
        finally:
            shutil.rmtree(self.path)


@pytest.fixture(scope="module", autouse=True)
def count_steps():
    yield
    print(f"The state machine ran {StoreAsDict.steps} steps.")  # pytest -rP shows it


# Reducing a failure to its essence takes Hypothesis up to five minutes.
# Hypothesis warns of a random generator to which nothing refers: gc.freeze() in the
# fixtures hides the reference from it, on 3.14.
TestStoreAsDict = pytest.mark.timeout(400)(
    pytest.mark.filterwarnings("ignore:It looks like .register_random.")(
        StoreAsDict.TestCase
    )
)
TestStoreAsDict.settings = settings(
    max_examples=times(14, thorough=100), stateful_step_count=40, deadline=None
)
