"""Boxes and memory as SVG text, for a page: no script and no outside address in it, every name escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from splitfx.ground.table import shorten, size
from splitfx.report.html.boxes import Box
from splitfx.report.html.style import COLOURS, GRAPH
from splitfx.report.profile import Row

WIDE, HIGH, GAP, ROWS = 190, 42, 10, 72
_NARROW = 84
_WIDEST = 1036  # of a row; wider ones scroll
_LETTER, _BOLD = 6.0, 6.9  # width of a letter at 11 px, about


def picture_svg(boxes: Sequence[Box]) -> str:
    """The graph as a file of its own, without links."""
    style = f'xmlns="http://www.w3.org/2000/svg"><style>{COLOURS}{GRAPH}</style>'
    return re.sub(r"</?a\b[^>]*>", "", graph_svg(boxes).replace(">", f" {style}", 1)) + "\n"


def graph_svg(boxes: Sequence[Box]) -> str:
    """The boxes row by row, branches side by side; a box links to its entry ``#box<number>``."""
    rows: dict[int, list[Box]] = {}
    for box in boxes:
        rows.setdefault(box.row, []).append(box)
    widths = {row: max(_NARROW, min(WIDE, (_WIDEST - GAP * len(line)) / len(line))) for row, line in rows.items()}
    width = max(len(line) * (widths[row] + GAP) for row, line in rows.items()) + 60
    place = _places(rows, widths, width)
    height = max(rows) * ROWS + HIGH + 10
    lines = [line for box in boxes for one in box.before for line in _edge(one, box, place, rows, widths)]
    cards = [_card(number, box, *place[id(box)], widths[box.row]) for number, box in enumerate(boxes)]
    return (
        f'<svg class="graph" role="img" aria-label="the graph" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}">{"".join(lines)}{"".join(cards)}</svg>'
    )


def _places(rows: dict[int, list[Box]], widths: dict[int, float], width: float) -> dict[int, tuple[float, float]]:
    """Top left corners by box; a row is centred and ordered by where its boxes' operands stand."""
    place: dict[int, tuple[float, float]] = {}
    for row in sorted(rows):
        line = rows[row]

        def wanted(box: Box, row: int = row) -> float:
            near = [one for one in box.before if one.row == row - 1] or box.before
            return sum(place[id(one)][0] for one in near) / len(near) if near else 0.0

        line.sort(key=lambda box: (box.branch is None, round(wanted(box)), box.branch or 0))
        line.sort(key=lambda box: round(wanted(box)))
        left = (width - len(line) * (widths[row] + GAP) + GAP) / 2
        for index, box in enumerate(line):
            place[id(box)] = (left + index * (widths[row] + GAP), row * ROWS + 4)
    return place


def _edge(
    first: Box,
    last: Box,
    place: dict[int, tuple[float, float]],
    rows: dict[int, list[Box]],
    widths: dict[int, float],
) -> list[str]:
    x1, x2 = place[id(first)][0] + widths[first.row] / 2, place[id(last)][0] + widths[last.row] / 2
    y1, y2 = place[id(first)][1] + HIGH, place[id(last)][1]
    if last.row - first.row == 1:
        middle = (y1 + y2) / 2
        return [
            f'<path class="edge" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"/>'
        ]
    between = range(first.row + 1, last.row)
    right = max(place[id(b)][0] + widths[r] for r in between for b in rows[r]) + 6 + 5 * min(len(between), 10)
    return [
        f'<path class="edge skip" d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + 22:.0f} {right:.0f} {y1 + 8:.0f} '
        f"{right:.0f} "
        f"{y1 + 34:.0f}L{right:.0f} {y2 - 34:.0f}C{right:.0f} {y2 - 8:.0f} {x2:.0f} {y2 - 22:.0f} "
        f'{x2:.0f} {y2:.0f}"/>'
    ]


def _card(number: int, box: Box, x: float, y: float, width: float) -> str:
    letters = int((width - 8) / _LETTER)
    branch = "" if box.branch is None else f" · {box.branch + 1}"
    name = shorten(box.name, int((width - 8) / _BOLD) - len(branch)) + branch
    label = box.label if box.cells == 1 else f"{' '.join(box.label.split()[:2])}, {box.cells} groups"
    inside = "".join(_divider(x + width * i / box.cells, y) for i in range(1, box.cells if box.cells <= 32 else 1))
    layers = f'<rect class="under" x="{x + 3:.1f}" y="{y + 3:.1f}" width="{width:.1f}" height="{HIGH}" rx="6"/>'
    return (
        f'<a href="#box{number}"><g class="box {box.kind}"><title>{escape(box.detail)}</title>'
        f"{layers if box.folded else ''}"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HIGH}" rx="6"/>{inside}'
        f'<text class="name" x="{x + width / 2:.1f}" y="{y + 18:.1f}">{escape(name)}</text>'
        f'<text x="{x + width / 2:.1f}" y="{y + 33:.1f}">'
        f"{escape(shorten(label, letters, middle=False))}</text></g></a>"
    )


def _divider(x: float, y: float) -> str:
    """Two short strokes, at the top and at the bottom, clear of the text."""
    return "".join(
        f'<line class="cell" x1="{x:.1f}" x2="{x:.1f}" y1="{a:.1f}" y2="{a + 6:.1f}"/>' for a in (y, y + HIGH - 6)
    )


def memory_svg(rows: Sequence[Row], peak: int, before: int | None) -> str:
    """Bytes alive over the operations, in order; ``before`` is the peak before the passes, a dashed line."""
    width, high, left, top = 980.0, 190.0, 8.0, 26.0
    most = max([peak, before or 0, 1]) * 1.04
    step = width / max(len(rows), 1)
    height = lambda count: top + high * (1 - count / most)  # noqa: E731
    points = [f"{left},{top + high}"]
    for index, row in enumerate(rows):
        points += [
            f"{left + index * step:.1f},{height(row.live_bytes):.1f}",
            f"{left + (index + 1) * step:.1f},{height(row.live_bytes):.1f}",
        ]
    points.append(f"{left + width},{top + high}")
    bars = "".join(
        f'<rect class="hit" x="{left + i * step:.1f}" y="{top}" width="{max(step, 0.5):.1f}" height="{high}">'
        f"<title>{escape(row.layer)} ({escape(row.op)}): {size(row.live_bytes)} alive</title></rect>"
        for i, row in enumerate(rows)
    )
    at = next((i for i, row in enumerate(rows) if row.live_bytes == peak), 0)
    x = left + (at + 0.5) * step
    far = x > width * 0.6
    named = escape(shorten(rows[at].layer, 44)) if rows else ""
    mark = (
        f'<circle class="peak" cx="{x:.1f}" cy="{height(peak):.1f}" r="4"/><text class="mark" '
        f'x="{x + (-8 if far else 8):.1f}" '
        f'y="{max(height(peak) - 7, 12):.1f}" style="text-anchor:{"end" if far else "start"}">peak '
        f"{size(peak)} in {named}</text>"
    )
    dashed = (
        ""
        if before is None or before == peak
        else (
            f'<line class="was" x1="{left}" x2="{left + width}" y1="{height(before):.1f}" '
            f'y2="{height(before):.1f}"/>'
            f'<text class="mark was" x="{left + (4 if far else width - 4):.1f}" '
            f'y="{height(before) + 14:.1f}" '
            f'style="text-anchor:{"start" if far else "end"}">peak before: {size(before)}</text>'
        )
    )
    return (
        f'<svg class="memory" role="img" aria-label="memory over time" viewBox="0 0 {width + 16:.0f} '
        f'{top + high + 6:.0f}">'
        f'<polygon class="live" points="{" ".join(points)}"/>{dashed}{bars}{mark}</svg>'
    )
