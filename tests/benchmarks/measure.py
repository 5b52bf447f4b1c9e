"""Measure, and write the results as JSON.

All of it, for the tables of the README (almost an hour):
    python tests/benchmarks/measure.py
    python tests/benchmarks/report.py
The hot paths alone, for a minute; fails if one has become slow, as CI runs it:
    python tests/benchmarks/measure.py --short
"""

import argparse
import json
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import lmdb

import concurrency
import growth
import hotpaths
import lmdb_object_store
import rivals

RESULTS = Path(__file__).with_name("results.json")
PARTS: dict[str, Callable[[float, Path], Iterator[tuple[str, Any]]]] = {
    "hot": hotpaths.measure,
    "growth": growth.measure,
    "concurrency": concurrency.measure,
    "rivals": rivals.measure,
}
SHORT = 0.08  # of the full work: half a minute to a minute on two slow cores
# A hot path fails the check above this multiple of its aim: other work on the machines
# of CI moves even ratios. Absolute times of one machine say nothing about another, so
# only ratios are checked; the time of the import is none.
LIMIT = 1.5


def about(scale: float, directory: Path) -> dict[str, Any]:
    """Return what has to be known about this machine to judge its figures."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "scale": scale,
        "versions": {
            "lmdb-object-store": lmdb_object_store.__version__,
            "Python": platform.python_version(),
            "py-lmdb": metadata.version("lmdb"),
            "LMDB": ".".join(map(str, lmdb.version())),
            "SQLite": sqlite3.sqlite_version,
        },
        "machine": {
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
            "processor": processor(),
            "cores": os.cpu_count(),
            "file system": file_system(directory),
            "fsync, milliseconds": fsync_time(directory),
        },
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def file_system(directory: Path) -> str | None:
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return None
    mounts = [line.split() for line in lines]
    folder = str(directory.resolve()) + "/"
    fitting = [m for m in mounts if folder.startswith(m[1].rstrip("/") + "/")]
    return max(fitting, key=lambda mount: len(mount[1]))[2] if fitting else None


def fsync_time(directory: Path) -> float:
    """Return how long the disk takes for a page, the least that a commit costs."""
    times = []
    with open(directory / "page", "wb", buffering=0) as file:
        for _ in range(20):
            file.write(bytes(4096))
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return median(times) * 1e3


def show(text: str, start: float) -> None:
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    line = f"{minutes:3}:{seconds:02} {text}"
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:100]}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def check(paths: list[dict[str, Any]], limit: float) -> int:
    """Print the ratios; return the exit status: 1 if one is over its limit."""
    slow = hotpaths.over(paths, limit)
    for path in paths:
        aim = "-" if path["aim"] is None else f"{path['aim']:.2f}"
        verdict = f"more than {limit:g} times the aim" if path["name"] in slow else ""
        print(f"{path['name']:36}{path['ratio']:6.2f}  aim {aim:6}{verdict}")
    if slow:
        print(f"Too slow: {', '.join(slow)}")
    return bool(slow)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="check the hot paths")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", type=float, help="how much of the full work")
    parser.add_argument("--limit", type=float, default=LIMIT, help="of --short")
    parser.add_argument("--output", type=Path, help="results.json, but for --short")
    parser.add_argument("--directory", help="where the stores are made")
    options = parser.parse_args()
    scale, output, parts = options.scale, options.output, {**PARTS}
    if options.short:
        scale = scale or SHORT
        parts = {"hot": partial(hotpaths.measure, limit=options.limit)}
    else:
        scale = scale or 1.0
        output = output or RESULTS
        parts = {name: PARTS[name] for name in options.only}
    results = json.loads(output.read_text()) if output and output.exists() else {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        facts = about(scale, Path(folder))
        if facts["machine"]["file system"] == "tmpfs":
            show("tmpfs waits for no disk: see --directory", start)
        for name, measure in parts.items():
            directory = Path(folder, name)
            directory.mkdir()
            for progress, found in measure(scale, directory):
                show(f"{name}: {progress}", start)
                if found:
                    results[name] = {"about": facts, **found}
                    if output:  # at once, so that an interruption loses little
                        output.write_text(json.dumps(results, indent=1) + "\n")
            shutil.rmtree(directory)
    print(file=sys.stderr)
    if options.short:
        return check(results["hot"]["paths"], options.limit)
    failures = results.get("rivals", {}).get("skipped", [])
    for failure in failures:
        print("Not measured:", ", ".join(failure.values()))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
