"""Hot paths: each operation as a ratio to the same by hand.

Both sides take turns inside one process, chunk by chunk, in shuffled order. So what
slows the machine down meets both. The median over rounds of the chunks' ratios counts.

Nothing waits for the disk (`sync=False`): that would hide what the library costs.
"""

import gc
import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from pickle import loads
from statistics import median
from time import perf_counter
from typing import Any

from by_hand import ByHand, TextByHand
from entries import MIB, SEED, key, shuffled, value
from lmdb_object_store import LmdbObjectStore

ENTRIES = 50_000
ROUNDS = 160
CHUNK = 2_000
LOAD = 20_000
BLOBS = 20
OPENINGS = 10
IMPORTS = 20
SIDES = ("ours", "by hand")

IMPORT = """
from time import perf_counter
start = perf_counter()
import lmdb
middle = perf_counter()
import lmdb_object_store
print(middle - start, perf_counter() - middle)
"""


class Side:
    """The stores of one side, and what to do with them in this round."""

    def __init__(self, directory: Path, entries: int, ours: bool) -> None:
        directory.mkdir()
        self.entries = entries
        self.paths = (directory / f"{number}" for number in count())
        if ours:
            kind: Any = partial(LmdbObjectStore, sync=False)
            # The text keys of the library, in a file of their own.
            text = partial(kind, key_encoding="utf-8")
        else:
            kind, text = partial(ByHand, sync=False), partial(TextByHand, sync=False)
        self.new = kind
        # So large a batch that a put never flushes.
        self.store = kind(next(self.paths), batch_size=10**9)
        self.texts = text(next(self.paths))
        self.blobs = kind(next(self.paths))
        pairs = [(key(number).encode(), value(number)) for number in range(entries)]
        self.store.put_many(pairs)
        self.texts.put_many(pairs)
        chance = random.Random(SEED)
        self.blobs.put_many((b"%03d" % n, chance.randbytes(MIB)) for n in range(BLOBS))
        self.closed = next(self.paths)
        with_one_entry = kind(self.closed)
        with_one_entry.put(b"key", 1)
        with_one_entry.close()

    def take_on(self, numbers: list[int], consume: Callable[[Any], Any]) -> None:
        """Set the work of the next chunks. `consume` exhausts an iterator."""
        self.consume = consume
        self.text_keys = [key(number) for number in numbers]
        self.keys = [key.encode() for key in self.text_keys]
        self.pairs = [(key(number).encode(), value(number)) for number in numbers]

    def close(self) -> None:
        for store in (self.store, self.texts, self.blobs):
            store.close()


Work = Callable[[], Any]
Preparation = Callable[[Side], AbstractContextManager[Work]]


@contextmanager
def get(side: Side) -> Iterator[Work]:
    get = side.store.get
    yield lambda: side.consume(get(key) for key in side.keys)


@contextmanager
def get_text(side: Side) -> Iterator[Work]:
    get = side.texts.get
    yield lambda: side.consume(get(key) for key in side.text_keys)


@contextmanager
def get_missing(side: Side) -> Iterator[Work]:
    get = side.store.get
    keys = [key + b"x" for key in side.keys]
    yield lambda: side.consume(get(key) for key in keys)


@contextmanager
def get_missing_text(side: Side) -> Iterator[Work]:
    get = side.texts.get
    keys = [key + "x" for key in side.text_keys]
    yield lambda: side.consume(get(key) for key in keys)


@contextmanager
def contains(side: Side) -> Iterator[Work]:
    store = side.store
    yield lambda: side.consume(key in store for key in side.keys)


@contextmanager
def get_many(side: Side, size: int) -> Iterator[Work]:
    get_many = side.store.get_many
    parts = [side.keys[at : at + size] for at in range(0, len(side.keys), size)]
    yield lambda: side.consume(get_many(keys) for keys in parts)


@contextmanager
def put(side: Side) -> Iterator[Work]:
    put = side.store.put
    yield lambda: side.consume(put(key, obj) for key, obj in side.pairs)
    side.store.flush()


@contextmanager
def put_and_flush(side: Side) -> Iterator[Work]:
    put = side.store.put

    def work() -> None:
        side.consume(put(key, obj) for key, obj in side.pairs)
        side.store.flush()

    yield work


@contextmanager
def put_many(side: Side) -> Iterator[Work]:
    yield lambda: side.store.put_many(side.pairs)


@contextmanager
def delete(side: Side) -> Iterator[Work]:
    delete = side.store.delete
    yield lambda: side.consume(delete(key) for key in side.keys)
    side.store.flush()
    side.store.put_many(side.pairs)


@contextmanager
def delete_and_flush(side: Side) -> Iterator[Work]:
    delete = side.store.delete

    def work() -> None:
        side.consume(delete(key) for key in side.keys)
        side.store.flush()

    yield work
    side.store.put_many(side.pairs)


@contextmanager
def delete_many(side: Side) -> Iterator[Work]:
    yield lambda: side.store.delete_many(side.keys)
    side.store.put_many(side.pairs)


@contextmanager
def get_blobs(side: Side) -> Iterator[Work]:
    get = side.blobs.get
    keys = [b"%03d" % number for number in range(BLOBS)]
    yield lambda: side.consume(get(key) for key in keys)


@contextmanager
def put_blobs(side: Side) -> Iterator[Work]:
    pairs = list(side.blobs.items())

    def work() -> None:
        for name, obj in pairs:
            side.blobs.put(name, obj)
            side.blobs.flush()

    yield work


@contextmanager
def items(side: Side) -> Iterator[Work]:
    yield lambda: side.consume(side.store.items())


@contextmanager
def keys(side: Side) -> Iterator[Work]:
    yield lambda: side.consume(side.store.keys())


@contextmanager
def length(side: Side) -> Iterator[Work]:
    store = side.store
    yield lambda: side.consume(len(store) for _ in range(CHUNK))


@contextmanager
def open_and_close(side: Side) -> Iterator[Work]:
    new, path = side.new, side.closed
    yield lambda: side.consume(new(path).close() for _ in range(OPENINGS))


@contextmanager
def load(side: Side, order: Callable[[Any], Any]) -> Iterator[Work]:
    """Load by single puts into a new file, which is on disk in the end."""
    pairs = [(key(n).encode(), value(n)) for n in order(range(LOAD))]
    path = next(side.paths)

    def work() -> None:
        store = side.new(path)
        put = store.put
        side.consume(put(key, obj) for key, obj in pairs)
        store.flush()
        if isinstance(store, ByHand):  # the library does so by itself when it closes
            store.env.sync(True)
        store.close()

    yield work


@contextmanager
def snapshot(side: Side) -> Iterator[Work]:
    with side.store.snapshot() as opened:
        yield partial(_read, side, opened)


@contextmanager
def snapshot_in_thread(side: Side) -> Iterator[Work]:
    with side.store.snapshot() as opened, ThreadPoolExecutor(1) as thread:
        opened.get(side.keys[0])  # as the first thread
        thread.submit(int).result()  # starts the second
        yield lambda: thread.submit(_read, side, opened).result()


@contextmanager
def transaction(side: Side) -> Iterator[Work]:
    with side.store.transaction() as txn:
        yield partial(_read, side, side.store if txn is None else txn)


def _read(side: Side, opened: Any) -> Any:
    get = opened.get
    if isinstance(side.store, ByHand):
        return side.consume(loads(get(key)) for key in side.keys)
    return side.consume(get(key) for key in side.keys)


@dataclass
class HotPath:
    name: str
    aim: float | None
    operations: int | None  # in a chunk; None: one for each entry of the store
    prepare: Preparation
    every: int = 1  # round


HOT_PATHS = [
    HotPath("get, bytes key", 1.05, CHUNK, get),
    HotPath("get, str key", 1.10, CHUNK, get_text),
    HotPath("get, missing bytes key", 1.05, CHUNK, get_missing),
    HotPath("get, missing str key", 1.10, CHUNK, get_missing_text),
    HotPath("in", 1.00, CHUNK, contains),
    HotPath("get_many, 100 keys", 0.95, CHUNK, partial(get_many, size=100)),
    HotPath("get_many, 2,000 keys", 0.95, CHUNK, partial(get_many, size=2000)),
    HotPath("get from a snapshot", 1.10, CHUNK, snapshot),
    HotPath("get from a snapshot, second thread", 1.10, CHUNK, snapshot_in_thread),
    # Each read asks whether this thread and asyncio task are those of the block.
    HotPath("get in a transaction", 1.25, CHUNK, transaction),
    HotPath("get, value of 1 MiB", 1.00, BLOBS, get_blobs, every=4),
    HotPath("items()", 0.95, None, items, every=4),
    HotPath("keys()", 1.00, None, keys, every=4),
    HotPath("len", 1.50, CHUNK, length),
    HotPath("put into the buffer", 1.20, CHUNK, put),
    HotPath("put and flush", 1.00, CHUNK, put_and_flush),
    HotPath("put_many", 1.00, CHUNK, put_many),
    # No aim: by hand that is an assignment to an item of a dict, without any check.
    HotPath("delete into the buffer", None, CHUNK, delete),
    HotPath("delete and flush", 1.20, CHUNK, delete_and_flush),
    HotPath("delete_many", 1.00, CHUNK, delete_many),
    HotPath("put and flush, value of 1 MiB", 1.10, BLOBS, put_blobs, every=4),
    HotPath("load by put, sorted keys", 1.15, LOAD, partial(load, order=list), every=4),
    HotPath(
        "load by put, random keys", 1.10, LOAD, partial(load, order=shuffled), every=4
    ),
    HotPath("open and close", 1.50, OPENINGS, open_and_close, every=4),
]


class Workbench:
    """Both sides, with the same entries, and the times measured so far."""

    def __init__(self, directory: Path, entries: int) -> None:
        self.sides = {
            name: Side(directory / name, entries, name == "ours") for name in SIDES
        }
        self.random = random.Random(SEED)
        self.times: dict[str, list[dict[str, float]]] = {}

    def choose(self, consume: Callable[[Any], Any]) -> None:
        """Choose the entries for the next round."""
        entries = self.sides["ours"].entries
        numbers = self.random.choices(range(entries), k=CHUNK)
        for side in self.sides.values():
            side.take_on(numbers, consume)

    def time(self, path: HotPath) -> None:
        times = {}
        for name in self.random.sample(SIDES, len(SIDES)):
            with path.prepare(self.sides[name]) as work:
                gc.collect()
                start = perf_counter()
                work()
                times[name] = perf_counter() - start
        self.times.setdefault(path.name, []).append(times)

    def round(self, number: int, paths: list[HotPath]) -> None:
        self.choose(deque(maxlen=0).extend)
        for path in paths:
            if number % path.every == 0:
                self.time(path)

    def result(self, path: HotPath) -> dict[str, Any]:
        times = self.times[path.name]
        operations = path.operations or self.sides["ours"].entries
        return {
            "name": path.name,
            "aim": path.aim,
            "ratio": median(pair["ours"] / pair["by hand"] for pair in times),
            "microseconds": {
                side: min(pair[side] for pair in times) / operations * 1e6
                for side in SIDES
            },
        }

    def close(self) -> None:
        for side in self.sides.values():
            side.close()


def measure_import(times: int, cache: Path) -> dict[str, float]:
    """Return the milliseconds of both imports, in fresh interpreters."""
    # With the bytecode cached, as it is after an installation.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", IMPORT]
    found = []
    for _ in range(times + 1):
        printed = subprocess.check_output(command, env=environment, text=True)
        found.append([float(part) * 1e3 for part in printed.split()])
    lmdb, library = map(median, zip(*found[1:], strict=True))
    return {"lmdb": lmdb, "lmdb_object_store, after lmdb": library}


def over(results: Iterable[dict[str, Any]], limit: float) -> list[str]:
    """Return the names of the paths whose ratio is more than `limit` times its aim.

    So must be the ratio of the minima: a slower path raises both, and a busy machine or
    disk often one of the two.
    """
    slow = []
    for path in results:
        best = path["microseconds"]
        ratio = min(path["ratio"], best["ours"] / best["by hand"])
        if path["aim"] is not None and ratio > limit * path["aim"]:
            slow.append(path["name"])
    return slow


def settle() -> None:
    """Let the disk take what is to be written, which can hold up one side's writes."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()


def measure(
    scale: float, directory: Path, limit: float | None = None
) -> Iterator[tuple[str, Any]]:
    """Measure. With a limit, measure the paths that are over it for longer."""
    rounds = max(1, round(ROUNDS * scale))
    bench = Workbench(directory, max(CHUNK, round(ENTRIES * min(1, 4 * scale))))
    settle()
    for number in range(rounds):
        yield f"round {number + 1} of {rounds}", None
        bench.round(number, HOT_PATHS)
    for patience in range(0 if limit is None else 3):
        # Something else may have taken the processors just then.
        slow = over(map(bench.result, HOT_PATHS), limit)
        if slow:
            settle()
        for number in range(rounds if slow else 0):
            yield f"once more, {patience + 1} of 3: {', '.join(slow)}", None
            bench.round(number, [path for path in HOT_PATHS if path.name in slow])
    bench.close()
    yield "import", None
    milliseconds = measure_import(max(1, round(IMPORTS * scale)), directory / "cache")
    results = [bench.result(path) for path in HOT_PATHS]
    yield "done", {"paths": results, "import, milliseconds": milliseconds}
