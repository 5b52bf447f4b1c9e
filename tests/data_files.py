"""Helpers for tests that look at a data file, or at the processes that work on it."""

import os
import random

import pytest

from lmdb_object_store import LmdbObjectStore

PAGE = 4096  # bytes
HEADER = {0: 16, 1: 24}  # bytes before the content of a page, by engine

DAMAGE = pytest.mark.parametrize(
    "damage",
    [
        lambda _: bytes(PAGE),
        lambda _: b"\xff" * PAGE,
        lambda _: b"\1" * PAGE,
        lambda chance: chance.randbytes(PAGE),
    ],
    ids=["zeros", "ff", "01", "random"],
)


def damage_pages(file, pages, damage):
    """Overwrite pages, and return the new content of the file."""
    raw = bytearray(file.read_bytes())
    chance = random.Random(1)
    for page in pages:
        raw[page * PAGE : (page + 1) * PAGE] = damage(chance)
    file.write_bytes(raw)
    return bytes(raw)


def content(path, **options):
    """Return all entries of a store."""
    with LmdbObjectStore(path, readonly=True, **options) as store:
        return dict(store.items())


def names(path):
    """Return what a directory has."""
    return sorted(os.listdir(path))


def once(action):
    """Return a `progress` that does `action` when it is called first."""
    done = []

    def progress(*_):
        if not done:
            done.append(True)
            action()

    return progress


def report_to(reports):
    """Return a `progress` that adds what it is told to a list."""
    return lambda done, total: reports.append((done, total))


def run_in_children(code, folder, monkeypatch):
    """Let all interpreters that are started run some code first."""
    (folder / "sitecustomize.py").write_text(code)
    path = [os.fspath(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
