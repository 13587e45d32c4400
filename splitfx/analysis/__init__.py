"""Facts about a canonical graph: analyses computed on demand and cached per graph version.

A version is what the nodes say (name, operation, operands) plus the sizes of the modules that they call; when a pass
changes any of it, `facts` starts afresh, so no stale fact survives on a node.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx

from splitfx.ground.exclusive import exclusive, once

if TYPE_CHECKING:
    from splitfx.analysis.axes import Axes
    from splitfx.analysis.cost import Cost
    from splitfx.analysis.memory import Memory
    from splitfx.analysis.regions import Regions

__all__ = ["Facts", "carry_over", "facts"]


class Facts:
    """What is known of one version of a graph. Every property is computed at most once."""

    def __init__(self, graph: fx.GraphModule, known_version: int | None = None) -> None:
        self.graph = graph
        self.version = version(graph) if known_version is None else known_version
        self.nodes = list(graph.graph.nodes)

    def still_hold(self, now: int) -> bool:
        """Of these very nodes: a rewrite may put another in the place of one, with its name."""
        nodes = list(self.graph.graph.nodes)
        return self.version == now and len(nodes) == len(self.nodes) and all(map(operator.is_, nodes, self.nodes))

    def __reduce__(self) -> tuple[Any, ...]:
        return _forgotten, ()

    @once
    def shapes(self) -> dict[fx.Node, Any]:
        """Every node's value as a fake tensor (or pytree, or number), in the traced sizes."""
        from splitfx.analysis.shapes import shapes

        return shapes(self.graph)

    @once
    def cost(self) -> Cost:
        from splitfx.analysis.cost import cost

        return cost(self.graph, self.shapes)

    @once
    def memory(self) -> Memory:
        from splitfx.analysis.memory import memory

        return memory(self.graph, self.shapes)

    @once
    def cuts(self) -> list[fx.Node]:
        """Nodes whose one tensor carries everything from input to output, in order."""
        from splitfx.analysis.cuts import cuts

        return cuts(self.graph)

    @once
    def axes(self) -> Axes:
        from splitfx.analysis.axes import axes

        return axes(self.graph, self.shapes)

    @once
    def regions(self) -> Regions:
        from splitfx.analysis.regions import Regions

        return Regions(self.shapes)


def carry_over(original: Facts, copied: fx.GraphModule) -> Facts:
    """Facts of ``copied``, a copy of the graph of ``known`` that nothing has been done to.

    Sizes and axes, which most passes ask for, are taken over node by node; nothing is computed again.
    """
    there = dict(zip(original.graph.graph.nodes, copied.graph.nodes, strict=True))
    facts_of_copy = Facts(copied, original.version)
    facts_of_copy.shapes = {there[node]: value for node, value in original.shapes.items()}
    if "axes" in vars(original):
        facts_of_copy.axes = original.axes.carried(there)
    vars(copied)[_KEPT] = facts_of_copy
    return facts_of_copy


def _forgotten() -> None:
    """What a copy or a pickle of a graph has in place of the facts: they are of the original."""


_KEPT = "_splitfx_facts"  # in the graph's own __dict__, so that facts die with their graph


def facts(graph: fx.GraphModule) -> Facts:
    """The facts of a graph as it is now."""
    with exclusive():  # two callers are given the same
        known, now = vars(graph).get(_KEPT), version(graph)
        if known is None or not known.still_hold(now):
            known = vars(graph)[_KEPT] = Facts(graph, now)
        return known


def version(graph: fx.GraphModule) -> int:
    """Changes whenever a node, an operand, an option or the size of a called module changes."""
    from splitfx.ir.graph import module_of

    parts: list[Any] = []
    for node in graph.graph.nodes:
        module = module_of(node)
        said = () if module is None else (module.extra_repr(), *(p.shape for p in module.parameters()))
        kwargs = str(node.kwargs) if node.kwargs else ""
        parts.append((node.name, node.op, str(node.target), str(node.args), kwargs, said))
    return hash(tuple(parts))
