"""Growing data: the library, whose map begins at 1 MiB, against preset maps.

Those are one by hand and one of the library, which shows what growing adds. All are
loaded in turn inside one process, chunk by chunk; making the entries takes no part. As
for the hot paths, nothing waits for the disk. Memory is measured in a fresh process for
each way to load:
    python growth.py (put_many|update|"by hand") ENTRIES DIRECTORY
"""

import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from by_hand import ByHand
from entries import DIGITS, MIB, ROOM, SEED, chunks, key, value
from lmdb_object_store import LmdbObjectStore

CHUNK = 10_000
# Entries, and how often; the short loads are as noisy as they are short.
SIZES = ((10_000, 20), (100_000, 6), (1_000_000, 2), (10_000_000, 1))
ORDERS = ("sorted", "random")
METHODS = ("put", "put_many")
MEMORY_ENTRIES = 1_000_000
LOADERS = ("put_many", "update", "by hand")

Pairs = list[tuple[bytes, object]]


def entries(order: str, count: int) -> Iterator[Pairs]:
    chance = random.Random(SEED)
    numbers: Iterable[int] = range(count)
    if order == "random":
        numbers = (chance.randrange(10**DIGITS) for _ in range(count))
    for chunk in chunks(numbers, CHUNK):
        yield [(key(number).encode(), value(number)) for number in chunk]


def write(store: Any, method: str, pairs: Pairs) -> None:
    if method == "put_many":
        store.put_many(pairs)
    else:
        put = store.put
        for key, obj in pairs:
            put(key, obj)


def load(order: str, method: str, count: int, directory: Path) -> dict[str, Any]:
    """Return seconds and the size of the file for each side."""
    makers: dict[str, tuple[Any, int]] = {
        "ours": (LmdbObjectStore, MIB),
        "ours, preset": (LmdbObjectStore, ROOM),
        "by hand": (ByHand, ROOM),
    }
    sides = list(makers)
    paths = {side: directory / side for side in sides}
    stores = {
        side: make(paths[side], map_size=map_size, sync=False)
        for side, (make, map_size) in makers.items()
    }
    seconds = dict.fromkeys(sides, 0.0)
    for pairs in entries(order, count):
        random.shuffle(sides)
        for side in sides:
            start = perf_counter()
            write(stores[side], method, pairs)
            seconds[side] += perf_counter() - start
    for side, store in stores.items():
        start = perf_counter()
        store.flush()
        seconds[side] += perf_counter() - start
        store.close()
    sizes = {side: (path / "data.mdb").stat().st_size for side, path in paths.items()}
    for path in paths.values():
        shutil.rmtree(path)
    return {"seconds": seconds, "bytes": sizes}


def summary(loads: list[dict[str, Any]], count: int) -> dict[str, Any]:
    times = [load["seconds"] for load in loads]
    return {
        "entries": count,
        "ratio": median(taken["ours"] / taken["by hand"] for taken in times),
        "growing": median(taken["ours"] / taken["ours, preset"] for taken in times),
        "microseconds": {
            side: min(taken[side] for taken in times) / count * 1e6 for side in times[0]
        },
        "file, bytes": loads[-1]["bytes"],
    }


def anonymous() -> int:
    """Return the private memory of this process: no page of the mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon")


def peak_of(work: Callable[[], None]) -> int:
    """Return by how much `work` raises the private memory at most."""
    before = highest = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return highest - before


def peak_of_loading(loader: str, count: int, path: Path) -> int:
    pairs = ((key(number).encode(), value(number)) for number in range(count))
    by_hand = loader == "by hand"
    store: Any = ByHand(path, map_size=ROOM) if by_hand else LmdbObjectStore(path)
    work = getattr(store, "put_many" if by_hand else loader)
    peak = peak_of(lambda: work(pairs))
    store.close()
    return peak


def measure_memory(count: int, directory: Path) -> dict[str, Any]:
    try:
        anonymous()
    except OSError as error:
        return {"not measured": f"needs Linux ({error})"}
    found: dict[str, Any] = {"entries": count}
    for loader in LOADERS:
        arguments = [loader, str(count), str(directory / loader)]
        command = [sys.executable, __file__, *arguments]
        found[loader] = int(subprocess.check_output(command, text=True))
    return found


def measure(scale: float, directory: Path) -> Iterator[tuple[str, Any]]:
    results: dict[str, Any] = {"loads": [], "memory": {}}
    largest = max(CHUNK, SIZES[-1][0] * scale)
    for count, full_rounds in SIZES:
        if count > largest:
            continue
        rounds = max(1, round(full_rounds * scale))
        for order in ORDERS:
            for method in METHODS:
                found = []
                for _ in range(rounds):
                    yield f"{count:,} entries, {order} keys, {method}", None
                    found.append(load(order, method, count, directory))
                result = {"order": order, "method": method, **summary(found, count)}
                results["loads"].append(result)
                yield "saved", results
    yield "memory", None
    count = max(CHUNK, round(MEMORY_ENTRIES * scale))
    results["memory"] = measure_memory(count, directory)
    yield "done", results


if __name__ == "__main__":
    print(peak_of_loading(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
