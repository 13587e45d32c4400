"""Reductions over dims: means, sums, extremes, variances."""

from __future__ import annotations

from typing import Any

import torch

from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import Channel, Dims, Placed, Spatial, rows


def _over(at: Placed) -> set[int]:
    given = at.bound.get("dim")
    return {int(d) % at.rank for d in (given if isinstance(given, list | tuple) else [given]) if d is not None}


def _over_others(at: Placed) -> Dims | None:
    """Where the axes go in a reduction over other dims, such as a mean over channels; None for one over them."""
    over = _over(at)
    if not over or over & set(at.dims) or not isinstance(at.values[at.node], torch.Tensor):
        return None
    if at.bound.get("keepdim"):
        return at.dims
    return tuple(axis - sum(d < axis for d in over) for axis in at.dims)


def _over_the_map(at: Placed) -> str:
    """Why a reduction cannot take its map in row by row."""
    axes = {*at.dims, *range(4, at.rank)} if at.channels_first else set(at.dims)
    whole = _over(at) == axes and bind(at.node).get("dtype") is None
    return "" if whole else f"{op_name(at.node)} reduces over other dims"


_REDUCES: dict[str, Any] = {"spatial": Spatial.GLOBAL, "channel": Channel.SAME, "per_input": 1}
for _name, _how in (("mean", "mean"), ("sum", "sum"), ("amax", "max"), ("amin", "min")):
    rows(_name, **_REDUCES, reduces=_how, consumes=_over_the_map, follows=_over_others)
rows("var std linalg_vector_norm", **_REDUCES, follows=_over_others)
rows("norm var_mean", **_REDUCES)
