"""Money moved between accounts by threads of several processes, some of them killed."""

import faulthandler
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import lmdb
import pytest

from conftest import times
from lmdb_object_store import (
    ConflictError,
    GrowthError,
    LmdbObjectStore,
    SnapshotOpenError,
)
from test_faults import ENGINES, verify

TIMEOUT = 90

ACCOUNTS = [f"account {number:02}" for number in range(100)]
BALANCE = 1_000
THREADS = 2  # of each process
TRANSFERS = times(30, thorough=200)  # of each thread
FOREVER = 10**9
KILLS = times(3, thorough=12)
STEP = 2**18  # by which the map grows, again and again
OPTIONS = {"key_encoding": "utf-8", "map_size": STEP, "max_map_size": STEP}
OPTIONS["flush_interval"] = 0.001  # seconds, so that these flushes come in everywhere


# What a process does


def transfer(store, teller, chance):
    payer, payee = chance.sample(ACCOUNTS, 2)
    with store.transaction():
        amount = chance.randint(0, store[payer])
        store[payer] -= amount
        store[payee] += amount
        number = store.get(f"teller {teller}", 0)
        store[f"teller {teller}"] = number + 1
        entry = [payer, payee, amount, bytes(chance.randint(1, 16_000))]
        assert store.setdefault(f"log {teller} {number}", entry) is entry
    return number


def check_total(snapshot):
    total = BALANCE * len(ACCOUNTS)
    assert sum(snapshot.values("account ")) == total
    assert sum(snapshot[account] for account in ACCOUNTS) == total
    found, not_found = snapshot.get_many(ACCOUNTS)
    assert (sum(found.values()), not_found) == (total, [])


def transfer_beside_snapshot(store, teller, chance):
    with store.snapshot() as snapshot:
        check_total(snapshot)
        number = transfer(store, teller, chance)
        check_total(snapshot)
    tell("snapshot")
    return number


def tell(event):
    print(f"{event}\n", end="", flush=True)  # in one piece


def work(store, transfers, teller):
    chance = random.Random(teller)
    number = -1
    while number < transfers - 1:
        action = transfer if chance.random() < 0.8 else transfer_beside_snapshot
        try:
            number = action(store, teller, chance)
        except (ConflictError, SnapshotOpenError) as error:
            tell(type(error).__name__)
        except GrowthError:
            with suppress(lmdb.InvalidParameterError):  # another thread grows just now
                store.max_map_size = store.env.info()["map_size"] + STEP
            tell("growth")
        else:
            tell(f"{teller}={number}")


def main(path, lib_version, transfers, *tellers):
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # shows what hangs
    store = LmdbObjectStore(path, lib_version=int(lib_version), **OPTIONS)
    with store, ThreadPoolExecutor() as pool:
        list(pool.map(partial(work, store, int(transfers)), tellers))


# The test's own part


class Branch:
    """A process that moves money."""

    def __init__(self, path, lib_version, name, transfers=TRANSFERS):
        self.tellers = [f"{name}{number}" for number in range(THREADS)]
        self._command = [sys.executable, __file__, path, lib_version, transfers]
        self._command += self.tellers
        self.events = Counter()
        self.done = {}  # the last transfer of each teller that is known
        self.start()

    def start(self):
        self._process = subprocess.Popen(
            list(map(str, self._command)), stdout=subprocess.PIPE, text=True
        )

    def follow(self, count):
        for _ in range(count):
            line = self._process.stdout.readline()
            assert line, "the process has ended"
            self._note(line)

    def kill(self):
        self._process.kill()
        self._end()

    def finish(self):
        self._end()
        assert self._process.returncode == 0

    def _end(self):
        if not self._process.stdout.closed:
            with self._process as process:
                self._note(process.stdout.read())

    def _note(self, lines):
        self.events.update(re.findall(r"^(\w+)\n", lines, re.MULTILINE))
        done = re.findall(r"^(\w+)=(\d+)\n", lines, re.MULTILINE)
        self.done.update((teller, int(number)) for teller, number in done)


def audit(store):
    """Check that each transfer is there as a whole; return their number by teller."""
    with store.snapshot() as snapshot:
        check_total(snapshot)
        balances = dict.fromkeys(ACCOUNTS, BALANCE)
        for payer, payee, amount, _ in snapshot.values("log "):
            balances[payer] -= amount
            balances[payee] += amount
        assert dict(snapshot.items("account ")) == balances
        counts = {key.split()[1]: n for key, n in snapshot.items("teller ")}
        for teller, count in counts.items():
            numbers = {f"log {teller} {number}" for number in range(count)}
            assert snapshot.keys(f"log {teller} ") == numbers
        assert sum(counts.values()) == len(snapshot.keys("log "))
    return counts


@pytest.fixture
def bank(open_store, lib_version):
    store = open_store(lib_version=lib_version, **OPTIONS)
    store.put_many(dict.fromkeys(ACCOUNTS, BALANCE))
    return store


@pytest.fixture
def open_branch(bank, lib_version):
    branches = []

    def open_branch(*arguments):
        branches.append(Branch(bank.db_path, lib_version, *arguments))
        return branches[-1]

    yield open_branch
    for branch in branches:
        branch.kill()
    print(sum((branch.events for branch in branches), Counter()))  # for pytest -rP


@pytest.mark.one_in(2)
@ENGINES
def test_transfers_by_threads_of_several_processes(bank, open_branch, lib_version):
    branches = [open_branch(name) for name in ("first", "second", "third")]
    for branch in branches:
        branch.finish()
        assert branch.events["snapshot"]
    tellers = [teller for branch in branches for teller in branch.tellers]
    assert audit(bank) == dict.fromkeys(tellers, TRANSFERS)
    assert bank.env.info()["map_size"] >= 4 * STEP
    verify(bank.db_path)


@pytest.mark.one_in(2)
@ENGINES
def test_transfers_while_processes_are_killed(bank, open_branch, lib_version):
    chance = random.Random(lib_version)
    survivors = [open_branch(name) for name in ("first", "second")]
    victims = [open_branch(name, FOREVER) for name in ("third", "fourth")]
    for _ in range(KILLS):
        victim = chance.choice(victims)
        victim.follow(chance.randint(1, 40))
        audit(bank)  # meanwhile it goes on
        victim.kill()
        victim.start()
    for victim in victims:
        victim.kill()
    for survivor in survivors:
        survivor.finish()
    counts = audit(bank)
    for survivor in survivors:
        assert {counts[teller] for teller in survivor.tellers} == {TRANSFERS}
    for victim in victims:
        for teller, number in victim.done.items():
            assert number < counts[teller]
    verify(bank.db_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
