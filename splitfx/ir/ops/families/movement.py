"""Data movement: concats, splits, slices, views, transposes. Where rows and channels go depends on the arguments."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces
from splitfx.ir.ops.reading import bind, op_name, slices_all
from splitfx.ir.ops.row import Channel, Dims, Placed, Result, Spatial, rows

# ---------------------------------------------------------------- where the rows go


def _beside(at: Placed) -> Dims | None:
    """Cut or joined along another dim than the axes."""
    return at.dims if int(at.bound.get("dim") or 0) % at.rank not in at.dims else None


def _sliced(at: Placed) -> Dims | None:
    whole = all(at.sizes[d] == at.given[d] for d in at.dims)
    return at.dims if whole and (_beside(at) or slices_all(at.node)) else None


def _turned(at: Placed) -> Dims | None:
    if op_name(at.node) == "permute":
        order = [int(d) % at.rank for d in at.bound["dims"]]
    else:
        order = list(range(at.rank))
        i, j = int(at.bound["dim0"]) % at.rank, int(at.bound["dim1"]) % at.rank
        order[i], order[j] = order[j], order[i]
    return tuple(order.index(d) for d in at.dims)


def _reshaped(at: Placed) -> Dims | None:
    """The axes stay where the elements in front of them, and they themselves, are as many as before."""
    first, count = at.dims[0], len(at.dims)
    if at.dims != tuple(range(first, first + count)):
        return None
    front, extent = math.prod(at.given[:first]), at.given[first : first + count]
    for place in range(len(at.sizes) - count + 1):
        if math.prod(at.sizes[:place]) == front and at.sizes[place : place + count] == extent:
            return tuple(range(place, place + count))
    return None


def _one_of_them(at: Placed) -> Dims | None:
    return at.dims if isinstance(at.values[at.operand], list | tuple) else None


def _all_alike(at: Placed) -> Dims | None:
    return _beside(at) if at.together else None


# ---------------------------------------------------------------- pieces


def _reshape(job: Job) -> Call:
    sizes, dims = [int(s) for s in job.values[job.node].shape], job.dims
    assert dims is not None

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        wanted = list(sizes)
        wanted[dims[0]], wanted[dims[1]] = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        y = pieces[0].reshape(wanted)
        return y if run.over >= 0 else y.clone(memory_format=torch.contiguous_format)

    return call


def _part(job: Job) -> Call:
    """One part of a split along channels."""
    split, place = cast(Any, job.node.args)
    dim = int(bind(split).get("dim") or 0)
    sizes = [int(part.shape[dim]) for part in job.values[split]]
    first, count = sum(sizes[:place]), sizes[place]
    return lambda run, pieces, wholes: pieces[0].narrow(dim, first, count).clone()


_MOVES: dict[str, Any] = {"spatial": Spatial.MOVE, "channel": Channel.MOVE}
rows("cat", relays=True, spatial=Spatial.POINTWISE, channel=Channel.MOVE, keeps_output=False, follows=_all_alike)
rows(
    "view _unsafe_view reshape",
    **_MOVES,
    regroups=True,
    sized=True,
    reshapes=True,
    relays=True,
    follows=_reshaped,
    piece=_reshape,
)
rows("expand", **_MOVES, sized=True)
rows("flatten unflatten view_as", **_MOVES, regroups=True)
rows("squeeze unsqueeze", **_MOVES, regroups=True, turns=True)
rows("permute transpose", **_MOVES, relays=True, turns=True, result=Result.VIEW, follows=_turned)
rows("movedim swapaxes select flip roll t mT", **_MOVES, turns=True)
rows("slice", **_MOVES, turns=True, result=Result.VIEW, follows=_sliced)
rows("narrow", **_MOVES, result=Result.VIEW, follows=_sliced)
rows("getitem", **_MOVES, follows=_one_of_them, piece=_part)
rows(
    "chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split",
    **_MOVES,
    result=Result.PARTS,
    relays=True,
    follows=_beside,
)
rows("channel_shuffle", **_MOVES, relays=True, follows=lambda at: at.dims)
rows("index_select", **_MOVES, follows=_beside)
rows(
    "unbind stack expand_as repeat tile repeat_interleave numpy_T adjoint",
    **_MOVES,
)
