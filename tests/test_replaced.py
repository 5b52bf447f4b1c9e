"""Files that are deleted, moved or replaced while a store has them open."""

import os
import shutil
from contextlib import suppress

import pytest

from conftest import PATIENCE
from lmdb_object_store import (
    ClosedError,
    LmdbObjectStore,
    LostWritesError,
    ReplacedError,
)

pytestmark = pytest.mark.skipif(
    os.name == "nt", reason="Windows keeps open files where they are"
)


def delete_directory(path):
    shutil.rmtree(path)


def move_directory(path):
    path.rename(path.with_name("elsewhere"))


def put_another_directory_there(path):
    move_directory(path)
    LmdbObjectStore(path, lib_version=0).close()


def delete_data_file(path):
    (path / "data.mdb").unlink()


def put_a_copy_there(path):
    shutil.copy(path / "data.mdb", path / "copy.mdb")
    (path / "copy.mdb").replace(path / "data.mdb")


def delete_lock_file(path):
    (path / "lock.mdb").unlink()


def put_another_lock_file_there(path):
    delete_lock_file(path)
    (path / "lock.mdb").touch()


def put_a_file_in_place_of_the_directory(path):
    move_directory(path)
    path.touch()


FATES = pytest.mark.parametrize(
    ("change", "file", "fate"),
    [
        (delete_directory, "data", "deleted or moved"),
        (move_directory, "data", "deleted or moved"),
        (put_another_directory_there, "data", "replaced"),
        (delete_data_file, "data", "deleted or moved"),
        (put_a_copy_there, "data", "replaced"),
        (delete_lock_file, "lock", "deleted or moved"),
        (put_another_lock_file_there, "lock", "replaced"),
        (put_a_file_in_place_of_the_directory, "data", "deleted or moved"),
    ],
)


def write_block(store):
    with store.transaction():
        store[b"b"] = 2


def edit(store):
    with store.edit(b"a") as value:
        value.append(2)


WRITES = pytest.mark.parametrize(
    "write",
    [
        lambda store: store.flush(),
        lambda store: store.update({b"%d" % n: n for n in range(10)}),
        lambda store: store.put_many({b"b": 2}),
        lambda store: store.delete_many([b"a"]),
        lambda store: store.delete_many(store.keys(prefix=b"a")),
        lambda store: store.clear(),
        write_block,
        edit,
    ],
    ids=[
        *("flush", "update", "put_many", "delete_many", "range", "clear", "block"),
        "edit",
    ],
)


@FATES
def test_nothing_is_written_to_files_that_are_not_at_their_path(
    tmp_path, open_store, change, file, fate
):
    store = open_store(lib_version=0)
    store.put_many({b"a": [1]})
    store[b"pending"] = 1
    change(tmp_path / "db")
    with pytest.raises(ReplacedError, match=f"The {file} file .*mdb' was {fate}"):
        store.flush()
    assert store.write_buffer.keys() == {b"pending"}
    assert store[b"a"] == [1]  # the process has the file, as long as it is open
    with pytest.raises(LostWritesError) as caught:
        store.close(strict=True)
    assert isinstance(caught.value.__cause__, ReplacedError)
    assert store.closed
    assert store.write_buffer.keys() == {b"pending"}


@WRITES
@pytest.mark.parametrize("change", [move_directory, delete_lock_file])
def test_every_way_to_write_is_refused(tmp_path, open_store, change, write):
    store = open_store(batch_size=5)
    store.put_many({b"a": [1]})
    store[b"pending"] = 1
    change(tmp_path / "db")
    with pytest.raises(ReplacedError):
        write(store)
    assert b"pending" in store.write_buffer
    assert store[b"a"] == [1]
    with suppress(LostWritesError):
        store.close(strict=True)


def test_files_that_come_back_are_written_to(tmp_path, open_store, stored):
    store = open_store()
    store[b"a"] = 1
    (tmp_path / "db").rename(tmp_path / "away")
    with pytest.raises(ReplacedError):
        store.flush()
    (tmp_path / "away").rename(tmp_path / "db")
    store.close(strict=True)
    assert stored() == {"a": 1}


def test_a_close_tells_of_what_was_flushed_to_a_file_that_is_gone(tmp_path, open_store):
    store = open_store()
    store.put_many({b"%d" % n: n for n in range(5_000)})
    shutil.rmtree(tmp_path / "db")
    with pytest.raises(LostWritesError) as caught:
        store.close(strict=True)
    assert "'data.mdb' was deleted" in str(caught.value.__cause__).replace(
        str(tmp_path / "db") + os.sep, ""
    )
    with pytest.raises(ClosedError):
        store[b"1"]


def test_a_file_of_its_own_is_looked_at_as_well(tmp_path, open_store):
    store = open_store(subdir=False)
    store[b"a"] = 1
    (tmp_path / "db-lock").unlink()
    with pytest.raises(ReplacedError, match=r"The lock file '.*db-lock' was deleted"):
        store.flush()
    (tmp_path / "db").unlink()
    with pytest.raises(ReplacedError, match=r"The data file '.*db' was deleted"):
        store.flush()
    store.close()


def test_what_only_reads_does_not_mind(tmp_path, open_store):
    open_store().put_many({b"a": 1})
    for lock in (True, False):
        store = open_store("db2" if lock else "db3", lib_version=0)
        store[b"a"] = 1
        store.close(strict=True)
        name = store.db_path
        with LmdbObjectStore(name, readonly=True, lock=lock) as reader:
            shutil.rmtree(name)
            assert reader[b"a"] == 1


SECOND_WRITER = """
import sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db") as store:
    assert store[b"first"] == 1
    for number in range(100):
        with store.transaction():
            store[b"second"] = store.get(b"second", 0) + 1
"""


@pytest.mark.parametrize("lib_version", [0, 1])
def test_two_writers_without_a_common_lock_file_lose_nothing(
    tmp_path, open_store, run, stored, lib_version
):
    store = open_store(lib_version=lib_version)
    store.put_many({b"first": 1})
    (tmp_path / "db" / "lock.mdb").unlink()  # "a stale lock"
    run(SECOND_WRITER)
    for number in range(3):
        with pytest.raises(ReplacedError, match="lock file"), store.transaction():
            store[b"second"] = number
    with pytest.raises(LostWritesError):
        store.close(strict=True)
    assert stored() == {"first": 1, "second": 100}
    run("import lmdb.tool, sys; sys.exit(lmdb.tool.main(['verify', 'db']))")


# In the background, and at the end


def test_the_flush_in_the_background_tells_it_and_keeps_the_writes(
    tmp_path, open_store, stored, errors
):
    store = open_store(flush_interval=0.01)
    (tmp_path / "db").rename(tmp_path / "away")
    store[b"a"] = 1
    assert "was deleted or moved" in errors.get(timeout=PATIENCE).getMessage()
    assert store.write_buffer.keys() == {b"a"}
    (tmp_path / "away").rename(tmp_path / "db")
    store.flush()
    assert stored() == {"a": 1}


AT_EXIT = """
import shutil, sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db")
store.put_many({b"a": 1})
if sys.argv[1] == "pending":
    store[b"b"] = 1
shutil.rmtree("db")
"""


@pytest.mark.parametrize("what", ["pending", "nothing"])
def test_the_exit_tells_what_is_lost(run, what):
    errors = run(AT_EXIT, what).stderr
    assert ("Flush at exit" in errors) == (what == "pending")
    assert "was not closed" in errors


def test_another_store_may_take_the_place_of_a_deleted_one(
    tmp_path, open_store, stored
):
    store = open_store()
    store[b"a"] = 1
    shutil.rmtree(tmp_path / "db")
    with open_store() as another:  # under the same path
        assert len(another) == 0
        another[b"b"] = 2
    with pytest.raises(ReplacedError):
        store.flush()
    store.close()
    assert stored() == {"b": 2}
