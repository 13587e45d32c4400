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
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from splitfx.analysis.shapes import shape
from splitfx.ir.ops import Channel, Spatial, Window, bind, is_size, op, op_name, per_channel, window
from splitfx.ir.ops.families.padding import sides
from splitfx.ir.ops.row import At, Dims, Laid, Placed, Taps

NCHW: Dims = (2, 3)  # also of a volume, whose third axis is whole in every piece
NCL: Dims = (2, 2)  # a sequence, whose rows are its places
GATE = 4  # a sequence of fewer numbers than a fourth of the map before it is no map of its own
MAPS = {3: NCL, 4: NCHW, 5: NCHW}  # by dims, batch and channels in front: a sequence, an image, a volume


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

    def repeats(self, start: int, stop: int, rows: int, by: int) -> bool:
        """Within output rows [start, stop), none of which reads padding, each reads ``by`` operand rows further down
        than the one ``rows`` above it."""
        if stop > len(self.low) or self.low[start] < 0 or self.high[stop - 1] > self.size:
            return False
        low, high = np.array(self.low[start:stop]), np.array(self.high[start:stop])
        return all(bool((table[rows:] == table[:-rows] + by).all()) for table in (low, high))


class Regions:
    """The spatial rules of one graph's nodes, at the sizes of ``values``."""

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self.values = values
        self.before = made_before(values)
        self.dims: dict[fx.Node, Dims | None] = {}
        self.extents: dict[fx.Node, tuple[int, int]] = {}  # rows and columns of the maps
        self.beside: set[fx.Node] = set()  # windows and pads over other axes than rows and columns
        self.across: set[fx.Node] = set()  # every column of them follows from all columns
        self._why: dict[fx.Node, str] = {}
        self._constant: dict[fx.Node, bool] = {}
        self._leads: dict[fx.Node, bool] = {}
        for node in reversed(values):
            self.leads(node)
        self._edges: dict[tuple[fx.Node, fx.Node, int], Edge] = {}
        self._behind: dict[fx.Node, int] = {}  # numbers in the largest map that a value without rows follows from
        for node in values:
            dims, self._why[node] = _placed(node, self)
            if isinstance(dims, Laid) and dims.across:
                self.across.add(node)
            self._lie(node, dims)
            here = 0 if dims is None else prod(self.sizes(node))
            self._behind[node] = here or max((self._behind[n] for n in node.all_input_nodes), default=0)

    def gate(self, node: fx.Node) -> bool:
        """A sequence or a map of one place that is small beside the maps it was reduced from, such as the channels of a
        gate (ECA)."""
        behind, sizes = max((self._behind[n] for n in node.all_input_nodes), default=0), self.sizes(node)
        return (len(sizes) == 3 or prod(sizes[2:]) == 1) and GATE * prod(sizes) < behind

    def _lie(self, node: fx.Node, dims: Dims | None) -> None:
        self.dims[node] = tuple(dims) if dims is not None else None
        if dims is None:
            return
        sizes, before = self.sizes(node), next(iter(self.maps(node)), None)
        columns = self.extents[before][1] if before is not None and not self._why[node] else 1
        if dims[0] != dims[1]:
            extent = (sizes[dims[0]], sizes[dims[1]])
        else:
            extent = (sizes[dims[0]] // max(1, columns), columns)
        self.extents[node] = getattr(dims, "extent", None) or extent

    def rows(self, node: fx.Node, axis: int) -> int:
        """Size of a feature map along a spatial axis; 1 for values without one."""
        return self.extents[node][axis] if self.dims[node] is not None else 1

    def taken(self, node: fx.Node) -> Sequence[fx.Node]:
        """The maps that every piece of a value reads whole."""
        row = op(node)
        return row.taken(self.placed(node)) if row.taken is not None and self.maps(node) else ()

    def sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's tensor, or of the first part of a tuple."""
        value = self.values[node]
        return shape(value[0]) if isinstance(value, list | tuple) and value else shape(value)

    def barrier(self, node: fx.Node) -> str:
        """Why no piece of this node can be computed from a piece of its operands; empty where it can."""
        return self._why[node]

    def constant(self, node: fx.Node) -> bool:
        """The value follows from parameters and numbers alone, or is made before any stage."""
        return node in self.before or constant(node, self._constant)

    def lay(self, constant: fx.Node, back: tuple[int, ...], extent: tuple[int, int] | None) -> bool:
        """A value that follows from parameters has rows, ``back`` from its last dim; False where it has others."""
        dims = tuple(d + len(self.sizes(constant)) for d in back)
        if self.dims[constant] is None:
            self._lie(constant, Laid(dims, extent))
        return self.dims[constant] == dims and extent in (None, self.extents[constant])

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
            return row.axes in (0, rank - 2)
        keeps = row.spatial in (Spatial.POINTWISE, Spatial.MOVE) and user in self.values
        return keeps and rank == len(self.sizes(user)) and self.leads(user)

    def misread(self, node: fx.Node) -> str:
        """Why a node does not see the axes of its map as they lie: without a batch they are one further in front."""
        row, first = op(node), node.args[0] if node.args else None
        axes = len(self.sizes(first)) - 2 if isinstance(first, fx.Node) else row.axes
        own = row.axes or (len(self._own_window(node).kernel) if row.window is not None else axes)
        return "" if own == axes else f"{op_name(node)} reads a map without a batch"

    def placed(self, node: fx.Node) -> Placed:
        """What the row of a node that reads a map is asked with."""
        first, source = node.args[0] if node.args else None, self.maps(node)[0]
        dims = self.dims[source]
        assert dims is not None
        together = all(self.dims[n] == dims for n in node.all_input_nodes)
        operand = first if isinstance(first, fx.Node) else source
        sizes, extent = (self.sizes(operand), self.sizes(node)), self.extents[source]
        return Placed(node, bind(node), dims, *sizes, operand, self.values, together, extent, self.dims, self.extents)

    def edge(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        """The tables of a node that is no barrier and one of its feature maps."""
        key = (node, operand, axis)
        if key not in self._edges:
            self._edges[key] = self._made(node, operand, axis)
        return self._edges[key]

    def _made(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        row, dims = op(node), self.dims[node]
        count, size = self.rows(node, axis), self.rows(operand, axis)
        if axis == 1 and node in self.across:
            return Edge(np.zeros(count, int), np.full(count, size), size)
        rule = self.window(node) if row.window is not None else None
        taps = row.taps or (_window_taps if rule is not None else _row_by_row)
        taps = _row_by_row if node in self.beside else taps
        axes = len(self.sizes(node)) - 2 if dims in (NCHW, NCL) else len(dims or ())
        low, high = taps(At(node, axis, axes, count, size, self.values, rule, self.dims[operand]))
        return Edge(low, high, size)

    def window(self, node: fx.Node) -> Window:
        """The window of a conv or pool, over as many axes as its map has."""
        found = self._own_window(node)
        return found if len(self.sizes(node)) > 3 else found.with_column()

    def _own_window(self, node: fx.Node) -> Window:
        weight, axes = bind(node).get("weight"), len(self.sizes(node)) - 2
        return window(node, axes, shape(self.values[weight]) if isinstance(weight, fx.Node) else ())


def made_before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What follows from sizes and parameters alone where some of it is written through views, such as the mask of a
    shifted window: it is computed before a stage, in its own order."""
    found: set[fx.Node] = set()
    if any(n.meta.get("writes_view") for n in nodes):
        for node in nodes:
            given = node.all_input_nodes
            if op_name(node).startswith("new_"):
                given = [n for n in given if n.op != "placeholder"]  # which lends its type only
            alone = all(n in found or n.op == "get_attr" or is_size(n) for n in given)
            if node.op == "call_function" and not is_size(node) and alone and _repeats(node):
                found.add(node)
    return found


def _repeats(node: fx.Node) -> bool:
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not draws and node.target is not torch._C._set_grad_enabled


def reduced_dims(dims: Dims, rank: int) -> Dims:
    """The dims of a map that a reduction takes in: rows and columns, and of a volume the third axis."""
    return tuple(range(2, rank)) if dims in (NCHW, NCL) else tuple(dict.fromkeys(dims))


def constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """The value of a node follows from parameters and numbers alone; ``known`` is kept between calls."""
    if node.op == "placeholder":
        return str(node.target).startswith(CONSTANT)
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
        is_map = is_map and (len(sizes) > 3 or known.leads(node))
        return (MAPS[len(sizes)] if is_map else None), "an input of the model"
    if known.constant(node):
        return None, "made of parameters alone"
    if node.op in ("get_attr", "output") or not isinstance(known.values[node], torch.Tensor | list | tuple):
        return None, f"{name or node.op} returns no feature map"
    maps = known.maps(node)
    leads = row.reduces == "moments" or known.leads(node)
    whole = MAPS.get(len(sizes)) if leads else None  # a new map, complete at once
    if not maps:
        whole = None if known.gate(node) else whole
        return whole, f"{name or node.target} reads no feature map"
    return _beside_maps(node, maps[0], whole, known)


def _beside_maps(node: fx.Node, read: fx.Node, whole: Dims | None, known: Regions) -> tuple[Dims | None, str]:
    """The same of what reads a map; ``whole``: where its rows lie once it is complete."""
    sizes, row, name = known.sizes(node), op(node), op_name(node)
    dims, at = known.dims[read], known.placed(node)
    assert dims is not None
    if row.reduces == "moments" and known.sizes(read) == sizes:
        whole = Laid(dims, at.extent)  # a norm leaves every value in its place
    if row.reduces == "exponentials" and row.consumes is not None and not row.consumes(at):
        return Laid(dims, at.extent), f"{name} runs along the whole map"
    if row.spatial in (Spatial.WINDOW, Spatial.PAD) and _beside_rows(node, at, known):
        known.beside.add(node)
        return dims, ""
    if why := known.misread(node) or (row.refuses(at) if row.refuses is not None else ""):
        return whole, why
    if row.spatial in (Spatial.WINDOW, Spatial.RESIZE, Spatial.PAD):
        laid = _resampled(node, read, at, known)
        return (whole, laid) if isinstance(laid, str) else (laid, "")
    follows = row.follows or (_elementwise if row.spatial is Spatial.POINTWISE else None)
    moved = follows(at) if follows is not None else None
    if moved is not None and follows is _elementwise:
        moved = _alike(node, sizes, known)
    if moved is not None:
        return moved, ""
    if row.spatial is Spatial.GLOBAL:
        return whole, f"{name} reduces over the whole map"
    return whole, f"{name or node.target} has no spatial rule"


def _resampled(node: fx.Node, read: fx.Node, at: Placed, known: Regions) -> Dims | str:
    """Where the rows lie behind windows, another size or a padding; why not, where rows are not what is there."""
    sizes, dims, row, name = known.sizes(node), at.dims, op(node), op_name(node)
    like = MAPS.get(len(sizes)) == dims and len(known.sizes(read)) == len(sizes)
    like = like and (len(sizes) > 3 or known.extents[read][1] == 1)
    if not isinstance(known.values[node], torch.Tensor):
        return f"{name} returns more than a map"
    if not like and row.spatial is not Spatial.PAD:  # of a constant, wherever rows lie
        return f"{name} does not read a map with channels in front"
    sequence = dims == NCL and len(sizes) == 3 and at.extent[1] == 1
    extent = (sizes[dims[0]], 1) if sequence else at.extent if at.joined else None
    return Laid(dims, extent, across=row.wraps is not None and row.wraps(at))


def _beside_rows(node: fx.Node, at: Placed, known: Regions) -> bool:
    """A pool or a padding that leaves rows and columns alone, such as one over channels that were made an axis."""
    row = op(node)
    if row.convolves or len(at.given) != len(at.sizes) or at.joined:
        return False
    if row.window is not None:
        rule = known.window(node)
        places = [d - len(at.given) + len(rule.kernel) for d in at.dims]
        return min(places) >= 0 and all(rule.kernel[i] == rule.stride[i] == 1 and not rule.padding[i] for i in places)
    if row.spatial is not Spatial.PAD or at.dims == MAPS.get(len(at.given)):
        return False
    return all(at.given[d] == at.sizes[d] and not any(_sides(node, at, d)) for d in at.dims)


def _sides(node: fx.Node, at: Placed, dim: int) -> list[int]:
    """What a padding puts at both sides of a dim."""
    given, place = sides(node, at.values), 2 * (at.rank - 1 - dim)
    return given[place : place + 2]


def _elementwise(at: Placed) -> Dims | None:
    return at.dims


def _alike(node: fx.Node, sizes: tuple[int, ...], known: Regions) -> Dims | None:
    """Where the rows of an element-by-element result lie: every operand is a map with its rows and columns there, or
    has one row (it is broadcast). None for anything else."""
    maps = [n for n in known.maps(node) if n not in per_channel(node)]
    places = {tuple(d - len(known.sizes(n)) for d in known.dims[n] or ()) for n in maps}
    if len(places) != 1:
        return None
    back = places.pop()
    dims, across = tuple(d + len(sizes) for d in back), False
    columns = {known.extents[n][1] for n in maps}
    if dims[0] == dims[1] and len(columns) > 1:
        return None
    for operand in node.all_input_nodes:
        given = known.sizes(operand)
        if operand in maps or operand in per_channel(node) or not isinstance(known.values[operand], torch.Tensor):
            continue
        if -back[0] <= len(given) and given[back[0]] != 1:
            extent = known.extents[maps[0]] if dims[0] == dims[1] else None
            table = given[back[0]] == sizes[dims[0]] and known.constant(operand)
            if not table or not known.lay(operand, back, extent):
                return None  # else it is a table of positions: read row by row like any other map
        elif -back[1] <= len(given) and given[back[1]] != 1:
            across = True
    return Laid(dims, across=across)


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
