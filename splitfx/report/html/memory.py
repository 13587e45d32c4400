"""Memory over time as a chart with axes: the graph as it is, the graph before the passes, and who is alive at the peak.

Time is the operations in order; a tiled stage takes as much of it as it has operations, and its own memory is drawn
inside. Text of an SVG file, without script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from splitfx.compiler.sketch import Sketch
from splitfx.ground.table import dims, shorten, size
from splitfx.report.html.stages import StageDetail

WIDTH, HIGH, LEFT, TOP = 1080, 250, 86, 26
SHOWN = 12  # values alive at the peak that are listed


@dataclass(frozen=True)
class _Bar:
    start: float
    width: float
    live: int
    told: str


def memory_html(now: Sequence[Sketch], stages: Mapping[str, StageDetail], before: Sequence[Sketch]) -> str:
    """The chart and the list of what is alive at the peak."""
    lines = {"after": _bars(now, stages)}
    if before:
        lines = {"before": _bars(before, {}), **lines}
    return f'<div class="wide">{_chart(lines)}</div>{_alive(now, stages)}'


def _bars(nodes: Sequence[Sketch], stages: Mapping[str, StageDetail]) -> list[_Bar]:
    weights = [len(stages[one.layer].sketches) if one.layer in stages else 1 for one in nodes]
    whole, at, bars = sum(weights) or 1, 0, list[_Bar]()
    for one, weight in zip(nodes, weights, strict=True):
        start, width = at / whole, weight / whole
        told = f"{one.layer} ({one.op})"
        if one.layer in stages and (live := stages[one.layer].live):
            outside = one.live_bytes - stages[one.layer].peak_bytes  # what the stage's callers hold
            step = width / len(live)
            bars += [
                _Bar(start + i * step, step, max(0, outside) + each, f"{runs}, inside {one.layer}")
                for i, (each, runs) in enumerate(live)
            ]
        else:
            bars.append(_Bar(start, width, one.live_bytes, told))
        at += weight
    return bars


def _chart(lines: Mapping[str, Sequence[_Bar]]) -> str:
    most = max((bar.live for bars in lines.values() for bar in bars), default=1) or 1
    ticks = _ticks(most)
    height = lambda live: TOP + HIGH * (1 - live / ticks[-1])  # noqa: E731
    drawn = [
        f'<line class="rule" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{height(t):.1f}" y2="{height(t):.1f}"/>'
        f'<text class="end" x="{LEFT - 8}" y="{height(t) + 4:.1f}">{size(t).replace(".00", "") if t else "0"}</text>'
        for t in ticks
    ]
    for name, bars in lines.items():
        points = " ".join(
            f"{LEFT + bar.start * WIDTH:.1f},{height(bar.live):.1f} "
            f"{LEFT + (bar.start + bar.width) * WIDTH:.1f},{height(bar.live):.1f}"
            for bar in bars
        )
        corner = f"{LEFT},{height(0):.1f}"
        drawn.append(f'<polygon class="{name}" points="{corner} {points} {LEFT + WIDTH},{height(0):.1f}"/>')
    drawn += _peaks(lines, height)
    drawn += [_hover(bar, height(0)) for bar in lines["after"]]
    foot = height(0)
    drawn.append(
        f'<text x="{LEFT + WIDTH / 2}" y="{foot + 22}">operations in the order they run; without the parameters</text>'
    )
    key = "".join(
        f'<rect class="{name}" x="{LEFT + 150 * i}" y="2" width="12" height="10" rx="2"/>'
        f'<text class="start" x="{LEFT + 150 * i + 18}" y="11">{name} the passes</text>'
        for i, name in enumerate(lines if len(lines) > 1 else ())
    )
    return (
        f'<svg class="memory" role="img" aria-label="memory over time" viewBox="0 0 {LEFT + WIDTH + 12} '
        f'{foot + 30:.0f}">{key}{"".join(drawn)}</svg>'
    )


def _peaks(lines: Mapping[str, Sequence[_Bar]], height: Callable[[float], float]) -> list[str]:
    tops = {name: max(bars, key=lambda bar: bar.live) for name, bars in lines.items()}
    if len(tops) == 1 or len({top.live for top in tops.values()}) == 1:
        words = "peak" if len(tops) == 1 else "peak before and after"
        return [_peak("after", words, tops["after"], height, 0)]
    near = abs(height(tops["before"].live) - height(tops["after"].live)) < 16
    return [_peak(name, f"peak {name}", top, height, 20 * (near and name == "after")) for name, top in tops.items()]


def _peak(name: str, words: str, top: _Bar, height: Callable[[float], float], lower: float) -> str:
    x, y = LEFT + (top.start + top.width / 2) * WIDTH, height(top.live)
    far = top.start > 0.6
    return (
        f'<circle class="peak {name}" cx="{x:.1f}" cy="{y:.1f}" r="4"/><text class="mark" '
        f'x="{x + (-9 if far else 9):.1f}" y="{y - 6 + lower:.1f}" style="text-anchor:{"end" if far else "start"}">'
        f"{words} {size(top.live)}, {escape(shorten(top.told, 44))}</text>"
    )


def _hover(bar: _Bar, foot: float) -> str:
    return (
        f'<rect class="over" x="{LEFT + bar.start * WIDTH:.1f}" y="{TOP}" width="{max(bar.width * WIDTH, 0.5):.1f}" '
        f'height="{foot - TOP:.0f}"><title>{escape(bar.told)}: {size(bar.live)} alive</title></rect>'
    )


def _ticks(most: int) -> list[int]:
    """Four to six round numbers of bytes from 0 to above ``most``."""
    unit = 1024 ** min(3, int(math.log(max(most, 2), 1024)))
    rough = most / unit / 4
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [round(i * step * unit) for i in range(math.ceil(most * 1.02 / unit / step) + 1)]


def _alive(nodes: Sequence[Sketch], stages: Mapping[str, StageDetail]) -> str:
    """What is alive where memory peaks, the largest first; values of one layer that are alike are one line."""
    if not nodes:
        return ""
    top = max(range(len(nodes)), key=lambda i: nodes[i].live_bytes)
    running, stage = nodes[top], stages.get(nodes[top].layer)
    readers: dict[int, int] = {}
    for place, one in enumerate(nodes):
        for read in one.reads:
            readers[read] = place
    held = [
        (*_told(one), one.bytes)
        for place, one in enumerate(nodes[: top + 1])
        if readers.get(place, len(nodes)) >= top or one.op == "input" or place == top
        if stage is None or place < top
    ]
    held += (
        [(where, f"{what}, inside {stage.path}", "", count) for where, what, count in stage.at_peak] if stage else []
    )
    if (rest := running.live_bytes - sum(count for *_, count in held)) > 0:
        held.append((running.layer, f"{running.op}, while it runs", "", rest))
    alike: dict[tuple[str, str, str], list[int]] = {}
    for where, what, shape, count in held:
        alike.setdefault((where, what, shape), []).append(count)
    rows = sorted(((*told, counts) for told, counts in alike.items() if sum(counts)), key=lambda row: -sum(row[3]))
    body = "".join(
        f"<tr><td>{escape(where)}</td><td>{escape(what)}</td>"
        f"<td>{shape}{f' ({len(counts)} of them)' if len(counts) > 1 else ''}</td><td>{size(sum(counts))}</td></tr>"
        for where, what, shape, counts in rows[:SHOWN]
    )
    smaller = sum(sum(counts) for *_, counts in rows[SHOWN:])
    more = f"<p class=soft>and {len(rows) - SHOWN} smaller ones, {size(smaller)}</p>" if smaller else ""
    if rest < 0:
        more += f"<p class=soft>some share their storage: all of them together take {size(running.live_bytes)}</p>"
    where = f"{max(stage.live)[1]}, inside {stage.path}," if stage and stage.live else running.layer
    return (
        f"<h3>alive at the peak, while {escape(where)} runs</h3>"
        '<div class="wide alive"><table><thead><tr><th>value of</th><th>operation</th><th>shape</th>'
        f"<th>bytes</th></tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def _told(one: Sketch) -> tuple[str, str, str]:
    return one.layer, one.op, dims(one.shape)
