"""Random use of the store, compared with a plain dict after every step."""

import mmap
import pickle
import shutil
import tempfile
import unicodedata

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from lmdb_object_store import LmdbObjectStore

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
MANY = [f"many {n}" for n in range(40)]


def encoded(key):
    return unicodedata.normalize(FORM, key).encode() if isinstance(key, str) else key


keys = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES).map(encoded))
sizes = st.sampled_from([0, 10, 1_000, 5_000, 20_000, 150_000])
values = st.one_of(
    st.none(),
    st.integers(),
    st.builds(lambda size, fill: bytes([fill]) * size, sizes, st.integers(0, 255)),
    st.builds(lambda size, fill: chr(fill) * size, sizes, st.integers(65, 999)),
    st.lists(st.integers(0, 2**40), max_size=20),
)
items = st.one_of(
    st.dictionaries(keys, values, max_size=8),
    st.lists(st.tuples(keys, values), max_size=8),
    st.builds(dict.fromkeys, st.just(MANY), values),
)


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError


def broken_off(pairs):
    yield from pairs
    raise ZeroDivisionError


class StoreAsDict(RuleBasedStateMachine):
    """The store must show what `model` holds, whatever has been flushed or refused."""

    def __init__(self):
        super().__init__()
        self.path = tempfile.mkdtemp()
        self.model = {}
        self.store = None

    @initialize(
        engine=st.sampled_from([0, 1]),
        batch_size=st.integers(1, 20),
        batch_bytes=st.sampled_from([1, 3_000, 2**20]),
        autoflush=st.booleans(),
        pages=st.sampled_from([None, 64, 256]),
    )
    def begin(self, engine, batch_size, batch_bytes, autoflush, pages):
        self.options = {
            "lib_version": engine,
            "batch_size": batch_size,
            "batch_bytes": batch_bytes,
            "autoflush_on_read": autoflush,
            "max_map_size": pages and pages * mmap.PAGESIZE,
            "key_encoding": "utf-8",
            "str_normalize": FORM,
            "sync": False,
        }
        self.open(map_size=16 * mmap.PAGESIZE)

    def open(self, **options):
        self.store = LmdbObjectStore(self.path, **{**self.options, **options})

    def with_room(self, action, *args):
        """Call `action`; as long as it is refused for want of room, make some."""
        while True:
            try:
                return action(*args)
            except lmdb.MapFullError:
                self.agrees()  # a refused write has changed nothing
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

    @rule(items=items)
    def put_many(self, items):
        self.with_room(self.store.put_many, items)
        pairs = items.items() if isinstance(items, dict) else items
        self.model.update((encoded(key), value) for key, value in pairs)

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

    @rule(key=keys)
    def get(self, key):
        default = object()
        expected = self.model.get(encoded(key), default)
        assert self.store.get(key, default) == expected
        if expected is default:
            with pytest.raises(KeyError):
                self.store[key]
        else:
            assert self.store[key] == expected

    @rule(key=keys, flush=st.sampled_from([None, False]))
    def exists(self, key, flush):
        assert (key in self.store) == (encoded(key) in self.model)
        assert self.store.exists(key, flush=flush) == (encoded(key) in self.model)

    @rule(wanted=st.lists(keys), decode=st.booleans())
    def get_many(self, wanted, decode):
        found, not_found = self.store.get_many(wanted, decode_keys=decode)
        if decode:
            found = {encoded(key): value for key, value in found.items()}
            not_found = [encoded(key) for key in not_found]
        raw = [encoded(key) for key in wanted]
        assert found == {key: self.model[key] for key in raw if key in self.model}
        assert [encoded(k) for k in not_found] == [
            k for k in raw if k not in self.model
        ]

    @invariant()
    def agrees(self):
        """Compare without flushing."""
        autoflush = self.store.autoflush_on_read
        self.store.autoflush_on_read = False
        everything = {encoded(key) for key in [*NAMES, *MANY]}
        found, not_found = self.store.get_many(everything)
        assert found == self.model
        assert set(not_found) == everything - self.model.keys()
        self.store.autoflush_on_read = autoflush

    # The rest

    @rule(autoflush=st.booleans())
    def set_autoflush(self, autoflush):
        self.store.autoflush_on_read = autoflush

    @rule()
    def reopen(self):
        self.close()
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


# Reducing a failure to its essence takes Hypothesis up to five minutes.
TestStoreAsDict = pytest.mark.timeout(400)(StoreAsDict.TestCase)
TestStoreAsDict.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
