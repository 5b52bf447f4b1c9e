"""The examples, run as a user runs them."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmdb_object_store import LmdbObjectStore

INDEX_STDLIB = Path(__file__).with_name("examples") / "index_stdlib.py"

Indexed = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """Run the example once and keep its store."""
    path = tmp_path_factory.mktemp("indexed") / "store"
    command = [sys.executable, str(INDEX_STDLIB), "--path", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return path, run


def test_printed_figures_agree_with_the_store_left_behind(indexed: Indexed) -> None:
    path, run = indexed
    report = re.fullmatch(
        r"Python .*\n"
        r"modules  ([\d,]+) parsed, [\d,]+ skipped\n"
        r"writing  \d+\.\d\d s for ([\d,]+) objects\n"
        r"reading  \d+\.\d\d s for ([\d,]+) objects\n"
        r"on disk  ([\d,]+) bytes\n"
        r"(\{.*\})\n",
        run.stdout,
        re.DOTALL,
    )
    assert report, run.stdout
    modules, written, read, size = (
        int(n.replace(",", "")) for n in report.groups()[:4]
    )
    assert size == (path / "data.mdb").stat().st_size
    assert 1000 <= read < written
    with LmdbObjectStore(path, key_encoding="utf-8", readonly=True) as store:
        assert 100 < modules < written == store.env.stat()["entries"]
        assert ast.literal_eval(report[5]) == store["calendar.isleap"]


def test_entries_describe_what_the_interpreter_imports(indexed: Indexed) -> None:
    path, _ = indexed
    with LmdbObjectStore(path, key_encoding="utf-8", readonly=True) as store:
        function = store["json.loads"]
        nested = store["json.decoder.JSONDecoder.decode"]
        assert store["json.decoder.JSONDecodeError"]["signature"] == "(ValueError)"
    assert function == {
        "name": "json.loads",
        "signature": str(inspect.signature(json.loads)),
        "doc": inspect.getdoc(json.loads),
        "file": "json/__init__.py",
        "line": inspect.getsourcelines(json.loads)[1],
    }
    assert nested["line"] == inspect.getsourcelines(json.JSONDecoder.decode)[1]


def test_no_progress_without_a_terminal(indexed: Indexed) -> None:
    _, run = indexed
    assert run.stderr == ""


def test_progress_counts_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    watcher, terminal = pty.openpty()
    command = [sys.executable, str(INDEX_STDLIB), "--path", str(tmp_path)]
    example = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    try:
        seen = b""
        while not re.search(rb"^1 of [\d,]+ modules, 0 objects *\r2 of ", seen):
            chunk = os.read(watcher, 1024)
            assert chunk, seen
            seen += chunk
    finally:
        example.kill()
        example.wait()
        os.close(watcher)
