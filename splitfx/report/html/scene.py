"""A graph as a tree of boxes by the user's modules, with rows and edges on every level: what the page's script draws.

Neighbours of one module stand in one box, which opens to them; so does a row of blocks that are alike, and a tiled
stage, which opens to its layers. Edges are those between the boxes of one level, so that any of them may be open or
closed. Since a box holds neighbours in the order of execution only, no level has a cycle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitfx.compiler.sketch import Sketch
from splitfx.ground.table import dims, number, size
from splitfx.report.html.boxes import Box, boxes, main
from splitfx.report.html.stages import StageDetail, Strip

OPEN = 26  # boxes that are shown at first
ALIKE = 3  # neighbours from so many on are drawn as one box


@dataclass(eq=False)
class Item:
    """A box of the scene: a leaf with its ``box``, or one with ``items`` inside. ``strip``: how a layer inside a tiled
    stage is run."""

    name: str
    path: str
    kind: str
    label: str
    items: list[Item] = field(default_factory=list)
    box: Box | None = None
    inside: list[Box] = field(default_factory=list)
    changed: bool = False
    open: bool = False
    strip: str = ""

    @property
    def branch(self) -> int | None:
        """The branch that all of it belongs to, or None."""
        found = {box.branch for box in self.inside}
        return found.pop() if len(found) == 1 else None

    @property
    def cells(self) -> int:
        return self.box.cells if self.box is not None else 1

    @property
    def sketches(self) -> list[Sketch]:
        return [one for box in self.inside for one in box.nodes]


def scene(nodes: Sequence[Sketch], stages: Mapping[str, StageDetail] | None = None) -> Item:
    """The tree of ``nodes``. ``stages``: by the path of a tiled stage what runs inside it."""
    found = boxes(nodes)
    root = Item("", "", "root", "", _items(found, 0, ""), None, found)
    for item in _all(root):
        if item.kind == "tiled" and stages and item.box is not None and item.box.path in stages:
            stage = stages[item.box.path]
            inner = [box for box in boxes(stage.sketches) if box.kind != "input"]
            item.items, item.inside = _items(inner, 0, ""), [*item.inside, *inner]
            item.label = f"{len(inner)} layers · {stage.how}"
            strips = {one.name: one for one in stage.strips}
            for leaf in _all(item):
                leaf.strip = _strip([strips[one.name] for one in leaf.sketches if one.name in strips], leaf.box)
    return root


def open_first(root: Item, changes: bool = False) -> None:
    """Open boxes from the outside inwards, as long as no more than `OPEN` are shown: where something changed, here or,
    with ``changes``, in the scene beside it, only the boxes around that."""
    changes = changes or any(item.changed for item in root.items)
    shown, waiting = len(root.items), _siblings(root.items)
    while waiting:
        waiting.sort(key=lambda some: (some[0].kind != "tiled", some[0].kind == "repeat"))
        some = waiting.pop(0)
        more = sum(len(one.items) - 1 for one in some)
        if (changes and not some[0].changed) or (shown + more > OPEN and some[0].kind != "tiled"):
            continue
        shown += more
        for one in some:
            one.open = True
        waiting += _siblings([inner for one in some for inner in one.items])


def _strip(strips: Sequence[Strip], box: Box | None) -> str:
    """How the layers of a box are run, in a few words."""
    rows = max((one.rows for one in strips), default=0)
    if box is None or not rows:
        return ""
    held = sum(one.held for one in strips)
    return f"{rows} row{'s' * (rows > 1)}" + (f" · ≤ {size(held)} kept" if held else " at once")


def _siblings(items: Sequence[Item]) -> list[list[Item]]:
    """Boxes that open together: those of one module in several branches."""
    found: dict[tuple[str, int], list[Item]] = {}
    for place, one in enumerate(items):
        if one.items:
            found.setdefault((one.path, -1 if one.branch is not None else place), []).append(one)
    return list(found.values())


def mark_changes(root: Item, other: Item) -> None:
    """Mark what has no counterpart in the other scene, and every box around it."""
    known = {_sign(i) for i in _all(other) if i.box is not None}

    def mark(item: Item) -> bool:
        inner = [mark(one) for one in item.items]
        item.changed = any(inner) or (item.box is not None and _sign(item) not in known)
        return item.changed

    mark(root)


def plain(item: Item, notes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The tree as JSON-ready data. ``notes``: texts by the user's path of a layer."""
    made: dict[str, Any] = {"n": item.name, "p": item.path, "k": item.kind, "l": item.label}
    if item.changed:
        made["m"] = 1
    if item.open:
        made["o"] = 1
    made |= {"s": item.strip} if item.strip else {}
    made |= {"b": item.branch} if item.branch is not None else {}
    if item.box is not None:
        made |= {"g": item.cells} if item.cells > 1 else {}
        made["d"] = [_line(one) for one in item.box.nodes]
    told = [text for one in dict.fromkeys(_paths(item)) for text in notes.get(one, ())]
    if told and item.box is not None:
        made["t"] = told
    if item.items:
        rows, edges, fed, feeds = levels(item)
        made |= {"r": rows, "e": edges, "i": fed, "u": feeds, "c": [plain(one, notes) for one in item.items]}
    return made


# ---------------------------------------------------------------- the tree


def _items(found: Sequence[Box], depth: int, above: str) -> list[Item]:
    runs: list[tuple[Any, list[Box]]] = []
    # Where branches become finer, what several of them read stands alone, or one would seem to read the other.
    apart = lambda a, b: None not in (a.branch, b.branch) and a.branch != b.branch  # noqa: E731
    forks = {id(above) for box in found for above in box.before if apart(box, above)}
    for box in found:
        parts = box.path.split(".")
        key = (parts[depth] if depth < len(parts) else None, box.branch)
        alone = not runs or id(runs[-1][1][-1]) in forks or box.kind in ("input", "tiled")
        if not alone and runs[-1][0] == key and key[0] is not None:
            runs[-1][1].append(box)
        else:
            runs.append((key, [box]))
    return _alike([_item(key[0], run, depth, above) for key, run in runs])


def _item(part: str | None, run: Sequence[Box], depth: int, above: str) -> Item:
    if len(run) == 1:
        box = run[0]
        first = main(box.nodes)
        name = ".".join(box.path.split(".")[depth:]) or first.op  # what the module does itself
        said = {one.op for one in box.nodes} == {re.sub(r"_\d+$", "", name)}  # its name is all that it does
        return Item(name, box.path, box.kind, dims(first.shape) if said else box.label, [], box, [box])
    path = f"{above}.{part}" if above else str(part)
    inner = _items(run, depth + 1, path)
    if len(inner) == 1 and inner[0].items:  # a module with nothing but one other in it
        only = inner[0]
        return Item(f"{part}.{only.name}", only.path, only.kind, only.label, only.items, None, only.inside)
    return Item(str(part), path, "module", _summary(run), inner, None, list(run))


def _summary(run: Sequence[Box]) -> str:
    nodes = [one for box in run for one in box.nodes]
    macs = sum(one.macs for one in nodes)
    layers = sum(one.weighted for one in nodes)
    count = f"{layers} layer{'s' * (layers != 1)}" if layers else f"{len(nodes)} operations"
    return f"{count} · {number(macs)} MACs" if macs else count


def _alike(items: list[Item]) -> list[Item]:
    """Blocks that are alike, one behind the other, as one item that opens to them."""
    found: list[list[Item]] = []
    for item in items:
        last = found[-1] if found else None
        if last and item.items and _shape(last[0]) == _shape(item) and _follows(last[-1], item):
            last.append(item)
        else:
            found.append([item])
    return [one for run in found for one in ([_repeat(run)] if len(run) >= ALIKE else run)]


def _repeat(run: list[Item]) -> Item:
    inside = [box for item in run for box in item.inside]
    name, label = f"{run[0].name} to {run[-1].name}", f"{len(run)} alike · {_summary(inside)}"
    return Item(name, f"{run[0].path}…{run[-1].path}", "repeat", label, run, None, inside)


def _shape(item: Item) -> tuple[Any, ...]:
    own = tuple((one.op, one.words, one.shape) for one in item.sketches)
    return (len(item.items), own)


def _follows(first: Item, second: Item) -> bool:
    """All that the second reads from outside comes from the first."""
    own, before = set(map(id, second.inside)), set(map(id, first.inside))
    read = {id(b) for box in second.inside for b in box.before} - own
    return bool(read) and read <= before


# ---------------------------------------------------------------- one level


def levels(item: Item) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Row of every item, edges between them, and which read from, or are read, outside."""
    home = {id(box): place for place, one in enumerate(item.items) for box in one.inside}
    edges: dict[tuple[int, int], None] = {}
    fed: dict[int, None] = {}
    for place, one in enumerate(item.items):
        for box in one.inside:
            for before in box.before:
                source = home.get(id(before))
                if source is None:
                    fed[place] = None
                elif source != place:
                    edges[source, place] = None
    rows = [0] * len(item.items)
    for source, place in sorted(edges, key=lambda edge: edge[1]):
        rows[place] = max(rows[place], rows[source] + 1)
    sources = {source for source, _ in edges}
    feeds = [place for place in range(len(item.items)) if place not in sources]
    return rows, [list(edge) for edge in edges], list(fed), feeds


def _all(item: Item) -> Iterator[Item]:
    for one in item.items:
        yield one
        yield from _all(one)


def _sign(item: Item) -> tuple[Any, ...]:
    assert item.box is not None
    ops = tuple((one.op, one.words, one.groups) for one in item.box.nodes)
    return item.path, item.box.branch, item.kind, ops


def _paths(item: Item) -> Iterator[str]:
    for one in item.box.nodes if item.box is not None else ():
        yield one.layer


def _line(one: Sketch) -> list[str]:
    live = size(one.live_bytes) if one.live_bytes else "-"
    return [one.layer, one.op, dims(one.shape), number(one.params), number(one.macs), size(one.bytes), live]
