"""How every map of a graph follows from the image's size: the trunk in front of a cut, as one `Map` per axis.

Followed: windows, pads, elementwise operations, sums and concats whose operands have one map (so whole residual stages
have one), norms, permutations to channels-last and linear layers there. Where something else comes in between, a value
may still be known to be a map (``dims``) without a rule for its size (``maps`` is None): only the static form fits it.
Nothing is guessed: what is not followed has no entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.moves import channel_dim
from splitfx.analysis.shapes import shape
from splitfx.ir.graph import operand
from splitfx.ir.ops import Channel, Result, Spatial, bind, op, window
from splitfx.ir.ops.row import Placed
from splitfx.subnetworks.stepdown import Map


@dataclass(frozen=True)
class Spread:
    """Where the image's axes lie in a value, and how their sizes follow from the image's."""

    dims: tuple[int, ...]
    maps: tuple[Map, ...] | None


def spreads(facts: Facts, image: fx.Node) -> dict[fx.Node, Spread]:
    """Every map that follows from ``image``, an input [N, C, spatial axes ...]."""
    return _Follower(facts, image).run()


class _Follower:
    def __init__(self, facts: Facts, image: fx.Node) -> None:
        self.facts, self.values, self.image = facts, facts.shapes, image
        self.rank = len(shape(self.values[image]))
        self.size = shape(self.values[image])[2:]
        self.found: dict[fx.Node, Spread] = {}

    def run(self) -> dict[fx.Node, Spread]:
        first = tuple(range(2, self.rank))
        for node in self.facts.graph.graph.nodes:
            known = Spread(first, (Map(),) * len(first)) if node is self.image else self.follow(node)
            if known is None and isinstance(self.values[node], torch.Tensor):
                known = self.labelled(node)
            if known is not None:
                self.found[node] = self.checked(node, known)
        return self.found

    def checked(self, node: fx.Node, known: Spread) -> Spread:
        """Without the maps where they do not give the size that the value has: a pool in ceil mode."""
        sizes = shape(self.values[node])
        if known.maps is None or not sizes:
            return known
        fits = all(m(n) == sizes[d] for m, n, d in zip(known.maps, self.size, known.dims, strict=True))
        return known if fits else Spread(known.dims, None)

    def follow(self, node: fx.Node) -> Spread | None:
        if node.op not in ("call_function", "call_module"):
            return None
        row = op(node)
        if row.spatial is Spatial.WINDOW:
            return self.windowed(node)
        if row.spatial is Spatial.PAD:
            return self.padded(node)
        first = node.args[0] if node.args else None
        before = self.found.get(first) if isinstance(first, fx.Node) else None
        if before is not None and row.result is Result.OPERAND:
            return before
        if row.spatial is Spatial.POINTWISE and row.channel is not Channel.MIXES:
            return self.joined(node)
        if before is None:
            return None
        if row.reduces == "moments":
            return before
        dims = (
            row.follows(self.placed(node, first, before))
            if row.follows is not None and isinstance(first, fx.Node)
            else None
        )
        if dims is not None:
            return Spread(dims, before.maps)
        cropped = row.result is Result.VIEW and not self.same_size(node, before)
        return Spread(before.dims, None) if cropped else None

    def placed(self, node: fx.Node, source: fx.Node, before: Spread) -> Placed:
        return Placed(node, bind(node), before.dims, self.sizes(source), self.sizes(node), source, self.values, False)

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a value, or of its first part."""
        value = self.values[node]
        return shape(value[0] if isinstance(value, list | tuple) and value else value)

    def windowed(self, node: fx.Node) -> Spread | None:
        axes = self.rank - 2
        if len(shape(self.values[node])) != self.rank:
            return None
        weight = bind(node).get("weight")
        rule = window(node, axes, shape(self.values[weight]) if isinstance(weight, fx.Node) else ())
        dims = tuple(range(2, self.rank))
        before = self.found.get(operand(node))
        if before is None or before.maps is None or before.dims != dims or rule.transposed:
            return Spread(dims, None)
        padding = [a + b for a, b in zip(rule.padding, rule.padding_end, strict=True)]
        ways = zip(before.maps, rule.kernel, rule.stride, padding, rule.dilation, strict=True)
        return Spread(dims, tuple(m.then(k, s, p, d, rule.ceil_mode) for m, k, s, p, d in ways))

    def padded(self, node: fx.Node) -> Spread | None:
        before = self.found.get(operand(node))
        sides: Any = node.args[1] if len(node.args) > 1 else None
        if isinstance(sides, list | tuple):
            sides = [self.values[s] if isinstance(s, fx.Node) else s for s in sides]
        if before is None:
            return None
        if not isinstance(sides, list | tuple) or not all(isinstance(s, int) for s in sides) or before.maps is None:
            return Spread(before.dims, None)
        extra = {self.rank - 1 - i // 2: sides[i] + sides[i + 1] for i in range(0, len(sides), 2)}
        ways = zip(before.maps, before.dims, strict=True)
        return Spread(before.dims, tuple(Map(m.add + extra.get(d, 0) * m.scale, m.scale) for m, d in ways))

    def joined(self, node: fx.Node) -> Spread | None:
        """Elementwise: all operands that are maps agree; what is spread over the map (a gate) has no say."""
        sizes = shape(self.values[node])
        operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
        known = [self.found[n] for n in operands if n in self.found]
        if len(sizes) != self.rank or not known:
            return None
        dims = known[0].dims
        same = lambda n: all(shape(self.values[n])[d : d + 1] == sizes[d : d + 1] for d in dims)  # noqa: E731
        full = [n for n in operands if len(shape(self.values[n])) == self.rank and same(n)]
        carried = [self.found[n] for n in full if n in self.found]
        if not carried or any(one.dims != dims for one in carried):
            return None
        agree = len(carried) == len(full) and all(one.maps == carried[0].maps for one in carried)
        return Spread(dims, carried[0].maps if agree else None)

    def same_size(self, node: fx.Node, before: Spread) -> bool:
        """The sizes of the map stay."""
        after, held = self.sizes(node), self.sizes(operand(node))
        return len(after) == len(held) and all(after[d] == held[d] for d in before.dims)

    def labelled(self, node: fx.Node) -> Spread | None:
        """A value whose rows were moved about (a channel shuffle): a map where its channels are followed to dim 1."""
        labels = self.facts.axes.labels.get(node)
        if len(shape(self.values[node])) != self.rank or not isinstance(labels, torch.Tensor):
            return None
        if node.op not in ("call_function", "call_module") or channel_dim(labels) != 1:
            return None
        axis = int(self.facts.axes.axis[int(labels.flatten()[0])])
        if "cannot be followed" in self.facts.axes.frozen.get(axis, ""):
            return None
        return Spread(tuple(range(2, self.rank)), None)
