"""How the tests themselves are run: in the background, with some moments or all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import conftest
from conftest import PATIENCE
from moments import every_step, part_of

SEEDS = range(120)


def moments(store, monkeypatch, *, thorough=False, seed=0):
    """Return where a read was interrupted, each moment by its place and its turn."""
    monkeypatch.setattr(conftest, "THOROUGH", thorough)
    monkeypatch.setattr(conftest, "SEED", seed)
    found = []
    for _, result in every_step(lambda: store, lambda store: store.get(b"key")):
        if isinstance(result, KeyboardInterrupt):
            place = result.__traceback__
            while place.tb_next is not None:
                place = place.tb_next
            found.append((place.tb_frame.f_code.co_name, place.tb_lasti))
    return found


def test_seeds_choose_a_part_each_and_all_moments_together(open_store, monkeypatch):
    store = open_store()
    store.put_many({b"key": 1})
    everything = moments(store, monkeypatch, thorough=True)
    assert len(everything) > 50
    parts = [moments(store, monkeypatch, seed=seed) for seed in SEEDS]
    assert moments(store, monkeypatch, seed=SEEDS[7]) == parts[7]
    for part in parts:
        assert part_of(len(everything)) - 1 <= len(part) < len(everything) / 4
    assert {*everything} == {moment for part in parts for moment in part}


@pytest.mark.skipif(sys.platform == "win32", reason="there SIGINT can't be ignored")
def test_the_run_may_be_started_in_the_background():
    # As by a shell script with &, or by nohup: SIGINT is ignored then.
    read = "test_a_read_may_be_interrupted_at_every_moment[get]"
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider"]
    command.append(str(Path(__file__).with_name("test_interrupts.py")) + f"::{read}")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    printed, _ = run.communicate(timeout=2 * PATIENCE)
    assert run.returncode == 0, printed
    assert "1 passed" in printed
