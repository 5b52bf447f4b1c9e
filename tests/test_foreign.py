"""Files that are damaged, of another kind, or made by other programs; no permission."""

import errno
import os
import pickle
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import lmdb
import pytest

from conftest import PATIENCE, eventually, needs_posix
from lmdb_object_store import (
    CorruptedError,
    GrowthError,
    LmdbObjectStore,
    LostWritesError,
    NamedDatabaseError,
    UnpickleError,
    WrongFileError,
)
from moments import at_call, is_method

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
HEADER = {0: 16, 1: 24}  # bytes before the content of a page, by engine
LARGE = 300 * 2**10


def data_file(tmp_path):
    return tmp_path / "db" / "data.mdb"


def fill(tmp_path, lib_version, count=1000):
    """Make a store, and return the bytes that its file should have."""
    with LmdbObjectStore(tmp_path / "db", lib_version=lib_version) as store:
        store.put_many({b"%05d" % n: "x" * 500 for n in range(count)})
        return needed(store.env)


def needed(env):
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


# Cut off


@ENGINES
@pytest.mark.parametrize("share", [0.99, 0.5, 0.1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, open_store, lib_version, share):
    whole = fill(tmp_path, lib_version)
    file = data_file(tmp_path)
    shutil.copy(file, tmp_path / "copy")
    os.truncate(file, int(whole * share))
    with pytest.raises(CorruptedError) as caught:
        open_store()
    assert isinstance(caught.value, lmdb.CorruptedError)
    for part in (str(file), f"{int(whole * share)} bytes", f"have {whole}", "salvage"):
        assert part in str(caught.value)
    assert file.stat().st_size == int(whole * share)
    shutil.copy(tmp_path / "copy", file)
    assert len(open_store()) == 1000


@ENGINES
@pytest.mark.parametrize("size", [1, 100, 4096, 8191])
def test_a_file_of_less_than_two_pages_is_refused(
    tmp_path, open_store, lib_version, size
):
    fill(tmp_path, lib_version)
    os.truncate(data_file(tmp_path), size)
    with pytest.raises(lmdb.Error, match=re.escape(str(data_file(tmp_path)))):
        open_store()
    assert data_file(tmp_path).stat().st_size == size


def free_pages_at_the_end(tmp_path, lib_version, how):
    """Make a file that is shorter than its last page, as LMDB does."""
    env = lmdb.open(str(tmp_path / "db"), map_size=2**28, lib_version=lib_version)
    with env.begin(write=True) as txn:
        txn.put(b"kept", b"1" * 100)
    for number in range(5):  # so that pages are free
        with env.begin(write=True) as txn:
            txn.put(b"kept", b"%d" % number)
    if how in ("list in many pages", "large list"):
        with env.begin() as reader:
            reader.get(b"kept")  # so nothing is reused
            for number in range(1500 if how == "list in many pages" else 3):
                with env.begin(write=True) as txn:
                    txn.put(b"%05d" % number, b"2" * 3000)
            if how == "list in many pages":
                env.close()
                return 0
            if how == "large list":
                with env.begin(write=True) as txn:
                    for number in range(4000):
                        txn.put(b"%05d" % number, b"2" * 3000)
                with env.begin(write=True) as txn:
                    txn.drop(env.open_db(txn=txn), delete=False)
                    txn.put(b"kept", b"1" * 100)
    with env.begin(write=True) as txn:
        txn.put(b"kept", b"3" * 100)
        txn.put(b"gone", bytes(2**20))
        txn.delete(b"gone")
    size = needed(env)
    env.close()
    return size


HOW = pytest.mark.parametrize("how", ["plain", "large list"])


@ENGINES
@HOW
def test_a_file_that_is_short_for_a_good_reason_is_opened(
    tmp_path, open_store, lib_version, how
):
    size = free_pages_at_the_end(tmp_path, lib_version, how)
    file = data_file(tmp_path)
    assert file.stat().st_size < size
    before = file.stat().st_size
    with LmdbObjectStore(tmp_path / "db", readonly=True) as store:
        assert b"kept" in store
    assert file.stat().st_size == before  # by a reader it is left alone
    store = open_store()
    store[b"new"] = 1
    store.flush()
    assert file.stat().st_size >= needed(store.env)
    assert store[b"new"] == 1


@pytest.mark.one_in(4)
@ENGINES
@pytest.mark.parametrize("how", ["large list", "list in many pages"])
def test_the_list_of_free_pages_is_cut_off(tmp_path, lib_version, how):
    free_pages_at_the_end(tmp_path, lib_version, how)
    size = data_file(tmp_path).stat().st_size
    for part in range(9, 0, -1):
        os.truncate(data_file(tmp_path), size * part // 10)
        with pytest.raises(CorruptedError, match="bytes, and should have"):
            LmdbObjectStore(tmp_path / "db")


@pytest.mark.one_in(2)
@ENGINES
def test_a_damaged_list_of_free_pages(tmp_path, lib_version):
    free_pages_at_the_end(tmp_path, lib_version, "list in many pages")
    head = HEADER[lib_version]
    with data_file(tmp_path).open("r+b") as file:
        for page in (0, 1):  # of both, the list's root page
            file.seek(page * 4096 + head + 64)
            (root,) = struct.unpack("=Q", file.read(8))
            file.seek(root * 4096 + head - 4)
            file.write(struct.pack("=H", 60_000))  # so many entries
    os.truncate(data_file(tmp_path), data_file(tmp_path).stat().st_size - 4096)
    with pytest.raises(CorruptedError, match="its list of free pages"):
        LmdbObjectStore(tmp_path / "db")


@pytest.mark.one_in(2)
@ENGINES
def test_a_long_list_of_free_pages_is_read_to_its_end(tmp_path, lib_version):
    free_pages_at_the_end(tmp_path, lib_version, "list in many pages")
    size = data_file(tmp_path).stat().st_size
    head = HEADER[lib_version]
    with data_file(tmp_path).open("r+b") as file:
        for page in (0, 1):  # of both, the number of the last page
            file.seek(page * 4096 + head + 120)
            (last,) = struct.unpack("=Q", file.read(8))
            file.seek(page * 4096 + head + 120)
            file.write(struct.pack("=Q", last + 5))
    with pytest.raises(CorruptedError, match=f"from number {size // 4096} on"):
        LmdbObjectStore(tmp_path / "db")


@ENGINES
def test_a_short_file_whose_first_pages_are_damaged(tmp_path, lib_version):
    size = fill(tmp_path, lib_version)
    fill(tmp_path, lib_version, 1)
    with data_file(tmp_path).open("r+b") as file:
        file.seek(HEADER[lib_version] + 24 + 96 + 8)
        file.write(struct.pack("=Q", 9))  # no transaction of page 0 is odd
        file.truncate(size - 4096)
    with pytest.raises(CorruptedError, match="is damaged"):
        LmdbObjectStore(tmp_path / "db")


TWO_COMMITS = """
import lmdb
env = lmdb.open("db")
for number in range(2):
    with env.begin(write=True) as txn:
        txn.put(b"elsewhere", b"%d" % number)
"""


@ENGINES
def test_another_process_writes_while_a_short_file_is_checked(
    tmp_path, open_store, run, lib_version
):
    free_pages_at_the_end(tmp_path, lib_version, "plain")
    write = lambda: run(TWO_COMMITS)  # noqa: E731
    with at_call("stat", write, "_check_length"):
        store = open_store()
    assert b"elsewhere" in store


def test_the_file_grows_with_each_commit_that_needs_it(tmp_path, open_store):
    store = open_store()
    for number in range(30):
        with store.transaction():
            store[b"%d" % number] = bytes(number * 10_000)
            store.delete(b"%d" % (number - 1))
        assert data_file(tmp_path).stat().st_size >= needed(store.env)


def test_another_process_makes_a_short_file_longer(tmp_path, open_store):
    free_pages_at_the_end(tmp_path, 0, "plain")
    store = open_store()
    size = needed(store.env) + 2**20
    with at_call("begin", lambda: os.truncate(data_file(tmp_path), size), "_fill_file"):
        store.put_many({b"a": 1})
    assert data_file(tmp_path).stat().st_size == size


# Damaged


def read_block(store):
    with store.transaction():
        return store[b"00001"]


def damage(tmp_path):
    """Overwrite all pages but the first two, and return the file."""
    file = data_file(tmp_path)
    with file.open("r+b") as opened:
        opened.seek(2 * 4096)
        opened.write(bytes(file.stat().st_size - 2 * 4096))
    return file


def in_snapshot(read):
    def read_snapshot(store):
        with store.snapshot() as snapshot:
            return read(snapshot)

    return read_snapshot


READS = {
    "get": lambda store: store[b"00001"],
    "items": lambda store: list(iter(store.items())),  # asks for no length
    "keys": lambda store: list(iter(store)),
    "get_many": lambda store: store.get_many([b"00001"]),
}


@ENGINES
@pytest.mark.parametrize(
    "use",
    [
        *READS.values(),
        *map(in_snapshot, READS.values()),
        lambda store: store.pop(b"00001"),
        lambda store: store.put_many({b"a": 1}),
        lambda store: store.delete_many(store.keys(prefix=b"0")),
        lambda store: store.clear(),
        read_block,
    ],
    ids=[
        *(*READS, *(f"snapshot-{name}" for name in READS)),
        *("pop", "put_many", "delete_many", "clear", "block"),
    ],
)
def test_damage_is_told_with_the_file_and_the_next_steps(
    tmp_path, open_store, lib_version, use
):
    fill(tmp_path, lib_version)
    file = damage(tmp_path)
    store = open_store()
    with pytest.raises(CorruptedError) as caught:
        use(store)
    assert isinstance(caught.value, lmdb.CorruptedError)
    for part in (str(file), "MDB_CORRUPTED", "check`", "backup", "salvage`"):
        assert part in str(caught.value)


@ENGINES
@pytest.mark.parametrize(
    "read",
    [
        *READS.values(),
        lambda store: b"00001" in store,
        lambda store: len(store.keys(prefix=b"0")),
        lambda store: store.pop(b"00001"),
        lambda store: store.setdefault(b"00001"),
    ],
    ids=[*READS, "in", "count", "pop", "setdefault"],
)
def test_what_looks_damaged_is_read_once_more(tmp_path, open_store, lib_version, read):
    fill(tmp_path, lib_version)
    whole = data_file(tmp_path).read_bytes()
    store = open_store()
    expected = read(open_store(shutil.copytree(tmp_path / "db", tmp_path / "copy")))
    begun = 0

    def mend_at_second(_, event, called):
        nonlocal begun
        begun += event == "c_call" and is_method(called, "begin")
        if begun == 2:
            sys.setprofile(None)
            with data_file(tmp_path).open("r+b") as opened:
                opened.write(whole)

    damage(tmp_path)  # as the copy of a meta page that is just being written can be
    sys.setprofile(mend_at_second)
    try:
        assert read(store) == expected
    finally:
        sys.setprofile(None)
    assert begun == 2


@ENGINES
def test_a_block_that_has_met_damage_reads_what_is_whole(
    tmp_path, open_store, lib_version
):
    with open_store(lib_version=lib_version) as store:
        store.put_many({b"%05d" % number: b"x" * 50 for number in range(5_000)})
    content = bytearray(data_file(tmp_path).read_bytes())
    page = content.find(b"04000") // 4096 * 4096
    content[page + 8 : page + 16] = b"\xff" * 8  # the kind of a leaf page
    data_file(tmp_path).write_bytes(content)
    store = open_store()
    with suppress(lmdb.Error), store.transaction():  # LMDB may refuse the commit
        for _ in range(2):
            assert store[b"00001"] == b"x" * 50
            with pytest.raises(CorruptedError):
                store[b"04000"]
            assert b"00001" in store


def test_without_locks_damage_may_be_another_writer(tmp_path, open_store):
    fill(tmp_path, 0)
    damage(tmp_path)
    store = open_store(readonly=True, lock=False)
    with pytest.raises(CorruptedError, match=r"another process writes.*lock=False"):
        store[b"00001"]


def test_a_snapshot_that_has_met_damage_goes_on_to_say_so(tmp_path, open_store):
    fill(tmp_path, 0)
    damage(tmp_path)
    with open_store().snapshot() as snapshot:
        for read in READS.values():
            with pytest.raises(CorruptedError, match="is damaged"):
                read(snapshot)


# Named databases


@pytest.fixture(params=[0, 1])
def with_names(tmp_path, request, open_store):
    """Return the key of a named database in a file that another program made."""
    env = lmdb.open(str(tmp_path / "db"), max_dbs=2, lib_version=request.param)
    for name in (b"name", b"other"):
        database = env.open_db(name)
        with env.begin(write=True) as txn:
            txn.put(b"key", b"value", db=database)
    env.close()
    return b"name" + b"\0" * request.param


@pytest.fixture(autouse=True)
def _named_databases_are_whole(tmp_path, request):
    yield
    if "with_names" in request.fixturenames:
        env = lmdb.open(str(tmp_path / "db"), max_dbs=2)
        with env, env.begin(db=env.open_db(b"name")) as txn:
            assert txn.get(b"key") == b"value"


def test_a_flush_refuses_the_name_alone(open_store, with_names):
    store = open_store()
    size = 48 - len(pickle.dumps(bytes(30), -1)) + 30
    store[b"z"] = bytes(size)  # takes 48 bytes, as the record of a named database
    store.flush()
    store[b"z"] = bytes(30)
    store[b"a"] = 1
    store[with_names] = 2
    with pytest.raises(NamedDatabaseError, match=r"name.*another program") as caught:
        store.flush()
    assert isinstance(caught.value, lmdb.IncompatibleError)
    assert caught.value.keys == {with_names}
    assert store.write_buffer == {}
    assert store.get_many([b"a", b"z"])[0] == {b"a": 1, b"z": bytes(30)}
    store.close(strict=True)


def test_the_put_that_fills_a_batch_is_refused_only_for_its_own_key(
    open_store, with_names, errors
):
    store = open_store(batch_size=3)
    store[b"a"] = 1
    store[with_names] = 2
    store[b"b"] = 3  # flushes, and has nothing to do with the name
    assert "has named databases" in errors.get_nowait().getMessage()
    assert store.get_many([b"a", b"b"])[0] == {b"a": 1, b"b": 3}
    with pytest.raises(NamedDatabaseError) as caught:
        store.flush()
    assert caught.value.keys == {with_names}
    store[b"c"] = 4
    store[b"d"] = 5
    with pytest.raises(NamedDatabaseError):
        store[with_names] = 6
    assert store.get_many([b"c", b"d"])[0] == {b"c": 4, b"d": 5}
    store.close(strict=True)


def test_a_deletion_of_a_name_is_refused(open_store, with_names):
    store = open_store()
    store[b"a"] = 1
    store.delete(with_names)
    with pytest.raises(NamedDatabaseError):
        store.flush()
    assert store[b"a"] == 1
    for keys in ([b"a", with_names], store.keys(prefix=b"n")):
        with pytest.raises(NamedDatabaseError, match="another program") as caught:
            store.delete_many(keys)
        assert with_names in caught.value.keys
    assert store[b"a"] == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.put_many({b"a": 1}),
        lambda store: store.update({b"a": 1, b"b": 2}),
        lambda store: store.delete_many([b"b"]),
        lambda store: store.snapshot().__enter__(),
        lambda store: store.transaction().__enter__(),
        list,
    ],
    ids=["put_many", "update", "delete_many", "snapshot", "transaction", "list"],
)
def test_a_write_under_a_name_is_told_by_the_next_flush_and_stops_no_other_call(
    open_store, with_names, write
):
    store = open_store(batch_size=2)
    store[with_names] = 1
    kept = write(store)
    del kept  # a snapshot or block ends
    assert store.write_buffer.keys() <= {b"a", b"b"}
    with pytest.raises(NamedDatabaseError) as caught:
        store.flush()
    assert caught.value.keys == {with_names}
    store.flush()
    store.close(strict=True)


def test_what_was_refused_before_a_close_is_lost_with_an_error(open_store, with_names):
    store = open_store(flush_interval=0.01)
    store[b"a"] = 1
    store[with_names] = 2
    eventually(lambda: not store.write_buffer)
    with pytest.raises(LostWritesError):
        store.close(strict=True)
    assert store.write_buffer.keys() == {with_names}


def test_what_was_refused_is_told_though_the_others_cannot_be_flushed(
    open_store, with_names
):
    store = open_store(max_map_size=2**20)
    store[with_names] = 1
    store.update({b"z%d" % n: bytes(2**17) for n in range(16)})
    with pytest.raises(GrowthError):
        store.flush()
    assert with_names not in store.write_buffer
    store.max_map_size = None
    with pytest.raises(NamedDatabaseError):
        store.flush()
    assert store.write_buffer == {}
    assert store[b"z15"] == bytes(2**17)


def test_a_block_with_a_name_near_the_cap(open_store, with_names):
    store = open_store(map_size=2**20, max_map_size=2**20)
    with suppress(GrowthError):
        for number in range(1000):
            store.put_many({b"%d" % number: bytes(3000)})
    with pytest.raises(NamedDatabaseError), store.transaction():  # noqa: PT012
        store[with_names] = 1
        store.delete(b"1")
    assert b"1" in store


def put_both(store, name):
    store.put_many({b"a": 1, name: 2})


def put_both_in_a_block(store, name):
    with store.transaction():
        store[b"a"] = 1
        store[name] = 2


@pytest.mark.parametrize("write", [put_both, put_both_in_a_block])
def test_all_or_nothing_means_nothing_with_a_name(open_store, with_names, write):
    store = open_store()
    with pytest.raises(NamedDatabaseError) as caught:
        write(store, with_names)
    assert caught.value.keys == {with_names}
    assert b"a" not in store
    store[b"b"] = 1
    store.flush()


def test_a_close_loses_only_what_was_put_under_the_name(open_store, with_names, stored):
    store = open_store()
    for number in range(100):
        store[b"%d" % number] = number
    store[with_names] = 1
    with pytest.raises(LostWritesError) as caught:
        store.close(strict=True)
    assert isinstance(caught.value.__cause__, NamedDatabaseError)
    assert store.write_buffer.keys() == {with_names}
    with open_store() as again:
        assert again.get_many([b"%d" % n for n in range(100)])[1] == []


def test_names_in_a_flush_that_has_to_grow_the_map(tmp_path, open_store, with_names):
    store = open_store(map_size=2**17)
    store.update({b"%d" % n: bytes(10_000) for n in range(50)})
    store[with_names] = 1
    with pytest.raises(NamedDatabaseError):
        store.flush()
    assert store[b"49"] == bytes(10_000)


# A main database with flags


@ENGINES
@pytest.mark.parametrize(
    ("flag", "name"), [(2, "reverse_key"), (4, "dupsort"), (8, "integerkey")]
)
def test_a_main_database_with_flags_is_refused(
    tmp_path, open_store, lib_version, flag, name
):
    fill(tmp_path, lib_version)
    with data_file(tmp_path).open("r+b") as file:
        for page in (0, 1):  # struct MDB_meta, its second tree
            file.seek(page * 4096 + HEADER[lib_version] + 24 + 48 + 4)
            file.write(struct.pack("=H", flag))
    with pytest.raises(WrongFileError, match=f"with {name} set") as caught:
        open_store()
    assert isinstance(caught.value, lmdb.InvalidError | ValueError)


# Other kinds of files


@pytest.mark.parametrize(
    ("made", "asked"), [(0, 1), (1, 0)], ids=["0.9 by 1.0", "1.0 by 0.9"]
)
def test_the_other_engine(tmp_path, open_store, made, asked):
    fill(tmp_path, made)
    version = ["0.9", "1.0"][made]
    with pytest.raises(
        WrongFileError, match=f"by LMDB {version}, and lib_version={asked}.*leave"
    ):
        open_store(lib_version=asked)
    assert len(open_store()) == 1000


def make_sqlite(path):
    connection = sqlite3.connect(path)
    connection.execute("create table a(b)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_sqlite, "an SQLite database"),
        (lambda path: path.write_text("some text " * 1000), "no LMDB file"),
        (lambda path: path.write_text("short"), "no LMDB file"),
    ],
)
def test_a_file_of_another_kind(tmp_path, open_store, make, kind, subdir):
    make(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(WrongFileError, match=kind):
        open_store("file", subdir=subdir)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == before


def test_another_file_in_place_of_the_data_file(tmp_path, open_store):
    (tmp_path / "db").mkdir()
    make_sqlite(data_file(tmp_path))
    with pytest.raises(WrongFileError, match=r"data\.mdb' is an SQLite database"):
        open_store()
    assert os.listdir(tmp_path / "db") == ["data.mdb"]


def test_a_directory_store_without_its_directory(tmp_path, open_store):
    open_store().close()
    with pytest.raises(WrongFileError, match=r"is a directory.*without subdir=False"):
        open_store(subdir=False)
    os.rename(tmp_path / "db" / "data.mdb", tmp_path / "file")
    with pytest.raises(WrongFileError, match=r"data file, not a directory.*subdir=Fa"):
        open_store("file")
    assert sorted(os.listdir(tmp_path)) == ["db", "file"]


def test_the_data_file_of_a_directory_gets_no_second_lock_file(tmp_path, open_store):
    path = os.fspath(tmp_path / "db")
    with open_store() as store:
        store[b"a"] = 1
    for subdir in (True, False):
        with pytest.raises(WrongFileError, match=r"open .*directory") as caught:
            open_store("db/data.mdb", subdir=subdir)
        assert repr(path) in str(caught.value)
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb"]
    # Without locks there is nothing to go wrong.
    shutil.copytree(path, tmp_path / "copy")
    options = {"readonly": True, "lock": False}
    assert open_store("copy/data.mdb", subdir=False, **options)[b"a"] == 1
    with open_store("data.mdb", subdir=False) as store:  # no lock.mdb is there
        store[b"a"] = 1
    assert sorted(os.listdir(tmp_path)) == ["copy", "data.mdb", "data.mdb-lock", "db"]


def test_a_lock_file_that_was_there_stays(tmp_path, open_store):
    open_store(subdir=False, lib_version=0).close()
    with pytest.raises(WrongFileError):
        open_store(subdir=False, lib_version=1)
    assert sorted(os.listdir(tmp_path)) == ["db", "db-lock"]


HOLDS = """
import sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", subdir=False, lib_version=0)
store.put_many({b"a": 1})
print("ready", flush=True)
sys.stdin.readline()
store.put_many({b"b": 2})
store.close(strict=True)
"""


@needs_posix  # on Windows nobody can remove a lock file that is in use
def test_the_lock_file_of_another_process_stays(tmp_path, open_store, monkeypatch):
    # 1. There is neither a file nor a lock file.
    # 2. Another process makes a store there, with another engine.
    # 3. The opening here fails, and must not remove the lock file.
    real, holders = lmdb.open, []

    def open_later(*arguments, **options):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDS],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout.readline() == "ready\n"
        return real(*arguments, **options)

    monkeypatch.setattr(lmdb, "open", open_later)
    with pytest.raises(WrongFileError, match=r"lib_version=1 asks"):
        open_store(subdir=False, lib_version=1)
    monkeypatch.undo()
    [holder] = holders
    with holder:
        holder.communicate("go\n", timeout=PATIENCE)
    assert holder.returncode == 0
    assert open_store(subdir=False)[b"b"] == 2


OPENS = """
from lmdb_object_store import LmdbObjectStore
with open("db/lock.mdb", "r+b", buffering=0) as lock:
    # struct MDB_rxbody: the format of the lock file, after the magic number.
    format = lock.read(8)[4]
    lock.seek(4)
    lock.write(bytes([format ^ 1]))
try:
    LmdbObjectStore("db")
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_posix  # on Windows the lock file can't be written to
def test_a_lock_file_of_another_build_is_no_damage(tmp_path, open_store, run):
    store = open_store(lib_version=0)
    store.put_many({b"a": 1})
    told = run(OPENS).stdout
    assert told.startswith("VersionMismatchError ")
    assert "Another build of LMDB has made the lock file" in told
    assert "damaged" not in told


@pytest.mark.parametrize("path", ["", ":memory:", b"", b":memory:"])
def test_a_path_that_names_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for subdir in (True, False):
        with pytest.raises(ValueError, match="kept on disk"):
            LmdbObjectStore(path, subdir=subdir)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs paths of any bytes")
def test_a_path_of_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    for spelling in (path, os.fsdecode(path)):
        with LmdbObjectStore(spelling) as store:
            store[b"a"] = store.get(b"a", 0) + 1
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]
    with LmdbObjectStore(path, readonly=True) as store:
        assert store[b"a"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/locks")
def test_a_lock_file_opened_by_mistake_keeps_its_locks(tmp_path, open_store):
    def locks():
        lines = Path("/proc/locks").read_text("ascii").splitlines()
        return [line for line in lines if f" {os.getpid()} " in line]

    before = len(locks())
    open_store(lib_version=0)
    held = len(locks())
    assert held > before
    for subdir in (True, False):
        with pytest.raises(lmdb.Error, match=r"lock file|already open"):
            open_store("db/lock.mdb", subdir=subdir)
    assert len(locks()) == held


def test_a_lock_file_is_no_data_file(open_store):
    open_store().close()
    with pytest.raises(WrongFileError, match=r"is a lock file.*open its directory"):
        open_store("db/lock.mdb", subdir=False)


# Values that are no pickles


@pytest.mark.parametrize(
    "raw", [b"\xff\xd8\xff\xe0 JPEG", b"some text", bytes(LARGE), b"x" * LARGE, b""]
)
@pytest.mark.parametrize("large_seen", [False, True])
@pytest.mark.parametrize("read", READS)
def test_a_value_that_is_no_pickle(open_store, raw, read, large_seen):
    store = open_store()
    if large_seen:
        store[b"large"] = bytes(LARGE)
        store.flush()
        assert store.pop(b"large") == bytes(LARGE)
    with store.env.begin(write=True) as txn:
        txn.put(b"00001", raw)
    with store.snapshot() as snapshot:
        for source in (store, snapshot):
            if read == "keys":
                assert READS[read](source) == [b"00001"]
                continue
            with pytest.raises(UnpickleError, match=r"no pickle.*another program"):
                READS[read](source)


def test_a_pickle_that_cannot_be_unpickled_is_still_called_a_pickle(open_store):
    store = open_store()
    with store.env.begin(write=True) as txn:
        txn.put(b"00001", b"\x80\x04\x95")
    with pytest.raises(UnpickleError) as caught:
        store[b"00001"]
    assert "no pickle" not in str(caught.value)


# Permissions and limits


@pytest.fixture
def as_nobody():
    """Give the process only the rights of a user who owns nothing."""
    if os.geteuid() != 0:
        yield lambda: None
        return
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


@pytest.fixture
def shown_store():
    """Return the path of a closed store that all users may look at, but not change."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "db")
        with LmdbObjectStore(path) as store:
            store[b"a"] = 1
        for name, mode in [("", 0o555), ("data.mdb", 0o444), ("lock.mdb", 0o444)]:
            (path / name).chmod(mode)
        yield path
        path.chmod(0o755)


@needs_posix
def test_a_user_who_may_only_read(shown_store, as_nobody):
    as_nobody()
    with pytest.raises(lmdb.Error, match="Permission denied") as caught:
        LmdbObjectStore(shown_store, readonly=True)
    lock = str(shown_store / "lock.mdb")
    assert f"writes to the lock file {lock!r} even to read" in str(caught.value)
    assert "open it with lock=False" in str(caught.value)
    assert caught.value.code == errno.EACCES
    with LmdbObjectStore(shown_store, readonly=True, lock=False) as store:
        assert store[b"a"] == 1


@needs_posix
def test_a_user_who_may_not_look_any_more_writes_on(tmp_path, open_store, as_nobody):
    store = open_store()
    store[b"a"] = 1
    tmp_path.chmod(0o000)
    try:
        as_nobody()
        store.flush()
    finally:
        if os.geteuid():
            with suppress(PermissionError):
                os.seteuid(0)
        tmp_path.chmod(0o700)
    assert store.write_buffer == {}


SAME_NUMBER = """
import os, sys
from lmdb_object_store import LmdbObjectStore
print(os.getpid(), flush=True)
sys.stdin.readline()
try:
    LmdbObjectStore("db")
except Exception as error:
    print(type(error).__name__, error.code, error, flush=True)
"""


@needs_posix
def test_a_process_of_the_same_number_has_the_file_open(tmp_path):
    import fcntl

    with LmdbObjectStore(tmp_path / "db", lib_version=0):
        pass
    with (
        subprocess.Popen(
            [sys.executable, "-c", SAME_NUMBER],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
        (tmp_path / "db" / "lock.mdb").open("r+b") as lock,
    ):
        number = int(child.stdout.readline())
        # As LMDB does in a process that has this number in a namespace of its own.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        told, _ = child.communicate("\n", timeout=PATIENCE)
    assert re.match(r"LockError \d+ ", told)  # with its number, as of py-lmdb
    assert f"process with the number of this one, {number}" in told
    assert "PID namespace" in told


TOO_LARGE = """
import resource
from lmdb_object_store import LmdbObjectStore
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
try:
    LmdbObjectStore("db", map_size=2**40)
except Exception as error:
    print(type(error).__mro__[1].__name__, error)
with LmdbObjectStore("db") as store:
    store[b"a"] = 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
@pytest.mark.usefixtures("_unmeasured")
def test_a_map_that_does_not_fit_the_address_space(run):
    told = run(TOO_LARGE).stdout
    assert f"A map of {2**40} bytes, of map_size or of the file, does not fit" in told
    assert "choose a smaller map_size" in told


def test_a_map_that_fits_no_address_space(open_store, tmp_path):
    with pytest.raises(ValueError, match="map_size"):
        open_store(map_size=2**64)
    assert os.listdir(tmp_path) == []
