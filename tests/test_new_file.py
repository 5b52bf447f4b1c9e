"""A new store is on disk when the constructor returns: its file, and where that is."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from functools import partial

import lmdb
import pytest

from conftest import PATIENCE
from lmdb_object_store import DiskError, LmdbObjectStore
from moments import Parked, is_method

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
LINUX = sys.platform == "linux"
linux_only = pytest.mark.skipif(not LINUX, reason="needs Linux's /proc")
posix_only = pytest.mark.skipif(
    os.name == "nt", reason="Windows opens no directories, and NTFS keeps a journal"
)


@pytest.fixture
def syncs(monkeypatch):
    """Return the calls of an action that make something durable, in order.

    A directory is named by its path, the environment as "sync".
    """
    calls = []
    fsync = os.fsync

    def note(descriptor):
        calls.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def hook(frame, event, function):
        if event == "c_call" and is_method(function, "sync"):
            calls.append("sync")

    def syncs(action):
        calls.clear()
        sys.setprofile(hook)
        try:
            result = action()
        finally:
            sys.setprofile(None)
        return result, list(calls)

    monkeypatch.setattr(os, "fsync", note)
    return syncs


def number(path):
    return os.stat(path).st_ino


# What is synced, and when


@posix_only
@ENGINES
@pytest.mark.parametrize("sync", [True, False])
def test_file_and_folders_are_synced_before_the_constructor_returns(
    open_store, tmp_path, syncs, lib_version, sync
):
    store, calls = syncs(lambda: open_store(lib_version=lib_version, sync=sync))
    folders = {number(tmp_path), number(tmp_path / "db")}
    assert set(calls[:-1]) == folders
    assert calls[-1] == "sync"
    assert len(calls) == 3
    store[b"a"] = 1
    assert syncs(lambda: store[b"a"])[1] == []


@posix_only
@ENGINES
def test_a_file_without_a_folder_of_its_own(open_store, tmp_path, syncs, lib_version):
    action = partial(open_store, "file", subdir=False, lib_version=lib_version)
    assert syncs(action)[1] == [number(tmp_path), "sync"]


@posix_only
def test_a_relative_path_is_synced_where_it_leads_to(
    open_store, tmp_path, monkeypatch, syncs
):
    monkeypatch.chdir(tmp_path)
    store, calls = syncs(lambda: LmdbObjectStore("db"))
    store.close()
    assert set(calls) == {number(tmp_path), number(tmp_path / "db"), "sync"}
    store, calls = syncs(lambda: LmdbObjectStore("file", subdir=False))
    store.close()
    assert calls == [number(tmp_path), "sync"]


@posix_only
def test_a_folder_that_was_there_before(open_store, tmp_path, syncs):
    (tmp_path / "db").mkdir()
    _, calls = syncs(open_store)
    assert set(calls[:-1]) >= {number(tmp_path / "db")}
    assert calls[-1] == "sync"


@posix_only
def test_a_folder_behind_a_link(open_store, tmp_path, syncs):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    _, calls = syncs(lambda: open_store("link"))
    assert number(tmp_path / "folder") in calls
    assert calls[-1] == "sync"


@posix_only
@pytest.mark.parametrize("link", ["link", "db/data.mdb"])
def test_a_file_that_is_made_behind_a_link(open_store, tmp_path, syncs, link):
    (tmp_path / "folder").mkdir()
    (tmp_path / "db").mkdir()
    (tmp_path / link).symlink_to(tmp_path / "folder" / "file")
    options = {"subdir": False} if link == "link" else {}
    name = "link" if link == "link" else "db"
    _, calls = syncs(lambda: open_store(name, **options))
    assert (tmp_path / "folder" / "file").exists()
    assert number(tmp_path / "folder") in calls


@ENGINES
def test_an_existing_file_is_not_synced_again(open_store, syncs, lib_version):
    with open_store(lib_version=lib_version) as store:
        store[b"a"] = 1
    assert syncs(lambda: open_store(lib_version=lib_version))[1] == []


@ENGINES
def test_nothing_is_synced_to_read(open_store, syncs, lib_version):
    open_store(lib_version=lib_version).close()
    store, calls = syncs(lambda: open_store(readonly=True, lib_version=lib_version))
    assert calls == []
    assert syncs(store.close)[1] == []


def test_a_file_that_has_no_commit_yet_counts_as_new(open_store, syncs):
    # Who made it may have been killed before it was durable.
    open_store().close()
    assert syncs(open_store)[1][-1:] == ["sync"]


def test_a_further_store_of_the_process_syncs_nothing(open_store, syncs):
    open_store()
    assert syncs(open_store)[1] == []
    assert syncs(lambda: open_store(readonly=True))[1] == []


def test_nobody_gets_the_store_before_it_is_synced(open_store, in_thread):
    second = threading.Event()

    def open_second():
        store = open_store()
        second.set()
        return store

    with Parked(in_thread, "sync", open_store) as opening:
        other = in_thread(open_second)
        other.wait_until_in("__init__")
        assert not second.is_set()
        opening.release()
        assert other.result().get(b"a") is None


TRACED = """
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", lib_version={lib_version}, sync=False)
open("opened", "w").close()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@ENGINES
def test_the_system_is_told(tmp_path, lib_version):
    script = TRACED.format(lib_version=lib_version)
    traced = ["strace", "-f", "-y", "-o", "trace", "-e"]
    traced += ["trace=fsync,fdatasync,msync,sync_file_range,open,openat"]
    command = [*traced, sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(
        command, cwd=tmp_path, timeout=PATIENCE, capture_output=True, check=False
    )
    trace = (tmp_path / "trace").read_text("utf-8", "replace")
    if "fsync" not in trace and run.returncode:
        pytest.skip("strace may not be used here")
    assert run.returncode == 0, run.stderr
    before = trace.partition('"opened"')[0]
    folder = os.path.realpath(tmp_path)
    synced = [line for line in before.splitlines() if "sync(" in line]
    for path in (folder, f"{folder}/db", f"{folder}/db/data.mdb"):
        assert any(f"<{path}>" in line for line in synced), path


# What can go wrong

DENIED = """
import os, sys
from lmdb_object_store import LmdbObjectStore
path, denied, subdir = sys.argv[1:]
try:
    os.listdir(denied)
except PermissionError:
    with LmdbObjectStore(path, subdir=bool(subdir)) as store:
        store[b"a"] = 1
    with LmdbObjectStore(path, subdir=bool(subdir)) as store:
        assert store[b"a"] == 1
    print("opened")
else:
    print("not denied")
"""


@posix_only
@pytest.mark.parametrize(
    ("path", "denied"), [("up/db", "up"), ("db", "db"), ("up/file", "up")]
)
def test_a_folder_that_may_be_written_but_not_read(tmp_path, path, denied):
    # Only who may read a directory can sync it.
    (tmp_path / denied).mkdir()
    (tmp_path / denied).chmod(0o300)
    prefix = []
    if os.geteuid() == 0:  # who may read everything
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv or another user")
        prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    arguments = [path, denied, "" if path.endswith("file") else "subdir"]
    result = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", DENIED, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    (tmp_path / denied).chmod(0o700)
    if "not denied" in result.stdout or "setpriv" in result.stderr:
        pytest.skip("permissions can't be taken away here")
    assert (result.stdout, result.returncode) == ("opened\n", 0), result.stderr


@posix_only
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("subdir", [True, False])
def test_a_failing_disk_is_told_and_nothing_stays_open(
    open_store, tmp_path, monkeypatch, syncs, code, subdir
):
    # No disk fails on demand.
    with monkeypatch.context() as patch:

        def fail(descriptor):
            raise OSError(code, os.strerror(code))

        patch.setattr(os, "fsync", fail)
        descriptors = len(os.listdir("/proc/self/fd")) if LINUX else 0
        with pytest.raises(DiskError, match=r"can't be synced") as info:
            open_store(subdir=subdir)
        assert str(tmp_path) in str(info.value)
        assert os.strerror(code) in str(info.value)
        assert isinstance(info.value.__cause__, OSError)
        if LINUX:
            assert len(os.listdir("/proc/self/fd")) == descriptors
    store, calls = syncs(lambda: open_store(subdir=subdir, max_dbs=1))
    assert calls[-1] == "sync"  # what failed before is done now
    store[b"a"] = 1
    store.close(strict=True)


@linux_only
def test_a_folder_that_can_not_be_opened_for_want_of_descriptors(tmp_path, run):
    result = run("""
import os, resource
from lmdb_object_store import LmdbObjectStore

def used():
    return len(os.listdir("/proc/self/fd"))

LmdbObjectStore("first").close()
before, outcomes = used(), []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for spare in range(12):
    name = f"db {spare}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + spare, hard))
    try:
        LmdbObjectStore(name).close()
        outcomes.append("opened")
    except Exception as error:
        outcomes.append(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert used() == before
    with LmdbObjectStore(name, max_dbs=1) as store:  # which is not open
        store[b"a"] = 1
assert outcomes[0] != "opened" and outcomes[-1] == "opened", outcomes
print(outcomes)
""")
    assert "opened" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("lib_version", [0, 1])
def test_a_sync_of_the_file_that_fails_leaves_nothing_open(
    open_store, tmp_path, in_thread, lib_version
):
    def hook(frame, event, function):
        if event == "c_call" and is_method(function, "sync"):
            sys.setprofile(None)
            raise lmdb.DiskError

    def fail():
        sys.setprofile(hook)
        try:
            open_store(lib_version=lib_version)
        finally:
            sys.setprofile(None)

    with pytest.raises(lmdb.DiskError):
        in_thread(fail).result()
    with open_store(lib_version=lib_version, max_dbs=1) as store:
        store[b"a"] = 1
    assert open_store()[b"a"] == 1


KILLED = """
import os, sys, threading
from lmdb_object_store import LmdbObjectStore
calls = 0

def hook(frame, event, function):
    global calls
    if event == "c_call" and function.__name__ in ("fsync", "sync", "reader_check"):
        calls += 1
        if calls > int(sys.argv[1]):
            os.kill(os.getpid(), 9)

sys.setprofile(hook)
LmdbObjectStore("db", lib_version=int(sys.argv[2]))
"""


@posix_only
@ENGINES
def test_killed_while_it_is_made(tmp_path, run, open_store, syncs, lib_version):
    for calls in range(4):
        run(KILLED, calls, lib_version, returncode=-9)
        store, made = syncs(lambda: open_store(lib_version=lib_version))
        assert made[-1] == "sync"
        store.close()
        shutil.rmtree(tmp_path / "db")


def test_the_parent_folder_has_to_be_there(open_store, tmp_path):
    with pytest.raises((lmdb.Error, OSError)):
        open_store(os.path.join("missing", "db"))
    assert not any(tmp_path.iterdir())
    with open_store() as store:
        store[b"a"] = 1


def test_a_folder_that_does_not_take_a_sync(open_store, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    open_store()[b"a"] = 1
