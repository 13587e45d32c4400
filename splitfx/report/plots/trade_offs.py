"""Trade-offs as pictures: memory against what it costs.

`plot_halo` draws what the approximate split does to the output (as Fig. 4 of its paper does for accuracy),
`plot_pareto` the ways to run a tiled stage by peak and time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitfx.errors import PlanError
from splitfx.ground.table import seconds, shorten, size
from splitfx.report.plots.picture import PALETTE, picture, plain_axes

if TYPE_CHECKING:
    from splitfx.report.compare_halo import HaloRow
    from splitfx.tiling.plan.planner import Point

SIZE = (8.5, 4.8)  # inches
LABELS = 12  # points of a series that are named


@dataclass(frozen=True)
class Mark:
    """One point of a chart, with what is written beside it."""

    x: float
    y: float
    label: str = ""


def plot_halo(rows: Sequence[HaloRow], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Memory saved against the change of the output: the approximate split, the exact halo, a smaller image.

    ``path``: a png, svg or pdf file. Raises `PlanError` without rows, else as `picture`.
    """
    if not rows:
        raise PlanError("there are no rows to draw: compare_halo gives them")

    def mark(row: HaloRow, count: int, off: float, label: str) -> Mark:
        return Mark(100 * (1 - count / row.unsplit_bytes), 100 * off, label)

    zero = [mark(r, r.peak_bytes, r.difference, r.layer) for r in rows]
    exact = [
        mark(r, r.exact_bytes, r.exact_difference, "")
        for r in rows
        if r.exact_bytes is not None and r.exact_difference is not None
    ]
    small = {
        mark(r, r.resized_bytes, r.resized_difference, "×".join(map(str, r.resized)))
        for r in rows
        if r.resized is not None and r.resized_bytes is not None and r.resized_difference is not None
    }
    with picture(path, SIZE, overwrite) as figure:
        axes = figure.subplots()
        _series(axes, zero, "zeros between tiles, by the layer where they are combined", "orange", joined=False)
        _series(axes, sorted(small, key=lambda m: m.x), "a smaller image", "blue")
        _series(axes, exact, "exact halo, in strips", "green", joined=False)
        axes.set(xlabel="peak memory saved (%)", ylabel="change of the output (%)")
        _finish(axes, "Splitting the image: memory saved and output changed")


def plot_pareto(points: Sequence[Point], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Ways to run a tiled stage by peak and estimated time; the best of them joined, the untiled one marked.

    ``path``: a png, svg or pdf file. Raises `PlanError` without points, else as `picture`.
    """
    from splitfx.tiling.plan.planner import front

    if not points:
        raise PlanError("there are no points to draw: the planner gives them")
    tiled = [p for p in points if p.schedule is not None]
    best = front(tiled)
    with picture(path, SIZE, overwrite) as figure:
        axes = figure.subplots()
        rest = [Mark(p.peak_bytes, p.seconds) for p in tiled if p not in best]
        _series(axes, rest, "other schedules", "soft", joined=False)
        _series(axes, [Mark(p.peak_bytes, p.seconds, _how(p)) for p in best], "best schedules", "blue")
        whole = [Mark(p.peak_bytes, p.seconds, "untiled") for p in points if p.schedule is None]
        _series(axes, whole, "untiled", "orange", joined=False)
        axes.set(xlabel="peak memory", ylabel="estimated time", xscale="log", yscale="log")
        _log_words(axes.xaxis, 2, size)
        _log_words(axes.yaxis, 10, seconds)
        _finish(axes, "Peak memory and time")


def _how(point: Point) -> str:
    schedule = point.schedule
    assert schedule is not None
    how = f"strips of {schedule.rows} rows" if schedule.rows else "whole tiles"
    return how + (f", {schedule.tiles[0]} x {schedule.tiles[1]} tiles" if schedule.tiles != (1, 1) else "")


def _series(axes: Any, marks: Sequence[Mark], name: str, colour: str, joined: bool = True) -> None:
    if not marks:
        return
    look = {"color": PALETTE[colour], "markersize": 6, "label": name, "gid": name}
    axes.plot([m.x for m in marks], [m.y for m in marks], "o-" if joined else "o", **look)
    step = -(-len(marks) // LABELS)  # of many, some are named
    for m in marks[::step]:
        place: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}
        axes.annotate(shorten(m.label, 26), (m.x, m.y), fontsize=8, color=PALETTE["ink"], **place)


def _log_words(axis: Any, base: int, words: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=base, subs=(1.0, 1.5) if base == 2 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(int(value) if base == 2 else value)))
    axis.set_minor_formatter(NullFormatter())


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, color=PALETTE["ink"], fontsize=12, loc="left")
    axes.grid(color=PALETTE["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.margins(0.08)
    axes.legend(frameon=False, fontsize=9)
    plain_axes(axes)
