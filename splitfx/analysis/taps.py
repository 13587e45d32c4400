"""Taps: which rows of the whole map single operations read, where that is more than a window's arithmetic.

Pads, resizes and adaptive pools, by the positions in the whole map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from splitfx.ir.ops import bind, op_name

Values = Mapping[fx.Node, Any]  # of all nodes, at the size of the whole map: arguments may follow from sizes
PADS = ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d")


def adaptive_size(node: fx.Node, values: Values) -> tuple[int, int] | None:
    """Output size of an adaptive average or max pool; None for any other operation."""
    if op_name(node) not in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        return None
    given = bind(node, values)["output_size"]
    pair = tuple(given) if isinstance(given, Sequence) else (given, given)
    return int(pair[0]), int(pair[1])


def pads(node: fx.Node, values: Values) -> list[int]:
    """What a padding operation puts at each side, the last dim first."""
    given = bind(node, values)
    return [int(v) for v in (given.get("pad") or given["padding"])]


def pad_before(node: fx.Node, axis: int, values: Values) -> int:
    """Rows that a padding operation puts in front; negative where it cuts them off."""
    given, place = pads(node, values), 2 * (1 - axis)
    return given[place] if place < len(given) else 0


def padding_mode(node: fx.Node) -> str:
    """``constant``, ``reflect``, ``replicate`` or ``circular``, of a padding operation."""
    name = op_name(node)
    known = {"reflection_pad2d": "reflect", "replication_pad2d": "replicate", "constant_pad_nd": "constant"}
    return known.get(name) or bind(node).get("mode") or "constant"


def padded_rows(node: fx.Node, axis: int, count: int, size: int, values: Values) -> np.ndarray:
    """The source row of every output row of a padding operation; outside [0, size) where it is constant."""
    rows = np.arange(count) - pad_before(node, axis, values)
    mode = padding_mode(node)
    if mode == "reflect" and size > 1:
        rows = (size - 1) - np.abs((size - 1) - np.abs(rows))
    return np.clip(rows, 0, size - 1) if mode in ("reflect", "replicate") else rows


def resize_taps(node: fx.Node, axis: int, count: int, size: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Source rows [taps, output rows] of a resize along an axis, and their weights.

    Coordinates come from the sizes of the whole map: `interpolate` on a piece would start its grid anew. Weights, and
    nearest rows, are asked of torch's own kernel: how it rounds depends on the number type, and far down a map that
    shows. Each map that it is given marks every n-th row, of which no more than one is in the reach of n taps.
    """
    name, scale, corners = op_name(node), resize_scale(node, axis), bool(bind(node).get("align_corners"))
    dtype = dtype if dtype == torch.float64 else torch.float32

    def asked(maps: torch.Tensor) -> np.ndarray:
        """Maps [n, size] resized to [n, count]."""
        n = len(maps)
        shapes = ((1, n, size, 1), [count, 1]) if axis == 0 else ((1, n, 1, size), [1, count])
        scales = (scale, None) if axis == 0 else (None, scale)
        return resized(name, maps.view(shapes[0]), shapes[1], corners, *scales).view(n, count).numpy()

    with _disable_current_modes():
        if "nearest" in name:
            return asked(torch.arange(size, dtype=dtype, device="cpu")[None]).astype(int), np.ones((1, count))
        at = np.arange(count, dtype=np.float64)
        if corners:
            at *= (size - 1) / (count - 1) if count > 1 else 0.0
        else:
            at = (at + 0.5) * (size / count if scale is None else 1 / scale) - 0.5
        reach = np.arange(-1, 3) if "bicubic" in name else np.arange(2)
        low = np.floor(at if "bicubic" in name else np.clip(at, 0, size - 1)).astype(int)
        rows = np.clip(low + reach[:, None], 0, size - 1)
        n = len(reach)
        share = asked((torch.arange(size, device="cpu") % n == torch.arange(n, device="cpu")[:, None]).to(dtype))
    share = np.take_along_axis(share, rows % n, 0)
    share[1:][rows[1:] == rows[:-1]] = 0  # at the border, where several taps read one row
    return rows, share


def resized(
    name: str, x: torch.Tensor, sizes: list[int], corners: bool, by_rows: float | None, by_columns: float | None
) -> torch.Tensor:
    """A resize of 4-D ``x`` by the kernel of torch that bears this name, to ``sizes``, at the factors given."""
    aten = torch.ops.aten
    if "nearest" in name:
        kernel = aten._upsample_nearest_exact2d if "exact" in name else aten.upsample_nearest2d
        return kernel(x, sizes, by_rows, by_columns)
    kernel = aten.upsample_bicubic2d if "bicubic" in name else aten.upsample_bilinear2d
    return kernel(x, sizes, corners, by_rows, by_columns)


def resize_scale(node: fx.Node, axis: int) -> float | None:
    """The factor that a resize was given along an axis; None where it was given a size."""
    a = bind(node)
    factors = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
    factor = factors[axis]
    return None if factor is None else float(factor)
