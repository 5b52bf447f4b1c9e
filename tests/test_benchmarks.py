"""The benchmarks: equal work on both sides, an honest verdict, and no typed figures."""

import importlib
import json
import re
import sys
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")


@pytest.fixture
def modules(monkeypatch):
    """Return a function that imports one of the benchmarks' modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def short(modules, monkeypatch):
    """Return a function that checks three hot paths, with as little work as can be."""
    hotpaths, measure = modules("hotpaths"), modules("measure")
    names = ("get, bytes key", "put into the buffer", "delete into the buffer")
    some = [path for path in hotpaths.HOT_PATHS if path.name in names]
    monkeypatch.setattr(hotpaths, "HOT_PATHS", some)

    def run(limit):
        options = ["--short", "--scale", "0.005", "--limit", str(limit)]
        monkeypatch.setattr(sys, "argv", ["measure.py", *options])
        return measure.main()

    return run


def test_short_mode_passes_if_no_hot_path_is_over_its_limit(short, capsys):
    assert short(1000) == 0
    printed = capsys.readouterr().out
    assert "Too slow" not in printed
    assert re.search(r"^get, bytes key +\d+\.\d\d  aim 1\.05", printed, re.MULTILINE)


def test_short_mode_fails_and_names_the_hot_paths_over_their_limit(short, capsys):
    assert short(0.001) == 1
    printed = capsys.readouterr()
    assert "once more, 3 of 3" in printed.err
    last = printed.out.splitlines()[-1]
    assert last == "Too slow: get, bytes key, put into the buffer"  # one has no aim


def raw_items(path):
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return list(txn.cursor())


def test_both_sides_of_a_hot_path_do_the_same_work(modules, tmp_path):
    hotpaths = modules("hotpaths")
    with closing(hotpaths.Workbench(tmp_path, entries=2_500)) as bench:
        done = []
        bench.choose(lambda work: done.append(list(work)))
        for path in hotpaths.HOT_PATHS:
            results = []
            for side in bench.sides.values():
                done.clear()
                with path.prepare(side) as work:
                    returned = work()
                    side.store.flush()
                    results.append((returned, [*done], [*side.store.items()]))
            assert results[0] == results[1], path.name
    ours, by_hand = (sorted((tmp_path / side).iterdir()) for side in hotpaths.SIDES)
    assert [path.name for path in ours] == [path.name for path in by_hand]
    for mine, theirs in zip(ours, by_hand, strict=True):
        assert raw_items(mine) == raw_items(theirs)


@pytest.mark.parametrize("durable", [False, True])
def test_every_store_keeps_what_it_is_given(modules, tmp_path, durable):
    stores = modules("rival_stores")
    rivals = [rival for rival in stores.RIVALS.values() if stores.version(rival)]
    for rival in rivals:
        if durable and rival.durable is None:
            continue
        path, encode = tmp_path / rival.__name__, rival.encode
        expected = {encode(f"k{number}"): {"n": number} for number in range(20)}
        store = rival(path, durable)
        store.put_batch(list(expected.items())[:10])
        for key, obj in list(expected.items())[10:]:
            store.put(key, obj)
        store.delete(encode("k3"))
        del expected[encode("k3")]
        assert (store.get(encode("k4")), store.get(encode("k3"))) == ({"n": 4}, None)
        store.finish()  # the rest is measured when nothing is pending
        assert [bool(store.has(encode(key))) for key in ("k4", "k3")] == [True, False]
        assert dict(store.items()) == expected
        prefixed = {
            key: obj for key, obj in expected.items() if key[:2] == encode("k1")
        }
        assert len(prefixed) == 11
        assert dict(store.items_of(encode("k1"))) == prefixed
        store.close()
        store = rival(path, durable)
        assert dict(store.items()) == expected, rival.name
        store.close()


def test_tables_are_what_the_results_say(modules):
    report = modules("report")
    results = json.loads(report.RESULTS.read_text("utf-8"))
    made = {"about", *dict(report.sections(results))}
    for page in report.PAGES:
        text = page.read_text("utf-8")
        assert report.rewritten(text, results) == text
        names = re.findall(r"<!-- benchmark: ([\w-]+) -->", text)
        assert names
        assert {*names} <= made
        assert len(names) == text.count("<!-- end -->")


def test_what_could_not_be_measured_is_named(modules):
    report = modules("report")
    part = json.loads(report.RESULTS.read_text("utf-8"))["rivals"]
    part["stores"]["plyvel"]["version"] = None
    failure = {"store": "lmdbm", "suite": "workloads", "durability": "durable"}
    part["skipped"] = [{**failure, "workload": "get", "why": "the reason"}]
    table = report.rivals(part, "durable", reads=False)
    assert "Not measured: plyvel (not installed)." in table
    assert "Not measured: lmdbm, get (the reason)." in table
    assert "the reason" not in report.rivals(part, "buffered", reads=False)
    published = report.published(part, "durable")
    assert "Not measured: plyvel (not installed)." in published
    assert "the reason" not in published


def test_the_chart_can_be_drawn_and_stays_small(modules, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    report = modules("report")
    monkeypatch.setattr(report, "CHART", tmp_path / "speed.svg")
    report.draw(json.loads(report.RESULTS.read_text("utf-8"))["rivals"])
    assert 10_000 < report.CHART.stat().st_size < 150_000


def test_the_way_of_a_put_can_be_drawn(modules, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = modules("draw_path")
    monkeypatch.setattr(path, "PICTURE", tmp_path / "path.svg")
    path.draw()
    assert 10_000 < path.PICTURE.stat().st_size < 100_000
