"""The command line: ``lmdb-object-store``, or ``python -m lmdb_object_store``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from itertools import chain, islice
from pprint import pformat
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lmdb

from . import __version__
from ._child import Progress, make_scratch
from ._copying import part_of, refuse_existing, rename
from ._diagnosis import data_path
from ._keys import codec_of
from ._moving import (
    OTHERS,
    HexKeys,
    JsonKeys,
    Keys,
    Store,
    TextKeys,
    as_json,
    is_plain,
    key_fields,
    line_of,
    pairs_of,
    parse_line,
)
from .exceptions import LoadError
from .maintenance import check, compact, salvage
from .serializers import Bytes, Checked, Compressed, Json, Pickle
from .store import LmdbObjectStore

if TYPE_CHECKING:
    import io

_T = TypeVar("_T")
_Options = argparse.Namespace

_OK, _NO, _FAILED, _INTERRUPTED = 0, 1, 2, 130
_BATCH = 10_000  # entries
_REPORT = 1000  # entries
_SHOWN = 20  # problems
_EPILOG = """\
The exit code is 0, or 1 if a key is missing or a file is not sound, or 2 after an
error, or 130 after Ctrl-C. `python -m lmdb_object_store` does the same, and finds the
modules of the working directory.
"""
_UNPICKLING = """\
Unpickling can run any code that the writer of a value has put into it. Do that only
with files that you trust, or say by --allow what may be loaded.
"""
_LINES = """\
A line is JSON such as {"key": "user:42", "value": {"name": "Ada"}}, or has the stored
bytes in base64, whatever the value is: {"key": "user:42", "raw": "gASVCw=="}. A key
that JSON can't hold is in "key64" instead, in base64.
"""
_IMPORTING = """\
An entry that is in the store already is replaced. So an import that was interrupted is
completed by running it again.
"""
_KEYS = """\
how keys are written: text in a codec such as utf-8, the default; "tuple" for TupleKeys,
as JSON such as '["sensor", 7]'; "hex" for any bytes
"""
_SERIALIZER = """\
the serializer of the store, which the file doesn't tell: pickle, the default, json,
bytes, a module such as msgpack, or an object of a module such as
myapp.storage:serializer; or one around another, as in checked,compressed,json
"""
_SPOKEN = {  # what the library's messages advise, and how that is said here
    "open it with lock=False": "say --no-lock",
    "the list allow=[...] of Pickle": "--allow",
}
_ALLOW = """\
unpickle only plain data and these classes, functions and modules, such as
datetime.date,myapp.User (or '' for plain data alone)
"""


def run() -> int:
    """Run the command of this process; return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("lmdb-object-store: %(message)s"))
    # Warnings tell of waits. A failure is in the error of the command.
    handler.addFilter(lambda record: record.levelno == logging.WARNING)
    logging.getLogger().addHandler(handler)
    cast("io.TextIOWrapper", sys.stdout).reconfigure(errors="backslashreplace")
    return main()


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = _parsed(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `head` has ended, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OK
    except Exception as error:  # of a file, a value, an argument, another library
        _complain(_text_of(error))
        return _FAILED
    return code


def _complain(text: str) -> None:
    print(f"lmdb-object-store: {text}", file=sys.stderr)


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{file}"
    text = str(error) or repr(error)
    cause = error.__cause__ if isinstance(error, LoadError) else error
    if isinstance(cause, ModuleNotFoundError):
        text += ". (`python -m lmdb_object_store` finds those of this directory.)"
    return _spoken(text)


def _spoken(text: str) -> str:
    for in_python, here in _SPOKEN.items():
        text = text.replace(in_python, here)
    return text


# Arguments


def _parsed(arguments: list[str] | None) -> _Options:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes an optional FILE for missing where an option stands before it.
    if len(rest) == 1 and vars(options).get("file", "") is None and rest[0][:1] != "-":
        options.file = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lmdb-object-store",
        description="Look after the files of LmdbObjectStore.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Any, text: str, more: str = "") -> Callable[..., Any]:
        name = run.__name__.strip("_")
        added = commands.add_parser(name, help=text, description=f"{text}. {more}")
        added.set_defaults(run=run)
        added.add_argument("path", help="a store: a directory, or a data file")
        return added.add_argument

    add = command(_info, "print how large and how full a store is")
    _add(add, "--no-lock", "--json")
    add = command(_ls, "print the keys, in order")
    _add(add, "--prefix", "--start", "--stop", "--key-encoding", "--no-lock", "--json")
    add("--limit", type=int, help="print so many keys at most")
    add = command(_get, "print a value", _UNPICKLING)
    add("key")
    _add(add, "--key-encoding", "--serializer", "--allow", "--no-lock", "--json")
    add = command(_set, "store a value")
    add("key")
    add("value", help="JSON, or - to read JSON from the standard input")
    add("--text", action="store_true", help="the value is text, not JSON")
    add("--create", action="store_true", help="make the store if there is none")
    _add(add, "--key-encoding", "--serializer", "--allow")
    add = command(_rm, "delete keys")
    add("key", nargs="+")
    _add(add, "--key-encoding")
    add = command(_copy, "copy a store, which may be in use")
    add("target", help="the new store, which must not be there yet")
    add("--compact", action="store_true", help="leave out what is free in the file")
    _add(add, "--no-lock")
    command(_compact, "give back what is free in a file; nobody may use it")
    add = command(
        _check, "look for damage in a store, which may be in use", _UNPICKLING
    )
    add("--values", action="store_true", help="load each value, too")
    _add(add, "--key-encoding", "--serializer", "--allow", "--json")
    add = command(_salvage, "save what can be read of a damaged file")
    add("target", help="the new store, which must not be there yet")
    _add(add, "--json")
    add = command(_export, "write entries as lines of JSON", _LINES + _UNPICKLING)
    add("file", nargs="?", help="the file to make, or else the standard output")
    add("--raw", action="store_true", help="write the stored bytes; unpickle nothing")
    _add(add, "--prefix", "--start", "--stop", "--key-encoding")
    _add(add, "--serializer", "--allow", "--no-lock")
    add = command(_import, "store the entries of a file", _LINES + _IMPORTING)
    add("file", nargs="?", help="the file to read, or else the standard input")
    text = "FILE is a store of this library (to be installed); all but lmdbm unpickle"
    add("--from", dest="kind", choices=OTHERS, help=text)
    add("--table", help="which table of a sqlitedict, if there are several")
    _add(add, "--key-encoding", "--serializer", "--allow")
    return parser


def _add(add: Callable[..., Any], *names: str) -> None:
    """Add options that several commands have."""
    texts = {
        "--key-encoding": _KEYS,
        "--serializer": _SERIALIZER,
        "--allow": _ALLOW,
        "--prefix": "only keys that begin with this",
        "--start": "only keys from this on",
        "--stop": "only keys before this",
    }
    flags = {
        "--json": "print JSON, for programs",
        "--no-lock": "for a file that you may only read; nobody may write meanwhile",
    }
    for name in names:
        if name in flags:
            add(name, action="store_true", help=flags[name])
        else:
            default = {"--key-encoding": "utf-8", "--serializer": "pickle"}.get(name)
            add(name, default=default, help=texts[name])


def _keys(options: _Options) -> Keys:
    name = options.key_encoding
    if name == "tuple":
        return JsonKeys()
    return HexKeys() if name == "hex" else TextKeys(name)


def _serializer(options: _Options) -> Any:
    *outer, name = options.serializer.split(",")
    found = _innermost(name, options.allow)
    for wrapper in reversed(outer):
        found = _around(wrapper, found)
    return found


def _innermost(name: str, allow: str | None) -> Any:
    if name == "pickle":
        names = None if allow is None else [*filter(None, allow.split(","))]
        return Pickle(allow=names)
    if allow is not None:
        raise ValueError("--allow is for the serializer pickle")
    if name in ("json", "bytes"):
        return Json() if name == "json" else Bytes()
    module, _, attribute = name.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def _around(name: str, inner: Any) -> Any:
    wrappers = {"checked": Checked, "compressed": Compressed}
    if name in wrappers:
        return wrappers[name](inner)
    raise ValueError(f"--serializer: {name!r} goes around no serializer")


def _open(
    options: _Options, serializer: Any, create: bool = False, **more: Any
) -> Store:
    """Open the store of a command; FileNotFoundError if there is none."""
    path = options.path
    if not (create or os.path.isfile(_data_file(path))):
        raise FileNotFoundError(f"There is no store at {path!r}.")
    if "key_encoding" in options:
        more["key_encoding"] = _keys(options).encoding
    return LmdbObjectStore(
        path, _BATCH, serializer=serializer, subdir=not os.path.isfile(path), **more
    )


def _data_file(path: str) -> str:
    return data_path(path, {"subdir": not os.path.isfile(path)})


def _open_to_read(options: _Options, serializer: Any = None) -> Store:
    lock = not options.no_lock
    return _open(options, serializer or Bytes(), readonly=True, lock=lock)


def _range(options: _Options, keys: Keys) -> dict[str, Any]:
    bounds = {name: getattr(options, name) for name in ("prefix", "start", "stop")}
    return {
        name: None if text is None else keys.parse(text)
        for name, text in bounds.items()
    }


# Commands


def _info(options: _Options) -> int:
    with _open_to_read(options) as store:
        info = store.info()
    if options.json:
        _print_json(asdict(info))
        return _OK
    share = info.free / info.file_size
    cap = "" if info.max_map_size is None else f" of {_size(info.max_map_size)}"
    dead = f", {info.dead_readers} dead ones cleared" if info.dead_readers else ""
    rows = {
        "entries": f"{info.entries:,}",
        "file": _size(info.file_size),
        "on disk": _size(info.disk_size),
        "used": _size(info.used),
        "free": f"{_size(info.free)}, {share:.0%} of the file",
        "map": f"{_size(info.map_size)}{cap}",
        "tree": f"{info.depth} levels of pages of {_size(info.page_size)}",
        "readers": f"{info.readers} of {info.max_readers}{dead}",
        "last transaction": f"{info.last_transaction:,}",
        "LMDB": info.engine,
    }
    for name, text in rows.items():
        print(f"{name:<17} {text}")
    return _OK


def _print_json(value: Any) -> None:
    # Elsewhere than in UTF-8, all but ASCII is escaped.
    is_utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
    print(as_json(value) if is_utf8 else json.dumps(value))


def _size(size: int) -> str:
    number, units = float(size), iter(("bytes", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while number >= 1024 and unit != "TiB":
        number, unit = number / 1024, next(units)
    return f"{number:.4g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def _ls(options: _Options) -> int:
    keys = _keys(options)
    if options.limit is not None and options.limit < 0:
        raise ValueError("--limit must not be negative")
    with _open_to_read(options) as store:
        found = store.keys(**_range(options, keys))
        for key in islice(found, options.limit):
            if options.json:
                _print_json(key_fields(key, keys))
            else:
                print(keys.show(key))
    return _OK


def _get(options: _Options) -> int:
    key = _keys(options).parse(options.key)
    missing = object()
    with _open_to_read(options, _serializer(options)) as store:
        value = store.get(key, missing)
    if value is missing:
        return _tell_missing(options.key)
    if options.json:
        if not is_plain(value):
            raise ValueError(f"JSON can't hold the value as it is: {value!r}")
        _print_json(value)
    elif isinstance(value, bytes) and not sys.stdout.isatty():
        sys.stdout.buffer.write(value)
    elif isinstance(value, str) and not (sys.stdout.isatty() and _has_controls(value)):
        print(value)
    else:
        print(pformat(value))
    return _OK


def _has_controls(text: str) -> bool:
    """Return whether a text may have control sequences, which a terminal obeys."""
    return not all(map(str.isprintable, text.splitlines()))


def _tell_missing(key: str) -> int:
    _complain(f"there is no key {key}")
    return _NO


def _set(options: _Options) -> int:
    key, value = _keys(options).parse(options.key), options.value
    if value == "-":
        value = sys.stdin.read()
    if not options.text:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"The value is not JSON: {error}. Text is '\"text\"', or --text text."
            ) from None
    with _open(options, _serializer(options), options.create) as store:
        store[key] = value
    return _OK


def _rm(options: _Options) -> int:
    keys = _keys(options)
    code = _OK
    with _open(options, Bytes()) as store:
        for text in options.key:
            try:
                del store[keys.parse(text)]
            except KeyError:
                code = _tell_missing(text)
    return code


def _copy(options: _Options) -> int:
    with _open_to_read(options) as store, _progress("copy") as progress:
        store.copy_to(options.target, compact=options.compact, progress=progress)
    print(f"{options.path}: copied to {options.target}")
    return _OK


def _compact(options: _Options) -> int:
    with _progress("compact") as progress:
        saved = compact(options.path, progress=progress)
    print(f"{options.path}: {_size(saved)} smaller")
    return _OK


def _check(options: _Options) -> int:
    keys = _keys(options)
    serializer = _serializer(options) if options.values else None
    with _progress("check") as progress:
        report = check(options.path, serializer=serializer, progress=progress)
    found = [*report.problems, *report.bad_values.values()]
    code = _OK if report.is_sound else _NO
    if options.json:
        names = codec_of(keys.encoding, "strict", None).names([*report.bad_values])
        bad = [
            {**key_fields(key, keys), "problem": text}
            for key, text in zip(names, report.bad_values.values(), strict=True)
        ]
        _print_json({**asdict(report), "bad_values": bad, "sound": report.is_sound})
        return code
    read = "" if report.values is None else f", {_count(report.values, 'value')} read"
    state = _count(len(found), "problem") if found else "sound"
    print(f"{options.path}: {state}{read}")
    for text in found[:_SHOWN]:
        print(f"  {_spoken(text)}")
    if found[_SHOWN:]:
        print(f"  and {len(found) - _SHOWN:,} more; --json prints all")
    return code


def _count(number: int, noun: str) -> str:
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}"


def _salvage(options: _Options) -> int:
    with _progress("salvage") as progress:
        report = salvage(options.path, options.target, progress=progress)
    if options.json:
        _print_json(asdict(report))
    else:
        of = "" if report.expected is None else f" of {report.expected:,}"
        print(f"{options.target}: {report.entries:,}{of} entries saved")
        lost = {
            "pages or entries that could not be read": report.damage,
            "entries that may be old or deleted": report.uncertain,
            "named databases or entries with several values left out": report.special,
        }
        for text, count in lost.items():
            if count:
                print(f"  {count:,} {text}")
    doubts = report.damage + report.uncertain + report.special
    return _NO if doubts or report.entries != report.expected else _OK


def _export(options: _Options) -> int:
    keys = _keys(options)
    serializer = Bytes() if options.raw else _serializer(options)
    with (
        _open_to_read(options, serializer) as store,
        _output(options.file, _data_file(options.path)) as write,
        _progress("export", " entries") as progress,
    ):
        items = store.items(**_range(options, keys))
        total = 0 if progress is None else len(items)
        for key, value in _counted(items, total, progress):
            write(f"{line_of(key, value, keys, options.raw)}\n".encode())
    return _OK


@contextmanager
def _output(file: str | None, store: str) -> Iterator[Callable[[bytes], object]]:
    """Give a function that writes to a new file, which gets its name at the end.

    Only those can read the file that can read the data file `store`.
    """
    if file is None:
        yield sys.stdout.buffer.write
        return
    refuse_existing(file)
    with part_of(file) as part:
        make_scratch(part)
        with open(part, "wb") as output:
            yield output.write
        os.chmod(part, os.stat(store).st_mode & 0o666)
        rename(part, file)


def _import(options: _Options) -> int:
    keys, kind = _keys(options), options.kind
    source: Iterator[tuple[Any, Any, bool]]
    if kind and options.allow is not None:
        raise ValueError("--allow can't be used with --from, whose library unpickles")
    if kind and options.file is None:
        raise ValueError("--from needs the path of a store, after that of the new one")
    if kind:
        pairs = pairs_of(kind, options.file, options.table, keys)
        source = ((key, value, False) for key, value in pairs)
    else:
        source = _entries_of_lines(options.file, keys)
    first = [*islice(source, 1)]  # an error of these comes before a store is made
    count = 0
    with (
        _open(options, _serializer(options), True) as store,
        _open(options, Bytes()) as raws,
        _progress("import", " entries") as progress,
    ):
        try:
            for key, value, is_raw in _counted(chain(first, source), 0, progress):
                (raws if is_raw else store)[key] = value
                count += 1
            store.flush()
        except (lmdb.Error, OSError, KeyboardInterrupt, SystemExit):
            _complain(f"{options.path} is not complete: run the import again")
            raise
        except Exception:
            if count:
                _complain(f"{_count(count, 'entry')} before the error are stored")
            raise
    print(f"{options.path}: {_count(count, 'entry')} imported")
    return _OK


def _entries_of_lines(file: str | None, keys: Keys) -> Iterator[tuple[Any, Any, bool]]:
    with sys.stdin.buffer if file is None else open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield parse_line(line, keys)
                except ValueError as error:
                    text = str(error).rstrip(".")
                    raise ValueError(f"Line {number} is no entry: {text}.") from error


# Progress


@contextmanager
def _progress(text: str, unit: str = "B") -> Iterator[Progress | None]:
    """Give a function that shows progress, on a terminal and if tqdm is installed."""
    tqdm: Any = None
    if sys.stderr.isatty():
        with suppress(ImportError):
            tqdm = import_module("tqdm").tqdm
    if tqdm is None:
        yield None
        return
    with tqdm(desc=text, unit=unit, unit_scale=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield show


def _counted(
    items: Iterable[_T], total: int, progress: Progress | None
) -> Iterator[_T]:
    for number, item in enumerate(items):
        if progress is not None and number % _REPORT == 0:
            progress(number, total)
        yield item
