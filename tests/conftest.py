"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmdb_object_store import LmdbObjectStore

PATIENCE = 30.0
"""Seconds until a test that waits for another thread gives up."""


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> None:
    """Spare the tests' many collections what the test run itself consists of."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., LmdbObjectStore[Any, Any]]]:
    """Open stores in a folder of the test's own; they are closed after it."""
    opened: list[LmdbObjectStore[Any, Any]] = []

    def open_one(name: str = "db", **options: Any) -> LmdbObjectStore[Any, Any]:
        store: LmdbObjectStore[Any, Any] = LmdbObjectStore(tmp_path / name, **options)
        opened.append(store)
        return store

    yield open_one
    for store in opened:  # in a thread: after a deadlock this would hang, too
        Worker(store.close).result()
    gc.collect()


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

    def wait_until_in(self, function: str) -> None:
        """Wait until the thread has called `function`, where it can't say so."""
        pause = threading.Event()
        for _ in range(int(PATIENCE * 100)):
            frames = sys._current_frames()  # noqa: SLF001 (documented all the same)
            frame = frames.get(self._thread.ident or 0)
            while frame is not None:
                if frame.f_code.co_name == function:
                    return
                frame = frame.f_back
            pause.wait(0.01)
        raise AssertionError(f"the thread never came to {function}()")

    def result(self) -> Any:
        self._thread.join(PATIENCE)
        assert not self.running, "the thread hangs"
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture
def in_thread() -> Callable[[Callable[[], Any]], Worker]:
    """Run a function in a thread; ``.result()`` waits for it and re-raises."""
    return Worker


def run_all(*actions: Callable[[], Any]) -> list[Any]:
    """Run the actions in a thread each, starting at once; return their results."""
    start = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return action()

    workers = [Worker(partial(run, action)) for action in actions]
    return [worker.result() for worker in workers]
