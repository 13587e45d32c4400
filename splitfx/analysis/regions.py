"""Regions: which rows a piece of a node's output needs, and what can be made of the rows that are there.

Half-open intervals in global coordinates, per node and spatial axis (0 is H, 1 is W), read off the operation table.
*Backward* (`Regions.needs`): for output rows [a, b) of a window of kernel k, stride s, padding p, dilation d

    lo = a*s - p,   hi = (b - 1)*s - p + d*(k - 1) + 1,   clipped to the map;

what was clipped is the real padding, so only pieces at a border pad. *Forward* (`Regions.ready`): with input rows up
to A, output rows up to (A + p - d*(k - 1) - 1) // s + 1, and all of them once A is the whole map. Reductions over the
axis and whatever the table does not know are barriers, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from splitfx.analysis.shapes import shape
from splitfx.ops import Spatial, Window, bind, op, op_name, window


@dataclass(frozen=True)
class Region:
    """Rows ``start`` to ``stop`` (exclusive); ``before`` and ``after`` count rows of padding outside the map."""

    start: int
    stop: int
    before: int = 0
    after: int = 0

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def hull(self, other: Region) -> Region:
        """The least interval that holds both."""
        return Region(min(self.start, other.start), max(self.stop, other.stop))


class Regions:
    """The spatial rules of one graph's nodes, at its traced sizes."""

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self.values = values

    def rows(self, node: fx.Node, axis: int) -> int:
        """Size of a feature map along a spatial axis; 1 for values without one."""
        sizes = shape(self.values[node])
        return sizes[2 + axis] if len(sizes) == 4 else 1

    def barrier(self, node: fx.Node) -> str:
        """Why no piece of this node can be computed from a piece of its operands; empty where it can."""
        row, name = op(node), op_name(node)
        if len(shape(self.values[node])) != 4:
            return f"{name or node.op} returns no feature map"
        if row.spatial is Spatial.GLOBAL:
            return f"{name} reduces over the whole map"
        if row.spatial is Spatial.UNKNOWN:
            return f"{name or node.target} has no spatial rule"
        if row.spatial is Spatial.MOVE and name not in _PADS:
            return f"{name} moves rows in a way that has no rule"
        if name in ("cat",) and _dim(node, self.values) != 1:
            return "cat joins rows, not channels"
        mode = bind(node).get("mode", "constant") if name in _PADS else "constant"
        return f"{mode} padding has no rule" if mode == "circular" else ""

    def needs(self, node: fx.Node, axis: int, piece: Region) -> dict[fx.Node, Region]:
        """The rows of each feature-map operand that output rows ``piece`` need.

        Operands that are broadcast along the axis, and values without rows, are needed whole: [0, size). Raises
        `ValueError` at a barrier.
        """
        why = self.barrier(node)
        if why:
            raise ValueError(why)
        return {n: self._need(node, n, axis, piece) for n in node.all_input_nodes if self._is_map(n)}

    def ready(self, node: fx.Node, axis: int, done: dict[fx.Node, int]) -> int:
        """Output rows that can be computed once each operand n has its first ``done[n]`` rows."""
        limit = self.rows(node, axis)
        for n in node.all_input_nodes:
            if self._is_map(n) and done[n] < self.rows(n, axis):
                limit = min(limit, self._reach(node, n, axis, done[n]))
        return max(0, limit)

    def _is_map(self, node: fx.Node) -> bool:
        return len(shape(self.values[node])) == 4 and node.op != "get_attr"

    def _need(self, node: fx.Node, operand: fx.Node, axis: int, piece: Region) -> Region:
        size, name, rule = self.rows(operand, axis), op_name(node), op(node).spatial
        if rule is Spatial.WINDOW:
            return _window_need(self._window(node), axis, piece, size)
        if rule is Spatial.RESIZE:
            return self._resize_need(node, name, axis, piece, size)
        if rule is Spatial.MOVE:
            return self._pad_need(node, axis, piece, size)
        return piece if size == self.rows(node, axis) else Region(0, size)

    def _reach(self, node: fx.Node, operand: fx.Node, axis: int, done: int) -> int:
        """The largest b such that output rows [0, b) need no input row at or past ``done``.

        A binary search over `_need`, so that forward and backward cannot disagree.
        """
        low, high = 0, self.rows(node, axis)
        while low < high:
            middle = (low + high + 1) // 2
            if self._need(node, operand, axis, Region(0, middle)).stop <= done:
                low = middle
            else:
                high = middle - 1
        return low

    def _window(self, node: fx.Node) -> Window:
        weight = bind(node).get("weight")
        return window(node, weight_shape=shape(self.values[weight]) if isinstance(weight, fx.Node) else ())

    def _resize_need(self, node: fx.Node, name: str, axis: int, piece: Region, size: int) -> Region:
        if name == "pixel_shuffle":
            ratio = int(bind(node)["upscale_factor"])
            return Region(piece.start // ratio, -(-piece.stop // ratio))
        if name == "pixel_unshuffle":
            ratio = int(bind(node)["downscale_factor"])
            return Region(piece.start * ratio, piece.stop * ratio)
        first, last = piece.start, piece.stop - 1
        if "nearest" in name:
            source = self._nearest(node, name, axis, size)
            return Region(int(source[first]), int(source[last]) + 1)
        reach = (1, 3) if "bicubic" in name else (0, 2)
        low = math.floor(self._source(node, axis, first, size) - 1e-6) - reach[0]
        high = math.floor(self._source(node, axis, last, size) + 1e-6) + reach[1]
        return Region(min(max(low, 0), size - 1), max(min(high, size), 1))

    def _nearest(self, node: fx.Node, name: str, axis: int, size: int) -> torch.Tensor:
        """The source row of every output row, asked of the kernel itself: its rounding is its own."""
        rows = torch.arange(size, dtype=torch.float64).view(1, 1, size)
        mode = "nearest-exact" if "exact" in name else "nearest"
        scale = self._scale(node, axis)
        if scale is not None:
            found = functional.interpolate(rows, scale_factor=scale, mode=mode)
        else:
            found = functional.interpolate(rows, size=self.rows(node, axis), mode=mode)
        return found.flatten().long()

    def _scale(self, node: fx.Node, axis: int) -> float | None:
        a = bind(node)
        factors = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
        factor = factors[axis]
        return None if factor is None else float(factor)

    def _source(self, node: fx.Node, axis: int, row: int, size: int) -> float:
        """Source coordinate of an output row, on the grid of the whole map."""
        out, scale = self.rows(node, axis), self._scale(node, axis)
        if bind(node).get("align_corners"):
            return row * (size - 1) / (out - 1) if out > 1 else 0.0
        return (row + 0.5) * (size / out if scale is None else 1 / scale) - 0.5

    def _pad_need(self, node: fx.Node, axis: int, piece: Region, size: int) -> Region:
        """Constant padding adds rows; reflect and replicate read the rows next to the border."""
        pads = list(bind(node).get("pad") or bind(node)["padding"])
        place = 2 * (1 - axis)
        before = int(pads[place]) if place < len(pads) else 0
        start, stop = piece.start - before, piece.stop - before
        low, high = min(max(start, 0), size), min(max(stop, 0), size)
        mode = bind(node).get("mode", "constant")
        if mode == "reflect" or "reflection" in op_name(node):
            low = min(low, max(0, 2 * (size - 1) - stop + 1)) if stop > size else low
            high = max(high, min(size, -start + 1)) if start < 0 else high
        elif mode == "replicate" or "replication" in op_name(node):
            low, high = min(low, size - 1), max(high, 1)
        return Region(low, max(low, high), max(0, -start), max(0, stop - size))


_PADS = ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")


def _dim(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape(values[node]))


def _window_need(rule: Window, axis: int, piece: Region, size: int) -> Region:
    k, s, d, p = rule.kernel[axis], rule.stride[axis], rule.dilation[axis], rule.padding[axis]
    if rule.transposed:
        low = -(-(piece.start + p - d * (k - 1)) // s)
        high = (piece.stop - 1 + p) // s + 1
        return Region(min(max(low, 0), size), max(min(high, size), 0))
    low, high = piece.start * s - p, (piece.stop - 1) * s - p + d * (k - 1) + 1
    start, stop = min(max(low, 0), size), max(min(high, size), 0)
    return Region(start, max(start, stop), max(0, -low), max(0, high - size))
