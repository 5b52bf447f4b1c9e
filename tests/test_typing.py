"""The types that users see, as mypy understands them."""

import subprocess
import sys
from pathlib import Path

import pytest

from lmdb_object_store import LmdbObjectStore

ROOT = Path(__file__).parents[1]


def test_mypy_strict_has_nothing_to_say(tmp_path):
    # An unneeded "type: ignore" is an error too, so each one proves an error.
    pytest.importorskip("mypy", reason="needs mypy")
    path = "tests/typing/interface.py"
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, path]
    run = subprocess.run(
        mypy, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("types", [(bytes,), (str, dict[str, int])])
def test_class_takes_types_at_run_time(tmp_path, types):
    with LmdbObjectStore[types](tmp_path, key_encoding="utf-8") as store:
        store[b"k"] = {"a": 1}
        assert type(store) is LmdbObjectStore
        assert store[b"k"] == {"a": 1}


def test_subclass_may_settle_the_types(tmp_path):
    class Numbers(LmdbObjectStore[bytes, int]):
        def add(self, key, number):
            self[key] = self.get(key, 0) + number

    with Numbers(tmp_path) as store:
        store.add(b"k", 1)
        store.add(b"k", 2)
        assert store[b"k"] == 3
