"""Blocks: the layers between two points where a network's feature map shrinks (MalekHosseini et al.: pooling nodes).

A boundary lies on a *cut*, the one tensor that carries everything. Where a single pool shrinks the map, the boundary
is the pool's output; where a stage starts with strided operations (a residual network), it is the value that feeds
both its main path and its shortcut. A stretch without convolutions is no block and joins its neighbour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.shapes import shape
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import Channel, Spatial, bind, op, window


@dataclass(frozen=True)
class Block:
    """``edges`` are its convolutions in order; ``end`` the cut behind it, None where the network just goes on."""

    index: int  # from 1, as the papers count
    edges: tuple[Edge, ...]
    end: fx.Node | None

    def __str__(self) -> str:
        first, last = layer(self.edges[0].node), layer(self.edges[-1].node)
        return first if first == last else f"{first} to {last}"


def blocks(facts: Facts) -> list[Block]:
    """The blocks of a graph, in order."""
    place = {node: i for i, node in enumerate(facts.graph.graph.nodes)}
    convs = [e for e in facts.axes.edges if op(e.node).convolves]
    blocks_found: list[Block] = []
    start = -1
    for end in boundaries(facts):
        inside = tuple(e for e in convs if start < place[e.node] <= place[end])
        if not inside:
            continue
        blocks_found.append(Block(len(blocks_found) + 1, inside, end))
        start = place[end]
    rest = tuple(e for e in convs if place[e.node] > start)
    return [*blocks_found, Block(len(blocks_found) + 1, rest, None)] if rest else blocks_found


def boundaries(facts: Facts) -> list[fx.Node]:
    """Cuts at which the map is about to shrink, or just has (behind a pool)."""
    chain = [n for n in facts.cuts if _has_channels(facts, n)]
    nodes = list(facts.graph.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    ends: list[fx.Node] = []
    for before, after in pairwise(chain):
        between = nodes[place[before] + 1 : place[after] + 1]
        if _area(facts, after) >= _area(facts, before) or not any(_strides(facts, n) for n in between):
            continue
        end = after if _is_pool(after) and after.all_input_nodes[0] is before else _stage_start(facts, before, chain)
        if end not in ends:
            ends.append(end)
    return ends


def _stage_start(facts: Facts, node: fx.Node, chain: list[fx.Node]) -> fx.Node:
    """Where the stage of a shrinking operation starts: before the expansion that only its depthwise conv reads.

    An inverted residual widens, then strides; the value in front of the widening is the narrow one that joins stages. A
    node that only pads may stand between the two, so the widening's own map says that it does not stride.
    """
    readers = list(node.users)
    if len(readers) != 1 or getattr(module_of(readers[0]), "groups", 1) == 1:
        return node
    walked = node
    while _keeps_channels(facts, walked) and len(walked.all_input_nodes) == 1:
        walked = walked.all_input_nodes[0]
        if len(walked.users) != 1:
            return node
    before = walked.all_input_nodes[0] if op(walked).channel is Channel.MIXES else node
    if before not in chain or getattr(module_of(walked), "groups", 0) != 1:
        return node
    narrower = shape(facts.shapes[before])[1] < shape(facts.shapes[node])[1]
    return before if narrower and _area(facts, before) == _area(facts, walked) else node


def _keeps_channels(facts: Facts, node: fx.Node) -> bool:
    row, reads = op(node), node.all_input_nodes
    pads = row.spatial is Spatial.PAD and shape(facts.shapes[node])[1] == shape(facts.shapes[reads[0]])[1]
    return row.channel is Channel.SAME or pads


def _has_channels(facts: Facts, node: fx.Node) -> bool:
    held = facts.axes.of(node)
    return held is not None and shape(facts.shapes[node])[1] == len(held)


def _strides(facts: Facts, node: fx.Node) -> bool:
    """The node makes a coarser map; a conv without padding only trims the border."""
    row = op(node)
    if row.spatial is Spatial.WINDOW:
        weight = bind(node).get("weight")
        sizes = shape(facts.shapes[weight]) if isinstance(weight, fx.Node) else ()
        return max(window(node, len(shape(facts.shapes[node])) - 2, sizes).stride) > 1
    coarser = row.spatial in (Spatial.GLOBAL, Spatial.RESIZE) and bool(node.all_input_nodes)
    return coarser and _area(facts, node) < _area(facts, node.all_input_nodes[0])


def _area(facts: Facts, node: fx.Node) -> int:
    return math.prod(shape(facts.shapes[node])[2:])


def _is_pool(node: fx.Node) -> bool:
    row = op(node)
    return row.channel is Channel.SAME and row.spatial in (Spatial.WINDOW, Spatial.GLOBAL)
