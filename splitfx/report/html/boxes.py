"""Operations as boxes for a drawing: a layer with what follows it in a straight line, or a concat with its fusion conv.

A box is a chain, so boxes never form a cycle. It works on sketches (`splitfx.compiler.sketch`), so the graph before the
passes, of which nothing else is left, is drawn as the one after them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitfx.compiler.sketch import Sketch
from splitfx.ground.table import dims

_TOLD = ("cat", "relu", "relu6", "add", "mul", "silu", "gelu", "sigmoid", "hardswish")
_BRANCH = re.compile(r"\.branch(\d+)(?=$|[._])")
_FUSION = re.compile(r"fusion\d+(_\d+)?")
_ALONE = ("input", "tiled", "entry")
_MOVES = ("cat", "slice", "index_select", "chunk", "split", "getitem")
_JOINS = ("cat", "add", "mul", "stack")


@dataclass(eq=False)
class Box:
    """Operations drawn as one, by position and as they are. ``path``: the user's path, without the branch.

    ``kind``: input, tiled, entry, layer, branch, grouped, fusion, join. ``branch``: the branch (from 0) that all its
    weighted layers belong to, or None. ``cells``: groups of a grouped conv. ``before``: the boxes that it reads.
    """

    places: list[int]
    nodes: list[Sketch]
    path: str = ""
    kind: str = "layer"
    label: str = ""
    branch: int | None = None
    cells: int = 1
    before: list[Box] = field(default_factory=list)


def boxes(nodes: Sequence[Sketch]) -> list[Box]:
    """The boxes of a graph in order of execution."""
    found = [_described(Box(part, [nodes[i] for i in part])) for part in _chains(nodes)]
    home = {place: box for box in found for place in box.places}
    for box in found:
        read = (home[r] for one in box.nodes for r in one.reads)
        box.before = list(dict.fromkeys(one for one in read if one is not box))
    for box in reversed(found):
        below = {one.branch for one in found if box in one.before} if _opens(box) else set()
        if len(below) == 1:
            box.branch = below.pop()
    for box in found:
        above = {one.branch for one in box.before}
        if box.branch is None and len(above) == 1 and not any(one.weighted for one in box.nodes):
            box.branch = above.pop()  # what a branch does with its own values
    return found


def _opens(box: Box) -> bool:
    """Takes a branch's channels out of a value that others read too."""
    return box.branch is None and all(one.op in _MOVES and one.op != "cat" for one in box.nodes)


def _chains(nodes: Sequence[Sketch]) -> list[list[int]]:
    """Straight lines: a light operation joins the box before it, a conv joins a concat that feeds only it."""
    readers = [0] * len(nodes)
    for one in nodes:
        for read in one.reads:
            readers[read] += 1
    home: list[list[int]] = []
    parts: list[list[int]] = []
    for place, one in enumerate(nodes):
        part = home[one.reads[0]] if len(one.reads) == 1 else None
        alone = part is not None and part[-1] == one.reads[0] and readers[one.reads[0]] == 1
        if part is not None and one.op == "getitem" and nodes[one.reads[0]].op == "tiled":  # one of its results
            part.append(place)
            home.append(part)
            continue
        light = not one.weighted and one.op not in _ALONE
        fuses = part is not None and all(nodes[i].op in _MOVES for i in part)
        near = part is not None and _beside(main(nodes[i] for i in part).layer, one.layer)
        if part is not None and alone and nodes[part[0]].op not in _ALONE and ((light and near) or fuses):
            part.append(place)
        else:
            part = [place]
            parts.append(part)
        home.append(part)
    return parts


def _beside(first: str, path: str) -> bool:
    """Whether an operation at ``path`` belongs to the layer ``first``: it is in the same module, or in that layer."""
    first, path = _BRANCH.sub("", first), _BRANCH.sub("", path)
    home = first.rpartition(".")[0]
    return not _FUSION.fullmatch(first) and (path in (home, first) or path.rpartition(".")[0] in (home, first))


def main(nodes: Iterable[Sketch]) -> Sketch:
    """The operation that a box is named after: its first layer with weights, else its first."""
    found = list(nodes)
    return next((one for one in found if one.weighted), found[0])


def _described(box: Box) -> Box:
    first, weighted = main(box.nodes), [one for one in box.nodes if one.weighted]
    numbers = {int(m[1]) for one in box.nodes if (m := _BRANCH.search(one.layer))}
    box.path = _BRANCH.sub("", first.layer)
    box.branch = numbers.pop() if len(numbers) == 1 else None
    box.label = dims(first.shape) if first.op == "input" else _label(first, [one.op for one in box.nodes])
    if first.op in _ALONE:
        box.kind = first.op
    elif _FUSION.fullmatch(first.layer) and weighted:
        box.kind = "fusion"
    elif any(_BRANCH.search(one.layer) for one in weighted):
        box.kind = "branch"
    elif first.groups > 1:
        box.kind, box.cells = "grouped", first.groups
    elif not weighted and first.op in _JOINS:
        box.kind = "join"
    return box


def _label(first: Sketch, ops: Sequence[str]) -> str:
    if not first.words:
        return " ".join(dict.fromkeys(map(_short, ops)))
    shown = [op for op in ops if op in _TOLD or "pool" in op]
    parts = [*(op for op in shown if op == "cat"), first.words, *(_short(op) for op in shown if op != "cat")]
    return " ".join(dict.fromkeys(parts))


def _short(op: str) -> str:
    return op.replace("max_pool2d", "pool").replace("adaptive_avg_pool2d", "avg pool").replace("batch_norm", "norm")
