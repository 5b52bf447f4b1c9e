"""Compaction and checks of a data file, and what is saved of a damaged one."""

import os
import pickle
import random
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import lmdb
import pytest

from conftest import MOUNT, PATIENCE, eventually, is_running, needs_posix, times
from data_files import (
    DAMAGE,
    HEADER,
    PAGE,
    content,
    damage_pages,
    names,
    once,
    report_to,
    run_in_children,
)
from lmdb_object_store import (
    BusyError,
    CorruptedError,
    LmdbObjectStore,
    ReadersFullError,
    WrongFileError,
)
from lmdb_object_store.maintenance import check, compact, salvage
from lmdb_object_store.serializers import Bytes, Checked, Json, Pickle

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
MIB = 2**20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "db"


@pytest.fixture
def file(path):
    return path / "data.mdb"


def entries_of(count):
    return {b"%05d" % n: [n, "x" * (n * 37 % 500)] for n in range(count)}


def make(path, lib_version=0, count=1000, **options):
    """Make a store with free pages, and return its entries."""
    with LmdbObjectStore(path, lib_version=lib_version, **options) as store:
        store.put_many({b"gone%05d" % n: bytes(300) for n in range(count)})
        store.put_many({b"large": bytes(2 * PAGE), **entries_of(count)})
        store.delete_many(store.keys(prefix=b"gone"))
        store.put_many({b"last": count})
        return dict(store.items())


def assert_in_order(reports):
    """Check that reports go up to the total, which stays the same."""
    assert reports == sorted(reports)
    assert {total for _, total in reports} == {reports[-1][0]}


def metas(raw, lib_version):
    """Return (transaction, main root, list root) of both meta pages."""
    found = []
    for page in (0, 1):
        at = page * PAGE + HEADER[lib_version] + 24
        (free,) = struct.unpack_from("=Q", raw, at + 40)
        (main,) = struct.unpack_from("=Q", raw, at + 88)
        (number,) = struct.unpack_from("=Q", raw, at + 104)
        found.append((number, main, free))
    return max(found)


def leaf_of(file, key, lib_version):
    """Return the number of the page that has `key`, by the tree."""
    raw = file.read_bytes()
    head = HEADER[lib_version]
    base = head if lib_version else 0  # what offsets count from
    _, number, _ = metas(raw, lib_version)
    while True:
        page = raw[number * PAGE : (number + 1) * PAGE]
        flags, lower = struct.unpack_from("=HH", page, head - 6)
        if flags & 2:
            return number
        places = struct.unpack_from(f"={(lower + base - head) // 2}H", page, head)
        for index, place in enumerate(places):
            low, high, top, size = struct.unpack_from("=4H", page, base + place)
            name = page[base + place + 8 :][:size]
            if not index or name <= key:
                number = low | high << 16 | top << 32


# compact


@pytest.mark.one_in(2)
@ENGINES
def test_compaction_gives_space_back_and_keeps_all_entries(path, file, lib_version):
    expected = make(path, lib_version)
    with LmdbObjectStore(path) as store:
        before = store.info()
    size = file.stat().st_size
    assert before.free > 50 * PAGE
    reports = []
    saved = compact(path, progress=report_to(reports))
    assert saved == size - file.stat().st_size > 50 * PAGE
    assert_in_order(reports)
    assert reports[0] == (0, size)
    assert content(path) == expected
    assert names(path) == ["data.mdb", "lock.mdb"]
    with LmdbObjectStore(path) as store:
        info = store.info()
        assert (info.free, info.entries) == (0, before.entries)
        assert info.engine == before.engine
        assert info.last_transaction == before.last_transaction
        store.put_many({b"new": 1})
        assert store.info().last_transaction == before.last_transaction + 1
    assert content(path) == {**expected, b"new": 1}
    assert check(path).is_sound


@pytest.mark.one_in(2)
@ENGINES
def test_compaction_of_a_store_that_is_one_file(tmp_path, lib_version):
    expected = make(tmp_path / "db", lib_version, subdir=False)
    assert compact(tmp_path / "db") > 0
    assert names(tmp_path) == ["db", "db-lock"]
    assert content(tmp_path / "db", subdir=False) == expected


@pytest.mark.one_in(2)
@ENGINES
def test_compaction_of_an_empty_store(path, lib_version):
    LmdbObjectStore(path, lib_version=lib_version).close()
    compact(path)
    assert content(path) == {}
    with LmdbObjectStore(path) as store:
        store[b"a"] = 1
    assert compact(path) == 0
    assert content(path) == {b"a": 1}


@pytest.mark.one_in(2)
@ENGINES
def test_compaction_without_a_lock_file(path, lib_version):
    expected = make(path, lib_version)
    (path / "lock.mdb").unlink()
    assert compact(path) > 0
    assert content(path) == expected


@pytest.mark.one_in(2)
@ENGINES
def test_compaction_keeps_named_databases(path, lib_version):
    env = lmdb.open(os.fspath(path), max_dbs=1, lib_version=lib_version)
    with env, env.begin(write=True, db=env.open_db(b"name")) as txn:
        for number in range(1000):
            txn.put(b"%d" % number, bytes(number))
        for number in range(900):
            txn.delete(b"%d" % number)
    assert compact(os.fspath(path)) > 0
    env = lmdb.open(os.fspath(path), max_dbs=1)
    with env, env.begin(db=env.open_db(b"name")) as txn:
        assert [key for key, _ in txn.cursor()] == [b"%d" % n for n in range(900, 1000)]


@needs_posix
def test_compaction_keeps_the_permissions_and_the_owner(path, file):
    make(path)
    file.chmod(0o640)
    owner = (1234, 4321) if os.geteuid() == 0 else (os.geteuid(), file.stat().st_gid)
    os.chown(file, *owner)
    compact(path)
    status = file.stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert (status.st_uid, status.st_gid) == owner


@needs_posix
@pytest.mark.parametrize("subdir", [True, False])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_with_several_names_is_not_compacted(tmp_path, path, file, subdir, link):
    make(path)
    real = tmp_path / "real"
    file.rename(real)
    name = file if subdir else tmp_path / "name"
    link(real, name)
    # A store that is opened by the other name has another lock file.
    with LmdbObjectStore(real, subdir=False) as store:
        store[b"pending"] = 1
        with pytest.raises(WrongFileError, match="is a link, or has hard links"):
            compact(path if subdir else name)
        store.flush()


# compact: while the store is open


@pytest.mark.one_in(2)
@pytest.mark.parametrize("readonly", [False, True])
def test_a_store_that_is_open_here_is_not_compacted(path, file, readonly):
    make(path)
    before = file.read_bytes()
    with LmdbObjectStore(path, readonly=readonly) as store:
        with pytest.raises(BusyError, match="is open, in this process"):
            compact(path)
        assert store[b"00001"] == [1, "x" * 37]
    assert file.read_bytes() == before
    assert names(path) == ["data.mdb", "lock.mdb"]
    assert compact(path) > 0


OPENS = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore(sys.argv[1], readonly=sys.argv[2] == "True") as store:
    print("open", flush=True)
    sys.stdin.readline()
    assert store[b"last"] == 1000
    if not store.readonly:
        store.put_many({b"elsewhere": 1})
""".replace("store.readonly", "sys.argv[2] == 'True'")


def start(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def finish(process):
    """Let a process that waits for a line go on to its end."""
    process.communicate("\n", timeout=PATIENCE)
    assert process.returncode == 0


@pytest.mark.parametrize("readonly", [False, True])
def test_a_store_that_another_process_has_open_is_not_compacted(path, file, readonly):
    make(path)
    before = file.read_bytes()
    with start(OPENS, path, readonly) as other:
        assert other.stdout.readline()
        with pytest.raises(BusyError, match="or in another one"):
            compact(path)
        assert file.read_bytes() == before
        finish(other)
    assert names(path) == ["data.mdb", "lock.mdb"]
    assert compact(path) > 0


@needs_posix
def test_a_reader_that_opens_the_file_just_before_it_is_replaced(
    path, file, monkeypatch
):
    # 1. It has opened the data file, and is about to look at the lock file.
    # 2. A compaction puts another file in the place of that.
    expected = make(path)
    real = lmdb.open
    opened = []

    def open_and_replace(*arguments, **options):
        opened.append(real(*arguments, **options))
        if len(opened) == 1:
            (path / "copy").write_bytes(file.read_bytes())
            (path / "copy").replace(file)
        return opened[-1]

    monkeypatch.setattr(lmdb, "open", open_and_replace)
    with LmdbObjectStore(path, readonly=True) as store:
        assert len(opened) == 2
        assert dict(store.items()) == expected
        with start(OPENS, path, False) as other:
            finish(other)
        assert store[b"elsewhere"] == 1


HOLD = """
import os, time
real, count = os.fsync, 0
def fsync(descriptor):
    global count
    count += 1
    if count == int(os.environ["HOLD_AT"]):
        held = os.environ["HOLD"]
        with open(held + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.replace(held + ".new", held)
        while not os.path.exists(held + ".go"):
            time.sleep(0.02)
    real(descriptor)
os.fsync = fsync
"""


class Hold:
    def __init__(self, folder):
        self._held = folder / "held"

    def wait(self):
        """Wait until the child has stopped, and return its number."""
        eventually(self._held.exists)
        return int(self._held.read_text("ascii"))

    def go_on(self):
        self._held.with_name("held.go").touch()


@pytest.fixture
def hold(tmp_path_factory, monkeypatch):
    """Let the child of a compaction stop where it syncs for the first time.

    First it syncs the copy, then the directory in which that has taken its place.
    """
    folder = tmp_path_factory.mktemp("hold")
    run_in_children(HOLD, folder, monkeypatch)
    monkeypatch.setenv("HOLD", os.fspath(folder / "held"))
    monkeypatch.setenv("HOLD_AT", "1")
    holding = Hold(folder)
    yield holding
    holding.go_on()


MOMENTS = pytest.mark.parametrize("moment", ["1", "2"], ids=["copied", "replaced"])


@needs_posix
def test_a_process_that_opens_the_store_during_a_compaction_stops_it(
    path, in_thread, hold
):
    make(path)
    compacting = in_thread(lambda: compact(path))
    hold.wait()
    with start(OPENS, path, False) as other:
        assert other.stdout.readline()
        hold.go_on()
        with pytest.raises(BusyError):
            compacting.result()
        finish(other)
    assert content(path)[b"elsewhere"] == 1
    assert names(path) == ["data.mdb", "lock.mdb"]


@pytest.mark.one_in(2)
@ENGINES
def test_a_process_that_writes_and_closes_during_a_compaction_loses_nothing(
    path, file, in_thread, hold, lib_version
):
    expected = make(path, lib_version)
    compacting = in_thread(lambda: compact(path))
    hold.wait()
    with start(OPENS, path, False) as other:
        finish(other)
    hold.go_on()
    with pytest.raises(BusyError):
        compacting.result()
    assert content(path) == {**expected, b"elsewhere": 1}
    assert names(path) == ["data.mdb", "lock.mdb"]
    assert compact(path) > 0


def test_a_file_that_is_replaced_during_a_compaction_stays(
    tmp_path, path, file, in_thread, hold
):
    make(path)
    expected = make(tmp_path / "other", count=10)
    compacting = in_thread(lambda: compact(path))
    hold.wait()
    (tmp_path / "other" / "data.mdb").replace(file)
    hold.go_on()
    with pytest.raises(BusyError):
        compacting.result()
    assert content(path) == expected


@needs_posix
@MOMENTS
@pytest.mark.usefixtures("_unmeasured")
def test_a_killed_child_leaves_a_whole_file(
    path, file, monkeypatch, in_thread, hold, moment
):
    expected = make(path)
    size = file.stat().st_size
    monkeypatch.setenv("HOLD_AT", moment)
    compacting = in_thread(lambda: compact(path))
    os.kill(hold.wait(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="has been ended, by -9"):
        compacting.result()
    assert (file.stat().st_size < size) == (moment == "2")
    assert names(path) == ["data.mdb", "lock.mdb"]
    assert content(path) == expected
    assert check(path).is_sound


COMPACTS = """
import sys
from lmdb_object_store.maintenance import compact
compact("db")
"""


@needs_posix
@MOMENTS
def test_a_killed_process_leaves_a_whole_file(
    tmp_path, path, file, monkeypatch, hold, moment
):
    expected = make(path)
    size = file.stat().st_size
    monkeypatch.setenv("HOLD_AT", moment)
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen([sys.executable, "-c", COMPACTS]) as process:
        child = hold.wait()
        process.kill()
    eventually(lambda: not is_running(child))
    assert (file.stat().st_size < size) == (moment == "2")
    assert names(path) == ["data.mdb", "lock.mdb"]
    assert content(path) == expected
    assert check(path).is_sound


@pytest.mark.one_in(2)
@needs_posix
@ENGINES
def test_a_process_that_opens_the_store_while_its_file_is_replaced(
    path, monkeypatch, in_thread, hold, lib_version
):
    # The child stands between the replacement and the end of its lock.
    expected = make(path, lib_version)
    monkeypatch.setenv("HOLD_AT", "2")
    compacting = in_thread(lambda: compact(path))
    hold.wait()
    monkeypatch.undo()
    with start(OPENS, path, False) as other:
        hold.go_on()
        assert other.stdout.readline()
        assert compacting.result() > 0
        finish(other)
    assert content(path) == {**expected, b"elsewhere": 1}
    assert check(path).is_sound


def test_a_file_that_the_system_does_not_let_go(
    path, file, tmp_path_factory, monkeypatch
):
    make(path)
    before = file.read_bytes()
    code = """
import os
def replace(*_):
    raise PermissionError("it is open")  # as on Windows
os.replace = replace
"""
    run_in_children(code, tmp_path_factory.mktemp("children"), monkeypatch)
    with pytest.raises(BusyError, match="is open"):
        compact(path)
    assert file.read_bytes() == before
    assert names(path) == ["data.mdb", "lock.mdb"]


# compact: refused


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_callback_that_raises_leaves_the_file(path, file, error):
    make(path)
    before = file.read_bytes()

    def progress(*_):
        raise error

    with pytest.raises(error):
        compact(path, progress=progress)
    assert file.read_bytes() == before
    assert names(path) == ["data.mdb", "lock.mdb"]


@pytest.mark.one_in(4)
@ENGINES
@DAMAGE
def test_a_damaged_file_stays_as_it_is(path, file, lib_version, damage):
    make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)
    before = damage_pages(file, [leaf], damage)
    with pytest.raises(CorruptedError):
        compact(path)
    assert file.read_bytes() == before
    assert names(path) == ["data.mdb", "lock.mdb"]


def test_a_copy_that_is_not_sound_takes_no_place(path, file):
    make(path, 1)
    leaf = leaf_of(file, b"00500", 1)
    before = damage_pages(file, [leaf], lambda _: bytes(PAGE))  # LMDB 1.0 copies it
    with pytest.raises(CorruptedError, match="is not sound"):
        compact(path)
    assert file.read_bytes() == before


@pytest.mark.one_in(2)
@ENGINES
def test_a_cut_file_stays_as_it_is(path, file, lib_version):
    make(path, lib_version)
    os.truncate(file, file.stat().st_size // 2)
    before = file.read_bytes()
    with pytest.raises(CorruptedError):
        compact(path)
    assert file.read_bytes() == before
    assert "data.mdb" in names(path)
    assert not [name for name in names(path) if name.endswith(".part")]


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize(
    ("place", "error"),
    [(4, WrongFileError), (24 + 2 * 48 + 1, CorruptedError)],
    ids=["version", "last page"],
)
def test_a_damaged_meta_page(tmp_path, path, file, lib_version, place, error):
    make(path, lib_version)
    raw = bytearray(file.read_bytes())
    for page in (0, 1):
        raw[page * PAGE + HEADER[lib_version] + place] ^= 0xFF
        raw[page * PAGE + HEADER[lib_version] + place + 2] ^= 0xFF
    file.write_bytes(raw)
    with pytest.raises(error):
        compact(path)
    assert file.read_bytes() == raw
    assert check(path).problems
    assert salvage(path, tmp_path / "new").entries > 1000


@pytest.mark.parametrize("work", [compact, check, lambda path: salvage(path, "none")])
def test_where_there_is_no_store(tmp_path, path, work):
    for missing in (path, path / "deeper"):
        with pytest.raises(FileNotFoundError, match="There is no data file"):
            work(missing)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match="There is no data file"):
        work(path)
    assert names(tmp_path) == ["db"]
    assert names(path) == []


def make_sqlite(path):
    connection = sqlite3.connect(path)
    connection.execute("create table a(b)")
    connection.commit()
    connection.close()


OTHER_KINDS = pytest.mark.parametrize(
    "make_other",
    [
        make_sqlite,
        lambda path: path.write_text("some text " * 1000),
        lambda path: path.write_bytes(random.Random(1).randbytes(20 * PAGE)),
        lambda path: path.write_bytes(b"x"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(3 * PAGE)),
    ],
    ids=["sqlite", "text", "garbage", "short", "empty", "zeros"],
)


@pytest.mark.one_in(2)
@OTHER_KINDS
def test_a_file_of_another_kind_is_not_compacted(tmp_path, make_other):
    make_other(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(WrongFileError):
        compact(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert names(tmp_path) == ["file"]


FULL = """
import os, subprocess, sys
from lmdb_object_store import DiskError, LmdbObjectStore
from lmdb_object_store.maintenance import compact, salvage
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", "disk"], check=True)
with LmdbObjectStore("disk/db", lib_version=int(sys.argv[1])) as store:
    store.put_many({b"%d" % n: os.urandom(1000) for n in range(1200)})
with open("disk/db/data.mdb", "rb") as file:
    before = file.read()
for work in compact, lambda path: salvage(path, "disk/new"):
    try:
        work("disk/db")
    except DiskError as error:
        assert "disk" in str(error).lower() or "written" in str(error), error
    else:
        raise AssertionError("done in spite of a full disk")
    assert os.listdir("disk") == ["db"], os.listdir("disk")
    assert sorted(os.listdir("disk/db")) == ["data.mdb", "lock.mdb"]
    with open("disk/db/data.mdb", "rb") as file:
        assert file.read() == before
print("ok")
"""


@pytest.mark.one_in(2)
@ENGINES
def test_a_full_disk_is_told_of_and_nothing_has_changed(
    tmp_path, small_disks, lib_version
):
    command = [*MOUNT, sys.executable, "-c", FULL, str(lib_version)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False
    )
    assert result.stdout == b"ok\n", result.stderr.decode()


# check


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("subdir", [True, False])
def test_a_sound_file(path, lib_version, subdir):
    expected = make(path, lib_version, subdir=subdir)
    reports = []
    report = check(path, serializer=Pickle(), progress=report_to(reports))
    assert report.is_sound
    assert (report.problems, report.bad_values) == ([], {})
    assert report.values == len(expected)
    assert_in_order(reports)
    report = check(path)
    assert (report.is_sound, report.values) == (True, None)


def test_an_empty_store_is_sound(path):
    LmdbObjectStore(path).close()
    assert check(path, serializer=Pickle()).is_sound


@pytest.mark.one_in(2)
@ENGINES
def test_a_flipped_bit_in_a_value_is_named_by_its_key(path, file, lib_version):
    checked = Checked(Json())
    with LmdbObjectStore(path, lib_version=lib_version, serializer=checked) as store:
        store.put_many({b"%05d" % n: f"value {n:05}" for n in range(1000)})
        store.put_many({b"large": "large" * 5000})
    raw = bytearray(file.read_bytes())
    raw[raw.find(b"value 00123") + 7] ^= 1
    raw[raw.find(b"largelarge") + 9000] ^= 1
    file.write_bytes(raw)
    assert check(path).is_sound  # what a value means only its serializer knows
    report = check(path, serializer=checked)
    assert not report.is_sound
    assert report.problems == []
    assert report.values == 1001
    assert report.bad_values.keys() == {b"00123", b"large"}
    assert "'00123'" in report.bad_values[b"00123"]


class Gone:
    pass


def test_values_that_cannot_be_unpickled(path, monkeypatch):
    with LmdbObjectStore(path) as store:
        store.put_many({b"good": 1, b"gone": Gone()})
        with store.env.begin(write=True) as txn:
            txn.put(b"text", b"no pickle")
            txn.put(b"empty", b"")
    monkeypatch.delattr(sys.modules[__name__], "Gone")
    report = check(path, serializer=Pickle())
    assert report.problems == []
    assert report.bad_values.keys() == {b"gone", b"text", b"empty"}
    assert report.values == 4
    assert "'text'" in report.bad_values[b"text"]


class Loud:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_without_a_serializer_nothing_is_unpickled(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with LmdbObjectStore(path) as store:
        store[b"a"] = Loud()
    assert check(path).is_sound
    assert names(tmp_path) == ["db"]
    assert check(path, serializer=Bytes()).is_sound
    assert names(tmp_path) == ["db"]
    assert check(path, serializer=Pickle()).is_sound
    assert names(tmp_path) == ["db", "unpickled"]


@pytest.mark.one_in(4)
@ENGINES
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.001])
def test_a_cut_file_is_not_sound(path, file, lib_version, share):
    make(path, lib_version)
    os.truncate(file, int(file.stat().st_size * share))
    report = check(path, serializer=Pickle())
    assert report.problems
    assert report.values <= 1002


@pytest.mark.one_in(4)
@ENGINES
@DAMAGE
def test_a_damaged_page_is_not_sound(path, file, lib_version, damage):
    expected = make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)
    damage_pages(file, [leaf], damage)
    report = check(path, serializer=Pickle())
    assert report.problems
    assert len(expected) - 300 < report.values < len(expected)


@pytest.mark.one_in(2)
@OTHER_KINDS
def test_a_file_of_another_kind_is_not_sound(tmp_path, make_other):
    make_other(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    report = check(tmp_path / "file", serializer=Pickle())
    assert report.problems
    assert report.values == 0
    assert (tmp_path / "file").read_bytes() == before
    assert names(tmp_path) == ["file"]


def test_a_long_check_tells_how_far_it_is(path):
    with LmdbObjectStore(path) as store:
        store.put_many({b"%05d" % n: bytes(900) for n in range(6000)})
    reports = []
    assert check(path, serializer=Bytes(), progress=report_to(reports)).is_sound
    assert_in_order(reports)
    assert len(reports) > 7


FAILS = """
import lmdb.verify
def fail(*_, **__):
    raise ERROR("what it never met")
lmdb.verify.verify = fail
"""


@pytest.mark.parametrize("error", ["ZeroDivisionError", "PermissionError"])
def test_a_file_that_the_verifier_cannot_read(
    path, tmp_path_factory, monkeypatch, error
):
    make(path)
    code = FAILS.replace("ERROR", error)
    run_in_children(code, tmp_path_factory.mktemp("children"), monkeypatch)
    if error == "PermissionError":  # as another process has changed that
        with pytest.raises(PermissionError, match="what it never met"):
            check(path)
    else:
        [problem] = check(path).problems
        assert "can't read the file: ZeroDivisionError: what it never met" in problem


@needs_posix
def test_a_file_that_this_user_may_not_read():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "file")
        make(file, subdir=False)
        (file.parent / "file-lock").unlink()
        file.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                with pytest.raises(PermissionError):
                    check(file)
            finally:
                os.seteuid(0)
        else:
            with pytest.raises(PermissionError):
                check(file)


def test_a_check_makes_no_lock_file(tmp_path, path, file):
    make(path)
    file.rename(tmp_path / "file")
    assert check(tmp_path / "file").is_sound
    assert names(tmp_path) == ["db", "file"]


def test_a_check_has_the_pending_writes_of_this_process(path, file):
    with LmdbObjectStore(path, flush_interval=None) as store:
        store.put_many({b"a": 1})
        store[b"b"] = 2
        report = check(path, serializer=Pickle())
        assert (report.is_sound, report.values) == (True, 2)
        with store.transaction():
            store[b"c"] = 3
            assert check(path).is_sound


@pytest.mark.one_in(2)
@ENGINES
def test_a_check_of_a_file_that_another_process_writes_to(path, lib_version):
    make(path, lib_version, 300)
    with start(COMMITS, path) as other:
        try:
            for serializer in (None, Pickle(), None):
                assert other.stdout.readline()
                report = check(path, serializer=serializer)
                assert report.is_sound, report.problems
            assert report.values is None
        finally:
            other.kill()


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


@pytest.mark.one_in(2)
@ENGINES
def test_damage_is_found_while_another_process_writes(path, file, lib_version):
    make(path, lib_version, 300)
    damage_pages(file, [leaf_of(file, b"00150", lib_version)], lambda _: bytes(PAGE))
    with start(COMMITS_AT_END, path) as other:
        try:
            for _ in range(2):
                assert other.stdout.readline()
                assert check(path).problems
        finally:
            other.kill()


COMMITS_AT_END = COMMITS.replace('b"%d" %', 'b"z%d" %').replace('b"n"', 'b"zz"')


@ENGINES
def test_a_meta_page_that_is_written_during_the_check_is_no_damage(
    path, tmp_path_factory, monkeypatch, lib_version
):
    make(path, lib_version)
    code = HALF_WRITTEN.format(head=HEADER[lib_version], page=PAGE)
    run_in_children(code, tmp_path_factory.mktemp("children"), monkeypatch)
    assert check(path).problems == []
    with LmdbObjectStore(path) as store:
        assert store[b"written meanwhile"] == 1


# While the verifier runs for the first time, the meta page that is written next has its
# new number, and its old root's place names a meta page; then the commit ends.
HALF_WRITTEN = """
import subprocess, sys
from lmdb_object_store import _copying

WRITE = "import sys; from lmdb_object_store import LmdbObjectStore\\n"
WRITE += "with LmdbObjectStore(sys.argv[1]) as store: store[b'written meanwhile'] = 1"

def half_written(file, tell, problems_of=_copying.problems_of):
    _copying.problems_of = problems_of
    numbers = []
    with open(file, "r+b", buffering=0) as data:
        for page in (0, 1):
            data.seek(page * {page} + {head} + 24 + 104)
            numbers.append(int.from_bytes(data.read(8), sys.byteorder))
        place = numbers.index(min(numbers)) * {page} + {head} + 24 + 88
        data.seek(place)
        old = data.read(24)
        data.seek(place)
        data.write((1).to_bytes(8, sys.byteorder) + old[8:16])
        data.write((max(numbers) + 1).to_bytes(8, sys.byteorder))
        try:
            problems = problems_of(file, tell)
        finally:
            data.seek(place)
            data.write(old)
    assert problems
    subprocess.run([sys.executable, "-c", WRITE, file[: -len("data.mdb")]], check=True)
    return problems

_copying.problems_of = half_written
"""


def test_a_file_that_a_store_cannot_open_is_checked(path, file):
    with LmdbObjectStore(path, lib_version=0) as store:
        store.put_many({b"a": 1})
        with store.env.begin(write=True) as txn:
            txn.put(b"b", b"no pickle")
    raw = bytearray(file.read_bytes())
    for page in (0, 1):  # the main database compares keys from their ends
        raw[page * PAGE + HEADER[0] + 24 + 48 + 4] = 2
    file.write_bytes(raw)
    with pytest.raises(WrongFileError):
        LmdbObjectStore(path)
    report = check(path, serializer=Pickle())
    assert (report.problems, report.values) == ([], 2)
    assert report.bad_values.keys() == {b"b"}


def test_writes_wait_for_no_check(path):
    with LmdbObjectStore(path, map_size=2**19, timeout=0) as store:
        store.put_many({b"%d" % n: bytes(n) for n in range(500)})

        def write():
            for number in range(10):
                store.put_many({b"%d" % n: number for n in range(number * 50)})
            store.put_many({b"large": bytes(2 * MIB)})

        assert check(path, progress=once(write)).is_sound
        assert store[b"0"] == 9


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("serializer", [None, Pickle()])
def test_a_callback_that_raises_ends_the_check(path, error, serializer):
    make(path)

    def progress(done, total):
        if serializer is None or done > total / 2:
            raise error

    with pytest.raises(error):
        check(path, serializer=serializer, progress=progress)
    with LmdbObjectStore(path) as store:
        assert store.info().readers == 0


def damaged_somehow(raw, chance):
    """Return a file that is damaged in some way."""
    raw = bytearray(raw)
    how = chance.randrange(6)
    if how == 0:
        del raw[chance.randrange(len(raw)) :]
    for _ in range(chance.randint(1, 20)):
        place = chance.randrange(len(raw) or 1)
        if how == 1:  # anywhere
            raw[place : place + 1] = chance.randbytes(1)
        elif how == 2:  # in the first pages
            place %= 2 * PAGE
            raw[place : place + 4] = chance.randbytes(4)
        elif how == 3:  # in the heads of pages
            place = place // PAGE * PAGE + chance.randrange(64)
            raw[place : place + 2] = chance.choice(
                [b"\0\0", b"\xff\xff", chance.randbytes(2)]
            )
        elif how == 4:
            place = place // PAGE * PAGE
            raw[place : place + PAGE] = chance.randbytes(PAGE)
        elif how == 5:  # a page in the place of another
            other = chance.randrange(len(raw)) // PAGE * PAGE
            place = place // PAGE * PAGE
            raw[place : place + PAGE] = raw[other : other + PAGE]
    return bytes(raw)


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("part", range(2))
def test_any_damage_ends_in_a_report(tmp_path, path, file, lib_version, part):
    make(path, lib_version, 200)
    whole = file.read_bytes()
    chance = random.Random(lib_version * 2 + part)
    for number in range(times(2, thorough=20)):
        file.write_bytes(damaged_somehow(whole, chance))
        serializer = Json() if number % 2 else None
        report = check(path, serializer=serializer)
        assert report.is_sound == (not (report.problems or report.bad_values))
        saved = salvage(path, tmp_path / f"saved{number}")
        assert saved.entries <= 1000
        new = check(tmp_path / f"saved{number}")
        assert new.is_sound, new.problems


# salvage


@pytest.mark.one_in(2)
@ENGINES
def test_all_is_saved_of_a_whole_file(tmp_path, path, file, lib_version):
    expected = make(path, lib_version)
    before = file.read_bytes()
    reports = []
    report = salvage(path, tmp_path / "new", progress=report_to(reports))
    assert (report.entries, report.expected) == (len(expected), len(expected))
    assert (report.damage, report.uncertain, report.special) == (0, 0, 0)
    assert content(tmp_path / "new") == expected
    assert file.read_bytes() == before
    assert_in_order(reports)
    with LmdbObjectStore(path) as old, LmdbObjectStore(tmp_path / "new") as new:
        assert new.info().engine == old.info().engine


@pytest.mark.one_in(2)
@ENGINES
def test_of_a_file_a_file_is_saved(tmp_path, lib_version):
    expected = make(tmp_path / "db", lib_version, subdir=False)
    report = salvage(os.fspath(tmp_path / "db"), os.fsencode(tmp_path / "new"))
    assert report.entries == len(expected)
    assert names(tmp_path) == ["db", "db-lock", "new"]
    assert content(tmp_path / "new", subdir=False) == expected


@pytest.mark.one_in(2)
@ENGINES
def test_nothing_is_saved_of_an_empty_store(tmp_path, path, lib_version):
    LmdbObjectStore(path, lib_version=lib_version).close()
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.expected, report.damage) == (0, 0, 0)
    assert content(tmp_path / "new") == {}


@pytest.mark.one_in(2)
@ENGINES
def test_large_values_are_saved(tmp_path, path, lib_version):
    value = random.Random(1).randbytes(3 * MIB)
    expected = {b"a": value, b"b": value[:5000], b"c": value[: PAGE // 2]}
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many(expected)
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.damage) == (3, 0)
    assert content(tmp_path / "new") == expected


@needs_posix
def test_what_is_saved_has_the_permissions_of_the_source(tmp_path, path, file):
    make(path)
    file.chmod(0o600)
    salvage(path, tmp_path / "new")
    mode = (tmp_path / "new" / "data.mdb").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.one_in(2)
@ENGINES
@DAMAGE
def test_of_a_damaged_leaf_the_other_leaves_are_saved(
    tmp_path, path, file, lib_version, damage
):
    expected = make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)
    damage_pages(file, [leaf], damage)
    report = salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert all(expected[key] == value for key, value in found.items())
    assert len(expected) - 100 < len(found) == report.entries < len(expected)
    assert report.expected == len(expected)
    assert report.damage > 0
    assert report.uncertain == 0


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("part", ["main", "list"])
def test_a_root_page_is_lost(tmp_path, path, file, lib_version, part):
    expected = make(path, lib_version)
    _, main, free = metas(file.read_bytes(), lib_version)
    damage_pages(file, [main if part == "main" else free], lambda _: bytes(PAGE))
    report = salvage(path, tmp_path / "new")
    assert content(tmp_path / "new") == expected
    assert report.expected == report.entries == len(expected)
    assert (report.damage > 0) == (part == "main")
    assert report.uncertain == 0


@pytest.mark.one_in(2)
@ENGINES
def test_the_first_page_is_lost(tmp_path, path, file, lib_version):
    expected = make(path, lib_version)
    newest = metas(file.read_bytes(), lib_version)[0] & 1
    damage_pages(file, [newest], lambda _: bytes(PAGE))
    salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert all(found.get(key) == expected[key] for key in expected if key != b"last")


@pytest.mark.one_in(2)
@ENGINES
def test_both_first_pages_are_lost(tmp_path, path, file, lib_version):
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many(entries_of(1000))
    damage_pages(file, [0, 1], lambda _: bytes(PAGE))
    report = salvage(path, tmp_path / "new")
    assert report.expected is None
    assert report.entries == report.uncertain == 1000
    assert content(tmp_path / "new") == entries_of(1000)


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("share", [0.9, 0.5])
def test_of_a_cut_file_the_rest_is_saved(tmp_path, path, file, lib_version, share):
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many(entries_of(1000))
    os.truncate(file, int(file.stat().st_size * share))
    report = salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert all(value == entries_of(1000)[key] for key, value in found.items())
    assert report.expected == 1000
    assert 1000 * (share - 0.1) < report.entries == len(found) < 1000
    assert report.damage > 0


def churn(path, lib_version, reader=False):
    """Make a store whose file still has old values and deleted entries."""
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many({b"%05d" % n: "old" + "x" * 300 for n in range(500)})
        store.put_many({b"%05d" % n: "new" + "x" * 300 for n in range(400)})
        store.delete_many(b"%05d" % n for n in range(400, 500))
        return dict(store.items())


@pytest.mark.one_in(2)
@ENGINES
def test_old_values_and_deleted_entries_do_not_come_back(
    tmp_path, path, file, lib_version
):
    expected = churn(path, lib_version)
    raw = file.read_bytes()
    assert b"00450" in raw
    assert raw.count(b"00100") > 1
    _, main, _ = metas(raw, lib_version)
    damage_pages(file, [main], lambda _: bytes(PAGE))
    report = salvage(path, tmp_path / "new")
    assert content(tmp_path / "new") == expected
    assert (report.entries, report.uncertain) == (400, 0)


@pytest.mark.one_in(2)
@ENGINES
def test_without_the_list_of_free_pages_what_is_old_is_uncertain(
    tmp_path, path, file, lib_version
):
    expected = churn(path, lib_version)
    _, main, free = metas(file.read_bytes(), lib_version)
    damage_pages(file, [main, free], lambda _: bytes(PAGE))
    report = salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert found.keys() >= expected.keys()
    assert report.entries == len(found) == report.uncertain
    if lib_version:  # which tells the age of pages
        assert all(found[key] == value for key, value in expected.items())


@pytest.mark.one_in(2)
@ENGINES
def test_of_random_bytes_nothing_is_saved(tmp_path, lib_version):
    (tmp_path / "file").write_bytes(random.Random(lib_version).randbytes(50 * PAGE))
    with pytest.raises(WrongFileError, match="no page in it"):
        salvage(tmp_path / "file", tmp_path / "new")
    assert names(tmp_path) == ["file"]


@OTHER_KINDS
def test_of_a_file_of_another_kind_nothing_is_saved(tmp_path, make_other):
    make_other(tmp_path / "file")
    with pytest.raises(WrongFileError, match="no page in it"):
        salvage(tmp_path / "file", tmp_path / "new")
    assert names(tmp_path) == ["file"]


@pytest.mark.one_in(2)
@ENGINES
def test_named_databases_and_several_values_are_counted(tmp_path, path, lib_version):
    env = lmdb.open(os.fspath(path), max_dbs=3, lib_version=lib_version)
    with env:
        for name in (b"one", b"two"):
            database = env.open_db(name, dupsort=name == b"two")
            with env.begin(write=True, db=database) as txn:
                for number in range(5):
                    txn.put(b"key", b"%d" % number)
        with env.begin(write=True) as txn:
            txn.put(b"own", pickle.dumps(1))
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.special, report.damage) == (1, 2, 0)
    assert content(tmp_path / "new") == {b"own": 1}


def test_nothing_is_overwritten_by_what_is_saved(tmp_path, path):
    expected = make(path)
    other = make(tmp_path / "other", count=5)
    for target in (tmp_path / "other", path):
        with pytest.raises(FileExistsError, match="is there already"):
            salvage(path, target)
    assert content(tmp_path / "other") == other
    assert content(path) == expected


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("subdir", [True, False])
def test_a_callback_that_raises_leaves_no_new_store(tmp_path, path, error, subdir):
    make(path, count=5000, subdir=subdir)
    before = names(tmp_path)

    def progress(*_):
        raise error

    with pytest.raises(error):
        salvage(path, tmp_path / "new", progress=progress)
    assert names(tmp_path) == before


@pytest.mark.one_in(2)
@ENGINES
def test_a_size_that_is_too_large_to_be_true_takes_no_memory(
    tmp_path, path, file, lib_version
):
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many({b"a": 1, b"large": bytes(2 * PAGE), b"z": 2})
    raw = bytearray(file.read_bytes())
    at = raw.find(b"large")
    struct.pack_into("=HH", raw, at - 8, 0xFFFF, 0x7FFF)  # the size of the value
    file.write_bytes(raw)
    tracemalloc.start()
    report = salvage(path, tmp_path / "new")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * MIB
    assert (report.entries, report.damage) == (2, 1)
    assert content(tmp_path / "new") == {b"a": 1, b"z": 2}


def edit_page(file, number, edit):
    """Change a page of a file by ``edit(page)``."""
    raw = bytearray(file.read_bytes())
    page = raw[number * PAGE : (number + 1) * PAGE]
    edit(page)
    raw[number * PAGE : (number + 1) * PAGE] = page
    file.write_bytes(raw)


@pytest.mark.one_in(2)
@ENGINES
def test_a_leaf_that_says_it_has_more_entries_than_fit(
    tmp_path, path, file, lib_version
):
    expected = make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)
    place = HEADER[lib_version] - 4
    edit_page(file, leaf, lambda page: struct.pack_into("=H", page, place, 60_000))
    report = salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert found
    assert all(expected[key] == found[key] for key in found)
    assert report.entries == len(found) < report.expected
    assert report.damage > 0


@pytest.mark.one_in(2)
@ENGINES
def test_a_key_that_is_longer_than_keys_can_be(tmp_path, path, file, lib_version):
    expected = make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)

    def lengthen(page):  # that of the entry that was added last
        head = HEADER[lib_version]
        (upper,) = struct.unpack_from("=H", page, head - 2)
        at = upper + (head if lib_version else 0)
        struct.pack_into("=H", page, at + 6, 2000)

    edit_page(file, leaf, lengthen)
    report = salvage(path, tmp_path / "new")
    found = content(tmp_path / "new")
    assert len(expected.keys() - found.keys()) == 1
    assert all(expected[key] == found[key] for key in found)
    assert report.damage == 1


def edit_list(file, lib_version, edit):
    """Change the first record of the list of free pages."""
    _, _, number = metas(file.read_bytes(), lib_version)
    head = HEADER[lib_version]

    def edit_record(page):
        assert page[head - 6] & 2  # a leaf
        (place,) = struct.unpack_from("=H", page, head)
        at = place + (head if lib_version else 0) + 16
        edit(page, at)

    edit_page(file, number, edit_record)


@pytest.mark.one_in(2)
@ENGINES
def test_pages_that_are_in_use_and_free(tmp_path, path, file, lib_version):
    expected = make(path, lib_version)
    leaf = leaf_of(file, b"00500", lib_version)
    edit_list(
        file, lib_version, lambda page, at: struct.pack_into("=Q", page, at + 8, leaf)
    )
    report = salvage(path, tmp_path / "new")
    assert content(tmp_path / "new") == expected
    assert report.entries == report.expected
    assert 0 < report.uncertain < 50


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("count", [2**20, 2**62])
def test_a_list_of_free_pages_that_is_too_long_to_be_true(
    tmp_path, path, file, lib_version, count
):
    expected = churn(path, lib_version)
    edit_list(
        file, lib_version, lambda page, at: struct.pack_into("=Q", page, at, count)
    )
    with LmdbObjectStore(path) as store, pytest.raises(CorruptedError):
        store.info()
    assert check(path).problems
    report = salvage(path, tmp_path / "new")  # the tree is whole
    assert content(tmp_path / "new") == expected
    assert (report.damage, report.uncertain) == (0, 0)


def test_a_file_that_gets_shorter_meanwhile(tmp_path, path, file):
    with LmdbObjectStore(path) as store:
        store.put_many({b"%05d" % n: bytes(500) for n in range(5000)})
    damage_pages(file, [0, 1], lambda _: bytes(PAGE))
    cut = once(lambda: os.truncate(file, 100 * PAGE))
    report = salvage(path, tmp_path / "new", progress=cut)
    assert 500 < report.entries < 1000
    assert check(tmp_path / "new").is_sound


# Machines of another kind


def test_on_other_machines_pages_are_not_read(path, tmp_path, monkeypatch):
    from lmdb_object_store import maintenance

    make(path, count=5)
    monkeypatch.setattr(maintenance, "IS_KNOWN", False)
    for work in (compact, check, lambda path: salvage(path, tmp_path / "new")):
        with pytest.raises(NotImplementedError, match="little-endian"):
            work(path)


@pytest.mark.one_in(2)
@ENGINES
def test_what_was_never_committed_does_not_come_back_as_certain(
    tmp_path, path, file, lib_version
):
    with LmdbObjectStore(path, lib_version=lib_version) as store:
        store.put_many({b"%05d" % n: 1 for n in range(1000)})
        store.put_many({b"0": 1})
        head = file.read_bytes()[: 2 * PAGE]
        store.put_many({b"x%05d" % n: 2 for n in range(1000)})
    # As if the writer had been killed before the meta page, the last to be written.
    raw = bytearray(file.read_bytes())
    raw[: 2 * PAGE] = head
    file.write_bytes(raw)
    leaf = leaf_of(file, b"00500", lib_version)
    raw[leaf * PAGE : (leaf + 1) * PAGE] = bytes(PAGE)
    file.write_bytes(raw)
    report = salvage(path, tmp_path / "new")
    certain = report.entries - report.uncertain
    assert report.damage == 1
    assert 500 < certain < report.expected == 1001
    assert report.uncertain > 0


@pytest.mark.one_in(2)
@ENGINES
def test_values_that_share_their_pages_are_saved_once(
    tmp_path, path, file, lib_version
):
    with LmdbObjectStore(path, serializer=Bytes(), lib_version=lib_version) as store:
        store.put_many({b"first!": bytes(3 * PAGE), b"second": b"\1" * (3 * PAGE)})
    raw = bytearray(file.read_bytes())
    first, second = (raw.rfind(key) + 6 for key in (b"first!", b"second"))
    raw[second : second + 8] = raw[first : first + 8]
    file.write_bytes(raw)
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.damage) == (1, 1)
    assert content(tmp_path / "new", serializer=Bytes()) == {b"first!": bytes(3 * PAGE)}


@needs_posix
def test_a_directory_is_as_private_as_that_of_the_source(tmp_path, path):
    make(path)
    path.chmod(0o700)
    salvage(path, tmp_path / "saved")
    with LmdbObjectStore(path) as store:
        store.copy_to(tmp_path / "copy")
    for name in ("saved", "copy"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_many_entries_are_saved(tmp_path, path):
    with LmdbObjectStore(path) as store:
        store.put_many({b"%05d" % n: None for n in range(25_000)})
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.expected) == (25_000, 25_000)


@pytest.mark.one_in(2)
@ENGINES
def test_values_that_look_like_a_list_of_pages_are_saved(
    tmp_path, path, file, lib_version
):
    with LmdbObjectStore(path, serializer=Bytes(), lib_version=lib_version) as store:
        store.put_many({b"%05d" % n: bytes(8) for n in range(1000)})
    raw = bytearray(file.read_bytes())
    _, root, _ = metas(raw, lib_version)
    raw[root * PAGE : (root + 1) * PAGE] = bytes(PAGE)
    file.write_bytes(raw)
    assert salvage(path, tmp_path / "new").entries == 1000


@pytest.mark.one_in(2)
@ENGINES
def test_many_values_of_equal_size_under_a_key_are_left_out(
    tmp_path, path, lib_version
):
    with lmdb.open(os.fspath(path), max_dbs=1, lib_version=lib_version) as env:
        database = env.open_db(b"many", dupsort=True, dupfixed=True)
        with env.begin(write=True) as txn:
            txn.put(b"one", b"value")
            for number in range(5000):
                txn.put(b"key", b"%08d" % number, db=database)
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.damage, report.special) == (1, 0, 1)


def test_a_check_needs_a_reader_slot(path):
    with LmdbObjectStore(path, max_readers=1) as store:
        store[b"a"] = 1
        with store.snapshot(), pytest.raises(ReadersFullError, match="reader slots"):
            check(path)
        assert check(path).is_sound


def test_the_data_file_of_a_directory_has_the_lock_file_of_that(path, file):
    make(path)
    with LmdbObjectStore(path):
        with pytest.raises(BusyError, match="is open"):
            compact(file)
        assert check(file).is_sound
    assert compact(file) > 0
    assert names(path) == ["data.mdb", "lock.mdb"]


@pytest.mark.parametrize("work", [compact, check, lambda path: salvage(path, "none")])
def test_a_lock_file_is_not_opened(path, work):
    make(path)
    with pytest.raises(WrongFileError, match="lock file"):
        work(path / "lock.mdb")


def test_a_key_that_is_too_long_for_the_new_store_is_damage(tmp_path, path, file):
    expected = make(path)
    raw = bytearray(file.read_bytes())
    leaf = leaf_of(file, b"00500", 0) * PAGE
    (lower,) = struct.unpack_from("=H", raw, leaf + 12)
    places = struct.unpack_from(f"={(lower - 16) // 2}H", raw, leaf + 16)
    at = leaf + min(places)
    assert min(places) < PAGE - 700
    struct.pack_into("=H", raw, at, 0)  # the size of the value
    struct.pack_into("=H", raw, at + 6, 600)  # that of the key
    file.write_bytes(raw)
    report = salvage(path, tmp_path / "new")
    assert (report.entries, report.damage) == (len(expected) - 1, 1)
