"""Several processes that write one file and grow its map, or are killed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from test_faults import ENGINES, verify

# Writes batches of a growing size, and says how many are done.
WRITER = """
import sys
from lmdb_object_store import LmdbObjectStore
path, lib_version, name, count = sys.argv[1:]
options = {"lib_version": int(lib_version), "sync": False, "map_size": 2**16}
with LmdbObjectStore(path, key_encoding="utf-8", **options) as store:
    for n in range(int(count)):
        batch = {f"{name} {n} {part}": bytes([n % 256]) * 40_000 for part in range(4)}
        if n % 2:
            store.put_many(batch)
        else:
            store.update(batch)
            store.flush()
        for key in store.keys(f"{name} {n} "):
            assert store[key] == bytes([n % 256]) * 40_000
        print(n, flush=True)
"""

# Reads what is there, again and again, by all kinds of reads.
READER = """
import sys
from lmdb_object_store import LmdbObjectStore
path, lib_version, readonly = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
options = {"lib_version": lib_version, "map_size": 2**16, "readonly": readonly}
store = LmdbObjectStore(path, key_encoding="utf-8", **options)
print("ready", flush=True)
rounds = 0
while not store.get("stop"):
    number = len(store)
    for key, value in store.items():
        assert key in ("start", "stop") or len(value) == 40_000
    with store.snapshot() as snapshot:
        keys = list(snapshot)
        assert len(keys) == len(snapshot) >= number
    assert all(key in store for key in keys)
    found, missing = store.get_many(keys)
    assert not missing
    rounds += 1
store.close()
print(rounds, flush=True)
"""


@pytest.fixture
def start(open_store, lib_version):
    """Start a script in a process of its own, with the path of the store "db"."""
    path = open_store(lib_version=lib_version).db_path
    started = []

    def start(script, *arguments):
        command = [sys.executable, "-W", "error", "-c", script, path, lib_version]
        started.append(
            subprocess.Popen(
                [str(part) for part in [*command, *arguments]],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@ENGINES
def test_processes_that_write_and_grow_lose_nothing(open_store, lib_version, start):
    store = open_store(lib_version=lib_version, key_encoding="utf-8", map_size=2**16)
    store.put_many({"start": True})
    readers = [start(READER, readonly) for readonly in (False, True)]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    writers = [start(WRITER, name, 30) for name in "ab"]
    iterator = iter(store.items())
    next(iterator)
    for writer in writers:
        assert len(writer.stdout.read().split()) == 30
        assert writer.wait() == 0
    assert all(value is True or len(value) == 40_000 for _, value in iterator)
    assert len(store) == 1 + 2 * 30 * 4
    store.put_many({"stop": True})
    for reader in readers:
        assert int(reader.stdout.read()) > 0
        assert reader.wait() == 0
    for name in "ab":
        for n in range(30):
            values = list(store.values(f"{name} {n} "))
            assert values == [bytes([n]) * 40_000] * 4
    store.close()
    verify(store.db_path)


@ENGINES
def test_len_counts_no_commit_that_reads_do_not_see_yet(open_store, lib_version):
    # 1. A commit of another process has written the meta page with its number, 2.
    # 2. The number in the lock file, by which reads choose their meta page, is still 1.
    store = open_store(lib_version=lib_version, subdir=False)
    first, second = (number.to_bytes(8, sys.byteorder) for number in (1, 2))
    lock_file = Path(f"{store.db_path}-lock")
    store.put_many({b"a": 1})
    before = lock_file.read_bytes()
    store.put_many({b"b": 2})
    after = lock_file.read_bytes()
    [offset] = [
        at
        for at in range(0, 256, 8)
        if before[at : at + 8] == first and after[at : at + 8] == second
    ]
    with lock_file.open("r+b", buffering=0) as header:
        for number, count in ((first, 1), (second, 2)):
            header.seek(offset)
            header.write(number)
            assert len(store) == len(list(store)) == count


@pytest.mark.one_in(2)
@ENGINES
def test_readers_and_writers_killed_at_random(open_store, lib_version, start):
    chance = random.Random(lib_version)
    store = open_store(lib_version=lib_version, key_encoding="utf-8", map_size=2**16)
    store.put_many({"start": True})
    for number in range(4):
        writer = start(WRITER, f"killed{number}", 10_000)
        reader = start(READER, number % 2 == 0)
        assert reader.stdout.readline() == "ready\n"
        done = -1
        for _ in range(chance.randint(1, 12)):
            done = int(writer.stdout.readline())
        for process in chance.sample([writer, reader], 2):
            process.kill()
            process.wait()
        store.put_many({f"after {number}": bytes(40_000)})
        for n in range(done + 1):
            values = list(store.values(f"killed{number} {n} "))
            assert values == [bytes([n % 256]) * 40_000] * 4
        for key in list(store.keys("killed"))[::2]:
            del store[key]
    assert len(store.keys("after ")) == 4
    store.close()
    verify(store.db_path)
