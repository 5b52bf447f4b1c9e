"""The command line, mostly called in the process of the test."""

import datetime
import gc
import io
import json
import marshal
import os
import shelve
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import uuid
from contextlib import closing, suppress
from pathlib import Path

import lmdb
import pytest

import lmdb_object_store
from conftest import eventually, needs_posix
from lmdb_object_store import LmdbObjectStore
from lmdb_object_store._cli import main
from lmdb_object_store.keys import TupleKeys
from lmdb_object_store.serializers import Bytes, Checked, Compressed, Json, Pickle

NAME = "lmdb-object-store"
COMMAND = [sys.executable, "-m", "lmdb_object_store"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(capsysbinary):
    """Run a command; return its exit code, its output and its errors."""

    def run(*arguments, lines=()):
        stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(b"".join(lines)))
        try:
            code = main(list(map(str, arguments)))
        finally:
            sys.stdin = stdin
        output, errors = capsysbinary.readouterr()
        return code, output.decode(), errors.decode()

    return run


@pytest.fixture
def printed(call):
    """Run a command that must succeed; return the lines that it prints."""

    def run(*arguments, **options):
        code, output, errors = call(*arguments, **options)
        assert (code, errors) == (0, "")
        return output.splitlines()

    return run


@pytest.fixture
def told(call):
    """Run a command that must fail; return what it says."""

    def run(*arguments, **options):
        code, output, errors = call(*arguments, **options)
        assert (code, output) == (2, "")
        assert errors.startswith("lmdb-object-store: ")
        assert errors.count("\n") == 1
        return errors

    return run


def fill(name, entries, **options):
    options.setdefault("key_encoding", "utf-8")
    with LmdbObjectStore(name, **options) as store:
        store.put_many(entries)


def content(name, **options):
    options.setdefault("key_encoding", "utf-8")
    with LmdbObjectStore(name, readonly=True, **options) as store:
        return dict(store.items())


# One entry


def test_a_value_is_set_and_got(call, printed):
    assert printed("set", "db", "a", '{"n": [1, null]}', "--create") == []
    assert printed("get", "db", "a") == ["{'n': [1, None]}"]
    assert printed("get", "db", "a", "--json") == ['{"n": [1, null]}']
    assert content("db") == {"a": {"n": [1, None]}}


def test_text_is_set_and_got_as_it_is(printed):
    printed("set", "db", "a", "one: [", "--text", "--create")
    assert printed("get", "db", "a") == ["one: ["]
    assert printed("get", "db", "a", "--json") == ['"one: ["']


def test_a_value_is_read_from_the_standard_input(printed):
    fill("db", {})
    printed("set", "db", "a", "-", lines=[b"[1,\n", b"2]\n"])
    assert content("db") == {"a": [1, 2]}


def test_a_value_that_is_no_json_is_refused(told):
    fill("db", {})
    assert "is not JSON" in told("set", "db", "a", "one")
    assert content("db") == {}


def test_a_missing_key_has_an_exit_code_of_its_own(call):
    fill("db", {"a": 1})
    code, output, errors = call("get", "db", "b")
    assert (code, output) == (1, "")
    assert errors == "lmdb-object-store: there is no key b\n"


def test_keys_are_removed_and_missing_keys_are_told(call):
    fill("db", {"a": 1, "b": 2, "c": 3})
    code, _, errors = call("rm", "db", "a", "x", "c")
    assert (code, errors) == (1, "lmdb-object-store: there is no key x\n")
    assert content("db") == {"b": 2}


def test_bytes_are_written_as_they_are_where_nobody_reads_them(capfdbinary):
    fill("db", {"a": b"\xff\x00"}, serializer=Bytes())
    assert main(["get", "db", "a", "--serializer", "bytes"]) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == b"\xff\x00"


def test_what_json_can_not_hold_is_not_printed_as_json(told):
    fill("db", {"a": (1, 2)})
    assert "JSON can't hold" in told("get", "db", "a", "--json")


@pytest.mark.parametrize(
    "command", ["info", "ls", "get", "set", "rm", "copy", "export"]
)
def test_a_store_that_is_not_there_is_not_made(told, command):
    more = {"get": ["k"], "set": ["k", "1"], "rm": ["k"], "copy": ["new"]}
    assert "There is no store at 'db'" in told(command, "db", *more.get(command, []))
    assert os.listdir() == []


def test_a_terminal_gets_no_control_sequences(printed, monkeypatch):
    fill("db", {"a": "\x1b[2J", "b": "one\ntwo", "\x9b": 1})
    assert "\x9b" not in "".join(printed("ls", "db", "--json") + printed("ls", "db"))
    assert printed("get", "db", "a") == ["\x1b[2J"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert printed("get", "db", "a") == ["'\\x1b[2J'"]
    assert printed("get", "db", "b") == ["one", "two"]


# Keys


def test_keys_are_listed_in_order(printed, told):
    fill("db", dict.fromkeys(("b", "a1", "a2", "c")))
    assert printed("ls", "db") == ["a1", "a2", "b", "c"]
    assert printed("ls", "db", "--prefix", "a") == ["a1", "a2"]
    assert printed("ls", "db", "--start", "a2", "--stop", "c") == ["a2", "b"]
    assert printed("ls", "db", "--limit", 1) == ["a1"]
    assert printed("ls", "db", "--prefix", "b", "--json") == ['{"key": "b"}']
    assert "must not be negative" in told("ls", "db", "--limit", -1)


def test_keys_that_are_no_text_are_listed_and_can_be_used(printed):
    fill("db", {b"\xff\x01": 1, "é": 2, "a\nb": 3})
    assert printed("ls", "db") == ["'a\\nb'", "é", "0xff01"]
    assert json.loads(printed("ls", "db", "--json")[-1]) == {"key64": "/wE="}
    assert printed("ls", "db", "--key-encoding", "hex")[-1] == "ff01"
    assert printed("get", "db", "0xff01", "--key-encoding", "hex") == ["1"]


def test_keys_that_a_terminal_can_not_show_are_listed():
    fill("db", {"é漢": 1})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = subprocess.run(
        [*COMMAND, "ls", "db"], env=environment, capture_output=True, check=True
    ).stdout
    assert output.split() == [rb"\xe9\u6f22"]
    output = subprocess.run(
        [*COMMAND, "ls", "db", "--json"],
        env=environment,
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(output) == {"key": "é漢"}


def test_tuples_are_json(printed, told):
    keys = [("sensor", 7, 1.5), 5, "text", (None, (1, True))]
    fill("db", dict.fromkeys(keys, 1), key_encoding=TupleKeys())
    listed = printed("ls", "db", "--key-encoding", "tuple")
    assert listed == ["[null, [1, true]]", '["sensor", 7, 1.5]', '"text"', "5"]
    for key in listed:
        assert printed("get", "db", key, "--key-encoding", "tuple") == ["1"]
    prefix = ["--prefix", '["sensor"]', "--key-encoding", "tuple"]
    assert printed("ls", "db", *prefix) == ['["sensor", 7, 1.5]']
    assert "is no key in JSON" in told("get", "db", "text", "--key-encoding", "tuple")


def test_tuples_that_json_can_not_hold_are_shown_by_python(printed):
    number = uuid.UUID(int=1)
    fill("db", {(b"a", 1): 1, number: 2, b"\xff": 3}, key_encoding=TupleKeys())
    listed = printed("ls", "db", "--key-encoding", "tuple")
    assert listed == ["(b'a', 1)", repr(number), "b'\\xff'"]


@pytest.mark.parametrize("name", ["nothing", "hex"])
def test_a_key_that_can_not_be_meant_is_refused(told, name):
    fill("db", {})
    assert "nothing" in told("get", "db", "nothing", "--key-encoding", name)


# Serializers


def test_another_serializer_is_named(printed, told):
    fill("db", {"a": [1]}, serializer=Json())
    assert printed("get", "db", "a", "--serializer", "json") == ["[1]"]
    assert "Failed to unpickle DB key 'a'" in told("get", "db", "a")


def test_a_serializer_of_a_module_is_imported(tmp_path):
    text = "from lmdb_object_store.serializers import *\nmine = Checked(Json())\n"
    (tmp_path / "storage.py").write_text(text, "utf-8")
    fill("db", {"a": [1]}, serializer=Checked(Json()))
    run = subprocess.run(
        [*COMMAND, "get", "db", "a", "--serializer", "storage:mine"],
        capture_output=True,
        check=False,
    )
    assert (run.stdout.split(), run.stderr) == ([b"[1]"], b"")


@pytest.mark.parametrize(
    ("name", "serializer"),
    [
        ("checked,json", Checked(Json())),
        ("checked,compressed,pickle", Checked(Compressed(Pickle()))),
    ],
)
def test_a_serializer_around_another_is_named(printed, call, name, serializer):
    fill("db", {"a": [1] * 100}, serializer=serializer)
    assert printed("get", "db", "a", "--serializer", name, "--json") == [str([1] * 100)]
    assert printed("check", "db", "--values", "--serializer", name)
    damage("db/data.mdb")
    assert call("check", "db", "--values", "--serializer", name)[0] == 1


def damage(file):
    """Change the last byte of the file that is not zero."""
    with open(file, "r+b") as opened:
        raw = opened.read().rstrip(b"\0")
        opened.seek(len(raw) - 1)
        opened.write(bytes([raw[-1] ^ 1]))


def test_a_serializer_that_is_none_is_told(told):
    fill("db", {"a": [1]})
    assert "goes around no" in told("get", "db", "a", "--serializer", "json,pickle")
    assert "No module named" in told("get", "db", "a", "--serializer", "nowhere")
    assert "no attribute 'x'" in told("get", "db", "a", "--serializer", "marshal:x")
    assert "must have dumps" in told("get", "db", "a", "--serializer", "sys")


def test_a_module_is_a_serializer(printed):
    fill("db", {"a": [1]}, serializer=marshal)
    assert printed("get", "db", "a", "--serializer", "marshal") == ["[1]"]


@pytest.mark.parametrize("allow", ["", "datetime.time,datetime.tzinfo"])
def test_pickles_load_only_what_is_allowed(call, told, allow):
    fill("db", {"a": datetime.date(2026, 1, 2)})
    advice = "add 'datetime.date' to --allow"
    assert advice in told("get", "db", "a", "--allow", allow)
    code, output, _ = call("check", "db", "--values", "--allow", allow)
    assert (code, advice in output) == (1, True)


def test_what_is_allowed_is_loaded(printed, told):
    fill("db", {"a": datetime.date(2026, 1, 2)})
    allow = ["--allow", "datetime.time,datetime.date"]
    assert printed("get", "db", "a", *allow) == ["datetime.date(2026, 1, 2)"]
    assert "--allow is for" in told("get", "db", "a", *allow, "--serializer", "json")


class Trap:
    """An object whose unpickling leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_nothing_is_unpickled_unless_the_command_says_so(call):
    fill("db", {"a": Trap()})
    for command in (
        ["info", "db"],
        ["ls", "db"],
        ["copy", "db", "copied"],
        ["compact", "db"],
        ["check", "db"],
        ["salvage", "db", "saved"],
        ["export", "db", "--raw"],
        ["export", "db", "all", "--raw"],
        ["import", "new", "all"],
        ["rm", "new", "a"],
    ):
        assert call(*command)[0] == 0, command
    assert not os.path.exists("sprung")
    assert call("check", "db", "--values", "--allow", "")[0] == 1
    assert not os.path.exists("sprung")
    call("check", "db", "--values")
    assert os.path.exists("sprung")


# The file


def test_figures_for_people_and_for_programs(printed):
    fill("db", {str(n): bytes(1000) for n in range(1000)})
    with LmdbObjectStore("db") as store:
        store.clear()
    rows = dict(line.split(maxsplit=1) for line in printed("info", "db"))
    assert rows["entries"] == "0"
    assert rows["free"].endswith("% of the file")
    figures = json.loads("".join(printed("info", "db", "--json")))
    assert figures["used"] + figures["free"] == figures["file_size"]


def test_dead_readers_are_told(printed):
    fill("db", {"a": 1})
    script = (
        "import os, lmdb; env = lmdb.open('db'); txn = env.begin(); txn.get(b'a');"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    # Opening the store clears the slot; another store has to have it open before.
    with LmdbObjectStore("db"):
        subprocess.run([sys.executable, "-c", script], check=True)
        [row] = [line for line in printed("info", "db") if line.startswith("readers")]
    assert row == "readers           0 of 126, 1 dead ones cleared"


def test_a_store_is_copied_compacted_and_checked(printed, told):
    entries = {f"{n:05}": bytes(500) for n in range(2000)}
    fill("db", entries)
    with LmdbObjectStore("db", key_encoding="utf-8") as store:
        store.delete_many(store.keys(start="00500"))
    assert printed("copy", "db", "copied") == ["db: copied to copied"]
    assert printed("copy", "db", "small", "--compact") == ["db: copied to small"]
    assert content("copied") == content("small") == content("db")
    sizes = [os.path.getsize(f"{name}/data.mdb") for name in ("db", "copied", "small")]
    assert sizes[2] < sizes[1] / 2
    assert "overwritten" in told("copy", "db", "copied")
    [line] = printed("compact", "db")
    assert line.startswith("db: ")
    assert line.endswith("KiB smaller")
    assert os.path.getsize("db/data.mdb") == sizes[2]
    assert printed("check", "db") == ["db: sound"]
    assert printed("check", "db", "--values") == ["db: sound, 500 values read"]
    with LmdbObjectStore("db"):
        assert "is open" in told("compact", "db")


def test_a_single_file(printed):
    fill("one.mdb", {"a": 1}, subdir=False)
    assert printed("get", "one.mdb", "a") == ["1"]
    printed("copy", "one.mdb", "two.mdb")
    assert os.path.isfile("two.mdb")
    assert printed("check", "two.mdb") == ["two.mdb: sound"]


def test_damage_is_told_and_what_is_left_is_saved(call):
    fill("db", {f"{n:05}": "x" * 100 for n in range(5000)}, serializer=Checked(Json()))
    with open("db/data.mdb", "r+b") as file:
        raw = file.read()
        file.seek(raw.index(b'"xxxx') + 4)
        file.write(b"y")
        at = raw.rindex(b'"xxxx') // 4096 * 4096
        file.seek(at)
        file.write(bytes(4096))
    code, output, _ = call("check", "db")
    assert code == 1
    assert "stores mp_pgno 0" in output
    code, output, _ = call("salvage", "db", "saved")
    assert code == 1
    head, *lost = output.splitlines()
    assert head.startswith("saved: 4,9")
    assert head.endswith(" of 5,000 entries saved")
    assert lost == ["  1 pages or entries that could not be read"]
    code, output, _ = call("salvage", "db", "again", "--json")
    assert (code, json.loads(output)["damage"]) == (1, 1)
    with open("storage.py", "w") as file:
        file.write(
            "from lmdb_object_store.serializers import *\nmine = Checked(Json())\n"
        )
    values = ["--values", "--serializer", "storage:mine"]
    run = subprocess.run([*COMMAND, "check", "saved", *values], capture_output=True)
    assert run.returncode == 1
    head, problem = run.stdout.decode().splitlines()
    assert head.startswith("saved: 1 problem, 4,9")
    assert problem.startswith("  Failed to load DB key '0")
    run = subprocess.run(
        [*COMMAND, "check", "saved", *values, "--json"], capture_output=True
    )
    report = json.loads(run.stdout)
    assert not report["sound"]
    [bad] = report["bad_values"]
    assert bad["problem"] == problem.strip()
    assert bad["key"] in problem


def test_many_bad_values_are_counted(call):
    fill("db", {f"{n:03}": n for n in range(50)})
    code, output, _ = call("check", "db", "--values", "--serializer", "json")
    assert code == 1
    assert len(output.splitlines()) == 22
    assert output.splitlines()[-1] == "  and 30 more; --json prints all"


def test_a_whole_file_is_saved_whole(call):
    fill("db", {"a": 1})
    assert call("salvage", "db", "saved") == (0, "saved: 1 of 1 entries saved\n", "")
    assert json.loads(call("salvage", "db", "again", "--json")[1])["entries"] == 1


def test_what_is_no_store_is_told(call, told):
    with open("file", "w") as file:
        file.write("text" * 5000)
    code, output, _ = call("check", "file")
    assert (code, output.splitlines()[0]) == (1, "file: 1 problem")
    assert "is no LMDB file" in told("info", "file")
    assert "no page in it is one" in told("salvage", "file", "new")
    with open("empty", "w"):
        pass
    assert "has an empty data file" in told("info", "empty")
    assert "There is no data file" in told("check", "nothing")


@needs_posix
def test_a_file_that_may_only_be_read(printed, told):
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder, "db")
        fill(db, {"a": 1})
        for path in (db / "lock.mdb", db / "data.mdb", db, Path(folder)):
            path.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # may write to all
            os.seteuid(65534)
        try:
            assert "say --no-lock" in told("get", db, "a")
            assert printed("get", db, "a", "--no-lock") == ["1"]
        finally:
            os.seteuid(user)
            for path in (Path(folder), db):
                path.chmod(0o700)


def test_without_locks_no_lock_file_is_made(printed):
    fill("db", {"a": 1})
    os.remove("db/lock.mdb")
    for command in (
        ["info", "db"],
        ["ls", "db"],
        ["copy", "db", "new"],
        ["export", "db"],
    ):
        assert printed(*command, "--no-lock")
    assert os.listdir("db") == ["data.mdb"]


# Moving in and out


VALUES = {"a": {"n": [1, 2.5, None, True, "\ud800"]}, "b": "é", "c": []}


def test_lines_of_json_go_out_and_in(printed):
    fill("db", VALUES)
    assert printed("export", "db", "lines") == []
    with open("lines", "rb") as file:
        assert [json.loads(line) for line in file] == [
            {"key": key, "value": value} for key, value in VALUES.items()
        ]
    assert printed("import", "new", "lines") == ["new: 3 entries imported"]
    assert content("new") == VALUES


def test_lines_pass_through_a_pipe(printed):
    fill("db", {**VALUES, "a": 1}, serializer=Json(), key_encoding="utf-16-le")
    form = ["--serializer", "json", "--key-encoding", "utf-16-le"]
    lines = [line.encode() + b"\n" for line in printed("export", "db", *form)]
    printed("import", "new", lines=[*lines, b"\n"])
    assert content("new") == {**VALUES, "a": 1}


@pytest.mark.parametrize(
    "value",
    [(1,), {1: 2}, {"a": [(1,)]}, b"x", float("nan"), float("inf"), {1}, 1j, Trap],
    ids=repr,
)
def test_values_that_json_would_change_need_raw(printed, told, value):
    fill("db", {"a": value})
    assert "Export the stored bytes by --raw" in told("export", "db", "lines")
    assert not os.path.exists("lines")
    printed("export", "db", "lines", "--raw")
    printed("import", "new", "lines")
    assert content("new", serializer=Bytes()) == content("db", serializer=Bytes())


def test_keys_of_all_kinds_go_out_and_in(printed):
    keys = [("a", (1, None)), 5, 2.5, (b"\0", 1), uuid.UUID(int=3), b"\xff", "é"]
    fill(
        "db", {key: number for number, key in enumerate(keys)}, key_encoding=TupleKeys()
    )
    form = ["--key-encoding", "tuple"]
    printed("export", "db", "lines", *form)
    printed("import", "new", "lines", *form)
    assert content("new", key_encoding=None) == content("db", key_encoding=None)
    printed("export", "db", "digits", "--key-encoding", "hex")
    printed("import", "third", "digits", "--key-encoding", "hex")
    assert content("third", key_encoding=None) == content("db", key_encoding=None)


@needs_posix
def test_lines_are_as_private_as_the_store(printed):
    fill("db", {"a": 1})
    os.chmod("db/data.mdb", 0o600)
    printed("export", "db", "lines")
    assert os.stat("lines").st_mode & 0o777 == 0o600


def test_a_range_goes_out(printed):
    fill("db", {"a1": 1, "a2": 2, "b": 3})
    [line] = printed("export", "db", "--prefix", "a", "--start", "a2")
    assert json.loads(line) == {"key": "a2", "value": 2}


def test_no_file_is_overwritten(told):
    fill("db", {"a": 1})
    with open("lines", "w") as file:
        file.write("mine")
    assert "lines" in told("export", "db", "lines")
    with open("lines") as file:
        assert file.read() == "mine"


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"key": "b"}',
        b'{"value": 1}',
        b'{"key": 5, "value": 1}',
        b'{"key": "b", "raw": "?"}',
        b'{"key64": "?", "raw": ""}',
        b'{"key": "b", "key64": "", "value": 1}',
        b'{"key": "b", "raw": 7}',
        b"\xff",
    ],
)
def test_a_line_that_is_no_entry_is_told_and_mended(call, printed, told, line):
    first, last = b'{"key": "a", "value": 1}\n', b'{"key": "c", "value": 3}\n'
    assert "Line 1 is no entry: " in told("import", "new", lines=[line + b"\n", last])
    assert not os.path.exists("new")
    code, _, errors = call("import", "new", lines=[first, line + b"\n", last])
    stored, error = errors.splitlines()
    assert (code, stored) == (2, f"{NAME}: 1 entry before the error are stored")
    assert error.startswith(f"{NAME}: Line 2 is no entry: ")
    assert content("new") == {"a": 1}
    printed("import", "new", lines=[first, last])
    assert content("new") == {"a": 1, "c": 3}


def test_a_value_that_the_serializer_refuses_is_told_with_its_key(told):
    with shelve.open("old") as shelf:
        shelf["a"] = {1}
    form = ["--from", "shelve", "--serializer", "json"]
    assert "not JSON serializable" in told("import", "new", "old", *form)


def has_stored(count):
    with suppress(lmdb.Error):  # the file is being made
        return os.path.exists("new") and len(content("new")) >= count


@pytest.mark.usefixtures("_unmeasured")
def test_an_interrupted_import_is_completed_by_another():
    lines = b"".join(b'{"key": "%06d", "value": 0}\n' % n for n in range(50_000))
    with open("lines", "wb") as file:
        file.write(lines)
    first = subprocess.Popen([*COMMAND, "import", "new"], stdin=subprocess.PIPE)
    first.stdin.write(lines[: len(lines) // 2])
    first.stdin.flush()
    eventually(lambda: has_stored(10_000))
    first.kill()
    first.wait()
    first.stdin.close()
    assert len(content("new")) < 50_000
    subprocess.run([*COMMAND, "import", "new", "lines"], check=True)
    assert len(content("new")) == 50_000


def test_a_shelf_moves_in(printed):
    with shelve.open("old") as shelf:
        shelf["a"], shelf["b"] = (1, 2), {"x": [1]}
    imported = ["new: 2 entries imported"]
    assert printed("import", "new", "old", "--from", "shelve") == imported
    assert content("new") == {"a": (1, 2), "b": {"x": [1]}}


# The library leaves connections to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sqlitedict_moves_in(printed, told):
    sqlitedict = pytest.importorskip("sqlitedict")
    with sqlitedict.SqliteDict("old", autocommit=True) as old:
        old["a"] = (1, 2)
    printed("import", "new", "old", "--from", "sqlitedict")
    assert content("new") == {"a": (1, 2)}
    with sqlitedict.SqliteDict("old", "second", autocommit=True) as old:
        old["b"] = 1
    more = ["--from", "sqlitedict"]
    assert "Name one by --table" in told("import", "new", "old", *more)
    assert "Name one by --table" in told("import", "new", "old", *more, "--table", "x")
    printed("import", "new", "old", *more, "--table", "second")
    assert content("new") == {"a": (1, 2), "b": 1}
    gc.collect()


def test_a_diskcache_moves_in(printed, call):
    diskcache = pytest.importorskip("diskcache")
    with diskcache.Cache("old", cull_limit=0) as old:
        old["a"], old[3], old[b"b"], old["c", 1] = (1, 2), 3, b"4", 5
        old.set("gone", 1, expire=-1)
    tuples = ["--key-encoding", "tuple"]
    printed("import", "new", "old", "--from", "diskcache", *tuples)
    expected = {"a": (1, 2), 3: 3, (b"b",): b"4", ("c", 1): 5}
    assert content("new", key_encoding=TupleKeys()) == expected
    for other in ("utf-8", "hex"):
        form = ["--key-encoding", other]
        code, _, errors = call("import", "n", "old", "--from", "diskcache", *form)
        assert code == 2
        assert "--key-encoding" in errors.splitlines()[-1]


def test_bytes_of_a_diskcache_are_keys_in_digits(printed):
    diskcache = pytest.importorskip("diskcache")
    with diskcache.Cache("old") as old:
        old[b"\xff"] = 1
    form = ["--key-encoding", "hex"]
    printed("import", "new", "old", "--from", "diskcache", *form)
    assert content("new", key_encoding=None) == {b"\xff": 1}


def test_an_lmdbm_moves_in(printed):
    lmdbm = pytest.importorskip("lmdbm")
    with lmdbm.Lmdb.open("old", "c") as old:
        old["a"], old[b"\xff"] = b"1", b"2"
    printed("import", "new", "old", "--from", "lmdbm")
    assert content("new") == {"a": b"1", b"\xff": b"2"}
    printed("import", "raw", "old", "--from", "lmdbm", "--serializer", "bytes")
    assert content("raw", serializer=Bytes()) == {"a": b"1", b"\xff": b"2"}


OTHERS = ["shelve", "sqlitedict", "diskcache", "lmdbm"]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_store_that_can_not_move_in_is_told_and_stays_as_it_is(told, kind):
    os.mkdir("folder")
    with open("text", "w") as file:
        file.write("text" * 1000)
    assert "There is no such store" in told("import", "new", "x", "--from", kind)
    assert "not of" in told("import", "new", "folder", "--from", kind)
    assert "not of" in told("import", "new", "text", "--from", kind)
    assert sorted(os.listdir()) == ["folder", "text"]
    assert os.listdir("folder") == []


def test_a_database_without_a_sqlitedict_is_told(told):
    with closing(sqlite3.connect("old")) as connection:
        connection.execute("CREATE TABLE t (a, b)")
    assert "has these tables: []" in told(
        "import", "new", "old", "--from", "sqlitedict"
    )


def test_what_an_import_needs_is_told(told, monkeypatch):
    assert "needs the path" in told("import", "new", "--from", "shelve")
    allow = ["--allow", "x"]
    assert "--allow can't be" in told("import", "new", "x", "--from", "shelve", *allow)
    monkeypatch.setitem(sys.modules, "diskcache", None)
    os.mkdir("old")
    with open("old/cache.db", "w"):
        pass
    error = told("import", "new", "old", "--from", "diskcache")
    assert "pip install diskcache" in error


def test_a_file_may_stand_behind_the_options(printed):
    fill("db", {"a": 1})
    printed("export", "db", "--raw", "lines")
    printed("import", "new", "--key-encoding", "utf-8", "lines")
    assert content("new") == {"a": 1}


def test_an_argument_too_many_is_told(capsys):
    for arguments in (["import", "new", "--json", "x"], ["info", "db", "x"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_no_store_is_made_for_a_file_that_is_not_there(told):
    assert "No such file" in told("import", "new", "lines")
    assert os.listdir() == []


def test_a_full_map_is_told_in_two_lines(call):
    line = json.dumps({"key": "a", "value": "x" * 10**7}).encode()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, -1));"
    run_it = "from lmdb_object_store._cli import run; raise SystemExit(run())"
    run = subprocess.run(
        [sys.executable, "-c", limit + run_it, "import", "new"],
        input=line,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 2
    first, second = run.stderr.decode().splitlines()
    assert first.endswith("is not complete: run the import again")
    assert "disk" in second


# In a shell


def test_help_of_each_command_says_what_can_run_code(capsys):
    for command in ("get", "export", "import", "check"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "unpickle" in text.lower(), command
        assert "--allow" in text


@needs_posix
@pytest.mark.usefixtures("_unmeasured")
def test_a_killed_compaction_is_no_success():
    fill("db", {"a": 1})
    script = """
import os, signal
from lmdb_object_store import _child
def ask(self):
    self.send("question", None)
    os.kill(os.getpid(), signal.SIGKILL)
_child.Parent.ask = ask
"""
    with open("sitecustomize.py", "w") as file:  # all interpreters run it first
        file.write(script)
    run = subprocess.run(
        [*COMMAND, "compact", "db"],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 2
    assert b"has been ended" in run.stderr


def test_the_version_and_wrong_arguments(capsys):
    for arguments, code in ([["--version"], 0], [["nothing"], 2], [[], 2]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == code
    assert capsys.readouterr().out.startswith(lmdb_object_store.__version__)


@needs_posix
def test_a_reader_that_goes_away_is_no_error():
    fill("db", {f"{n:06}": None for n in range(50_000)})
    process = subprocess.Popen(
        [*COMMAND, "ls", "db"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"000000\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@needs_posix
def test_an_interrupt_is_no_traceback():
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*COMMAND, "import", "new"], stdin=pipe, stderr=pipe
    ) as process:
        process.stdin.write(b'{"key": "a", "value": 1}\n')
        process.stdin.flush()
        eventually(lambda: has_stored(1))
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        text = b"lmdb-object-store: new is not complete: run the import again\n"
        assert process.stderr.read() == text


@needs_posix
def test_progress_is_shown_on_a_terminal_only():
    import fcntl
    import pty
    import termios

    fill("db", {f"{n:05}": 0 for n in range(5000)})
    with shelve.open("old") as shelf:
        shelf["a"] = 1
    for commands in (
        ["check", "db", "--values"],
        ["export", "db", "lines"],
        ["import", "new", "lines"],
        ["import", "third", "old", "--from", "shelve"],
    ):
        terminal, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        process = subprocess.Popen(
            [*COMMAND, *commands], stdout=subprocess.PIPE, stderr=side
        )
        os.close(side)
        shown = b""
        with suppress(OSError):  # Linux says so that the other side is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        os.close(terminal)
        assert process.wait() == 0
        process.stdout.close()
        assert commands[0].encode() in shown


def test_no_progress_is_shown_elsewhere_than_on_a_terminal(call):
    pytest.importorskip("tqdm")
    fill("db", {"a": 1})
    assert call("check", "db", "--values") == (0, "db: sound, 1 value read\n", "")


def test_progress_needs_no_library(call, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fill("db", {"a": 1})
    assert call("check", "db") == (0, "db: sound\n", "")
