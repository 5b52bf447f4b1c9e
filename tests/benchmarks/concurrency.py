"""Readers side by side, and readers beside a writer.

Reads per second of threads and of processes; and how long one read of a thread takes
while another thread is busy. CPython runs one thread at a time (the GIL) and lets a
thread that computes go on for up to 5 ms: so a thread that only computes is the
yardstick for the tails.
"""

import multiprocessing
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter_ns
from typing import Any

from by_hand import ByHand
from entries import MIB, ROOM, SEED, key, value
from lmdb_object_store import LmdbObjectStore

ENTRIES = 50_000
KEYS = 10_000
SECONDS = 2.0
ROUNDS = 3
WORKERS = (1, 2, 4, 8)
KINDS: dict[str, Any] = {"ours": LmdbObjectStore, "by hand": ByHand}
GROWTHS = 20

Stop = Callable[[], bool]


def some_keys() -> list[bytes]:
    numbers = random.Random(SEED).choices(range(ENTRIES), k=KEYS)
    return [key(number).encode() for number in numbers]


def fill(store: Any) -> None:
    store.put_many((key(number).encode(), value(number)) for number in range(ENTRIES))


def read_for(store: Any, start: threading.Barrier, seconds: float) -> float:
    """Return reads per second."""
    get, keys, reads = store.get, some_keys(), 0
    start.wait()
    begin = monotonic()
    while (passed := monotonic() - begin) < seconds:
        for name in keys[(at := reads % KEYS) : at + 100]:
            get(name)
        reads += 100
    return reads / passed


def in_threads(side: str, workers: int, path: Path, seconds: float) -> float:
    store = KINDS[side](path)
    start = threading.Barrier(workers)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(read_for, store, start, seconds) for _ in range(workers)]
    store.close()
    return sum(job.result() for job in jobs)


def _read_in_process(
    side: str, path: Path, start: Any, seconds: float, rates: Any
) -> None:
    store = KINDS[side](path)
    rates.put(read_for(store, start, seconds))
    store.close()


def in_processes(side: str, workers: int, path: Path, seconds: float) -> float:
    spawn = multiprocessing.get_context("spawn")
    start, rates = spawn.Barrier(workers), spawn.Queue()
    arguments = (side, path, start, seconds, rates)
    children = [
        spawn.Process(target=_read_in_process, args=arguments, daemon=True)
        for _ in range(workers)
    ]
    for child in children:
        child.start()
    total = sum(rates.get(timeout=seconds + 60) for _ in children)
    for child in children:
        child.join()
    return total


def compute(store: Any, stopped: Stop) -> None:
    while not stopped():
        sum(range(1000))


def flush(store: Any, stopped: Stop) -> None:
    for number in count():
        if stopped():
            return
        store.put(b"new:%012d" % number, value(number))
        if number % 100 == 0:
            store.flush()


def put_many(store: Any, stopped: Stop) -> None:
    """Write one put_many that lasts until it is stopped."""

    def pairs() -> Iterator[tuple[bytes, object]]:
        for number in count():
            if stopped():
                return
            yield b"many:%012d" % number, value(number)

    store.put_many(pairs())


def grow(store: Any, stopped: Stop) -> None:
    """Grow the map `GROWTHS` times, by little each time."""
    values = [bytes(MIB // 16)] * 16
    numbers = count()
    for _ in range(GROWTHS):
        size = store.env.info()["map_size"]
        store.max_map_size = size + 8 * MIB
        while store.env.info()["map_size"] == size:
            store.put_many((b"large:%012d" % next(numbers), raw) for raw in values)


MEANWHILE: dict[str, Callable[[Any, Stop], None]] = {
    "does nothing": lambda store, stopped: None,
    "computes": compute,
    "flushes all the time": flush,
    "writes one long `put_many`": put_many,
    f"grows the map {GROWTHS} times": grow,
}


def latencies(side: str, meanwhile: str, path: Path, seconds: float) -> list[int]:
    """Return how many nanoseconds reads take while another thread is busy."""
    work = MEANWHILE[meanwhile]
    growing = work is grow
    store = KINDS[side](path, map_size=64 * MIB if growing else ROOM)
    fill(store)
    keys = some_keys()
    end = monotonic() + seconds
    times: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work, store, lambda: monotonic() > end)
        while not job.done() or (monotonic() < end and not growing):
            for name in keys[(at := len(times) % KEYS) : at + 100]:
                start = perf_counter_ns()
                store.get(name)
                times.append(perf_counter_ns() - start)
    job.result()
    store.close()
    shutil.rmtree(path)
    return times


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    cuts = quantiles(nanoseconds, n=1000, method="inclusive")
    return {
        "50 %": cuts[499] / 1e3,
        "99 %": cuts[989] / 1e3,
        "99.9 %": cuts[998] / 1e3,
        "maximum": max(nanoseconds) / 1e3,
    }


def in_turn(sides: list[str], rounds: int) -> Iterator[str]:
    for _ in range(rounds):
        yield from random.sample(sides, len(sides))


def measure(scale: float, directory: Path) -> Iterator[tuple[str, Any]]:
    seconds = max(0.1, SECONDS * scale)
    rounds = max(1, round(ROUNDS * scale))
    results: dict[str, Any] = {"reads per second": [], "microseconds": []}
    for side, make in KINDS.items():
        store = make(directory / side)
        fill(store)
        store.close()
    for kind, one, run in (
        ("threads", "thread", in_threads),
        ("processes", "process", in_processes),
    ):
        for workers in WORKERS:
            yield f"{workers} {kind} that read", None
            rates: dict[str, list[float]] = {side: [] for side in KINDS}
            for side in in_turn([*KINDS], rounds):
                rates[side].append(run(side, workers, directory / side, seconds))
            row = {"kind": kind, "one": one, "workers": workers}
            found = {side: median(rates[side]) for side in KINDS}
            results["reads per second"].append({**row, **found})
    for meanwhile, work in MEANWHILE.items():
        yield f"reads while another thread {meanwhile}", results
        # By hand nothing grows a map beside readers.
        sides = ["ours"] if work is grow else [*KINDS]
        times: dict[str, list[int]] = {side: [] for side in sides}
        for side in in_turn(sides, rounds):
            times[side] += latencies(side, meanwhile, directory / "store", seconds)
        tails = {side: percentiles(times[side]) for side in sides}
        results["microseconds"].append({"meanwhile": meanwhile, **tails})
    yield "done", results
