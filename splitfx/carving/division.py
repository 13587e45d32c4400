"""Division: which channels of a weighted layer belong together, and the dense layer with the other weights at zero.

`masked` is what every carved graph is held to: the user's own layers, computed densely, with the weights outside the
blocks counted as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn

from splitfx.carving import narrow
from splitfx.ir.graph import copy_graph, module_of, set_path
from splitfx.ir.layers import Masked


@dataclass(frozen=True)
class Division:
    """Branch g of a weighted node reads input channels ``ins[g]`` and writes output channels ``outs[g]``.

    The outputs are a partition, in the order in which they are to lie; inputs, in any order, may overlap where a
    channel belongs to no branch and is read by all. A single branch lays the outputs in another order, no more.
    """

    ins: tuple[np.ndarray, ...]
    outs: tuple[np.ndarray, ...]

    @property
    def even(self) -> bool:
        """All branches have the same sizes and share no input: a grouped conv can run it."""
        sizes = {(len(i), len(o)) for i, o in zip(self.ins, self.outs, strict=True)}
        count = sum(map(len, self.ins))
        return len(sizes) == 1 and count == len(np.unique(np.concatenate(self.ins)))

    def kept(self, node: fx.Node) -> int:
        """Weights that the layer keeps; one with groups of its own keeps them all."""
        weight = weights_of(node)
        if getattr(module_of(node), "groups", 1) > 1:
            return weight.numel()
        return sum(len(i) * len(o) for i, o in zip(self.ins, self.outs, strict=True)) * weight[0, 0].numel()

    def clear(self, weight: torch.Tensor) -> torch.Tensor:
        """Set a dense weight [out, in, ...] to zero where it is removed, in place."""
        everything = np.arange(weight.shape[1])
        for i, o in zip(self.ins, self.outs, strict=True):
            removed = np.setdiff1d(everything, i)
            if len(o) and o.max() - o.min() + 1 == len(o):
                rows, index = weight[o.min() : o.max() + 1], torch.as_tensor(removed, device=weight.device)
                rows.index_fill_(1, index, 0)
            else:
                weight[np.ix_(o, removed)] = 0
        return weight


Divisions = Mapping[fx.Node, Division]


def weights_of(node: fx.Node) -> torch.Tensor:
    """The weight of the layer that a node calls."""
    return module_of(node).weight  # type: ignore[union-attr, return-value]


def alike(a: Division | None, b: Division | None) -> bool:
    """The same channels in the same branches; no division is like no other."""
    if a is None or b is None:
        return a is b
    if len(a.ins) != len(b.ins):
        return False
    return all(np.array_equal(x, y) for x, y in zip((*a.ins, *a.outs), (*b.ins, *b.outs), strict=True))


class Divided(Masked):
    """A layer whose weights outside the blocks count as zero: masked when it is called, so it takes no memory."""

    def __init__(self, layer: nn.Module, division: Division) -> None:
        super().__init__()
        self.layer, self.division, self.training = layer, division, layer.training

    def clear(self, weight: torch.Tensor) -> torch.Tensor:
        """Set the removed part of a weight of this layer's size to zero, in place."""
        self.division.clear(weight.transpose(0, 1) if narrow.transposed(self.layer) else weight)
        return weight


def masked(graph: fx.GraphModule, divisions: Divisions) -> fx.GraphModule:
    """The dense reference of a graph that is about to be carved: a copy that shares every weight.

    Layers with existing groups keep all their weights: their groups lie whole within the branches.
    """
    copied = copy_graph(graph, share=True)
    for node, division in divisions.items():
        layer = copied.get_submodule(str(node.target))
        whole = len(division.outs) == 1 or getattr(layer, "groups", 1) > 1
        if not whole and not isinstance(layer, Divided):
            set_path(copied, str(node.target), Divided(layer, division))
    return copied
