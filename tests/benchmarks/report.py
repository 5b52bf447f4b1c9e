"""Make the tables and the chart of the README from the results.

    python tests/benchmarks/report.py

A table stands between two comments, `<!-- benchmark: NAME -->` and `<!-- end -->`, and
is made anew each time. The chart needs matplotlib; without it only the tables are made.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
CHART = HERE / "speed.svg"
PAGES = (HERE.parents[1] / "README.md", HERE / "README.md")

OURS = "lmdb-object-store"
UNSYNCED = "lmdb-object-store, sync=False"
DURABLE, BUFFERED = "durable", "buffered"
READS = {
    *("get", "get, missing", "in", "all items", "items of a prefix (100)"),
    *("get, array of 1 MiB", "open and close"),
}
HEADLINES = {
    "get": "read a value by its key",
    "all items": "read all entries, each",
    "bulk load": "load many entries, each",
}
COMPARED = ("py-lmdb by hand", "rocksdict", "diskcache", "sqlitedict")
PARTS = {
    "hot": "by hand",
    "growth": "growing data",
    "concurrency": "threads and processes",
    "rivals": "other stores",
}

TEXT = "#7f7f7f"  # can be read on white and on black
# Colours for the colour-blind, but for those too light for white or too dark for black.
COLOURS = (
    *("#8b5cf6", "#7f7f7f", "#0072b2", "#56b4e9", "#009e73"),
    *("#e69f00", "#d55e00", "#cc79a7", "#999933"),
)
MARKERS = "poDs^vPX*"

Cells = Iterable[Any]


def number(value: float | None) -> str:
    """Return the value with two digits that count, or all before the point."""
    if value is None:
        return "-"
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{value:,.{digits}f}"


def mib(size: float) -> str:
    return number(size / 2**20)


def table(head: Cells, rows: Iterable[Cells], align: str = "---:") -> str:
    head = list(head)
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def about(results: dict[str, Any]) -> str:
    """Tell when and where each part was measured; parts measured alike share a line."""
    lines: dict[str, list[str]] = {}
    for name, part in results.items():
        lines.setdefault(_about(part["about"]), []).append(PARTS[name])
    return "\n\n".join(
        f"{', '.join(names).capitalize()}, {text}" for text, names in lines.items()
    )


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    machine = dict(about["machine"])
    fsync = machine.pop("fsync, milliseconds")
    facts = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    line = (
        f"{about['date']}: {versions}; {facts}, {machine['file system']} "
        f"(fsync {fsync:.1f} ms)."
    )
    if about["scale"] < 1:  # too little to rely on
        return (
            f"**A trial run with {about['scale'] * 100:g} % of the work, not a "
            f"measurement.** {line}"
        )
    return line


def headline(part: dict[str, Any]) -> str:
    """Return three figures, and what others take for the same."""
    found = part.get("workloads", {}).get(BUFFERED, {})
    rows = []
    for workload, title in HEADLINES.items():
        row = found.get(workload, {})
        if OURS in row:
            ours = row[OURS]["minimum"]
            others = map(row.get, COMPARED)
            times = (
                other and f"{number(other['minimum'] / ours)} times" for other in others
            )
            rows.append((title, f"{number(ours)} µs", *(text or "-" for text in times)))
    return table(("", "this library", *COMPARED), rows)


def hot(part: dict[str, Any]) -> str:
    rows = [
        (
            path["name"],
            f"{path['ratio']:.2f}",
            *map(number, path["microseconds"].values()),
        )
        for path in part["paths"]
    ]
    head = ("", "times by hand", "this library, µs", "by hand, µs")
    imports = {name: number(ms) for name, ms in part["import, milliseconds"].items()}
    return (
        f"{table(head, rows)}\n\n"
        f"Importing the library takes {imports['lmdb_object_store, after lmdb']} ms "
        f"more than importing `lmdb`, which takes {imports['lmdb']} ms. Much of that "
        "time goes into modules of the standard library: `typing`, `logging`, `pickle`."
    )


def growth(part: dict[str, Any]) -> str:
    rows = [
        (
            f"{load['entries']:,}, `{load['method']}`, {load['order']} keys",
            f"{load['ratio']:.2f}",
            f"{load['growing']:.2f}",
            number(load["microseconds"]["ours"]),
            mib(load["file, bytes"]["ours"]),
            mib(load["file, bytes"]["by hand"]),
        )
        for load in part["loads"]
    ]
    head = ("entries", "times by hand", "times preset", "µs", "MiB", "MiB by hand")
    return f"{table(head, rows)}\n\n{memory(part['memory'])}"


def memory(found: dict[str, Any]) -> str:
    if "not measured" in found:
        return f"Memory was not measured: {found['not measured']}."
    return (
        f"Loading {found['entries']:,} entries from a generator raises the private "
        f"memory of the process by up to {mib(found['put_many'])} MiB with "
        f"`put_many`, {mib(found['update'])} MiB with `update`, and "
        f"{mib(found['by hand'])} MiB with a `put_many` by hand, which sorts, too."
    )


def concurrency(part: dict[str, Any]) -> str:
    rates = [
        (
            f"{row['workers']} {row['kind'] if row['workers'] > 1 else row['one']}",
            f"{row['ours']:,.0f}",
            f"{row['by hand']:,.0f}",
        )
        for row in part["reads per second"]
    ]
    kinds = ("50 %", "99 %", "99.9 %", "maximum")
    tails = [
        (
            f"{row['meanwhile']}{'' if side == 'ours' else ', by hand'}",
            *(number(row[side][kind]) for kind in kinds),
        )
        for row in part["microseconds"]
        for side in ("ours", "by hand")
        if side in row
    ]
    return (
        f"{table(('', 'reads per second', 'by hand'), rates)}\n\n"
        f"{table(('while another thread …, a read takes µs', *kinds), tails)}"
    )


def rivals(
    part: dict[str, Any], durability: str, reads: bool, medians: bool = False
) -> str:
    """Return the microseconds of each store for each workload."""
    found = part.get("workloads", {}).get(durability, {})
    found = {name: row for name, row in found.items() if (name in READS) == reads}
    names = [
        name for name in part["stores"] if any(name in row for row in found.values())
    ]

    def cell(result: dict[str, Any] | None) -> str:
        if result is None:
            return "-"
        text = number(result["minimum"])
        if medians:
            text += f" ({number(result['median'])})"
        return text

    rows = []
    for workload, row in found.items():
        best = min((row[name]["minimum"] for name in names if name in row), default=0)
        cells = [
            f"**{cell(row[name])}**"
            if name in row and row[name]["minimum"] == best
            else cell(row.get(name))
            for name in names
        ]
        rows.append((workload, *cells))
    return table(["µs", *names], rows) + absent(part, "workloads", durability)


def absent(part: dict[str, Any], suite: str, durability: str) -> str:
    """Name the stores that the table lacks."""
    stores = part["stores"]
    cant = [name for name, facts in stores.items() if facts[durability] is None]
    cant = [name for name in cant if name != UNSYNCED]
    gone = [name for name, facts in stores.items() if facts["version"] is None]
    lines = [f"Can't be made durable: {', '.join(cant)}."] if cant else []
    lines += [f"Not measured: {name} (not installed)." for name in gone]
    lines += [
        f"Not measured: {skipped['store']}, {skipped['workload']} ({skipped['why']})."
        for skipped in part["skipped"]
        if (skipped["suite"], skipped["durability"]) == (suite, durability)
    ]
    return "\n\n" + " ".join(lines) if lines else ""


def settings(part: dict[str, Any]) -> str:
    """Return the durability of each store, in both tables."""
    head = ("store", "on disk when a write returns", "may be lost", "what may be lost")
    rows = [
        (
            f"{name} {facts['version'] or '(not installed)'}",
            facts["durable"] or ("as above" if name == UNSYNCED else "can't"),
            facts["buffered"],
            facts["lost"],
        )
        for name, facts in part["stores"].items()
    ]
    return table(head, rows, "---")


def published(part: dict[str, Any], durability: str) -> str:
    found = part.get("published", {}).get(durability, {})
    names = [
        name for name in part["stores"] if any(name in row for row in found.values())
    ]
    rows = [
        (
            workload,
            *(
                number(row[name]["minimum"]) + "*" * row[name]["stopped"]
                if name in row
                else "-"
                for name in names
            ),
        )
        for workload, row in found.items()
    ]
    note = "\n\n\\* stopped before its end" if "*" in str(rows) else ""
    return table(["µs", *names], rows) + note + absent(part, "published", durability)


def sections(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each table."""
    if "hot" in results:
        yield "hot", hot(results["hot"])
    if "growth" in results:
        yield "growth", growth(results["growth"])
    if "concurrency" in results:
        yield "concurrency", concurrency(results["concurrency"])
    if "rivals" in results:
        part = results["rivals"]
        yield "headline", headline(part)
        yield "rivals-settings", settings(part)
        for durability in (DURABLE, BUFFERED):
            yield f"rivals-{durability}", rivals(part, durability, reads=False)
            full = rivals(part, durability, reads=False, medians=True)
            yield f"rivals-{durability}-full", full
            yield f"published-{durability}", published(part, durability)
        yield "rivals-reads", rivals(part, BUFFERED, reads=True)
        yield "rivals-reads-full", rivals(part, BUFFERED, reads=True, medians=True)


def rewritten(page: str, results: dict[str, Any]) -> str:
    """Return the page with its tables made from the results."""
    made = {"about": about(results), **dict(sections(results))}

    def replace(match: re.Match[str]) -> str:
        text = made.get(match[1], "Not measured.")
        return f"<!-- benchmark: {match[1]} -->\n{text}\n<!-- end -->"

    region = re.compile(r"<!-- benchmark: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
    return region.sub(replace, page)


def ratios(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Yield the groups of the chart: for each workload, the stores relative to ours."""
    for title, durability, reads in (
        ("writes, on disk when they return", DURABLE, False),
        ("writes that may be lost", BUFFERED, False),
        ("reads", BUFFERED, True),
    ):
        found = part["workloads"][durability]
        yield (
            title,
            {
                workload: {
                    name: result["minimum"] / row[OURS]["minimum"]
                    for name, result in row.items()
                }
                for workload, row in found.items()
                if (workload in READS) == reads and OURS in row
            },
        )


def draw(part: dict[str, Any]) -> None:
    """Draw the rivals' times relative to this library's."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    mpl.rcParams |= {
        "svg.hashsalt": OURS,  # the same results make the same file
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "font.size": 9,
    }
    groups = list(ratios(part))
    sizes = [len(rows) for _, rows in groups]
    figure, panels = plt.subplots(
        len(groups),
        sharex=True,
        figsize=(8.5, 1.6 + 0.27 * sum(sizes)),
        height_ratios=[size + 0.5 for size in sizes],
        layout="constrained",
    )
    rivals = [name for name in part["stores"] if name != OURS]
    looks = dict(zip(rivals, zip(COLOURS, MARKERS, strict=True), strict=True))
    shown = {}
    for panel, (title, rows) in zip(panels, groups, strict=True):
        for place, row in enumerate(rows.values()):
            panel.axhline(place, color=TEXT, linewidth=0.4, alpha=0.4, zorder=0)
            for name in filter(row.__contains__, rivals):
                colour, marker = looks[name]
                [shown[name]] = panel.plot(
                    row[name],
                    place,
                    marker,
                    color=colour,
                    markersize=7 if marker == "*" else 5.5,
                    linestyle="none",
                )
        panel.axvline(1, color=TEXT, linewidth=1.5)
        panel.set_xscale("log")
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_ylim(len(rows) - 0.4, -0.6)
        panel.tick_params(axis="y", length=0)
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    panels[-1].set_xlabel(f"times the time of {OURS}: to the right is slower")
    names = [name for name in rivals if name in shown]
    figure.legend(
        [shown[name] for name in names],
        names,
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(CHART, transparent=True, metadata={"Date": None})


def main() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8"), results), "utf-8")
    try:
        draw(results["rivals"])
    except ImportError as error:
        sys.exit(f"The tables are made; the chart is not: {error}")


if __name__ == "__main__":
    main()
