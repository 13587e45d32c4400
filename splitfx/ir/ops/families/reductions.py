"""Reductions over dims: means, sums, extremes, deviations, norms of vectors."""

from __future__ import annotations

from typing import Any

import torch

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import Bound, Channel, Dims, Laid, Placed, Spatial, rows


def _over(bound: Bound, rank: int) -> set[int]:
    """The dims that are reduced; all of them where none is named."""
    given = bound.get("dim")
    dims = {int(d) % rank for d in (given if isinstance(given, list | tuple) else [given]) if d is not None}
    return dims or set(range(rank))


def _over_others(at: Placed) -> Dims | None:
    """Where the rows go in a reduction over other dims, such as a mean over channels or over columns."""
    over = _over(at.bound, at.rank)
    value = at.values[at.node]
    if at.dims[0] in over or not isinstance(value if isinstance(value, torch.Tensor) else value[0], torch.Tensor):
        return None
    columns = at.dims[1] in over
    if at.bound.get("keepdim"):
        return Laid(at.dims, across=True) if columns else at.dims
    dims = tuple(axis - sum(d < axis for d in over) for axis in at.dims)
    return Laid((dims[0], dims[0]), (at.extent[0], 1), across=True) if columns else dims


def _over_rows(at: Placed) -> str:
    """Why a reduction cannot take its map in row by row."""
    rows_too = at.dims[0] in _over(at.bound, at.rank) and at.bound.get("dtype") is None
    return "" if rows_too else f"{op_name(at.node)} reduces over other dims"


def _first(job: Job) -> Call:
    """Extremes along a dim without their places."""
    given = bind(job.node)
    extreme: Any = torch.amax if op_name(job.node) == "max" else torch.amin
    dim, keep = int(given["dim"]) if "dim" in given else 0, bool(given.get("keepdim"))

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        return extreme(pieces[0], dim, keep)

    return call


_REDUCES: dict[str, Any] = {
    "spatial": Spatial.GLOBAL,
    "channel": Channel.SAME,
    "per_input": 1,
    "consumes": _over_rows,
    "over": _over,
    "follows": _over_others,
}
for _name, _how in (("mean", "mean"), ("sum", "sum"), ("amax", "max"), ("amin", "min")):
    rows(_name, **_REDUCES, reduces=_how)
rows("var std", **_REDUCES, reduces="deviation")
rows("linalg_vector_norm norm", **_REDUCES, reduces="norm")
rows("var_mean", spatial=Spatial.GLOBAL, channel=Channel.SAME, per_input=1)


def _one_extreme(at: Placed) -> Dims | None:
    return _over_others(at) if at.bound.get("dim") is not None else None


rows(
    "max min",
    spatial=Spatial.GLOBAL,
    channel=Channel.SAME,
    per_input=1,
    first_part=True,
    follows=_one_extreme,
    piece=_first,
)
rows("argmax argmin", spatial=Spatial.GLOBAL, per_input=1, follows=_one_extreme)
