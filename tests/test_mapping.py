"""The store as a sorted mapping: iteration, ranges, views and bulk changes."""

import operator
import random
import unicodedata
import unittest
from collections import ChainMap, OrderedDict, UserDict, defaultdict
from collections.abc import ItemsView, KeysView, Mapping, MutableMapping, ValuesView
from itertools import count, product
from types import MappingProxyType
from unittest.mock import ANY

import pytest

from lmdb_object_store import (
    ClosedError,
    LmdbObjectStore,
    ReadOnlyError,
    SizeError,
    UnpickleError,
)

LARGE = 150 * 2**10
"""Bytes of a value that is unpickled piece by piece."""


class Unreadable:
    """Can be pickled, but not unpickled."""

    def __init__(self, size=0):
        self.padding = bytes(size)

    def __setstate__(self, state):
        raise ZeroDivisionError("unpickled")


@pytest.fixture
def store(open_store):
    return open_store(key_encoding="utf-8", sync=False)


@pytest.fixture(params=["stored", "pending"])
def settle(request):
    """Flush, or leave what is pending as it is."""
    return LmdbObjectStore.flush if request.param == "stored" else lambda store: None


def last_transaction(store):
    return store.env.info()["last_txnid"]


# What every mapping has


def test_store_is_a_mutable_mapping(store):
    store.update(b=2, a=1)
    assert isinstance(store, MutableMapping)
    assert dict(store) == {**store} == {"a": 1, "b": 2}
    match store:
        case {"b": found, **rest}:
            assert (found, rest) == (2, {"a": 1})
        case _:
            pytest.fail("not matched as a mapping")


def test_cpythons_own_mapping_tests_pass(open_store):
    tests = pytest.importorskip(
        "test.mapping_tests", reason="this interpreter comes without its own tests"
    )
    numbers = count()

    class Case(tests.BasicTestMappingProtocol):
        # They want values(None) and items(None) refused; here None is a prefix.
        test_values = test_items = None

        @staticmethod
        def type2test():
            name = f"db{next(numbers)}"
            return open_store(name, key_encoding="utf-8", sync=False, map_size=2**18)

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    problems = result.errors + result.failures + result.skipped
    assert not problems, "\n".join(text for _, text in problems)
    assert result.testsRun >= 10


def test_iteration_is_in_the_order_of_the_encoded_bytes(open_store, settle):
    store = open_store(key_encoding="utf-16-le")
    names = ["b", "a", "\u0101", "\U0001f600", "\uffff", "ab", "\0"]
    store.update(zip(names, count()))
    settle(store)
    expected = sorted(names, key=lambda name: name.encode("utf-16-le"))
    assert expected != sorted(names)
    assert list(store) == list(store.keys()) == expected
    assert list(reversed(store)) == list(reversed(store.keys())) == expected[::-1]
    assert list(store.values()) == [names.index(name) for name in expected]


@pytest.mark.parametrize("autoflush", [True, False])
def test_length_and_truth_count_pending_writes(open_store, autoflush):
    store = open_store(autoflush_on_read=autoflush)
    assert (len(store), bool(store)) == (0, False)
    store.put(b"a", None)
    assert (len(store), bool(store)) == (1, True)
    store.put_many({b"b": 1, b"c": 1})
    store.put(b"b", 2)
    store.put(b"d", 2)
    store.delete(b"c")
    store.delete(b"missing")
    assert len(store) == len(store.keys()) == len(store.items()) == 3
    store.delete(b"a")
    store.delete(b"b")
    store.delete(b"d")
    assert len(store.write_buffer) == 5
    assert (len(store), bool(store)) == (0, False)
    store.flush()
    assert (len(store), bool(store)) == (0, False)


NEVER_FLUSHES = {
    "len": len,
    "bool": bool,
    "repr": repr,
    "in": lambda store: "stored" in store,
    "keys()": lambda store: store.keys(),
    "len(keys())": lambda store: len(store.keys()),
    "len(items())": lambda store: len(store.items(prefix="s")),
    "len(values())": lambda store: len(store.values(start="a")),
    "in keys()": lambda store: "stored" in store.keys(),  # noqa: SIM118
    "repr(keys())": lambda store: repr(store.keys()),
}


@pytest.mark.parametrize("call", NEVER_FLUSHES.values(), ids=NEVER_FLUSHES)
def test_counting_and_looking_never_flush(store, call):
    store.put_many({"stored": 1})
    store.put("pending", 1)
    call(store)
    assert store.write_buffer.keys() == {b"pending"}


@pytest.mark.parametrize("autoflush", [True, False])
def test_loop_flushes_at_its_start_only(open_store, autoflush):
    store = open_store(autoflush_on_read=autoflush, sync=False)
    views = (store.keys(), store.values(), store.items())
    for view, direction in product(views, (iter, reversed)):
        store.put(b"m", 1)
        rest = direction(view)
        next(rest)
        assert (b"m" in store.write_buffer) is not autoflush
        store.put(b"a", 1)
        store.put(b"z", 1)
        list(rest)
        assert store.write_buffer.keys() >= {b"a", b"z"}


@pytest.mark.parametrize("autoflush", [True, False])
def test_loop_may_change_what_it_runs_over(open_store, autoflush):
    store = open_store(autoflush_on_read=autoflush, sync=False, batch_size=50)
    names = [b"%03d" % n for n in range(200)]
    store.update(zip(names, count()))
    seen = []
    for key in store:
        seen.append(key)
        store[key] += 1000
        del store[key]
        store.put(b"!" + key, "behind the loop")
    assert seen == names
    assert list(store) == [b"!" + key for key in names]


@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("direction", [iter, reversed])
def test_loop_may_change_and_flush_what_is_ahead_of_it(
    open_store, autoflush, direction
):
    store = open_store(autoflush_on_read=autoflush, sync=False, batch_size=10_000)
    chance = random.Random(1)
    names = [b"%03d" % number for number in range(600)]
    store.update(dict.fromkeys(names))
    seen = []
    for key in direction(store):
        seen.append(key)
        store[chance.choice(names)] = "new"
        store.delete(chance.choice(names[1::3]))
        if len(seen) % 20 == 0:
            store.flush()
    assert seen == list(direction(sorted(set(seen))))
    lasting = [key for key in seen if int(key) % 3 != 1]
    assert lasting == [key for key in direction(names) if int(key) % 3 != 1]


# repr


def test_repr_tells_path_entries_and_pending_writes(store):
    store.put_many({"a": 1, "b": 2})
    store.put("b", 3)
    store.put("c", 4)
    store.delete("a")
    shown = repr(store)
    assert repr(store.db_path) in shown
    assert "2 entries" in shown
    assert "3 pending" in shown
    assert len(store.write_buffer) == 3


def test_repr_of_a_closed_store_says_so(store):
    view = store.keys("a")
    store.close()
    assert repr(store.db_path) in repr(store)
    assert "closed" in repr(store)
    assert repr(store.db_path) in repr(view)


def test_repr_names_the_subclass(tmp_path):
    class Users(LmdbObjectStore):
        pass

    with Users(tmp_path) as store:
        assert repr(store).startswith("<Users ")


# Equality


@pytest.mark.parametrize(
    "make", [dict, OrderedDict, UserDict, MappingProxyType, ChainMap]
)
def test_store_equals_mappings_of_the_same_keys_and_values(store, settle, make):
    content = {"b": [1], "a": {"x": None}}
    store.update(content)
    settle(store)
    equal = make(content)
    assert store == equal
    assert equal == store
    assert operator.ne(store, equal) is False
    for changed in (
        {},
        {"a": {"x": None}},
        {"a": {"x": None}, "b": [2]},
        {"a": {"x": None}, "c": [1]},
        {"a": {"x": None}, 5: [1]},
        {"a": {"x": None}, b"b": [1]},
        {**content, "c": None},
    ):
        other = make(changed)
        assert store != other
        assert other != store
        assert operator.eq(store, other) is False


def test_equality_does_not_fill_a_defaultdict(store):
    store["a"] = []
    other = defaultdict(list, b=[])
    assert store != other
    assert other == {"b": []}


@pytest.mark.parametrize(
    ("mine", "theirs", "equal"),
    [
        ({"key_encoding": "utf-8"}, {"key_encoding": "utf-8"}, True),
        ({"key_encoding": "utf-8"}, {"key_encoding": "utf-16"}, True),
        ({"key_encoding": "latin-1"}, {"key_encoding": "utf-8"}, True),
        ({"key_encoding": "utf-8"}, {"key_encoding": "ascii"}, False),
        ({"key_encoding": "utf-8"}, {}, False),
        (
            {"key_encoding": "utf-8"},
            {"key_encoding": "utf-8", "str_normalize": "NFD"},
            False,
        ),
    ],
)
def test_equality_of_stores_goes_by_the_keys_that_come_out(
    open_store, mine, theirs, equal
):
    one = open_store("one", **mine)
    other = open_store("other", **theirs)
    one["é"] = 1
    other["é" if theirs.get("key_encoding") not in (None, "ascii") else b"\xc3\xa9"] = 1
    assert (list(one) == list(other)) is equal
    assert (one == other) is equal
    assert (other == one) is equal
    assert one == one
    other.put_many({b"more": 1})
    assert one != other


class NotToBeRead(Mapping):
    def __getitem__(self, key):
        raise AssertionError("read")

    def __iter__(self):
        raise AssertionError("read")

    def __len__(self):
        return 2


def test_unequal_lengths_read_no_value(store):
    store["a"] = Unreadable()
    for other in (NotToBeRead(), {}, {"a": 1, "b": 2}):
        assert store != other
        assert operator.eq(store, other) is False


def test_store_equals_nothing_that_is_no_mapping(store):
    store["a"] = 1
    for other in (None, 5, "a", [("a", 1)], {"a"}, store.items(), object()):
        assert store != other
        assert operator.eq(store, other) is False
    assert store == ANY  # which decides for itself


def test_store_is_not_hashable(store):
    with pytest.raises(TypeError, match="unhashable"):
        hash(store)


# Ranges

LETTERS = (b"\0", b"a", b"\xff")


def words(longest):
    return [
        b"".join(letters)
        for size in range(1, longest + 1)
        for letters in product(LETTERS, repeat=size)
    ]


KEYS = words(3)
BOUNDS = [None, b"", *words(2), b"a" * 600, b"\xff" * 3000]
RANGES = [
    dict(zip(("prefix", "start", "stop"), bounds, strict=True))
    for bounds in product(BOUNDS, repeat=3)
]


def write_mixed(store):
    """Write through, then leave pending writes between and over that; the result."""
    store.put_many({key: number for number, key in enumerate(KEYS) if number % 2})
    model = dict(store.items())
    for number, key in enumerate(KEYS):
        if number % 3 == 0:
            store.put(key, -number)
            model[key] = -number
        elif number % 5 == 0:
            store.delete(key)
            model.pop(key, None)
    assert store.write_buffer
    return model


def in_range(model, prefix=None, start=None, stop=None):
    return [
        (key, model[key])
        for key in sorted(model)
        if key.startswith(prefix or b"")
        and key >= (start or b"")
        and (stop is None or key < stop)
    ]


def assert_shows(store, model, bounds):
    expected = in_range(model, **bounds)
    names = [key for key, _ in expected]
    keys, items = store.keys(**bounds), store.items(**bounds)
    assert list(keys) == names, bounds
    assert list(reversed(keys)) == names[::-1], bounds
    assert list(items) == expected, bounds
    assert list(reversed(items)) == expected[::-1], bounds
    assert list(store.values(**bounds)) == [value for _, value in expected], bounds
    assert len(keys) == len(names), bounds


@pytest.mark.parametrize("engine", [0, 1])
def test_ranges_are_those_of_a_sorted_dict(open_store, settle, engine):
    store = open_store(lib_version=engine, sync=False, autoflush_on_read=False)
    model = write_mixed(store)
    settle(store)
    for bounds in RANGES[::5]:
        assert_shows(store, model, bounds)


@pytest.mark.parametrize("view", ["keys", "items", "values"])
@pytest.mark.parametrize("direction", [list, lambda view: list(reversed(view))[::-1]])
def test_range_that_flushes_first_is_the_same(open_store, view, direction):
    store = open_store(sync=False, autoflush_on_read=True)
    for bounds in RANGES[::61]:
        expected = in_range(write_mixed(store), **bounds)
        if view != "items":
            expected = [pair[view == "values"] for pair in expected]
        assert direction(getattr(store, view)(**bounds)) == expected, bounds
        assert not store.write_buffer


def test_ranges_hold_what_they_show(open_store, settle):
    store = open_store(sync=False, autoflush_on_read=False)
    model = write_mixed(store)
    settle(store)
    for bounds in RANGES[::97]:
        inside = dict(in_range(model, **bounds))
        keys, items = store.keys(**bounds), store.items(**bounds)
        for key in KEYS:
            value = model.get(key)
            assert (key in keys) == (key in inside), bounds
            assert ((key, value) in items) == (key in inside), bounds
            assert (key, "other") not in items


@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_long_ranges_are_those_of_a_sorted_dict(open_store, autoflush, share):
    store = open_store(sync=False, batch_size=20_000, autoflush_on_read=autoflush)
    chance = random.Random(share)
    names = [b"%05d" % number for number in range(12_000)]
    model = {key: 1 for key in names if chance.random() >= share}
    store.put_many(model)
    for key in names:
        if chance.random() < share:
            if chance.random() < 0.3:
                store.delete(key)
                model.pop(key, None)
            else:
                store.put(key, 2)
                model[key] = 2
    for bounds in (
        {},
        {"prefix": b"03"},
        {"start": b"00100"},
        {"stop": b"11000"},
        {"start": b"04", "stop": b"0400000"},
        {"prefix": b"0", "start": b"0123", "stop": b"098"},
    ):
        assert_shows(store, model, bounds)


def test_ranges_of_large_values_are_those_of_a_sorted_dict(open_store, settle):
    store = open_store(sync=False, autoflush_on_read=False)
    model = {
        b"%02d" % number: [bytes([number]) * (LARGE if number % 3 else 10)]
        for number in range(30)
    }
    store.put_many(model)
    for number in range(0, 40, 7):
        key = b"%02d" % number
        model[key] = [b"new" * LARGE]
        store.put(key, model[key])
        store.delete(b"%02d" % (number + 1))
        model.pop(b"%02d" % (number + 1), None)
    settle(store)
    for bounds in ({}, {"prefix": b"1"}, {"start": b"03", "stop": b"20"}):
        assert_shows(store, model, bounds)


def test_ranges_of_an_empty_store_are_empty(open_store):
    store = open_store()
    for bounds in RANGES[::97]:
        assert_shows(store, {}, bounds)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, bytes.decode])
def test_bounds_have_the_types_of_keys(store, kind):
    store.update(dict.fromkeys("abcd"))
    assert list(store.keys(start=kind(b"b"), stop=kind(b"d"))) == ["b", "c"]
    assert list(store.keys(kind(b"c"))) == ["c"]
    assert list(store.keys(kind(b""))) == list("abcd")


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_bad_bounds_are_refused_at_once(open_store, view):
    plain = getattr(open_store("plain"), view)
    encoded = getattr(open_store("encoded", key_encoding="ascii"), view)
    for name in ("prefix", "start", "stop"):
        for bad in (5, 1.5, True, (b"a",), [b"a"], object()):
            with pytest.raises(TypeError, match=r"^Key must be bytes-like;"):
                plain(**{name: bad})
            with pytest.raises(TypeError, match=r"^Key must be bytes-like or str;"):
                encoded(**{name: bad})
        with pytest.raises(TypeError, match="str keys are not allowed"):
            plain(**{name: "a"})
        with pytest.raises(UnicodeEncodeError):
            encoded(**{name: "é"})


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_start_and_stop_have_to_be_named(store, view):
    with pytest.raises(TypeError, match="positional argument"):
        getattr(store, view)("a", "b")


@pytest.mark.parametrize(
    ("form", "prefix", "found"),
    [
        ("NFC", "e\N{COMBINING ACUTE ACCENT}", ["étage"]),
        ("NFC", "é", ["étage"]),
        ("NFC", "e", ["etage"]),  # bounds are compared as bytes
        ("NFD", "é", ["e\N{COMBINING ACUTE ACCENT}tage"]),
        ("NFD", "e", ["etage", "e\N{COMBINING ACUTE ACCENT}tage"]),
    ],
)
def test_bounds_are_normalized_as_keys_are(open_store, form, prefix, found):
    store = open_store(key_encoding="utf-8", str_normalize=form)
    store.update({"étage": 1, "etage": 2, "f": 3})
    assert list(store.keys(prefix)) == found
    assert next(iter(store.keys(start=prefix))) == found[0]
    assert not store.keys(found[0], stop=prefix)


# Views


def test_views_are_those_of_collections_abc(store):
    assert isinstance(store.keys(), KeysView)
    assert isinstance(store.values(), ValuesView)
    assert isinstance(store.items(), ItemsView)


def test_views_are_live_and_can_be_used_again(store):
    keys, values, items = store.keys("a"), store.values("a"), store.items("a")
    assert (list(keys), list(values), list(items)) == ([], [], [])
    store.update(a1=1, a2=2, b=3)
    for _ in range(2):
        assert list(keys) == ["a1", "a2"]
        assert list(values) == [1, 2]
        assert list(items) == [("a1", 1), ("a2", 2)]
        assert [*reversed(keys)] == ["a2", "a1"]
        assert [*reversed(values)] == [2, 1]
        assert [*reversed(items)] == [("a2", 2), ("a1", 1)]
    assert len(keys) == len(values) == len(items) == 2
    del store["a1"]
    store["a2"] = 4
    assert (len(keys), "a1" in keys, 4 in values) == (1, False, True)
    assert list(items) == [("a2", 4)]


def test_iterators_over_one_view_are_independent(store):
    store.update(a=1, b=2)
    keys = store.keys()
    assert list(product(keys, keys)) == list(product("ab", repeat=2))
    one = iter(keys)
    assert next(one) == "a"
    assert iter(one) is one
    assert list(keys) == ["a", "b"]
    assert list(one) == ["b"]


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_view_repr_tells_path_and_bounds(store, view):
    store["a"] = Unreadable()
    shown = repr(getattr(store, view)("ab", start=b"c", stop="d"))
    for part in (repr(store.db_path), "prefix='ab'", "start=b'c'", "stop='d'"):
        assert part in shown
    assert store.write_buffer


NO_KEYS = [5, None, 1.5, ("a", 1), [], object(), "", "k" * 5000, "\ud800", b"\xff"]


def test_what_can_not_be_a_key_is_in_no_view(store, settle):
    store.update(a=1, b=[2])
    settle(store)
    for junk in NO_KEYS:
        assert junk not in store.keys()  # noqa: SIM118
        assert (junk, 1) not in store.items()
    for junk in ("a", 5, None, ["a", 1], ("a",), ("a", 1, 1)):
        assert junk not in store.items()
    assert ("a", 1) in store.items()
    assert ("b", [2]) in store.items()
    assert ("b", (2,)) not in store.items()


class EqualToNothing:
    def __eq__(self, other):
        return False

    __hash__ = None


def test_values_are_found_by_equality(store, settle):
    store.update(a=1, b=[2], c=None)
    settle(store)
    values = store.values()
    for value in (1, 1.0, [2], None, ANY):
        assert value in values
    for value in (0, [1], "a", EqualToNothing()):
        assert value not in values
    assert 1 not in store.values(start="b")


def test_search_for_a_value_ends_where_it_is(store):
    store.update(a=1, b=Unreadable())
    assert 1 in store.values()
    with pytest.raises(UnpickleError, match="'b'"):
        assert 2 in store.values()


# Set operations

ARITHMETIC = [operator.and_, operator.or_, operator.sub, operator.xor]
ORDER = [operator.eq, operator.ne, *(operator.le, operator.lt, operator.ge)]
ORDER.append(operator.gt)
NAMES = ["aa", "ab", "b", "c"]
PAIRS = [(name, 1) for name in NAMES]
HASHABLE_JUNK = [junk for junk in NO_KEYS if junk != []]
SETS = [
    [],
    NAMES,
    NAMES[1:],
    NAMES[:1],
    [*NAMES, "missing"],
    ["ab", "missing"],
    ["missing"],
    ["b", *HASHABLE_JUNK],
    [*NAMES, *HASHABLE_JUNK],
]
SETS_OF_PAIRS = [
    *([(name, 1) for name in names] for names in SETS[:6]),
    [("aa", 2)],
    [("aa", 1), ("ab", 0), ("aa",), ("aa", 1, 1), "aa", *HASHABLE_JUNK],
    [*PAIRS, ("aa", 2), *((junk, 1) for junk in HASHABLE_JUNK)],
]


def keys_of_dict(elements):
    return dict.fromkeys(elements).keys()


@pytest.fixture(params=[{}, {"prefix": "a"}, {"start": "ab", "stop": "c"}])
def bounds(request):
    return request.param


def assert_like_set(view, model, other):
    """Show that `view` answers as `model`, a set, does, from either side."""
    elements = set(other)
    for operation in ARITHMETIC:
        for result, expected in (
            (operation(view, other), operation(model, elements)),
            (operation(other, view), operation(elements, model)),
        ):
            assert result == expected, operation
            assert type(result) is set
    for operation in ORDER:
        assert operation(view, other) is operation(model, elements), operation
        assert operation(other, view) is operation(elements, model), operation
    assert view.isdisjoint(other) is model.isdisjoint(elements)


@pytest.mark.parametrize("kind", [set, frozenset, keys_of_dict])
def test_set_operations_of_views_are_those_of_sets(store, settle, bounds, kind):
    store.autoflush_on_read = False
    store.update(PAIRS)
    settle(store)
    keys, items = store.keys(**bounds), store.items(**bounds)
    for elements in SETS:
        assert_like_set(keys, set(keys), kind(elements))
    for elements in SETS_OF_PAIRS:
        assert_like_set(items, set(items), kind(elements))
    assert set(keys) == {name for name, _ in items} != set()


@pytest.mark.parametrize("kind", [list, tuple, iter, dict.fromkeys])
def test_set_operations_take_any_iterable(store, bounds, kind):
    store.update(PAIRS)
    keys, items = store.keys(**bounds), store.items(**bounds)
    for view, collections in ((keys, SETS), (items, SETS_OF_PAIRS)):
        for elements in collections:
            for operation in ARITHMETIC:
                result = operation(view, kind(elements))
                assert result == operation(set(view), set(elements))
            disjoint = set(view).isdisjoint(elements)
            assert view.isdisjoint(kind(elements)) is disjoint


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_set_operations_take_views_of_stores(store, open_store, bounds, encoding):
    store.update(PAIRS)
    other = open_store("other", key_encoding=encoding)
    other.update({"aa": 1, "ab": 2, "z": 1})
    for mine, theirs in product(
        (store.keys(), store.keys(**bounds)),
        (other.keys(), other.keys("a"), store.keys("a"), store.keys()),
    ):
        assert_like_set(mine, set(mine), theirs)
    for theirs in (other.items(), store.items(), store.items("a")):
        assert_like_set(store.items(**bounds), set(store.items(**bounds)), theirs)


def test_items_of_unhashable_values_can_be_compared(store):
    store["a"] = [1]
    assert store.items() == {"a": [1]}.items()
    assert store.items() >= {"a": [1]}.items()
    assert store.items() != {"a": [2]}.items()
    assert store.items() & [("a", 2), ("b", [])] == set()
    with pytest.raises(TypeError, match="unhashable"):
        store.items() | set()


@pytest.mark.parametrize("operation", ARITHMETIC)
def test_set_operations_refuse_what_is_not_iterable(store, operation):
    with pytest.raises(TypeError, match="unsupported operand"):
        operation(store.keys(), 5)


# Keys come out as they would be put in

RAW = sorted(
    {
        *(bytes([number]) for number in range(256)),
        *(
            text.encode(encoding)
            for text in (
                "plain",
                "é",
                "e\N{COMBINING ACUTE ACCENT}",
                "\N{LATIN SMALL LIGATURE FI}",
                "\N{ANGSTROM SIGN}",
                "\N{REPLACEMENT CHARACTER}",
                "\N{SNOWMAN}/\U0001f600",
                "日本",
                "&#233;\\xe9+AOk-",
            )
            for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")
        ),
        "\ud800".encode("utf-8", "surrogatepass"),
        b"a\xff",
        b"\xffa",
        b"\xff\xfe",  # "" in UTF-16
        b"\xe9t\xe9",
        b"\x1b$B\x1b(B",  # nothing, in a roundabout way, in ISO-2022-JP
        b"\xfe" * 511,
    }
)


@pytest.mark.parametrize(
    ("encoding", "errors", "form"),
    [
        ("utf-8", "strict", None),
        ("utf-8", "surrogateescape", None),
        ("utf-8", "surrogatepass", None),
        ("utf-8", "ignore", None),
        ("utf-8", "replace", None),
        ("utf-8", "strict", "NFC"),
        ("utf-8", "strict", "NFD"),
        ("utf-8", "strict", "NFKC"),
        ("utf-8", "surrogateescape", "NFKD"),
        ("utf-8-sig", "strict", None),
        ("utf-7", "strict", None),
        ("utf-16", "strict", None),
        ("utf-16", "surrogatepass", None),
        ("utf-16-le", "strict", "NFC"),
        ("utf-16-be", "replace", None),
        ("latin-1", "strict", None),
        ("latin-1", "ignore", "NFC"),
        ("cp1252", "strict", None),
        ("cp1252", "surrogateescape", None),
        ("iso2022_jp", "strict", None),
        ("ascii", "replace", None),
        ("ascii", "backslashreplace", None),
        ("ascii", "xmlcharrefreplace", None),
    ],
)
def test_keys_come_out_as_they_would_be_put_in(open_store, encoding, errors, form):
    with open_store() as plain:
        plain.put_many((raw, raw) for raw in RAW)
        assert list(plain) == RAW
    store = open_store(
        key_encoding=encoding, key_errors=errors, str_normalize=form, sync=False
    )
    names = [name_of(raw, encoding, errors, form) for raw in RAW]
    assert list(store) == list(store.keys()) == names
    assert list(reversed(store)) == names[::-1]
    assert list(store.items()) == list(zip(names, RAW, strict=True))
    for name, raw in zip(names, RAW, strict=True):
        assert store[name] == store.pop(name) == store.setdefault(name, raw) == raw
        assert name in store
        assert name in store.keys()  # noqa: SIM118
        assert (name, raw) in store.items()
        assert store.write_buffer.keys() == {raw}
        assert name in store.keys(prefix=name, start=name)
        assert name not in store.keys(stop=name)
        store.flush()
    drained = [store.popitem() for _ in names[1::2]]
    assert drained == list(zip(names, RAW, strict=True))[: -len(drained) - 1 : -1]
    assert store.delete_many(list(store)) == len(names) - len(drained)
    assert not store


def name_of(raw, encoding, errors, form):
    """Return the text that `raw` is in a store of such keys, or else `raw`."""
    try:
        text = raw.decode(encoding, errors)
        normal = unicodedata.normalize(form, text) if form else text
        return text if normal.encode(encoding, errors) == raw else raw
    except (UnicodeError, TypeError):  # TypeError: the handler only encodes
        return raw


def test_surrogateescape_brings_every_key_out_as_text(open_store):
    store = open_store(key_encoding="utf-8", key_errors="surrogateescape")
    store.put_many((raw, raw) for raw in RAW)
    assert {type(name) for name in store} == {str}


def test_one_odd_key_does_not_change_what_its_neighbours_are(store):
    names = [f"{number:05}" for number in range(6000)]
    store.put_many(dict.fromkeys(names))
    store[b"03000\xff"] = None
    expected = [*names[:3001], b"03000\xff", *names[3001:]]
    assert list(store) == expected
    assert [name for name, _ in store.items()] == expected


# pop, popitem, setdefault


@pytest.mark.parametrize("missing", ["pop", "del", "[]"])
def test_errors_name_the_missing_key(store, missing):
    store.put_many({"deleted": 1})
    store.delete("deleted")
    call = {"pop": store.pop, "del": store.__delitem__, "[]": store.__getitem__}
    for key in ("missing", b"deleted"):
        name = key if isinstance(key, str) else key.decode()
        with pytest.raises(KeyError) as info:
            call[missing](key)
        assert info.value.args == (f"Key not found: '{name}'",)


def test_pop_returns_and_deletes(store, settle):
    store.update(a=[1], b=None)
    settle(store)
    assert store.pop("a") == [1]
    assert store.pop(b"b", "default") is None
    assert (list(store), store.get("a"), "a" in store) == ([], None, False)
    assert store.pop("a", None) is None
    assert store.pop("a", default=5) == 5
    with pytest.raises(KeyError):
        store.pop("a")
    store.flush()
    assert store.env.stat()["entries"] == 0


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_popitem_takes_the_last_entry(open_store, batch_size):
    store = open_store(sync=False, batch_size=batch_size, autoflush_on_read=False)
    store.put_many({b"%02d" % number: number for number in range(0, 40, 2)})
    for number in range(1, 40, 2):
        store.put(b"%02d" % number, number)
    for number in reversed(range(40)):
        assert store.popitem() == (b"%02d" % number, number)
        assert len(store) == number
    with pytest.raises(KeyError) as info:
        store.popitem()
    assert info.value.args == ("popitem(): the store is empty",)


def test_setdefault_stores_only_where_nothing_is(store, settle):
    store.update(a=1, none=None)
    settle(store)
    assert store.setdefault("a", 2) == 1
    assert store.setdefault("none", 2) is None
    fresh = []
    assert store.setdefault("b", fresh) is fresh
    assert store.setdefault("c") is None
    fresh.append("not stored")
    assert store == {"a": 1, "b": [], "c": None, "none": None}
    store.delete("a")
    assert store.setdefault("a", 3) == store["a"] == 3


def test_value_that_can_not_be_unpickled_stays(store, settle):
    store["bad"] = Unreadable()
    settle(store)
    for call in (
        lambda: store.pop("bad"),
        lambda: store.pop("bad", None),
        store.popitem,
        lambda: store.setdefault("bad", 1),
    ):
        with pytest.raises(UnpickleError, match="'bad'"):
            call()
    assert list(store) == ["bad"]


def test_setdefault_with_a_value_that_can_not_be_pickled_changes_nothing(store):
    with pytest.raises(TypeError, match="cannot pickle"):
        store.setdefault("a", (letter for letter in "generator"))
    assert "a" not in store


ONE_KEY = {
    "pop": lambda store, key: store.pop(key),
    "pop with default": lambda store, key: store.pop(key, None),
    "setdefault": lambda store, key: store.setdefault(key, 1),
    "update pairs": lambda store, key: store.update([(key, 1)]),
    "delete_many": lambda store, key: store.delete_many(["a", key]),
}


@pytest.mark.parametrize("call", ONE_KEY.values(), ids=ONE_KEY)
def test_bad_keys_are_refused_and_change_nothing(store, settle, call):
    store["a"] = 1
    settle(store)
    before = dict(store.write_buffer), last_transaction(store)
    for key, error in (
        (None, TypeError),
        (5, TypeError),
        (("a",), TypeError),
        ("", SizeError),
        (b"k" * 5000, SizeError),
        ("\ud800", UnicodeEncodeError),
    ):
        with pytest.raises(error):
            call(store, key)
    assert (dict(store.write_buffer), last_transaction(store)) == before


# update


class HasKeys:
    def keys(self):
        return iter(["b", "a"])

    def __getitem__(self, key):
        return key * 2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        (UserDict(a=1), {"a": 1}),
        ([("a", 1), ("a", 2)], {"a": 2}),
        ([["a", 1]], {"a": 1}),
        (HasKeys(), {"a": "aa", "b": "bb"}),
        ({}, {}),
        ([], {}),
    ],
)
def test_update_takes_mappings_and_pairs(open_store, other, expected):
    store = open_store("one", key_encoding="utf-8")
    assert store.update(other) is None
    assert store == expected
    store = same = open_store("two", key_encoding="utf-8")
    store |= other
    assert store is same
    assert store == expected


def test_update_takes_keyword_arguments(store):
    store.update({"a": 1, "b": 1}, b=2, self=3, other=4)
    assert store == {"a": 1, "b": 2, "self": 3, "other": 4}
    store.update(a=5)
    store.update()
    assert store["a"] == 5


def test_keyword_arguments_that_are_no_keys_change_nothing(open_store):
    plain = open_store("plain")
    with pytest.raises(TypeError, match="str keys are not allowed"):
        plain.update({b"a": 1}, b=2)
    ascii_only = open_store("ascii", key_encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        ascii_only.update({"a": 1}, b=2, é=3)
    assert not plain
    assert not ascii_only


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (5, TypeError),
        (None, TypeError),
        ([5], TypeError),
        ("ab", ValueError),
        ([("a", 1, 2)], ValueError),
        ([("a",)], ValueError),
    ],
)
def test_update_refuses_what_dict_refuses(store, other, error):
    with pytest.raises(error):
        {}.update(other)
    with pytest.raises(error):
        store.update(other)
    with pytest.raises(error):
        store |= other
    assert not store


def test_update_keeps_what_came_before_an_error(store):
    with pytest.raises(ZeroDivisionError):
        store.update((name, 1 / (name != "c")) for name in "abcd")
    assert store == {"a": 1, "b": 1}


def test_update_streams_through_the_buffer(open_store):
    store = open_store(batch_size=10, sync=False)
    pending = []

    def pairs():
        for number in range(100):
            pending.append(len(store.write_buffer))
            yield b"%03d" % number, number

    store.update(pairs())
    assert max(pending) == 9
    assert len(store) == 100


def test_update_takes_the_store_itself_and_its_views(open_store):
    store = open_store(key_encoding="utf-8", batch_size=7, sync=False)
    model = {f"{number:03}": number for number in range(100)}
    store.update(model)
    store.update(store)
    store |= store.items("00")
    assert store == model
    store.update((key, value + 1) for key, value in store.items())
    assert store == {key: value + 1 for key, value in model.items()}


def test_update_takes_another_store(store, open_store):
    other = open_store("other", key_encoding="utf-16")
    other.update(é=1, b=2)
    store.update(other)
    store.update(other.items("b"), c=3)
    assert store == {"b": 2, "c": 3, "é": 1}
    with pytest.raises(TypeError, match="str keys are not allowed"):
        open_store("plain").update(other)


# delete_many and clear


def test_delete_many_returns_how_many_existed(store):
    store.put_many({"a": 1, "b": 2, "c": 3, "gone": 0})
    store.put("pending", 1)
    store.put("c", 4)
    store.delete("gone")
    keys = ["a", b"a", "c", "pending", "gone", "missing", bytearray(b"c")]
    assert store.delete_many(keys) == 3
    assert store == {"b": 2}
    assert store.env.stat()["entries"] == 1
    assert store.delete_many(keys) == store.delete_many([]) == 0


@pytest.mark.parametrize(
    "kind",
    [list, tuple, set, dict.fromkeys, iter, lambda keys: (key for key in keys)],
)
def test_delete_many_takes_any_iterable(store, settle, kind):
    store.update(a=1, b=2, c=3)
    settle(store)
    assert store.delete_many(kind(["a", "c", "x"])) == 2
    assert store == {"b": 2}


def test_delete_many_takes_what_reads_the_same_store(store):
    store.put_many({f"{number:04}": number for number in range(3000)})
    assert store.delete_many(key for key, value in store.items() if value % 2) == 1500
    assert store.delete_many(reversed(store.keys("000"))) == 5
    assert store.delete_many(store.keys("00") - {"0098"}) == 44
    assert list(store.keys("00")) == ["0098"]
    assert store.delete_many(store) == 1451
    assert not store


def test_delete_many_takes_views_of_other_stores(store, open_store):
    other = open_store("other")
    other.update({b"a": 1, b"b": 2, b"x": 3})
    store.update(a=1, b=2, c=3)
    assert store.delete_many(other.keys(stop=b"b")) == 1
    assert store.delete_many(other.keys()) == 1
    assert store == {"c": 3}
    assert len(other) == 3
    with pytest.raises(TypeError, match="str keys are not allowed"):
        other.delete_many(store.keys())


def test_delete_many_deletes_ranges(open_store):
    store = open_store(sync=False)
    for bounds in RANGES[::41]:
        model = write_mixed(store)
        inside = in_range(model, **bounds)
        assert store.delete_many(store.keys(**bounds)) == len(inside), bounds
        for key, _ in inside:
            del model[key]
        assert dict(store.items()) == model, bounds
        store.clear()


@pytest.mark.parametrize(
    "delete",
    [
        lambda store: store.delete_many(["a", "b", "x"]),
        lambda store: store.delete_many(store.keys("a")),
        lambda store: store.delete_many(store.keys()),
        lambda store: store.clear(),
    ],
)
def test_bulk_deletion_is_one_transaction(store, delete):
    store.put_many({"a": 1, "aa": 2, "b": 3})
    before = last_transaction(store)
    delete(store)
    assert last_transaction(store) == before + 1
    assert not store.write_buffer


def test_clear_deletes_everything(store):
    assert store.clear() is None
    store.put_many({f"{number}": bytes(5000) for number in range(100)})
    store.put("pending", 1)
    store.delete("7")
    store.clear()
    assert (len(store), list(store), "7" in store) == (0, [], False)
    assert store.env.stat()["entries"] == 0
    store["a"] = 1
    assert store == {"a": 1}


@pytest.mark.parametrize("keys", ["a", b"a", bytearray(b"a"), memoryview(b"a")])
def test_delete_many_refuses_a_single_key(store, keys):
    store["a"] = 1
    with pytest.raises(TypeError, match=r"^delete_many\(\) takes an iterable of keys"):
        store.delete_many(keys)
    assert "a" in store


def test_delete_many_of_an_iterable_that_fails_deletes_nothing(store, settle):
    store.update(a=1, b=2)
    settle(store)
    with pytest.raises(ZeroDivisionError):
        store.delete_many(name for name in ("a", "b") if 1 / (name != "b"))
    with pytest.raises(TypeError):
        store.delete_many(5)
    with pytest.raises(TypeError):
        store.delete_many(store.items())
    assert list(store) == ["a", "b"]


# Read-only and closed stores

CHANGES = {
    "pop": lambda store: store.pop("a"),
    "pop missing": lambda store: store.pop("x", None),
    "popitem": lambda store: store.popitem(),
    "setdefault": lambda store: store.setdefault("a", 1),
    "setdefault missing": lambda store: store.setdefault("x", 1),
    "update": lambda store: store.update(a=2),
    "|=": lambda store: operator.ior(store, {"a": 2}),
    "del": lambda store: store.__delitem__("a"),
    "clear": lambda store: store.clear(),
    "delete_many": lambda store: store.delete_many(["a"]),
    "delete_many missing": lambda store: store.delete_many(["x"]),
    "delete_many none": lambda store: store.delete_many([]),
}
READS = {
    "iter": iter,
    "reversed": reversed,
    "len": len,
    "bool": bool,
    "==": lambda store: store == {"a": 1},
    "keys()": lambda store: store.keys(),
    "values()": lambda store: store.values(),
    "items()": lambda store: store.items(),
}


@pytest.mark.parametrize("call", CHANGES.values(), ids=CHANGES)
def test_read_only_store_refuses_changes(open_store, call):
    with open_store(key_encoding="utf-8") as store:
        store["a"] = 1
    store = open_store(key_encoding="utf-8", readonly=True)
    with pytest.raises(ReadOnlyError, match="read-only"):
        call(store)
    with pytest.raises(ReadOnlyError, match="read-only"):
        store.delete_many(store.keys())
    assert list(reversed(store.items("a"))) == [("a", 1)]
    assert store == {"a": 1}
    assert "1 entries" in repr(store)


@pytest.mark.parametrize("call", [*CHANGES.values(), *READS.values()])
def test_closed_store_refuses_everything(store, call):
    store["a"] = 1
    store.close()
    with pytest.raises(ClosedError, match="closed"):
        call(store)


@pytest.mark.parametrize("call", [iter, reversed, len, lambda view: ("a", 1) in view])
def test_views_of_a_closed_store_refuse_everything(store, call):
    store["a"] = 1
    view = store.items()
    store.close()
    with pytest.raises(ClosedError, match="closed"):
        call(view)


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_closing_ends_iterations_with_an_error(store, view):
    store.put_many(dict.fromkeys(map(str, range(100))))
    rest = iter(getattr(store, view)())
    next(rest)
    store.close()
    with pytest.raises(ClosedError, match="closed"):
        next(rest)


# What asks for keys only never unpickles

KEYS_ONLY = {
    "iter": (lambda store: list(store), ["bad", "good"]),
    "reversed": (lambda store: list(reversed(store)), ["good", "bad"]),
    "keys": (lambda store: list(store.keys("b")), ["bad"]),
    "reversed keys": (lambda store: list(reversed(store.keys("b"))), ["bad"]),
    "len": (len, 2),
    "bool": (bool, True),
    "repr": (lambda store: "2 entries" in repr(store), True),
    "in": (lambda store: "bad" in store, True),
    "in keys": (lambda store: "bad" in store.keys("b"), True),
    "len of keys": (lambda store: len(store.keys("b")), 1),
    "len of values": (lambda store: len(store.values("b")), 1),
    "len of items": (lambda store: len(store.items()), 2),
    "&": (lambda store: store.keys() & {"bad", "x"}, {"bad"}),
    "|": (lambda store: store.keys() | {"x"}, {"bad", "good", "x"}),
    "-": (lambda store: store.keys() - {"good"}, {"bad"}),
    "^": (lambda store: store.keys() ^ {"good", "x"}, {"bad", "x"}),
    "== keys": (lambda store: store.keys() == {"bad", "good"}, True),
    "isdisjoint": (lambda store: store.keys().isdisjoint(["bad"]), False),
    "missing item": (lambda store: ("x", 1) in store.items(), False),
    "item beyond": (lambda store: ("bad", 1) in store.items("g"), False),
    "unequal length": (lambda store: store == {"bad": 1}, False),
    "del": (lambda store: store.__delitem__("bad"), None),
    "delete": (lambda store: store.delete("bad"), None),
    "delete_many": (lambda store: store.delete_many(["bad"]), 1),
    "delete_many view": (lambda store: store.delete_many(store.keys("b")), 1),
    "clear": (lambda store: store.clear(), None),
    "update": (lambda store: store.update(bad=1), None),
}


@pytest.mark.parametrize(("call", "expected"), KEYS_ONLY.values(), ids=KEYS_ONLY)
@pytest.mark.parametrize("autoflush", [True, False])
def test_what_asks_for_keys_only_never_unpickles(store, autoflush, call, expected):
    store.autoflush_on_read = autoflush
    for size, stored in product((0, 10 * LARGE), (True, False)):
        store.clear()
        store.update(bad=Unreadable(size), good=1)
        if stored:
            store.flush()
        assert call(store) == expected


@pytest.mark.parametrize("size", [0, LARGE])
@pytest.mark.parametrize("autoflush", [True, False])
def test_iterator_goes_on_after_what_can_not_be_unpickled(
    open_store, settle, size, autoflush
):
    store = open_store(key_encoding="utf-8", autoflush_on_read=autoflush, sync=False)
    names = [f"{number:02}" for number in range(20)]
    bad = names[1::3]
    store.update((name, Unreadable(size) if name in bad else name) for name in names)
    settle(store)
    for direction in (iter, reversed):
        values, items = direction(store.values()), direction(store.items())
        for name in direction(names):
            if name in bad:
                for rest in (values, items):
                    with pytest.raises(UnpickleError, match=f"'{name}'"):
                        next(rest)
            else:
                assert (next(values), next(items)) == (name, (name, name))
        assert next(values, "end") == next(items, "end") == "end"
