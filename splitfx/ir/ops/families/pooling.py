"""Pools: windows that keep channels apart, and adaptive ones, whose every output has a window of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from splitfx.ir.layers import SeparableMaxPool2d, separable_max
from splitfx.ir.ops.families.convolution import per_axis
from splitfx.ir.ops.pieces import (
    Call,
    Interval,
    Job,
    Piece,
    Pieces,
    Span,
    bordered,
    joins_by_hand,
    lengths_read,
    own_padding,
    padded,
    part_bytes,
    read_alone,
    real_rows,
    window_span,
)
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import At, Bound, Channel, Dims, Placed, Spatial, Taps, Window, rows


def _window(bound: Bound, axes: int, weight_shape: tuple[int, ...]) -> Window:
    kernel = per_axis(bound["kernel_size"], axes)
    stride = per_axis(bound["stride"], axes) if bound["stride"] else kernel
    padding, dilation = per_axis(bound["padding"], axes), per_axis(bound.get("dilation") or 1, axes)
    return Window(kernel, stride, padding, padding, dilation, bool(bound.get("ceil_mode")))


# ---------------------------------------------------------------- maxima


def _max(job: Job) -> Call:
    """Along rows, then along columns, as maxima of slices: several times as fast on a CPU as the pooling operator,
    which also allocates an index for every value."""
    rule, lowest = job.rule, float("-inf")
    assert not bind(job.node).get("return_indices")

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x = read_alone(job, pieces[0], run)
        if job.rest or x.device.type not in ("cpu", "meta") or joins_by_hand():
            x, padding = bordered(job, pieces[0], run, lowest)
            if any(2 * p > k for p, k in zip(padding, rule.kernel, strict=True)):
                x, padding = padded(x, [(p, p) for p in padding], value=lowest), (0,) * len(padding)
            pool: Any = F.max_pool3d if job.rest else F.max_pool2d
            return pool(x, rule.kernel, rule.stride, padding, rule.dilation, ceil_mode=False)
        before = [run.pads[0][axis][0] for axis in (0, 1)]
        count = [stop - start for start, stop in (run.rows, run.columns)]
        return separable_max(x, rule.kernel, rule.stride, rule.dilation, before, count)

    return call


def _max_workspace(job: Job, span: Span) -> int:
    real, explicit, _ = real_rows(job, span)
    read = job.reads[0]
    if job.rest:  # torch's own pool, which finds the places of the maxima too
        grown = read.bytes([n + more for n, more in zip(real, explicit, strict=True)]) if any(explicit) else 0
        places = math.prod(job.spans(span)[axis][1] - job.spans(span)[axis][0] for axis in range(2 + len(job.rest)))
        return grown + 8 * places * math.prod(job.values[job.node].shape[:2])
    return read.bytes([span.count[0], real[1]])


# ---------------------------------------------------------------- averages


def _pads_itself(rule: Window, pads: Sequence[Interval], lengths: Sequence[int], spans: Sequence[Interval]) -> bool:
    """An average pool may add all padding of a piece: its divisors are then those of the whole map. That of volumes
    refuses inputs smaller than its window, whatever it pads, and is not asked."""
    for axis, (start, stop) in enumerate(spans):
        real = lengths[axis] if sum(pads[axis]) < window_span(rule, axis, stop - start) else 0
        own = own_padding(rule, axis, pads[axis], real, stop - start)
        if own is None or own > rule.padding[axis] or 2 * own > rule.kernel[axis] or not real:
            return False
    return True


def _average(job: Job) -> Call:
    a, rule = bind(job.node), job.rule
    size, stride, padding = rule.kernel, rule.stride, rule.padding
    include, fixed = bool(a["count_include_pad"]), a.get("divisor_override")
    lengths = (job.reads[0].h.size, job.reads[0].w.size, *job.reads[0].rest)
    pool: Any = F.avg_pool3d if job.rest else F.avg_pool2d

    @cache
    def divisors(axis: int, start: int, stop: int) -> list[int]:
        length, found = lengths[axis], []
        for i in range(start, stop):
            low = i * stride[axis] - padding[axis]
            high = min(low + size[axis], length + padding[axis])
            found.append(high - low if include else min(high, length) - max(low, 0))
        return found

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        pads, spans = job.pads(run.pads[0], pieces[0].shape[4:]), job.spans(run)
        if not job.rest and _pads_itself(rule, pads, pieces[0].shape[2:], spans):
            x, own = bordered(job, pieces[0], run, 0.0)
            return pool(x, size, stride, own, count_include_pad=include, divisor_override=fixed)
        x = padded(read_alone(job, pieces[0], run), pads)
        if fixed:
            return pool(x, size, stride, 0, divisor_override=fixed)
        total = pool(x, size, stride, 0, divisor_override=1)
        del x  # before the divisors are there, one for every place of the map
        each = [
            torch.tensor(divisors(axis, *span), dtype=total.dtype, device=total.device).view(
                -1, *[1] * (len(spans) - 1 - axis)
            )
            for axis, span in enumerate(spans)
        ]
        product = reduce(torch.mul, each)
        return total / product if torch.is_grad_enabled() else total.div_(product)

    return call


def _average_workspace(job: Job, span: Span) -> int:
    real, explicit, pads = real_rows(job, span)
    if job.rest or not _pads_itself(job.rule, pads, lengths_read(job, span), job.spans(span)):
        explicit = [sum(one) for one in pads]
    elif not any(explicit):
        return 0
    return job.reads[0].bytes([n + more for n, more in zip(real, explicit, strict=True)])


# ---------------------------------------------------------------- adaptive


def adaptive_size(node: fx.Node, values: Mapping[fx.Node, Any], axes: int) -> tuple[int, ...]:
    """Output size of an adaptive pool, one number for each axis."""
    return per_axis(bind(node, values)["output_size"], axes)


def _cells(at: Placed) -> Dims | None:
    """A pool to more than one value a channel leaves rows by themselves, each with a window of its own."""
    axes = at.rank - 2
    spreads = adaptive_size(at.node, at.values, axes) != (1,) * axes
    return at.dims if spreads and at.dims == (2, 3) else None


def _cell_taps(at: At) -> Taps:
    return at.rows * at.size // at.count, -(-(at.rows + 1) * at.size // at.count)


def _to_one(at: Placed) -> str:
    """Why an adaptive pool cannot take its map in row by row."""
    axes = at.rank - 2
    one = adaptive_size(at.node, at.values, axes) == (1,) * axes and at.channels_first
    return "" if one else f"{op_name(at.node)} gives more than one value a channel"


def _adaptive(job: Job) -> Call:
    h, w, whole = job.reads[0].h, job.reads[0].w, (0, job.sizes[1])

    def band(x: torch.Tensor, left: int, columns: tuple[int, int]) -> torch.Tensor:
        if columns == whole:
            return F.adaptive_avg_pool2d(x, (1, job.sizes[1]))
        cells = [x[..., w.low[j] - left : w.high[j] - left].mean((2, 3)) for j in range(*columns)]
        return torch.stack(cells, -1)[:, :, None]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, (top, left) = pieces[0], run.starts[0]
        parts = (band(x[:, :, h.low[i] - top : h.high[i] - top], left, run.columns) for i in range(*run.rows))
        if joins_by_hand():
            return torch.cat(list(parts), 2)
        found = x.new_empty((*x.shape[:2], run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]))
        for place, part in enumerate(parts):
            found[:, :, place : place + 1] = part
        return found

    return call


def _adaptive_workspace(job: Job, span: Span) -> int:
    """One row, and the cells that it is put together from."""
    size = part_bytes(job.row_bytes, job.sizes[1], *span.count)
    return 2 * size // max(1, span.count[0])


def _covers(at: Placed) -> str:
    """A pool whose one window is the whole map."""
    axes = at.rank - 2
    rule = _window(at.bound, axes, ())
    one = rule.kernel == at.given[2:] and at.sizes[2:] == (1,) * axes and not any(rule.padding) and at.channels_first
    return f"{op_name(at.node)} reduces over the whole map" if one and not at.bound.get("divisor_override") else ""


def _spares(at: Placed) -> str:
    """Why a pool over windows cannot take its map in row by row."""
    return "" if _covers(at) else f"{op_name(at.node)} has many windows"


_WINDOWED: dict[str, Any] = {
    "spatial": Spatial.WINDOW,
    "channel": Channel.SAME,
    "per_input": 1,
    "window": _window,
    "refuses": _covers,
    "consumes": _spares,
}
rows(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices",
    **_WINDOWED,
    modules={"max_pool2d": [SeparableMaxPool2d]},
    reduces="max",
    piece=_max,
    workspace=_max_workspace,
)
rows("avg_pool1d avg_pool2d avg_pool3d", **_WINDOWED, reduces="mean", piece=_average, workspace=_average_workspace)
_ADAPTIVE: dict[str, Any] = {"spatial": Spatial.GLOBAL, "channel": Channel.SAME, "per_input": 1}
rows("adaptive_avg_pool1d", **_ADAPTIVE, reduces="mean", consumes=_to_one)
rows("adaptive_max_pool1d", **_ADAPTIVE, reduces="max", consumes=_to_one)
rows("adaptive_avg_pool3d", **_ADAPTIVE, reduces="mean", consumes=_to_one)
rows("adaptive_max_pool2d", **_ADAPTIVE, reduces="max", consumes=_to_one)
rows(
    "adaptive_avg_pool2d",
    **_ADAPTIVE,
    reduces="mean",
    consumes=_to_one,
    follows=_cells,
    taps=_cell_taps,
    piece=_adaptive,
    workspace=_adaptive_workspace,
)
