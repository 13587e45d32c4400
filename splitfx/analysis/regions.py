"""Regions: which rows a piece of a node's output needs, and what can be made of the rows that are there.

Half-open intervals in global coordinates, per node, operand and spatial axis (0 is H, 1 is W), by the rules of the
operations' rows (`splitfx.ir.ops`), which hold for any number of axes.

An `Edge` is two tables: output row i reads operand rows [low[i], high[i]). For a window of kernel k, stride s,
padding p, dilation d

    low[i] = i*s - p,   high[i] = i*s - p + d*(k - 1) + 1,

which may lie outside the map: what is clipped there is the real padding, so only pieces at a border pad. *Backward*
(`needs`) looks the tables up; *forward* (`ready`) searches the same tables, so the two cannot disagree.

Where H and W lie is followed from node to node (`Regions.dims`), so channels-last stretches of a network (permute,
layer norm over channels, linear) are maps like any other. Reductions over a map and whatever the table does not know
are barriers, with the reason.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import torch
from torch import fx

from splitfx.analysis.shapes import shape
from splitfx.ir.ops import Channel, Spatial, Window, bind, is_size, op, op_name, per_channel, window
from splitfx.ir.ops.row import At, Dims, Placed, Taps

NCHW: Dims = (2, 3)  # also of a volume, whose third axis is whole in every piece
MAPS = (4, 5)  # dims of an image and of a volume, batch and channels in front


class Edge:
    """How the rows of a node follow from those of one operand, along one axis."""

    __slots__ = ("high", "identity", "low", "size")

    def __init__(self, low: np.ndarray, high: np.ndarray, size: int) -> None:
        # Rows at a mirrored border are read backwards: running extremes keep both tables rising, and a piece asks
        # at most for more than it reads.
        self.low: list[int] = np.minimum.accumulate(low[::-1])[::-1].tolist()
        self.high: list[int] = np.maximum.accumulate(high).tolist()
        self.size = size
        self.identity = len(low) == size and bool((low == np.arange(size)).all() and (high == low + 1).all())

    def need(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Operand rows (start, stop) that output rows [start, stop) read, and the rows of padding at either side.

        Rows that read nothing but padding need the row next to it, so that no piece is ever empty.
        """
        low, high, size = self.low[start], self.high[stop - 1], self.size
        first = min(max(low, 0), size - 1)
        last = max(min(high, size), first + 1)
        return first, last, max(0, min(high, 0) - low), max(0, high - max(low, size))

    def first(self, row: int) -> int:
        """The first operand row that output rows from ``row`` on read; all of them once there is no such row."""
        return min(max(self.low[row], 0), self.size - 1) if row < len(self.low) else self.size

    def reach(self, done: int) -> int:
        """The most b such that output rows [0, b) need no operand row at or past ``done``."""
        if done >= self.size:
            return len(self.high)
        return bisect_right(self.high, done) if done > 0 else 0


class Regions:
    """The spatial rules of one graph's nodes, at the sizes of ``values``."""

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self.values = values
        self.dims: dict[fx.Node, Dims | None] = {}
        self._why: dict[fx.Node, str] = {}
        self._constant: dict[fx.Node, bool] = {}
        self._leads: dict[fx.Node, bool] = {}
        for node in reversed(values):
            self.leads(node)
        self._edges: dict[tuple[fx.Node, fx.Node, int], Edge] = {}
        for node in values:
            self.dims[node], self._why[node] = _placed(node, self)

    def rows(self, node: fx.Node, axis: int) -> int:
        """Size of a feature map along a spatial axis; 1 for values without one."""
        dims = self.dims[node]
        return self.sizes(node)[dims[axis]] if dims is not None else 1

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's tensor, or of the first part of a tuple."""
        value = self.values[node]
        return shape(value[0]) if isinstance(value, list | tuple) and value else shape(value)

    def barrier(self, node: fx.Node) -> str:
        """Why no piece of this node can be computed from a piece of its operands; empty where it can."""
        return self._why[node]

    def constant(self, node: fx.Node) -> bool:
        """The value follows from parameters and numbers alone."""
        return constant(node, self._constant)

    def maps(self, node: fx.Node) -> list[fx.Node]:
        """The operands that are feature maps; parameters, numbers and plain vectors are read whole."""
        return [n for n in node.all_input_nodes if self.dims[n] is not None]

    def leads(self, node: fx.Node) -> bool:
        """Some operation that knows of rows and columns reads the value, perhaps behind others that keep them."""
        if node not in self._leads:
            self._leads[node] = any(self._asks(user, len(self.sizes(node))) for user in node.users)
        return self._leads[node]

    def _asks(self, user: fx.Node, rank: int) -> bool:
        row = op(user)
        if row.spatial in (Spatial.WINDOW, Spatial.RESIZE, Spatial.PAD) or row.reduces == "moments":
            return True
        keeps = row.spatial in (Spatial.POINTWISE, Spatial.MOVE) and user in self.values
        return keeps and rank == len(self.sizes(user)) and self.leads(user)

    def placed(self, node: fx.Node) -> Placed:
        """What the row of a node that reads a map is asked with."""
        first, source = node.args[0] if node.args else None, self.maps(node)[0]
        dims = self.dims[source]
        assert dims is not None
        together = all(self.dims[n] == dims for n in node.all_input_nodes)
        operand = first if isinstance(first, fx.Node) else source
        return Placed(node, bind(node), dims, self.sizes(operand), self.sizes(node), operand, self.values, together)

    def edge(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        """The tables of a node that is no barrier and one of its feature maps."""
        key = (node, operand, axis)
        if key not in self._edges:
            self._edges[key] = self._made(node, operand, axis)
        return self._edges[key]

    def _made(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        row, dims = op(node), self.dims[node]
        count, size = self.rows(node, axis), self.rows(operand, axis)
        rule = self.window(node) if row.window is not None else None
        taps = row.taps or (_window_taps if rule is not None else _row_by_row)
        axes = len(self.sizes(node)) - 2 if dims == NCHW else len(dims or ())
        low, high = taps(At(node, axis, axes, count, size, self.values, rule))
        return Edge(low, high, size)

    def window(self, node: fx.Node) -> Window:
        """The window of a conv or pool, over as many axes as its map has."""
        weight, axes = bind(node).get("weight"), len(self.sizes(node)) - 2
        return window(node, axes, shape(self.values[weight]) if isinstance(weight, fx.Node) else ())


def constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """The value of a node follows from parameters and numbers alone; ``known`` is kept between calls."""
    if node not in known:
        made = node.op == "get_attr" or (node.op.startswith("call") and not is_size(node))
        known[node] = made and all(constant(n, known) for n in node.all_input_nodes)
    return known[node]


# ---------------------------------------------------------------- where the rows lie

CONSTANT = "constant__"  # begins the names of inputs of a stage that follow from parameters: no maps


def is_weight(node: fx.Node) -> bool:
    """A computed tensor that convolutions read as their weight: no map, even where it has four dims."""
    mixes = [user for user in node.users if op(user).channel is Channel.MIXES]
    return any(node not in user.args[:1] and node in user.args[1:2] for user in mixes)


def _placed(node: fx.Node, known: Regions) -> tuple[Dims | None, str]:
    """Where H and W of a node's value lie, and why no piece of it can be made of pieces of its operands."""
    sizes, row, name = known.sizes(node), op(node), op_name(node)
    if is_weight(node):
        return None, "the weight of a convolution"
    if node.op == "placeholder":
        is_map = len(sizes) in MAPS and not str(node.target).startswith(CONSTANT)
        return (NCHW if is_map else None), "an input of the model"
    if known.constant(node):
        return None, "made of parameters alone"
    if node.op in ("get_attr", "output") or not isinstance(known.values[node], torch.Tensor | list | tuple):
        return None, f"{name or node.op} returns no feature map"
    maps = known.maps(node)
    leads = row.reduces == "moments" or known.leads(node)
    whole = NCHW if len(sizes) in MAPS and leads else None  # a new map, complete at once
    if not maps:
        return whole, f"{name or node.target} reads no feature map"
    dims = known.dims[maps[0]]
    assert dims is not None
    at = known.placed(node)
    if row.refuses is not None and (why := row.refuses(at)):
        return whole, why
    if row.spatial in (Spatial.WINDOW, Spatial.RESIZE, Spatial.PAD):
        like = dims == NCHW and len(sizes) in MAPS and len(known.sizes(maps[0])) == len(sizes)
        why = "" if like else f"{name} does not read a map with channels in front"
        if like and row.window is not None and len(known.window(node).kernel) != len(sizes) - 2:
            why = f"{name} reads a map without a batch"
        if not isinstance(known.values[node], torch.Tensor):
            why = f"{name} returns more than a map"
        return NCHW if not why else whole, why
    follows = row.follows or (_elementwise if row.spatial is Spatial.POINTWISE else None)
    moved = follows(at) if follows is not None else None
    if moved is not None and follows is _elementwise and not _alike(node, dims, sizes, known):
        moved = None
    if moved is not None:
        return moved, ""
    if row.spatial is Spatial.GLOBAL:
        return whole, f"{name} reduces over the whole map"
    return whole, f"{name or node.target} has no spatial rule"


def _elementwise(at: Placed) -> Dims | None:
    return at.dims


def _alike(node: fx.Node, dims: Dims, sizes: tuple[int, ...], known: Regions) -> bool:
    """Every operand is a map in the same place, or has one row and one column (it is broadcast)."""
    apart = per_channel(node)
    for operand in node.all_input_nodes:
        given = known.sizes(operand)
        if not isinstance(known.values[operand], torch.Tensor):
            continue
        if known.dims[operand] is not None:
            if len(given) != len(sizes) or known.dims[operand] != dims:
                return False
        elif operand not in apart:
            back = [d - len(sizes) for d in dims]
            if any(-b <= len(given) and given[b] != 1 for b in back):
                return False
    return max(dims) < len(sizes)


# ---------------------------------------------------------------- tables of operations without one of their own


def _window_taps(at: At) -> Taps:
    rule, axis = at.window, at.axis
    assert rule is not None
    k, s, d, p = rule.kernel[axis], rule.stride[axis], rule.dilation[axis], rule.padding[axis]
    if rule.transposed:
        low = np.clip(-(-(at.rows + p - d * (k - 1)) // s), 0, at.size - 1)
        return low, np.clip((at.rows + p) // s + 1, low + 1, at.size)
    low = at.rows * s - p
    return low, low + d * (k - 1) + 1


def _row_by_row(at: At) -> Taps:
    """The same row; all of them where there are others (a single one that is broadcast)."""
    if at.size == at.count:
        return at.rows, at.rows + 1
    return np.zeros(at.count, int), np.full(at.count, at.size)
