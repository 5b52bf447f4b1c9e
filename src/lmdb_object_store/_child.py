"""Work on a data file in a child process.

There a read transaction holds up no growth of this process, however long the work
takes. And a damaged page, which LMDB can answer with SIGBUS or an abort, ends the child
alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from select import select
from typing import IO, Any, TypeVar, cast

import lmdb

from .exceptions import CorruptedError

_R = TypeVar("_R")

Progress = Callable[[int, int], object]
"""Told how far a work is: ``progress(done, total)``, in bytes."""

_MAIN = """\
import sys
sys.path[:] = sys.argv[1:]
from lmdb_object_store._child import serve
serve()
"""
_OF_DAMAGE = [-getattr(signal, name, 0) for name in ("SIGBUS", "SIGSEGV", "SIGABRT")]
_PAUSE = 0.5  # seconds
_CONSENT = b"y"
_READY = b"lmdb-object-store is ready\n"  # nothing that is printed before it counts


def call(
    work: Callable[..., _R], *args: Any, scratch: str, progress: Progress | None
) -> _R:
    """Return ``work(parent, *args)``, called in a child process.

    `work` is a function of a module of this package. It calls ``parent.tell(done,
    total)`` now and then, which calls `progress` here. Raises what `work` raises. The
    child makes the file `scratch`, unless that is "", and ends with this call. If this
    process is killed, the child removes the file, and ends.
    """
    try:
        process = subprocess.Popen(
            [_interpreter(), "-c", _MAIN, *_module_path()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise RuntimeError(
            f"A Python process that is to read the file can't be started: {error}. If "
            "there is another interpreter, name it by multiprocessing.set_executable()."
        ) from error
    output = cast("IO[bytes]", process.stdout)
    input_ = cast("IO[bytes]", process.stdin)
    ready = ends = False
    try:
        with suppress(OSError):  # the child is gone
            pickle.dump((work, args, scratch), input_)
            input_.flush()
        ready = _READY in output
        while message := _receive(output):
            kind, content = message
            if kind == "progress":
                if progress is not None:
                    progress(*content)
            elif kind == "question":
                with suppress(OSError):
                    input_.write(_CONSENT)
                    input_.flush()
            else:
                ends = True
                if kind == "error":
                    raise content
                return cast("_R", content)
        ends = True
    finally:
        if not ends:
            process.kill()
        process.wait()
        output.close()
        with suppress(OSError):
            input_.close()
    raise _failure(process.returncode, ready)


def _receive(output: IO[bytes]) -> tuple[str, Any] | None:
    """Return the next message of the child, or None if the child has ended."""
    try:
        message: tuple[str, Any] = pickle.load(output)
    except (EOFError, pickle.UnpicklingError):
        return None
    return message


def _failure(code: int, ready: bool) -> Exception:
    if not ready:
        return RuntimeError(
            "A Python process that is to read the file can't be started: "
            f"{_interpreter()!r} has ended with {code}. Name the interpreter by "
            "multiprocessing.set_executable()."
        )
    if code in _OF_DAMAGE:
        return CorruptedError(
            "LMDB has ended the process that read the file, by "
            f"{signal.Signals(-code).name}: the file is damaged. See what is wrong by "
            "`lmdb-object-store check`."
        )
    return RuntimeError(f"The process that read the file has been ended, by {code}.")


def _interpreter() -> str:
    from multiprocessing.spawn import get_executable  # takes long to import

    executable = get_executable()
    if not executable or getattr(sys, "frozen", False):
        raise RuntimeError(
            "This program has no Python interpreter that could work on the file beside "
            "it. Run `python -m lmdb_object_store` where there is one."
        )
    return os.fsdecode(executable)


def _module_path() -> list[str]:
    """Return a ``sys.path`` with all modules of this process."""
    packages = [os.path.dirname(os.path.dirname(__file__))]
    packages.append(os.path.dirname(os.path.dirname(lmdb.__file__)))
    return [os.path.abspath(path) for path in [*sys.path, *packages]]


class Parent:
    """The process that waits for the work, as the child sees it."""

    def __init__(self, output: IO[bytes], scratch: str) -> None:
        self._output = output
        self._scratch = scratch
        self._lock = threading.Lock()
        self._agrees = threading.Event()
        self._number = -1 if os.name == "nt" else os.getppid()
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, done: int, total: int) -> None:
        self.send("progress", (done, total))

    def ask(self) -> None:
        """Return when `progress` has been told of all; it can end the work before."""
        self.send("question", None)
        self._agrees.wait()

    def send(self, kind: str, content: object) -> None:
        with self._lock, suppress(OSError):  # the process may have ended
            pickle.dump((kind, content), self._output)
            self._output.flush()

    def _watch(self) -> None:
        """Wait for the end of the process, then end.

        The end of the pipe tells so, unless a process that was forked meanwhile has it.
        """
        while os.name == "nt" or os.getppid() == self._number:
            if os.name == "nt" or select([0], [], [], _PAUSE)[0]:
                if not os.read(0, 1):
                    break
                self._agrees.set()
        _remove(self._scratch)
        os._exit(0)


def serve() -> None:
    """Do the work that the parent process sends, in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else gets into the output
    output.write(b"\n" + _READY)
    output.flush()
    work, args, scratch = pickle.load(sys.stdin.buffer)
    try:
        if scratch:
            make_scratch(scratch)
    except OSError as error:
        pickle.dump(("error", error), output)
        output.flush()
        return
    parent = Parent(output, scratch)
    try:
        parent.send("result", work(parent, *args))
    except Exception as error:
        _remove(scratch)
        parent.send("error", error)


def _remove(file: str) -> None:
    with suppress(OSError):
        os.remove(file)


def make_scratch(file: str) -> None:
    """Make an unfinished file, which nobody else can read yet."""
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
