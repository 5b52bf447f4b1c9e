"""Draw the way of a put, from the buffer to the file, and what reads it where.

    python tests/benchmarks/draw_path.py

Needs matplotlib.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).with_name("path.svg")
GREY = "#7f7f7f"  # can be read on white and on black
BUFFER, FILE = "#d55e00", "#2f81f7"

Point = tuple[float, float]


def box(axes: Any, corner: Point, width: float, height: float, colour: str) -> None:
    shape = FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12")
    shape.set(facecolor="none", edgecolor=colour, linewidth=1.5)
    axes.add_patch(shape)


def arrow(axes: Any, start: Point, end: Point, colour: str) -> None:
    look = {"arrowstyle": "->", "color": colour, "linewidth": 1.5}
    axes.annotate("", end, start, arrowprops={**look, "shrinkA": 2, "shrinkB": 2})


def draw() -> None:
    mpl.rcParams |= {"svg.hashsalt": "path", "font.size": 9}
    figure = Figure(figsize=(8.5, 3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 8.5), ylim=(0, 3))
    axes.set_axis_off()
    box(axes, (0.1, 0.65), 4.6, 2.25, GREY)
    box(axes, (2.5, 1.3), 1.9, 0.9, BUFFER)
    box(axes, (6.0, 1.3), 1.2, 0.9, FILE)
    for x, y, text, colour, weight in (
        (0.9, 2.7, "this process", GREY, "bold"),
        (0.9, 1.75, "all its\nthreads", GREY, "normal"),
        (3.45, 1.75, "buffer\nin memory", BUFFER, "bold"),
        (6.6, 1.75, "file\non disk", FILE, "bold"),
        (7.97, 1.75, "all other\nprocesses", GREY, "normal"),
        (1.9, 2.1, "put", BUFFER, "normal"),
        (1.9, 1.4, "get", GREY, "normal"),
        (5.35, 1.92, "flush: one", FILE, "normal"),
        (5.35, 1.58, "transaction", FILE, "normal"),
        (5.35, 1.1, "get", GREY, "normal"),
        (3.45, 0.4, "lost if the process is killed:", BUFFER, "normal"),
        (3.45, 0.18, "usually the last second (flush_interval)", BUFFER, "normal"),
        (6.9, 0.4, "stays, if a process is killed", FILE, "normal"),
        (6.9, 0.18, "and if the power fails", FILE, "normal"),
    ):
        axes.text(x, y, text, color=colour, weight=weight, ha="center", va="center")
    arrow(axes, (1.3, 1.95), (2.5, 1.95), BUFFER)
    arrow(axes, (2.5, 1.55), (1.3, 1.55), GREY)
    arrow(axes, (4.4, 1.75), (6.0, 1.75), FILE)
    arrow(axes, (7.2, 1.75), (7.52, 1.75), GREY)
    axes.plot([6.6, 6.6, 0.9], [1.28, 0.95, 0.95], color=GREY, linewidth=1.5)
    arrow(axes, (0.9, 0.95), (0.9, 1.5), GREY)
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw()
