"""Rivals: other stores at the same work, once durable and once not.

Stores take turns, each in a fresh process; a process prints a line of JSON for each
workload as soon as it is measured:
    python rivals.py STORE (durable|buffered) (workloads|published) SCALE DIRECTORY
A workload that takes too long is stopped, and counts with what it did so far.
"""

import json
import random
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, starmap
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from entries import MIB, SEED, chunks, key, shuffled, value
from rival_stores import RIVALS, Rival, version

ROUNDS = {"workloads": 5, "published": 3}
BUDGET = 1.0  # seconds for a workload, but for the bulk load, which the others need
LOAD_BUDGET = 20.0
ENTRIES = 100_000
OPERATIONS = 50_000
BATCH = 10_000  # as in the benchmark that lmdbm publishes
ARRAYS = 50
OPENINGS = 50
PUBLISHED_SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
TIMEOUT = 1200

Result = dict[str, Any]


def timed(
    name: str,
    operations: Iterable[Any],
    budget: float,
    finish: Callable[[], Any] = bool,
    each: int = 1,
) -> Result:
    """Exhaust the iterator, or stop when the time is over."""
    iterator = iter(operations)
    done, size = 0, 1
    start = perf_counter()
    while perf_counter() - start < budget:
        # No result is kept but the last, as its memory takes time, too.
        last = deque(enumerate(islice(iterator, size), 1), maxlen=1)
        taken = last[0][0] if last else 0
        done += taken
        if taken < size:
            stopped = False
            break
        size = min(2 * size, 128)
    else:
        stopped = next(iterator, iterator) is not iterator
        done += stopped
    finish()
    seconds = perf_counter() - start
    return {
        "name": name,
        "operations": done * each,
        "microseconds": seconds / max(1, done * each) * 1e6,
        "stopped": stopped,
    }


def run_workloads(
    rival: type[Rival], durable: bool, scale: float, directory: Path
) -> Iterator[Result]:
    entries = max(1000, round(ENTRIES * scale))
    operations = max(200, round(OPERATIONS * scale))
    budget = BUDGET * max(0.1, scale)
    batch = min(BATCH, entries)
    entries -= entries % batch
    path = directory / "store"
    store = rival(path, durable)
    encode = rival.encode
    chance = random.Random(SEED)

    def pairs_of(numbers: Iterable[int]) -> list[tuple[Any, object]]:
        return [(encode(key(number)), value(number)) for number in numbers]

    def some() -> list[int]:
        return chance.choices(there, k=operations)

    numbers = shuffled(range(entries))
    loads = [pairs_of(chunk) for chunk in chunks(numbers, batch)]
    loaded = timed("bulk load", map(store.put_batch, loads), LOAD_BUDGET, each=batch)
    yield loaded
    there = numbers[: loaded["operations"]]  # all, but for a store that was stopped
    del loads
    if not durable:  # reads know no durability
        keys = [encode(key(number)) for number in some()]
        yield timed("get", map(store.get, keys), budget)
        missing = [encode(key(number) + "x") for number in some()]
        yield timed("get, missing", map(store.get, missing), budget)
        yield timed("in", map(store.has, keys), budget)
        yield timed("all items", store.items(), budget)
        prefixes = [encode(key(number)[:-2]) for number in some()[:2000]]
        scans = (len(list(store.items_of(prefix))) for prefix in prefixes)
        yield timed("items of a prefix (100)", scans, budget)
        store.close()
        openings = (rival(path, durable).close() for _ in range(OPENINGS))
        yield timed("open and close", openings, budget)
        store = rival(path, durable)

    def puts(name: str, numbers: Iterable[int]) -> Result:
        return timed(name, starmap(store.put, pairs_of(numbers)), budget, store.finish)

    yield puts("overwrite", some())
    yield puts("put", shuffled(range(entries, entries + operations)))
    mix = (
        store.put(name, obj) if turn % 10 == 0 else store.get(name)
        for turn, (name, obj) in enumerate(pairs_of(some()))
    )
    yield timed("90 % get, 10 % put", mix, budget, store.finish)
    old = [encode(key(number)) for number in there[:operations]]
    yield timed("delete", map(store.delete, old), budget, store.finish)
    if not durable or store.durable_arrays:
        yield from run_arrays(store, encode, budget, durable)
    store.close()


def run_arrays(
    store: Rival, encode: Callable[[str], Any], budget: float, durable: bool
) -> Iterator[Result]:
    try:
        import numpy
    except ImportError:
        yield {"name": "put, array of 1 MiB", "skipped": "numpy is not installed"}
        return
    rng = numpy.random.default_rng(SEED)
    names = [encode(f"array:{number:04}") for number in range(ARRAYS)]
    arrays = [(name, rng.integers(0, 256, MIB, numpy.uint8)) for name in names]
    puts = starmap(store.put, arrays)
    result = timed("put, array of 1 MiB", puts, budget, store.finish)
    yield result
    if not durable:
        there = names[: result["operations"]]
        yield timed("get, array of 1 MiB", map(store.get, there), budget)


def run_published(
    rival: type[Rival], durable: bool, scale: float, directory: Path
) -> Iterator[Result]:
    """Do what the benchmark of lmdbm does; times include opening and closing."""
    budget = 2 * BUDGET * max(0.1, scale)
    encode = rival.encode
    chance = random.Random(SEED)

    def data(size: int) -> Iterator[tuple[Any, object]]:
        for number in range(size):
            yield encode(f"key_{number}"), {"some": f"object_{number}"}

    def random_keys(size: int) -> Iterator[Any]:
        while True:
            yield encode(f"key_{chance.randrange(size)}")

    def on(path: Path, name: str, work: Callable[[Rival], Any], **options: Any) -> Any:
        """Time what `work` yields, in a store that is opened and closed for it."""

        def operations() -> Iterator[Any]:
            nonlocal store
            store = rival(path, durable)
            yield from work(store)

        def finish() -> None:
            store.finish()
            store.close()

        store: Any = None
        return timed(name, operations(), finish=finish, **options)

    for size in PUBLISHED_SIZES:
        if size > max(100, PUBLISHED_SIZES[-1] * scale):
            break
        singles, batches = directory / f"singles{size}", directory / f"batches{size}"
        yield on(
            singles,
            f"{size:,}: write",
            lambda store, size=size: starmap(store.put, data(size)),
            budget=budget,
        )
        each = min(size, BATCH)
        written = on(
            batches,
            f"{size:,}: write in batches",
            lambda store, size=size: map(store.put_batch, chunks(data(size), BATCH)),
            budget=LOAD_BUDGET,
            each=each,
        )
        yield written
        there = written["operations"]
        yield on(
            batches,
            f"{size:,}: read",
            lambda store, there=there: map(
                store.get, islice(random_keys(there), there)
            ),
            budget=budget,
        )

        def turns(store: Rival) -> Iterator[Any]:
            for _ in range(100):
                yield from starmap(store.put, data(1))
                yield from map(store.get, islice(random_keys(10), 10))

        yield on(
            batches, f"{size:,}: 100 times 1 write, 10 reads", turns, budget=budget
        )
        for path in (singles, batches):
            remove(path)


def remove(path: Path) -> None:
    """Remove a store: a directory, or files whose names begin so."""
    for file in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()


SUITES = {"workloads": run_workloads, "published": run_published}


def in_fresh_process(
    rival: str, durability: str, suite: str, scale: float, directory: Path
) -> Iterator[Result]:
    directory.mkdir()
    arguments = [rival, durability, suite, str(scale), str(directory)]
    command = [sys.executable, __file__, *arguments]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        printed, failure = run.stdout, ""
        if run.returncode:
            errors = run.stderr.strip().splitlines()
            failure = errors[-1] if errors else f"exit status {run.returncode}"
    except subprocess.TimeoutExpired as timeout:
        printed = (timeout.stdout or b"").decode()
        failure = f"stopped after {TIMEOUT} seconds"
    for line in printed.splitlines():
        yield json.loads(line)
    if failure:
        yield {"name": "the rest", "skipped": failure}
    shutil.rmtree(directory)


def summary(rounds: list[Result]) -> Result:
    times = [result["microseconds"] for result in rounds]
    return {
        "median": median(times),
        "minimum": min(times),
        "operations": rounds[-1]["operations"],
        "stopped": any(result["stopped"] for result in rounds),
    }


def measure(scale: float, directory: Path) -> Iterator[tuple[str, Any]]:
    stores: dict[str, Any] = {}
    for name, rival in RIVALS.items():
        facts = {"durable": rival.durable, "buffered": rival.buffered}
        stores[name] = {"version": version(rival), **facts, "lost": rival.lost}
    there = [name for name, facts in stores.items() if facts["version"] is not None]
    results: dict[str, Any] = {"stores": stores, "skipped": []}
    turns = [
        (suite, durability, number)
        for suite, rounds in ROUNDS.items()
        for number in range(max(1, round(rounds * scale)))
        for durability in ("durable", "buffered")
    ]
    found: dict[tuple[str, str, str, str], list[Result]] = {}
    for suite, durability, number in turns:
        able = [name for name in there if stores[name][durability] is not None]
        for name in random.sample(able, len(able)):
            yield f"{suite}, {durability}, round {number + 1}: {name}", None
            for result in in_fresh_process(
                name, durability, suite, scale, directory / name
            ):
                if "skipped" in result:
                    what = {"store": name, "suite": suite, "durability": durability}
                    what |= {"workload": result["name"], "why": result["skipped"]}
                    if what not in results["skipped"]:
                        results["skipped"].append(what)
                else:
                    place = (suite, durability, result["name"], name)
                    found.setdefault(place, []).append(result)
        for (suite, durability, workload, name), rounds in found.items():
            table = results.setdefault(suite, {}).setdefault(durability, {})
            table.setdefault(workload, {})[name] = summary(rounds)
        yield "saved", results


if __name__ == "__main__":
    name, durability, suite, scale, directory = sys.argv[1:]
    rival, durable = RIVALS[name], durability == "durable"
    rival(Path(directory, "first"), durable).close()  # so that no import is timed
    for result in SUITES[suite](rival, durable, float(scale), Path(directory)):
        print(json.dumps(result), flush=True)
