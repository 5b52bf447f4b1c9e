"""Options: what the constructor checks and what it passes on to LMDB."""

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import lmdb
import pytest

from lmdb_object_store import (
    ClosedError,
    LmdbObjectStore,
    ReadOnlyError,
)
from moments import GETS_ONE, at_call

MIB = 2**20
ENGINES = pytest.mark.parametrize("lib_version", [0, 1])

BAD_OPTIONS = [
    *(
        ({name: value}, error)
        for name in ("batch_size", "batch_bytes", "max_map_size")
        for value, error in (
            (0, ValueError),
            (-1, ValueError),
            ("10", TypeError),
            (1.5, TypeError),
            (True, TypeError),
        )
    ),
    ({"batch_size": None}, TypeError),
    ({"batch_bytes": None}, TypeError),
    ({"map_size": MIB, "max_map_size": MIB - 1}, ValueError),
    ({"timeout": -0.1}, ValueError),
    ({"timeout": float("nan")}, ValueError),
    ({"timeout": "1"}, TypeError),
    ({"timeout": None}, TypeError),
    ({"timeout": True}, TypeError),
    ({"key_encoding": "no-such-codec"}, ValueError),
    ({"key_encoding": "rot13"}, ValueError),
    ({"key_encoding": "hex"}, ValueError),
    ({"key_encoding": 8}, TypeError),
    ({"key_encoding": b"utf-8"}, TypeError),
    ({"key_errors": "no-such-handler"}, ValueError),
    ({"key_errors": None}, TypeError),
    ({"key_errors": 1}, TypeError),
    ({"str_normalize": "nfc"}, ValueError),
    ({"str_normalize": ""}, ValueError),
    ({"str_normalize": 1}, (TypeError, ValueError)),
    ({"max_spare_txns": 1}, ValueError),
    ({"lock": False}, ValueError),
]
BAD_LMDB_OPTIONS = [
    ({"no_such_option": 1}, TypeError),
    ({"map_size": "big"}, TypeError),
    ({"lib_version": 7}, (lmdb.Error, ValueError)),
    ({"lib_version": 1, "writemap": True}, ValueError),
]


# The constructor


@pytest.mark.parametrize(("options", "error"), BAD_OPTIONS + BAD_LMDB_OPTIONS, ids=str)
def test_bad_option_is_refused_and_nothing_stays_open(open_store, options, error):
    with pytest.raises(error) as info:
        open_store(**options)
    # LMDB opens no file twice in one process, so this would raise, were it open.
    store = open_store()
    store[b"k"] = 1
    assert store[b"k"] == 1
    del info  # which kept alive, and so open, what had not been closed


def test_options_are_checked_before_anything_is_created(open_store, tmp_path):
    for options, error in BAD_OPTIONS:
        with pytest.raises(error):
            open_store(**options)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("db_path", [None, 5, object()])
def test_path_of_another_type_is_refused(db_path):
    with pytest.raises(TypeError):
        LmdbObjectStore(db_path)


def test_file_that_lmdb_can_not_open_is_refused(open_store, tmp_path):
    damaged = tmp_path / "db" / "data.mdb"
    damaged.parent.mkdir()
    damaged.write_bytes(b"no database" * 10_000)
    with pytest.raises(lmdb.Error):
        open_store()
    damaged.unlink()
    assert open_store().get(b"k") is None


def test_good_options_are_taken(open_store):
    open_store(
        batch_size=1,
        batch_bytes=1,
        max_map_size=MIB,
        map_size=MIB,
        timeout=0,
        key_encoding="UTF8",
        key_errors="surrogatepass",
        str_normalize="NFKD",
        max_spare_txns=0,
    )
    open_store("unhurried", timeout=float("inf"))[b"k"] = bytes(20 * MIB)


def test_batch_size_is_the_second_argument(tmp_path):
    with LmdbObjectStore(str(tmp_path), 7) as store:
        assert store.batch_size == 7


def test_map_starts_below_its_limit(open_store):
    assert open_store(max_map_size=MIB).env.info()["map_size"] == MIB


# Run-time setters


@pytest.mark.parametrize("name", ["batch_size", "batch_bytes", "max_map_size"])
def test_sizes_are_checked_at_run_time(open_store, name):
    store = open_store(max_map_size=2**30)
    before = getattr(store, name)
    for value, error in ((0, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match=name):
            setattr(store, name, value)
    assert getattr(store, name) == before
    setattr(store, name, 12345)
    assert getattr(store, name) == 12345


def test_limit_can_be_lifted_at_run_time(open_store):
    store = open_store(max_map_size=MIB)
    with pytest.raises(lmdb.MapFullError):
        store[b"k"] = bytes(2 * MIB)
    store.max_map_size = None
    assert store.max_map_size is None
    store[b"k"] = bytes(2 * MIB)
    store.flush()
    assert len(store[b"k"]) == 2 * MIB


def test_limit_below_the_map_leaves_the_map_as_it_is(open_store):
    store = open_store(map_size=4 * MIB)
    store.max_map_size = 2 * MIB
    store.put_many({b"%d" % number: bytes(MIB // 8) for number in range(24)})
    assert store.env.info()["map_size"] == 4 * MIB


def test_timeout_is_checked_at_run_time(open_store):
    store = open_store()
    for value, error in ((-1, ValueError), (None, TypeError)):
        with pytest.raises(error, match="timeout"):
            store.timeout = value
    assert store.timeout == 60
    store.timeout = 0.5
    assert store.timeout == 0.5


# Paths


@pytest.mark.parametrize("make", [str, Path])
def test_path_is_a_str_or_path_like(tmp_path, make):
    with LmdbObjectStore(make(tmp_path / "db")) as store:
        store[b"k"] = 1
        assert store.db_path == str(tmp_path / "db")
    assert (tmp_path / "db" / "data.mdb").exists()


def test_relative_path_stays_where_it_was_opened(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with LmdbObjectStore("db", map_size=64 * 1024) as store:
        monkeypatch.chdir("elsewhere")
        assert Path(store.db_path).samefile(tmp_path / "db")
        store[b"k"] = bytes(MIB)
    assert not any((tmp_path / "elsewhere").iterdir())
    with LmdbObjectStore(tmp_path / "db", create=False) as store:
        assert len(store[b"k"]) == MIB


# Options of lmdb.open


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"sync": True, "metasync": True, "map_async": False, "lock": True}),
        ({"sync": False}, {"sync": False}),
        ({"metasync": False}, {"metasync": False}),
        ({"writemap": True, "map_async": True}, {"writemap": True, "map_async": True}),
        ({"readahead": False}, {"readahead": False}),
        ({"meminit": False}, {"meminit": False}),
        ({"subdir": False}, {"subdir": False}),
    ],
    ids=str,
)
def test_flags_are_passed_on_and_the_store_works(open_store, options, flags):
    store = open_store(**options)
    assert flags.items() <= store.env.flags().items()
    store.put_many((b"%d" % n, bytes(5_000)) for n in range(100))
    store[b"50"] = bytes(200_000)
    store.close()
    store = open_store(**options)
    assert len(store[b"50"]) == 200_000
    assert store.env.stat()["entries"] == 100


@pytest.mark.skipif(sys.platform == "win32", reason="lmdb sets no mode on Windows")
def test_mode_is_passed_on(open_store, tmp_path):
    open_store(mode=0o600)
    assert (tmp_path / "db" / "data.mdb").stat().st_mode & 0o777 == 0o600


def test_create_false_needs_an_existing_file(open_store, tmp_path):
    with pytest.raises(lmdb.Error):
        open_store(create=False)
    assert not any(tmp_path.iterdir())


def test_named_databases_can_be_used_through_env(open_store):
    store = open_store(max_dbs=1)
    named = store.env.open_db(b"named")
    with store.env.begin(write=True) as txn:
        txn.put(b"k", b"v", db=named)
    store[b"k"] = 1
    store.flush()
    with store.env.begin() as txn:
        assert txn.get(b"k", db=named) == b"v"
    assert store[b"k"] == 1


@pytest.mark.parametrize("engine", [0, 1])
def test_both_engines_work(open_store, engine):
    values = {b"%04d" % n: list(range(n)) for n in range(0, 1000, 10)}
    values[b"large"] = bytes(MIB)
    options = {"lib_version": engine, "map_size": 256 * 1024}
    store = open_store(**options)
    store.put_many(values)
    store.delete(b"0000")
    store[b"0010"] = "new"
    store.close()
    store = open_store(**options)
    assert store.env.info()["map_size"] > MIB
    expected = {**values, b"0010": "new"}
    del expected[b"0000"]
    assert store.get_many(values) == (expected, [b"0000"])
    assert [store[b"large"] == bytes(MIB) for _ in range(2)] == [True, True]


def test_file_of_the_other_engine_is_refused_unharmed(open_store):
    with open_store(lib_version=1) as store:
        store[b"k"] = 1
    with pytest.raises(lmdb.Error):
        open_store(lib_version=0)
    assert open_store(lib_version=1)[b"k"] == 1


def test_without_subdir_the_path_is_the_file(open_store, tmp_path):
    with open_store("data", subdir=False, map_size=64 * 1024) as store:
        store[b"k"] = bytes(MIB)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data-lock"}
    assert open_store("data", subdir=False, readonly=True)[b"k"] == bytes(MIB)


def test_writemap_grows(open_store):
    with open_store(writemap=True, map_size=64 * 1024) as store:
        for n in range(40):
            store[b"%d" % n] = bytes([n]) * 100_000
            store.flush()
            assert store[b"0"] == bytes(100_000)
        store.put_many({b"batch": bytes(80 * MIB)})
    store = open_store(writemap=True)
    assert all(store[b"%d" % n] == bytes([n]) * 100_000 for n in range(40))
    assert len(store[b"batch"]) == 80 * MIB


def test_map_size_below_the_existing_file_is_enlarged(open_store):
    with open_store() as store:
        store[b"k"] = bytes(4 * MIB)
    store = open_store(map_size=64 * 1024)
    assert len(store[b"k"]) == 4 * MIB
    store[b"l"] = bytes(4 * MIB)
    store.flush()
    assert len(store[b"l"]) == 4 * MIB


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mapsize", "map_size"),
        ("read_only", "readonly"),
        ("key_enc", "key_encoding"),
        ("flush_intervall", "flush_interval"),
        ("batchsize", "batch_size"),
        ("maxreaders", "max_readers"),
        ("flag", "readonly=True"),
        ("writeback", r"edit\(\)"),
    ],
)
def test_a_misspelled_option_is_told_with_the_right_one(
    open_store, tmp_path, name, hint
):
    message = rf"There is no option '{name}'\. Did you mean {hint}\?$"
    with pytest.raises(TypeError, match=message):
        open_store(**{name: "r"})
    assert not any(tmp_path.iterdir())


def test_an_option_that_is_near_to_none(open_store):
    with pytest.raises(TypeError, match=r"There is no option 'xyz'\.$"):
        open_store(xyz=1)


@pytest.mark.parametrize("name", ["timeout", "flush_interval"])
def test_a_time_that_no_float_can_be(open_store, name):
    with pytest.raises(ValueError, match=f"{name} is larger than a float"):
        open_store(**{name: 10**400})


# Large values


def test_a_large_value_that_vanishes_while_it_is_read(open_store):
    store = open_store()
    with open_store() as other:
        other[b"large"] = bytes(2**20)

    def delete_elsewhere():
        with store.env.begin(write=True) as txn:
            txn.delete(b"large")

    with at_call("get", delete_elsewhere, GETS_ONE):
        assert store.get(b"large", "gone") == "gone"


PEAK = """
import sys, tracemalloc
from lmdb_object_store import LmdbObjectStore
size = 2**25
with LmdbObjectStore("db") as store:
    store.put_many({b"a": bytes(size), b"b": [bytes(size)]})
store = LmdbObjectStore("db")

def get_in_a_block(key):
    with store.transaction():
        return store[key]

reads = {
    "get": store.get,
    "block": get_in_a_block,
    "get_many": lambda key: store.get_many([key]),
    "items": lambda key: next(iter(store.items(key))),
}
tracemalloc.start()
reads[sys.argv[1]](b"a")
first = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
reads[sys.argv[1]](b"b")
print(first / size, tracemalloc.get_traced_memory()[1] / size)
store.close()
"""


@pytest.mark.parametrize("read", ["get", "block", "items"])
def test_a_large_value_takes_its_size_once_in_memory(run, read):
    first, second = map(float, run(PEAK, read).stdout.split())
    assert first < 1.1
    assert second < 1.1


# Read-only

WRITES = {
    "put": lambda store: store.put(b"k", 2),
    "[]=": lambda store: store.__setitem__(b"k", 2),
    "put_many": lambda store: store.put_many({b"k": 2}),
    "put_many of nothing": lambda store: store.put_many({}),
    "delete": lambda store: store.delete(b"k"),
    "del": lambda store: store.__delitem__(b"k"),
    "del of a missing key": lambda store: store.__delitem__(b"none"),
}


@pytest.mark.parametrize("batch_size", [1, 1000])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_read_only_store_refuses_writes_and_reads_on(open_store, write, batch_size):
    with open_store() as store:
        store[b"k"] = 1
    store = open_store(readonly=True, batch_size=batch_size)
    with pytest.raises(ReadOnlyError, match="read-only") as info:
        write(store)
    assert isinstance(info.value, lmdb.Error)
    assert not store.write_buffer
    assert store[b"k"] == store.get(b"k") == 1
    assert store.get_many([b"k", b"none"]) == ({b"k": 1}, [b"none"])
    assert b"k" in store
    assert store.exists(b"k", flush=True)
    store.close(strict=True)


def test_flushing_a_read_only_store_does_nothing(open_store):
    with open_store() as store:
        store[b"k"] = 1
    store = open_store(readonly=True)
    writer = open_store()  # of the same process
    writer[b"k"] = 2
    store.flush()
    assert writer.write_buffer.keys() == {b"k"}
    store.close(strict=True)
    with pytest.raises(ClosedError):
        store.flush()


def test_read_only_store_needs_an_existing_file(open_store, tmp_path):
    with pytest.raises(lmdb.Error):
        open_store(readonly=True)
    assert not any(tmp_path.iterdir())


def test_read_only_store_reads_large_values(open_store):
    with open_store() as store:
        store[b"k"] = bytes(MIB)
    store = open_store(readonly=True, map_size=64 * 1024)
    assert [len(store[b"k"]) for _ in range(2)] == [MIB, MIB]
    assert store.get_many([b"k"]) == ({b"k": bytes(MIB)}, [])


READ_ONLY_MOUNT = """
    import os, sys
    from lmdb_object_store import LmdbObjectStore
    try:
        open(os.path.join(sys.argv[1], "new"), "w")
    except OSError as error:
        assert error.strerror == "Read-only file system", error
    else:
        raise AssertionError("can be written to")
    options = dict(readonly=True, lock=False, subdir=os.path.isdir(sys.argv[2]))
    with LmdbObjectStore(sys.argv[2], **options) as store:
        assert store[b"k"] == 1
        assert [len(store[b"large"]) for _ in range(2)] == [2**20, 2**20]
        assert store.get_many([b"k", b"none"]) == ({b"k": 1}, [b"none"])
        try:
            store[b"k"] = 2
        except Exception as error:
            print(type(error).__name__)
"""


def can_mount():
    if not (sys.platform == "linux" and shutil.which("unshare")):
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs root on Linux, to mount")
@pytest.mark.parametrize("subdir", [True, False])
def test_file_system_mounted_read_only(open_store, tmp_path, subdir):
    (tmp_path / "mount").mkdir()
    with open_store("mount/db", subdir=subdir) as store:
        store[b"k"] = 1
        store[b"large"] = bytes(MIB)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    python = [sys.executable, "-W", "error", "-c", textwrap.dedent(READ_ONLY_MOUNT)]
    arguments = [tmp_path / "mount", store.db_path]
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, arguments[0], *python, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "ReadOnlyError\n"), run.stderr


# Files of plain py-lmdb and pickle, as release 0.1.0 wrote them

PLAIN = {
    b"user:1": {"name": "Ann"},
    "naïve".encode(): [1, 2, 3],
    b"none": None,
    b"\x00\xff": "binary key",
    b"large": b"x" * MIB,
}


@pytest.mark.parametrize("protocol", [0, 2, 4, pickle.HIGHEST_PROTOCOL])
def test_file_of_plain_pickles_is_read_and_changed(open_store, tmp_path, protocol):
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as txn:
        for key, value in PLAIN.items():
            txn.put(key, pickle.dumps(value, protocol))
    store = open_store(key_encoding="utf-8")
    assert store.get_many(PLAIN) == (PLAIN, [])
    assert store["naïve"] == [1, 2, 3]
    del store["user:1"]
    store["none"] = "changed"
    store.flush()
    assert store.get_many(PLAIN)[1] == [b"user:1"]


def test_file_is_read_by_plain_pickle(open_store, tmp_path):
    with open_store(key_encoding="utf-8") as store:
        store.put_many({"deleted": 1, "naïve": 1})
        store.put_many(PLAIN)
        del store["deleted"]
    with lmdb.open(str(tmp_path / "db"), readonly=True) as env, env.begin() as txn:
        found = {key: pickle.loads(raw) for key, raw in txn.cursor()}
    assert found == PLAIN
    assert sorted(os.listdir(tmp_path / "db")) == ["data.mdb", "lock.mdb"]
