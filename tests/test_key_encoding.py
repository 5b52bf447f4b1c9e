"""Keys that are no text: tuples and numbers, and encodings of the user's own."""

import collections
import enum
import math
import pickle
import struct
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import times
from lmdb_object_store import GrowthError, LmdbObjectStore, LoadError, SizeError
from lmdb_object_store.keys import TupleKeys
from lmdb_object_store.serializers import Bytes, Checked, Json

encode = TupleKeys().encode
decode = TupleKeys().decode
UUID_1 = UUID(int=0x0102030405060708090A0B0C0D0E0F10)

# From the specification of FoundationDB's tuple layer (its examples, and its rules
# applied by hand).
VECTORS = [
    ((None,), "00"),
    ((b"foo\x00bar",), "01 666f6f 00ff 626172 00"),
    ("F\u00d4O\u0000bar", "02 46 c394 4f 00ff 626172 00"),
    (((b"foo\x00bar", None, ()),), "05 01 666f6f00ff626172 00 00ff 05 00 00"),
    (-5551212, "11 ab4b93"),
    (0, "14"),
    (1, "15 01"),
    (-1, "13 fe"),
    (255, "15 ff"),
    (-255, "13 00"),
    (256, "16 0100"),
    (-256, "12 feff"),
    (2**64 - 1, "1c ffffffffffffffff"),
    (-(2**64) + 1, "0c 0000000000000000"),
    (2**64, "1d 09 010000000000000000"),
    (-(2**64), "0b f6 feffffffffffffffff"),
    (-42.0, "21 3fbaffffffffffff"),
    (0.0, "21 8000000000000000"),
    (-0.0, "21 7fffffffffffffff"),
    (1.5, "21 bff8000000000000"),
    (math.inf, "21 fff0000000000000"),
    (-math.inf, "21 000fffffffffffff"),
    (False, "26"),
    (True, "27"),
    (UUID_1, "30 0102030405060708090a0b0c0d0e0f10"),
    (("sensor", 7, 2.5), "02 73656e736f72 00 15 07 21 c004000000000000"),
    ("", "02 00"),
    ((b"",), "01 00"),
    (((),), "05 00"),
    ((((None,),),), "05 05 00ff 00 00"),
]


@pytest.mark.parametrize(("key", "raw"), VECTORS)
def test_the_bytes_are_those_of_the_specification(key, raw):
    assert encode(key) == bytes.fromhex(raw)
    assert decode(bytes.fromhex(raw)) == key
    assert type(decode(bytes.fromhex(raw))) is type(key)
    assert math.copysign(1, decode(encode(0.0))) == 1
    assert math.copysign(1, decode(encode(-0.0))) == -1


scalars = {
    "bytes": st.binary(max_size=8),
    "str": st.text(max_size=8),
    "int": st.integers() | st.integers(-300, 300) | st.integers(-(2**200), 2**200),
    "near a power": st.builds(
        lambda power, sign, near: sign * 256**power + near,
        st.integers(0, 20),
        st.sampled_from([-1, 1]),
        st.integers(-2, 2),
    ),
    "float": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "uuid": st.uuids(),
}
one_type = st.sampled_from(sorted(scalars)).map(scalars.get)
shapes = st.recursive(one_type, lambda inner: st.lists(inner, max_size=3))


def filled(shape):
    """Two keys of one shape, so that Python can compare them."""
    if not isinstance(shape, list):
        return st.tuples(shape, shape) | shape.map(lambda value: (value, value))
    pairs = st.tuples(*map(filled, shape))
    lengths = st.tuples(st.integers(0, len(shape)), st.integers(0, len(shape)))
    return st.builds(cut, pairs, lengths)


def cut(pairs, lengths):
    sides = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
    return tuple(tuple(s[:size]) for s, size in zip(sides, lengths, strict=True))


@settings(
    max_examples=times(200, thorough=3_000),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(shapes, max_size=4).flatmap(filled))
def test_keys_sort_as_python_sorts_them(pair):
    first, second = map(without_negative_zero, pair)
    raws = encode(first), encode(second)
    assert (raws[0] < raws[1]) == (first < second)
    assert (raws[0] == raws[1]) == (first == second)
    assert (decode(raws[0]), decode(raws[1])) == (_bare(first), _bare(second))


def without_negative_zero(key):
    """Return a key without -0.0, which equals 0.0 but is another key."""
    if isinstance(key, tuple):
        return tuple(map(without_negative_zero, key))
    return abs(key) if isinstance(key, float) and not key else key


def test_the_two_zeros_are_neighbours():
    below, above = math.nextafter(0, -1), math.nextafter(0, 1)
    keys = [encode(number) for number in (below, -0.0, 0.0, above)]
    assert keys == sorted(set(keys))


def _bare(key):
    bare = len(key) == 1 and not isinstance(key[0], (tuple, bytes, type(None)))
    return key[0] if bare else key


pieces = st.sampled_from([bytes.fromhex(raw) for _, raw in VECTORS])
near_keys = st.lists(pieces | st.binary(max_size=3), max_size=5).map(b"".join)


@settings(
    max_examples=times(300, thorough=20_000),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(near_keys | st.binary())
def test_bytes_are_the_bytes_of_a_key_or_refused(raw):
    try:
        key = decode(raw)
    except ValueError:
        return
    assert encode(key) == raw


@pytest.mark.parametrize(
    "raw",
    [
        "20 bdd7ffff",  # a float of 32 bits, which Python doesn't have
        "33 000000000000000000000000",  # a version stamp
        "ff",
        "15",
        "15 00",
        "16 0001",
        "13 ff",
        "1d 01 05",
        "1d 09 00ffffffffffffffff",
        "1d",
        "0b",
        "0b fe 05",
        "21 00",
        "21 fff8000000000000",
        "21 0007ffffffffffff",
        "30 00",
        "02 61",
        "02 ff 00",
        "02 61 00ff",
        "01 00ff",
        "05",
        "05 05 00",
        "05 00ff",
        "25",
    ],
)
def test_other_bytes_come_out_as_bytes(open_store, raw):
    raw = bytes.fromhex(raw)
    with pytest.raises(ValueError, match=r"."):
        decode(raw)
    store = open_store(key_encoding=TupleKeys())
    store[raw] = 1
    store["text"] = 2
    assert set(store) == {raw, "text"}
    assert store[raw] == 1
    with pytest.raises(ValueError, match="can't be decoded"):
        store.get_many([raw], decode_keys=True)
    as_json = open_store(key_encoding=TupleKeys(), serializer=Json())
    with pytest.raises(LoadError, match="Failed to load DB key "):
        as_json[raw]


class Number(enum.IntEnum):
    SEVEN = 7


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "other"

    def encode(self, *_):
        return b"other"


class Real(float):
    pass


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (Number.SEVEN, 7),
        (Text("seven"), "seven"),
        (Real(7.5), 7.5),
        (Pair("a", 7), ("a", 7)),
        ((Pair("a", Number.SEVEN),), (("a", 7),)),
        ((7,), 7),
        (("seven",), "seven"),
        ((True,), True),
        ((UUID_1,), UUID_1),
    ],
)
def test_equal_keys_are_one_key(open_store, key, plain):
    store = open_store(key_encoding=TupleKeys())
    store[key] = 1
    store[plain] = 2
    assert list(store.items()) == [(plain, 2)]
    assert [type(found) for found in store] == [type(plain)]


def test_different_types_are_different_keys(open_store):
    store = open_store(key_encoding=TupleKeys())
    keys = ["1", 1, 1.0, True, ("1", 1), ((1,),), (None,), (b"1",)]
    store.put_many((key, repr(key)) for key in keys)
    assert all(repr(key) == store[key] == value for key, value in store.items())
    assert len(store) == len(keys)


@pytest.mark.parametrize(
    "wrong", [math.nan, (1, math.nan), ((math.nan,),), "\ud800", 2**2100, (-(2**2100),)]
)
def test_values_without_a_place_are_refused(open_store, wrong):
    store = open_store(key_encoding=TupleKeys())
    with pytest.raises(ValueError, match=r"."):
        store[wrong] = 1
    assert wrong not in store
    assert len(store) == 0


@pytest.mark.parametrize(
    "wrong",
    [object(), [1], {}, 1j, date(2026, 1, 1), (1, [2]), ((), bytearray(b"b")), {1}],
)
def test_types_that_are_no_keys_are_refused(open_store, wrong):
    store = open_store(key_encoding=TupleKeys())
    with pytest.raises(TypeError, match=r"Key must be made of int, .*got "):
        store[wrong] = 1
    for call in (store.get, store.pop, store.delete, lambda key: store.keys(key)):
        with pytest.raises(TypeError):
            call(wrong)
    assert wrong not in store
    assert (wrong, 1) not in store.items()
    with pytest.raises(TypeError, match="Key cannot be None"):
        store[None] = 1


def test_keys_may_be_nested_as_deep_as_there_is_room(open_store):
    deep = ()
    for _ in range(100_000):
        deep = (deep,)
    store = open_store(key_encoding=TupleKeys())
    with pytest.raises(SizeError, match=r"too long: \(1, \(.* has 200004 bytes"):
        store[1, deep] = 1
    assert (1, deep) not in store
    deepest = b"\x05" * 255 + b"\x00" * 255
    store[deepest] = 1
    [key] = store
    assert encode(key) == deepest
    assert store[key] == 1


# In a store

ROWS = {
    ("sensor", 7, -1.5): "before",
    ("sensor", 7, 0.5): "first",
    ("sensor", 7, 1e300): "late",
    ("sensor", 7): "itself",
    ("sensor", 70, 0.5): "other",
    ("sensor", -(2**70), 0.5): "negative",
    ("sensor", 2**70, 0.5): "huge",
    ("sensor\x00", 7, 0.5): "a zero byte",
    ("sensors",): "longer",
    "sensor": "bare",
    7: "number",
}


@pytest.fixture(params=[0, 1])
def rows(open_store, request):
    store = open_store(key_encoding=TupleKeys(), lib_version=request.param)
    keys = list(ROWS)
    store.put_many({key: ROWS[key] for key in keys[::2]})
    store.update({key: ROWS[key] for key in keys[1::2]})
    return store


def plain(key):
    return key == ("sensors",)


def sorted_rows(keep=lambda key: True):
    """The rows whose key, as a tuple, is to be kept, in the order of the tuples."""
    tuples = {key if isinstance(key, tuple) else (key,): key for key in ROWS}
    kept = [key for key in tuples if isinstance(key[0], str) and keep(key)]
    return [
        (key[0] if len(key) == 1 else key, ROWS[tuples[key]]) for key in sorted(kept)
    ]


def test_ranges_of_tuples(rows):
    assert list(rows.items()) == [*sorted_rows(), (7, "number")]
    with rows.snapshot() as snapshot:
        for mapping in (rows, snapshot):
            for prefix in (("sensor", 7), ("sensor",), "sensor", ("sensor", 70), ()):
                want = (prefix,) if isinstance(prefix, str) else prefix
                found = list(mapping.items(prefix=prefix))
                kept = sorted_rows(lambda key, want=want: key[: len(want)] == want)
                assert found == (kept if want else [*kept, (7, "number")])
                assert len(mapping.keys(prefix)) == len(found)
                assert list(reversed(mapping.items(prefix))) == found[::-1]
                assert all(item in mapping.items(prefix) for item in found)
            found = list(mapping.items(start=("sensor", 7, 0.5), stop=("sensor", 70)))
            assert found == sorted_rows(
                lambda key: ("sensor", 7, 0.5) <= key < ("sensor", 70)
            )
            assert list(mapping.keys(("sensor", 7), start=("sensor", 7, 0.0))) == [
                ("sensor", 7, 0.5),
                ("sensor", 7, 1e300),
            ]
    assert ("sensor", 8) not in rows.keys(("sensor", 7))
    raw = encode("sensor")[:4]  # bytes are encoded already
    assert len(rows.keys(prefix=raw)) == len(ROWS) - 1


def test_bounds_of_any_length(rows):
    long = ("sensor", 7, "x" * 5000)  # a number sorts after a text
    keys = [("sensor", 7, -1.5), ("sensor", 7, 0.5), ("sensor", 7, 1e300)]
    assert list(rows.keys(start=long, stop=("sensor", 8))) == keys
    assert list(rows.keys(start=("sensor", 7), stop=long)) == [("sensor", 7)]
    assert list(rows.keys(prefix=long)) == []


def test_each_method_takes_and_gives_tuples(rows):
    key = ("sensor", 7, 0.5)
    for _ in ("pending", "stored"):
        assert rows[key] == rows.get(key) == "first"
        assert key in rows
        assert rows.exists(key)
        found, missing = rows.get_many([key, 7, ("no", 1), "no"], decode_keys=True)
        assert found == {key: "first", 7: "number"}
        assert missing == [("no", 1), "no"]
        assert rows.get_many([key])[0] == {encode(key): "first"}
        assert rows.get_many(["no"], decode_not_found=True)[1] == ["no"]
        rows.flush()
    assert rows.setdefault(("new", 1), "new") == "new"
    with rows.edit(("list", 1), []) as value:
        value.append(1)
    with rows.transaction():
        rows["list", 1] = [*rows["list", 1], 2]
    assert rows.pop(("list", 1)) == [1, 2]
    assert rows.popitem() == (7, "number")
    del rows["new", 1]
    rows.delete("sensor")
    assert rows.delete_many([("sensor", 7), ("no", 1)]) == 1
    assert rows.delete_many(rows.keys(("sensor", 7))) == 3
    assert rows == {
        ("sensor", 70, 0.5): "other",
        ("sensor", -(2**70), 0.5): "negative",
        ("sensor", 2**70, 0.5): "huge",
        ("sensor\x00", 7, 0.5): "a zero byte",
        "sensors": "longer",
    }
    rows.update(name=1)
    assert rows["name"] == 1
    assert ("sensor", 70, 0.5) in rows.keys() & {("sensor", 70, 0.5), 5, None}


def test_messages_show_the_key(open_store):
    store = open_store(key_encoding=TupleKeys(), max_map_size=2**20, map_size=2**20)
    store["sensor", 7] = 1
    open_store(serializer=Bytes(), max_map_size=2**20)[encode(("bad", 1))] = b"bad"
    shown = r"\('no', 7, -1\.5\)"
    with pytest.raises(KeyError, match=f"Key not found: {shown}"):
        store["no", 7, -1.5]
    with pytest.raises(KeyError, match=f"Key not found: {shown}"):
        del store["no", 7, -1.5]
    with pytest.raises(LoadError, match=r"DB key \('bad', 1\): "):
        store["bad", 1]
    with pytest.raises(
        SizeError, match=r"too long: \('x+\.\.\.x+', 5\) has 1004 bytes"
    ):
        store["x" * 1000, 5] = 1
    with pytest.raises(SizeError, match="empty"):
        store[()] = 1
    with pytest.raises((AttributeError, pickle.PicklingError)) as caught:
        store["sensor", 8] = lambda: None
    assert "the value of ('sensor', 8)" in caught.value.__notes__[-1]
    with pytest.raises(GrowthError, match=r"value of \('sensor', 8\) takes"):
        store["sensor", 8] = bytes(2**21)
    edit = store.edit(("sensor", 7))
    with pytest.raises(TypeError, match=r"value of \('sensor', 7\) can't"), edit:
        pass
    assert "prefix=('sensor', 7)" in repr(store.keys(("sensor", 7)))
    store.delete(("bad", 1))


def read(store, key):
    return store[key], list(store.keys(prefix=("sensor", 7)))


def test_a_store_takes_its_key_encoding_along(open_store):
    store = open_store(key_encoding=TupleKeys(), serializer=Checked(Json()))
    store["sensor", 7] = [1]
    other = pickle.loads(pickle.dumps(store))
    assert repr(other.key_encoding) == repr(store.key_encoding) == "TupleKeys()"
    assert read(other, ("sensor", 7)) == ([1], [("sensor", 7)])
    other.close()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(read, store, ("sensor", 7)).result(60)
    assert found == ([1], [("sensor", 7)])


def test_stores_with_different_keys_compare_by_what_comes_out(open_store):
    tuples = open_store(key_encoding=TupleKeys())
    tuples["a"] = 1
    texts = open_store("texts", key_encoding="utf-8")
    texts["a"] = 1
    assert tuples == texts == tuples
    numbers = open_store("numbers", key_encoding=TupleKeys())
    numbers[1] = 1
    assert numbers != texts
    assert texts != numbers
    raw = open_store()
    assert list(raw) == [encode("a")]


# Encodings of the user's own


class Reversed:
    """Names of hosts, by domain."""

    def encode(self, key):
        return ".".join(reversed(key.split("."))).encode()

    def decode(self, raw):
        return ".".join(reversed(raw.decode().split(".")))


def test_an_encoding_of_ones_own(open_store):
    store = open_store(key_encoding=Reversed())
    store.update({"www.example.com": 1, "example.org": 2, "example.com": 3})
    assert list(store) == ["example.com", "www.example.com", "example.org"]
    assert list(store.items(prefix="example.com")) == [
        ("example.com", 3),
        ("www.example.com", 1),
    ]
    assert store[b"org.example"] == 2
    assert store.get_many(["example.org", "no"], decode_keys=True) == (
        {"example.org": 2},
        ["no"],
    )
    store[b"\xff"] = 4
    assert list(store)[-1] == b"\xff"
    assert 5 not in store
    with pytest.raises(TypeError, match=r"5 can't be encoded as a key: AttributeError"):
        store[5]
    with pytest.raises(KeyError, match=r"Key not found: 'a\.b'"):
        store["a.b"]


class Days:
    """Dates as numbers of days, with a month as a prefix."""

    def encode(self, key):
        return key.toordinal().to_bytes(4, "big")

    def decode(self, raw):
        return date.fromordinal(int.from_bytes(raw, "big"))

    def bounds(self, month):
        first = month.replace(day=1)
        after = first.replace(year=first.year + first.month // 12)
        return self.encode(first), self.encode(
            after.replace(month=first.month % 12 + 1)
        )


def test_a_tuple_is_one_key_and_not_keys(open_store):
    store = open_store(key_encoding=TupleKeys())
    store.update([("sensor", 1), (7, 2), (("sensor", 7), 3)])
    for call in (store.get_many, store.delete_many):
        with pytest.raises(
            TypeError, match="not a single tuple, which is a key itself"
        ):
            call(("sensor", 7))
    assert len(store) == 3
    assert store.get_many([("sensor", 7)])[0] == {encode(("sensor", 7)): 3}
    assert store.delete_many([("sensor", 7), 7]) == 2
    texts = open_store("texts", key_encoding="utf-8")
    texts.update(a=1, b=2)
    assert texts.get_many(("a", "b"), decode_keys=True) == ({"a": 1, "b": 2}, [])
    assert texts.delete_many(("a", "b")) == 2


class Prefixed:
    """Decodes to bytes, which a store takes as they are."""

    def encode(self, key):
        return b"user/" + key

    def decode(self, raw):
        return raw.removeprefix(b"user/")


def test_keys_that_decode_to_bytes_come_out_encoded(open_store):
    store = open_store(key_encoding=Prefixed(), serializer=Checked())
    store[b"user/abc"] = 1
    assert list(store.items()) == [(b"user/abc", 1)]
    assert [store[key] for key in store] == [1]


class Pairs:
    """Encodes pairs only, but has bounds for a first element, too."""

    def encode(self, key):
        first, second = key
        return f"{first}/{second}".encode()

    def decode(self, raw):
        return tuple(raw.decode().split("/"))

    def bounds(self, first):
        return self.wrong if first == "wrong" else (f"{first}/".encode(), b"~")

    wrong = ("a", "b")


def test_a_prefix_need_be_no_key(open_store):
    store = open_store(key_encoding=Pairs())
    store.update([(("a", "1"), 1), (("b", "1"), 2)])
    assert list(store.keys(prefix="b")) == [("b", "1")]
    with pytest.raises(TypeError, match="must return two bytes objects"):
        store.keys(prefix="wrong")
    with pytest.raises(ValueError, match="unpack"):
        store.keys(start="b")


def test_in_hides_no_error_but_those_of_keys_of_another_kind(open_store):
    class Failing:
        def __init__(self, error):
            self.error = error

        def encode(self, key):
            raise self.error

        decode = encode

    for error in (MemoryError(), RecursionError(), OSError()):
        store = open_store(key_encoding=Failing(error))
        with pytest.raises(type(error)):
            "a" in store  # noqa: B015
    for error in (IndexError(), ZeroDivisionError(), struct.error()):
        assert "a" not in open_store(key_encoding=Failing(error))


def test_popitem_deletes_nothing_if_its_key_cannot_be_told(open_store):
    class Interrupted(Reversed):
        def decode(self, raw):
            raise KeyboardInterrupt

    store = open_store(key_encoding=Interrupted())
    store["a.b"] = 1
    with pytest.raises(KeyboardInterrupt):
        store.popitem()
    assert store["a.b"] == 1


def test_an_encoding_can_say_what_a_prefix_is(open_store):
    store = open_store(key_encoding=Days())
    days = [date(2026, 11, 30), date(2026, 12, 1), date(2026, 12, 31), date(2027, 1, 1)]
    store.update((day, day.isoformat()) for day in days)
    assert list(store.keys(prefix=date(2026, 12, 7))) == days[1:3]
    assert list(store.keys(start=days[2])) == days[2:]


class Lossy:
    def encode(self, key):
        return struct.pack(">f", key)

    def decode(self, raw):
        return struct.unpack(">f", raw)[0] if len(raw) == 4 else None


def test_a_key_comes_out_only_if_it_encodes_to_the_same_bytes(open_store):
    store = open_store(key_encoding=Lossy())
    store[0.1] = 1
    store[b"12345"] = 2
    [raw, number] = store
    assert number != 0.1
    assert store[0.1] == store[number] == 1
    assert raw == b"12345"


class Returns:
    def __init__(self, raw):
        self.raw = raw

    def encode(self, key):
        return self.raw

    def decode(self, raw):
        raise KeyError(raw)


def test_encodings_that_do_wrong_are_told(open_store):
    for wrong in ("text", bytearray(b"b"), None):
        store = open_store(key_encoding=Returns(wrong))
        with pytest.raises(TypeError, match=r"encode\(\) of key_encoding must return"):
            store[5] = 1
        assert 5 not in store
    store = open_store(key_encoding=Returns(b"raw"))
    store[5] = 1
    assert list(store) == [b"raw"]
    with pytest.raises(ValueError, match="Key 'raw' can't be decoded"):
        store.get_many([5], decode_keys=True)


class OnlyEncode:
    def encode(self, key):
        return b"k"


@pytest.mark.parametrize("wrong", [5, b"utf-8", OnlyEncode(), TupleKeys, object()])
def test_what_is_no_encoding_is_refused(tmp_path, wrong):
    with pytest.raises(
        TypeError, match=r"key_encoding must be the name of a codec, or"
    ):
        LmdbObjectStore(tmp_path / "db", key_encoding=wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"key_errors": "ignore"}, {"str_normalize": "NFC"}]
)
def test_options_of_codecs_do_not_go_with_objects(tmp_path, options):
    with pytest.raises(ValueError, match="are for codecs"):
        LmdbObjectStore(tmp_path / "db", key_encoding=TupleKeys(), **options)
