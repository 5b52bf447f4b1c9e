"""README.md: its code runs, prints what it says, and tells of everything public.

Each Python block runs by itself, in an empty directory. One below the comment
``<!-- continues -->`` runs after the blocks before it, down from the last one
without. What a block prints stands beside each print, as in ``print(1 + 1)  # 2``.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmdb_object_store
from lmdb_object_store import LmdbObjectStore

README = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
TIMEOUT = 60


def blocks(language):
    """Return the blocks of `language`: line, whether it continues, and code."""
    fence = re.compile(
        rf"^(<!-- continues -->\n+)?```{language}\n(.*?)^```$", re.DOTALL | re.MULTILINE
    )
    return [
        (README.count("\n", 0, match.start(2)) + 1, bool(match[1]), match[2])
        for match in fence.finditer(README)
    ]


def programs():
    """Return what to run for each Python block."""
    code = ""
    found = []
    for line, continues, block in blocks("python"):
        code = code + block if continues else block
        found.append(pytest.param(code, id=f"line {line}"))
    return found


@pytest.mark.parametrize("code", programs())
def test_python_block_runs_and_prints_what_it_says(tmp_path, code):
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


def test_first_bash_block_holds_the_two_commands_of_a_fresh_machine():
    _, _, code = blocks("bash")[0]
    commands = code.splitlines()
    assert len(commands) == 2
    assert all(" -m venv .venv && " in command for command in commands)
    assert commands[1].endswith(" -m pytest")


def test_every_public_name_is_told():
    names = {
        name
        for name in [*lmdb_object_store.__all__, *vars(LmdbObjectStore)]
        if not name.startswith("_")
    }
    assert {name for name in names if not re.search(rf"\b{name}\b", README)} == set()


def test_options_are_shown_with_their_defaults():
    shown = dict(re.findall(r"^ +(\w+)=([^,#]+),", README, re.MULTILINE))
    parameters = list(inspect.signature(LmdbObjectStore).parameters.values())
    for option in parameters[1:-1]:  # all but db_path and **lmdb_kwargs
        assert eval(shown.get(option.name, "...")) == option.default, option.name
