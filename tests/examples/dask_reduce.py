"""Count what the standard library calls, by several processes that share a store.

Needs Dask: ``pip install "dask[distributed]"``.

Keeps the source of each module under its dotted name. Each task of a Dask cluster is
handed the store and a range of its keys, reads that range by itself and counts the
names that are called there; a tree of further tasks adds up the counts.

An LMDB file is for the processes of one host. To use more hosts, put a copy of the
finished store at the same path on each, the scheduler's too, where nobody writes to it,
start ``dask worker`` there, and give the scheduler's address as ``--scheduler``.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial, reduce
from itertools import islice, pairwise
from operator import add
from pathlib import Path
from time import perf_counter

from lmdb_object_store import LmdbObjectStore

try:
    from dask.distributed import Client, Future, LocalCluster, progress
except ImportError:
    sys.exit('This example needs Dask: pip install "dask[distributed]"')

STDLIB = Path(sysconfig.get_path("stdlib"))
TESTS = {"test", "tests", "idle_test"}
SHARDS = 8  # for each worker: the modules differ in size
FAN_IN = 4  # how many counts a task adds up
SHOWN = 5

Range = tuple[str | None, str | None]
Counts = tuple[Counter[str], Counter[str]]
"""How often each name is called, and how many modules each process has read."""


def modules(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the source of each module that can be imported."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(str.isidentifier, {*subfolders} - TESTS)
        for path in (Path(folder, file) for file in files):
            if path.suffix == ".py" and path.stem.isidentifier():
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                try:
                    source = path.read_bytes()
                except OSError:  # a dangling link
                    continue
                yield name.removesuffix(".__init__"), source


def ranges(store: LmdbObjectStore[str, bytes], number: int) -> list[Range]:
    """Divide all keys, those to come as well, into ranges with as many entries each."""
    size = len(store) // number + 1
    bounds = islice(store.keys(), size, None, size)  # no value is read for that
    return list(pairwise([None, *bounds, None]))


def count(store: LmdbObjectStore[str, bytes], bounds: Range) -> Counts:
    """Count the calls in the modules of a range: what each worker does."""
    start, stop = bounds
    names: Counter[str] = Counter()
    sources = 0
    for source in store.values(start=start, stop=stop):
        names.update(calls(source))
        sources += 1
    return names, Counter({f"{platform.node()} {os.getpid()}": sources})


def calls(source: bytes) -> Iterator[str]:
    """Yield the last part of the name of whatever is called in a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the source, such as invalid escapes
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr


def total(parts: list[Counts]) -> Counts:
    """Add up the counts of several tasks."""
    names, processes = zip(*parts, strict=True)
    return reduce(add, names), reduce(add, processes)


def tree(client: Client, parts: list[Future[Counts]]) -> Future[Counts]:
    """Add up all counts, on the workers and a few at a time."""
    while len(parts) > 1:
        groups = [parts[i : i + FAN_IN] for i in range(0, len(parts), FAN_IN)]
        parts = client.map(total, groups, pure=False)
    return parts[0]


def run(client: Client, path: Path) -> None:
    """Read the store at `path` with all workers of a cluster."""
    with LmdbObjectStore[str, bytes](
        path, key_encoding="utf-8", readonly=True
    ) as store:
        client.wait_for_workers(1)
        workers = len(client.nthreads())
        start = perf_counter()
        shards = ranges(store, SHARDS * workers)
        # Dask caches the results of pure functions, but a store can change.
        parts = client.map(partial(count, store), shards, pure=False)
        result = tree(client, parts)
        if sys.stderr.isatty():
            with redirect_stdout(sys.stderr):
                progress(result)
        names, processes = result.result()
        seconds = perf_counter() - start
    print(
        f"reading  {seconds:.2f} s for {processes.total():,} modules "
        f"in {len(shards)} ranges by {len(processes)} processes"
    )
    print(f"found    {names.total():,} calls of {len(names):,} names")
    for name, times in names.most_common(SHOWN):
        print(f"{times:>8,} {name}")


def fill(root: Path, path: Path) -> None:
    """Store the source of each module of a library."""
    with LmdbObjectStore[str, bytes](path, key_encoding="utf-8") as store:
        start = perf_counter()
        store.put_many(modules(root))
        seconds = perf_counter() - start
        print(f"writing  {seconds:.2f} s for {len(store):,} modules")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, help="keep the store in this directory")
    parser.add_argument("--workers", type=int, default=2, help="how many processes")
    parser.add_argument("--scheduler", help="the address of a cluster to use instead")
    parser.add_argument(
        "--source", type=Path, default=STDLIB, help="read this library instead"
    )
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, standard library in {arguments.source}")
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.path or Path(temporary, "store")
        fill(arguments.source, path)
        if arguments.scheduler:
            with Client(arguments.scheduler) as client:
                run(client, path)
        else:
            with (
                LocalCluster(
                    n_workers=arguments.workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",  # any free port
                    local_directory=Path(temporary, "dask"),
                ) as cluster,
                Client(cluster) as client,
            ):
                run(client, path)


if __name__ == "__main__":
    main()
