"""Pads: rows between new ones at both ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, Span, Table, lengths_read, padded, picked
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import At, Channel, Dims, Placed, Spatial, Taps, rows

Values = Mapping[fx.Node, Any]  # of all nodes, at the size of the whole map: arguments may follow from sizes


def sides(node: fx.Node, values: Values) -> list[int]:
    """What a padding operation puts at each side, the last dim first."""
    given = bind(node, values)
    return [int(v) for v in (given.get("pad") or given["padding"])]


def beside(node: fx.Node, dim: int, values: Values) -> tuple[int, int]:
    """What a padding operation puts at both sides of a dim; negative where it cuts off."""
    given, place = sides(node, values), 2 * (len(values[node].shape) - 1 - dim)
    return (given[place], given[place + 1]) if 0 <= place < len(given) else (0, 0)


def behind_channels(dims: Dims | None, rank: int) -> bool:
    """Rows and columns are the first axes behind the channels; of a sequence, its places."""
    return dims == ((2, 2) if rank == 3 else (2, 3))


def in_front(node: fx.Node, axis: int, values: Values, dims: Dims | None = None) -> int:
    """Rows that a padding operation puts in front along an axis. ``dims``: where rows and columns lie, else behind the
    channels."""
    first = dims is None or behind_channels(dims, len(values[node].shape))
    return beside(node, 2 + axis if first else dims[axis], values)[0]  # type: ignore[index]


def mode_of(node: fx.Node) -> str:
    """``constant``, ``reflect``, ``replicate`` or ``circular``."""
    name = op_name(node)
    known = {"reflection": "reflect", "replication": "replicate", "constant": "constant"}
    return known.get(name.partition("_")[0]) or bind(node).get("mode") or "constant"


def _source_rows(at: At) -> np.ndarray:
    """The source row of every output row; outside [0, size) where it is constant."""
    read, mode = at.rows - in_front(at.node, at.axis, at.values, at.dims), mode_of(at.node)
    if mode == "reflect" and at.size > 1:
        read = (at.size - 1) - np.abs((at.size - 1) - np.abs(read))
    return np.clip(read, 0, at.size - 1) if mode in ("reflect", "replicate") else read


def _taps(at: At) -> Taps:
    read = _source_rows(at)
    return read, read + 1


def _of_channels(node: fx.Node, dims: Dims | None, values: Values) -> bool:
    """Other axes than those behind the channels are padded, or rows lie elsewhere."""
    given, rank = sides(node, values), len(values[node].shape)
    return not behind_channels(dims, rank) or any(given[2 * (rank - 2) :])


def _refuses(at: Placed) -> str:
    sequence = behind_channels(at.dims, at.rank) and at.extent[1] == 1
    if at.joined and not sequence and any(beside(at.node, at.dims[0], at.values)):
        return "rows and columns lie in the one axis that is padded"
    if _of_channels(at.node, at.dims, at.values) and mode_of(at.node) != "constant":
        return "a padding of channels with their own values has no rule"
    return ""


def _wraps(at: Placed) -> bool:
    return mode_of(at.node) == "circular"


def _from_the_other_end(at: Placed) -> list[fx.Node]:
    """Rows that are padded in a circle are read at the other end of the map."""
    around = _wraps(at) and at.given[2] != at.sizes[2]
    return [at.operand] if around else []


def _circle(job: Job) -> Call:
    """Rows and columns by their number, counted in a circle."""
    value, node = job.argument("input"), job.node
    axes = len(job.values[node].shape) - 2
    given, sizes = job.values[node.args[0]].shape[2:], job.values[node].shape[2:]  # type: ignore[index]
    tables = [
        Table((np.arange(count) - in_front(node, axis, job.values)) % size)
        for axis, (count, size) in enumerate(zip(sizes, given, strict=True))
    ]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        source = pieces[0] if pieces else value(pieces, wholes)
        x = source if pieces else picked(source, 2, tables[0], run.rows, 0)
        for axis in range(1, axes):
            x = picked(x, 2 + axis, tables[axis], (0, int(sizes[axis])), 0)
        return x.clone() if x is source else x

    return call


def _relabels(node: fx.Node, labels: torch.Tensor, before: tuple[int, ...]) -> torch.Tensor | None:
    """As they are, unless channels are padded."""
    pads = node.args[1]
    assert isinstance(pads, list | tuple)
    padded = {len(before) - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    return None if any(labels.shape[d] > 1 for d in padded) else labels


def _piece(job: Job) -> Call:
    node, mode = job.node, mode_of(job.node)
    if mode == "circular":
        return _circle(job)
    given = bind(node).get("value")
    value = float(given) if isinstance(given, int | float) else 0.0
    if _of_channels(node, job.dims, job.values):
        return _along_any(job, value)
    sizes = job.reads[0].sizes
    both = (job.before[1], job.sizes[1] - sizes[1] - job.before[1])
    rest = list(zip(job.rest, job.reads[0].rest, strict=True))
    axes = len(job.values[node].shape) - 2
    counts = [*zip(job.sizes, sizes, strict=True), *rest]
    sources = [
        Table(_source_rows(At(node, axis, axes, count, size, job.values))) for axis, (count, size) in enumerate(counts)
    ]
    further = [in_front(node, axis, job.values) for axis in range(2, axes)]
    further = [(first, count - size - first) for first, (count, size) in zip(further, rest, strict=True)]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x = pieces[0]
        if mode == "constant":
            for axis, (start, stop) in enumerate((run.rows, run.columns)):
                if sum(run.pads[0][axis]) >= stop - start:
                    x = x.narrow(2 + axis, 0, 0)  # all of it is padding
            pads = (*run.pads[0], *further)
            return padded(x, pads, value=value) if any(map(any, pads)) else x.clone()
        x = picked(x, 2, sources[0], run.rows, run.starts[0][0])
        if not rest and run.columns == (0, job.sizes[1]) and min(both) >= 0 and max(both) and x.shape[3] == sizes[1]:
            return F.pad(x, (*both, 0, 0), mode=mode)
        for axis, span in enumerate(job.spans(run)[1:], 1):
            x = picked(x, 2 + axis, sources[axis], span, run.starts[0][1] if axis == 1 else 0)
        return x.clone() if x is pieces[0] else x

    return call


def _along_any(job: Job, value: float) -> Call:
    """Constant padding along any dims, wherever rows and columns lie."""
    assert job.dims is not None
    always = [beside(job.node, dim, job.values) for dim in range(len(job.values[job.node].shape))]
    moving = dict(zip(dict.fromkeys(job.dims), (0, 1), strict=False))  # dim -> axis

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, pads = pieces[0], list(always)
        for dim, axis in moving.items():
            start, stop = (run.rows, run.columns)[axis]
            pads[dim] = run.pads[0][axis]
            if sum(pads[dim]) >= stop - start:
                x = x.narrow(dim, 0, 0)  # all of it is padding
        pads += [(0, 0)] * (x.dim() - len(pads))  # a sequence comes with a column
        return F.pad(x, [n for one in reversed(pads) for n in one], value=value) if any(map(any, pads)) else x.clone()

    return call


def _workspace(job: Job, span: Span) -> int:
    """Rows from elsewhere are taken first, then columns, then the rest, each only where the piece is at a border."""
    if mode_of(job.node) == "constant":
        return 0
    given, made = job.values[job.node.args[0]], [0]  # type: ignore[index]
    sizes = [*given.shape[2:], 1][: max(2, given.dim() - 2)]  # a sequence has a column
    lengths = lengths_read(job, span) if job.reads else list(sizes)
    for axis, (start, stop) in enumerate(job.spans(span)):
        before = in_front(job.node, axis, job.values)
        if start < before or stop > before + sizes[axis] or (axis == 0 and not job.reads):
            lengths[axis] = stop - start
            made.append(math.prod((*given.shape[:2], *lengths)) * given.element_size())
    return max(a + b for a, b in pairwise(made)) - made[-1] if len(made) > 1 else 0


rows(
    """pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d""",
    spatial=Spatial.PAD,
    channel=Channel.MOVE,
    refuses=_refuses,
    wraps=_wraps,
    taken=_from_the_other_end,
    taps=_taps,
    relabels=_relabels,
    piece=_piece,
    workspace=_workspace,
)
