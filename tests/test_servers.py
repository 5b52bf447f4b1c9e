"""Stores in real servers: gunicorn, uvicorn with and without FastAPI, Celery.

They are in the group `servers` of pyproject.toml. All listen on the loopback address,
on a port that is free, and are killed at the end with all their processes.
"""

import http.client
import importlib.util
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from conftest import eventually, needs_sigterm
from test_readme import blocks

LIMIT = 60.0
"""Seconds until a test gives up; the machine may be busy."""

pytestmark = needs_sigterm


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"needs {' and '.join(missing)}: pip install --group servers"
    return pytest.mark.skipif(bool(missing), reason=reason)


class Server:
    """A program in a process group of its own, and what it has printed."""

    def __init__(self, folder, command):
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def printed(self):
        return self._log.read_text("utf-8", "replace")

    def wait_for(self, pattern, times=1):
        """Wait until it has printed something; return the last occurrence."""

        def found():
            assert self.process.poll() is None, self.printed
            return re.findall(pattern, self.printed)

        try:
            eventually(lambda: len(found()) >= times, LIMIT)
        except AssertionError:
            raise AssertionError(self.printed) from None
        return found()[-1]

    def connect(self):
        port = self.wait_for(r"http://127\.0\.0\.1:([1-9]\d*)")
        return http.client.HTTPConnection("127.0.0.1", int(port), LIMIT)

    def request(self, method, path):
        """Return the status of the answer, and its text."""
        connection = self.connect()
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def terminate(self):
        """Ask the server's first process to end; return its exit code."""
        self.process.terminate()
        return self.process.wait(LIMIT)

    def kill(self):
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LIMIT)


@pytest.fixture
def start(tmp_path):
    """Start a module of Python, with an application in `app.py`."""
    servers = []

    def start(application, *command):
        (tmp_path / "app.py").write_text(application, "utf-8")
        servers.append(Server(tmp_path, command))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


# gunicorn

WSGI = """
import os
from lmdb_object_store import LmdbObjectStore

visible = LmdbObjectStore("visible", batch_size=1, key_encoding="utf-8")
pending = LmdbObjectStore("pending", flush_interval=None, key_encoding="utf-8")


def app(environ, start_response):
    environ["wsgi.input"].read()  # until the client has sent the last byte
    key = environ["PATH_INFO"][1:]
    if environ["REQUEST_METHOD"] == "PUT":
        visible[key] = pending[key] = key
    start_response("200 OK", [])
    return [f"{os.getpid()} {visible.get(key)}".encode()]
"""


@needs("gunicorn")
@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["", "preload"])
def test_workers_of_gunicorn_see_at_once_what_was_answered(start, stored, options):
    server = start(
        WSGI, "gunicorn", "--workers=2", "--bind=127.0.0.1:0", *options, "app:app"
    )
    server.wait_for("Booting worker", times=2)
    keys = [f"note {number}" for number in range(100)]
    writers = set()
    for key in keys:
        path = "/" + key.replace(" ", "%20")
        status, text = server.request("PUT", path)
        writer, _, value = text.partition(" ")
        assert (status, value) == (200, key)
        writers.add(writer)
        # One worker waits for the last byte of this request: the other has to answer
        # the next one.
        held = server.connect()
        held.putrequest("GET", path)
        held.putheader("Content-Length", "1")
        held.endheaders()
        free, _, value = server.request("GET", path)[1].partition(" ")
        assert value == key
        held.send(b".")
        waiting, _, value = held.getresponse().read().decode().partition(" ")
        held.close()
        assert value == key
        assert len({free, waiting}) == 2
        assert writer in (free, waiting)
    assert server.terminate() == 0
    written = {key: key for key in keys}
    assert stored("visible") == written
    # Workers run their exit functions, so that not even this one loses anything.
    assert stored("pending") == written


# uvicorn

ASGI = """
import os, signal, sys
from lmdb_object_store import LmdbObjectStore

{start}
store = LmdbObjectStore("db", flush_interval=None, key_encoding="utf-8")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        {end}
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    key = scope["path"][1:]
    store[key] = key
    await send({{"type": "http.response.start", "status": 200}})
    await send({{"type": "http.response.body", "body": key.encode()}})
"""
TWO_LINES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))"
UVICORN = ["uvicorn", "--port=0", "app:app"]


@needs("uvicorn")
@pytest.mark.parametrize(
    ("parts", "options", "exit_code"),
    [
        ({"end": "store.close()"}, [], -signal.SIGTERM),
        ({"end": "store.close()"}, ["--workers=2"], 0),
        ({"start": TWO_LINES}, [], 143),
    ],
    ids=["close", "close in workers", "two lines"],
)
def test_uvicorn_loses_nothing_that_it_has_answered(
    start, stored, parts, options, exit_code
):
    # It raises SIGTERM again when it has ended: no exit function would run.
    application = ASGI.format(**{"start": "", "end": "", **parts})
    server = start(application, *UVICORN, *options)
    server.wait_for("Application startup complete", times=2 if options else 1)
    keys = [f"{number}" for number in range(50)]
    for key in keys:
        assert server.request("PUT", f"/{key}") == (200, key)
    assert server.terminate() == exit_code
    assert "Traceback" not in server.printed
    assert stored() == {key: key for key in keys}


FASTAPI = """
import asyncio, threading
from contextlib import asynccontextmanager
from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from lmdb_object_store import LmdbObjectStore

store = LmdbObjectStore("db", key_encoding="utf-8")
blocks = LmdbObjectStore("blocks", key_encoding="utf-8", timeout=0.5)


@asynccontextmanager
async def lifespan(app):
    yield
    store.close()


app = FastAPI(lifespan=lifespan)


@app.put("/put/{key}")
def put(key: str):
    store[key] = key


@app.put("/count/{key}")
def count(key: str):
    with store.transaction():
        store[key] = store.get(key, 0) + 1


class OtherThreads:
    "Keeps all threads busy that have run something, so that others run the rest."

    def __init__(self):
        self.leave = threading.Event()
        self.calls = []

    async def occupy(self):
        occupied = asyncio.Event()
        wake = asyncio.get_running_loop().call_soon_threadsafe
        barrier = threading.Barrier(5, lambda: wake(occupied.set))

        def wait():
            barrier.wait(30)
            self.leave.wait(30)

        calls = [run_in_threadpool(wait) for _ in range(5)]
        self.calls += map(asyncio.ensure_future, calls)
        await occupied.wait()


def begin(key: str):
    other = OtherThreads()
    try:
        with blocks.transaction():
            blocks["begun " + key] = key
            yield other
    finally:
        other.leave.set()


async def use_elsewhere(other=Depends(begin)):
    await other.occupy()
    yield
    other.leave.set()
    await asyncio.wait(other.calls)


async def end_elsewhere(other=Depends(begin)):
    yield
    await other.occupy()


@app.put("/use/{key}")
def use(key: str, _=Depends(use_elsewhere)):
    blocks[key] = key


@app.put("/end/{key}")
def end(key: str, _=Depends(end_elsewhere)):
    pass
"""


@needs("uvicorn", "fastapi")
def test_endpoints_of_fastapi_write_from_threads(start, stored):
    server = start(FASTAPI, *UVICORN)
    keys = [f"{number}" for number in range(20)]
    for key in keys:
        assert server.request("PUT", f"/put/{key}")[0] == 200
        assert server.request("PUT", "/count/all")[0] == 200
    assert server.terminate() == -signal.SIGTERM
    assert "Traceback" not in server.printed
    assert stored() == {**{key: key for key in keys}, "all": 20}


@needs("uvicorn", "fastapi")
@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/use/key", 500, "BusyError: .*thread"),
        ("/end/key", 200, "ClosedError: .*another thread"),  # it has been answered
    ],
)
def test_a_block_around_a_yield_of_fastapi_fails_and_says_so(
    start, stored, path, status, error
):
    # A dependency that is no coroutine is entered, used and left in any threads.
    server = start(FASTAPI, *UVICORN)
    assert server.request("PUT", path)[0] == status
    server.wait_for(error)
    server.terminate()
    assert stored("blocks") == {}


@needs("uvicorn", "fastapi")
def test_the_recipe_for_fastapi_counts(start, stored):
    [recipe] = [code for _, code in blocks("python") if "FastAPI(" in code]
    server = start(recipe, *UVICORN)
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(server.request, ["GET"] * 20, ["/hits/home"] * 20)
        assert {*answers} == {(200, f"{number}") for number in range(1, 21)}
    assert server.terminate() == -signal.SIGTERM
    assert "Traceback" not in server.printed
    assert stored("visits.db") == {"home": 20}


# Celery

CELERY = """
import os
from celery import Celery, signals
from lmdb_object_store import LmdbObjectStore

folders = {"data_folder_in": "broker", "data_folder_out": "broker"}
app = Celery("app", broker="filesystem://")
app.conf.broker_transport_options = {**folders, "polling_interval": 0.1}
app.conf.worker_enable_remote_control = False
app.conf.task_ignore_result = True
inherited = LmdbObjectStore("inherited", flush_interval=None, key_encoding="utf-8")
closed = LmdbObjectStore("closed", flush_interval=None, key_encoding="utf-8")
opened = []


@app.task
def put(number):
    if not opened:
        opened.append(
            LmdbObjectStore("opened", flush_interval=None, key_encoding="utf-8")
        )
    for store in [inherited, closed, *opened]:
        for part in range(10):
            store[f"{number} {part}"] = part


@signals.worker_ready.connect
def send(**_):
    for number in range(10):
        put.delay(number)


@signals.worker_process_shutdown.connect
def close(**_):
    closed.close(strict=True)
"""


@needs("celery")
@pytest.mark.parametrize("options", [[], ["--max-tasks-per-child=3"]], ids=["", "few"])
def test_workers_of_celery_lose_nothing(tmp_path, start, stored, options):
    # They end by os._exit().
    (tmp_path / "broker").mkdir()
    server = start(
        CELERY,
        *("celery", "--app=app", "worker", "--pool=prefork", "--concurrency=2"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        *("--loglevel=INFO", *options),
    )
    server.wait_for(r"Task app\.put\[.*\] succeeded", times=10)
    assert server.terminate() == 0
    assert "Traceback" not in server.printed
    written = {f"{number} {part}": part for number in range(10) for part in range(10)}
    assert stored("closed") == written
    assert stored("inherited") == written
    assert stored("opened") == written
