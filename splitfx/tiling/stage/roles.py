"""Roles: which nodes of a graph a stage may hold, what each of them is there, and why the others may not.

A node is `ROWS` where a piece of it follows from pieces of its operands, `REDUCE` where it takes a map in row by row,
`WHOLE` where it runs once, on complete values: on vectors, or on maps that it cannot take row by row (attention). What
is given is `SOURCE`. Everything else stays outside: random numbers, gradients that are switched another way, and writes
through views, which are ordered by position alone.
"""

from __future__ import annotations

import enum

import torch
from torch import fx

from splitfx.analysis.regions import Regions, made_before
from splitfx.ir.graph import Staged, Whole, module_of
from splitfx.ir.ops import STRUCTURE, UNKNOWN, Result, Spatial, bind, in_place, is_size, op, op_name


class Kind(enum.Enum):
    SOURCE = "source"
    ROWS = "rows"
    REDUCE = "reduce"
    WHOLE = "whole"


def reduction(node: fx.Node, regions: Regions) -> str:
    """Why a reduction over H and W cannot consume rows; empty where it can. Any other node: why it is none."""
    row, maps = op(node), regions.maps(node)
    if row.consumes is None or not regions.barrier(node) or len(maps) not in (1, 1 + (row.reduces == "product")):
        return regions.barrier(node) or f"{op_name(node)} is no reduction"
    if not only_first(node, regions):
        return f"the places that {op_name(node)} found are read"
    return regions.misread(node) or row.consumes(regions.placed(node))


def only_first(node: fx.Node, regions: Regions) -> bool:
    """Of the parts of a value none but the first is read, such as the maxima without their places."""
    return isinstance(regions.values[node], torch.Tensor) or all(_index_of_part(user) == 0 for user in node.users)


def _index_of_part(node: fx.Node) -> int | None:
    """Which part of a tuple a node takes; None for any other node."""
    return int(node.args[1]) if op_name(node) == "getitem" and isinstance(node.args[1], int) else None


def is_norm(node: fx.Node) -> bool:
    """A norm or a softmax over a map: a reduction to its statistics, which are then applied to every row."""
    return op(node).reduces in ("moments", "exponentials")


class Roles:
    """For every node of a graph: SOURCE (inputs, and what is computed of parameters alone), ROWS, REDUCE, WHOLE, or
    none, and why."""

    def __init__(self, graph: fx.GraphModule, regions: Regions) -> None:
        self.kind: dict[fx.Node, Kind | None] = {}
        self.why: dict[fx.Node, str] = {}
        apart, before = _out_of_order(graph), made_before(graph.graph.nodes)
        for node in graph.graph.nodes:
            self.kind[node], self.why[node] = self._role(node, regions)
            if node in before:
                self.kind[node], self.why[node] = Kind.SOURCE if is_source(node, regions) else None, ""
            elif node in apart and self.kind[node] is not Kind.SOURCE:
                self.kind[node], self.why[node] = None, apart[node]

    def _role(self, node: fx.Node, regions: Regions) -> tuple[Kind | None, str]:
        if node.op == "placeholder":
            value = regions.values[node]
            return (Kind.SOURCE if regions.dims[node] is not None or isinstance(value, torch.Tensor) else None), ""
        if node.op == "get_attr" and regions.dims[node] is not None:
            return Kind.WHOLE, ""  # a table of positions
        if node.op in ("get_attr", "output") or is_size(node):
            return None, ""
        operands = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
        kinds = {self.kind[n] for n in operands}
        if None in kinds:
            return None, regions.barrier(node)  # it reads what is computed outside
        if all(regions.constant(n) and self.kind[n] is Kind.SOURCE for n in operands) and _is_constant(node, regions):
            return Kind.SOURCE, ""
        maps = [n for n in node.all_input_nodes if not is_size(n) and self.is_map(n, regions)]
        if maps and not reduction(node, regions):
            return (Kind.ROWS if is_norm(node) else Kind.REDUCE), ""
        first = not op(node).first_part or only_first(node, regions)
        if maps and first and not regions.barrier(node) and not node.meta.get("writes_view"):
            return Kind.ROWS, ""
        if not maps and operands and kinds <= {Kind.WHOLE, Kind.REDUCE} and _spreads(node, regions):
            return Kind.ROWS, ""
        why = reduction(node, regions) if maps else regions.misread(node)
        return (Kind.WHOLE if runs_whole(node, regions) else None), why

    def is_map(self, node: fx.Node, regions: Regions) -> bool:
        """A value that is read row by row; what was computed whole and has a single place is read as it is."""
        if regions.dims[node] is None or self.kind[node] is Kind.REDUCE:
            return False
        if self.kind[node] is not Kind.WHOLE:
            return True
        return isinstance(regions.values[node], torch.Tensor) and max(regions.rows(node, a) for a in (0, 1)) > 1


def runs_whole(node: fx.Node, regions: Regions) -> bool:
    """A stage may run this node once, on complete values, between its sweeps over rows: it gives tensors, draws
    nothing, and neither overwrites a value through a view nor is a part that a pass has made."""
    value, target = regions.values[node], node.target
    parts = value if isinstance(value, list | tuple) else [value]
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts) or node.meta.get("writes_view"):
        return False
    if node.op == "call_module":
        row = op(node)
        still = row.drops or not row.draws or row.result is Result.OPERAND  # in eval mode
        return not isinstance(module_of(node), Staged | Whole) and row is not UNKNOWN and still
    if isinstance(target, torch._ops.OpOverload):
        return not draws(node) and (not in_place(node) or _has_twin(node))
    return op_name(node) == "getitem"


def draws(node: fx.Node) -> bool:
    """An operator's result is random."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = bind(node)
    return bool(given.get("train", True)) and bool(given.get("dropout_p", 1.0))


def _has_twin(node: fx.Node) -> bool:
    packet = getattr(torch.ops.aten, op_name(node), None)
    return packet is not None and getattr(packet, getattr(node.target, "_overloadname", ""), None) is not None


def _spreads(node: fx.Node, regions: Regions) -> bool:
    """Resizes a value that was computed whole to a map."""
    return op(node).spatial is Spatial.RESIZE and not regions.barrier(node)


def _is_constant(node: fx.Node, regions: Regions) -> bool:
    """One tensor, made of parameters by an operation that draws nothing and overwrites nothing that others read."""
    row = op(node)
    known = row not in (UNKNOWN, STRUCTURE) and not row.draws
    alone = not in_place(node) or (node.args[0].op != "get_attr" and len(node.args[0].users) == 1)  # type: ignore[union-attr]
    return known and isinstance(regions.values[node], torch.Tensor) and alone


def is_source(node: fx.Node, regions: Regions) -> bool:
    return node.op == "call_function" and isinstance(regions.values[node], torch.Tensor)


def _out_of_order(graph: fx.GraphModule) -> dict[fx.Node, str]:
    """Nodes that no stage may take along, because more than their operands ties them to their place, and why."""
    nodes, found = list(graph.graph.nodes), dict[fx.Node, str]()
    section, sections = 0, dict[fx.Node, int]()  # between two switches lies one section
    for node in nodes:
        section += node.target is torch._C._set_grad_enabled
        sections[node] = section
    # A stage reads what nothing outside has computed, so it lies in the first section that has layers.
    first = next((sections[n] for n in nodes if n.op == "call_module"), 0)
    for node in nodes if section else ():
        if sections[node] != first:
            found[node] = "runs with gradients switched another way than the stage"
    before = made_before(graph.graph.nodes)
    writes = [n for n in nodes if n.meta.get("writes_view") and n not in before]
    for node in nodes if writes else ():
        if node.op not in ("placeholder", "get_attr"):
            found[node] = f"{writes[0].name} overwrites a value through a view of it: the order of all nodes matters"
    return found
