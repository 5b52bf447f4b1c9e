"""Money moved between accounts by threads of several processes, some of them killed."""

import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

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
TRANSFERS = 200  # of each thread
STEP = 2**20  # by which the map grows: again and again
FOREVER = 10**9
ROUNDS = 12


def open_bank(path, lib_version):
    return LmdbObjectStore(
        path,
        key_encoding="utf-8",
        map_size=STEP,
        max_map_size=STEP,
        lib_version=lib_version,
    )


# What a process does


def transfer(store, teller, chance):
    payer, payee = chance.sample(ACCOUNTS, 2)
    with store.transaction():
        amount = chance.randint(0, store[payer])
        store[payer] -= amount
        store[payee] += amount
        number = store.get(f"teller {teller}", 0)
        store[f"teller {teller}"] = number + 1
        entry = [payer, payee, amount, bytes(chance.randint(1, 8_000))]
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
    return number


def work(store, transfers, teller):
    chance = random.Random(teller)
    number = -1
    while number < transfers - 1:
        try:
            if chance.random() < 0.2:
                number = transfer_beside_snapshot(store, teller, chance)
                events = ["snapshot"]
            else:
                number = transfer(store, teller, chance)
                events = []
        except (ConflictError, SnapshotOpenError) as error:
            events = [type(error).__name__]
        except GrowthError:
            store.max_map_size = store.env.info()["map_size"] + STEP
            events = ["growth"]
        else:
            events += [f"{teller}={number}"]
        print("".join(f"{event}\n" for event in events), end="", flush=True)


def main(path, lib_version, transfers, *tellers):
    with open_bank(path, int(lib_version)) as store, ThreadPoolExecutor() as pool:
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
        self._note(self._process.stdout.read())
        self._process.communicate()

    def finish(self):
        self._note(self._process.communicate(timeout=TIMEOUT)[0])
        assert self._process.returncode == 0

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
def bank(tmp_path, lib_version):
    with open_bank(tmp_path / "db", lib_version) as store:
        store.put_many(dict.fromkeys(ACCOUNTS, BALANCE))
        yield store


@ENGINES
def test_transfers_by_threads_of_several_processes(bank, lib_version):
    open_branch = partial(Branch, bank.db_path, lib_version)
    branches = [open_branch(name) for name in ("first", "second", "third")]
    for branch in branches:
        branch.finish()
    tellers = [teller for branch in branches for teller in branch.tellers]
    assert audit(bank) == dict.fromkeys(tellers, TRANSFERS)
    assert bank.env.info()["map_size"] >= 4 * STEP
    verify(bank.db_path)


@ENGINES
def test_transfers_while_processes_are_killed(bank, lib_version):
    chance = random.Random(lib_version)
    open_branch = partial(Branch, bank.db_path, lib_version)
    survivors = [open_branch(name) for name in ("first", "second")]
    victims = [open_branch(name, FOREVER) for name in ("third", "fourth")]
    for _ in range(ROUNDS):
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
