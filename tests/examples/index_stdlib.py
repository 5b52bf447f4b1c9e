"""Index the standard library: every function and class under its dotted name.

Parses each module of the running interpreter's standard library, its own test
suite included if installed, and stores what it finds. Then opens the store anew
and looks some of it up.
"""

import argparse
import ast
import os
import platform
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from pprint import pprint
from time import perf_counter
from typing import TypedDict

from lmdb_object_store import LmdbObjectStore

STDLIB = Path(sysconfig.get_path("stdlib"))
SAMPLE = 1000  # how many entries to look up
SHOWN = "calendar.isleap"
NEXT = """\
next     {intro}
         from lmdb_object_store import LmdbObjectStore
         with LmdbObjectStore({path!r}, key_encoding="utf-8") as store:
             print(store["json.loads"]["doc"])
             print(list(store.keys(prefix="json.decoder.JSONDecoder.")))"""
INTERVAL = 2.0  # seconds between two lines of progress, if there is no terminal

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Entry(TypedDict):
    """What the store holds of one function or class."""

    name: str
    signature: str
    doc: str | None
    file: str
    line: int


def sources(root: Path) -> list[Path]:
    """List the files of a library that can be imported as modules."""
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(filter(str.isidentifier, subfolders))  # site-packages
        paths = [Path(folder, file) for file in sorted(files)]
        found += [p for p in paths if p.suffix == ".py" and p.stem.isidentifier()]
    return found


def entries(path: Path, root: Path) -> list[Entry]:
    """Parse a source file and describe what it defines."""
    relative = path.relative_to(root)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the source, such as invalid escapes
        tree = ast.parse(path.read_bytes(), str(path))
    return [
        Entry(
            name=name,
            signature=signature(node),
            doc=ast.get_docstring(node),
            file=relative.as_posix(),
            line=node.lineno,
        )
        for name, node in definitions(tree, module)
    ]


def definitions(node: ast.AST, scope: str) -> Iterator[tuple[str, Definition]]:
    """Yield the definitions below a node with their dotted names, nested ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{scope}.{child.name}"
            yield name, child
            yield from definitions(child, name)
        elif not isinstance(child, ast.expr):
            yield from definitions(child, scope)


def signature(node: Definition) -> str:
    """Return the parameters and result of a function or the bases of a class."""
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, [*node.bases, *node.keywords]))})"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){result}"


def index(root: Path, path: Path) -> list[str]:
    """Fill the store at `path` with a library and return the names in it."""
    names: set[str] = set()  # a name defined twice is one object
    skipped = 0
    seconds = 0.0
    files = sources(root)
    progress = Progress()
    with LmdbObjectStore[str, Entry](path, key_encoding="utf-8") as store:
        for number, file in enumerate(files, 1):
            progress.show(
                f"{number:,} of {len(files):,} modules, {len(names):,} objects"
            )
            try:
                found = entries(file, root)
            except (OSError, SyntaxError, ValueError):
                # A dangling link; or bad on purpose, data of some test.
                skipped += 1
                continue
            start = perf_counter()
            for entry in found:
                store[entry["name"]] = entry
            seconds += perf_counter() - start
            names.update(entry["name"] for entry in found)
        start = perf_counter()
    seconds += perf_counter() - start  # closing writes the rest
    progress.clear()
    print(f"modules  {len(files) - skipped:,} parsed, {skipped:,} skipped")
    print(f"writing  {seconds:.2f} s for {len(names):,} objects")
    return sorted(names)


def look_up(path: Path, names: list[str]) -> None:
    """Open the store again and read some of the entries from it."""
    with LmdbObjectStore[str, Entry](
        path, key_encoding="utf-8", readonly=True
    ) as store:
        sample = names[:: max(1, len(names) // SAMPLE)]
        start = perf_counter()
        found = [store[name] for name in sample]
        seconds = perf_counter() - start
        entry = store[SHOWN]
    print(f"reading  {seconds:.2f} s for {len(found):,} objects")
    print(f"on disk  {(path / 'data.mdb').stat().st_size:,} bytes")
    pprint(entry, sort_dicts=False)


class Progress:
    """A counter that overwrites itself on a terminal; else a line now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = -INTERVAL

    def show(self, text: str) -> None:
        """Show it, if it is time."""
        if self._terminal:
            print(f"{text:<60}", end="\r", file=sys.stderr, flush=True)
        elif perf_counter() >= self._shown + INTERVAL:
            self._shown = perf_counter()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._terminal:
            self.show("")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", type=Path, help="keep the store in this directory")
    parser.add_argument(
        "--source", type=Path, default=STDLIB, help="index this library instead"
    )
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, standard library in {arguments.source}")
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.path or Path(temporary)
        kept = "" if arguments.path else " until the end; --path keeps it"
        print(f"store    in {path}{kept}", flush=True)  # the rest takes a while
        look_up(path, index(arguments.source, path))
    if arguments.path:
        print(NEXT.format(intro="look for more:", path=str(path)))
    else:
        intro = "keep the store by --path stdlib.db, then look for more:"
        print(NEXT.format(intro=intro, path="stdlib.db"))


if __name__ == "__main__":
    main()
