"""One page about a graph: what was done to it, drawn, with its memory over time and its layers.

The page stands alone: no outside address, style and script inside, light and dark, readable on a phone.
Everything that comes from the user's model (class, layers, notes, plan) is escaped.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import fx

from splitfx.compiler.pipeline import Figures, Step, figures
from splitfx.compiler.sketch import Sketch, sketch
from splitfx.errors import SplitfxError
from splitfx.ground.files import check_target, written_whole
from splitfx.ground.table import dims, number, seconds, size
from splitfx.ir.graph import info
from splitfx.ir.notes import Note
from splitfx.report.explanation import by_kind, promise, ratio, title
from splitfx.report.html.drawing import scene_svg
from splitfx.report.html.memory import memory_html
from splitfx.report.html.models import entry_words, models_html
from splitfx.report.html.scene import Item, mark_changes, open_first, plain, scene
from splitfx.report.html.splitnet import splitnet_html
from splitfx.report.html.stages import StageDetail, stage_details
from splitfx.report.html.style import CSS
from splitfx.report.profile import Profile, profile


def inspect_html(split: fx.GraphModule, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a page about ``split``, the result of `transform`, `trace` or `load`, and return its path.

    It shows the graph before and after by the user's modules, which open and close, with search; then what every pass
    did, the layers inside tiled stages, sub-models, groups, memory over time and a sortable table of layers. Figures
    are those of the traced input. Raises `UnsupportedError` for a model that splitfx did not make, `SplitfxError` when
    the file exists or cannot be written.
    """
    check_target(path, overwrite=overwrite, error=SplitfxError)
    page = inspect_text(split)
    with written_whole(path, overwrite=overwrite) as scratch:
        scratch.write_text(page, encoding="utf-8", newline="\n")
    return Path(path)


def inspect_svg(split: fx.GraphModule, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the drawing of the graph alone, as an SVG file without script; errors as for `inspect_html`."""
    check_target(path, overwrite=overwrite, error=SplitfxError)
    with written_whole(path, overwrite=overwrite) as scratch:
        scratch.write_text(scene_svg(_scenes(split)[1]), encoding="utf-8", newline="\n")
    return Path(path)


def inspect_text(split: fx.GraphModule) -> str:
    """The page as text."""
    known, counted = info(split), profile(split)
    steps: list[Step] = known.steps
    stages = stage_details(split)
    name = escape(known.model_class)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="soft">{_about(counted, known.front_end, steps)}</p>',
        _tiles(steps[0].before if steps else None, figures(split), counted, stages),
        *_graph(split),
        *models_html(split),
        "<h2>Memory over time</h2>",
        memory_html(sketch(split), stages, known.origin),
        *_done(steps, known.plan),
        *_stages(stages),
        *splitnet_html(split),
        "<h2>Layers</h2>",
        _layers(counted),
        *_uncounted(counted),
        *_traced(known.notes),
    ]
    script = (importlib.resources.files(__name__) / "page.js").read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name} · splitfx</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head>'
        f"\n<body>\n" + "\n".join(parts) + f"\n<script>{script}</script>\n</body></html>\n"
    )


# ---------------------------------------------------------------- the graph


def _scenes(split: fx.GraphModule) -> tuple[Item | None, Item]:
    """The trees of the graph before the passes, where there were any, and of the graph as it is."""
    after = scene(entry_words(split, sketch(split)), stage_details(split))
    origin: Sequence[Sketch] = info(split).origin
    before = scene(origin) if origin else None
    if before is not None:
        mark_changes(after, before)
        mark_changes(before, after)
        open_first(before, any(item.changed for item in after.items))
    open_first(after)
    return before, after


def _graph(split: fx.GraphModule) -> Iterable[str]:
    before, after = _scenes(split)
    told = _by_layer(info(split).steps)
    data: dict[str, Any] = {"titles": {"before": "before", "after": "after" if before else ""}}
    data["after"] = plain(after, told)
    if before is not None:
        data["before"] = plain(before, {})
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    views = (("both", "side by side"), ("before", "before"), ("after", "after"))
    chosen = "".join(
        f'<button type="button" data-which="{key}" aria-pressed="{str(key == "both").lower()}">{words}</button>'
        for key, words in views
    )
    yield (
        f'<h2>Graph</h2><div class="bar">{chosen if before is not None else ""}<span class="gap"></span>'
        '<input id="find" type="search" placeholder="find a layer  ( / )" aria-label="find a layer">'
        '<span id="found" aria-live="polite"></span><button type="button" id="open">open all</button>'
        '<button type="button" id="close">close all</button><button type="button" id="minus" aria-label="smaller">−'
        '</button><button type="button" id="plus" aria-label="larger">+</button><button type="button" id="fit">fit'
        "</button></div>"
    )
    yield (
        '<div id="view"><svg id="graph" tabindex="0" role="group" aria-label="the graph"><g></g></svg></div>'
        '<div id="side" hidden></div>'
    )
    yield _key({item.kind for item in _walk(after)}, before is not None)
    yield f'<script type="application/json" id="scenes">{text}</script>'


def _walk(item: Item) -> Iterable[Item]:
    yield item
    for one in item.items:
        yield from _walk(one)


def _key(kinds: set[str], compared: bool) -> str:
    known = (
        ("i-b", "branch or grouped conv", {"branch", "grouped"}),
        ("i-f", "fusion", {"fusion"}),
        ("i-t", "runs strip by strip: how many rows at once, and how much of them is kept", {"tiled"}),
        ("i-g", "input, or where a sub-model enters", {"entry"}),
        ("i-l", "as it was", {"layer", "module"}),
    )
    drawn = [f'<span><i class="{look}"></i>{words}</span>' for look, words, which in known if which & kinds]
    drawn += ['<span><i class="i-n"></i>changed by a pass</span>'] if compared else []
    return (
        f'<p class="key">{"".join(drawn)}<span>click or Enter opens a box and lists what it holds · drag, arrows, '
        "+ and − move and zoom, 0 fits · the wheel zooms once the picture is clicked</span></p>"
    )


def _by_layer(steps: Sequence[Step]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for step in steps:
        for note in step.notes:
            found.setdefault(note.where, []).append(f"{step.name}: {note.what}")
    return found


# ---------------------------------------------------------------- figures


def _about(counted: Profile, front_end: str, steps: Sequence[Step]) -> str:
    passes = f"pass{'es' * (len(steps) > 1)}: {', '.join(step.name for step in steps)}" if steps else "no pass has run"
    return escape(f"on {', '.join(counted.inputs)} · traced with {front_end} · {passes}")


def _tiles(before: Figures | None, now: Figures, counted: Profile, stages: Mapping[str, StageDetail]) -> str:
    inside = sum(one.op != "input" for stage in stages.values() for one in stage.sketches)
    count = len(counted.rows) - len(stages) + inside
    where = f"{inside} of them inside {', '.join(stages)}" if stages else "in the graph"
    made = [
        _tile("parameters", number(now.params), number, before and before.params, now.params),
        _tile("MACs", number(now.macs), number, before and before.macs, now.macs),
        _tile("peak memory", size(now.peak_bytes), size, before and before.peak_bytes, now.peak_bytes),
        f'<div class="tile"><small>operations</small><b>{count}</b><small>{escape(where)}</small></div>',
    ]
    return f'<div class="tiles">{"".join(made)}</div>'


def _tile(name: str, value: str, words: object, before: int | None, now: int) -> str:
    assert callable(words)
    change = "" if before is None else "as before" if before == now else f"was {words(before)} "
    if before not in (None, now):
        up = ' class="up"' if now > before else ""
        change += f"<em{up}>{escape(ratio(before, now))}</em>"
    return f'<div class="tile"><small>{name}</small><b>{value}</b><small>{change}</small></div>'


# ---------------------------------------------------------------- what was done


def _done(steps: Sequence[Step], plan: Any) -> Iterable[str]:
    if not steps:
        return
    yield "<h2>What was done</h2>"
    for position, step in enumerate(steps, 1):
        yield from _step(position, step)
    if plan is not None:
        yield (
            '<details><summary>the plan, as a file that splitfx transform --plan takes</summary><div class="wide"><pre>'
            f"{escape(plan.to_toml().strip())}</pre></div></details>"
        )


def _step(position: int, step: Step) -> Iterable[str]:
    yield f"<h3>{position}. {escape(title(step))}</h3>"
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
            f"after</th><th>change</th></tr></thead><tbody>{body}</tbody></table></div>"
        )
    yield from _notes(step.notes)


def _notes(notes: tuple[Note, ...]) -> Iterable[str]:
    for heading, found in by_kind(notes):
        body = "".join(f"<tr><td>{escape(where)}</td><td>{escape(what)}</td></tr>" for where, what in found)
        yield f'<p class="soft kind">{heading}</p><table class="notes"><tbody>{body}</tbody></table>'


def _traced(notes: tuple[Note, ...]) -> list[str]:
    return ["<h2>Trace</h2>", *_notes(notes)] if notes else []


def _stages(stages: Mapping[str, StageDetail]) -> Iterable[str]:
    """A table for every tiled stage: strips and buffers of its layers, the largest first."""
    for path, stage in stages.items():
        yield f"<h2>Inside {escape(path)}</h2>"
        yield (
            f'<p class="soft">{len(stage.strips)} layers run strip by strip, {escape(stage.how)}; at most '
            f"{size(stage.peak_bytes)} are alive inside, inputs and results of the stage included.</p>"
        )
        most = max((one.held for one in stage.strips), default=1) or 1
        body = "".join(
            f"<tr><td>{escape(one.layer)}</td><td>{escape(one.op)}</td>"
            f'<td data-v="{one.rows}">{f"{one.rows} of {one.of}" if one.rows else "whole"}</td>'
            f'<td data-v="{one.runs}">{one.runs}</td>'
            f'<td class="bars" style="--w:{100 * one.held / most:.0f}%" data-v="{one.held}">'
            f"{size(one.held) if one.held else 'none of its own'}</td></tr>"
            for one in stage.strips
        )
        heads = ("layer", "operation", "rows at once", "runs", "rows kept")
        head = "".join(f'<th><button type="button">{one}</button></th>' for one in heads)
        yield (
            f'<div class="wide layers short"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}'
            "</tbody></table></div>"
        )


# ---------------------------------------------------------------- layers


def _layers(counted: Profile) -> str:
    heads = ("layer", "operation", "output", "parameters", "MACs", "result", "alive")
    mark = counted.peak_row
    most = {
        "params": max((row.params for row in counted.rows), default=0) or 1,
        "macs": max((row.macs for row in counted.rows), default=0) or 1,
    }
    body = []
    for row in counted.rows:
        cells = "".join(
            f'<td class="bars" style="--w:{100 * value / most[key]:.0f}%" data-v="{value}">{number(value)}</td>'
            for key, value in (("params", row.params), ("macs", row.macs))
        )
        cells += "".join(f'<td data-v="{value}">{size(value)}</td>' for value in (row.bytes, row.live_bytes))
        size_of = 1
        for extent in row.shape:
            size_of *= extent
        body.append(
            f"<tr{' class=peakrow' if row is mark else ''}><td>{escape(row.layer)}</td><td>{escape(row.op)}</td>"
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
