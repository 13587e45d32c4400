"""Taps: which rows of the whole map single operations read, where that is more than a window's arithmetic.

Pads, resizes and adaptive pools, by the positions in the whole map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from splitfx.ops import bind, op_name

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

    Coordinates come from the sizes of the whole map: `interpolate` on a piece would start its grid anew.
    """
    name, scale = op_name(node), resize_scale(node, axis)
    if "nearest" in name:
        return _nearest(name, axis, count, size, scale, dtype)[None], np.ones((1, count))
    rows = np.arange(count, dtype=np.float64)
    if bind(node).get("align_corners"):
        at = rows * ((size - 1) / (count - 1) if count > 1 else 0.0)
    else:
        at = (rows + 0.5) * (size / count if scale is None else 1 / scale) - 0.5
    if "bicubic" in name:
        low = np.floor(at).astype(int)
        return np.clip(low + np.arange(-1, 3)[:, None], 0, size - 1), _cubic(at - low)
    at = np.maximum(at, 0)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    share = np.clip(at - low, 0, 1)
    return np.stack([low, np.minimum(low + 1, size - 1)]), np.stack([1 - share, share])


def _nearest(name: str, axis: int, count: int, size: int, scale: float | None, dtype: torch.dtype) -> np.ndarray:
    """Asked of the kernel itself: how it rounds depends on the number type, and is another one in 1-D."""
    form, counts, scales = [1, 1, 1, 1], [1, 1], [1.0, 1.0]
    form[2 + axis], counts[axis], scales[axis] = size, count, scale or 1.0
    mode = "nearest-exact" if "exact" in name else "nearest"
    exact = dtype if dtype == torch.float64 else torch.float32
    with _disable_current_modes():
        rows = torch.arange(size, dtype=exact).view(form)
        if scale is None:
            found = functional.interpolate(rows, size=counts, mode=mode)
        else:
            found = functional.interpolate(rows, scale_factor=scales, mode=mode)
        return found.flatten().long().numpy()


def _cubic(share: np.ndarray) -> np.ndarray:
    """Weights [4, rows] of Keys' cubic convolution, with the constant that torch uses."""
    a = -0.75
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1  # noqa: E731
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a  # noqa: E731
    return np.stack([far(share + 1), near(share), near(1 - share), far(2 - share)])


def resize_scale(node: fx.Node, axis: int) -> float | None:
    """The factor that a resize was given along an axis; None where it was given a size."""
    a = bind(node)
    factors = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
    factor = factors[axis]
    return None if factor is None else float(factor)
