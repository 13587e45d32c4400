"""What a graph costs: parameters, multiply-accumulates, all elementwise operations, bytes of results.

Two counts of work, as papers print them. ``macs``: the multiply-accumulates of convolutions, linear layers,
matrix products and attention, nothing else. ``ops``: those, plus 1 per output element for a bias, 2 for a
batch norm, 1 for an activation or a sum, and the input elements of every pool (the operation table holds
the figure of each operator). ``flops`` is 2 × macs. What has no row in the table, or no closed form, is
listed in ``uncounted`` with the reason; the totals are then a lower bound, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis.shapes import shape
from splitfx.ir.graph import Staged, TensorSpec, attribute, layer, module_of
from splitfx.ir.ops import Op, bind, op, op_name
from splitfx.ir.ops.row import CannotCount


@dataclass(frozen=True)
class NodeCost:
    """One node. ``params``: those that no earlier node used. ``bytes``: of its result, views included."""

    params: int = 0
    macs: int = 0
    ops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Uncounted:
    """A node whose work could not be counted, and why."""

    where: str  # the user's layer path
    op: str
    why: str


@dataclass(frozen=True)
class Cost:
    """Totals and, in ``rows``, each node's share. ``params`` counts each Parameter of the graph once."""

    rows: dict[fx.Node, NodeCost]
    params: int
    uncounted: tuple[Uncounted, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call, for the whole batch."""
        return sum(row.macs for row in self.rows.values())

    @property
    def ops(self) -> int:
        """All elementwise operations of one call, for the whole batch."""
        return sum(row.ops for row in self.rows.values())

    @property
    def flops(self) -> int:
        """2 × macs."""
        return 2 * self.macs


def cost(graph: fx.GraphModule, shapes: dict[fx.Node, Any]) -> Cost:
    """Count ``graph`` for the sizes in ``shapes`` (`splitfx.analysis.shapes`)."""
    seen: set[int] = set()
    rows: dict[fx.Node, NodeCost] = {}
    uncounted: list[Uncounted] = []
    for node in graph.graph.nodes:
        row, macs, ops = op(node), 0, 0
        try:
            if isinstance(module_of(node), Staged):
                macs, ops = _inside(node, shapes)
            else:
                macs = _macs(node, shapes)
                ops = macs + _elementwise(node, row, shapes)
        except CannotCount as reason:
            uncounted.append(Uncounted(layer(node), _name(node), str(reason)))
        rows[node] = NodeCost(_new_parameters(node, graph, seen), macs, ops, _bytes(shapes[node]))
    return Cost(rows, sum(p.numel() for p in graph.parameters()), tuple(uncounted))


def kernels(graph: fx.GraphModule, kernel: tuple[int, ...] = (3, 3), without: tuple[str, ...] = ()) -> int:
    """How many ``kernel``-sized kernels (pairs of an input and an output channel) the convolutions hold.

    The unit of Table 2 of the grouped-split paper, which prints thousands: VGG-16 has 1634.496 thousand. A
    convolution that is called twice counts once; layers whose path matches a pattern in ``without`` do not
    count.
    """
    total, seen = 0, set()
    for node in graph.graph.nodes:
        module = module_of(node)
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or id(module) in seen:
            continue
        seen.add(id(module))
        if tuple(module.kernel_size) == kernel and not any(fnmatch(layer(node), one) for one in without):
            total += module.in_channels // module.groups * module.out_channels
    return total


def _inside(node: fx.Node, shapes: dict[fx.Node, Any]) -> tuple[int, int]:
    """What the graph inside a tiled stage costs; rows that it computes twice count once."""
    from splitfx.analysis.shapes import shapes as shapes_of

    module: Any = module_of(node)
    given = tuple(TensorSpec(tuple(v.shape), v.dtype, str(v.device)) for v in (shapes[n] for n in node.all_input_nodes))
    found = cost(module.stage, shapes_of(module.stage, given))
    return found.macs, found.ops


def _new_parameters(node: fx.Node, graph: fx.GraphModule, seen: set[int]) -> int:
    """Elements of the parameters that ``node`` is the first to use."""
    module = module_of(node)
    used = list(module.parameters()) if module is not None else []
    if node.op in ("call_function", "call_module"):
        values = [attribute(graph, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        used += [v for v in values if isinstance(v, nn.Parameter)]
    fresh = {id(p): p.numel() for p in used if id(p) not in seen}
    seen.update(fresh)
    return sum(fresh.values())


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))


def _name(node: fx.Node) -> str:
    return op_name(node) or str(getattr(node.target, "__name__", node.target))


def _elements(value: Any) -> int:
    """Elements of the first tensor of a value: a result without the indices or statistics beside it."""
    first = next((t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)), None)
    return first.numel() if first is not None else 0


def _elementwise(node: fx.Node, row: Op, shapes: dict[fx.Node, Any]) -> int:
    """Operations per element: the table's figure, and one per output element for a bias."""
    if row.per_output is None:
        if not _elements(shapes[node]):
            return 0
        raise CannotCount("the operation table has no row for it")
    found = row.per_output * _elements(shapes[node])
    if row.per_input:
        found += row.per_input * _elements(shapes[node.all_input_nodes[0]])
    if row.macs is not None and row.biased(bind(node)):
        found += _elements(shapes[node])
    return found


def macs(node: fx.Node, shapes: dict[fx.Node, Any]) -> int:
    """Multiply-accumulates of one node; 0 where there is no closed form, as `cost` counts it."""
    try:
        return _macs(node, shapes)
    except CannotCount:
        return 0


def _macs(node: fx.Node, shapes: dict[fx.Node, Any]) -> int:
    row = op(node)
    if row.macs is None:
        return 0
    of = lambda value: shape(shapes[value] if isinstance(value, fx.Node) else value)  # noqa: E731
    return row.macs(bind(node), of, _elements(shapes[node]))
