"""A pickled or copied store carries path and options, and opens the same file."""

import copy
import gc
import os
import pickle
import shutil
import warnings
from contextlib import suppress
from functools import partial

import lmdb
import pytest

from conftest import PATIENCE, run_all
from lmdb_object_store import (
    BusyError,
    ClosedError,
    GrowthError,
    LmdbObjectStore,
    ReadOnlyError,
    ReplacedError,
)
from moments import Parked, every_step, handling, part_of

ENGINES = pytest.mark.parametrize("lib_version", [0, 1])
MIB = 2**20
TOO_MUCH = {b"key %d" % n: bytes(2**15) for n in range(64)}  # 2 MiB


def pickled(store, protocol):
    return pickle.loads(pickle.dumps(store, protocol))


WAYS = {
    **{
        f"protocol {protocol}": partial(pickled, protocol=protocol)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
ways = pytest.mark.parametrize("again", WAYS.values(), ids=WAYS)
few_ways = pytest.mark.parametrize(
    "again", [partial(pickled, protocol=5), copy.copy, copy.deepcopy]
)


@pytest.fixture(autouse=True)
def _nothing_left():
    """What was unpickled or copied needs no close, and gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect(1)


def is_open(env):
    """Whether an environment has not been closed yet."""
    try:
        env.info()
    except lmdb.Error:
        return False
    return True


# In the same process


@ENGINES
@ways
def test_it_is_another_store_of_the_same_file(open_store, lib_version, again):
    store = open_store(lib_version=lib_version)
    store.put_many({b"a": 1, b"b": 2})
    store[b"pending"] = 3
    store.delete(b"a")
    other = again(store)
    assert type(other) is LmdbObjectStore
    assert other is not store
    assert other.env is store.env
    assert other.db_path == store.db_path
    other[b"c"] = 4
    assert dict(store) == dict(other) == {b"b": 2, b"pending": 3, b"c": 4}
    store.close()
    assert (store.closed, other.closed) == (True, False)
    other[b"d"] = 5
    other.close(strict=True)
    with pytest.raises(ClosedError):
        other.get(b"d")
    assert open_store()[b"d"] == 5


@ways
def test_what_is_pending_is_flushed(open_store, again):
    store = open_store()
    store[b"a"] = 1
    other = again(store)
    assert store.write_buffer == {}
    assert store.env.stat()["entries"] == 1
    assert other[b"a"] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_pickle_has_no_data_and_opens_nothing_by_itself(open_store, protocol):
    store = open_store()
    store.put_many({b"secret %d" % n: bytes(1000) for n in range(100)})
    store[b"secret"] = "secret"
    raw = pickle.dumps(store, protocol)
    assert len(raw) < 2000
    assert b"secret" not in raw
    env = store.env
    store.close()
    assert not is_open(env)
    assert len(pickle.loads(raw)) == 101


@few_ways
def test_a_closed_file_is_opened_again(open_store, again):
    store = open_store(batch_size=7)
    store[b"a"] = 1
    raw = pickle.dumps(store)
    store.close()
    first = pickle.loads(raw)
    second = again(first)
    assert (first[b"a"], second[b"a"]) == (1, 1)
    assert second.batch_size == 7
    env = first.env
    del first
    second[b"b"] = 2
    assert is_open(env)
    del second
    gc.collect()
    assert not is_open(env)
    assert dict(open_store()) == {b"a": 1, b"b": 2}


@ways
def test_options_are_carried_over(open_store, again):
    store = open_store(
        batch_size=11,
        batch_bytes=12345,
        autoflush_on_read=False,
        key_encoding="UTF8",
        key_errors="surrogateescape",
        str_normalize="NFKC",
        max_map_size=30 * MIB,
        timeout=5.5,
        map_size=2 * MIB,
        max_dbs=3,
        max_readers=20,
        sync=False,
        metasync=False,
        lib_version=1,
    )
    names = "batch_size batch_bytes autoflush_on_read key_encoding key_errors "
    names += "str_normalize max_map_size timeout db_path"
    expected = [getattr(store, name) for name in names.split()]
    other = again(store)
    assert [getattr(other, name) for name in names.split()] == expected
    raw = pickle.dumps(other)
    other["\ufb01"] = 1
    assert list(other) == ["fi"]
    del other
    store.close()
    anew = pickle.loads(raw)
    assert [getattr(anew, name) for name in names.split()] == expected
    info = anew.env.info()
    assert (info["map_size"], info["max_readers"]) == (2 * MIB, 20)
    assert anew.env.flags()["sync"] is anew.env.flags()["metasync"] is False
    assert anew["fi"] == 1
    with pytest.raises(ValueError, match="max_dbs"):
        open_store(sync=False, metasync=False, max_dbs=2)


@ways
def test_what_was_changed_at_run_time_is_carried_over(open_store, again):
    store = open_store()
    store.batch_size = 2
    store.batch_bytes = 1000
    store.autoflush_on_read = False
    store.max_map_size = 20 * MIB
    store.timeout = 7
    raw = pickle.dumps(store)
    other = again(store)
    store.close()
    for one in other, pickle.loads(raw):
        assert (one.batch_size, one.batch_bytes) == (2, 1000)
        assert one.autoflush_on_read is False
        assert (one.max_map_size, one.timeout) == (20 * MIB, 7)
    other.close()
    with pickle.loads(raw) as anew:
        assert (anew.max_map_size, anew.timeout) == (20 * MIB, 7)
        anew[b"a"] = 1
        anew.get(b"x")
        assert len(anew.write_buffer) == 1
        anew[b"b"] = 1
        assert len(anew.write_buffer) == 0


@few_ways
def test_what_was_changed_in_a_copy_stays_there(open_store, again):
    store = open_store()
    other = again(store)
    other.batch_size = 1
    other.autoflush_on_read = False
    assert (store.batch_size, store.autoflush_on_read) == (1000, True)


def test_a_later_timeout_and_cap_of_the_process_are_not_undone(open_store):
    store = open_store()
    raw = pickle.dumps(store)
    store.timeout = 3
    store.max_map_size = 20 * MIB
    other = pickle.loads(raw)
    assert (other.timeout, other.max_map_size) == (3, 20 * MIB)


class Subclass(LmdbObjectStore):
    shared = "of the class"

    def __init__(self, path, extra, **options):
        super().__init__(path, **options)
        self.extra = extra
        self.me = self

    def first(self):
        return next(iter(self))


@ways
def test_a_subclass_keeps_its_attributes(tmp_path, again):
    with Subclass(tmp_path / "db", {"list": [1]}, key_encoding="utf-8") as store:
        store["a"] = 1
        other = again(store)
        other.close()  # or the cycle would keep it open
        assert type(other) is Subclass
        assert other.extra == {"list": [1]}
        assert (other.extra is store.extra) == (again is copy.copy)
        assert other.me is (store if again is copy.copy else other)
        other.me = None
        third = again(store)
        assert (third.first(), third.shared) == ("a", "of the class")
        third.me = None
        store.me = None


@few_ways
def test_a_store_may_be_part_of_other_objects(open_store, again):
    store, second = open_store(), open_store("second")
    second[b"b"] = 2
    whole = {"stores": [store, second, store], "more": 1}
    if again is copy.copy:
        again = copy.deepcopy
    other = again(whole)
    assert other["stores"][0] is other["stores"][2]
    assert other["stores"][0].env is store.env
    assert other["stores"][1][b"b"] == 2


@ways
def test_a_read_only_store_stays_so(open_store, again):
    with open_store() as store:
        store[b"a"] = 1
    store = open_store(readonly=True)
    other = again(store)
    assert other[b"a"] == 1
    with pytest.raises(ReadOnlyError):
        other.put_many({b"b": 2})


@few_ways
def test_a_read_only_store_beside_one_that_writes(open_store, again):
    writer, reader = open_store(), open_store(readonly=True)
    writer[b"a"] = 1
    raw = pickle.dumps(reader)
    other = again(reader)
    with pytest.raises(ReadOnlyError):
        other.put_many({b"b": 2})
    assert other[b"a"] == 1
    writer.close()
    reader.close()
    del other
    gc.collect()
    only = pickle.loads(raw)
    assert only[b"a"] == 1
    with pytest.raises(ReadOnlyError):
        only[b"b"] = 2


@ways
def test_a_file_without_a_folder(open_store, again):
    store = open_store("file", subdir=False)
    store[b"a"] = 1
    assert again(store)[b"a"] == 1
    raw = pickle.dumps(store)
    store.close()
    assert pickle.loads(raw)[b"a"] == 1


@ways
def test_a_relative_path_is_found_from_everywhere(tmp_path, monkeypatch, again):
    monkeypatch.chdir(tmp_path)
    with LmdbObjectStore("db") as store:
        store[b"a"] = 1
        raw = pickle.dumps(store)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert again(store)[b"a"] == 1
    assert pickle.loads(raw)[b"a"] == 1
    assert os.listdir() == []


def test_a_store_may_be_a_value_of_itself(open_store):
    store = open_store()
    store[b"me"] = store
    store[b"large"] = [store, bytes(300 * 2**10)]
    store.flush()
    inner = store[b"me"]
    assert inner.env is store.env
    inner[b"a"] = 1
    assert store[b"a"] == 1
    for other in (
        store[b"large"][0],
        store.get_many([b"me"])[0][b"me"],
        dict(store.items(b"me"))[b"me"],
    ):
        assert other[b"a"] == 1
    del other, inner
    gc.collect()
    env = store.env
    store.close(strict=True)
    assert not is_open(env)


@few_ways
def test_a_copy_in_a_transaction_block_belongs_to_it(open_store, in_thread, again):
    store = open_store()
    store[b"a"] = 1
    with suppress(ZeroDivisionError), store.transaction():
        store[b"b"] = 2
        other = again(store)
        other[b"c"] = 3
        assert dict(other) == dict(store) == {b"a": 1, b"b": 2, b"c": 3}
        assert in_thread(lambda: dict(other)).result() == {b"a": 1}
        raise ZeroDivisionError
    assert dict(other) == {b"a": 1}


# Errors


@ways
def test_a_closed_store_says_so(open_store, again):
    store, other = open_store(), open_store()
    store.close()
    with pytest.raises(ClosedError, match="db' is closed"):
        again(store)
    other.close()
    with pytest.raises(ClosedError, match="db' is closed"):
        again(other)


@pytest.mark.parametrize("gone", ["folder", "file", "file without a folder"])
def test_a_file_that_is_gone_is_not_made_anew(open_store, tmp_path, gone):
    store = open_store(subdir=gone != "file without a folder")
    store[b"a"] = 1
    raw = pickle.dumps(store)
    store.close()
    if gone == "folder":
        shutil.rmtree(tmp_path / "db")
    elif gone == "file":
        (tmp_path / "db" / "data.mdb").unlink()
    else:
        (tmp_path / "db").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ClosedError, match=r"can't be opened here: there is no .*db"):
        pickle.loads(raw)
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(open_store(subdir=gone != "file without a folder")) == {}
    assert dict(pickle.loads(raw)) == {}


@pytest.mark.skipif(os.name == "nt", reason="an open file can't be deleted on Windows")
@few_ways
def test_a_copy_of_a_store_whose_file_is_gone_is_refused(open_store, tmp_path, again):
    store = open_store()
    store[b"a"] = 1
    shutil.rmtree(tmp_path / "db")
    with pytest.raises(ReplacedError, match="was deleted"):
        again(store)  # flushes first
    assert not (tmp_path / "db").exists()
    assert store[b"a"] == 1


@ways
def test_a_full_store_says_so_and_keeps_what_is_pending(open_store, again):
    store = open_store(max_map_size=MIB)
    for key, value in TOO_MUCH.items():
        store[key] = value
    with pytest.raises(GrowthError):
        again(store)
    assert store.write_buffer.keys() == TOO_MUCH.keys()
    store.max_map_size = None
    assert dict(again(store)) == TOO_MUCH


@pytest.mark.parametrize("make", [{"sync": False}, {"max_dbs": 1}], ids=str)
def test_options_that_conflict_are_refused(open_store, make):
    store = open_store(**make)
    raw = pickle.dumps(store)
    store.close()
    other = open_store()
    env = other.env
    [name] = make
    with pytest.raises(ValueError, match=rf"\b{name}=") as info:
        pickle.loads(raw)
    del info
    gc.collect()
    assert other.get(b"a") is None
    other.close()
    assert not is_open(env)
    assert dict(pickle.loads(raw)) == {}


def test_a_store_that_can_write_is_unpickled_where_the_file_is_open_read_only(
    open_store,
):
    store = open_store()
    raw = pickle.dumps(store)
    store.close()
    reader = open_store(readonly=True)
    pickle.loads(raw)[b"a"] = 1
    assert dict(reader) == {b"a": 1}


def test_a_snapshot_can_not_be_pickled(open_store):
    store = open_store()
    store[b"a"] = 1
    with store.snapshot() as snapshot:
        with pytest.raises(TypeError):
            pickle.dumps(snapshot)
        assert snapshot[b"a"] == 1


# What nobody closes


@few_ways
@pytest.mark.parametrize("cycle", [False, True])
def test_a_copy_that_is_dropped_writes_what_it_has(open_store, again, cycle):
    store = open_store()
    raw = pickle.dumps(store)
    env = store.env
    holder = [again(store)]
    if cycle:
        holder.append(holder)
    holder[0][b"a"] = 1
    store.close()
    assert is_open(env)
    del holder
    gc.collect()
    assert not is_open(env)
    pickle.loads(raw)[b"b"] = 2
    assert dict(open_store()) == {b"a": 1, b"b": 2}


def test_who_made_the_first_store_is_warned_all_the_same(open_store, tmp_path):
    store = LmdbObjectStore(tmp_path / "db")
    store[b"a"] = 1
    other = copy.copy(store)
    with pytest.warns(ResourceWarning, match="db' was not closed"):
        del store
    assert other[b"a"] == 1


MAKE = """
import pickle, sys
from lmdb_object_store import LmdbObjectStore
with LmdbObjectStore("db", key_encoding="utf-8", batch_size=7) as store:
    store["a"] = 1
    store.timeout = 5
    with open("pickle", "wb") as file:
        pickle.dump(store, file)
"""


@pytest.mark.parametrize("end", ["", "del store", "store = [store]; store += [store]"])
def test_exit_writes_what_a_copy_has_and_is_silent(run, stored, end):
    run(MAKE)
    script = """
import pickle
with open("pickle", "rb") as file:
    store = pickle.load(file)
assert (store["a"], store.batch_size, store.timeout) == (1, 7, 5)
store["b"] = 2
"""
    assert run(script + end).stderr == ""
    assert stored() == {"a": 1, "b": 2}


# Other processes and threads

METHODS = ["spawn"] if os.name == "nt" else ["fork", "spawn", "forkserver"]

POOL = """
import multiprocessing, sys
from lmdb_object_store import LmdbObjectStore


def work(store, number):
    store[f"number {number}"] = number
    return store["given"]


def inherit(store):
    store["process"] = True


if __name__ == "__main__":
    method, lib_version = sys.argv[1], int(sys.argv[2])
    context = multiprocessing.get_context(method)
    options = {"key_encoding": "utf-8", "lib_version": lib_version, "sync": False}
    with LmdbObjectStore("db", **options) as store:
        store["given"] = "given"
        with context.Pool(2) as pool:
            jobs = [pool.apply_async(work, (store, number)) for number in range(20)]
            assert [job.get(30) for job in jobs] == ["given"] * 20
            pool.close()
            pool.join()
        process = context.Process(target=inherit, args=(store,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert len(store) == 22, list(store)
        assert store["process"] is True
"""


@pytest.mark.one_in(2)
@ENGINES
@pytest.mark.parametrize("method", METHODS)
def test_children_get_a_store_of_their_own(run, lib_version, method):
    options = ("-W", "default", "-W", "ignore::DeprecationWarning")
    assert run(POOL, method, lib_version, options=options).stderr == ""


EXECUTOR = """
from concurrent.futures import ProcessPoolExecutor
from lmdb_object_store import LmdbObjectStore


def double(store, key):
    with store.transaction():
        store[key] *= 2
    return store


if __name__ == "__main__":
    with LmdbObjectStore("db") as store:
        store.put_many({b"%d" % n: n for n in range(20)})
        with ProcessPoolExecutor(2) as executor:
            for n, other in enumerate(executor.map(double, [store] * 20, list(store))):
                assert other.env is store.env
        assert sorted(store.values()) == list(range(0, 40, 2))
"""


def test_stores_come_and_go_between_processes(run):
    options = ("-W", "default", "-W", "ignore::DeprecationWarning")
    assert run(EXECUTOR, options=options).stderr == ""


def test_threads_copy_write_and_drop_at_once(hasty, open_store):
    store = open_store()
    raw = pickle.dumps(store)

    def work(name):
        for number in range(40):
            other = copy.copy(store) if number % 2 else pickle.loads(raw)
            other[b"%d %d" % (name, number)] = number
            assert store[b"%d %d" % (name, number)] == number

    run_all(*(partial(work, name) for name in range(4)))
    assert len(store) == 160
    env = store.env
    store.close()
    assert not is_open(env)


@few_ways
def test_copying_waits_for_a_commit(open_store, in_thread, again):
    store = open_store()
    store[b"a"] = 1
    with Parked(in_thread, "putmulti", store.flush) as flushing:
        copying = in_thread(lambda: again(store))
        copying.wait_until_in("__getstate__")
        assert copying.running
        flushing.release()
        assert copying.result()[b"a"] == 1


def test_unpickling_waits_for_the_end_of_a_last_close(open_store, in_thread):
    store = open_store(timeout=PATIENCE)
    store[b"a"] = 1
    raw = pickle.dumps(store)
    store[b"b"] = 2
    with Parked(in_thread, "close", store.close) as closing:
        opening = in_thread(lambda: pickle.loads(raw))
        opening.wait_until_in("__setstate__")
        assert opening.running
        closing.release()
        assert dict(opening.result()) == {b"a": 1, b"b": 2}


# Interrupts


def test_pickling_may_be_interrupted_at_every_moment(open_store, in_thread):
    store = open_store(sync=False)

    def prepare():
        store[b"a"] = 1
        return store

    interrupted = 0
    for _, result in every_step(prepare, pickle.dumps):
        if isinstance(result, KeyboardInterrupt):
            interrupted += 1
        else:
            assert dict(pickle.loads(result)) == {b"a": 1}
        in_thread(store.flush).result()
        assert store.write_buffer == {}
    assert interrupted > part_of(20)
    in_thread(lambda: store.close(strict=True)).result()


def test_unpickling_may_be_interrupted_at_every_moment(open_store, in_thread):
    store = open_store(sync=False, max_dbs=1)
    store[b"a"] = 1
    raw = pickle.dumps(store)
    interrupted = 0
    for _, result in every_step(lambda: None, lambda _: pickle.loads(raw)):
        if isinstance(result, KeyboardInterrupt):
            interrupted += 1
            result.__traceback__ = None
        else:
            assert result[b"a"] == 1
        del result
        gc.collect(1)
        assert in_thread(lambda: store[b"a"]).result() == 1
    assert interrupted > part_of(50)
    env = store.env
    store.close(strict=True)
    gc.collect()
    assert not is_open(env)


def test_a_signal_handler_copies_a_store_or_is_told_that_it_is_busy(
    open_store, in_thread
):
    store = open_store(sync=False)
    outcomes = set()

    def copy_it():
        try:
            outcomes.add(copy.copy(store)[b"a"])
        except BusyError:
            outcomes.add("busy")

    def prepare():
        store[b"a"] = 1
        return store

    with handling(copy_it):
        for _, result in every_step(prepare, LmdbObjectStore.flush):
            assert result is None
    assert outcomes == {1, "busy"}
    in_thread(lambda: store.close(strict=True)).result()


def test_a_pickle_is_read_by_a_python_that_has_nothing_open(run, open_store, tmp_path):
    with open_store(key_encoding="utf-8") as store:
        store["a"] = 1
        (tmp_path / "pickle").write_bytes(pickle.dumps(store, 0))
    result = run(
        """
import pickle, sys
from pathlib import Path
store = pickle.loads(Path("pickle").read_bytes())
print(store["a"], store.key_encoding, store.db_path)
"""
    )
    assert result.stdout == f"1 utf-8 {tmp_path / 'db'}\n"
    assert result.stderr == ""


def test_an_older_pickle_changes_nothing_of_what_is_open(open_store):
    store = open_store(max_map_size=2**20, timeout=5)
    older = pickle.dumps(store)
    store.max_map_size = 2**24
    store.timeout = 7
    with pickle.loads(older) as copied:
        assert (copied.max_map_size, copied.timeout) == (2**24, 7)
    assert (store.max_map_size, store.timeout) == (2**24, 7)
    store.close()
    with pickle.loads(older) as copied:
        assert (copied.max_map_size, copied.timeout) == (2**20, 5)
