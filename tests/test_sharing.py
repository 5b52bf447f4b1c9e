"""Stores of one process that have the same file open share its environment."""

import gc
import logging
import os
import pickle
import shutil
import sys
import warnings
from contextlib import suppress
from functools import partial
from itertools import count, permutations

import lmdb
import pytest

from conftest import PATIENCE, eventually, run_all
from lmdb_object_store import (
    BusyError,
    ClosedError,
    GrowthError,
    LmdbObjectStore,
    LostWritesError,
    ReadOnlyError,
    ReplacedError,
    SnapshotOpenError,
)
from moments import (
    WAITS_FOR_CLOSE,
    WAITS_FOR_LOCK,
    WAITS_FOR_WRITER,
    Parked,
    at_call,
    every_step,
    handling,
    is_method,
    part_of,
)

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
UNCLOSED = pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")
MIB = 2**20
LARGE = bytes(300 * 2**10)  # is not copied out of the map before it is unpickled
TOO_MUCH = {b"key %d" % n: bytes(2**15) for n in range(64)}  # 2 MiB


def is_open(env):
    """Whether an environment has not been closed yet."""
    try:
        env.info()
    except lmdb.Error:
        return False
    return True


def overfill(store):
    """Make pending what does not fit below a cap of 1 MiB."""
    for key, value in TOO_MUCH.items():
        store[key] = value


def hooked(in_thread, method, inside, action):
    """Do `action` in a thread, and `inside` where that first calls `method`."""

    def hook(frame, event, function):
        if event == "c_call" and is_method(function, method):
            sys.setprofile(None)
            inside()

    def run():
        sys.setprofile(hook)
        try:
            return action()
        finally:
            sys.setprofile(None)

    return in_thread(run).result()


def calls_of(in_thread, action):
    """Return which methods of an environment `action` calls that make it durable."""
    calls = []

    def hook(frame, event, function):
        if event == "c_call":
            calls.extend(
                name for name in ("sync", "close") if is_method(function, name)
            )

    def run():
        sys.setprofile(hook)
        try:
            action()
        finally:
            sys.setprofile(None)

    in_thread(run).result()
    return calls


# Which file it is


def same(folder):
    return "db", {}


def with_dots(folder):
    return os.path.join("db", "..", "nowhere", "..", "db"), {}


def with_a_slash(folder):
    return str(folder / "db") + os.sep, {}


def absolute(folder):
    return folder / "db", {}


def symlink(folder):
    (folder / "link").symlink_to(folder / "db", target_is_directory=True)
    return "link", {}


def below_a_symlink(folder):
    (folder / "up").symlink_to(folder, target_is_directory=True)
    return os.path.join("up", "db"), {}


def data_file(folder):
    return os.path.join("db", "data.mdb"), {"subdir": False}


def symlink_to_the_file(folder):
    (folder / "link").symlink_to(folder / "db" / "data.mdb")
    return "link", {"subdir": False}


def hard_link(folder):
    (folder / "link").hardlink_to(folder / "db" / "data.mdb")
    return "link", {"subdir": False}


def hard_link_in_a_folder(folder):
    (folder / "other").mkdir()
    (folder / "other" / "data.mdb").hardlink_to(folder / "db" / "data.mdb")
    return "other", {}


@ENGINES
@pytest.mark.parametrize(
    "spell",
    [
        *(same, with_dots, with_a_slash, absolute, symlink, below_a_symlink),
        *(data_file, symlink_to_the_file, hard_link, hard_link_in_a_folder),
    ],
)
def test_one_file_has_one_environment(
    open_store, tmp_path, monkeypatch, lib_version, spell
):
    monkeypatch.chdir(tmp_path)
    first = open_store(lib_version=lib_version)
    first[b"flushed"] = 0
    first.flush()
    first[b"pending"] = 1
    try:
        path, options = spell(tmp_path)
    except OSError:
        pytest.skip("there are no such links here")
    second = LmdbObjectStore(path, **options)
    with second:
        env = second.env
        assert env is first.env
        assert second.db_path == os.path.abspath(path)
        assert second.get_many([b"flushed", b"pending"])[0] == dict(first)
        second[b"by the second"] = 2
        assert first.write_buffer.keys() == {b"by the second"}
        assert first[b"by the second"] == 2
        first.close()
        assert (first.closed, second.closed) == (True, False)
        second[b"alone"] = 3
        assert len(second) == 4
    assert not is_open(env)
    with open_store(readonly=True) as again:
        assert dict(again) == {
            b"flushed": 0,
            b"pending": 1,
            b"by the second": 2,
            b"alone": 3,
        }


def test_different_files_have_nothing_in_common(open_store):
    first, second = open_store("a"), open_store("b")
    first[b"key"] = 1
    assert b"key" not in second
    first.close()
    second[b"key"] = 2
    assert second[b"key"] == 2


posix_only = pytest.mark.skipif(
    os.name == "nt", reason="an open file can't be deleted on Windows"
)


@posix_only
@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_file_made_anew_is_another_one(open_store, tmp_path, how):
    old = open_store()
    old.put_many({b"old": 0})
    old[b"pending"] = 1
    if how == "deleted":
        shutil.rmtree(tmp_path / "db")
    else:
        (tmp_path / "db").rename(tmp_path / "elsewhere")
    new = open_store()
    assert new.env is not old.env
    assert dict(new) == {}
    new[b"new"] = 3
    assert dict(old) == {b"old": 0, b"pending": 1}
    with pytest.raises(ReplacedError):
        old.put_many({b"large": bytes(20 * MIB)})  # the map grows
    assert open_store().env is new.env
    with pytest.raises(LostWritesError):
        old.close(strict=True)
    assert dict(new) == {b"new": 3}
    new.close(strict=True)
    assert dict(open_store()) == {b"new": 3}
    if how == "renamed":
        assert dict(open_store("elsewhere")) == {b"old": 0}


@posix_only
def test_a_file_replaced_beside_its_old_lock_file_is_refused(open_store, tmp_path):
    # Two files with one table of readers would spoil each other.
    old = open_store()
    old.put_many({b"old": 0})
    with open_store("other") as other:
        other[b"new"] = 3
    os.replace(tmp_path / "other" / "data.mdb", tmp_path / "db" / "data.mdb")
    with pytest.raises(lmdb.Error):
        open_store()
    assert dict(old) == {b"old": 0}
    with pytest.raises(ReplacedError):
        old.put_many({b"large": bytes(20 * MIB)})
    with pytest.raises(LostWritesError):
        old.close(strict=True)
    assert dict(open_store()) == {b"new": 3}


@posix_only
def test_a_file_that_vanishes_while_it_is_opened_is_no_other_one(
    open_store, tmp_path, in_thread
):
    open_store("a", map_size=MIB).close()
    with open_store("a") as store:
        store[b"a"] = 1

    def vanish():
        shutil.rmtree(tmp_path / "a")

    with suppress(lmdb.Error, OSError):
        hooked(in_thread, "reader_check", vanish, lambda: open_store("a"))
    other = open_store("b")
    assert dict(other) == {}
    assert other.env.path() == str(tmp_path / "b")


# Open for reading first, then for writing


@ENGINES
@pytest.mark.parametrize("options", [{}, {"lock": False}])
def test_a_file_that_is_open_for_reading_can_be_opened_for_writing(
    open_store, tmp_path, stored, lib_version, options
):
    with open_store(lib_version=lib_version) as store:
        store.put_many({b"a": 1, b"large": LARGE})
    reader = open_store(readonly=True, map_size=MIB, **options)
    assert reader[b"large"] == LARGE
    entries = iter(reader.items())
    assert next(entries) == (b"a", 1)
    writer = open_store(map_size=32 * MIB)
    assert writer.env is reader.env
    assert writer.env.info()["map_size"] == 32 * MIB
    writer[b"b"] = 2
    assert reader[b"b"] == 2  # pending, and seen by all stores of the process
    assert list(entries)[-1] == (b"large", LARGE)
    with pytest.raises(ReadOnlyError):
        reader[b"c"] = 3
    writer.put_many({b"%d" % n: bytes(MIB) for n in range(40)})  # the map grows
    writer.close(strict=True)
    assert len(reader) == 43
    reader.close()
    assert stored()["b"] == 2


def test_a_snapshot_keeps_a_file_from_being_opened_for_writing(open_store, in_thread):
    with open_store() as store:
        store[b"a"] = 1
    reader = open_store(readonly=True)
    with reader.snapshot() as snapshot:
        with pytest.raises(SnapshotOpenError, match="opens the file for writing"):
            open_store()
        assert snapshot[b"a"] == 1
        opening = in_thread(open_store)  # waits
    opening.result()[b"b"] = 2
    assert reader[b"b"] == 2


@pytest.mark.parametrize("readers", [1, 4])
def test_threads_read_while_the_file_is_opened_for_writing(
    hasty, open_store, tmp_path, readers
):
    with open_store() as store:
        store.put_many({b"%03d" % n: bytes(n) for n in range(300)})

    for _ in range(10):
        reader = LmdbObjectStore(tmp_path / "db", readonly=True)
        over = []

        def read(reader=reader, over=over):
            while not over:
                assert len(list(reader.values())) == 300
                assert reader[b"007"] == bytes(7)

        def write(over=over):
            try:
                with LmdbObjectStore(tmp_path / "db") as writer:
                    writer[b"007"] = bytes(7)
            finally:
                over.append(True)

        run_all(*[read] * readers, write)
        assert reader[b"299"] == bytes(299)
        reader.close()


def test_two_threads_open_for_writing_what_is_open_for_reading(open_store, in_thread):
    open_store().close()
    reader = open_store(readonly=True)
    with Parked(in_thread, "reader_check", open_store) as first:
        second = in_thread(open_store)
        second.wait_until_in(WAITS_FOR_WRITER)
    first.release()[b"a"] = 1
    second.result()[b"b"] = 2
    assert dict(reader) == {b"a": 1, b"b": 2}


@pytest.mark.parametrize("wanted", [{"max_readers": 10}, {"max_dbs": 1}])
def test_options_that_contradict_leave_the_reader_as_it_was(open_store, wanted):
    with open_store() as store:
        store[b"a"] = 1
    reader = open_store(readonly=True, max_readers=20, max_dbs=2)
    with pytest.raises(ValueError, match="already open"):
        open_store(**wanted)
    assert reader[b"a"] == 1
    with open_store(max_dbs=2) as writer:
        writer[b"a"] = 2
    assert reader[b"a"] == 2


def test_what_a_reader_was_opened_with_makes_no_writer_less_durable(open_store):
    open_store().close()
    reader = open_store(readonly=True, sync=False, metasync=False)
    writer = open_store()
    flags = writer.env.flags()
    assert (flags["sync"], flags["metasync"]) == (True, True)
    assert reader.env is writer.env


@posix_only
def test_a_reader_whose_path_leads_elsewhere_is_left_alone(open_store, tmp_path):
    for name in ("v1", "v2"):
        with open_store(name) as store:
            store[b"name"] = name
    (tmp_path / "current").symlink_to("v1")
    reader = open_store("current", readonly=True)
    assert reader[b"name"] == "v1"
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("v2")
    with pytest.raises(ReplacedError, match="replaced by another file"):
        open_store("v1")
    assert reader[b"name"] == "v1"
    assert open_store("v2")[b"name"] == "v2"


@posix_only
def test_an_opening_for_writing_that_fails_leaves_the_reader(open_store, tmp_path, run):
    with open_store() as store:
        store[b"a"] = 1
    script = """
import resource
from lmdb_object_store import LmdbObjectStore
reader = LmdbObjectStore("db", readonly=True)
assert reader[b"a"] == 1
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (2**32, limits[1]))
try:
    LmdbObjectStore("db", map_size=2**40)
except Exception as error:
    assert "does not fit" in str(error), error
else:
    raise AssertionError
assert reader.env.info()["map_size"] < 2**40
assert reader[b"a"] == 1
with LmdbObjectStore("db") as writer:
    writer[b"a"] = 2
assert reader[b"a"] == 2
reader.close()
"""
    run(script)


# What each store has of its own


def test_each_store_has_its_own_keys(open_store):
    texts = open_store(key_encoding="utf-8", str_normalize="NFC")
    raw = open_store()
    latin = open_store(key_encoding="latin-1")
    texts["e\u0301"] = 1
    assert raw["\u00e9".encode()] == 1
    assert list(texts) == ["\u00e9"]
    assert list(raw) == ["\u00e9".encode()]
    assert list(latin) == ["\u00c3\u00a9"]
    with pytest.raises(TypeError):
        raw["\u00e9"]
    assert [store.key_encoding for store in (texts, raw, latin)] == [
        *("utf-8", None, "latin-1"),
    ]
    assert latin.str_normalize is None


def test_each_store_has_its_own_batches(open_store):
    first, second = open_store(batch_size=100), open_store(batch_size=3)
    first[b"a"] = first[b"b"] = first[b"c"] = 1
    assert len(second.write_buffer) == 3
    second[b"d"] = 1
    assert len(first.write_buffer) == 0
    second.batch_bytes = 10
    first[b"a"] = bytes(100)
    assert len(first.write_buffer) == 1
    second[b"a"] = bytes(100)
    assert len(first.write_buffer) == 0
    assert first.batch_bytes == 64 * MIB


def test_each_store_has_its_own_autoflush(open_store):
    first, second = open_store(autoflush_on_read=False), open_store()
    first[b"a"] = 1
    first.get(b"b")
    assert len(first.write_buffer) == 1
    second.get(b"b")
    assert len(first.write_buffer) == 0


READS = {
    "get": lambda store: [store.get(key) for key in (b"a", b"b", b"c", b"d")],
    "in": lambda store: [key in store for key in (b"a", b"b", b"c", b"d")],
    "exists": lambda store: [store.exists(key) for key in (b"a", b"b", b"c", b"d")],
    "get_many": lambda store: store.get_many([b"a", b"b", b"c", b"d"]),
    "keys": list,
    "reversed": lambda store: list(reversed(store)),
    "items": lambda store: list(store.items(start=b"b")),
    "len": lambda store: (len(store), bool(store), len(store.keys(b"c"))),
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("read", READS)
def test_all_stores_read_the_same(open_store, read, flush, readonly):
    first = open_store(autoflush_on_read=False)
    second = open_store(autoflush_on_read=False, readonly=readonly)
    first.put_many({b"a": 1, b"b": 2, b"large": LARGE})
    first[b"c"] = 3
    first.delete(b"a")
    if flush:
        first.flush()
    expected = READS[read](first)
    assert READS[read](second) == expected
    with second.snapshot() as snapshot:
        if read != "exists":
            assert READS[read](snapshot) == expected
    assert READS[read](second) == expected


def test_a_block_is_of_its_thread_whichever_store_it_uses(open_store, in_thread):
    first, second = open_store(), open_store()
    reader = open_store(readonly=True)
    first[b"a"] = 0
    with suppress(ZeroDivisionError), first.transaction():
        second[b"a"] += 1
        assert (first[b"a"], reader[b"a"]) == (1, 1)
        assert in_thread(lambda: second[b"a"]).result() == 0
        with second.transaction():
            first[b"b"] = 2
        for store in first, second, reader:
            with pytest.raises(BusyError):
                store.close()
            assert not store.closed
        with pytest.raises(ReadOnlyError):
            reader[b"c"] = 3
        assert dict(open_store()) == {b"a": 1, b"b": 2}
        raise ZeroDivisionError
    assert dict(second) == {b"a": 0}


# Closed


def iterate(view):
    return lambda store: next(iter(view(store)))


USES = {
    "get": lambda store: store.get(b"a"),
    "[]": lambda store: store[b"a"],
    "in": lambda store: b"a" in store,
    "exists": lambda store: store.exists(b"a"),
    "exists, flush": lambda store: store.exists(b"a", flush=True),
    "get_many": lambda store: store.get_many([b"a"]),
    "get_many of none": lambda store: store.get_many([]),
    "len": len,
    "bool": bool,
    "iter": lambda store: next(iter(store)),
    "reversed": lambda store: next(reversed(store)),
    "keys": iterate(lambda store: store.keys(b"a")),
    "values": iterate(lambda store: store.values()),
    "items": iterate(lambda store: store.items()),
    "len of a view": lambda store: len(store.keys(b"a")),
    "in a view": lambda store: b"a" in store.keys(),  # noqa: SIM118
    "==": lambda store: store == {b"a": 1},
    "snapshot": lambda store: store.snapshot().__enter__(),
    "pickle": pickle.dumps,
}
WRITES = {
    "put": lambda store: store.put(b"a", 1),
    "[]=": lambda store: store.__setitem__(b"a", 1),
    "put_many": lambda store: store.put_many({b"a": 1}),
    "put_many of none": lambda store: store.put_many({}),
    "delete": lambda store: store.delete(b"a"),
    "del": lambda store: store.__delitem__(b"a"),
    "delete_many": lambda store: store.delete_many([b"a"]),
    "delete_many of a range": lambda store: store.delete_many(store.keys(b"a")),
    "clear": lambda store: store.clear(),
    "pop": lambda store: store.pop(b"a"),
    "pop, missing": lambda store: store.pop(b"missing", 1),
    "popitem": lambda store: store.popitem(),
    "setdefault": lambda store: store.setdefault(b"a", 1),
    "setdefault, missing": lambda store: store.setdefault(b"missing", 1),
    "update": lambda store: store.update({b"a": 1}),
    "|=": lambda store: store.__ior__({b"a": 1}),
    "transaction": lambda store: store.transaction().__enter__(),
    "edit": lambda store: store.edit(b"a", []).__enter__(),
    "flush": lambda store: store.flush(),
}


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("use", {**USES, **WRITES})
def test_a_closed_store_says_so_while_others_go_on(open_store, use, readonly):
    other, store = open_store(), open_store(readonly=readonly)
    other.put_many({b"a": 1})
    store.close(strict=True)
    other[b"b"] = 2
    with pytest.raises(ClosedError, match=r"db' is closed\.$"):
        {**USES, **WRITES}[use](store)
    assert store.closed
    assert "closed" in repr(store)
    assert store.write_buffer == {}
    assert (dict(other), other.closed) == ({b"a": 1, b"b": 2}, False)
    other[b"c"] = 3
    store.close(strict=True)
    assert other.write_buffer.keys() == {b"c"}


def test_a_closed_store_changes_nothing_for_the_others(open_store):
    store, other = open_store(), open_store()
    store.close()
    with suppress(ClosedError):
        store.max_map_size = 20 * MIB
    with suppress(ClosedError):
        store.timeout = 1.0
    assert (other.max_map_size, other.timeout) == (None, 60.0)


@ENGINES
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda store: store.keys(),
        lambda store: store.values(),
        lambda store: store.items(b"key"),
    ],
)
def test_iterators_end_with_their_own_store(
    open_store, in_thread, lib_version, view, readonly, pending
):
    other = open_store(lib_version=lib_version, autoflush_on_read=False)
    store = open_store(readonly=readonly, autoflush_on_read=False)
    entries = {b"key %03d" % n: n for n in range(100)}
    other.put_many({**entries, b"key large": LARGE})
    if pending:
        other.update(entries)
    views = view(store), view(other)
    expected = list(views[1])
    loops = [iter(views[0]), reversed(views[0]), iter(views[1]), reversed(views[1])]
    begun = [next(loop) for loop in loops]
    in_thread(store.close).result()
    for loop in loops[:2]:
        with pytest.raises(ClosedError):
            next(loop)
    with pytest.raises(ClosedError):
        list(views[0])
    assert [begun[2], *loops[2]] == expected
    assert [begun[3], *loops[3]] == expected[::-1]
    assert list(views[1]) == expected


@pytest.mark.parametrize("of_another_thread", [False, True])
def test_snapshots_end_with_their_own_store(open_store, in_thread, of_another_thread):
    store, other = open_store(), open_store()
    store.put_many({b"a": 1, b"b": 2, b"large": LARGE})
    with store.snapshot() as snapshot, other.snapshot() as another:
        loop = iter(snapshot)
        assert (next(loop), snapshot[b"a"], another[b"a"]) == (b"a", 1, 1)
        (in_thread(store.close).result if of_another_thread else store.close)()
        assert (snapshot.closed, another.closed) == (True, False)
        for read in (next, list):
            with pytest.raises(ClosedError, match=r"store at .*db' is closed"):
                read(loop if read is next else snapshot)
        with pytest.raises(ClosedError):
            snapshot[b"large"]
        other.put_many({b"a": 2})
        assert (another[b"a"], another[b"large"], len(another)) == (1, LARGE, 3)
    assert other[b"a"] == 2


def test_growth_waits_no_more_for_snapshots_of_a_closed_store(open_store):
    store, other = open_store(map_size=MIB), open_store(timeout=0)
    with store.snapshot():
        store.close()
        other.put_many(TOO_MUCH)
    assert len(other) == len(TOO_MUCH)


# Options that don't go together


def values(name, has, wanted, **options):
    """Return the options of a first and a second store, which differ in one."""
    return name, {**options, name: has}, {**options, name: wanted}


@pytest.mark.parametrize(
    ("name", "has", "wanted"),
    [
        values("sync", False, True),
        values("sync", True, False),
        values("metasync", True, False),
        values("metasync", False, True),
        values("map_async", True, False),
        values("map_async", False, True),
        values("writemap", False, True, lib_version=0),
        values("writemap", True, False, lib_version=0),
        values("max_dbs", 1, 2),
        values("max_readers", 10, 11),
        values("readahead", True, False),
        values("meminit", True, False),
        values("lib_version", 0, 1),
        values("lib_version", 1, 0),
        values("lock", False, True, readonly=True),
        values("lock", True, False, readonly=True),
    ],
)
def test_a_conflict_names_what_differs_and_leaves_nothing(
    open_store, tmp_path, name, has, wanted
):
    lib_version = has.get("lib_version", 0)
    with open_store(lib_version=lib_version) as store:
        store[b"a"] = 1
    first = open_store(**has)
    env = first.env
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=rf"\b{name}={has[name]!r}") as info:
            LmdbObjectStore(tmp_path / "db", **wanted)
        message = str(info.value)
        del info
        gc.collect(1)
    assert not caught
    assert f" {name}={wanted[name]!r} " in message
    assert str(tmp_path / "db") in message
    assert "close the other stores first" in message
    assert first[b"a"] == 1
    first.close()
    assert not is_open(env)
    if name != "lib_version":
        assert open_store(**wanted)[b"a"] == 1


@pytest.mark.parametrize(
    ("name", "has"),
    [
        ("sync", {"sync": False}),
        ("metasync", {"metasync": False}),
        ("map_async", {"map_async": True}),
    ],
)
def test_who_asks_for_nothing_is_promised_that_writes_are_durable(
    open_store, name, has
):
    first = open_store(**has)
    with pytest.raises(ValueError, match=rf"\b{name}="):
        open_store()
    reader = open_store(readonly=True)
    first[b"a"] = 1
    assert reader[b"a"] == 1
    assert open_store(**has)[b"a"] == 1


def test_who_asks_for_nothing_is_promised_that_reads_are_safe(open_store):
    open_store().close()
    open_store(readonly=True, lock=False)
    with pytest.raises(ValueError, match=r"\block=False"):
        open_store(readonly=True)
    assert not open_store(readonly=True, lock=False)


@pytest.mark.parametrize(
    ("has", "wanted"),
    [
        ({"max_dbs": 3, "max_readers": 20}, {}),
        ({"readahead": False, "meminit": False}, {}),
        ({"writemap": True, "lib_version": 0}, {}),
        ({"lib_version": 1}, {}),
        ({"lib_version": 1}, {"lib_version": -1}),
        ({"lib_version": 1}, {"lib_version": 1}),
        ({}, {"sync": True, "metasync": True, "map_async": False, "lock": True}),
        ({}, {"max_dbs": 0, "max_readers": 126, "writemap": False}),
        ({}, {"readonly": True}),
        ({}, {"create": False}),
        ({"create": True}, {"mode": 0o600, "max_spare_txns": 0}),
        ({}, {"map_size": MIB, "subdir": True}),
        ({"map_size": MIB}, {"map_size": 2 * MIB}),
    ],
)
def test_what_is_not_asked_for_is_no_conflict(open_store, has, wanted):
    first, second = open_store(**has), open_store(**wanted)
    first[b"a"] = 1
    assert second[b"a"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"key_encoding": "no-such-codec"},
        {"timeout": -1},
        {"max_map_size": 1, "map_size": 2},
        {"max_spare_txns": 1},
        {"map_size": "big"},
        {"map_size": None},
        {"max_dbs": "many"},
        {"no_such_option": 1},
        {"lock": False},
    ],
    ids=str,
)
def test_a_bad_option_leaves_the_other_stores_alone(open_store, tmp_path, options):
    store = open_store()
    env = store.env
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises((ValueError, TypeError)) as info:
            LmdbObjectStore(tmp_path / "db", **options)
        del info
        gc.collect(1)
    assert not caught
    assert (store.max_map_size, store.timeout) == (None, 60.0)
    store[b"a"] = 1
    store.close(strict=True)
    assert not is_open(env)


# Read-only


REFUSED = [name for name in WRITES if name != "flush"]


@pytest.mark.parametrize("use", REFUSED)
def test_a_read_only_store_refuses_what_others_may(open_store, use):
    writer = open_store()
    reader = open_store(readonly=True)
    writer.put_many({b"a": [1]})
    writer[b"b"] = 2
    with pytest.raises(ReadOnlyError, match="readonly=True"):
        WRITES[use](reader)
    assert writer.write_buffer.keys() == {b"b"}
    with writer.transaction(), pytest.raises(ReadOnlyError):
        WRITES[use](reader)
    assert dict(writer) == dict(reader) == {b"a": [1], b"b": 2}
    writer[b"c"] = 3
    reader.close(strict=True)
    writer[b"d"] = 4
    assert len(writer) == 4


@pytest.mark.parametrize("use", REFUSED)
def test_two_read_only_stores_share_as_well(open_store, use):
    open_store().close()
    first, second = open_store(readonly=True), open_store(readonly=True)
    assert first.env is second.env
    first.close()
    with pytest.raises(ReadOnlyError):
        WRITES[use](second)


def test_a_read_only_store_that_is_the_last_writes_what_others_left(open_store):
    writer = open_store(max_map_size=MIB)
    reader = open_store(readonly=True)
    overfill(writer)
    writer.close()
    assert reader.get_many(TOO_MUCH)[0] == TOO_MUCH
    reader.max_map_size = None
    reader.close(strict=True)
    assert dict(open_store()) == TOO_MUCH


# What belongs to the environment


def map_size(store):
    return store.env.info()["map_size"]


@pytest.mark.parametrize("order", [(MIB, 200 * MIB), (200 * MIB, MIB)])
def test_the_largest_map_size_counts_when_the_map_grows(open_store, order):
    open_store().close()
    small = open_store(map_size=MIB)
    size = map_size(small)
    for wanted in order:
        open_store(map_size=wanted)
    assert map_size(small) == size  # which moves the map for nobody
    small.put_many({b"large": bytes(size)})
    assert 200 * MIB <= map_size(small) < 201 * MIB


def test_the_map_grows_to_a_larger_map_size_within_the_cap(open_store):
    store = open_store(map_size=MIB, max_map_size=8 * MIB)
    open_store(map_size=200 * MIB)
    assert store.max_map_size == 8 * MIB
    store.put_many(TOO_MUCH)
    assert map_size(store) == 8 * MIB


def test_cap_and_timeout_are_the_same_for_all(open_store):
    first = open_store(max_map_size=16 * MIB, timeout=5)
    second = open_store()
    assert (second.max_map_size, second.timeout) == (16 * MIB, 5)
    third = open_store(max_map_size=20 * MIB, timeout=7)
    for store in first, second, third:
        assert (store.max_map_size, store.timeout) == (20 * MIB, 7)
    second.max_map_size = None
    second.timeout = 9
    assert (first.max_map_size, first.timeout) == (None, 9)
    third.close()
    assert (first.max_map_size, first.timeout) == (None, 9)


def test_a_cap_limits_the_writes_of_all(open_store):
    first = open_store(map_size=4 * MIB)
    second = open_store(max_map_size=MIB, map_size=MIB, timeout=0)
    first.max_map_size = map_size(first)
    with pytest.raises(GrowthError):
        second.put_many({b"large": bytes(map_size(first))})


# Closing one of several


@ENGINES
@pytest.mark.parametrize("sync", [True, False])
def test_each_close_flushes_and_syncs(open_store, in_thread, lib_version, sync):
    stores = [open_store(lib_version=lib_version, sync=sync) for _ in range(3)]
    env = stores[0].env
    for number, store in enumerate(stores):
        stores[-1][b"%d" % number] = number
        calls = calls_of(in_thread, store.close)
        last = store is stores[-1]
        # A commit is durable by itself, unless the store was opened with sync=False.
        assert calls == ["sync"] * (not sync) + ["close"] * last
        if not last:
            assert stores[-1].write_buffer == {}
            assert env.stat()["entries"] == number + 1
    assert not is_open(env)


def close(store):
    store.close()


def close_strictly(store):
    with pytest.raises(LostWritesError, match="Final flush failed"):
        store.close(strict=True)


def leave_a_block(store):
    with pytest.raises(LostWritesError, match="Final flush failed"), store:
        pass


@pytest.mark.parametrize("close_it", [close, close_strictly, leave_a_block])
def test_what_one_store_could_not_flush_is_kept_for_the_others(
    open_store, caplog, close_it
):
    store, other = open_store(max_map_size=MIB), open_store()
    store.put_many({b"flushed": 0})
    overfill(store)
    close_it(store)
    assert store.closed
    [record] = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert f"{len(TOO_MUCH)} pending writes are kept" in record.getMessage()
    assert isinstance(record.exc_info[1], lmdb.MapFullError)
    assert store.write_buffer.keys() == TOO_MUCH.keys()
    assert other.get_many(TOO_MUCH)[0] == TOO_MUCH
    other.max_map_size = None
    other.close(strict=True)
    assert dict(open_store()) == {b"flushed": 0, **TOO_MUCH}


def test_what_all_stores_could_not_flush_is_lost_with_the_last(open_store, caplog):
    store, other = open_store(max_map_size=MIB), open_store()
    overfill(store)
    store.close()
    caplog.clear()
    with pytest.raises(LostWritesError):
        other.close(strict=True)
    [record] = caplog.records
    assert f"{len(TOO_MUCH)} pending writes are lost" in record.getMessage()
    assert other.write_buffer.keys() == TOO_MUCH.keys()
    assert dict(open_store()) == {}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("closed", [None, 0, 1, 2])
@pytest.mark.parametrize("cycle", [False, True])
def test_stores_may_be_dropped_in_any_order(tmp_path, open_store, order, closed, cycle):
    stores = {n: [LmdbObjectStore(tmp_path / "db")] for n in range(3)}
    env = stores[0][0].env
    for number in stores if cycle else ():
        stores[number].append(stores[number])
    for number in order:
        assert is_open(env)
        stores[number][0][b"%d" % number] = number
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if number == closed:
                stores[number][0].close()
            del stores[number]
            gc.collect()
        assert len(caught) == (number != closed)
        assert all(w.category is ResourceWarning for w in caught)
    assert not is_open(env)
    assert dict(open_store()) == {b"0": 0, b"1": 1, b"2": 2}


@UNCLOSED
def test_a_dropped_store_is_flushed_though_others_go_on(tmp_path, open_store):
    store = open_store()
    LmdbObjectStore(tmp_path / "db")[b"a"] = 1
    gc.collect()
    assert store.write_buffer == {}
    assert store.env.stat()["entries"] == 1


@UNCLOSED
def test_what_a_dropped_store_could_not_flush_is_kept_for_the_others(
    tmp_path, open_store
):
    store = open_store(max_map_size=MIB)
    overfill(LmdbObjectStore(tmp_path / "db"))
    assert store.get_many(TOO_MUCH)[0] == TOO_MUCH
    store.max_map_size = None
    store.close(strict=True)
    assert len(open_store()) == len(TOO_MUCH)


@UNCLOSED
def test_a_view_an_iterator_or_a_snapshot_keeps_its_store(tmp_path, open_store):
    def make():
        return LmdbObjectStore(tmp_path / "db")

    with open_store() as store:
        store.put_many({b"%03d" % n: n for n in range(100)})
        env = store.env
        view, loop, block = make().keys(), iter(make()), make().snapshot()
        snapshot = block.__enter__()
        next(loop)
        gc.collect(1)
    assert (len(view), len(list(loop)), len(snapshot)) == (100, 99, 100)
    block.__exit__(None, None, None)
    del view, loop, snapshot
    assert is_open(env)
    del block
    gc.collect()
    assert not is_open(env)


# Threads


@ENGINES
@pytest.mark.parametrize("end", ["close", "drop", "both"])
@UNCLOSED
def test_threads_open_and_close_the_same_file(
    hasty, tmp_path, open_store, lib_version, end
):
    rounds = 40

    def work(name):
        for number in range(rounds):
            store = LmdbObjectStore(tmp_path / "db", lib_version=lib_version)
            store[b"%s %d" % (name, number)] = number
            if number:
                assert store[b"%s %d" % (name, number - 1)] == number - 1
            if end == "close" or (end == "both" and number % 2):
                store.close(strict=True)
            del store

    names = [b"a", b"b", b"c", b"d"]
    run_all(*(partial(work, name) for name in names))
    with open_store() as store:
        assert len(store) == len(names) * rounds
        env = store.env
    assert not is_open(env)


def test_threads_open_and_close_while_one_store_goes_on(hasty, tmp_path, open_store):
    lasting = open_store(batch_size=7)
    over = []

    def come_and_go():
        number = 0
        while not over:
            number += 1
            with LmdbObjectStore(tmp_path / "db", readonly=number % 3 == 0) as store:
                assert store.get(b"constant") == 1
                if number % 3:
                    store[b"come %d" % (number % 50)] = number
                assert all(isinstance(value, int) for value in store.values())

    def go_on():
        try:
            for number in range(600):
                lasting[b"go on %d" % number] = number
                assert lasting[b"go on %d" % (number // 2)] == number // 2
        finally:
            over.append(True)

    lasting[b"constant"] = 1
    run_all(come_and_go, come_and_go, go_on)
    assert len(lasting.keys(b"go on")) == 600


@ENGINES
@pytest.mark.parametrize("method", ["putmulti", "sync", "close"])
def test_opening_waits_for_the_end_of_a_last_close(
    open_store, in_thread, lib_version, method
):
    store = open_store(lib_version=lib_version, sync=False)
    store.put_many({b"a": 1})
    store[b"pending"] = 2
    old = store.env
    with Parked(in_thread, method, store.close) as closing:
        opening = [in_thread(lambda: open_store(sync=False)) for _ in range(2)]
        for thread in opening:
            thread.wait_until_in("__init__")
            assert thread.running
        closing.release()
        new, other = (thread.result() for thread in opening)
    assert store.closed
    assert not is_open(old)
    assert dict(new) == dict(other) == {b"a": 1, b"pending": 2}
    new[b"b"] = 3
    new.close(strict=True)


@pytest.mark.parametrize("method", ["putmulti", "sync"])
def test_opening_waits_for_no_close_of_another_store(open_store, in_thread, method):
    store, other = open_store(sync=False), open_store(sync=False)
    store[b"a"] = 1
    with Parked(in_thread, method, store.close) as closing:
        third = open_store(sync=False)
        assert third.env is other.env
        assert third.get(b"a") == 1
        third[b"b"] = 2
        last = [in_thread(other.close), in_thread(third.close)]
        closing.release()
        for thread in last:
            thread.result()
    assert dict(open_store()) == {b"a": 1, b"b": 2}


def test_a_file_that_two_threads_open_at_once_is_opened_once(open_store, in_thread):
    with Parked(in_thread, "reader_check", open_store) as opening:
        second = in_thread(open_store)
        second.wait_until_in("__init__")
        third = in_thread(lambda: open_store("other"))
        assert second.running
        stores = [opening.release(), second.result()]
        third.result()[b"a"] = 2
    assert stores[0].env is stores[1].env
    stores[0][b"a"] = 1
    stores[0].close()
    assert stores[1][b"a"] == 1


@UNCLOSED
@pytest.mark.parametrize("method", ["putmulti", "sync", "close"])
def test_a_store_that_is_being_closed_can_be_dropped_meanwhile(
    tmp_path, open_store, in_thread, method
):
    store = LmdbObjectStore(tmp_path / "db", sync=False)
    store[b"a"] = 1
    env = store.env
    with Parked(in_thread, method, store.close) as closing:
        del store
        gc.collect(1)
        closing.release()
    del closing
    assert not is_open(env)
    assert open_store()[b"a"] == 1


# Code that runs inside other operations


class Inside:
    """Pickling and unpickling it call `action`."""

    action = staticmethod(lambda: None)

    def __init__(self, ballast=b""):
        self.ballast = ballast

    def __getstate__(self):
        Inside.action()
        return {"ballast": self.ballast}

    def __setstate__(self, state):
        Inside.action()
        self.__dict__.update(state)


@pytest.fixture
def inside(monkeypatch):
    return lambda action: monkeypatch.setattr(Inside, "action", staticmethod(action))


OPERATIONS = {
    "put": lambda store: store.put(b"new", Inside()),
    "put a batch": lambda store: store.put_many({b"new": Inside()}),
    "get": lambda store: store.get(b"inside"),
    "get large": lambda store: store.get(b"large"),
    "get pending": lambda store: store.get(b"pending"),
    "get_many": lambda store: store.get_many([b"a", b"inside", b"large"]),
    "items": lambda store: list(store.items()),
    "pop": lambda store: store.pop(b"inside"),
}


def prepare(store):
    store.put_many({b"a": 1, b"inside": Inside(), b"large": Inside(LARGE)})
    store[b"pending"] = Inside()


@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
@UNCLOSED
def test_stores_are_opened_and_dropped_in_the_midst_of_an_operation(
    open_store, tmp_path, inside, operation, lasts
):
    store = open_store(batch_size=100)
    prepare(store)
    opened = []

    def action():
        other = LmdbObjectStore(tmp_path / "db")
        opened.append(other if lasts else None)
        other[b"by the other"] = len(opened)
        assert other[b"a"] == 1
        LmdbObjectStore(tmp_path / "another")[b"b"] = 2

    inside(action)
    OPERATIONS[operation](store)
    inside(lambda: None)
    assert opened
    assert store[b"by the other"] == len(opened)
    env = store.env
    store.close(strict=True)
    assert is_open(env) == lasts
    opened.clear()
    gc.collect()
    assert not is_open(env)
    with open_store("another") as another:
        assert another[b"b"] == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_stores_are_closed_in_the_midst_of_an_operation_or_busy(
    open_store, inside, operation
):
    store = open_store()
    prepare(store)
    others = [open_store() for _ in range(20)]
    env = store.env

    def action():
        with suppress(BusyError):
            others[-1].close()
            others.pop()

    inside(action)
    OPERATIONS[operation](store)
    inside(lambda: None)
    for other in [*others, store]:
        assert is_open(env)
        other.close(strict=True)
        assert other.closed
    assert not is_open(env)
    assert open_store()[b"a"] == 1


@pytest.mark.parametrize("method", ["putmulti", "sync", "close", "reader_check"])
@UNCLOSED
def test_a_finalizer_opens_and_drops_stores_in_the_midst_of_opening_and_closing(
    tmp_path, open_store, in_thread, method
):
    open_store("closed").close()

    def inside():
        other = LmdbObjectStore(tmp_path / "closed")
        other[b"a"] = 1
        del other
        with suppress(BusyError):
            LmdbObjectStore(tmp_path / "db")[b"b"] = 2

    def open_and_close():
        with LmdbObjectStore(tmp_path / "db", timeout=PATIENCE) as store:
            store[b"a"] = 1

    hooked(in_thread, method, inside, open_and_close)
    gc.collect()
    with open_store("closed", max_dbs=1) as store:
        assert store[b"a"] == 1
    with open_store(max_dbs=1) as store:
        assert store[b"a"] == 1


@pytest.mark.parametrize("method", ["putmulti", "sync"])
@UNCLOSED
def test_the_last_store_is_dropped_in_the_midst_of_closing_another(
    tmp_path, open_store, in_thread, method
):
    store, holder = (
        open_store(sync=False),
        [LmdbObjectStore(tmp_path / "db", sync=False)],
    )
    store[b"a"] = 1
    env = store.env
    hooked(in_thread, method, holder.clear, store.close)
    gc.collect()
    assert store.closed
    assert not is_open(env)
    assert open_store(max_dbs=1)[b"a"] == 1


@UNCLOSED
def test_the_last_store_is_dropped_where_the_one_before_is_dropped(tmp_path):
    stores = [[LmdbObjectStore(tmp_path / "db")] for _ in range(2)]
    stores[0][0][b"a"] = 1
    env = stores[0][0].env
    with at_call("commit", stores[1].clear):  # as the first one is flushed
        stores[0].clear()
    assert not is_open(env)
    with LmdbObjectStore(tmp_path / "db", max_dbs=1) as store:
        assert store[b"a"] == 1


def test_opening_inside_the_opening_of_the_same_file(open_store):
    with at_call("sync", open_store) as results:
        open_store()[b"a"] = 1
    assert results == [BusyError]
    with at_call("reader_check", lambda: open_store("other")[b"a"]) as results:
        open_store("third")
    assert results == [KeyError]


def test_opening_while_a_close_does_not_end(open_store, in_thread):
    store = open_store(sync=False)
    store[b"a"] = 1
    with Parked(in_thread, "sync", store.close) as closing:
        with pytest.raises(BusyError, match="middle of being closed"):
            open_store(timeout=0, sync=False)
        closing.release()
    with open_store() as again:
        assert again[b"a"] == 1


def test_a_store_that_a_read_keeps_from_closing_stays_open(open_store, in_thread):
    store = open_store(timeout=0)
    store.put_many({b"a": 1})
    with Parked(in_thread, "get", lambda: store.get(b"a")) as parked:
        with pytest.raises(BusyError, match="read in progress"):
            store.close()
        assert not store.closed
        store[b"b"] = 2
        assert store.write_buffer
        with open_store() as other:
            assert other[b"b"] == 2
        assert parked.release() == 1
    store.close(strict=True)
    with open_store(max_dbs=1) as again:
        assert dict(again) == {b"a": 1, b"b": 2}


def test_opening_while_a_close_gives_up(open_store, in_thread):
    store = open_store(timeout=0, sync=False)
    store.put_many({b"a": 1})
    with (
        Parked(in_thread, "get", lambda: store.get(b"a")) as reading,
        Parked(in_thread, "sync", store.close) as closing,
    ):
        opening = in_thread(lambda: open_store(sync=False))
        opening.wait_until_in(WAITS_FOR_CLOSE)
        with pytest.raises(BusyError, match="read in progress"):
            closing.release()
        other = opening.result()  # long before its own timeout is over
        assert reading.release() == 1
    assert other.env is store.env
    store.close(strict=True)
    assert other[b"a"] == 1


def test_a_file_system_that_gives_no_numbers(open_store, monkeypatch, tmp_path):
    real = os.stat

    def stat(*args, **kwargs):
        result = list(real(*args, **kwargs))
        result[1] = 0  # st_ino
        return os.stat_result(result)

    monkeypatch.setattr(os, "stat", stat)
    store = open_store()
    store[b"a"] = 1
    os.symlink(tmp_path / "db", tmp_path / "link")
    assert open_store("link")[b"a"] == 1
    assert open_store("other").get(b"a") is None


# Signals


def check(tmp_path):
    """Nobody is locked out, and nothing is left open. To be called in a thread."""
    for options in {"max_dbs": 1}, {"max_dbs": 2}:  # refused while it is open
        with LmdbObjectStore(tmp_path / "db", timeout=0, **options) as store:
            store.put_many({b"checked": 1})
            store[b"checked"] = 2


@UNCLOSED
def test_opening_a_further_store_may_be_interrupted_at_every_moment(
    tmp_path, in_thread
):
    first = LmdbObjectStore(tmp_path / "db", sync=False)
    first[b"a"] = 1
    env = first.env
    interrupted = 0

    def open_second(_):
        return LmdbObjectStore(tmp_path / "db", sync=False, map_size=MIB)

    for _, result in every_step(lambda: None, open_second):
        if isinstance(result, KeyboardInterrupt):
            interrupted += 1
            result.__traceback__ = None
        else:
            assert result[b"a"] == 1
            result.close()
        assert in_thread(lambda: first[b"a"]).result() == 1
    assert interrupted > part_of(100)
    del result
    gc.collect()
    first.close(strict=True)
    assert not is_open(env)
    in_thread(lambda: check(tmp_path)).result()


@UNCLOSED
def test_opening_the_first_store_interrupted_holds_nobody_to_its_options(tmp_path):
    path = tmp_path / "db"
    with LmdbObjectStore(path) as store:
        store[b"a"] = 1
    interrupted = 0
    action = partial(LmdbObjectStore, path)
    for _, result in every_step(lambda: None, lambda _: action(max_dbs=1)):
        if isinstance(result, KeyboardInterrupt):
            interrupted += 1
            result.__traceback__ = None
        else:
            result.close()
        del result
        gc.collect(1)
        with LmdbObjectStore(path, max_dbs=2, readonly=True) as store:
            assert store[b"a"] == 1
    assert interrupted > part_of(100)


@UNCLOSED
@pytest.mark.parametrize("then", ["close", "drop"])
def test_closing_one_of_two_may_be_interrupted_at_every_moment(
    tmp_path, in_thread, then
):
    other = LmdbObjectStore(tmp_path / "db", sync=False)
    env = other.env
    interrupted = 0

    def open_one():
        store = LmdbObjectStore(tmp_path / "db", sync=False)
        store[b"count"] = other.get(b"count", 0) + 1
        return [store]

    for expected, (holder, result) in enumerate(
        every_step(open_one, lambda holder: holder[0].close()), 1
    ):
        assert isinstance(result, KeyboardInterrupt | None)
        if result is not None:
            interrupted += 1
            result.__traceback__ = None
        if then == "close":
            holder[0].close(strict=True)
            assert holder[0].closed
        holder.clear()
        gc.collect(1)
        assert in_thread(lambda: other[b"count"]).result() == expected
    assert interrupted > part_of(100)
    other.close(strict=True)
    assert not is_open(env)
    in_thread(lambda: check(tmp_path)).result()


@UNCLOSED
@pytest.mark.parametrize("then", ["close", "drop"])
def test_a_last_close_may_be_interrupted_at_every_moment(tmp_path, in_thread, then):
    numbers = count(1)
    interrupted = 0

    def open_one():
        store = LmdbObjectStore(tmp_path / "db", sync=False, timeout=0)
        store[b"count"] = next(numbers)
        return [store]

    for expected, (holder, result) in enumerate(
        every_step(open_one, lambda holder: holder[0].close()), 1
    ):
        assert isinstance(result, KeyboardInterrupt | None)
        if result is not None:
            interrupted += 1
            result.__traceback__ = None
        if then == "close":
            holder[0].close(strict=True)
            assert holder[0].closed
        holder.clear()
        gc.collect(1)
        with LmdbObjectStore(tmp_path / "db", readonly=True, max_dbs=1) as again:
            assert again[b"count"] == expected
    assert interrupted > part_of(100)
    in_thread(lambda: check(tmp_path)).result()


@UNCLOSED
@pytest.mark.parametrize("last", [False, True])
def test_a_signal_handler_opens_a_store_while_one_is_closed(
    open_store, tmp_path, in_thread, last
):
    opened, refused = [], 0
    numbers = count(1)

    def open_one():
        nonlocal refused
        try:
            store = LmdbObjectStore(tmp_path / "db", sync=False)
        except BusyError:
            refused += 1
        else:
            opened.append(store)
            store[b"opened"] = 1

    def prepare():
        store = LmdbObjectStore(tmp_path / "db", sync=False)
        store[b"count"] = next(numbers)
        return store, None if last else LmdbObjectStore(tmp_path / "db", sync=False)

    with handling(open_one):
        for (store, other), result in every_step(prepare, lambda two: two[0].close()):
            assert result is None
            assert store.closed
            left = [one for one in (*opened, other) if one is not None]
            opened.clear()
            for one in left:
                assert one[b"count"] >= 1
                one.close(strict=True)
            left.clear()
    assert bool(refused) == last
    in_thread(lambda: check(tmp_path)).result()
    assert open_store()[b"opened"] == 1


@UNCLOSED
@pytest.mark.parametrize(
    "operation",
    [
        lambda store: store.put_many({b"b": 2}),
        lambda store: store[b"a"],
        lambda store: list(store.items()),
        lambda store: store.__delitem__(b"c"),
    ],
    ids=["put_many", "get", "items", "del"],
)
def test_a_signal_handler_opens_and_drops_stores_at_every_moment(
    open_store, tmp_path, in_thread, operation
):
    store = open_store(sync=False)
    opened = 0

    def open_and_drop():
        nonlocal opened
        other = LmdbObjectStore(tmp_path / "db", sync=False)
        assert other[b"a"] == 1
        other[b"other"] = opened = opened + 1

    def prepare():
        store[b"a"] = store[b"c"] = 1

    with handling(open_and_drop):
        for _, result in every_step(prepare, lambda _: operation(store)):
            assert not isinstance(result, BaseException)
    assert opened > part_of(20)
    assert store[b"other"] == opened
    env = store.env
    in_thread(store.close).result()
    assert not is_open(env)
    in_thread(lambda: check(tmp_path)).result()


@UNCLOSED
def test_the_last_store_is_dropped_at_any_moment_of_closing_another(
    tmp_path, in_thread
):
    holder = []

    def prepare():
        store = LmdbObjectStore(tmp_path / "db", sync=False)
        store[b"a"] = 1
        holder.append(LmdbObjectStore(tmp_path / "db", sync=False))
        return store

    with handling(holder.clear):
        for store, result in every_step(prepare, LmdbObjectStore.close):
            assert result is None
            assert store.closed
            holder.clear()
            with LmdbObjectStore(tmp_path / "db", readonly=True, max_dbs=1) as again:
                assert again[b"a"] == 1
    in_thread(lambda: check(tmp_path)).result()


def test_a_file_is_opened_for_writing_while_the_last_reader_closes(
    tmp_path, open_store, in_thread
):
    open_store(sync=False).close()
    openings = []

    def open_elsewhere():
        worker = in_thread(lambda: LmdbObjectStore(tmp_path / "db", sync=False))
        openings.append(worker)
        waits = {WAITS_FOR_LOCK, WAITS_FOR_CLOSE}
        eventually(lambda: not worker.running or waits & set(worker.functions()))

    prepare = partial(LmdbObjectStore, tmp_path / "db", readonly=True)
    with handling(open_elsewhere):
        for _, result in every_step(prepare, LmdbObjectStore.close):
            assert result is None
            for opening in openings:
                with opening.result() as store:
                    store[b"a"] = 1
                assert store.closed
            openings.clear()
    in_thread(lambda: check(tmp_path)).result()


@UNCLOSED
def test_another_store_is_opened_at_any_moment_of_dropping_the_last(
    tmp_path, in_thread
):
    opened = []

    def open_another():
        with suppress(BusyError):
            opened.append(LmdbObjectStore(tmp_path / "db", sync=False, timeout=0))

    def prepare():
        store = LmdbObjectStore(tmp_path / "db", sync=False)
        store[b"a"] = 1
        return [store]

    shared = 0
    with handling(open_another):
        for _, result in every_step(prepare, list.clear):
            assert result is None
            for store in opened:
                shared += 1
                env = store.env
                store.close(strict=True)
                assert not is_open(env)
            opened.clear()
    assert shared > part_of(20)
    in_thread(lambda: check(tmp_path)).result()


# Processes

COUNT = """
import sys, threading
from lmdb_object_store import LmdbObjectStore
lib_version = int(sys.argv[1])

def count(name):
    for number in range(15):
        with LmdbObjectStore("db", lib_version=lib_version, sync=False) as store:
            with store.transaction():
                store[b"count"] = store.get(b"count", 0) + 1
            store[name + b"%d" % number] = number

print("ready", flush=True)
sys.stdin.readline()
names = [sys.argv[2].encode() + b" %d " % n for n in range(2)]
threads = [threading.Thread(target=count, args=(name,)) for name in names]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

TWO = """
import subprocess, sys
command = [sys.executable, "-W", "error", "-c", sys.argv[1], sys.argv[2]]
pipe = subprocess.PIPE
both = [
    subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True)
    for name in ("first", "second")
]
for one in both:
    assert one.stdout.readline() == "ready\\n"
for one in both:
    one.stdin.write("go\\n")
    one.stdin.flush()
for one in both:
    assert one.wait(30) == 0
"""


@ENGINES
def test_two_processes_open_and_close_the_same_file(run, open_store, lib_version):
    with open_store(lib_version=lib_version, sync=False) as lasting:
        with open_store(lib_version=lib_version, sync=False):
            pass
        run(TWO, COUNT, lib_version)
        assert lasting[b"count"] == 60
        assert len(lasting) == 61


@ENGINES
def test_a_store_that_is_closed_takes_no_locks_from_the_others(
    run, open_store, lib_version
):
    # A process that closes a lock file loses all of its locks on it, so another
    # process would think that it is alone, and clear the table of readers.
    store = open_store(lib_version=lib_version)
    store.put_many({b"%d" % n: bytes(2000) for n in range(100)})
    with store.snapshot() as snapshot:
        open_store().close()
        open_store(readonly=True).close()
        run("""
from lmdb_object_store import LmdbObjectStore
for round in range(5):
    with LmdbObjectStore("db", sync=False) as store:
        store.put_many({b"%d" % n: bytes(2001) for n in range(100)})
""")
        assert set(map(len, snapshot.values())) == {2000}
    assert set(map(len, store.values())) == {2001}


def test_exit_flushes_what_any_store_has_put(run, stored):
    result = run("""
from lmdb_object_store import LmdbObjectStore
first, second = LmdbObjectStore("db"), LmdbObjectStore("db/data.mdb", subdir=False)
first[b"a"] = 1
second[b"b"] = 2
first.close()
second[b"c"] = 3
""")
    assert "was not closed" in result.stderr
    assert stored() == {"a": 1, "b": 2, "c": 3}


def test_exit_is_silent_when_all_stores_are_closed(run, stored):
    result = run("""
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db") as first, LmdbObjectStore("db") as second:
    first[b"a"] = 1
""")
    assert result.stderr == ""
    assert stored() == {"a": 1}
