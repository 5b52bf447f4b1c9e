"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmdb_object_store import LmdbObjectStore

PATIENCE = 30.0
"""Seconds until a test that waits for another thread gives up."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
needs_sigterm = pytest.mark.skipif(
    os.name == "nt", reason="Windows has no SIGTERM to send"
)

LINUX = sys.platform == "linux"
MOUNT = ["unshare", "--mount"] if LINUX and os.geteuid() == 0 else ["unshare", "-rm"]
"""Begins a command that can mount file systems; see `small_disks`."""

THOROUGH = False
"""Whether to try all moments and to repeat often."""
SEED = 0
"""It chooses the moments that are tried if not all are."""

# In this order; then all others.
SLOWEST = [
    *("test_block_interrupts", "test_interrupts", "test_reentrancy", "test_fork"),
    *("test_capacity", "test_iteration", "test_faults", "test_bank", "test_examples"),
    *("test_interface", "test_model", "test_snapshots", "test_sharing"),
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough",
        action="store_true",
        help="try all moments of every operation, and repeat often",
    )
    parser.addoption(
        "--seed", type=int, help="choose the same moments as a run that printed this"
    )


def pytest_configure(config: pytest.Config) -> None:
    global THOROUGH, SEED
    THOROUGH = config.option.thorough
    seed = getattr(config, "workerinput", {}).get("seed", config.option.seed)
    SEED = random.randrange(10**6) if seed is None else seed
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # As a shell starts what runs in the background, and nohup. The tests send it,
        # and programs that they start would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give a worker of pytest-xdist the seed that is printed."""
    node.workerinput["seed"] = SEED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use more processes than there are processors: tests often wait for the disk."""
    return 2 * (os.cpu_count() or 1)


def times(usual: int, *, thorough: int) -> int:
    """Return how often to repeat, or how much to do: more with ``--thorough``."""
    return thorough if THOROUGH else usual


def pytest_report_header() -> str:
    return "all moments" if THOROUGH else f"some moments, chosen by --seed={SEED}"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Choose combinations, and begin with the slowest files.

    So no process is left with one of those at the end.
    """
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(SLOWEST)))
    if not THOROUGH:
        values: dict[tuple[Any, ...], list[Any]] = {}
        chosen = [item for item in items if _is_chosen(item, values)]
        config.hook.pytest_deselected(items=[*{*items}.difference(chosen)])
        items[:] = chosen


def _is_chosen(item: Any, values: dict[tuple[Any, ...], list[Any]]) -> bool:
    """Return whether to run a test that may have the mark `one_in`.

    If each of two parameters has as many values as that, each value is tried. `values`
    numbers the values of each parameter of a test, in the order in which they come.
    """
    mark = item.get_closest_marker("one_in")
    if mark is None:
        return True
    [number] = mark.args
    position = SEED
    for name, value in item.callspec.params.items():
        known = values.setdefault((item.parent, item.originalname, name), [])
        places = [place for place, one in enumerate(known) if one is value]
        position += places[0] if places else len(known)
        if not places:
            known.append(value)
    return position % number == 0


@pytest.fixture(scope="session")
def small_disks() -> None:
    """Skip where this user can't mount a small file system by `MOUNT`."""
    probe = [*MOUNT, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        subprocess.run(probe, check=True, capture_output=True, timeout=PATIENCE)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("can't mount a file system here")


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Spare the tests' many collections what the test run itself consists of."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., LmdbObjectStore[Any, Any]]]:
    """Open stores in a folder of the test's own; they are closed after it.

    Nothing is flushed by itself, unless the test says so.
    """
    opened: list[LmdbObjectStore[Any, Any]] = []

    def open_one(name: str = "db", **options: Any) -> LmdbObjectStore[Any, Any]:
        options.setdefault("flush_interval", None)
        store: LmdbObjectStore[Any, Any] = LmdbObjectStore(tmp_path / name, **options)
        opened.append(store)
        return store

    yield open_one
    for store in opened:  # in a thread: after a deadlock this would hang, too
        Worker(store.close).result()
    gc.collect()


@contextmanager
def logging_to(
    emit: Callable[[logging.LogRecord], Any], level: int = logging.ERROR
) -> Iterator[None]:
    """Call `emit` with what the library logs."""
    handler = logging.Handler(level)
    handler.emit = emit  # type: ignore[method-assign]
    logger = logging.getLogger("lmdb_object_store")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@pytest.fixture
def errors() -> Iterator[queue.Queue[logging.LogRecord]]:
    """Collect the errors that the library logs, from now on."""
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    with logging_to(records.put):
        yield records


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in `tmp_path`, by an interpreter of its own.

    It can import `conftest` and `moments`.
    """

    def run(
        script: str,
        *arguments: object,
        options: Sequence[str] = ("-W", "default"),
        returncode: int = 0,
    ) -> subprocess.CompletedProcess[str]:
        # A file, not -c: children of multiprocessing import it.
        (tmp_path / "script.py").write_text(script, "utf-8")
        result = subprocess.run(
            [sys.executable, *options, "script.py", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == returncode, result.stderr
        return result

    return run


_HOLDER = """
import lmdb, os, sys
path = sys.argv[1]
with lmdb.open(path, subdir=os.path.isdir(path)).begin(write=True):
    print("holds LMDB's lock", flush=True)
    sys.stdin.read()
"""


def hold_up_writers(path: str) -> subprocess.Popen[str]:
    """Start a process that holds LMDB's lock until its stdin is closed."""
    command = [sys.executable, "-c", _HOLDER, path]
    pipe = subprocess.PIPE
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep coverage.py out of the programs that the test runs.

    Its tracer has a lock, which a KeyboardInterrupt can leave held and a fork inherits.
    """
    for name in list(os.environ):
        if name.startswith("COVERAGE"):
            monkeypatch.delenv(name)


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return all that is on disk in one of the stores in `tmp_path`."""

    def stored(name: str = "db") -> dict[str, Any]:
        store: Any = LmdbObjectStore(tmp_path / name, readonly=True)
        with store, store.env.begin() as txn:
            return {key.decode(): pickle.loads(raw) for key, raw in txn.cursor()}

    return stored


@pytest.fixture
def hasty() -> Iterator[None]:
    """Switch threads often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Worker:
    """A thread whose exception or result the test gets back."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._action()
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_until_in(self, function: str, inside: bool = True) -> None:
        """Wait until the thread is inside of `function`, where it can't say so.

        Or, if not `inside`, until it is outside.
        """
        wait_until_in(function, self._thread.ident or 0, inside)

    def functions(self) -> list[str]:
        """The names of the functions that the thread is in."""
        return _functions(self._thread.ident or 0)

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self.running, "the thread hangs"
        if self._error is not None:
            raise self._error
        return self._result


def wait_until_in(function: str, thread: int, inside: bool = True) -> None:
    """As `Worker.wait_until_in`, for any thread."""
    pause = threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if (function in _functions(thread)) == inside:
            return
        pause.wait(0.01)
    raise AssertionError(f"the thread never came to {function}()")


def _functions(thread: int) -> list[str]:
    # Not kept, as it refers to all frames, and so to their transactions.
    # Documented in spite of its underscore.
    frame = sys._current_frames().get(thread)  # noqa: SLF001
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


@pytest.fixture
def in_thread() -> Callable[[Callable[[], Any]], Worker]:
    """Run a function in a thread; ``.result()`` waits for it and re-raises."""
    return Worker


def wait_until_idle_in(function: str, thread: int) -> None:
    """Wait until a thread stands still inside of `function`, as it waits for a lock."""
    pause = threading.Event()
    wait_until_in(function, thread)
    moments: list[Any] = []
    for _ in range(int(PATIENCE * 200)):
        # Documented in spite of its underscore.
        frame = sys._current_frames()[thread]  # noqa: SLF001
        moments.append((frame.f_code, frame.f_lasti))
        del frame  # it refers to all frames
        if len(moments) > 20 and len(set(moments[-20:])) == 1:
            return
        pause.wait(0.005)
    raise AssertionError(f"the thread never waited in {function}()")


def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Return once `condition` holds."""
    pause = threading.Event()
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came so far"
        pause.wait(0.01)


def is_running(process: int) -> bool:
    """Return whether a process of that number has not ended."""
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        return not status.exists() or ") Z " not in status.read_text("ascii")
    except (ProcessLookupError, FileNotFoundError):
        return False


def run_all(*actions: Callable[[], Any]) -> list[Any]:
    """Run the actions in a thread each, starting at once; return their results."""
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return action()

    workers = [Worker(partial(run, action)) for action in actions]
    return [worker.result() for worker in workers]
