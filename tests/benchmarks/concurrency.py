"""Readers side by side, and readers beside a writer.

Reads per second of threads and of processes; and how long one read of a thread takes
while another thread is busy. CPython runs one thread at a time (the GIL) and lets a
thread that computes go on for up to 5 ms: so a thread that only computes is the
yardstick for the tails.
"""

import multiprocessing
import random
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import quantiles
from time import monotonic, perf_counter_ns
from typing import Any

from by_hand import ByHand
from entries import MIB, SEED, key, value
from lmdb_object_store import LmdbObjectStore

ENTRIES = 50_000
SECONDS = 4.0
WORKERS = (1, 2, 4, 8)
KINDS: dict[str, Any] = {"ours": LmdbObjectStore, "by hand": ByHand}
GROWTHS = 20
ROOM = 2**34  # enough for a put_many of some seconds

Stop = Callable[[], bool]


def some_keys() -> list[bytes]:
    numbers = random.Random(SEED).choices(range(ENTRIES), k=10_000)
    return [key(number).encode() for number in numbers]


def fill(store: Any) -> None:
    store.put_many((key(number).encode(), value(number)) for number in range(ENTRIES))


def read_for(store: Any, start: threading.Barrier, seconds: float) -> float:
    """Return reads per second."""
    get, keys, reads = store.get, some_keys(), 0
    start.wait()
    begin = monotonic()
    while (passed := monotonic() - begin) < seconds:
        for name in keys[reads % 10_000 :][:100]:
            get(name)
        reads += 100
    return reads / passed


def in_threads(side: str, workers: int, path: Path, seconds: float) -> float:
    store = KINDS[side](path)
    start = threading.Barrier(workers)
    rates: list[float] = []
    threads = [
        threading.Thread(target=lambda: rates.append(read_for(store, start, seconds)))
        for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    return sum(rates)


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
        spawn.Process(target=_read_in_process, args=arguments) for _ in range(workers)
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


def latencies(side: str, meanwhile: str, path: Path, seconds: float) -> Any:
    """Return how long reads take, in microseconds, while another thread is busy."""
    work = MEANWHILE[meanwhile]
    growing = work is grow
    if growing and side == "by hand":
        return None  # nothing there grows a map beside readers
    store = KINDS[side](path, map_size=64 * MIB if growing else ROOM)
    fill(store)
    keys = some_keys()
    end = monotonic() + seconds
    thread = threading.Thread(target=work, args=(store, lambda: monotonic() > end))
    times: list[int] = []
    thread.start()
    while thread.is_alive() or (monotonic() < end and not growing):
        for name in keys[len(times) % 10_000 :][:100]:
            start = perf_counter_ns()
            store.get(name)
            times.append(perf_counter_ns() - start)
    thread.join()
    store.close()
    return percentiles(times)


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    cuts = quantiles(nanoseconds, n=1000, method="inclusive")
    return {
        "reads": len(nanoseconds),
        "50 %": cuts[499] / 1e3,
        "99 %": cuts[989] / 1e3,
        "99.9 %": cuts[998] / 1e3,
        "maximum": max(nanoseconds) / 1e3,
    }


def measure(scale: float, directory: Path) -> Iterator[tuple[str, Any]]:
    seconds = max(0.1, SECONDS * scale)
    results: dict[str, Any] = {
        "switch interval, milliseconds": sys.getswitchinterval() * 1e3,
        "reads per second": [],
        "microseconds": [],
    }
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
            rates = {
                side: run(side, workers, directory / side, seconds) for side in KINDS
            }
            row = {"kind": kind, "one": one, "workers": workers, **rates}
            results["reads per second"].append(row)
    for number, meanwhile in enumerate(MEANWHILE):
        yield f"reads while another thread {meanwhile}", results
        found = {
            side: latencies(side, meanwhile, directory / f"{side}{number}", seconds)
            for side in KINDS
        }
        results["microseconds"].append({"meanwhile": meanwhile, **found})
    yield "done", results
