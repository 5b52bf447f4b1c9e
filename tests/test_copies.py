"""The figures of a store, and copies of a store that is in use."""

import dataclasses
import os
import pickle
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import lmdb
import pytest
from lmdb.verify import verify

from conftest import MOUNT, PATIENCE, eventually, is_running, needs_fork, needs_posix
from data_files import (
    DAMAGE,
    HEADER,
    content,
    damage_pages,
    names,
    once,
    report_to,
    run_in_children,
)
from lmdb_object_store import (
    BusyError,
    ClosedError,
    CorruptedError,
    LmdbObjectStore,
    ReplacedError,
    SnapshotOpenError,
    _info,
)
from lmdb_object_store.maintenance import check
from moments import at_call

FIGURES = "_figures"  # the function that reads them, for `at_call`
BEGINS = "_begin"  # the function of the child that begins a read transaction
PINS = "_pin"  # the function of the child that pins the moment of a copy

LINUX = sys.platform == "linux"
ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
KINDS = pytest.mark.parametrize("compact", [False, True], ids=["plain", "compact"])
MIB = 2**20


def fill(store, count=300):
    """Put values of many sizes, delete some, and leave some writes pending."""
    store.put_many({b"%05d" % n: [n, bytes(n * 37 % 3000)] for n in range(count)})
    store.put_many({b"large": os.urandom(MIB), b"gone": bytes(MIB)})
    store.delete_many([b"gone", *store.keys(prefix=b"0001")])
    store[b"pending"] = 1
    store[b"00003"] = "pending"
    store.delete(b"00004")


def is_usable(path, **options):
    """Return whether LMDB's auditor likes a copy, before and after writes to it."""
    problems = verify(os.fspath(path), **options)
    with LmdbObjectStore(path, flush_interval=None, **options) as store:
        before = store.info().last_transaction
        for number in range(5):
            store.put_many({b"new%d" % number: bytes(number * 2000)})
        assert store.info().last_transaction == before + 5
        store.delete_many(store.keys(prefix=b"new"))
    return not problems and not verify(os.fspath(path), **options)


# Figures


@pytest.mark.one_in(2)
@ENGINES
def test_the_figures_of_an_empty_store(open_store, lib_version):
    info = open_store(lib_version=lib_version, max_map_size=2**31).info()
    assert (info.entries, info.pending_writes, info.depth) == (0, 0, 0)
    assert (info.readers, info.dead_readers, info.max_readers) == (0, 0, 126)
    assert (info.used, info.free) == (info.file_size, 0)
    assert info.engine == {0: "0.9", 1: "1.0"}[lib_version]
    assert (info.last_transaction, info.max_map_size) == (0, 2**31)
    assert info.used == 2 * info.page_size


@pytest.mark.one_in(2)
@ENGINES
def test_what_is_deleted_is_free_in_a_file_that_does_not_shrink(
    tmp_path, open_store, lib_version
):
    store = open_store(lib_version=lib_version)
    file = tmp_path / "db" / "data.mdb"
    store.put_many({b"%05d" % n: bytes(500) for n in range(3000)})
    full = store.info()
    assert (full.entries, full.last_transaction) == (3000, 1)
    assert full.used > 3000 * 500
    assert full.depth > 1
    assert full.file_size == file.stat().st_size
    store.delete_many(b"%05d" % n for n in range(2900))
    info = store.info()
    assert (info.entries, info.last_transaction) == (100, 2)
    assert info.file_size == file.stat().st_size >= full.file_size
    assert info.used + info.free == info.file_size
    assert info.used < full.used / 5
    for number in range(500):
        store[b"%05d" % number] = bytes(500)
        if number % 100 == 0:
            store.flush()
    store.flush()
    assert store.info().free < info.free - 400 * 500  # the writes have taken that room
    assert store.info().file_size < info.file_size * 1.1
    assert not verify(os.fspath(tmp_path / "db"))


@pytest.mark.one_in(2)
@ENGINES
def test_used_and_free_are_what_the_auditor_counts(tmp_path, open_store, lib_version):
    store = open_store(lib_version=lib_version)
    fill(store)
    store.flush()
    with store.env.begin() as txn:
        trees = txn.stat()
    info = store.info()
    pages = sum(trees[f"{kind}_pages"] for kind in ("branch", "leaf", "overflow"))
    assert 2 + pages < info.used / info.page_size <= 2 + pages + 3  # the free list


@pytest.mark.skipif(not LINUX, reason="needs holes in files")
def test_holes_take_no_disk(tmp_path, open_store):
    store = open_store(subdir=False)
    store[b"a"] = 1
    store.flush()
    os.truncate(tmp_path / "db", 8 * MIB)
    info = store.info()
    assert info.disk_size < MIB < info.file_size
    assert info.free > 7 * MIB


def test_pending_writes_are_counted_and_stay_pending(open_store):
    store = open_store()
    store.put_many({b"a": 1, b"b": 2})
    store[b"c"] = 3
    store[b"a"] = 4
    store.delete(b"b")
    info = store.info()
    assert (info.entries, info.pending_writes, info.last_transaction) == (2, 3, 1)
    assert store.write_buffer.keys() == {b"a", b"b", b"c"}
    assert open_store().info() == info  # another handle on the same writes


def test_readers_are_those_of_all_processes(tmp_path, open_store, reader_elsewhere):
    store = open_store()
    store[b"a"] = 1
    store.flush()
    assert store.info().readers == 0
    with store.snapshot(), store.snapshot():
        assert store.info().readers == 2
        reader_elsewhere.start()
        assert store.info().readers == 3
    assert store.info().readers == 1
    reader_elsewhere.kill()
    info = store.info()
    assert (info.readers, info.dead_readers) == (0, 1)
    assert store.info().dead_readers == 0


READS_ELSEWHERE = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1], readonly=True) as store, store.snapshot():
    print("reads", flush=True)
    sys.stdin.read()
"""


class _Elsewhere:
    def __init__(self, path):
        self._command = [sys.executable, "-c", READS_ELSEWHERE, os.fspath(path)]
        self._process = None

    def start(self):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe)
        assert self._process.stdout.readline()

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=PATIENCE)


@pytest.fixture
def reader_elsewhere(tmp_path):
    """Offer a process that has a snapshot of the store open until it is killed."""
    reader = _Elsewhere(tmp_path / "db")
    yield reader
    reader.kill()


def test_the_map_and_its_cap(open_store):
    store = open_store(map_size=MIB, max_map_size=2**27)
    info = store.info()
    assert (info.map_size, info.max_map_size) == (MIB, 2**27)
    store.put_many({b"a": bytes(2 * MIB)})
    store.max_map_size = None
    info = store.info()
    assert info.map_size == store.env.info()["map_size"] > MIB
    assert info.max_map_size is None


def test_inside_a_block_the_entries_are_those_of_the_block(open_store):
    store = open_store()
    store.put_many({b"a": 1})
    store[b"b"] = 2
    with store.transaction():
        store[b"c"] = 3
        store.delete(b"a")
        info = store.info()
        assert (info.entries, info.last_transaction) == (2, 2)
    assert (store.info().entries, store.info().last_transaction) == (2, 3)


@pytest.mark.parametrize("options", [{}, {"lock": False}])
def test_a_store_that_only_reads_has_figures_too(open_store, options):
    with open_store() as store:
        store.put_many({b"a": 1})
        info = store.info()
    assert open_store(readonly=True, **options).info() == info


def test_a_closed_store_has_no_figures(open_store):
    store = open_store()
    store.close()
    with pytest.raises(ClosedError):
        store.info()


def test_the_figures_stay_as_they_are(open_store):
    info = open_store().info()
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.entries = 1


@pytest.fixture
def with_long_list(open_store):
    """Return a function that makes a store whose list of free pages has many pages."""

    def make(lib_version):
        store = open_store(lib_version=lib_version, map_size=2**26)
        store.put_many({b"kept": 1})
        with store.snapshot():  # so nothing is used again
            for number in range(120):
                store.put_many({b"kept": bytes(number % 7 * 2000)})
        return store

    return make


def list_roots(path, lib_version):
    """Return where the number of the list's root page is, in both meta pages."""
    return [page * 4096 + HEADER[lib_version] + 64 for page in (0, 1)]


@pytest.mark.one_in(2)
@ENGINES
def test_a_list_of_free_pages_may_have_many_pages(
    tmp_path, with_long_list, lib_version
):
    store = with_long_list(lib_version)
    file = tmp_path / "db" / "data.mdb"
    content = file.read_bytes()
    kinds = []
    for place in list_roots(file, lib_version):
        (root,) = struct.unpack_from("=Q", content, place)
        kinds.append(content[root * 4096 + HEADER[lib_version] - 6])
    assert 1 in kinds  # a branch
    info = store.info()
    assert info.free > info.file_size / 2
    assert info.used < 20 * info.page_size


def damage_list(path, lib_version, number):
    """Overwrite the number of the list's root page, or let that lead to itself."""
    head = HEADER[lib_version]
    with path.open("r+b") as file:
        for place in list_roots(path, lib_version):
            file.seek(place)
            if number != "itself":
                file.write(struct.pack("=Q", number))
                continue
            (root,) = struct.unpack("=Q", file.read(8))
            file.seek(root * 4096 + head)
            (at,) = struct.unpack("=H", file.read(2))
            file.seek(root * 4096 + (head if lib_version else 0) + at)
            file.write(struct.pack("=IH", root, 0))


LIST_DAMAGE = pytest.mark.parametrize("number", [2**20, 2**40, 2**62, "itself"])


@pytest.mark.one_in(4)
@ENGINES
@LIST_DAMAGE
def test_a_damaged_list_of_free_pages_is_told_of(
    tmp_path, with_long_list, lib_version, number
):
    store = with_long_list(lib_version)
    damage_list(tmp_path / "db" / "data.mdb", lib_version, number)
    with pytest.raises(CorruptedError, match="its list of free pages"):
        store.info()


@pytest.mark.one_in(4)
@ENGINES
@LIST_DAMAGE
def test_a_compact_copy_needs_the_list_of_free_pages(
    tmp_path, with_long_list, lib_version, number
):
    store = with_long_list(lib_version)
    damage_list(tmp_path / "db" / "data.mdb", lib_version, number)
    with pytest.raises(CorruptedError):
        store.copy_to(tmp_path / "copy", compact=True)
    assert names(tmp_path) == ["db"]


@needs_fork
def test_figures_while_another_process_commits_all_the_time(tmp_path, open_store):
    store = open_store()
    store[b"n"] = 0
    store.flush()
    with commits_elsewhere(tmp_path) as wait:
        wait()
        before = store.info()
        for _ in range(50):
            info = store.info()
            assert info.used + info.free == info.file_size
            assert info.entries >= 1
        wait()
        assert store.info().last_transaction > before.last_transaction


COMMITS = """
import sys
from itertools import count
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1]) as store:
    for number in count():
        store.put_many({b"n": number, b"%d" % (number % 50): bytes(number % 9 * 900)})
        if number % 50 == 0:
            print(number, flush=True)
"""


@contextmanager
def commits_elsewhere(tmp_path):
    """Let another process commit as fast as it can; gives a wait for 50 commits."""
    command = [sys.executable, "-c", COMMITS, os.fspath(tmp_path / "db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:

        def wait():
            assert process.stdout.readline()

        try:
            wait()
            yield wait
        finally:
            process.kill()


TWO_COMMITS = """
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db") as store:
    for number in range(2):
        store.put_many({b"elsewhere": number})
"""


def test_figures_are_those_of_one_moment(open_store, run):
    store = open_store()
    store.put_many({b"a": 1})
    with at_call("stat", lambda: run(TWO_COMMITS), FIGURES):
        info = store.info()
    assert info.last_transaction == 3


def test_figures_without_an_end_of_commits(open_store, run, monkeypatch):
    store = open_store()
    store.put_many({b"a": 1})
    monkeypatch.setattr(_info, "_ATTEMPTS", 1)
    refused = pytest.raises(BusyError, match="without a pause")
    with at_call("stat", lambda: run(TWO_COMMITS), FIGURES), refused:
        store.info()


def test_figures_on_a_machine_of_another_kind(open_store, monkeypatch):
    store = open_store()
    store.put_many({b"%05d" % n: bytes(500) for n in range(100)})
    usual = store.info()
    monkeypatch.setattr(_info, "IS_KNOWN", False)
    assert store.info() == usual


# Copies


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_a_copy_has_all_entries_with_the_pending_writes(
    tmp_path, open_store, lib_version, compact
):
    store = open_store(lib_version=lib_version)
    fill(store)
    expected = dict(store.items())
    assert store.copy_to(tmp_path / "copy", compact=compact) is None
    assert store.write_buffer == {}
    assert dict(store.items()) == expected == content(tmp_path / "copy")
    assert names(tmp_path) == ["copy", "db"]
    assert names(tmp_path / "copy") == ["data.mdb", "lock.mdb"]  # by `content`
    assert is_usable(tmp_path / "copy")
    with LmdbObjectStore(tmp_path / "copy") as copy:
        assert copy.info().engine == store.info().engine
        assert dict(copy.items()) == expected


@pytest.mark.one_in(2)
@ENGINES
def test_a_compact_copy_has_no_free_pages(tmp_path, open_store, lib_version):
    store = open_store(lib_version=lib_version)
    store.put_many({b"%05d" % n: bytes(500) for n in range(3000)})
    store.delete_many(b"%05d" % n for n in range(2000))
    store.copy_to(tmp_path / "plain")
    store.copy_to(tmp_path / "compact", compact=True)
    plain = (tmp_path / "plain" / "data.mdb").stat().st_size
    compact = (tmp_path / "compact" / "data.mdb").stat().st_size
    assert compact < plain / 2
    with LmdbObjectStore(tmp_path / "compact") as copy:
        info, source = copy.info(), store.info()
        assert (info.free, info.entries) == (0, 1000)
        assert info.used < source.used
        assert info.last_transaction == source.last_transaction


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_a_copy_of_nothing(tmp_path, open_store, lib_version, compact):
    store = open_store(lib_version=lib_version)
    store.copy_to(tmp_path / "never committed", compact=compact)
    store[b"a"] = 1
    store.flush()
    store.clear()
    store.copy_to(tmp_path / "empty", compact=compact)
    for name in ("never committed", "empty"):
        assert content(tmp_path / name) == {}
        assert is_usable(tmp_path / name)


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_a_copy_of_large_values(tmp_path, open_store, lib_version, compact):
    store = open_store(lib_version=lib_version, map_size=2**20)
    value = random.Random(1).randbytes(5 * MIB)
    store.put_many({b"a": value, b"b": value[:4097], b"c": value[:-3]})
    reports = []
    store.copy_to(tmp_path / "copy", compact=compact, progress=report_to(reports))
    assert reports == sorted(reports)
    size = (tmp_path / "copy" / "data.mdb").stat().st_size
    assert reports[-1] == (size, size)
    assert {total for _, total in reports} == {size}
    if not compact:
        assert len(reports) > 2
    assert content(tmp_path / "copy") == dict(store.items())
    assert is_usable(tmp_path / "copy")


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_a_file_that_is_shorter_than_its_last_page(
    tmp_path, open_store, lib_version, compact
):
    path = tmp_path / "db"
    with lmdb.open(os.fspath(path), lib_version=lib_version) as env:
        for number in range(5):  # so that pages are free
            with env.begin(write=True) as txn:
                txn.put(b"kept", pickle.dumps(number))
        with env.begin(write=True) as txn:
            txn.put(b"gone", bytes(MIB))
            txn.delete(b"gone")
    store = open_store(readonly=True)
    end = (store.env.info()["last_pgno"] + 1) * 4096
    assert (path / "data.mdb").stat().st_size < end
    store.copy_to(tmp_path / "copy", compact=compact)
    assert content(tmp_path / "copy") == {b"kept": 4}
    assert is_usable(tmp_path / "copy")


@pytest.mark.one_in(2)
@KINDS
def test_a_store_in_a_file_is_copied_to_a_file(tmp_path, open_store, compact):
    store = open_store(subdir=False)
    fill(store)
    store.copy_to(tmp_path / "copy", compact=compact)
    assert names(tmp_path) == ["copy", "db", "db-lock"]
    assert content(tmp_path / "copy", subdir=False) == dict(store.items())
    assert is_usable(tmp_path / "copy", subdir=False)


@pytest.mark.one_in(2)
@KINDS
def test_a_handle_that_only_reads_copies_what_the_other_has_put(
    tmp_path, open_store, compact
):
    store = open_store()
    reader = open_store(readonly=True)
    store[b"pending"] = 1
    reader.copy_to(tmp_path / "copy", compact=compact)
    assert content(tmp_path / "copy") == {b"pending": 1}


@pytest.mark.one_in(2)
@KINDS
@pytest.mark.parametrize("lock", [True, False])
def test_a_process_that_only_reads_copies(tmp_path, open_store, compact, lock):
    with open_store() as store:
        fill(store)
        expected = dict(store.items())
    store = open_store(readonly=True, lock=lock)
    store.copy_to(tmp_path / "copy", compact=compact)
    assert content(tmp_path / "copy") == expected


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_named_databases_are_copied_too(tmp_path, open_store, lib_version, compact):
    with lmdb.open(
        os.fspath(tmp_path / "db"), max_dbs=2, lib_version=lib_version
    ) as env:
        for name, dupsort in [(b"plain", False), (b"dupsort", True)]:
            database = env.open_db(name, dupsort=dupsort)
            with env.begin(write=True, db=database) as txn:
                for number in range(2000):
                    txn.put(b"%d" % (number // 10), b"%05d" % number)
    store = open_store()
    store[b"own"] = 1
    store.copy_to(tmp_path / "copy", compact=compact)
    assert not verify(os.fspath(tmp_path / "copy"))
    with lmdb.open(os.fspath(tmp_path / "copy"), max_dbs=2) as env:
        with env.begin(db=env.open_db(b"plain")) as txn:
            assert txn.stat()["entries"] == 200
        with env.begin(db=env.open_db(b"dupsort", dupsort=True)) as txn:
            assert txn.stat()["entries"] == 2000


@pytest.mark.one_in(2)
@needs_posix
@KINDS
def test_a_copy_has_the_permissions_of_the_source(tmp_path, open_store, compact):
    store = open_store()
    store[b"a"] = 1
    (tmp_path / "db" / "data.mdb").chmod(0o640)
    store.copy_to(tmp_path / "copy", compact=compact)
    assert stat.S_IMODE((tmp_path / "copy" / "data.mdb").stat().st_mode) == 0o640


def test_the_path_of_a_copy_may_be_of_any_kind(tmp_path, open_store, monkeypatch):
    store = open_store()
    store[b"a"] = 1
    monkeypatch.chdir(tmp_path)
    store.copy_to("relative")
    store.copy_to(os.fsencode(tmp_path / "bytes"))
    for name in ("relative", "bytes"):
        assert content(tmp_path / name) == {b"a": 1}
    with pytest.raises((TypeError, ValueError)):
        store.copy_to("")
    assert names(tmp_path) == ["bytes", "db", "relative"]


def test_a_long_compaction_tells_how_far_it_is(tmp_path, open_store, in_children):
    store = open_store()
    store.put_many({b"%d" % n: bytes(MIB) for n in range(30)})
    in_children("from lmdb_object_store import _copying\n_copying._PAUSE = 1e-4")
    reports = []
    store.copy_to(tmp_path / "copy", compact=True, progress=report_to(reports))
    assert len(reports) > 2
    assert reports == sorted(reports)


# While the store is in use


@pytest.mark.one_in(4)
@ENGINES
@KINDS
def test_writes_and_growth_wait_for_no_copy_and_are_not_in_it(
    tmp_path, open_store, lib_version, compact
):
    store = open_store(lib_version=lib_version, map_size=2**19, timeout=0)
    store.put_many({b"%05d" % n: bytes(n) for n in range(500)})
    expected = dict(store.items())

    def write():
        before = store.info().map_size
        for number in range(20):
            store.put_many({b"%05d" % n: number for n in range(number * 20)})
        store.put_many({b"large": bytes(4 * MIB)})
        store.delete_many(store.keys(prefix=b"003"))
        assert store.info().map_size > before

    store.copy_to(tmp_path / "copy", compact=compact, progress=once(write))
    assert store[b"00001"] == 19
    assert content(tmp_path / "copy") == expected
    assert is_usable(tmp_path / "copy")


@pytest.mark.one_in(2)
@KINDS
def test_what_is_put_while_the_copy_is_made_stays_pending(
    tmp_path, open_store, compact
):
    store = open_store()
    store[b"a"] = 1
    put = once(lambda: store.put(b"b", 2))
    store.copy_to(tmp_path / "copy", compact=compact, progress=put)
    assert content(tmp_path / "copy") == {b"a": 1}
    assert store.write_buffer.keys() == {b"b"}


@pytest.mark.one_in(2)
@KINDS
def test_other_threads_put_during_copies(tmp_path, open_store, in_thread, compact):
    store = open_store(batch_size=7)
    store[b"n"] = 0
    going = threading.Event()
    going.set()

    def count_up():
        number = 0
        while going.is_set():
            number += 1
            store.put_many({b"n": number, b"m": number})
            store[b"other"] = number
        return number

    writer = in_thread(count_up)
    try:
        for number in range(3):
            store.copy_to(tmp_path / f"copy{number}", compact=compact)
    finally:
        going.clear()
    assert writer.result() > 0
    for number in range(3):
        found = content(tmp_path / f"copy{number}")
        assert found[b"n"] == found.get(b"m", 0)


@pytest.mark.one_in(2)
@KINDS
def test_copies_while_another_process_commits_all_the_time(
    tmp_path, open_store, compact
):
    store = open_store()
    store[b"n"] = 0
    store.flush()
    with commits_elsewhere(tmp_path) as wait:
        for number in range(3):
            wait()
            store.copy_to(tmp_path / f"copy{number}", compact=compact)
    for number in range(3):
        assert not verify(os.fspath(tmp_path / f"copy{number}"))
        assert b"n" in content(tmp_path / f"copy{number}")


def test_two_copies_at_once(tmp_path, open_store):
    store = open_store()
    fill(store)
    expected = dict(store.items())
    inner = once(lambda: store.copy_to(tmp_path / "inner", compact=True))
    store.copy_to(tmp_path / "outer", progress=inner)
    assert content(tmp_path / "inner") == content(tmp_path / "outer") == expected


@pytest.mark.one_in(2)
@KINDS
def test_the_store_may_be_closed_while_it_is_copied(tmp_path, open_store, compact):
    store = open_store()
    store[b"a"] = 1
    store.copy_to(tmp_path / "copy", compact=compact, progress=once(store.close))
    assert store.closed
    assert content(tmp_path / "copy") == {b"a": 1}


def test_a_snapshot_holds_up_no_copy(tmp_path, open_store):
    store = open_store(map_size=2**19)
    store[b"a"] = 1
    store.flush()
    with store.snapshot():
        store.copy_to(tmp_path / "copy")
        store[b"large"] = bytes(MIB)
        with pytest.raises(SnapshotOpenError):  # as of any flush
            store.copy_to(tmp_path / "refused")
    assert names(tmp_path) == ["copy", "db"]


def test_inside_a_block_no_copy_is_made(tmp_path, open_store, in_thread):
    store = open_store()
    refused = pytest.raises(BusyError, match=r"copy_to\(\) was called inside")
    with store.transaction(), refused:
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db"]


def test_a_closed_store_is_not_copied(tmp_path, open_store):
    store = open_store()
    store.close()
    with pytest.raises(ClosedError):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db"]


HOLD = """
import os, pickle, time

def hold():
    held = os.environ["HOLD"]
    with open(held + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.replace(held + ".new", held)
    while not os.path.exists(held + ".go"):
        time.sleep(0.02)

def dump(content, file):
    dump_now(content, file)
    if os.environ["HOLD_AT"] == "pinned" and content[0] == "progress":
        hold()

def fsync(descriptor):
    if os.environ["HOLD_AT"] == "copied":
        hold()
    sync_now(descriptor)

dump_now, pickle.dump = pickle.dump, dump
sync_now, os.fsync = os.fsync, fsync
"""


class Hold:
    """A child process that stops at a moment, until it may go on."""

    def __init__(self, folder, monkeypatch):
        self._held, self._patch = folder / "held", monkeypatch

    def at(self, moment, code=""):
        """Let it stop at its first report, or before it syncs the copy."""
        run_in_children(HOLD + code, self._held.parent, self._patch)
        self._patch.setenv("HOLD", os.fspath(self._held))
        self._patch.setenv("HOLD_AT", moment)

    def wait(self):
        """Wait until it stands still, and return its number."""
        eventually(self._held.exists)
        self._patch.undo()
        return int(self._held.read_text("ascii"))

    def go_on(self):
        self._held.with_name("held.go").touch()


@pytest.fixture
def in_children(tmp_path_factory, monkeypatch):
    """Offer to run some code in all interpreters that are started."""
    folder = tmp_path_factory.mktemp("children")
    return lambda code: run_in_children(code, folder, monkeypatch)


@pytest.fixture
def hold(tmp_path_factory, monkeypatch):
    holding = Hold(tmp_path_factory.mktemp("hold"), monkeypatch)
    yield holding
    holding.go_on()


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_others_write_between_the_moment_of_a_copy_and_its_reading(
    tmp_path, open_store, in_thread, run, hold, lib_version, compact
):
    store = open_store(lib_version=lib_version, map_size=2**19, timeout=0)
    fill(store)
    expected = dict(store.items())
    hold.at("pinned")
    copying = in_thread(lambda: store.copy_to(tmp_path / "copy", compact=compact))
    hold.wait()
    run(WRITES_AND_GROWS)
    for number in range(20):
        store.put_many({b"%05d" % n: number for n in range(number * 20)})
    store.put_many({b"large": bytes(4 * MIB)})
    assert store.info().readers == 1
    hold.go_on()
    copying.result()
    assert (store[b"elsewhere"], store[b"00001"]) == (99, 19)
    assert content(tmp_path / "copy") == expected
    assert not verify(os.fspath(tmp_path / "copy"))


WRITES_AND_GROWS = """
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db") as store:
    for number in range(100):
        store.put_many({b"elsewhere": number, b"00001": bytes(number * 100)})
    store.put_many({b"large": bytes(2**22)})
"""


COMMITS_AT_ONCE = f"""
import os, subprocess, sys
left = int(os.environ.pop("COMMITS", "0"))
def hook(frame, event, called):
    global left
    at = frame.f_code.co_name
    if event == "c_call" and at == {PINS!r} and called.__name__ == "info" and left:
        left -= 1
        script = os.path.join(os.environ["FOLDER"], "script.py")
        subprocess.run([sys.executable, script], cwd=os.path.dirname(script))
if left:
    sys.setprofile(hook)
"""


def test_another_process_has_grown_the_file_at_that_moment(
    tmp_path, open_store, in_children, monkeypatch
):
    store = open_store()
    store.put_many({b"a": 1})
    (tmp_path / "script.py").write_text(WRITES_AND_GROWS)
    monkeypatch.setenv("GROWS", os.fspath(tmp_path / "script.py"))
    in_children(GROWS_AT_ONCE)
    store.copy_to(tmp_path / "copy")
    assert content(tmp_path / "copy") == dict(store.items())
    assert store[b"elsewhere"] == 99


GROWS_AT_ONCE = f"""
import os, subprocess, sys
script = os.environ.pop("GROWS", "")
def hook(frame, event, called):
    at = frame.f_code.co_name
    if event == "c_call" and at == {BEGINS!r} and called.__name__ == "begin":
        sys.setprofile(None)
        subprocess.run([sys.executable, script], cwd=os.path.dirname(script))
if script:
    from lmdb_object_store import _files
    _files._LARGE_MAP = 2**16
    sys.setprofile(hook)
"""


@pytest.fixture
def commits_at_once(tmp_path, in_children, monkeypatch):
    """Let another process commit twice, so often, while a moment is pinned."""

    def commits_at_once(number):
        (tmp_path / "script.py").write_text(TWO_COMMITS)
        monkeypatch.setenv("FOLDER", os.fspath(tmp_path))
        monkeypatch.setenv("COMMITS", str(number))
        in_children(COMMITS_AT_ONCE)

    return commits_at_once


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_others_commit_while_the_moment_is_chosen(
    tmp_path, open_store, commits_at_once, lib_version, compact
):
    store = open_store(lib_version=lib_version)
    store.put_many({b"a": 1})
    commits_at_once(2)
    store.copy_to(tmp_path / "copy", compact=compact)
    assert content(tmp_path / "copy") == {b"a": 1, b"elsewhere": 1}
    with LmdbObjectStore(tmp_path / "copy") as copy:
        assert copy.info().last_transaction == 5


def test_others_commit_without_an_end(
    tmp_path, open_store, commits_at_once, in_children
):
    store = open_store()
    store.put_many({b"a": 1})
    commits_at_once(1)
    in_children(
        COMMITS_AT_ONCE
        + "if left:\n"
        + "    from lmdb_object_store import _copying\n"
        + "    _copying._ATTEMPTS = 1\n"
    )
    with pytest.raises(BusyError, match="write so often"):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db", "script.py"]


# What is there already


def test_nothing_is_overwritten(tmp_path, open_store):
    store = open_store()
    store[b"a"] = 1
    with open_store("other") as other:
        other[b"b"] = 2
    (tmp_path / "file").write_text("text")
    for name in ("other", "db"):
        with pytest.raises(FileExistsError, match="is there already"):
            store.copy_to(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        store.copy_to(tmp_path / "file")
    assert content(tmp_path / "other") == {b"b": 2}
    assert (tmp_path / "file").read_text() == "text"
    assert names(tmp_path) == ["db", "file", "other"]
    assert names(tmp_path / "other") == ["data.mdb", "lock.mdb"]


@needs_posix
def test_a_link_that_leads_nowhere_is_not_followed(tmp_path, open_store):
    store = open_store(subdir=False)
    store[b"a"] = 1
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        store.copy_to(tmp_path / "link")
    assert names(tmp_path) == ["db", "db-lock", "link"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("links", ["", "NO_LINKS"])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path, open_store, in_thread, hold, subdir, links
):
    store = open_store(subdir=subdir)
    store[b"a"] = 1
    file = tmp_path / "copy" / "data.mdb" if subdir else tmp_path / "copy"
    hold.at("copied", links and NO_LINKS)
    copying = in_thread(lambda: store.copy_to(tmp_path / "copy"))
    hold.wait()
    file.write_text("text", "ascii")
    hold.go_on()
    with pytest.raises(FileExistsError, match="is there already"):
        copying.result()
    assert file.read_text("ascii") == "text"
    assert names(tmp_path) == ["copy", "db"] if subdir else ["copy", "db", "db-lock"]


def test_a_directory_that_is_empty_is_used(tmp_path, open_store):
    store = open_store()
    store[b"a"] = 1
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "data.mdb.1234.part").touch()  # of a copy that was killed
    store.copy_to(tmp_path / "copy")
    assert content(tmp_path / "copy") == {b"a": 1}


def test_a_directory_of_others_is_not_used(tmp_path, open_store):
    store = open_store()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="has other files"):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path / "copy") == ["notes.txt"]


@pytest.mark.parametrize("subdir", [True, False])
def test_no_parents_are_made(tmp_path, open_store, subdir):
    store = open_store(subdir=subdir)
    store[b"a"] = 1
    with pytest.raises(FileNotFoundError):
        store.copy_to(tmp_path / "missing" / "copy")
    assert "missing" not in names(tmp_path)


NO_LINKS = """
import os
def link(*_):
    raise OSError("no links here")
os.link = link
"""


def test_a_file_system_without_hard_links(tmp_path, open_store, hold, in_thread):
    store = open_store()
    store[b"a"] = 1
    hold.at("copied", NO_LINKS)
    copying = in_thread(lambda: store.copy_to(tmp_path / "copy"))
    hold.wait()
    hold.go_on()
    copying.result()
    assert content(tmp_path / "copy") == {b"a": 1}
    assert not [name for name in names(tmp_path / "copy") if name.endswith(".part")]


# Copies that are not completed


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.one_in(4)
@pytest.mark.parametrize("subdir", [True, False])
@KINDS
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_callback_that_raises_leaves_nothing(
    tmp_path, open_store, subdir, compact, error
):
    store = open_store(subdir=subdir)
    fill(store)
    before = names(tmp_path)

    def progress(*_):
        raise error

    with pytest.raises(error):
        store.copy_to(tmp_path / "copy", compact=compact, progress=progress)
    assert names(tmp_path) == before
    store.copy_to(tmp_path / "copy", compact=compact)
    assert store.info().readers == 0  # that of the first copy is gone, too


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("subdir", [True, False])
def test_a_callback_that_raises_late_leaves_nothing(tmp_path, open_store, subdir):
    store = open_store(subdir=subdir)
    store[b"a"] = 1
    before = names(tmp_path)
    final = tmp_path / "copy" / "data.mdb" if subdir else tmp_path / "copy"

    def progress(done, total):
        if done == total:
            with suppress(AssertionError):  # it should never come so far
                eventually(final.exists, 0.3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.copy_to(tmp_path / "copy", progress=progress)
    assert names(tmp_path) == before


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(
    "error", [BrokenPipeError, EOFError, ConnectionResetError, pickle.UnpicklingError]
)
def test_the_error_of_a_callback_reaches_the_caller(tmp_path, open_store, error):
    store = open_store()
    store[b"a"] = 1

    def progress(*_):
        raise error("of the callback")

    with pytest.raises(error, match="of the callback"):
        store.copy_to(tmp_path / "copy", progress=progress)
    assert names(tmp_path) == ["db"]


@pytest.mark.usefixtures("_unmeasured")
def test_a_directory_that_was_there_stays_without_the_copy(tmp_path, open_store):
    store = open_store()
    store[b"a"] = 1
    (tmp_path / "copy").mkdir()
    with pytest.raises(ZeroDivisionError):
        store.copy_to(tmp_path / "copy", progress=lambda *_: 1 / 0)
    assert names(tmp_path / "copy") == []


@pytest.mark.one_in(2)
@needs_posix
@pytest.mark.usefixtures("_unmeasured")
@KINDS
@pytest.mark.parametrize("moment", ["pinned", "copied"])
def test_a_killed_child_leaves_nothing(
    tmp_path, open_store, in_thread, hold, compact, moment
):
    store = open_store()
    fill(store)
    hold.at(moment)
    copying = in_thread(lambda: store.copy_to(tmp_path / "copy", compact=compact))
    os.kill(hold.wait(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="has been ended, by -9"):
        copying.result()
    assert names(tmp_path) == ["db"]
    store.info()  # clears its slot
    assert (store.info().readers, store.info().dead_readers) == (0, 0)


COPIES = """
import os, sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", subdir=False)
def fork(done, total):
    if sys.argv[2] == "forks" and not os.fork():
        os.write(1, b"forked\\n")
        sys.stdin.read()
        os._exit(0)
store.copy_to("copy", compact=sys.argv[1] == "True", progress=fork)
"""


@pytest.mark.one_in(2)
@needs_posix
@KINDS
@pytest.mark.parametrize("moment", ["pinned", "copied"])
def test_with_a_killed_process_its_child_ends_and_removes_its_file(
    tmp_path, open_store, hold, compact, moment
):
    with open_store(subdir=False) as store:
        fill(store)
    hold.at(moment)
    command = [sys.executable, "-c", COPIES, str(compact), "alone"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        child = hold.wait()
        assert [name for name in names(tmp_path) if name.endswith(".part")]
        assert child != process.pid
        process.kill()
    eventually(lambda: not is_running(child))
    assert names(tmp_path) == ["db", "db-lock"]


@needs_fork
def test_a_forked_process_that_lives_on_keeps_no_copy_going(tmp_path, open_store, hold):
    with open_store(subdir=False) as store:
        fill(store)
    hold.at("copied")
    command = [sys.executable, "-c", COPIES, "False", "forks"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe) as process:
        child = hold.wait()
        assert process.stdout.readline() == b"forked\n"
        process.kill()
        eventually(lambda: not is_running(child), 5)
    assert names(tmp_path) == ["db", "db-lock"]


FULL = """
import os, subprocess, sys
from lmdb_object_store import DiskError, LmdbObjectStore, maintenance
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", "disk"], check=True)
store = LmdbObjectStore("db", lib_version=int(sys.argv[1]))
store.put_many({b"%d" % n: os.urandom(1000) for n in range(2000)})
try:
    store.copy_to("disk/copy", compact=sys.argv[2] == "True")
except DiskError as error:
    assert "could not be copied" in str(error), error
else:
    raise AssertionError("copied in spite of a full disk")
assert os.listdir("disk") == []
store.copy_to("copy")
store.close()
print("ok")
"""


@pytest.mark.one_in(2)
@ENGINES
@KINDS
def test_a_full_disk_is_told_of_and_nothing_is_left(
    tmp_path, small_disks, lib_version, compact
):
    command = [*MOUNT, sys.executable, "-c", FULL, str(lib_version), str(compact)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False
    )
    assert result.stdout == b"ok\n", result.stderr.decode()


LIMITED = """
import os, resource, sys
from lmdb_object_store import DiskError, LmdbObjectStore
store = LmdbObjectStore("db", lib_version=int(sys.argv[1]))
store.put_many({b"%d" % n: os.urandom(1000) for n in range(2000)})
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
try:
    store.copy_to("copy", compact=sys.argv[2] == "True")
except DiskError as error:
    print("DiskError", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.close()
print(sorted(os.listdir()))
"""


@pytest.mark.one_in(2)
@needs_posix
@ENGINES
@KINDS
def test_a_file_size_limit_is_told_of(run, lib_version, compact):
    told = run(LIMITED, lib_version, compact).stdout.splitlines()
    assert told[0].startswith("DiskError ")
    assert told[1:] == ["['db', 'script.py']"]


# Damage


@pytest.mark.one_in(4)
@ENGINES
@DAMAGE
def test_a_compact_copy_of_a_damaged_file(tmp_path, open_store, lib_version, damage):
    with open_store(lib_version=lib_version) as store:
        store.put_many({b"%05d" % n: bytes(500) for n in range(1000)})
    path = tmp_path / "db" / "data.mdb"
    content = damage_pages(path, range(2, path.stat().st_size // 4096), damage)
    store = open_store()
    with pytest.raises(CorruptedError, match="is damaged"):
        store.copy_to(tmp_path / "copy", compact=True)
    assert names(tmp_path) == ["db"]
    assert path.read_bytes() == content
    store.copy_to(tmp_path / "copy")  # has the damage, too
    assert verify(os.fspath(tmp_path / "copy"))
    assert (tmp_path / "copy" / "data.mdb").read_bytes()[8192:] == content[8192:]


@pytest.mark.one_in(2)
@needs_posix
@ENGINES
@KINDS
def test_a_file_that_is_cut_off_while_it_is_open(
    tmp_path, open_store, lib_version, compact
):
    store = open_store(lib_version=lib_version)
    store.put_many({b"%05d" % n: bytes(500) for n in range(3000)})
    os.truncate(tmp_path / "db" / "data.mdb", 50 * 4096)
    with pytest.raises(CorruptedError, match="is damaged"):
        store.copy_to(tmp_path / "copy", compact=compact)
    assert names(tmp_path) == ["db"]


@needs_posix
@pytest.mark.usefixtures("_unmeasured")
@ENGINES
def test_a_file_that_is_cut_off_while_it_is_copied(
    tmp_path, open_store, in_thread, hold, lib_version
):
    store = open_store(lib_version=lib_version)
    fill(store)
    file = tmp_path / "db" / "data.mdb"
    content = file.read_bytes()
    hold.at("pinned")
    copying = in_thread(lambda: store.copy_to(tmp_path / "copy", compact=True))
    hold.wait()
    os.truncate(file, 2 * 4096)
    hold.go_on()
    with pytest.raises(CorruptedError, match=r"ended the process.*by SIG"):
        copying.result()
    file.write_bytes(content)  # this process maps the file
    assert names(tmp_path) == ["db"]


@pytest.mark.one_in(2)
@ENGINES
def test_pages_that_are_neither_in_use_nor_free(tmp_path, with_long_list, lib_version):
    store = with_long_list(lib_version)
    damage_list(tmp_path / "db" / "data.mdb", lib_version, 2**64 - 1)  # no list
    with pytest.raises(CorruptedError, match="neither in use nor free"):
        store.copy_to(tmp_path / "copy", compact=True)
    assert names(tmp_path) == ["db"]


@pytest.mark.one_in(2)
@ENGINES
def test_a_value_that_would_be_longer_than_the_file(tmp_path, open_store, lib_version):
    store = open_store(lib_version=lib_version)
    store.put_many({b"the name": b"large" * 2000})
    store.close()
    file = tmp_path / "db" / "data.mdb"
    raw = bytearray(file.read_bytes())
    if lib_version:  # counts the pages of a value beside its key
        struct.pack_into("=Q", raw, raw.rfind(b"the name") + 8 + 16, 2000)
    else:
        page = raw.find(b"largelarge") // 4096
        struct.pack_into("=I", raw, page * 4096 + HEADER[0] - 4, 2000)
    file.write_bytes(raw)
    store = open_store()
    with pytest.raises(CorruptedError):
        store.copy_to(tmp_path / "copy", compact=True)
    assert names(tmp_path) == ["db"]


# The child process


@pytest.fixture
def set_executable():
    """Set the interpreter that child processes get, until the end of the test."""
    from multiprocessing import spawn

    before = spawn.get_executable()
    yield spawn.set_executable
    spawn.set_executable(before)


@needs_posix
@pytest.mark.parametrize("program", ["true", "echo"])
def test_an_interpreter_that_is_no_python(
    tmp_path, open_store, set_executable, program
):
    store = open_store()
    store[b"a"] = 1
    set_executable(shutil.which(program))
    with pytest.raises(RuntimeError, match=r"can't be started.*set_executable"):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db"]


def test_an_interpreter_that_is_not_there(tmp_path, open_store, set_executable):
    store = open_store()
    store[b"a"] = 1
    set_executable(os.fspath(tmp_path / "missing"))
    with pytest.raises((RuntimeError, FileNotFoundError)):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db"]


def test_a_program_without_an_interpreter(tmp_path, open_store, monkeypatch):
    store = open_store()
    store[b"a"] = 1
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(RuntimeError, match="has no Python interpreter"):
        store.copy_to(tmp_path / "copy")
    assert names(tmp_path) == ["db"]


def test_an_interpreter_whose_path_is_bytes(tmp_path, open_store, set_executable):
    store = open_store()
    store[b"a"] = 1
    set_executable(os.fsencode(sys.executable))
    store.copy_to(tmp_path / "copy")
    assert content(tmp_path / "copy") == {b"a": 1}


def test_what_every_interpreter_prints_disturbs_nothing(
    tmp_path, open_store, in_children
):
    in_children(
        "import atexit, os, sys\n"
        "print('hello')\n"
        "print('without an end', end='')\n"
        "print('line', flush=True)\n"
        "print('to stderr', file=sys.stderr)\n"
        "os.write(1, bytes(range(256)) * 300 + b'\\n')\n"
        "atexit.register(print, 'good bye')\n"
    )
    store = open_store()
    store[b"a"] = 1
    store.copy_to(tmp_path / "copy")
    assert content(tmp_path / "copy") == {b"a": 1}


UNGUARDED = """
from lmdb_object_store import LmdbObjectStore
print("begins")
store = LmdbObjectStore("db")
store[b"a"] = 1
store.copy_to("copy", progress=lambda done, total: None)
store.close()
"""


def test_a_script_needs_no_guard(tmp_path, run):
    result = run(UNGUARDED)
    assert (result.stdout, result.stderr) == ("begins\n", "")
    assert content(tmp_path / "copy") == {b"a": 1}


@needs_fork
def test_a_forked_child_makes_copies(tmp_path, run):
    run(FORKED)
    assert content(tmp_path / "copy") == {b"a": 1, b"b": 2}


FORKED = """
import os
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db") as store:
    store.put_many({b"a": 1})
    child = os.fork()
    if not child:
        try:
            store[b"b"] = 2
            store.copy_to("copy")
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_modules_beside_a_script_do_not_stand_in_for_others(tmp_path, run):
    for name in ("struct", "tempfile", "typing"):
        (tmp_path / "work" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "work" / f"{name}.py").write_text("raise ImportError")
    result = run("import os\nos.chdir('work')\n" + UNGUARDED.replace('"db"', '"../db"'))
    assert result.stderr == ""
    assert content(tmp_path / "work" / "copy") == {b"a": 1}


def test_reader_slots_that_are_taken_are_told_of(tmp_path, open_store):
    store = open_store(max_readers=1, timeout=0)
    store[b"a"] = 1
    store.flush()
    with store.env.begin(), pytest.raises(lmdb.ReadersFullError):
        store.copy_to(tmp_path / "copy")
    store.copy_to(tmp_path / "copy")


@pytest.mark.one_in(2)
@KINDS
def test_a_copy_on_a_machine_of_another_kind_is_compact(
    tmp_path, open_store, in_children, compact
):
    store = open_store()
    store.put_many({b"%05d" % n: bytes(500) for n in range(100)})
    store.delete_many(b"%05d" % n for n in range(90))
    in_children("from lmdb_object_store import _copying\n_copying.IS_KNOWN = False")
    store.copy_to(tmp_path / "copy", compact=compact)
    assert content(tmp_path / "copy") == dict(store.items())
    with LmdbObjectStore(tmp_path / "copy") as copy:
        assert copy.info().free == 0


@needs_posix
@pytest.mark.parametrize("gone", [True, False])
def test_no_other_file_is_copied_in_place_of_the_data_file(tmp_path, open_store, gone):
    with open_store("other") as other:
        other[b"other"] = 1
    store = open_store()
    store.put_many({b"a": 1})
    if gone:
        os.remove(tmp_path / "db" / "data.mdb")
    else:
        os.replace(tmp_path / "other" / "data.mdb", tmp_path / "db" / "data.mdb")
    for use in (lambda: store.copy_to(tmp_path / "copy"), store.info):
        with pytest.raises(ReplacedError):
            use()
    assert "copy" not in names(tmp_path)


@needs_posix
def test_a_file_that_is_replaced_before_the_child_opens_it_is_not_copied(
    tmp_path, open_store, in_children
):
    with open_store("other") as other:
        other[b"other"] = 1
    store = open_store()
    store.put_many({b"a": 1})
    source, target = (
        os.fspath(tmp_path / name / "data.mdb") for name in ("other", "db")
    )
    in_children(f"import os\nos.replace({source!r}, {target!r})")
    with pytest.raises(ReplacedError, match="another file"):
        store.copy_to(tmp_path / "copy")
    assert "copy" not in names(tmp_path)


def test_what_is_written_to_during_a_check_of_a_stranger(
    tmp_path, open_store, in_children
):
    """A file without a lock file, as for a user who can't lock, is not held still."""
    with open_store() as store:
        fill(store)
    file = tmp_path / "db" / "data.mdb"
    os.remove(tmp_path / "db" / "lock.mdb")
    damage_pages(file, range(2, 9), lambda _: bytes(4096))
    assert check(file).problems
    in_children(TOUCHES)
    with pytest.raises(BusyError, match="during the check"):
        check(file)


TOUCHES = """
import os
from lmdb_object_store import _copying
def touched(file, tell, problems_of=_copying.problems_of):
    os.utime(file)
    return problems_of(file, tell)
_copying.problems_of = touched
"""
