"""One page about a graph: what was done to it, drawn, with its memory over time and its layers.

The page stands alone: no outside address, style and script inside, light and dark, readable on a phone.
Everything that comes from the user's model (class, layers, notes, plan) is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from torch import fx

from splitfx.compiler.pipeline import Figures, Step, figures
from splitfx.errors import SplitfxError
from splitfx.files import check_target, written_whole
from splitfx.ground.table import dims, number, seconds, size
from splitfx.ir.graph import info
from splitfx.ir.notes import Note
from splitfx.report.explanation import by_kind, promise, ratio, title
from splitfx.report.html.boxes import Box, boxes
from splitfx.report.html.drawing import graph_svg, memory_svg, picture_svg
from splitfx.report.html.splitnet import splitnet_html
from splitfx.report.html.style import CSS, JS
from splitfx.report.profile import Profile, profile


def inspect_html(split: fx.GraphModule, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a page about ``split``, the result of `transform`, `trace` or `load`, and return its path.

    It shows the model, the plan, parameters, MACs and peak memory before and after, every note, the graph
    with its branches side by side (large graphs by module), memory over time and a sortable table of layers;
    figures are those of the traced input. Raises `UnsupportedError` for a model that splitfx did not make,
    `SplitfxError` when the file exists or cannot be written.
    """
    check_target(path, overwrite=overwrite, error=SplitfxError)
    page = inspect_text(split)
    with written_whole(path, overwrite=overwrite) as scratch:
        scratch.write_text(page, encoding="utf-8", newline="\n")
    return Path(path)


def inspect_svg(split: fx.GraphModule, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the drawing of the page alone, as an SVG file; errors as for `inspect_html`."""
    check_target(path, overwrite=overwrite, error=SplitfxError)
    with written_whole(path, overwrite=overwrite) as scratch:
        scratch.write_text(picture_svg(boxes(split)), encoding="utf-8", newline="\n")
    return Path(path)


def inspect_text(split: fx.GraphModule) -> str:
    """The page as text."""
    known, counted = info(split), profile(split)
    steps: list[Step] = known.steps
    now = figures(split)
    before = steps[0].before if steps else None
    drawn = boxes(split)
    name = escape(known.model_class)
    was = before.peak_bytes if before else None
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="soft">{_about(counted, known.front_end, len(steps))}</p>',
        _tiles(before, now, counted),
        *_plan(known.plan),
        *(part for position, step in enumerate(steps, 1) for part in _step(position, step)),
        *splitnet_html(split),
        *_traced(known.notes),
        "<h2>Graph</h2>",
        _key(),
        f'<div class="wide middle">{graph_svg(drawn)}</div>',
        *_contents(drawn, counted),
        "<h2>Memory over time</h2>",
        '<p class="soft">Bytes alive while each operation runs, inputs included, parameters apart.</p>',
        f'<div class="wide">{memory_svg(counted.rows, counted.peak_bytes, was)}</div>',
        "<h2>Layers</h2>",
        _layers(counted),
        *_uncounted(counted),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name} · splitfx</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head>'
        f"\n<body>\n" + "\n".join(parts) + f"\n<script>{JS}</script>\n</body></html>\n"
    )


def _about(counted: Profile, front_end: str, passes: int) -> str:
    split = f"split by {passes} pass{'es' * (passes > 1)}" if passes else "no pass has run"
    return escape(f"on {', '.join(counted.inputs)} · traced with {front_end} · {split}")


def _tiles(before: Figures | None, now: Figures, counted: Profile) -> str:
    made = [
        _tile("parameters", number(now.params), number, before and before.params, now.params),
        _tile("MACs", number(now.macs), number, before and before.macs, now.macs),
        _tile("peak memory", size(now.peak_bytes), size, before and before.peak_bytes, now.peak_bytes),
        f'<div class="tile"><small>operations</small><b>{len(counted.rows)}</b><small>in the graph</small></div>',
    ]
    return f'<div class="tiles">{"".join(made)}</div>'


def _tile(name: str, value: str, words: object, before: int | None, now: int) -> str:
    assert callable(words)
    change = "" if before is None else f"was {words(before)} "
    if before is not None:
        up = ' class="up"' if now > before else ""
        change += f"<em{up}>{escape(ratio(before, now))}</em>"
    return f'<div class="tile"><small>{name}</small><b>{value}</b><small>{change}</small></div>'


def _plan(plan: Any) -> list[str]:
    if plan is None:
        return []
    return ["<h2>Plan</h2>", f'<div class="wide"><pre>{escape(plan.to_toml().strip())}</pre></div>']


def _step(position: int, step: Step) -> Iterable[str]:
    yield f"<h2>{position}. {escape(title(step))}</h2>"
    yield f'<p class="soft">{escape(promise(step))} · {seconds(step.seconds)}</p>'
    rows = [
        ("parameters", step.before.params, step.after.params, number),
        ("MACs", step.before.macs, step.after.macs, number),
        ("peak memory", step.before.peak_bytes, step.after.peak_bytes, size),
    ]
    if step.changed:
        body = "".join(
            f"<tr><td>{name}</td><td>{words(was)}</td><td>{words(now)}</td><td>{escape(ratio(was, now))}</td></tr>"
            for name, was, now, words in rows
        )
        yield (
            '<div class="wide figures"><table class="figures"><thead><tr><th></th><th>before</th><th>'
            "after</th>"
            f"<th>change</th></tr></thead><tbody>{body}</tbody></table></div>"
        )
    yield from _notes(step.notes)


def _notes(notes: tuple[Note, ...]) -> Iterable[str]:
    for heading, found in by_kind(notes):
        body = "".join(f"<tr><td>{escape(where)}</td><td>{escape(what)}</td></tr>" for where, what in found)
        yield f'<h3>{heading}</h3><table class="notes"><tbody>{body}</tbody></table>'


def _traced(notes: tuple[Note, ...]) -> list[str]:
    return ["<h2>Trace</h2>", *_notes(notes)] if notes else []


def _key() -> str:
    return (
        '<p class="key"><span><i class="i-b"></i>branch or grouped conv</span><span><i class="i-f"></i>'
        "fusion</span>"
        '<span><i class="i-l"></i>undivided</span><span>a box with a shadow holds several layers; click a '
        "box for "
        "its operations</span></p>"
    )


def _contents(drawn: list[Box], counted: Profile) -> Iterable[str]:
    rows = {row.name: row for row in counted.rows}
    entries = []
    for index, box in enumerate(drawn):
        inside = [rows[n.name] for n in box.nodes if n.name in rows]
        body = "".join(
            f"<tr><td>{escape(r.layer)}</td><td>{escape(r.op)}</td><td>{dims(r.shape)}</td>"
            f"<td>{number(r.params)}</td><td>{number(r.macs)}</td></tr>"
            for r in inside
        )
        entries.append(
            f'<details id="box{index}"><summary>{escape(box.detail.partition(":")[0])} '
            f'<small>{escape(box.label)}</small></summary><div class="wide"><table><thead><tr><th>layer</th>'
            f"<th>operation</th><th>output</th><th>parameters</th><th>MACs</th></tr></thead><tbody>{body}"
            "</tbody></table></div></details>"
        )
    yield f"<details><summary>What each box holds</summary>{''.join(entries)}</details>"


def _layers(counted: Profile) -> str:
    heads = ("layer", "operation", "output", "parameters", "MACs", "result", "alive")
    mark = counted.peak_row
    body = []
    for row in counted.rows:
        figures = [(row.params, number), (row.macs, number), (row.bytes, size), (row.live_bytes, size)]
        cells = "".join(f'<td data-v="{value}">{words(value)}</td>' for value, words in figures)
        size_of = 1
        for extent in row.shape:
            size_of *= extent
        body.append(
            f"<tr{' class=peakrow' if row is mark else ''}><td>{escape(row.layer)}</td><td>"
            f"{escape(row.op)}</td>"
            f'<td data-v="{size_of}">{dims(row.shape)}</td>{cells}</tr>'
        )
    head = "".join(f'<th><button type="button">{one}</button></th>' for one in heads)
    return (
        f'<div class="wide layers"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _uncounted(counted: Profile) -> list[str]:
    return [
        f'<p class="soft">not counted: {escape(one.op)} in {escape(one.where)}: {escape(one.why)}</p>'
        for one in counted.uncounted
    ]
