"""Regions: which rows a piece of a node's output needs, and what can be made of the rows that are there.

Half-open intervals in global coordinates, per node, operand and spatial axis (0 is H, 1 is W), read off the operation
table. An `Edge` is two tables: output row i reads operand rows [low[i], high[i]). For a window of kernel k, stride s,
padding p, dilation d

    low[i] = i*s - p,   high[i] = i*s - p + d*(k - 1) + 1,

which may lie outside the map: what is clipped there is the real padding, so only pieces at a border pad. *Backward*
(`needs`) looks the tables up; *forward* (`ready`) searches the same tables, so the two cannot disagree.

Where H and W lie is followed from node to node (`Regions.dims`), so channels-last stretches of a network (permute,
layer norm over channels, linear) are maps like any other. Reductions over a map and whatever the table does not know
are barriers, with the reason.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis.shapes import shape
from splitfx.analysis.taps import PADS, adaptive_size, pad_before, padded_rows, padding_mode, pads, resize_taps
from splitfx.ir.graph import module_of
from splitfx.ir.layers import FunctionalBatchNorm
from splitfx.ir.ops import Spatial, Window, bind, is_size, op, op_name, slices_all, window

Dims = tuple[int, int]
NCHW: Dims = (2, 3)
AXES = ("rows", "columns")


class Edge:
    """How the rows of a node follow from those of one operand, along one axis."""

    __slots__ = ("high", "identity", "low", "size")

    def __init__(self, low: np.ndarray, high: np.ndarray, size: int, identity: bool = False) -> None:
        # Rows at a mirrored border are read backwards: running extremes keep both tables rising, and a piece asks
        # at most for more than it reads.
        self.low: list[int] = np.minimum.accumulate(low[::-1])[::-1].tolist()
        self.high: list[int] = np.maximum.accumulate(high).tolist()
        self.size = size
        self.identity = identity

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

    def edge(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        """The tables of a node that is no barrier and one of its feature maps."""
        key = (node, operand, axis)
        if key not in self._edges:
            self._edges[key] = self._made(node, operand, axis)
        return self._edges[key]

    def _made(self, node: fx.Node, operand: fx.Node, axis: int) -> Edge:
        count, size, rule = self.rows(node, axis), self.rows(operand, axis), op(node).spatial
        rows = np.arange(count)
        if rule is Spatial.WINDOW:
            return _window_edge(self.window(node), axis, rows, size)
        if rule is Spatial.RESIZE:
            return self._resize_edge(node, axis, rows, size)
        if op_name(node) in PADS:
            source = padded_rows(node, axis, count, size, self.values)
            if padding_mode(node) == "constant":
                before = pad_before(node, axis, self.values)
                return Edge(rows - before, rows - before + 1, size)
            return Edge(source, source + 1, size)
        if rule is Spatial.GLOBAL and adaptive_size(node, self.values) is not None:
            return Edge(rows * size // count, -(-(rows + 1) * size // count), size)
        if size == count:
            return Edge(rows, rows + 1, size, identity=True)
        return Edge(np.zeros(count, int), np.full(count, size), size)

    def window(self, node: fx.Node) -> Window:
        weight = bind(node).get("weight")
        return window(node, weight_shape=shape(self.values[weight]) if isinstance(weight, fx.Node) else ())

    def _resize_edge(self, node: fx.Node, axis: int, rows: np.ndarray, size: int) -> Edge:
        name = op_name(node)
        if name == "pixel_shuffle":
            ratio = int(bind(node)["upscale_factor"])
            return Edge(rows // ratio, rows // ratio + 1, size)
        if name == "pixel_unshuffle":
            ratio = int(bind(node)["downscale_factor"])
            return Edge(rows * ratio, rows * ratio + ratio, size)
        taps, _ = resize_taps(node, axis, len(rows), size, self.values[node].dtype)
        return Edge(taps.min(0), taps.max(0) + 1, size)


def constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """The value of a node follows from parameters and numbers alone; ``known`` is kept between calls."""
    if node not in known:
        made = node.op == "get_attr" or (node.op.startswith("call") and not is_size(node))
        known[node] = made and all(constant(n, known) for n in node.all_input_nodes)
    return known[node]


# ---------------------------------------------------------------- where the rows lie

CONSTANT = "constant__"  # begins the names of inputs of a stage that follow from parameters: no maps

_OVER_DIMS = ("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_SAME_AS_FIRST = ("contiguous", "clone", "leaf", "identity", *_DROPOUTS)
RESHAPES = ("view", "_unsafe_view", "reshape")
PARTS = ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")


def is_weight(node: fx.Node) -> bool:
    """A computed tensor that convolutions read as their weight: no map, even where it has four dims."""
    return any(op(user).macs and node not in user.args[:1] and node in user.args[1:2] for user in node.users)


def _placed(node: fx.Node, known: Regions) -> tuple[Dims | None, str]:
    """Where H and W of a node's value lie, and why no piece of it can be made of pieces of its operands."""
    sizes, row, name = known.sizes(node), op(node), op_name(node)
    if is_weight(node):
        return None, "the weight of a convolution"
    if node.op == "placeholder":
        is_map = len(sizes) == 4 and not str(node.target).startswith(CONSTANT)
        return (NCHW if is_map else None), "an input of the model"
    if known.constant(node):
        return None, "made of parameters alone"
    if node.op in ("get_attr", "output") or not isinstance(known.values[node], torch.Tensor | list | tuple):
        return None, f"{name or node.op} returns no feature map"
    maps = known.maps(node)
    whole = NCHW if len(sizes) == 4 else None  # what a barrier returns is a new map, complete at once
    if not maps:
        return whole, f"{name or node.target} reads no feature map"
    dims = known.dims[maps[0]]
    assert dims is not None
    if row.spatial in (Spatial.WINDOW, Spatial.RESIZE) or name in PADS:
        why = "" if dims == NCHW and len(sizes) == 4 else f"{name} does not read a map with channels in front"
        if not isinstance(known.values[node], torch.Tensor):
            why = f"{name} returns more than a map"
        if name in PADS and padding_mode(node) == "circular":
            why = "circular padding has no rule"
        if name in PADS and len(pads(node, known.values)) > 4:
            why = "padding of channels has no rule"
        return NCHW if not why else whole, why
    if row.spatial is Spatial.GLOBAL:
        inner = _reduced(node, dims, known)
        if inner is not None:
            return inner, ""
        if adaptive_size(node, known.values) not in (None, (1, 1)) and name == "adaptive_avg_pool2d" and dims == NCHW:
            return NCHW, ""
        return whole, f"{name} reduces over the whole map"
    if name == "batch_norm" and _of_the_batch(node):
        return whole, "batch_norm takes its statistics from the batch, in eval mode too"
    moved = _moved(node, name, dims, known)
    if moved is not None:
        return moved, ""
    return whole, f"{name or node.target} has no spatial rule"


def _reduced(node: fx.Node, dims: Dims, known: Regions) -> Dims | None:
    """Where H and W go in a reduction over other dims, such as a mean over channels; None for one over H or W."""
    given, source = bind(node).get("dim"), known.maps(node)[0]
    if op_name(node) not in _OVER_DIMS or given in (None, [], ()):
        return None
    rank = len(known.sizes(source))
    over = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given])}
    if over & set(dims) or not isinstance(known.values[node], torch.Tensor):
        return None
    if bind(node).get("keepdim"):
        return dims
    return dims[0] - sum(d < dims[0] for d in over), dims[1] - sum(d < dims[1] for d in over)


def _of_the_batch(node: fx.Node) -> bool:
    """A batch norm without running statistics, or one that is called in train mode for good."""
    module = module_of(node)
    if isinstance(module, FunctionalBatchNorm):
        return len(node.args) > 3 and node.args[3] is None
    if module is not None:
        return getattr(module, "running_mean", None) is None
    return bool(bind(node).get("training")) or bind(node).get("running_mean") is None


def _acts(node: fx.Node, known: Regions) -> bool:
    """A leaf of the user's, or a dropout, that is not its operand itself in eval mode."""
    if op_name(node) == "leaf":
        same = known.values[node] is known.values[node.all_input_nodes[0]]
        return not same and not isinstance(module_of(node), nn.RReLU)
    return node.op == "call_function" and op_name(node) in _DROPOUTS and bool(bind(node).get("train"))


def _moved(node: fx.Node, name: str, dims: Dims, known: Regions) -> Dims | None:
    """Where H and W go, for operations that leave every row by itself; None for those that do not."""
    first = node.args[0] if node.args else None
    source = first if isinstance(first, fx.Node) else known.maps(node)[0]
    given, sizes = known.sizes(source), known.sizes(node)
    rank = len(given)
    if _acts(node, known):
        return None
    if name in _SAME_AS_FIRST or (name in ("layer_norm", "softmax", "log_softmax", "glu", "linear", "rms_norm")):
        return dims if not _inner(node, name, rank) & set(dims) else None
    if name == "cat":
        dim = bind(node).get("dim") or 0
        alike = all(known.dims[n] == dims for n in node.all_input_nodes)
        return dims if alike and dim % rank not in dims else None
    if name in ("permute", "transpose"):
        order = _order(node, name, rank)
        return order.index(dims[0]), order.index(dims[1])
    if name in RESHAPES:
        return _reshaped(given, sizes, dims)
    if name in PARTS:
        return dims if (bind(node).get("dim") or 0) % rank not in dims else None
    if name == "getitem":
        return dims if isinstance(known.values[source], list | tuple) else None
    if name in ("slice", "narrow"):
        whole = sizes[dims[0]] == given[dims[0]] and sizes[dims[1]] == given[dims[1]]
        elsewhere = (bind(node).get("dim") or 0) % rank not in dims
        return dims if whole and (elsewhere or slices_all(node)) else None
    if name == "channel_shuffle":
        return dims
    if op(node).spatial is Spatial.POINTWISE and name != "glu_gate":
        return dims if _elementwise(node, dims, sizes, known) else None
    return None


def _elementwise(node: fx.Node, dims: Dims, sizes: tuple[int, ...], known: Regions) -> bool:
    """Every operand is a map in the same place, or has one row and one column (it is broadcast)."""
    for operand in node.all_input_nodes:
        given = known.sizes(operand)
        if not isinstance(known.values[operand], torch.Tensor):
            continue
        if known.dims[operand] is not None:
            if len(given) != len(sizes) or known.dims[operand] != dims:
                return False
        else:
            back = [d - len(sizes) for d in dims]
            if any(-b <= len(given) and given[b] != 1 for b in back) and op_name(node) not in _PER_CHANNEL:
                return False
    return max(dims) < len(sizes)


_PER_CHANNEL = ("batch_norm", "prelu")


def _inner(node: fx.Node, name: str, rank: int) -> set[int]:
    """The dims that an operation mixes."""
    if name in ("layer_norm", "rms_norm"):
        return set(range(rank - len(bind(node)["normalized_shape"]), rank))
    if name in ("softmax", "log_softmax", "glu"):
        return {int(bind(node).get("dim", -1)) % rank}
    return {rank - 1} if name == "linear" else set()


def _order(node: fx.Node, name: str, rank: int) -> list[int]:
    if name == "permute":
        return [int(d) % rank for d in bind(node)["dims"]]
    order, a = list(range(rank)), bind(node)
    i, j = int(a["dim0"]) % rank, int(a["dim1"]) % rank
    order[i], order[j] = order[j], order[i]
    return order


def _reshaped(given: tuple[int, ...], sizes: tuple[int, ...], dims: Dims) -> Dims | None:
    """H and W stay H and W where the elements in front of them, and they themselves, are as many as before."""
    if dims[1] != dims[0] + 1:
        return None
    front, h, w = math.prod(given[: dims[0]]), given[dims[0]], given[dims[1]]
    for place in range(len(sizes) - 1):
        if math.prod(sizes[:place]) == front and sizes[place] == h and sizes[place + 1] == w:
            return place, place + 1
    return None


# ---------------------------------------------------------------- tables of single operations


def _window_edge(rule: Window, axis: int, rows: np.ndarray, size: int) -> Edge:
    k, s, d, p = rule.kernel[axis], rule.stride[axis], rule.dilation[axis], rule.padding[axis]
    if rule.transposed:
        low = np.clip(-(-(rows + p - d * (k - 1)) // s), 0, size - 1)
        return Edge(low, np.clip((rows + p) // s + 1, low + 1, size), size)
    low = rows * s - p
    return Edge(low, low + d * (k - 1) + 1, size, identity=k == s == 1 and p == 0)
