"""What an installation and a checkout consist of."""

import re
import subprocess
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import pytest

import lmdb_object_store

ROOT = Path(__file__).parents[1]

in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


def test_version_is_that_of_the_distribution() -> None:
    assert lmdb_object_store.__version__ == metadata.version("lmdb-object-store")


def test_lmdb_is_the_only_dependency() -> None:
    requirements = metadata.requires("lmdb-object-store") or []
    [requirement] = [text for text in requirements if "extra ==" not in text]
    assert re.fullmatch(r"lmdb>=[\d.]+", requirement)


def test_type_information_is_shipped() -> None:
    assert resources.files(lmdb_object_store).joinpath("py.typed").is_file()


def test_all_names_what_is_public() -> None:
    public = {
        name
        for name, value in vars(lmdb_object_store).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(lmdb_object_store.__all__) == public


@in_checkout
def test_change_log_begins_with_this_version() -> None:
    log = (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## (.*)$", log, re.MULTILINE)
    assert newest
    assert newest[1] == lmdb_object_store.__version__


@in_checkout
def test_top_level_of_the_checkout() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(listing, cwd=ROOT, text=True).splitlines()
    assert {file.partition("/")[0] for file in files} <= {
        ".ci",
        ".github",
        ".gitignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src",
        "tests",
    }
