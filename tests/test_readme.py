"""README.md: its code runs, prints what it says, and tells of everything public.

Each Python block runs by itself, in an empty directory. What a block prints stands
beside each print, as in ``print(1 + 1)  # 2``.
"""

import gc
import inspect
import re
import shelve
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import lmdb_object_store
from lmdb_object_store import LmdbObjectStore, keys, maintenance, serializers
from lmdb_object_store._cli import main

README = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
TIMEOUT = 60
RECIPE = 15  # lines, at most
OPTIONAL = {"diskcache", "fastapi", "numpy", "sqlitedict", "torch"}
"""Packages that the group `test` doesn't have: they are in `readme` and `torch`."""


def blocks(language, text=README):
    """Return the blocks of `language`: line and code."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in fence.finditer(text)
    ]


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=f"line {line}") for line, code in blocks("python")]
)
def test_python_block_runs_and_prints_what_it_says(tmp_path, code):
    imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    missing = [name for name in OPTIONAL.intersection(imported) if not find_spec(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, of the groups readme and torch")
    (tmp_path / "block.py").write_text(code, "utf-8")
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-W", "always", "block.py"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "was not closed" not in run.stderr
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert run.stdout.splitlines() == expected
    assert len(expected) == code.count("print(")


def commands():
    """Return the commands of the console blocks, each with the lines that it prints."""
    text = "".join(code for _, code in blocks("console") if "pip install" not in code)
    return [part.splitlines() for part in text.split("$ ")[1:]]


# sqlitedict leaves connections to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_commands_print_what_is_said(tmp_path, monkeypatch, capsys):
    if not all(map(find_spec, ("diskcache", "lmdbm", "sqlitedict"))):
        pytest.skip("needs the group readme")
    monkeypatch.chdir(tmp_path)
    with LmdbObjectStore("users.db", key_encoding="utf-8") as store:
        store.put_many({f"user:{n:06}": {"name": f"user {n}"} for n in range(110_000)})
        store.delete_many(store.keys("user:10"))
    _make_old_stores()
    programs = set()
    for command, *expected in commands():
        program, *arguments = shlex.split(command, comments=True)
        programs.add(program)
        assert main(arguments) == 0
        printed = capsys.readouterr().out.splitlines()
        if expected:
            # What a file takes on the disk depends on the file system.
            assert _without_disk(printed) == _without_disk(expected)
    assert programs == {"lmdb-object-store"}
    with LmdbObjectStore("new.db", key_encoding=keys.TupleKeys()) as store:
        assert store[3] == "cached"
    with LmdbObjectStore("new.db", key_encoding="utf-8") as store:
        assert [store[key] for key in "abc"] == [1, 2, b"3"]
        assert store["user:000001"] == {"name": "user 1"}
    gc.collect()


def _make_old_stores():
    with shelve.open("old.shelf") as old:
        old["a"] = 1
    with import_module("sqlitedict").SqliteDict("old.sqlite", autocommit=True) as old:
        old["b"] = 2
    with import_module("lmdbm").Lmdb.open("old.lmdbm", "c") as old:
        old["c"] = b"3"
    with import_module("diskcache").Cache("old.cache") as old:
        old[3] = "cached"


def _without_disk(lines):
    return [line for line in lines if not line.startswith("on disk")]


def test_first_bash_block_holds_the_two_commands_of_a_fresh_machine():
    _, code = blocks("bash")[0]
    commands = code.splitlines()
    assert len(commands) == 2
    assert all(" -m venv .venv && " in command for command in commands)
    assert commands[1].endswith(" -m pytest")


def test_recipes_are_short():
    [recipes] = re.findall(r"^## Recipes$.*?^## ", README, re.DOTALL | re.MULTILINE)
    lengths = [
        sum(map(bool, code.splitlines())) for _, code in blocks("python", recipes)
    ]
    assert max(lengths) <= RECIPE


def test_every_public_name_is_told():
    names = {
        name
        for name in [
            *lmdb_object_store.__all__,
            *keys.__all__,
            *maintenance.__all__,
            *serializers.__all__,
            *vars(LmdbObjectStore),
        ]
        if not name.startswith("_")
    }
    assert {name for name in names if not re.search(rf"\b{name}\b", README)} == set()


def test_options_are_shown_with_their_defaults():
    shown = dict(re.findall(r"^ +(\w+)=([^,#]+),", README, re.MULTILINE))
    parameters = list(inspect.signature(LmdbObjectStore).parameters.values())
    for option in parameters[1:-1]:  # all but db_path and **lmdb_kwargs
        default = eval(shown.get(option.name, "..."), vars(serializers))
        assert repr(default) == repr(option.default), option.name
