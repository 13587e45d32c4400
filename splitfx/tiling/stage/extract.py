"""Taking a stage out of a graph: its nodes become a small graph of their own, called as one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from splitfx.analysis.regions import CONSTANT, Regions, constant, made_before
from splitfx.ir.editing import like
from splitfx.ir.graph import attribute, module_of, set_path
from splitfx.ir.ops import is_size, op
from splitfx.ir.walks import ancestors
from splitfx.tiling.stage.roles import Kind, Roles


def stages(graph: fx.GraphModule, regions: Regions) -> tuple[list[list[fx.Node]], Roles]:
    """The regions of a graph that can be tiled, in order: each as its nodes, in order, with at least one that works on
    rows. What reads whole maps may lie inside; between two of them lies something that no stage may hold."""
    roles = Roles(graph, regions)
    level: dict[fx.Node, int] = {}
    found: dict[int, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        inside = roles.kind[node] not in (None, Kind.SOURCE) and node.op != "get_attr"
        before = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
        level[node] = max((level[n] + _crosses(roles, n, inside) for n in before), default=0)
        if inside:
            found.setdefault(level[node], []).append(node)
    working = [_alone(graph, nodes, roles, regions) for _, nodes in sorted(found.items())]
    return [nodes for nodes in working if nodes], roles


def _alone(graph: fx.GraphModule, nodes: list[fx.Node], roles: Roles, regions: Regions) -> list[fx.Node]:
    """The nodes of a stage that have a role in it by themselves, none if no rows are left. Whether a value is a map may
    be known from what reads it outside; in the stage it then is none, and what follows stays outside as well."""
    while True:
        nodes = _trimmed(nodes, roles, regions)
        small, _, _, copied = stage_graph(graph, nodes)
        inside = Roles(small, Regions({new: regions.values[old] for old, new in copied.items()}))
        lost = {old for old in nodes if inside.kind[copied[old]] is None}
        if not lost:
            return nodes if any(inside.kind[copied[old]] is Kind.ROWS for old in nodes) else []
        for node in nodes:
            if any(n in lost for n in node.all_input_nodes):
                lost.add(node)
        nodes = [n for n in nodes if n not in lost]


def _trimmed(nodes: list[fx.Node], roles: Roles, regions: Regions) -> list[fx.Node]:
    """A stage without its ends that run whole anyway, such as the tokens behind a last map, or that only read the last
    map in another form: they stay as they are."""
    beyond: set[fx.Node] = set()  # follows from a whole map, or from no map at all
    for node in nodes:
        operands = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
        reads = not operands or any(
            n in beyond or roles.kind[n] is Kind.SOURCE or roles.is_map(n, regions) for n in operands
        )
        if roles.kind[node] is Kind.WHOLE and reads:
            beyond.add(node)
    kept: set[fx.Node] = set()
    for node in reversed(nodes):
        dims = regions.dims[node]
        end = node in beyond or (op(node).reshapes and dims is not None and dims[0] == dims[1])
        if not end or any(user in kept for user in node.users):
            kept.add(node)
    parts = {user for node in kept if not isinstance(regions.values[node], torch.Tensor) for user in node.users}
    return [n for n in nodes if n in kept or n in parts]


def _crosses(roles: Roles, operand: fx.Node, inside: bool) -> int:
    return int(inside and roles.kind[operand] is None and operand.op != "placeholder")


def sources_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values from outside that a stage reads, without parameters and sizes."""
    inside = set(nodes)
    outside = [n for node in nodes for n in node.all_input_nodes if n not in inside]
    found = ancestors(outside, lambda n: is_size(n) and n not in inside)
    return [n for n in found if n not in inside and n.op != "get_attr" and not is_size(n)]


def exits_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values of a stage that are read outside."""
    inside = set(nodes)
    return [n for n in nodes if any(u not in inside for u in n.users)]


def stage_graph(
    graph: fx.GraphModule, nodes: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node], dict[fx.Node, fx.Node]]:
    """(the stage as a graph of its own, the nodes that feed it, the nodes that it gives, node -> node in the stage).

    Modules are shared with the graph.
    """
    sources, exits = sources_of(nodes), exits_of(nodes)
    root, small = nn.Module(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    known: dict[fx.Node, bool] = {}
    before = made_before(graph.graph.nodes)
    for node in sources:
        name = f"{CONSTANT}{node.name}" if node in before or constant(node, known) else node.name
        copied[node] = like(small.placeholder(name), node)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copied:
            for operand in node.all_input_nodes:  # sizes and parameters from outside come along
                copy(operand)
            copied[node] = small.node_copy(node, lambda n: copied[n])
            module = module_of(node)
            if module is not None:
                set_path(root, str(node.target), module)
            elif node.op == "get_attr":
                set_path(root, str(node.target), attribute(graph, str(node.target)))
        return copied[node]

    for node in nodes:
        copy(node)
    small.output([copied[n] for n in exits])
    return fx.GraphModule(root, small, "Stage"), sources, exits, copied
