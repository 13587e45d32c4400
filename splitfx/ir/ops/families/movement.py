"""Data movement: concats, splits, slices, views, transposes. Where rows and channels go depends on the arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, Span, Table, part_bytes
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import At, Bound, Channel, Dims, Laid, Placed, Result, Spatial, Taps, rows

# ---------------------------------------------------------------- where the rows go


def _beside(at: Placed) -> Dims | None:
    """Cut or joined along another dim than the rows."""
    dim = int(at.bound.get("dim") or 0) % at.rank
    if at.dims[0] == dim:
        return None
    return Laid(at.dims, across=True) if at.dims[1] == dim else at.dims


def _sliced(at: Placed) -> Dims | None:
    """A crop or every n-th row, too."""
    if at.joined and at.sizes[at.dims[0]] != at.given[at.dims[0]]:
        return None
    return at.dims


def _cut(node: fx.Node, values: Any, dim_size: int) -> tuple[int, int, int]:
    """(dim, start, step) of a slice of an axis of so many places."""
    a = bind(node, values)
    if op_name(node) == "narrow":
        start, step = int(a["start"]), 1
    else:
        start, step = int(a["start"] or 0), int(a["step"] if a.get("step") is not None else 1)
    return int(a["dim"] or 0), min(max(start + dim_size if start < 0 else start, 0), dim_size), step


def _slice_taps(at: At) -> Taps:
    value = at.values[at.node]
    operand: Any = at.node.args[0]
    dim, start, step = _cut(at.node, at.values, at.size)
    sizes = at.values[operand].shape
    axis_dim = _axis_dim(at, len(sizes))
    if dim % value.dim() != axis_dim or at.size == at.count:
        return at.rows, at.rows + 1
    return at.rows * step + start, at.rows * step + start + 1


def _slice(job: Job) -> Call:
    """Along rows and columns what is read is there already; along another dim it is cut."""
    node, dims = job.node, job.dims
    sizes, given = job.values[job.node].shape, job.values[job.node.args[0]].shape  # type: ignore[index]
    dim, start, step = _cut(node, job.values, 0)
    dim %= len(sizes)
    dim, start, step = _cut(node, job.values, int(given[dim]))
    dim %= len(sizes)
    assert dims is not None
    whole = sizes[dim] == given[dim]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, index = pieces[0], [slice(None)] * len(sizes)
        if not whole:
            index[dim] = (
                slice(None, None, step) if dim in dims else slice(start, start + (sizes[dim] - 1) * step + 1, step)
            )
        return x[tuple(index)].clone(memory_format=torch.contiguous_format)

    return call


def _axis_dim(at: At, rank: int) -> int:
    """The dim of a map where an axis of it lies, of maps whose axes are not joined."""
    return at.dims[at.axis] if at.dims is not None else rank - at.axes + at.axis


def _turned(at: Placed) -> Dims | None:
    if op_name(at.node) == "permute":
        order = [int(d) % at.rank for d in at.bound["dims"]]
    else:
        order = list(range(at.rank))
        first, second = ("dim0", "dim1") if "dim0" in at.bound else ("axis0", "axis1")
        i, j = int(at.bound[first]) % at.rank, int(at.bound[second]) % at.rank
        order[i], order[j] = order[j], order[i]
    return Laid(tuple(order.index(d) for d in at.dims), at.extent)


def _stacked(at: Placed) -> Dims | None:
    if not at.together:
        return None
    dim = int(at.bound.get("dim") or 0) % (at.rank + 1)
    return tuple(d + (dim <= d) for d in at.dims)


def _selected(at: Placed) -> Dims | None:
    """One place along another dim."""
    dim = int(at.bound.get("dim") or 0) % at.rank
    if dim in at.dims:
        return None
    return tuple(d - (dim < d) for d in at.dims)


def _spread(at: Placed) -> Dims | None:
    """Expanded along other dims."""
    more = len(at.sizes) - at.rank
    dims = tuple(d + more for d in at.dims)
    return dims if all(at.sizes[d] == at.given[b] for d, b in zip(dims, at.dims, strict=True)) else None


def _as_wide(at: Placed) -> Dims | None:
    """Expanded over the rows and columns of the map whose sizes it takes."""
    wide = at.where.get(at.bound["other"])
    if wide is None or at.where.get(at.operand) is not None:
        return None
    more = len(at.sizes) - len(at.given)
    once = all(d < more or at.given[d - more] == 1 for d in wide)
    return Laid(wide, at.extents[at.bound["other"]]) if once else None


def _expanded(job: Job) -> Call:
    sizes, dims = [int(s) for s in job.values[job.node].shape], job.dims
    assert dims is not None

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, piece, wanted = (*wholes, *pieces)[0], pieces[0], list(sizes)
        for back in range(1, piece.dim() + 1):
            if len(sizes) - back in dims:
                wanted[-back] = piece.shape[-back]
        return x.expand(wanted).clone(memory_format=torch.contiguous_format)

    return call


def _dims_of(bound: Bound) -> list[int]:
    given = bound["dims"]
    return [int(d) for d in (given if isinstance(given, list | tuple) else [given])]


def _moved_around(at: Placed) -> Dims | None:
    """A flip or a roll: along rows their places are looked up in the whole map."""
    dims = {d % at.rank for d in _dims_of(at.bound)}
    if not dims or (at.joined and at.extent[1] > 1 and at.dims[0] in dims):
        return None
    return Laid(at.dims, at.extent, across=at.dims[1] in dims and not at.joined)


def _looked_up(at: Placed) -> list[fx.Node]:
    return [at.operand] if at.dims[0] in {d % at.rank for d in _dims_of(at.bound)} else []


def _move_around(job: Job) -> Call:
    """Along rows by number; along the other dims as the whole is moved."""
    node, dims, value = job.node, job.dims, job.argument("input")
    given, rank = bind(node), len(job.values[node].shape)
    assert dims is not None
    along = [d % rank for d in _dims_of(given)]
    rolls = op_name(node) == "roll"
    shifts = given.get("shifts", 0)
    by = dict(zip(along, shifts if isinstance(shifts, list | tuple) else [shifts] * len(along), strict=True))
    count = job.sizes[0]
    places = (np.arange(count) - int(by.get(dims[0], 0))) % max(1, count) if rolls else np.arange(count)[::-1].copy()
    table, others = Table(places), [d for d in along if d != dims[0]]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        whole = None if pieces else value(pieces, wholes)
        x = pieces[0] if whole is None else whole.index_select(dims[0], table(whole, torch.int64, run.rows))
        if others:
            return torch.roll(x, [int(by[d]) for d in others], others) if rolls else x.flip(others)
        return x if whole is not None else x.clone()

    return call


def _around_workspace(job: Job, span: Span) -> int:
    """Rows that are looked up and then moved along other dims as well."""
    assert job.dims is not None
    along = {d % len(job.values[job.node].shape) for d in _dims_of(bind(job.node))}
    twice = not job.reads and along != {job.dims[0]}
    return part_bytes(job.row_bytes, job.sizes[1], *span.count) if twice else 0


def _indexed(at: Placed) -> Dims | None:
    """Channels by number: one list of numbers along one dim that is none of rows or columns."""
    named = at.bound["indices"]
    places = [i for i, index in enumerate(named) if index is not None]
    if len(places) != 1 or len(at.given) != len(at.sizes) or places[0] in at.dims:
        return None
    index = named[places[0]]
    return at.dims if isinstance(index, fx.Node) and at.where.get(index) is None else None


# ---------------------------------------------------------------- reshapes


@dataclass(frozen=True)
class _Fold:
    """How rows follow in a reshape: ``merge`` rows of the operand make one, or one makes ``split``."""

    dims: Laid
    merge: int = 1
    split: int = 1


def _fold(given: tuple[int, ...], sizes: tuple[int, ...], dims: Dims, extent: tuple[int, int]) -> _Fold | None:
    """Where rows and columns lie after a reshape; None where pieces of rows are no pieces of it.

    The places in front of the rows stay as many, and a row is a run of places behind one another.
    """
    h, w = dims
    unit = extent[1] if h == w else 1
    front = math.prod(given[:h])
    behind = math.prod(given[h + 1 :])
    run = unit * behind  # places of one row
    places = [i for i in range(len(sizes)) if math.prod(sizes[:i]) == front]
    p = next((i for i in places if sizes[i] > 1), places[-1] if places else None)
    if p is None or not run:
        return None
    after = math.prod(sizes[p + 1 :])
    if after == run or (after > run and after % run == 0):
        merge, split = after // run, 1
    elif after and run % after == 0:
        merge, split = 1, run // after
    else:
        return None
    if split > 1 and (split == unit if h == w else (w == h + 1 and split == given[w])):
        return _Fold(Laid((p, p), extent))  # rows and columns in one axis
    count = extent[0] * split // merge
    if count != sizes[p]:
        return None
    columns = front * extent[0] if h == w else math.prod(given[:w])
    wide = unit if h == w else given[w]
    q = next((i for i in range(p + 1, len(sizes)) if math.prod(sizes[:i]) == columns and sizes[i] > 1), None)
    if q is None or wide == 1:
        return _Fold(Laid((p, p), (count, 1), across=True), merge, split)
    return _Fold(Laid((p, q), across=sizes[q] != wide), merge, split)


def _reshaped(at: Placed) -> Dims | None:
    found = _fold(at.given, at.sizes, at.dims, at.extent)
    return found.dims if found is not None else None


def _reshape_taps(at: At) -> Taps:
    """Rows that were put together, or taken apart, make as many."""
    if at.axis == 0 and at.count != at.size:
        if at.size > at.count:
            merge = at.size // at.count
            return at.rows * merge, at.rows * merge + merge
        split = at.count // at.size
        return at.rows // split, at.rows // split + 1
    return at.rows, at.rows + 1


def _one_of_them(at: Placed) -> Dims | None:
    return at.dims if isinstance(at.values[at.operand], list | tuple) else None


def _all_alike(at: Placed) -> Dims | None:
    """Maps side by side; or one below the other, each looked up in the whole."""
    if not at.together:
        return None
    beside = _beside(at)
    if beside is not None or (at.joined and at.extent[1] > 1):
        return beside
    return Laid(at.dims, (at.sizes[at.dims[0]], at.extent[1]))


def _below(at: Placed) -> list[fx.Node]:
    """The operands of a concat along rows."""
    return list(dict.fromkeys(at.node.all_input_nodes)) if at.together and _beside(at) is None else []


def _concat(job: Job) -> Call:
    given, dims = bind(job.node), job.dims
    dim, parts = int(given.get("dim") or 0), job.argument("tensors")

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        tensors = parts(pieces, wholes)
        if pieces:
            return torch.cat(tensors, dim)
        assert dims is not None
        found, first = [], 0
        for x in tensors:
            low, high = max(run.rows[0] - first, 0), min(run.rows[1] - first, x.shape[dims[0]])
            if high > low:
                found.append(x.narrow(dims[0], low, high - low))
            first += x.shape[dims[0]]
        return torch.cat(found, dims[0])

    return call


# ---------------------------------------------------------------- pieces


def _reshape(job: Job) -> Call:
    sizes, dims = [int(s) for s in job.values[job.node].shape], job.dims
    assert dims is not None
    unit = job.sizes[1] if dims[0] == dims[1] else 1
    split = max(1, job.sizes[0] // max(1, job.reads[0].sizes[0])) if job.reads else 1

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        wanted, count = list(sizes), run.rows[1] - run.rows[0]
        first = run.rows[0] - run.starts[0][0] * split if split > 1 else 0
        wanted[dims[0]] = -1 if split > 1 else count * unit
        if dims[0] != dims[1]:
            wanted[dims[1]] = run.columns[1] - run.columns[0]
        y = pieces[0].reshape(wanted)
        if split > 1 and y.shape[dims[0]] != count:
            y = y.narrow(dims[0], first, count)
        return y if run.over >= 0 else y.clone(memory_format=torch.contiguous_format)

    return call


def _part(job: Job) -> Call:
    """One part of a split along channels, or one place of a dim that was taken apart."""
    split, place = cast(Any, job.node.args)
    dim = int(bind(split).get("dim") or 0)
    if op_name(split) == "unbind":
        return lambda run, pieces, wholes: pieces[0].select(dim, place).clone(memory_format=torch.contiguous_format)
    sizes = [int(part.shape[dim]) for part in job.values[split]]
    first, count = sum(sizes[:place]), sizes[place]
    return lambda run, pieces, wholes: pieces[0].narrow(dim, first, count).clone()


_MOVES: dict[str, Any] = {"spatial": Spatial.MOVE, "channel": Channel.MOVE}
_FOLDS: dict[str, Any] = {
    **_MOVES,
    "regroups": True,
    "reshapes": True,
    "follows": _reshaped,
    "taps": _reshape_taps,
    "piece": _reshape,
}
rows(
    "cat",
    relays=True,
    spatial=Spatial.POINTWISE,
    channel=Channel.MOVE,
    keeps_output=False,
    follows=_all_alike,
    taken=_below,
    piece=_concat,
)
rows("view _unsafe_view reshape", **_FOLDS, sized=True, relays=True)
rows("expand", **_MOVES, sized=True, follows=_spread, piece=_expanded)
rows("expand_as", **_MOVES, follows=lambda at: _spread(at) or _as_wide(at), piece=_expanded)
rows("flatten unflatten view_as", **_FOLDS)
rows("squeeze unsqueeze", **_FOLDS, turns=True)
rows("permute transpose", **_MOVES, relays=True, turns=True, result=Result.VIEW, follows=_turned)
rows("select", **_MOVES, turns=True, result=Result.VIEW, follows=_selected)
rows(
    "flip roll",
    **_MOVES,
    turns=True,
    follows=_moved_around,
    taken=_looked_up,
    piece=_move_around,
    workspace=_around_workspace,
)
rows("movedim swapaxes t mT", **_MOVES, turns=True)
_SLICES: dict[str, Any] = {
    **_MOVES,
    "result": Result.VIEW,
    "follows": _sliced,
    "taps": _slice_taps,
    "piece": _slice,
}
rows("slice", **_SLICES, turns=True)
rows("narrow", **_SLICES)
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
rows("index", spatial=Spatial.MOVE, per_output=1, follows=_indexed)
rows("stack", **_MOVES, follows=_stacked)
rows("unbind", **_MOVES, result=Result.PARTS, follows=_selected)
rows(
    "repeat tile repeat_interleave numpy_T adjoint",
    **_MOVES,
)
