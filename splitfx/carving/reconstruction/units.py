"""What of a split graph is solved, in order, and which of the dense graph's values it is solved for.

A unit is a weighted layer with the batch norm behind it, a batch norm alone, or a fusion. Its target is what the dense
graph has at its end; where that end is added to a skip, the sum less what the split has on the skip, so that the layer
makes up for what went wrong there. Units are all layers that the model calls once, and whose weight nobody else reads;
to be solved are those at or behind a divided one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from splitfx.carving.division import Divisions
from splitfx.carving.narrow import BatchNorm
from splitfx.carving.reconstruction.layers import KINDS
from splitfx.ir.graph import module_of, read_alone, tied

ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class Unit:
    """``node``: the layer, None where a norm is alone; ``norm``: the batch norm, None where there is none; ``target``:
    the node whose dense value is aimed at, less the split's value of ``skip``; ``behind``: at or behind a division."""

    node: fx.Node | None
    norm: fx.Node | None
    target: fx.Node
    skip: fx.Node | None = None
    behind: bool = True

    @property
    def first(self) -> fx.Node:
        found = self.node or self.norm
        assert found is not None
        return found

    @property
    def end(self) -> fx.Node:
        found = self.norm or self.node
        assert found is not None
        return found


def units(split: fx.GraphModule, divisions: Divisions, fusions: Collection[fx.Node]) -> list[Unit]:
    """The units of a split graph, in the order in which they are solved; a fusion's target is what it reads."""
    nodes = list(split.graph.nodes)
    calls = Counter(str(n.target) for n in nodes if n.op == "call_module")
    shared = read_alone(split) | {path for paths in tied(split).values() for path in paths}
    behind, found, taken = set[fx.Node](), list[Unit](), set[fx.Node]()
    place = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node in divisions or node in fusions or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
        alone = node.op == "call_module" and calls[str(node.target)] == 1 and str(node.target) not in shared
        if node in fusions:
            found.append(Unit(node, None, node.all_input_nodes[0]))
        elif alone and type(module_of(node)) in KINDS:
            norm = _norm_behind(node, calls, shared)
            taken |= {norm} if norm is not None else set()
            found.append(_aimed(node, norm, place, node in behind))
        elif alone and node not in taken and _solvable(module_of(node)):
            found.append(_aimed(None, node, place, node in behind))
    return found


def _norm_behind(node: fx.Node, calls: Counter[str], shared: set[str]) -> fx.Node | None:
    readers = list(node.users)
    if len(readers) != 1 or calls[str(readers[0].target)] != 1 or str(readers[0].target) in shared:
        return None
    return readers[0] if _solvable(module_of(readers[0])) else None


def _solvable(module: nn.Module | None) -> bool:
    """A batch norm that holds statistics, a scale and a shift."""
    if not isinstance(module, BatchNorm):
        return False
    return module.running_mean is not None and module.affine


def _aimed(node: fx.Node | None, norm: fx.Node | None, place: dict[fx.Node, int], behind: bool) -> Unit:
    end = norm or node
    assert end is not None
    first, readers = node or end, list(end.users)
    if len(readers) == 1 and is_sum(readers[0]):
        other = next((one for one in readers[0].all_input_nodes if one is not end), end)
        if place[other] < place[first]:
            return Unit(node, norm, readers[0], other, behind)
    return Unit(node, norm, end, behind=behind)


def is_sum(node: fx.Node) -> bool:
    """Adds one map to another."""
    return node.target in ADDS and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
