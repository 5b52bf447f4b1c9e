"""What is pending when an interpreter, a thread or a child process ends."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from conftest import PATIENCE, eventually, needs_fork, needs_sigterm

METHODS = ["spawn"] if os.name == "nt" else ["fork", "spawn", "forkserver"]


OPEN = """
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", key_encoding="utf-8")
"""


# The interpreter's exit


@pytest.mark.parametrize(
    ("end", "returncode"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit", 0),
        ("raise ZeroDivisionError", 1),
        ("def f(store): 1 / 0\nf(store)", 1),
        ("cycle = [store]; cycle.append(cycle); del store", 0),
        ("import gc; gc.disable(); cycle = [store]; cycle.append(cycle); del store", 0),
        ("keep = store.put; del store", 0),
    ],
)
def test_exit_flushes_and_warns(run, stored, end, returncode):
    script = OPEN + "store.put_many({'a': 0, 'b': 1})\nstore['c'] = 2\n"
    script += "store.delete('a')\n" + end
    result = run(script, returncode=returncode)
    assert result.stderr.count("ResourceWarning: ") == 1
    assert "db' was not closed" in result.stderr
    assert stored() == {"b": 1, "c": 2}


def test_exit_after_close_is_silent(run, stored):
    script = OPEN + "with store: store['key'] = 1"
    assert "Warning" not in run(script).stderr
    assert stored() == {"key": 1}


def test_os_exit_loses_only_what_was_not_flushed(run, stored):
    run(OPEN + "import os\nstore['a'] = 1; store.flush(); store['b'] = 2; os._exit(0)")
    assert stored() == {"a": 1}


def test_every_store_is_flushed_though_warnings_are_errors(run, stored):
    script = """
from lmdb_object_store import LmdbObjectStore
stores = [LmdbObjectStore(str(n)) for n in range(3)]
for store in stores:
    store[b"key"] = 1
"""
    result = run(script, options=("-W", "error"))
    assert result.stderr.count("was not closed") >= 1
    assert [stored(name) for name in "012"] == [{"key": 1}] * 3


def test_every_store_is_flushed_though_one_cannot_be(run, stored):
    script = """
from lmdb_object_store import LmdbObjectStore
for name, cap in ("0", None), ("1", 2**20), ("2", None):
    globals()["store" + name] = store = LmdbObjectStore(name, max_map_size=cap)
    for n in range(64):
        store[b"%02d" % n] = bytes(2**15)  # 2 MiB in all
"""
    result = run(script)
    assert "64 pending writes are lost" in result.stderr
    assert [len(stored(name)) for name in "012"] == [64, 0, 64]


def test_exit_flush_grows_the_map(run, stored):
    script = """
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", map_size=2**16)
store[b"large"] = bytes(2**22)
"""
    run(script)
    assert stored() == {"large": bytes(2**22)}


def test_exit_with_a_read_only_store(run, stored):
    script = OPEN + "store['key'] = 1; store.close()\n"
    script += "store = LmdbObjectStore('db', readonly=True)"
    result = run(script)
    assert "was not closed" in result.stderr
    assert "lost" not in result.stderr


SIGNALLED_AT_EXIT = """
import multiprocessing, os, signal, sys
from lmdb_object_store import LmdbObjectStore
from moments import is_method

def terminate(frame, event, function):
    if event == "c_call" and is_method(function, "putmulti"):
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGTERM)

def work():
    global stores
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stores = [LmdbObjectStore(name, flush_interval=None) for name in "012"]
    for store in stores:
        store[b"key"] = 1
    sys.setprofile(terminate)  # at the first commit, which is that at exit

if sys.argv[1:] == ["main"]:
    work()
elif __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    process.start()
    process.join()
"""


@pytest.mark.one_in(2)
@needs_sigterm
@pytest.mark.parametrize("where", ["main", *METHODS])
def test_a_signal_during_the_exit_flush_loses_nothing(run, stored, where):
    assert "lost" not in run(SIGNALLED_AT_EXIT, where).stderr
    assert [stored(name) for name in "012"] == [{"key": 1}] * 3


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        ("store['b'] = 1", {"a": 0, "b": 1}),
        ("store.delete('a')", {}),
        ("del store['a']", {}),
        ("store.put_many({'b': 1})", {"a": 0, "b": 1}),
    ],
)
def test_write_after_the_exit_flush_reaches_the_disk(run, stored, write, expected):
    # The function is registered before the library's own, and so is called after.
    script = f"import atexit\n@atexit.register\ndef last():\n    {write}\n"
    assert "Error" not in run(script + OPEN + "store['a'] = 0").stderr
    assert stored() == expected


def test_store_opened_after_the_exit_flush_writes_through(run, stored):
    script = "import atexit\n@atexit.register\ndef last():\n    global late\n"
    script += "    late = LmdbObjectStore('late'); late[b'key'] = 1\n" + OPEN
    assert "Error" not in run(script).stderr
    assert stored("late") == {"key": 1}


def test_store_closed_after_the_exit_flush(run, stored):
    script = "import atexit\natexit.register(lambda: store.close(strict=True))\n"
    assert "Error" not in run(script + OPEN + "store['key'] = 1").stderr
    assert stored() == {"key": 1}


# Threads


@pytest.mark.parametrize(
    "keep", ["store", "local.store"], ids=["local variable", "threading.local"]
)
def test_store_of_a_thread_is_flushed_when_the_thread_ends(run, stored, keep):
    script = f"""
import os, threading
from lmdb_object_store import LmdbObjectStore
local = threading.local()

def work():
    {keep} = LmdbObjectStore("db")
    {keep}[b"key"] = 1

thread = threading.Thread(target=work)
thread.start()
thread.join()
LmdbObjectStore("db").close()  # closed, too
os._exit(0)
"""
    assert "was not closed" in run(script).stderr
    assert stored() == {"key": 1}


def test_thread_that_outlives_the_main_thread(run, stored):
    script = """
import threading
def work():
    threading.main_thread().join()
    store["key"] = 1
"""
    run(script + OPEN + "threading.Thread(target=work).start()")
    assert stored() == {"key": 1}


def test_daemon_threads_that_put_during_exit(run, stored):
    # All of them note each put that has returned: each of those is on disk.
    script = """
import os, sys, threading
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", batch_size=50, key_encoding="utf-8")
started = threading.Barrier(5)

def work(name):
    n = 0
    while True:
        store[f"{name} {n}"] = n
        os.write(1, f"{name} {n}\\n".encode())
        n += 1
        if n == 100:
            started.wait()

for name in "abcd":
    threading.Thread(target=work, args=name, daemon=True).start()
started.wait()
"""
    result = run(script)
    assert "lost" not in result.stderr
    on_disk = stored().keys()
    noted = result.stdout.splitlines()
    assert len(noted) >= 400
    assert [line for line in noted if line not in on_disk] == []
    # At most the put that each thread was in is there without a note.
    more = Counter(key[0] for key in on_disk - set(noted))
    assert all(count == 1 for count in more.values())


def test_daemon_threads_that_read_during_exit(run, stored):
    script = """
import threading
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db", key_encoding="utf-8")
store.put_many({"small": 1, "large": bytes(2**20)})
rounds = threading.Semaphore(0)

def work():
    while True:
        assert store["small"] == 1
        assert store["large"] == bytes(2**20)
        assert len(store.get_many(["small", "large"])[0]) == 2
        rounds.release()

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
store["pending"] = 2
for _ in range(8):
    rounds.acquire()
"""
    assert "Error" not in run(script).stderr
    assert stored().keys() == {"small", "large", "pending"}


def test_exit_does_not_wait_for_ever_for_a_blocked_commit(run, stored):
    # Another process is LMDB's writer; a daemon thread waits for it in a commit.
    script = """
import threading
from conftest import hold_up_writers
from lmdb_object_store import LmdbObjectStore
from moments import let_exit_wait
let_exit_wait(0.2)  # spares this test some seconds
store = LmdbObjectStore("db", batch_size=2)
store.put_many({b"flushed": 0})
holder = hold_up_writers("db")  # until this process has ended

def work(name):
    for n in range(10):
        store[b"%d %d" % (name, n)] = n

for name in range(2):
    threading.Thread(target=work, args=(name,), daemon=True).start()
while len(store.write_buffer) < store.batch_size:
    pass  # only while a thread is flushing does the buffer become this full
"""
    result = run(script)
    assert "pending writes are lost: Another thread is still writing" in result.stderr
    assert stored() == {"flushed": 0}


# Children of multiprocessing, and of billiard, which Celery uses

packages = pytest.mark.parametrize("package", ["multiprocessing", "billiard"])

# Without an interval nothing but the end of the child flushes.
CHILD = """
import importlib, sys
from lmdb_object_store import LmdbObjectStore

def work():
    global store  # else it would be flushed at the end of this function
    store = LmdbObjectStore("db", flush_interval=None)
    for n in range(100):
        store[b"%d" % n] = n
    exec(sys.argv[3], globals())

if __name__ == "__main__":
    package = importlib.import_module(sys.argv[1])
    process = package.get_context(sys.argv[2]).Process(target=work)
    process.start()
    process.join()
    print(process.exitcode)
"""
PUT_BY_CHILD = {f"{n}": n for n in range(100)}


@pytest.mark.one_in(6)
@packages
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("end", "exitcode"), [("", 0), ("1 / 0", 1), ("sys.exit(3)", 3)]
)
def test_child_that_does_not_close(run, stored, package, method, end, exitcode):
    result = run(CHILD, package, method, end)
    assert result.stdout == f"{exitcode}\n"
    assert "db' was not closed" in result.stderr
    assert stored() == PUT_BY_CHILD


@needs_fork
@packages
def test_forked_child_that_imports_the_library_itself(run, stored, package):
    imports = "from lmdb_object_store import LmdbObjectStore\n"
    script = CHILD.replace(imports, "")
    script = script.replace("    global", f"    {imports}    global")
    assert "db' was not closed" in run(script, package, "fork", "").stderr
    assert stored() == PUT_BY_CHILD


@needs_fork
@packages
def test_forked_child_that_writes_to_the_store_of_its_parent(run, stored, package):
    script = """
import importlib, sys
from lmdb_object_store import LmdbObjectStore

def work():
    for n in range(100):
        store[b"%d" % n] = n

store = LmdbObjectStore("db", flush_interval=None)
package = importlib.import_module(sys.argv[1])  # now only
process = package.get_context("fork").Process(target=work)
process.start()
process.join()
assert process.exitcode == 0
store.close()
"""
    run(script, package)
    assert stored() == PUT_BY_CHILD


@pytest.mark.parametrize("method", METHODS)
def test_thread_that_outlives_the_main_thread_of_a_child(run, stored, method):
    end = """
import threading
def put():
    threading.main_thread().join()
    store[b"late"] = 2
threading.Thread(target=put).start()
"""
    run(CHILD, "multiprocessing", method, end)
    assert stored() == {**PUT_BY_CHILD, "late": 2}


@packages
@pytest.mark.parametrize("method", [name for name in METHODS if name != "fork"])
def test_store_opened_by_import_in_a_child(run, stored, package, method):
    # Such a child imports the main module before it is told what it is.
    script = """
import importlib, sys
from lmdb_object_store import LmdbObjectStore

if __name__ != "__main__":
    store = LmdbObjectStore("db", flush_interval=None)

def work():
    store[b"key"] = 1

if __name__ == "__main__":
    package = importlib.import_module(sys.argv[1])
    process = package.get_context(sys.argv[2]).Process(target=work)
    process.start()
    process.join()
"""
    assert "db' was not closed" in run(script, package, method).stderr
    assert stored() == {"key": 1}


@pytest.mark.parametrize("method", METHODS)
def test_child_does_not_keep_closed_stores(run, method):
    script = """
import gc, multiprocessing, sys
from lmdb_object_store import LmdbObjectStore

def alive():
    gc.collect()
    modules = [type(thing).__module__ for thing in gc.get_objects()]
    return sum(name.startswith("lmdb_object_store") for name in modules)

def work():
    counts = []
    for _ in range(4):
        LmdbObjectStore("db").close()
        counts.append(alive())
    assert counts == counts[:1] * 4, counts

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
    run(script, method)


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_process_pool_executor(run, stored, method):
    script = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from lmdb_object_store import LmdbObjectStore

def open_store():
    global store
    store = LmdbObjectStore("db", key_encoding="utf-8")

def work(n):
    store[f"{n}"] = n

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(2, context, open_store) as pool:
        list(pool.map(work, range(20)))
"""
    run(script, method)
    assert stored() == {f"{n}": n for n in range(20)}


GRANDCHILD = """
import importlib, sys
from lmdb_object_store import LmdbObjectStore

def write():
    store["grandchild"] = 1

def work():
    global store
    store = LmdbObjectStore("db", key_encoding="utf-8", flush_interval=None)
    package = importlib.import_module(sys.argv[3])
    process = package.get_context("fork").Process(target=write)
    process.start()
    process.join()
    assert process.exitcode == 0
    store.close()

if __name__ == "__main__":
    package = importlib.import_module(sys.argv[1])
    process = package.get_context(sys.argv[2]).Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0
"""


@pytest.mark.one_in(2)
@needs_fork
@pytest.mark.parametrize(
    ("outer", "method", "inner"),
    [
        *(("multiprocessing", method, "multiprocessing") for method in METHODS),
        ("multiprocessing", "fork", "billiard"),
        ("billiard", "fork", "multiprocessing"),
        ("billiard", "fork", "billiard"),
    ],
)
def test_child_of_a_child_that_does_not_close(run, stored, outer, method, inner):
    run(GRANDCHILD, outer, method, inner)
    assert stored() == {"grandchild": 1}


# As Celery does at the end of its workers. See test_servers.py for the real one.
STAND_IN = """
import os, sys, types
from lmdb_object_store import LmdbObjectStore

class Signal:
    def __init__(self):
        self.receivers = []

    def connect(self, receiver, weak=True):
        assert not weak
        self.receivers.append(receiver)

    def send(self, sender, **named):
        for receiver in self.receivers:
            receiver(signal=self, sender=sender, **named)

signals = sys.modules["celery.signals"] = types.ModuleType("celery.signals")
"""
IMPORT = "signals.worker_process_shutdown = Signal()"
OPEN_ONE = "store = LmdbObjectStore('db', flush_interval=None)"
FORK = "if pid := os.fork(): sys.exit(os.waitpid(pid, 0)[1])"
WORK = """
for n in range(100):
    store[b"%d" % n] = n
LmdbObjectStore("other").close()
assert len(signals.worker_process_shutdown.receivers) == 1
signals.worker_process_shutdown.send("worker", pid=os.getpid(), exitcode=0)
store[b"late"] = "late"
os._exit(0)
"""


@needs_fork
@pytest.mark.parametrize(
    "steps",
    [
        [IMPORT, OPEN_ONE, FORK],
        [OPEN_ONE, IMPORT, FORK],
        [IMPORT, FORK, OPEN_ONE],
        [FORK, IMPORT, OPEN_ONE],
    ],
    ids=[
        "import open fork",
        "open import fork",
        "import fork open",
        "fork import open",
    ],
)
def test_worker_of_celery_that_does_not_close(run, stored, steps):
    assert "lost" not in run(STAND_IN + "\n".join(steps) + WORK).stderr
    assert stored() == {**PUT_BY_CHILD, "late": "late"}


# Processes that end without a word


def test_os_exit_loses_nothing_that_other_processes_see(tmp_path, open_store, stored):
    script = """
import os, sys
from lmdb_object_store import LmdbObjectStore
store = LmdbObjectStore("db")
for n in range(100):
    store[b"%d" % n] = n
sys.stdin.readline()
os._exit(0)  # as many a worker of a server
"""
    store = open_store()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as child:
        eventually(lambda: len(store) == 100)
        child.communicate(b"\n", timeout=PATIENCE)
    store.close()
    assert stored() == {f"{n}": n for n in range(100)}


TERMINATED = """
import signal, sys, threading
from lmdb_object_store import LmdbObjectStore
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
store = LmdbObjectStore("db", flush_interval=None)
for n in range(100):
    store[b"%d" % n] = n
print("put", flush=True)
idle = threading.Event()
while True:
    idle.wait(0.05)  # not for ever: the signal may have come just before
"""


@needs_sigterm
def test_sigterm_that_ends_the_interpreter_loses_nothing(tmp_path, stored):
    command = [sys.executable, "-c", TERMINATED]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as service:
        assert service.stdout.readline() == b"put\n"
        service.terminate()
        assert service.wait(PATIENCE) == 143
    assert stored() == {f"{n}": n for n in range(100)}


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_pool_that_is_closed_lose_nothing(run, stored, method):
    script = """
import multiprocessing, sys
from lmdb_object_store import LmdbObjectStore

def open_store():
    global store
    store = LmdbObjectStore("db", flush_interval=None)

def put(n):
    store[b"%d" % n] = n

if __name__ == "__main__":
    pool = multiprocessing.get_context(sys.argv[1]).Pool(2, open_store)
    pool.map(put, range(100))
    pool.close()  # a pool that is left by `with` terminates its workers
    pool.join()
"""
    run(script, method)
    assert stored() == {f"{n}": n for n in range(100)}


# Transaction blocks


def test_a_block_that_is_open_at_exit_is_undone(run, stored):
    run(
        OPEN
        + """
def block():
    with store.transaction():
        store["inside"] = 1
        yield

store["before"] = 1
suspended = block()
next(suspended)
"""
    )
    assert stored() == {"before": 1}


def test_exit_does_not_wait_for_the_block_of_a_daemon_thread(run, stored):
    result = run(
        OPEN
        + """
import threading
inside = threading.Event()

def block():
    with store.transaction():
        store["inside"] = 1
        inside.set()
        threading.Event().wait()

store["before"] = 1
threading.Thread(target=block, daemon=True).start()
inside.wait()
"""
    )
    assert "lost" not in result.stderr
    assert stored() == {"before": 1}
