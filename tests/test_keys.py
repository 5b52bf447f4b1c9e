"""Keys: types, encodings, normal forms, limits, and how messages show them."""

import array
import codecs
import unicodedata

import lmdb
import pytest

from lmdb_object_store import ClosedError, LmdbObjectStore, SizeError

TAKES_A_KEY = {
    "get": lambda store, key: store.get(key),
    "[]": lambda store, key: store[key],
    "get_many": lambda store, key: store.get_many([b"pending", key, b"flushed"]),
    "exists": lambda store, key: store.exists(key),
    "exists flush": lambda store, key: store.exists(key, flush=True),
    "put": lambda store, key: store.put(key, "new"),
    "[]=": lambda store, key: store.__setitem__(key, "new"),
    "put_many pairs": lambda store, key: store.put_many([(b"new", 1), (key, 1)]),
    "delete": lambda store, key: store.delete(key),
    "del": lambda store, key: store.__delitem__(key),
}


@pytest.fixture(params=TAKES_A_KEY.values(), ids=TAKES_A_KEY)
def takes_a_key(request):
    return request.param


def refuses(store, call, key, error, message):
    """Show that `call` refuses `key` and changes nothing."""
    store.put_many({b"flushed": 1, b"deleted": 1})
    store.put(b"pending", 2)
    store.delete(b"deleted")
    before = dict(store.write_buffer), store.env.info()["last_txnid"]
    with pytest.raises(error, match=message) as info:
        call(store, key)
    assert (dict(store.write_buffer), store.env.info()["last_txnid"]) == before
    assert store.get_many([b"flushed", b"deleted", b"pending", b"new"]) == (
        {b"flushed": 1, b"pending": 2},
        [b"deleted", b"new"],
    )
    return info.value


# What is refused


def test_none_is_no_key(open_store, takes_a_key):
    refuses(open_store(), takes_a_key, None, TypeError, r"^Key cannot be None\.$")


@pytest.mark.parametrize(
    ("encoding", "expected"), [(None, "bytes-like"), ("utf-8", "bytes-like or str")]
)
def test_other_types_are_no_keys(open_store, takes_a_key, encoding, expected):
    store = open_store(key_encoding=encoding)
    for key in (5, 1.5, True, (b"a",), frozenset(b"a"), object()):
        message = f"^Key must be {expected}; got {type(key).__name__}$"
        refuses(store, takes_a_key, key, TypeError, message)


@pytest.mark.parametrize("key", ["k", ""])
def test_str_keys_need_an_encoding(open_store, takes_a_key, key):
    message = r"^str keys are not allowed \(set key_encoding="
    refuses(open_store(), takes_a_key, key, TypeError, message)


@pytest.mark.parametrize("message", ["^Key is empty", "^Key is too long"])
def test_empty_and_too_long_keys_are_refused(open_store, takes_a_key, message):
    store = open_store(key_encoding="utf-8")
    size = store.env.max_key_size() + 1 if "long" in message else 0
    for make in (bytes, bytearray, memoryview, bytes.decode):
        error = refuses(store, takes_a_key, make(b"k" * size), ValueError, message)
        assert isinstance(error, SizeError)
        assert isinstance(error, lmdb.BadValsizeError)


def test_str_keys_that_can_not_be_encoded_are_refused(open_store, takes_a_key):
    store = open_store(key_encoding="ascii")
    refuses(store, takes_a_key, "é", UnicodeEncodeError, "can't encode")


def test_put_many_refuses_bad_keys_of_a_mapping(open_store):
    def put_many(store, key):
        store.put_many({b"new": 1, key: 1})

    refuses(open_store(), put_many, None, TypeError, "None")


NO_KEYS = [None, 5, 1.5, (b"a",), [], {}, object(), b"", b"k" * 2000, "", "k" * 2000]


@pytest.mark.parametrize("flush_first", [True, False])
def test_what_can_never_be_a_key_is_not_in_the_store(open_store, flush_first):
    store = open_store(key_encoding="ascii", str_normalize="NFC")
    store["a"] = 1
    if flush_first:
        store.flush()
    with store.snapshot() as snapshot:
        for mapping in (store, snapshot, store.keys(), snapshot.keys()):
            for key in (*NO_KEYS, "é", "\udcff"):
                assert key not in mapping
            assert "a" in mapping
            assert memoryview(b"a") in mapping
    with store.transaction():
        assert None not in store
    store.close()
    with pytest.raises(ClosedError):
        None in store  # noqa: B015


def test_a_str_without_an_encoding_is_a_mistake_in_the_options(open_store):
    store = open_store()
    with store.snapshot() as snapshot:
        for mapping in (store, snapshot):
            for key in ("a", "", "k" * 2000):
                with pytest.raises(TypeError, match="key_encoding="):
                    key in mapping  # noqa: B015
            keys = mapping.keys()  # of which set operations ask about anything
            assert "a" not in keys


def test_a_file_name_as_a_key(open_store):
    store = open_store(key_encoding="utf-8")
    with pytest.raises(UnicodeEncodeError) as caught:
        store["name\udcff"] = 1
    assert r"The key 'name\udcff' can't be stored" in str(caught.value)
    assert 'key_errors="surrogateescape"' in str(caught.value)
    store = open_store(key_encoding="utf-8", key_errors="surrogateescape")
    store["name\udcff"] = 1
    assert list(store) == ["name\udcff"]


def test_the_error_handler_is_not_named_where_another_is_chosen(open_store):
    store = open_store(key_encoding="ascii", key_errors="surrogateescape")
    with pytest.raises(UnicodeEncodeError, match=r"The key 'é' can't be stored$"):
        store["é"] = 1


# Limits


@pytest.mark.parametrize(("engine", "limit"), [(0, 511), (1, 1978)])
def test_keys_are_taken_up_to_the_limit_of_the_engine(open_store, engine, limit):
    store = open_store(lib_version=engine, key_encoding="utf-8")
    assert store.env.max_key_size() == limit
    longest = b"k" * limit
    store[longest] = 1
    store.put_many({b"m" * limit: 2})
    assert store[longest.decode()] == 1
    assert store.get_many([longest, b"m" * limit])[0].keys() == {longest, b"m" * limit}
    store.delete(longest)
    del store[b"m" * limit]
    store.flush()
    assert store.env.stat()["entries"] == 0
    with pytest.raises(SizeError, match=f"has {limit + 1} bytes.* takes {limit} at"):
        store[longest + b"k"] = 1


def test_limit_counts_encoded_bytes(open_store):
    store = open_store(key_encoding="utf-16-le")
    longest = "k" * (store.env.max_key_size() // 2)
    store[longest] = 1
    store.flush()
    assert longest in store
    with pytest.raises(SizeError):
        store[longest + "k"] = 1


def test_limit_counts_normalized_text(open_store):
    store = open_store(key_encoding="utf-8", str_normalize="NFD")
    with pytest.raises(SizeError):
        store["é" * 250] = 1  # 500 bytes as given, 750 decomposed


# Types


class Text(str):
    __slots__ = ()


class Raw(bytes):
    __slots__ = ()


SAME_KEY = [
    b"key",
    bytearray(b"key"),
    memoryview(b"key"),
    memoryview(b"_k_e_y")[1::2],
    memoryview(array.array("B", b"key")),
    Raw(b"key"),
    "key",
    Text("key"),
]


@pytest.mark.parametrize("put_as", SAME_KEY, ids=lambda key: type(key).__name__)
def test_equal_bytes_are_one_key_whatever_their_type(open_store, put_as):
    store = open_store(key_encoding="utf-8", sync=False)
    store[put_as] = 1
    assert [type(key) for key in store.write_buffer] == [bytes]
    for _ in ("pending", "stored"):
        for get_as in SAME_KEY:
            assert store[get_as] == store.get(get_as) == 1
            assert get_as in store
            assert store.exists(get_as, flush=False)
        store.autoflush_on_read = False
        assert store.get_many(SAME_KEY) == ({b"key": 1}, [])
        assert store.get_many(SAME_KEY, decode_keys=True) == ({"key": 1}, [])
        store.flush()
    store.put_many([(put_as, 2)])
    assert store[b"key"] == 2
    del store[put_as]
    assert store.get(b"key") is None
    store[b"key"] = 3
    store.delete(put_as)
    store.flush()
    assert store.env.stat()["entries"] == 0


def test_key_is_copied(open_store):
    store = open_store()
    key = bytearray(b"before")
    store[key] = 1
    key[:] = b"after!"
    assert store.write_buffer.keys() == {b"before"}


# Encodings


@pytest.mark.parametrize(
    "encoding", ["utf-8", "UTF8", "utf-16-le", "utf-16", "latin-1", "cp1252", "utf-7"]
)
def test_str_keys_are_stored_in_the_encoding(open_store, encoding):
    store = open_store(key_encoding=encoding)
    keys = ["a", "é", "ß/ü", "\0"]
    store.put_many((key, key) for key in keys)
    store.flush()
    with store.env.begin() as txn:
        on_disk = sorted(txn.cursor().iternext(values=False))
    assert on_disk == sorted(key.encode(encoding) for key in keys)
    assert [store[key] for key in keys] == keys
    assert store.get_many(keys, decode_keys=True)[0] == {key: key for key in keys}


def test_ignore_and_replace_can_merge_keys(open_store):
    store = open_store("ignore", key_encoding="ascii", key_errors="ignore")
    store["naïve"] = 1
    assert store["nave"] == 1
    with pytest.raises(SizeError, match="empty"):
        store["é"] = 1
    store = open_store("replace", key_encoding="ascii", key_errors="replace")
    store["naïve"] = 1
    assert store["naéve"] == store["na?ve"] == 1


@pytest.mark.parametrize(
    ("errors", "raw"),
    [
        ("backslashreplace", b"\\xe9"),
        ("xmlcharrefreplace", b"&#233;"),
        ("namereplace", b"\\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ],
)
def test_error_handler_is_honoured(open_store, errors, raw):
    store = open_store(key_encoding="ascii", key_errors=errors)
    store["é"] = 1
    assert store.write_buffer.keys() == {raw}
    assert store[raw] == 1


def test_registered_error_handler_is_honoured(open_store):
    codecs.register_error("test-stars", lambda error: ("*", error.end))
    store = open_store(key_encoding="ascii", key_errors="test-stars")
    store["aéb"] = 1
    assert store.get_many([b"a*b", b"c\xff"], decode_keys=True) == ({"a*b": 1}, ["c*"])


def test_surrogateescape_round_trips_any_bytes(open_store):
    raw = bytes(range(1, 256))
    store = open_store(key_encoding="utf-8", key_errors="surrogateescape")
    store[raw] = 1
    store.flush()
    found, not_found = store.get_many([raw, b"\xff"], decode_keys=True)
    [text] = found
    assert store[text] == 1
    assert text.encode("utf-8", "surrogateescape") == raw
    assert not_found == ["\udcff"]


@pytest.mark.parametrize(
    ("errors", "text"), [("ignore", "ab"), ("replace", "a\N{REPLACEMENT CHARACTER}b")]
)
def test_error_handler_decodes_too(open_store, errors, text):
    store = open_store(key_encoding="utf-8", key_errors=errors)
    store[b"a\xffb"] = 1
    assert store.get_many([b"a\xffb"], decode_keys=True) == ({text: 1}, [])


def test_key_that_does_not_decode_is_refused_where_it_has_to_be_decoded(open_store):
    store = open_store(key_encoding="utf-8")
    store[b"\xff"] = 1
    with pytest.raises(UnicodeDecodeError):
        store.get_many([b"\xff"], decode_keys=True)
    with pytest.raises(UnicodeDecodeError):
        store.get_many([b"\xfe"], decode_not_found=True)
    assert store.get_many([b"\xff"], decode_not_found=True) == ({b"\xff": 1}, [])
    assert store.get_many([b"\xfe"], decode_keys=True, decode_not_found=False) == (
        {},
        [b"\xfe"],
    )


def test_handler_that_only_encodes_says_so_when_it_has_to_decode(open_store):
    store = open_store(key_encoding="ascii", key_errors="xmlcharrefreplace")
    store["\u20ac"] = 1
    assert store.get_many(["\u20ac"], decode_keys=True) == ({"&#8364;": 1}, [])
    with pytest.raises(ValueError, match="0xff can't be decoded"):
        store.get_many([b"\xff"], decode_not_found=True)


# Normal forms


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_str_keys_are_brought_to_the_normal_form(open_store, form):
    key = "e\N{COMBINING ACUTE ACCENT}é\N{LATIN SMALL LIGATURE FI}Å"
    normal = unicodedata.normalize(form, key)
    store = open_store(key_encoding="utf-8", str_normalize=form)
    store[key] = 1
    assert store.write_buffer.keys() == {normal.encode()}
    assert store[normal] == store[unicodedata.normalize("NFC", key)] == 1
    assert store.get_many([key], decode_keys=True) == ({normal: 1}, [])
    store.delete(normal)
    assert store.get_many([key]) == ({}, [key])
    assert store.get_many([key], decode_not_found=True) == ({}, [normal])


def test_without_a_normal_form_str_keys_stay_as_they_are(open_store):
    store = open_store(key_encoding="utf-8")
    store["é"] = 1
    assert "e\N{COMBINING ACUTE ACCENT}" not in store


def test_bytes_keys_are_not_normalized(open_store):
    store = open_store(key_encoding="utf-8", str_normalize="NFC")
    decomposed = "e\N{COMBINING ACUTE ACCENT}".encode()
    store[decomposed] = 1
    assert store.write_buffer.keys() == {decomposed}
    assert "é" not in store


def test_normal_form_comes_before_the_encoding(open_store):
    store = open_store(key_encoding="latin-1", str_normalize="NFC")
    store["e\N{COMBINING ACUTE ACCENT}"] = 1
    assert store.write_buffer.keys() == {b"\xe9"}


# Messages


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        (b"user:42", "'user:42'"),
        ("Ünïcode \N{SNOWMAN}", "'Ünïcode \N{SNOWMAN}'"),
        (b"\x00\xff", "0x00ff"),
        (b"tab\t", "0x74616209"),
        ("line\n", "0x6c696e650a"),
        ("k" * 50, f"'{'k' * 50}'"),
        (b"k" * 51, f"'{'k' * 47}...' (51 bytes)"),
        (bytes(24), "0x" + "00" * 24),
        (bytes(25), "0x" + "00" * 24 + "... (25 bytes)"),
    ],
)
@pytest.mark.parametrize(
    "look_up", [LmdbObjectStore.__getitem__, LmdbObjectStore.__delitem__]
)
def test_messages_show_text_or_else_hex_and_shorten_it(open_store, look_up, key, shown):
    store = open_store(key_encoding="utf-8", sync=False)
    with pytest.raises(KeyError) as info:
        look_up(store, key)
    assert info.value.args == (f"Key not found: {shown}",)


def test_message_on_a_refused_str_key_shows_it(open_store):
    with pytest.raises(TypeError, match=r"got 'user:42'$"):
        open_store()["user:42"]


def test_message_on_a_long_key_is_short(open_store):
    with pytest.raises(SizeError) as info:
        open_store()[b"k" * 1_000_000]
    assert "'kkk" in str(info.value)
    assert "1000000 bytes" in str(info.value)
    assert len(str(info.value)) < 250
