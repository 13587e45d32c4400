"""Trade-offs as pictures: memory against what it costs, each an SVG file of its own without script or outside address.

`plot_halo` draws what the approximate split does to the output (as Fig. 4 of its paper does for accuracy),
`plot_pareto` the ways to run a tiled stage by peak and time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from splitfx.errors import PlanError
from splitfx.files import written_whole
from splitfx.ground.table import seconds, shorten, size
from splitfx.report.html.style import COLOURS

if TYPE_CHECKING:
    from splitfx.report.compare_halo import HaloRow
    from splitfx.tiling.plan.planner import Point

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 64, 58
_LETTER = 6.1  # width of a letter at 11 px, about
STYLE = """
.card{fill:var(--card);stroke:var(--line)}
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--soft)}
text.title{font-size:15px;font-weight:600;fill:var(--ink)}text.name{fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.line{fill:none;stroke-width:2}
.orange{stroke:var(--orange)}.blue{stroke:var(--blue)}.green{stroke:var(--green)}
.dot{stroke:var(--card);stroke-width:1.5}
.dot.orange{fill:var(--orange)}.dot.blue{fill:var(--blue)}.dot.green{fill:var(--green)}.dot.soft{fill:var(--soft)}
.dot.soft{opacity:.45}
"""


@dataclass(frozen=True)
class Mark:
    """One point of a chart. ``label`` is written beside it where there is room, ``detail`` shows on hovering."""

    x: float
    y: float
    label: str
    detail: str


@dataclass(frozen=True)
class Series:
    """Points with one colour of `STYLE`, joined by a line where ``joined``."""

    name: str
    colour: str
    marks: list[Mark]
    joined: bool = True


def plot_halo(rows: Sequence[HaloRow], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Memory saved against the change of the output: the approximate split, the exact halo, a smaller image."""
    if not rows:
        raise PlanError("there are no rows to draw: compare_halo gives them")
    saved = lambda count, row: 100 * (1 - count / row.unsplit_bytes)  # noqa: E731

    def mark(row: HaloRow, count: int, off: float, label: str, what: str) -> Mark:
        detail = f"{what}: peak {size(count)} of {size(row.unsplit_bytes)}, output off by {100 * off:.2g} %"
        return Mark(saved(count, row), 100 * off, label, detail)

    zero = [mark(r, r.peak_bytes, r.difference, r.layer, f"combined after {r.layer}") for r in rows]
    exact = [
        mark(r, r.exact_bytes, r.exact_difference, "", f"exact halo up to {r.layer}")
        for r in rows
        if r.exact_bytes is not None and r.exact_difference is not None
    ]
    small = [
        mark(r, r.resized_bytes, r.resized_difference, "×".join(map(str, r.resized)), "a smaller image")
        for r in rows
        if r.resized is not None and r.resized_bytes is not None and r.resized_difference is not None
    ]
    chart = [
        Series("zeros between tiles, by the layer where they are combined", "orange", zero, joined=False),
        Series("a smaller image", "blue", sorted(set(small), key=lambda m: m.x)),
        Series("exact halo, in strips", "green", sorted(exact, key=lambda m: m.x), joined=False),
    ]
    title = "Splitting the image: memory saved and output changed"
    text = _chart(title, "peak memory saved (%)", "change of the output (%)", chart, _plain, _plain)
    _write(text, path, overwrite)


def plot_pareto(points: Sequence[Point], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Ways to run a tiled stage by peak and estimated time; the best of them joined, the untiled one marked."""
    from splitfx.tiling.plan.planner import front

    if not points:
        raise PlanError("there are no points to draw: the planner gives them")

    def mark(point: Point) -> Mark:
        schedule = point.schedule
        if schedule is None:
            return Mark(point.peak_bytes, point.seconds, "untiled", f"untiled: {size(point.peak_bytes)}")
        how = f"{schedule.rows} rows a step" if schedule.rows else "whole tiles"
        grid = f", {schedule.tiles[0]} x {schedule.tiles[1]} tiles" if schedule.tiles != (1, 1) else ""
        detail = f"{how}{grid}: {size(point.peak_bytes)}, {seconds(point.seconds)}; peak at {point.layer}"
        return Mark(point.peak_bytes, point.seconds, how + grid, detail)

    tiled = [p for p in points if p.schedule is not None]
    best = front(tiled)
    rest = [Mark(m.x, m.y, "", m.detail) for m in (mark(p) for p in tiled if p not in best)]
    chart = [
        Series("other schedules", "soft", rest, joined=False),
        Series("best schedules", "blue", [mark(p) for p in best]),
        Series("untiled", "orange", [mark(p) for p in points if p.schedule is None], joined=False),
    ]
    text = _chart("Peak memory and time", "peak memory", "estimated time", chart, _bytes, _time, log=True)
    _write(text, path, overwrite)


def _write(text: str, path: str | os.PathLike[str], overwrite: bool) -> None:
    with written_whole(path, overwrite=overwrite) as scratch:
        scratch.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- scales

Words = Callable[[float], str]


def _plain(value: float) -> str:
    return f"{value:g}"


def _bytes(value: float) -> str:
    return size(value).replace(".00", "")


def _time(value: float) -> str:
    return seconds(value)


@dataclass(frozen=True)
class Scale:
    """Values to pixels, with round ticks; ``log`` for values over several orders."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        bend = math.log if self.log else lambda v: v
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.stop - self.start)


def _scale(values: list[float], start: float, stop: float, log: bool, base: int) -> Scale:
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.15, high * 1.15
        ticks = _log_ticks(low, high, base)
        return Scale(low, high, start, stop, True, ticks)
    low, high = min(0.0, low), max(high, 1e-12)
    step = _round_step((high - low) / 5)
    count = math.ceil(high * 1.04 / step)
    first = math.floor(low / step)
    return Scale(first * step, count * step, start, stop, False, tuple(i * step for i in range(first, count + 1)))


def _round_step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)


def _log_ticks(low: float, high: float, base: int) -> tuple[float, ...]:
    """Powers of the base; in between, 2 and 5 times a power of ten where there would be fewer than three."""
    steps = [(1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)] if base == 10 else [(1.0,), (1.0, 1.5)]
    for parts in steps:
        exponents = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
        found = tuple(p * base**e for e in exponents for p in parts if low <= p * base**e <= high)
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 7)]


# ---------------------------------------------------------------- drawing


def _chart(
    title: str, x_name: str, y_name: str, chart: list[Series], x_words: Words, y_words: Words, log: bool = False
) -> str:
    """The file: title, key, axes with round ticks, and the series in the order given."""
    chart = [s for s in chart if s.marks]
    xs, ys = ([getattr(m, axis) for s in chart for m in s.marks] for axis in "xy")
    x = _scale(xs, LEFT, WIDTH - RIGHT, log, base=2)
    y = _scale(ys, HEIGHT - BOTTOM, TOP, log, base=10)
    lines = [*_axes(x, y, x_name, y_name, x_words, y_words), *_key(chart)]
    for series in chart:
        lines += _series(series, x, y)
    lines += _labels(chart, x, y)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"><style>{COLOURS}{STYLE}</style>'
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>'
        f'<text class="title" x="20" y="27">{escape(title)}</text>{"".join(lines)}</svg>\n'
    )


def _axes(x: Scale, y: Scale, x_name: str, y_name: str, x_words: Words, y_words: Words) -> list[str]:
    lines = []
    for tick in x.ticks:
        at = x(tick)
        lines.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        lines.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(x_words(tick))}</text>'
        )
    for tick in y.ticks:
        at = y(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(y_words(tick))}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    lines.append(f'<text x="{middle:.0f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_name)}</text>')
    half = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(f'<text transform="translate(20 {half:.0f}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>')
    return lines


def _key(chart: list[Series]) -> list[str]:
    lines, at = [], 24.0
    for series in chart:
        lines.append(f'<circle class="dot {series.colour}" cx="{at:.0f}" cy="45" r="5"/>')
        lines.append(f'<text x="{at + 10:.0f}" y="49">{escape(series.name)}</text>')
        at += 32 + 0.94 * _LETTER * len(series.name)
    return lines


def _series(series: Series, x: Scale, y: Scale) -> list[str]:
    lines = []
    if series.joined and len(series.marks) > 1:
        points = " ".join(f"{x(m.x):.1f},{y(m.y):.1f}" for m in series.marks)
        lines.append(f'<polyline class="line {series.colour}" points="{points}"/>')
    for m in series.marks:
        at = f'cx="{x(m.x):.1f}" cy="{y(m.y):.1f}"'
        lines.append(f'<circle class="dot {series.colour}" {at} r="5"><title>{escape(m.detail)}</title></circle>')
    return lines


def _labels(chart: list[Series], x: Scale, y: Scale) -> list[str]:
    """Names beside the points, as far as they cover neither a point nor another name."""
    marks = [m for s in chart for m in s.marks]
    taken = [(x(m.x) - 6, y(m.y) - 6, x(m.x) + 6, y(m.y) + 6) for m in marks]
    taken += [(px - 1, py - 1, px + 1, py + 1) for s in chart if s.joined for px, py in _along(s.marks, x, y)]
    lines = []
    for m in marks:
        if not m.label:
            continue
        name = shorten(m.label, 26)
        for left, top, anchor in _around(x(m.x), y(m.y), _LETTER * len(name)):
            box = (left, top, left + _LETTER * len(name), top + 12)
            inside = box[0] > LEFT and box[2] < WIDTH - 4 and box[1] > TOP - 8 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_cover(box, other) for other in taken):
                taken.append(box)
                at = left if anchor == "start" else left + _LETTER * len(name)
                lines.append(
                    f'<text class="name" x="{at:.1f}" y="{top + 10:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
                )
                break
    return lines


def _along(marks: list[Mark], x: Scale, y: Scale) -> Iterator[tuple[float, float]]:
    """Points of a series' line, a few pixels apart."""
    for a, b in pairwise(marks):
        (x0, y0), (x1, y1) = (x(a.x), y(a.y)), (x(b.x), y(b.y))
        steps = 1 + int(math.dist((x0, y0), (x1, y1)) / 4)
        for i in range(steps):
            yield x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps


def _around(x: float, y: float, width: float) -> list[tuple[float, float, str]]:
    """Corners of a label beside a point, the best place first."""
    right, left = (x + 9, "start"), (x - 9 - width, "end")
    return [(at, y + shift, anchor) for shift in (-6, -17, 6, -28, 16) for at, anchor in (right, left)]


def _cover(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
