"""What is left after a kill, on a full disk, without memory, after a failed write."""

import logging
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import lmdb
import pytest

from conftest import MOUNT, PATIENCE, times
from lmdb_object_store import LmdbObjectStore

LINUX = sys.platform == "linux"
linux_only = pytest.mark.skipif(not LINUX, reason="needs Linux's rlimits and /proc")
ENGINES = pytest.mark.parametrize("lib_version", [0, 1])

MIB = 2**20
LARGE = 300 * 2**10  # is not copied out of the map before it is unpickled


def verify(path):
    """Let LMDB's own auditor look at every page of the file."""
    command = [sys.executable, "-m", "lmdb", "verify", str(path)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert run.stdout == "verify: OK\n", run.stdout + run.stderr


@pytest.fixture
def run(tmp_path):
    """Run a script in `tmp_path`, below `prefix`; it must end with ``print("ok")``."""

    def run(script, *arguments, prefix=()):
        command = [*prefix, sys.executable, "-c", textwrap.dedent(script)]
        result = subprocess.run(
            [*command, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr

    return run


# Killed

WRITE_FOR_EVER = """
import sys
from lmdb_object_store import LmdbObjectStore
path, lib_version, start, last = sys.argv[1], *map(int, sys.argv[2:])
store = LmdbObjectStore(path, 50, map_size=65536, lib_version=lib_version)
for number in range(start, 10**9):
    size = number * 37 % 4000
    store.put_many((b"many%d" % key, [number, bytes(size)]) for key in range(40))
    print("many", number, flush=True)
    for key in range(30):
        store.put(b"put%d" % key, [number, bytes(size)])
    store.delete(b"only%d" % last)
    store.put(b"only%d" % number, number)
    store.flush()
    last = number
    print("flush", number, flush=True)
"""


@pytest.mark.one_in(2)
@ENGINES
def test_kill_leaves_all_or_nothing_of_each_batch(tmp_path, lib_version):
    chance = random.Random(lib_version)
    path = tmp_path / "db"
    start, last = 0, -1
    for _ in range(times(4, thorough=20)):
        command = [sys.executable, "-c", WRITE_FOR_EVER, path, lib_version, start, last]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as child:
            try:
                # The child goes on writing while it is being killed.
                lines = [child.stdout.readline() for _ in range(chance.randint(3, 40))]
            finally:
                child.kill()
            lines.append(child.stdout.read())
        done = dict(re.findall(rb"(\w+) (\d+)\r?\n", b"".join(lines)))
        many, flushed = int(done[b"many"]), int(done[b"flush"])
        verify(path)
        with LmdbObjectStore(path) as store:
            found, missing = store.get_many(b"many%d" % key for key in range(40))
            numbers = {number for number, _ in found.values()}
            assert numbers in ({many}, {many + 1})
            assert not missing
            found, missing = store.get_many(b"put%d" % key for key in range(30))
            numbers = {number for number, _ in found.values()}
            assert numbers in ({flushed}, {flushed + 1})
            assert not missing
            (last,) = numbers
            only = [n for n in range(many + 2) if b"only%d" % n in store]
            assert only == [last]
        start = many + 2


DELETE_FOR_EVER = """
import sys
from lmdb_object_store import LmdbObjectStore
path, lib_version, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
store = LmdbObjectStore(path, 50, map_size=65536, lib_version=lib_version)
store.put_many({b"kept": 1})
for number in range(10**9):
    size = number * 37 % 4000
    store.put_many((b"many%d" % key, bytes(size)) for key in range(40))
    for key in range(30):
        store.put(b"many%d" % key, [number, bytes(size)])
    if how == "clear":
        store.clear()
        store.put_many({b"kept": 1})
    elif how == "range":
        assert store.delete_many(store.keys(b"many")) == 40
    else:
        assert store.delete_many(b"many%d" % key for key in range(50)) == 40
    print(number, flush=True)
"""


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("how", ["clear", "range", "list"])
def test_kill_leaves_all_or_nothing_of_what_is_deleted(tmp_path, lib_version, how):
    chance = random.Random(lib_version)
    path = tmp_path / "db"
    for _ in range(times(1, thorough=6)):
        command = [sys.executable, "-c", DELETE_FOR_EVER, path, lib_version, how]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE) as child:
            try:
                for _ in range(chance.randint(3, 40)):
                    assert child.stdout.readline()
            finally:
                child.kill()
        verify(path)
        with LmdbObjectStore(path) as store:
            assert len(store.keys(b"many")) in (0, 40)
            assert len(store) - len(store.keys(b"many")) == (b"kept" in store)
            if how != "clear":
                assert b"kept" in store


# Interrupted iterables


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_an_iterable_that_raises_leaves_nothing(open_store, error):
    store = open_store()
    store.put(b"pending", 1)

    def items():
        yield b"first", 1
        yield b"pending", 2
        raise error

    with pytest.raises(error):
        store.put_many(items())
    assert store.get_many([b"first", b"pending"]) == ({b"pending": 1}, [b"first"])
    store.put_many({b"first": 2})
    assert store[b"first"] == 2


# A full disk

FULL_DISK = """
import logging, os, subprocess, sys
import lmdb
from lmdb_object_store import LmdbObjectStore
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", "disk"], check=True)
with open("disk/ballast", "wb") as ballast:
    ballast.write(bytes(1 << 20))
logging.disable()
value = os.urandom(10_000)
store = LmdbObjectStore("disk/db", 10**6, lib_version=int(sys.argv[1]))
store.put_many({b"%d" % n: value for n in range(20)})
for n in range(20, 120):
    store.put(b"%d" % n, value)
store.delete(b"0")
before = dict(store.write_buffer)

def is_refused(action):
    try:
        action()
    except lmdb.DiskError as error:
        assert "disk" in str(error).lower(), error
    else:
        raise AssertionError("done in spite of a full disk")
    assert store.write_buffer == before
    assert store[b"1"] == store[b"119"] == value
    assert store.get(b"0") is None
    assert store.get_many([b"0", b"1", b"50"]) == ({b"1": value, b"50": value}, [b"0"])

is_refused(store.flush)
is_refused(store.flush)
is_refused(lambda: store.exists(b"1", flush=True))
is_refused(lambda: store.put_many({b"more": 1}))
assert b"more" not in store
store.batch_size = len(before) + 1
is_refused(lambda: store.put(b"more", 1))
os.unlink("disk/ballast")
"""


@ENGINES
def test_a_full_disk(run, small_disks, lib_version):
    freed = """
        store.put(b"more", 1)
        assert not store.write_buffer
        store.close(strict=True)
        with LmdbObjectStore("disk/db") as store:
            keys = [b"%d" % n for n in range(1, 120)]
            assert store.get_many(keys) == (dict.fromkeys(keys, value), [])
            assert b"0" not in store
        from lmdb.verify import verify
        assert not verify("disk/db")
        print("ok")
    """
    run(FULL_DISK + textwrap.dedent(freed), lib_version, prefix=MOUNT)


@ENGINES
@pytest.mark.parametrize("erase", ["store.clear()", "store.delete_many(store.keys())"])
def test_a_full_disk_can_be_cleared(run, small_disks, lib_version, erase):
    script = FULL_DISK.replace('os.unlink("disk/ballast")', erase) + textwrap.dedent("""
        assert (len(store), list(store), store.write_buffer) == (0, [], {})
        store.put_many({b"%d" % n: value for n in range(10)})
        store.close(strict=True)
        with LmdbObjectStore("disk/db") as store:
            assert len(store) == 10
        from lmdb.verify import verify
        assert not verify("disk/db")
        print("ok")
    """)
    run(script, lib_version, prefix=MOUNT)


def test_closing_on_a_full_disk_keeps_what_is_lost(run, small_disks):
    script = FULL_DISK.replace('os.unlink("disk/ballast")', "") + textwrap.dedent("""
        try:
            store.close(strict=True)
        except RuntimeError as error:
            assert isinstance(error.__cause__, lmdb.DiskError)
        else:
            raise AssertionError("lost in silence")
        assert store.closed
        assert store.write_buffer == before
        os.unlink("disk/ballast")
        with LmdbObjectStore("disk/db") as store:
            assert store.get_many([b"0", b"1"])[0] == {b"0": value, b"1": value}
            assert b"50" not in store
        print("ok")
    """)
    run(script, 0, prefix=MOUNT)


@pytest.mark.skipif(os.name == "nt", reason="needs rlimits")
@ENGINES
def test_a_file_size_limit(run, lib_version):
    run(
        """
        import resource, sys
        import lmdb
        from lmdb_object_store import LmdbObjectStore
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        store = LmdbObjectStore("db", lib_version=int(sys.argv[1]))
        store.put_many({b"stored": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        store.put(b"big", bytes(2**21))
        for _ in range(2):
            try:
                store.flush()
            except lmdb.Error:
                pass
            else:
                raise AssertionError("written in spite of the limit")
            assert list(store.write_buffer) == [b"big"]
            assert store[b"stored"] == 1
            assert len(store[b"big"]) == 2**21
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.flush()
        assert not store.write_buffer
        assert len(store[b"big"]) == 2**21
        store.close(strict=True)
        print("ok")
        """,
        lib_version,
    )


# No address space


@linux_only
@ENGINES
def test_a_growth_that_the_system_refuses(run, lib_version):
    run(
        """
        import resource, sys
        import lmdb
        from lmdb_object_store import LmdbObjectStore

        def limit_memory(extra):
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))

        large = b"x" * 300_000
        store = LmdbObjectStore("db", map_size=2**20, lib_version=int(sys.argv[1]))
        store.put_many({b"stored": 1, b"large": large})
        assert store[b"large"] == large
        store.put(b"big", bytes(2**20))
        limit_memory(2**25)
        for _ in range(3):
            for refused in store.flush, lambda: store.put_many({b"more": 1}):
                try:
                    refused()
                except lmdb.MapFullError as error:
                    assert "could not be grown" in str(error), error
                else:
                    raise AssertionError("grown in spite of the limit")
                assert list(store.write_buffer) == [b"big"]
                assert store[b"stored"] == 1
                assert store[b"large"] == large
                assert len(store[b"big"]) == 2**20
                found, missing = store.get_many([b"stored", b"big", b"more"])
                assert list(found) == [b"stored", b"big"] and missing == [b"more"]
        limit_memory(2**30)
        store.flush()
        assert not store.write_buffer
        store.put_many({b"more": 1})
        assert len(store[b"big"]) == 2**20 and store[b"more"] == 1
        store.close(strict=True)
        print("ok")
        """,
        lib_version,
    )


@linux_only
@ENGINES
def test_a_clear_for_which_the_map_can_not_grow(run, lib_version):
    run(
        """
        import resource, subprocess, sys
        import lmdb
        from lmdb_object_store import LmdbObjectStore

        def fill(size):
            while size > 1:
                try:
                    store.put_many({b"%d" % len(store): bytes(size)})
                except lmdb.MapFullError:
                    size //= 2

        store = LmdbObjectStore(
            "db", autoflush_on_read=False, map_size=2**20, lib_version=int(sys.argv[1])
        )
        store[b"first"] = 1
        store.flush()
        pipe = subprocess.PIPE
        reader = subprocess.Popen(
            [sys.executable, "-c", sys.argv[2]], stdin=pipe, stdout=pipe
        )
        reader.stdout.readline()  # no page that is freed from now on is used again
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, hard))
        fill(2**15)
        stored = len(store)
        store.put(b"pending", bytes(2**15))
        for erase in store.clear, lambda: store.delete_many(store.keys()):
            try:
                erase()
            except lmdb.MapFullError as error:
                assert "could not be grown" in str(error), error
            else:
                raise AssertionError("cleared without a page to write to")
            assert len(store) == stored + 1 == len(list(store))
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        store.clear()
        assert (len(store), store.write_buffer) == (0, {})
        store.close(strict=True)
        reader.communicate(b"\\n")
        print("ok")
        """,
        lib_version,
        "import lmdb\n"
        "with lmdb.open('db') as env, env.begin() as txn:\n"
        "    print(txn.id(), flush=True)\n"
        "    input()\n",
    )


# A write that fails in the middle


@pytest.fixture
def fail_writes_to():
    """Make every write to a file fail that goes through its synchronous descriptor.

    LMDB writes its meta pages through one of its own, and gives the environment
    up when that fails.
    """

    def fail_writes_to(path):
        path = os.path.realpath(path)
        fds = []
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue  # the descriptor of the listing itself
            info = Path(f"/proc/self/fdinfo/{name}")
            if target == path:
                flags = int(re.search(r"flags:\s*(\d+)", info.read_text())[1], 8)
                if flags & os.O_DSYNC:
                    fds.append(int(name))
        assert len(fds) == 1
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, fds[0])
        os.close(full)

    return fail_writes_to


@pytest.fixture
def panicked(open_store, fail_writes_to, lib_version):
    """Return a store whose environment LMDB has given up, and what it holds."""
    values = {b"small": 1, b"large": [1, b"x" * LARGE], b"changed": 1}
    store = open_store(lib_version=lib_version, timeout=0)
    store.put_many(values)
    assert store.get_many(values)[0] == values
    assert store[b"large"] == values[b"large"]
    fail_writes_to(store.env.path() + "/data.mdb")
    store.autoflush_on_read = False
    store.put(b"changed", 2)
    store.put(b"new", 3)
    with pytest.raises(lmdb.Error):
        store.flush()
    with pytest.raises(lmdb.PanicError):
        store.env.begin(write=True)
    assert store.write_buffer.keys() == {b"changed", b"new"}
    return store, {**values, b"changed": 2, b"new": 3}


def put_many(store):
    store.put_many({b"more": 1})
    return store[b"more"]


def remove(store):
    del store[b"small"]
    store.put(b"small", 1)
    return b"small" in store


def take(store):
    taken = store.pop(b"new"), store.pop(b"small"), store.setdefault(b"small", 1)
    store[b"new"] = taken[0]
    last = store.popitem()
    store.put(*last)
    return taken, last


def erase(store):
    values = dict(store)
    count = store.delete_many(store.keys(b"s"))
    store.clear()
    store.put_many(values)
    return count


@pytest.mark.one_in(4)
@linux_only
@ENGINES
@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda store: store[b"small"], 1),
        (lambda store: store[b"large"], [1, b"x" * LARGE]),
        (lambda store: store.get(b"none"), None),
        (lambda store: b"small" in store, True),
        (lambda store: store.get_many([b"small", b"new"])[0], {b"small": 1, b"new": 3}),
        (lambda store: store.flush(), None),
        (put_many, 1),
        (remove, True),
        (take, ((3, 1, 1), (b"small", 1))),
        (erase, 1),
        (sorted, [b"changed", b"large", b"new", b"small"]),
        (lambda store: next(reversed(store.items())), (b"small", 1)),
        (lambda store: (len(store), len(store.keys(b"n"))), (4, 1)),
    ],
    ids=[
        *("get", "large", "none", "in", "get_many", "flush", "put_many", "del"),
        *("pop", "clear", "keys", "items", "len"),
    ],
)
def test_an_environment_that_lmdb_gave_up_is_reopened(panicked, caplog, use, expected):
    store, values = panicked
    assert use(store) == expected
    assert store.get_many(values) == (values, [])
    store.flush()
    assert not store.write_buffer
    assert store.get_many(values) == (values, [])
    levels = {r.levelno for r in caplog.records if r.name == "lmdb_object_store"}
    assert logging.WARNING in levels
    store.close(strict=True)
    verify(store.db_path)
    with LmdbObjectStore(store.db_path) as again:
        assert again.get_many(values) == (values, [])


@linux_only
@ENGINES
def test_closing_reopens_and_flushes(panicked):
    store, values = panicked
    store.close(strict=True)
    with LmdbObjectStore(store.db_path) as again:
        assert again.get_many(values) == (values, [])


class Parked:
    waiting = threading.Event()
    released = threading.Event()

    def __setstate__(self, state):
        self.waiting.set()
        assert self.released.wait(PATIENCE)


@linux_only
@ENGINES
def test_a_read_in_progress_survives_the_reopening(
    open_store, in_thread, fail_writes_to, lib_version
):
    store = open_store(lib_version=lib_version, timeout=0)
    parked = Parked()
    parked.some = "state"
    store.put_many({b"k": [1, parked, b"x" * LARGE, 2], b"l": b"y" * LARGE})
    assert store[b"l"] == b"y" * LARGE
    fail_writes_to(store.env.path() + "/data.mdb")
    Parked.waiting.clear()
    Parked.released.clear()
    reader = in_thread(lambda: store[b"k"])
    assert Parked.waiting.wait(PATIENCE)
    store.put(b"k", 2)
    with pytest.raises(lmdb.Error):
        store.flush()
    for number in range(3):
        store.put_many({b"k": number, b"n": b"%d" % number * LARGE})
    assert reader.running
    Parked.released.set()
    first, _, blob, last = reader.result()
    assert (first, blob, last) == (1, b"x" * LARGE, 2)


@linux_only
@ENGINES
@pytest.mark.parametrize("replace", [False, True], ids=["deleted", "replaced"])
@pytest.mark.parametrize("read_first", [False, True])
def test_another_data_file_is_not_taken_for_the_own(
    panicked, tmp_path, replace, read_first
):
    store, _ = panicked
    data = Path(store.db_path, "data.mdb")
    data.rename(data.with_name("moved"))
    if replace:
        with LmdbObjectStore(tmp_path / "other") as other:
            other.put(b"small", "another store's")
        Path(other.db_path, "data.mdb").rename(data)
    uses = [lambda: store.get(b"small"), store.flush, lambda: store.put_many({b"x": 1})]
    for use in uses if read_first else reversed(uses):
        with pytest.raises(lmdb.Error, match="gone or was replaced"):
            use()
    assert store[b"changed"] == 2  # pending
    assert data.exists() == replace
    with pytest.raises(RuntimeError, match="Final flush failed"):
        store.close(strict=True)
    assert store.closed
    assert store.write_buffer.keys() == {b"changed", b"new"}
    if replace:
        with LmdbObjectStore(store.db_path) as other:
            assert other[b"small"] == "another store's"
            assert b"changed" not in other
