"""A graph as boxes for a drawing: chains of operations in one box, large graphs by module, laid out in rows.

A box is a layer with what follows it in a straight line (norm, activation, pool), or a concat with its
fusion conv. Where that makes more boxes than a page can show, neighbouring boxes of one module become one
box, at the greatest depth of the module tree that is short enough. Boxes never form a cycle: each is a
chain, or neighbours in the order of execution. Rows go by the longest way from an input, so that branches
stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.shapes import shape
from splitfx.ground.table import dims, number, size
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import is_size, op_name

LIMIT = 80
_TOLD = ("cat", "relu", "relu6", "add", "mul", "silu", "gelu", "sigmoid", "hardswish")
_BRANCH = re.compile(r"\.branch(\d+)(?=$|[._])")
_MOVES = ("cat", "slice", "index_select", "chunk", "split", "getitem")
_JOINS = ("cat", "add", "mul", "stack")


@dataclass(eq=False)
class Box:
    """Nodes drawn as one. ``branch`` is the branch (from 0) that all its weighted layers belong to, or
    None."""

    nodes: list[fx.Node]
    name: str = ""
    kind: str = "layer"  # input, layer, branch, grouped, fusion, join
    label: str = ""
    detail: str = ""
    branch: int | None = None
    cells: int = 1  # groups of a grouped conv
    row: int = 0
    before: list[Box] = field(default_factory=list)

    @property
    def folded(self) -> bool:
        """The box stands for several layers."""
        return sum(_weighted(n) for n in self.nodes) > 1


def boxes(graph: fx.GraphModule, limit: int = LIMIT) -> list[Box]:
    """The boxes of ``graph`` in order of execution, at most about ``limit``, with rows and edges."""
    nodes = [n for n in graph.graph.nodes if n.op not in ("get_attr", "output") and not is_size(n)]
    parts = _chains(nodes)
    if len(parts) > limit:
        parts = _by_module(parts, limit)
    fusions = {str(n.target) for n in nodes if n.op == "call_module" and str(n.target).startswith("fusion")}
    found = [Box(part) for part in parts]
    home = {node: box for box in found for node in box.nodes}
    for box in found:
        sources = dict.fromkeys(home[n] for m in box.nodes for n in _operands(m) if n in home and home[n] is not box)
        box.before = list(sources)
        box.row = max((one.row + 1 for one in box.before), default=0)
        _describe(box, graph, fusions)
    return found


def _operands(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]


def _weighted(node: fx.Node) -> bool:
    module = module_of(node)
    return module is not None and isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding)


def _chains(nodes: list[fx.Node]) -> list[list[fx.Node]]:
    """Straight lines: a light operation joins the box before it, a conv joins a concat that feeds only it."""
    home: dict[fx.Node, list[fx.Node]] = {}
    parts: list[list[fx.Node]] = []
    for node in nodes:
        operands = _operands(node)
        part = home.get(operands[0]) if len(operands) == 1 else None
        alone = part is not None and part[-1] is operands[0] and len(operands[0].users) == 1
        light = not _weighted(node) and node.op != "placeholder"
        fuses = part is not None and all(op_name(n) in _MOVES for n in part)
        if part is not None and alone and part[0].op != "placeholder" and (light or fuses):
            part.append(node)
        else:
            part = [node]
            parts.append(part)
        home[node] = part
    return parts


def _by_module(parts: list[list[fx.Node]], limit: int) -> list[list[fx.Node]]:
    deepest = max(_path(part).count(".") for part in parts) + 1
    for by_branch in (True, False):
        for depth in range(deepest, 0, -1):
            merged = _runs(parts, depth, by_branch)
            if len(merged) <= limit:
                return merged
    step = -(-len(parts) // limit)
    return [[n for part in parts[i : i + step] for n in part] for i in range(0, len(parts), step)]


def _runs(parts: list[list[fx.Node]], depth: int, by_branch: bool) -> list[list[fx.Node]]:
    """Neighbours of one module and branch together; what has no weights follows what it reads, or leads the
    next."""
    found: list[tuple[object, list[fx.Node]]] = []
    for part in parts:
        key = ".".join(_path(part).split(".")[:depth]), _branch(part) if by_branch else None
        light = part[0].op != "placeholder" and not any(map(_weighted, part))
        last = found[-1][1] if found and found[-1][1][0].op != "placeholder" else None
        if last is None or part[0].op == "placeholder":
            found.append((key, list(part)))
        elif light and not set(last).isdisjoint(n for m in part for n in _operands(m)):
            last.extend(part)
        elif not light and not any(map(_weighted, last)):
            last.extend(part)  # slices that open a branch
            found[-1] = key, last
        elif found[-1][0] == key:
            last.extend(part)
        else:
            found.append((key, list(part)))
    return [part for _, part in found]


def _main(part: Iterable[fx.Node]) -> fx.Node:
    nodes = list(part)
    return next((n for n in nodes if _weighted(n)), nodes[0])


def _path(part: Iterable[fx.Node]) -> str:
    """The user's path of a box, without the branch."""
    return _BRANCH.sub("", layer(_main(part)))


def _branch(part: Iterable[fx.Node]) -> int | None:
    named = [_BRANCH.search(str(n.target)) for n in part if n.op == "call_module"]
    found = {int(m.group(1)) for m in named if m}
    return found.pop() if len(found) == 1 else None


def _describe(box: Box, graph: fx.GraphModule, fusions: set[str]) -> None:
    known, node = facts(graph), _main(box.nodes)
    module, names = module_of(node), [op_name(n) for n in box.nodes]
    box.branch, box.name = _branch(box.nodes), _path(box.nodes)
    weighted = [n for n in box.nodes if _weighted(n)]
    groups = getattr(module, "groups", 1)
    if node.op == "placeholder":
        box.kind, box.label = "input", dims(shape(known.shapes[node]))
    elif str(node.target) in fusions and len(weighted) == 1:
        box.kind = "fusion"
    elif any(_BRANCH.search(str(n.target)) for n in weighted):
        box.kind = "branch"
    elif groups > 1 and len(weighted) == 1:
        box.kind, box.cells = "grouped", groups
    elif not weighted and names[0] in _JOINS:
        box.kind = "join"
    if len(weighted) > 1:
        box.name = _prefix([_BRANCH.sub("", layer(n)) for n in weighted])
        box.label = f"{len(weighted)} layers"
    elif box.kind != "input":
        box.label = _words(module, names)
    macs = sum(known.cost.rows[n].macs for n in box.nodes)
    params = sum(known.cost.rows[n].params for n in box.nodes)
    out = shape(known.shapes[box.nodes[-1]]) if hasattr(known.shapes[box.nodes[-1]], "shape") else ()
    alive = max((known.memory.live_bytes.get(n, 0) for n in box.nodes), default=0)
    box.detail = (
        f"{box.name}{'' if box.branch is None else f', branch {box.branch + 1}'}: {', '.join(names)}; "
        f"output {dims(out)}, {number(params)} parameters, {number(macs)} MACs, {size(alive)} alive"
    )


def _words(module: nn.Module | None, names: list[str]) -> str:
    shown = [n for n in names if n in _TOLD or "pool" in n]
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel = "×".join(map(str, module.kernel_size))
        head = f"{kernel} {module.in_channels}→{module.out_channels}"
    elif isinstance(module, nn.Linear):
        head = f"linear {module.in_features}→{module.out_features}"
    else:
        return names[0]
    first = [n for n in shown if n == "cat"]
    tail = [n.replace("max_pool2d", "pool").replace("adaptive_avg_pool2d", "avg pool") for n in shown if n != "cat"]
    return " ".join(dict.fromkeys([*first, head, *tail]))


def _prefix(paths: list[str]) -> str:
    """What the paths share, or the first and the last."""
    shared: list[str] = []
    for pieces in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared) or f"{paths[0]} to {paths[-1]}"
