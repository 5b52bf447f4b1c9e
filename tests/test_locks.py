"""Taking a lock and waiting: Ctrl-C at any bytecode leaves no lock held."""

import threading
from contextlib import suppress
from functools import partial

import pytest

import conftest
from lmdb_object_store._locks import locked, poll, try_locked, under_lock
from moments import every_step


class Part:
    def __init__(self):
        self.lock = threading.RLock()
        self.done = 0

    @under_lock
    def work(self):
        self.done += 1

    def work_and_fail(self):
        self.done += 1
        raise ZeroDivisionError

    def nest(self):
        locked(self.lock, self.work)


def fail(part):
    with suppress(ZeroDivisionError):
        locked(part.lock, part.work_and_fail)


TAKE = {
    "locked": lambda part: locked(part.lock, part.work),
    "nested": lambda part: locked(part.lock, part.nest),
    "failing": fail,
    "under_lock": lambda part: part.work(),
    "try_locked": lambda part: try_locked(part.lock, 1, part.work),
    "in a wait": lambda part: poll(partial(try_locked, part.lock, 0, part.work), 0, 0),
}


@pytest.mark.parametrize("take", TAKE.values(), ids=TAKE)
def test_no_interrupt_leaves_a_lock_held(monkeypatch, in_thread, take):
    monkeypatch.setattr(conftest, "THOROUGH", True)
    results = []
    for part, result in every_step(Part, take):
        results.append(result)  # and with it the frames of its traceback
        assert in_thread(partial(part.lock.acquire, timeout=0)).result()
    assert KeyboardInterrupt in map(type, results)
    assert part.done == 1
    assert len(results) > 10


def test_a_lock_that_others_hold_is_not_taken(in_thread):
    part = Part()
    with part.lock:
        assert in_thread(lambda: try_locked(part.lock, 0, part.work)).result() is False
    assert part.done == 0
    assert try_locked(part.lock, 0, part.work)
    assert part.done == 1
