"""What fork leaves to the parent, and what the child gets."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context

import pytest

from conftest import PATIENCE, needs_fork, times, wait_until_in
from lmdb_object_store import BusyError, ClosedError
from moments import (
    FORK_BARS_READS,
    FORK_KEEPS_WRITERS,
    FORK_WAITS_FOR_READS,
    FORKS,
    WAITS_FOR_BLOCK,
    WAITS_FOR_FORK,
    WAITS_FOR_SNAPSHOTS,
    Parked,
    every_step,
    handling,
)
from test_faults import ENGINES, verify

pytestmark = [
    needs_fork,
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

# For scripts that run by themselves.
FORK = """
import gc, os, signal, subprocess, sys, threading
from lmdb_object_store import BusyError, ClosedError, LmdbObjectStore, LostWritesError

def open_store(**options):
    return LmdbObjectStore("db", key_encoding="utf-8", **options)

def wait_for(child):
    "Fork, run `child` there, and return the child's exit code."
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # ends it if it hangs
        child()
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

PENDING = f"""{FORK}
store = open_store(flush_interval=None)  # or the fork would flush
store.put_many({{"flushed": 0}})
store["pending"] = 1

def check_parent():
    "Nothing but the parent's own writes is there, and it can go on."
    assert store.env.stat()["entries"] == 1
    assert dict(store.write_buffer).keys() == {{b"pending"}}
    assert store.get_many(["flushed", "pending"])[0] == {{b"flushed": 0, b"pending": 1}}
    store.put_many({{str(n): n for n in range(1000)}})
    assert store["999"] == 999
    store.close(strict=True)
"""


def fork(child):
    """Run `child` in a forked process, and return its exit code: 0 if it is true."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE))  # ends it if it hangs
            code = not child()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# The parent's and the child's


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("child", "code"),
    [
        ("pass", 0),
        ("del globals()['store']; gc.collect()", 0),
        ("store.close(strict=True)", 0),
        ("store.flush()", 0),
        ("assert store['flushed'] == 0; del globals()['store']; gc.collect()", 0),
        ("raise ZeroDivisionError", 1),
        ("os._exit(0)", 0),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_a_child_leaves_the_pending_writes_to_the_parent(run, stored, child, code):
    script = f"""{PENDING}
def child():
    {child}

assert wait_for(child) == {code}
check_parent()
"""
    # sys.exit() and the exception end the child here as a script ends.
    result = run(script)
    assert "lost" not in result.stderr
    assert "not closed" not in result.stderr
    assert len(stored()) == 1002


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "use",
    [
        "store['flushed'] == 0",
        "store.get('pending') is None",
        "'pending' not in store",
        "not store.exists('pending')",
        "store.get_many(['flushed', 'pending']) == ({b'flushed': 0}, ['pending'])",
        "list(store) == ['flushed']",
        "list(store.items()) == [('flushed', 0)]",
        "(len(store), bool(store), 'flushed' in store.keys()) == (1, True, True)",
        "store.pop('flushed') == 0 and len(store) == 0",
        "store.setdefault('child', 2) == 2",
        "store.put('child', 1) is None and store['child'] == 1",
        "store.put_many({'child': 1}) is None and len(store) == 2",
        "store.delete('flushed') is None and 'flushed' not in store",
        "store.delete_many(['flushed', 'pending']) == 1",
        "store.clear() is None and not store",
        "store.flush() is None and not store.write_buffer",
        "store.env.stat()['entries'] == 1 and store.env.readers() is not None",
        "not store.closed and '1 entries' in repr(store)",
    ],
)
def test_a_child_uses_the_store_that_it_inherits(run, stored, use):
    script = f"""{PENDING}
store.flush()
store.put_many({{"pending": 1}})
store.delete("pending")
store.flush()
store["mine"] = 1

def child():
    assert {use}

assert wait_for(child) == 0
assert dict(store.write_buffer).keys() == {{b"mine"}}
assert store["mine"] == 1
store.close(strict=True)
"""
    result = run(script)
    assert "not closed" not in result.stderr
    on_disk = stored()
    assert on_disk.pop("mine") == 1
    assert on_disk.keys() <= {"flushed", "child"}


@pytest.mark.parametrize("end", ["", "sys.exit()", "store.close()", "del store"])
def test_what_a_child_writes_reaches_the_disk(run, stored, end):
    script = f"""{PENDING}
def child():
    global store
    store["child"] = 2
    {end}

assert wait_for(child) == 0
assert store["child"] == 2
store.close(strict=True)
"""
    assert "not closed" not in run(script).stderr
    assert stored() == {"flushed": 0, "pending": 1, "child": 2}


@pytest.mark.parametrize("name", ["db", "other"])
@pytest.mark.parametrize("end", ["own.close()", "pass"])
def test_a_child_opens_a_store_of_its_own(run, stored, name, end):
    script = f"""{PENDING}
def child():
    global own
    own = LmdbObjectStore({name!r}, key_encoding="utf-8")
    assert own.get("pending") is None
    own["child"] = 2
    {end}

assert wait_for(child) == 0
store.close(strict=True)
"""
    result = run(script)
    assert result.stderr.count("was not closed") == (end == "pass")
    expected = {"db": {"flushed": 0, "pending": 1}, "other": {}}
    expected[name]["child"] = 2
    assert stored() == expected["db"]
    assert name == "db" or stored("other") == expected["other"]


def test_children_of_children(run, stored):
    script = f"""{PENDING}
def grandchild():
    assert store["flushed"] == 0
    store["grandchild"] = 3
    store.close(strict=True)

def uses_it_first():
    store["child"] = 2
    assert wait_for(grandchild) == 0
    assert "grandchild" in store

def only_forks():
    assert wait_for(grandchild) == 0

def leaves_it():
    pass

for child in uses_it_first, only_forks, leaves_it:
    assert wait_for(child) == 0
store.close(strict=True)
"""
    assert "not closed" not in run(script).stderr
    assert stored() == {"flushed": 0, "pending": 1, "child": 2, "grandchild": 3}


@pytest.mark.parametrize("gone", ["removed", "replaced"])
def test_a_file_that_is_gone_when_a_child_wants_it(run, gone):
    script = f"""{PENDING}
import shutil

def child():
    shutil.rmtree("db")
    if {gone == "replaced"}:
        subprocess.run([sys.executable, "-c", "import lmdb; lmdb.open('db')"])
    for _ in range(2):
        try:
            store["flushed"]
        except ClosedError as error:
            assert "in this child process" in str(error), error
            assert "gone or was replaced" in str(error)
        else:
            raise AssertionError
    store.close()

assert wait_for(child) == 0
assert store["pending"] == 1
try:
    store.close(strict=True)
except LostWritesError:
    assert store.write_buffer.keys() == {{b"pending"}}
else:
    raise AssertionError
"""
    run(script)


def test_read_only_stores(open_store):
    open_store().put_many({b"key": 1})
    for store in (open_store(), open_store(readonly=True)):
        assert fork(lambda store=store: store[b"key"] == 1) == 0
    open_store("other").close()
    store = open_store("other", readonly=True)
    assert fork(lambda: store.get(b"key", 2) == 2) == 0


def test_a_child_adopts_what_the_parent_grows_meanwhile(open_store, in_thread):
    store = open_store(map_size=2**16)
    store.put_many({b"small": 1})
    to_child, to_parent = os.pipe(), os.pipe()

    def child():
        os.read(to_child[0], 1)
        found = store[b"large"] == bytes(2**20)
        store.put_many({b"more": bytes(2**22)})
        return found

    forking = in_thread(lambda: fork(child))
    forking.wait_until_in("fork")
    store.put_many({b"large": bytes(2**20)})
    os.write(to_child[1], b"x")
    assert forking.result() == 0
    assert store[b"more"] == bytes(2**22)
    for descriptor in to_child + to_parent:
        os.close(descriptor)


def test_a_child_takes_no_reader_slot_of_its_parent(open_store):
    store = open_store()
    store.put_many({b"key": 1})

    def pids():
        return [line.split()[0] for line in store.env.readers().splitlines()[1:]]

    def child():
        with store.snapshot() as own:
            mine = own[b"key"] in (1, 3) and str(os.getpid()) in pids()
        return mine and pids() == [str(os.getppid())]

    with store.snapshot() as snapshot:
        for _ in range(3):
            assert fork(child) == 0
            store.put_many({b"key": 2})
            store.put_many({b"key": 3})
        assert pids() == [str(os.getpid())]
        assert snapshot[b"key"] == 1


def test_fork_in_the_middle_of_reading_a_large_value(run, stored):
    # If the child freed the reader slot that it inherits, the parent's writes
    # would overwrite what the parent still has to read.
    script = f"""{FORK}
store = open_store(map_size=2**28)
in_child = False

class Forks:
    def __init__(self):
        self.count = 0

    def __setstate__(self, state):
        assert wait_for(lambda: LmdbObjectStore("db").close()) == 0
        global in_child
        if os.fork() == 0:
            in_child = True  # and reads on
            return
        os.wait()
        store.delete("large")
        for _ in range(8):
            store.put_many({{"filler": bytes(2**21)}})

parts = [bytes([n]) * 2**17 for n in range(16)]
store.put_many({{"large": [Forks(), parts], "filler": bytes(2**18)}})
assert store["filler"] == bytes(2**18)
found, _ = store.get_many(["large", "filler"])
assert found[b"large"][1] == parts
assert found[b"filler"] == bytes(2**18)
if in_child:
    assert store["large"][1] == parts
    os._exit(0)
store.close(strict=True)
"""
    run(script)
    assert stored() == {"filler": bytes(2**21)}


def test_forking_by_subprocess(open_store):
    store = open_store()
    store[b"pending"] = 1
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ""], preexec_fn=os.setsid, check=True)
    assert len(store.write_buffer) == 1
    store.flush()


# What other threads do meanwhile

BUSY = f"""{FORK}
from test_faults import verify
lib_version, children = map(int, sys.argv[1:])
store = open_store(lib_version=lib_version, map_size=2**18, sync=False)
TOTAL = 1000
store.put_many({{f"account {{n}}": TOTAL // 10 for n in range(10)}})
store["large"] = [bytes([n]) * 100_000 for n in range(5)]
store.flush()
done = threading.Event()
counts = dict.fromkeys(["flush", "put_many", "grow"], 0)

def loop(work):
    def run():
        while not done.is_set():
            work()
    return threading.Thread(target=run)

def total():
    found, _ = store.get_many([f"account {{n}}" for n in range(10)])
    assert sum(found.values()) == TOTAL

def read():
    assert store["account 0"] is not None
    assert store["large"][4] == bytes([4]) * 100_000
    total()

def iterate():
    assert len([key for key in store.keys("account ")]) == 10
    assert dict(store.items("large"))["large"][0] == bytes(100_000)

def flush():
    store[f"flush {{counts['flush']}}"] = counts["flush"]
    store.flush()
    counts["flush"] += 1

def put_many():
    n = counts["put_many"]
    store.put_many({{f"put_many {{n}} {{part}}": n for part in range(10)}})
    counts["put_many"] += 1

def move():
    with store.transaction():
        store["account 1"] -= 5
        store["account 2"] += 5

def look():
    with store.snapshot() as snapshot:
        assert sum(snapshot.values("account ")) == TOTAL

def grow():
    if counts["grow"] < 20:
        store["filler"] = bytes(2**19 * (counts["grow"] + 1))
        store.flush()
        counts["grow"] += 1

def child():
    signal.alarm(60)
    total()
    name = f"child {{number}}"
    store[name] = number
    assert len(store.keys("account ")) == 10
    with store.transaction():
        store["account 3"] -= 1
        store["account 4"] += 1
    with store.snapshot() as snapshot:
        assert snapshot[name] == number
        assert sum(snapshot.values("account ")) == TOTAL
    store.close(strict=True)

threads = [loop(work) for work in (read, iterate, flush, put_many, move, look, grow)]
for thread in threads:
    thread.start()
try:
    for number in range(children):
        assert wait_for(child) == 0
finally:
    done.set()
    for thread in threads:
        thread.join()
total()
assert [store[f"child {{n}}"] for n in range(children)] == list(range(children))
assert [store[f"flush {{n}}"] for n in range(counts["flush"])] == list(
    range(counts["flush"])
)
assert len(store.keys("put_many ")) == 10 * counts["put_many"]
assert store["account 3"] == TOTAL // 10 - children
store.close(strict=True)
verify("db")
"""


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("_unmeasured")
@ENGINES
def test_fork_while_other_threads_do_everything(run, lib_version):
    children = times(5, thorough=25)
    run(BUSY, lib_version, children, options=("-W", "ignore::DeprecationWarning"))


@pytest.mark.parametrize("method", ["putmulti", "commit", "begin", "sync"])
def test_a_fork_waits_for_a_commit_and_reads_go_on_meanwhile(
    open_store, in_thread, method
):
    store = open_store(sync=False)
    store.put_many({b"key": 1})
    action = {"sync": lambda: open_store(sync=False).close()}.get(
        method, lambda: store.put_many({b"key": 2})
    )

    def child():
        return store[b"key"] in (1, 2) and store.put(b"child", 3) is store.flush()

    with Parked(in_thread, method, action) as writing:
        forking = in_thread(lambda: fork(child))
        forking.wait_until_in(FORKS)
        assert in_thread(lambda: store[b"key"]).result() == 1
        waiting = in_thread(lambda: store.put_many({b"later": 4}))
        assert forking.running
        writing.release()
        assert forking.result() == 0
        waiting.result()
    assert store[b"child"] == 3
    assert store[b"later"] == 4


def test_a_fork_waits_for_a_read(open_store, in_thread):
    store = open_store()
    store.put_many({b"key": 1})
    with Parked(in_thread, "get", lambda: store.get(b"key")) as reading:
        forking = in_thread(lambda: fork(lambda: store[b"key"] == 1))
        forking.wait_until_in(FORK_WAITS_FOR_READS)
        # Others are let in again and again.
        assert in_thread(lambda: store[b"key"]).result() == 1
        assert forking.running
        assert reading.release() == 1
        assert forking.result() == 0


def test_a_fork_waits_for_a_read_that_looks_for_a_slot(open_store, in_thread):
    store = open_store(max_readers=1)
    store.put_many({b"key": 1})
    with store.snapshot():
        reading = Parked(in_thread, "reader_check", lambda: store[b"key"])
        with reading:
            forking = in_thread(lambda: fork(lambda: not store.closed))
            for inside in True, False, True:  # it tries again and again
                forking.wait_until_in(FORK_BARS_READS, inside)
            assert forking.running
            reading.leave()
            assert forking.result() == 0
    assert reading.release() == 1


def test_a_fork_waits_for_no_block_and_no_snapshot(open_store, in_thread):
    store = open_store(sync=False)
    store.put_many({b"key": 1})
    store.batch_size = 2

    def hold():
        with store.transaction(), open_store("other").snapshot():
            store[b"key"] = 2
            store.put(b"inside", 3)
            forked = in_thread(lambda: fork(lambda: store[b"key"] == 1))
            assert forked.result() == 0
            # Who waits for the block holds a lock.
            writer = in_thread(lambda: store.put_many({b"after": 4}))
            writer.wait_until_in(WAITS_FOR_BLOCK)
            assert in_thread(lambda: fork(lambda: store[b"key"] == 1)).result() == 0
            assert writer.running
        writer.result()

    in_thread(hold).result()
    assert store.get_many([b"key", b"inside", b"after"])[0] == {
        b"key": 2,
        b"inside": 3,
        b"after": 4,
    }
    verify(store.db_path)


def test_a_fork_does_not_wait_for_growth_that_waits_for_a_snapshot(
    open_store, in_thread
):
    store = open_store(map_size=2**16)
    store.put_many({b"key": 1})
    with store.snapshot() as snapshot:
        growing = in_thread(lambda: store.put_many({b"large": bytes(2**20)}))
        growing.wait_until_in(WAITS_FOR_SNAPSHOTS)
        assert in_thread(lambda: fork(lambda: store[b"key"] == 1)).result() == 0
        assert growing.running
        assert snapshot[b"key"] == 1
    growing.result()
    assert len(store[b"large"]) == 2**20


def test_a_fork_does_not_wait_long_for_a_store_to_open(open_store, in_thread):
    store = open_store()
    store.put_many({b"key": 1})
    with Parked(in_thread, "reader_check", lambda: open_store("other")) as opening:
        forking = in_thread(lambda: fork(lambda: store[b"key"] == 1))
        assert forking.result() == 0
        opening.release()
    assert open_store("other").get(b"key") is None


def test_a_child_forked_at_exit_writes_through(run, stored):
    script = f"""
import atexit
@atexit.register
def last():
    def child():
        store["late"] = 2
        os._exit(0)
    try:
        assert wait_for(child) == 0
    except RuntimeError as error:
        print(error)
{PENDING}
"""
    expected = {"flushed": 0, "pending": 1, "late": 2}
    if "can't fork" in run(script).stdout:  # as 3.12 says then
        del expected["late"]
    assert stored() == expected


def test_a_pool_whose_manager_thread_forks_inside_a_block(open_store):
    store = open_store()
    store.put_many({b"key": 1})
    with store.transaction():
        store[b"key"] = 2
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
            assert list(pool.map(abs, range(-4, 0))) == [4, 3, 2, 1]
    assert store[b"key"] == 2


# Forks that come in the middle of something

OPERATIONS = {
    "get": lambda store: store[b"key"],
    "get_many": lambda store: store.get_many([b"key", b"x"]),
    "items": lambda store: list(store.items()),
    "put": lambda store: store.put(b"new", 3),
    "flush": lambda store: (store.put(b"new", 3), store.flush()),
    "put_many": lambda store: store.put_many({b"new": 3}),
    "pop": lambda store: store.pop(b"key", None),
    "len": lambda store: len(store),
    "snapshot": lambda store: enter_snapshot(store),
    "transaction": lambda store: enter_transaction(store),
}


def enter_snapshot(store):
    with store.snapshot() as snapshot:
        return snapshot[b"key"]


def enter_transaction(store):
    with store.transaction():
        store[b"key"] = 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_signal_handler_that_forks_at_many_moments(open_store, operation):
    store = open_store(sync=False)
    other = open_store("other")
    other.put_many({b"key": 2})
    codes = []
    moments = count()
    distance = times(2, thorough=10)  # as a fork takes its time

    def child():
        try:
            if store.get(b"key", 1) != 1:
                return False
        except (BusyError, ClosedError) as error:
            if "fork" not in str(error):
                return False
        return other[b"key"] == 2

    def handler():
        if next(moments) % distance == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            codes.append(fork(child))

    def prepare():
        store.put_many({b"key": 1})
        return store

    def act(store):
        with handling(handler):
            OPERATIONS[operation](store)

    for _, result in every_step(prepare, act):
        assert not isinstance(result, BaseException)
    assert codes
    assert not any(codes)
    store.close(strict=True)
    verify(store.db_path)


STUCK = f"""{FORK}
from conftest import hold_up_writers
from moments import is_writing, let_forks_wait
let_forks_wait(0.1)
store = open_store()
store.put_many({{"key": 1}})
other = LmdbObjectStore("other")
holder = hold_up_writers("db")
writing = threading.Thread(target=lambda: store.put_many({{"late": 2}}))
writing.start()
while not is_writing(store):
    pass

def child():
    length = lambda: len(store)
    for use in lambda: store["key"], lambda: store.put("a", 1), store.flush, length:
        try:
            use()
        except ClosedError as error:
            assert "forked in the middle" in str(error), error
        else:
            raise AssertionError
    assert store.closed
    try:
        open_store()
    except BusyError as error:
        assert "forked in the middle" in str(error), error
    else:
        raise AssertionError
    store.close()
    other[b"child"] = 1
    other.close(strict=True)
    del globals()["store"]
    gc.collect()

assert wait_for(child) == 0
assert store["key"] == 1
holder.stdin.close()
holder.wait()
writing.join()
assert store["late"] == 2
assert wait_for(lambda: store["late"] == 2 or os._exit(1)) == 0
store.close(strict=True)
assert other[b"child"] == 1
other.close(strict=True)
"""


def test_a_child_of_the_middle_of_a_commit_that_does_not_end(run, stored):
    # py-lmdb would wait for ever for that commit when the child closes the
    # environment or deallocates it.
    run(STUCK, options=("-W", "ignore::DeprecationWarning"))
    assert stored() == {"key": 1, "late": 2}


def test_an_interrupt_in_the_midst_of_a_fork_leaves_nobody_locked_out(run, stored):
    # Python prints a KeyboardInterrupt of the functions that it calls at a fork, and
    # goes on. This one is registered before the library's, so it comes before them.
    script = f"""
import _thread, os
os.register_at_fork(
    after_in_parent=_thread.interrupt_main, after_in_child=_thread.interrupt_main
)
{PENDING}
def child():
    store["child"] = 2
    store.close(strict=True)

try:
    assert wait_for(child) == 0
except KeyboardInterrupt:
    os.wait()
thread = threading.Thread(target=store.flush)
thread.start()
thread.join(20)
assert not thread.is_alive()
store.close(strict=True)
"""
    result = run(script)
    assert "KeyboardInterrupt" in result.stderr
    assert stored() == {"flushed": 0, "pending": 1, "child": 2}


def test_a_store_that_can_not_begin_anew_in_a_child(run, stored):
    script = f"""{FORK}
from moments import fail_to_begin_anew
store, other = open_store(), LmdbObjectStore("other")
store["pending"] = 1
def child():
    try:
        store["pending"]
    except ClosedError as error:
        assert "in this child process" in str(error)
    else:
        raise AssertionError
    other[b"key"] = 2
    other.close(strict=True)
    assert wait_for(lambda: store.close()) == 0

fail_to_begin_anew()
assert wait_for(child) == 0
store.close(strict=True)
other.close(strict=True)
"""
    assert "MemoryError" in run(script).stderr
    assert stored() == {"pending": 1}
    assert stored("other") == {"key": 2}


def test_a_signal_handler_while_a_fork_waits(open_store, in_thread):
    # Another thread has a lock, and waits for the fork.
    store, other = open_store(), open_store("other")
    store.put_many({b"key": 1})
    store[b"pending"] = 2
    seen = []

    def use():
        seen.append(store[b"key"])
        store[b"later"] = 3
        with pytest.raises(BusyError):
            store.flush()
        writing.leave()

    def release():
        wait_until_in(FORK_KEEPS_WRITERS, main)
        flushing = in_thread(store.flush)
        flushing.wait_until_in(WAITS_FOR_FORK)
        os.kill(os.getpid(), signal.SIGINT)
        return flushing

    main = threading.get_ident()
    with (
        handling(use),
        Parked(in_thread, "putmulti", lambda: other.put_many({b"a": 1})) as writing,
    ):
        releasing = in_thread(release)
        assert fork(lambda: store[b"key"] == 1) == 0
        releasing.result().result()
    assert seen == [1]
    assert store.get_many([b"pending", b"later"])[0] == {b"pending": 2, b"later": 3}


@ENGINES
def test_a_fork_does_not_wait_for_a_block_that_waits_for_a_snapshot(
    open_store, in_thread, lib_version
):
    store = open_store(map_size=2**16, lib_version=lib_version)
    store.put_many({b"key": 1})

    def block():
        with store.transaction():
            store[b"large"] = bytes(2**20)

    with store.snapshot() as snapshot:
        growing = in_thread(block)
        growing.wait_until_in(WAITS_FOR_SNAPSHOTS)
        assert in_thread(lambda: fork(lambda: store[b"key"] == 1)).result() == 0
        assert growing.running
        assert snapshot[b"key"] == 1
    growing.result()
    assert len(store[b"large"]) == 2**20
    verify(store.db_path)


def test_a_new_file_with_the_number_of_one_that_is_gone(run):
    script = f"""{FORK}
import lmdb
store = LmdbObjectStore("old", subdir=False)
store.put_many({{b"key": 1}})
number = os.stat("old").st_ino
ours, theirs = os.pipe()

def child():
    assert os.read(ours, 1)
    try:
        store[b"key"]
    except ClosedError as error:
        assert "gone" in str(error)
    for attempt in range(50):
        open("new", "wb").close()
        if os.stat("new").st_ino == number:
            break
        os.rename("new", f"other {{attempt}}")
    with LmdbObjectStore("new", subdir=False) as new:
        new[b"key"] = 2
        assert new[b"key"] == 2
    store.close()

def parent():
    store.close()
    os.unlink("old")
    os.write(theirs, b"x")

pid = os.fork()
if pid == 0:
    signal.alarm(30)
    child()
    os._exit(0)
parent()
assert os.waitpid(pid, 0)[1] == 0
"""
    run(script, options=("-W", "ignore::DeprecationWarning"))


MIDST = f"""{FORK}
from conftest import Worker
from moments import Parked, let_forks_wait

class Forks:
    def __reduce__(self):
        return fork, ()

def fork():
    global pid
    with Parked(Worker, "get", lambda: store["key"]):
        pid = os.fork()

store = open_store()
numbers = {{f"{{n:03}}": n for n in range(1, 200)}}
store.put_many({{"key": 1, "000": Forks(), **numbers}})
let_forks_wait(0.1)
try:
    found, _ = store.get_many([f"{{n:03}}" for n in range(200)])
except ClosedError as error:
    assert pid == 0
    assert "forked in the middle" in str(error), error
    os._exit(0)
assert pid != 0 and len(found) == 200
assert os.waitpid(pid, 0)[1] == 0
store.close(strict=True)
"""


def test_a_child_can_not_go_on_if_a_read_did_not_end(run):
    run(MIDST, options=("-W", "ignore::DeprecationWarning"))


NESTED = f"""{FORK}
def refused(action):
    try:
        action()
    except ClosedError as error:
        return "parent process" in str(error)

store = open_store()
store.put_many({{"key": 1}})
try:
    with store.transaction():
        store["key"] = 2
        try:
            with store.transaction():
                pid = os.fork()
                if pid:
                    assert os.waitpid(pid, 0)[1] == 0
                else:
                    grandchild = os.fork()
                    if grandchild == 0:
                        os._exit(not refused(lambda: store["key"]))
                    assert os.waitpid(grandchild, 0)[1] == 0
        except ClosedError:
            assert pid == 0
            assert refused(lambda: store["key"])
except ClosedError:
    assert pid == 0
    assert store["key"] == 1
    os._exit(0)
assert pid != 0
assert store["key"] == 2
store.close(strict=True)
"""


def test_a_child_forked_inside_nested_blocks(run):
    run(NESTED)


def test_children_killed_while_they_write(run, stored):
    script = f"""{FORK}
store = open_store(map_size=2**20)
store.put_many({{"n": 0}})
for number in range(20):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        n = 0
        while True:
            n += 1
            with store.transaction():
                store[f"{{number}} a"] = store[f"{{number}} b"] = bytes(5000) * (n % 50)
            os.write(theirs, b"x")
    for _ in range(number % 5 + 1):
        os.read(ours, 1)
    store["n"] += 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ours), os.close(theirs)
    with store.transaction():
        assert store.get(f"{{number}} a") == store.get(f"{{number}} b")
        store["n"] += 0
store.close(strict=True)
"""
    run(script)
    assert stored()["n"] == 20
