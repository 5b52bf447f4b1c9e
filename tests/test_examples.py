"""The examples, run as a user runs them."""

import ast
import asyncio
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from socket import socket
from textwrap import dedent

import pytest

import conftest
from conftest import PATIENCE
from lmdb_object_store import LmdbObjectStore

EXAMPLES = Path(__file__).with_name("examples")
INDEX_STDLIB = EXAMPLES / "index_stdlib.py"
DASK_REDUCE = EXAMPLES / "dask_reduce.py"
ASYNCIO_SERVER = EXAMPLES / "asyncio_server.py"

STDLIB = Path(sysconfig.get_path("stdlib"))
PART = ["asyncio", "email", "importlib", "json", "multiprocessing", "unittest"]

Indexed = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library to read: the standard one, or some of it, which takes less."""
    if conftest.THOROUGH:
        return STDLIB
    path = tmp_path_factory.mktemp("source")
    for name in PART:
        shutil.copytree(STDLIB / name, path / name)
    shutil.copy(STDLIB / "calendar.py", path)
    return path


def run_index(source: Path, path: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, INDEX_STDLIB, "--source", source, "--path", path]
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def indexed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """Run the example once and keep its store."""
    path = tmp_path_factory.mktemp("indexed") / "store"
    return path, run_index(source, path)


# Few tests use `indexed`, as each may run in a process of its own, which makes it anew.


def test_what_is_printed_agrees_with_the_store_left_behind(indexed: Indexed) -> None:
    path, run = indexed
    # Without a terminal progress is in lines.
    first, *others = run.stderr.splitlines(keepends=True)
    assert re.fullmatch(r"1 of [\d,]+ modules, 0 objects\n", first)
    for line in others:
        assert re.fullmatch(r"[\d,]+ of [\d,]+ modules, [\d,]+ objects\n", line)
    report = re.fullmatch(
        r"Python .*\n"
        r"store    in (.+)\n"
        r"modules  ([\d,]+) parsed, [\d,]+ skipped\n"
        r"writing  \d+\.\d\d s for ([\d,]+) objects\n"
        r"reading  \d+\.\d\d s for ([\d,]+) objects\n"
        r"on disk  ([\d,]+) bytes\n"
        r"(\{.*\})\n"
        r"next     look for more:\n(.*)",
        run.stdout,
        re.DOTALL,
    )
    assert report, run.stdout
    modules, written, read, size = (
        int(n.replace(",", "")) for n in report.groups()[1:5]
    )
    assert report[1] == str(path)
    assert size == (path / "data.mdb").stat().st_size
    assert 1000 <= read < written
    with LmdbObjectStore(path, key_encoding="utf-8", readonly=True) as store:
        assert 100 < modules < written == store.env.stat()["entries"]
        assert ast.literal_eval(report[6]) == store["calendar.isleap"]
    command = [sys.executable, "-c", dedent(report[7])]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert lines[0] == (inspect.getdoc(json.loads) or "").splitlines()[0]
    assert "json.decoder.JSONDecoder.decode" in ast.literal_eval(lines[-1])


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


def test_modules_that_can_not_be_read_are_skipped(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(STDLIB / "calendar.py", source)
    (source / "bad.py").write_text("def unfinished(", "utf-8")
    try:
        (source / "dangling.py").symlink_to(tmp_path / "nowhere")
    except OSError:
        pytest.skip("this user can't make symbolic links")
    run = run_index(source, tmp_path / "store")
    assert "modules  1 parsed, 2 skipped\n" in run.stdout


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


def test_dask_workers_find_what_a_loop_finds(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(DASK_REDUCE), "--path", str(tmp_path)]
    command += ["--source", str(source)]
    with socket() as dashboard:
        with suppress(OSError):  # another cluster has it
            dashboard.bind(("127.0.0.1", 8787))
            dashboard.listen()
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=90, check=False
        )
    assert run.returncode == 0, run.stderr
    # Dask logs there, now and then, what its processes met while they were ended.
    assert "Completed" not in run.stderr  # no progress without a terminal
    assert "UserWarning" not in run.stderr
    report = re.fullmatch(
        r"Python .*\n"
        r"writing  \d+\.\d\d s for ([\d,]+) modules\n"
        r"reading  \d+\.\d\d s for ([\d,]+) modules in \d\d ranges by (\d+) processes\n"
        r"found    ([\d,]+) calls of ([\d,]+) names\n"
        r"((?: *[\d,]+ \w+\n){5})",
        run.stdout,
    )
    assert report, run.stdout
    written, read, processes, calls, names = (
        int(n.replace(",", "")) for n in report.groups()[:5]
    )
    assert processes == 2

    counts: Counter[str] = Counter()
    with (
        LmdbObjectStore[str, bytes](
            tmp_path, key_encoding="utf-8", readonly=True
        ) as store,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about invalid escapes
        assert 100 < written == read == len(store)
        for source in store.values():
            for node in ast.walk(ast.parse(source)):
                match node:
                    case ast.Call(ast.Name(name) | ast.Attribute(attr=name)):
                        counts[name] += 1
    assert (calls, names) == (counts.total(), len(counts))
    shown = [line.split() for line in report[6].splitlines()]
    top = [int(times.replace(",", "")) for times, _ in shown]
    assert top == [times for _, times in counts.most_common(5)]
    assert top == [counts[name] for _, name in shown]


def test_dask_example_says_what_it_needs() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['dask.distributed'] = None\n"  # as if it were not there
        f"runpy.run_path({str(DASK_REDUCE)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == 'This example needs Dask: pip install "dask[distributed]"\n'


def test_dask_progress_on_a_terminal(source: Path, tmp_path: Path) -> None:
    if not conftest.THOROUGH:
        pytest.skip("takes long: --thorough runs it")
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    watcher, terminal = pty.openpty()
    command = [sys.executable, str(DASK_REDUCE), "--path", str(tmp_path)]
    command += ["--source", str(source)]
    # What Dask logs would break the line.
    environment = os.environ | {"DASK_LOGGING__DISTRIBUTED": "critical"}
    example = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=terminal
    )
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(watcher, 1024):
            seen += chunk
    except OSError:  # all have closed the terminal
        pass
    finally:
        os.close(watcher)
    assert example.wait(PATIENCE) == 0, seen
    # One line, overwritten again and again and cleared in the end.
    frame = rb"\r\[#* *\] \| +\d+% Completed \| [^\r\n]*s"
    assert re.match(rb"(%b)+\x1b\[2K\r" % frame, seen), seen


async def ask(port: int, lines: list[str]) -> list[str]:
    """Send lines to the server, and return its answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    for line in lines:
        writer.write(line.encode() + b"\n")
        answers.append((await reader.readline()).decode().rstrip("\n"))
    writer.close()
    await writer.wait_closed()
    return answers


async def ask_all(port: int, talks: list[list[str]]) -> list[list[str]]:
    return await asyncio.wait_for(
        asyncio.gather(*(ask(port, lines) for lines in talks)), PATIENCE
    )


def test_asyncio_clients_get_their_answers_and_all_is_stored(tmp_path: Path) -> None:
    clients, rounds = 5, 20
    talks: list[list[str]] = []
    for client in range(clients):
        talks.append([])
        for n in range(rounds):
            key = f"{client}:{n}"
            talks[client] += [f"put {key} text of {n}", f"get {key}", "count all"]
        talks[client] += ["get nothing", "nonsense"]
    server = subprocess.Popen(
        [sys.executable, str(ASYNCIO_SERVER), "--path", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout
        port = int(server.stdout.readline().removeprefix("port "))
        answers = asyncio.run(ask_all(port, talks))
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=PATIENCE)
    if os.name == "posix":  # elsewhere that kills it
        assert server.returncode == 128 + signal.SIGTERM, errors

    for got in answers:
        assert got[:-2:3] == ["ok"] * rounds
        assert got[1:-2:3] == [f"text of {n}" for n in range(rounds)]
        assert got[-2:] == ["", "?"]
    numbers = [int(number) for got in answers for number in got[2:-2:3]]
    assert sorted(numbers) == [*range(1, clients * rounds + 1)]
    with LmdbObjectStore(tmp_path, key_encoding="utf-8") as store:
        assert store.pop("all") == clients * rounds
        if os.name == "posix":
            assert dict(store.items()) == {
                f"{client}:{n}": f"text of {n}"
                for client in range(clients)
                for n in range(rounds)
            }
