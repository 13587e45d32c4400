"""Convolutions, transposed ones too: a window whose every output channel reads all channels of its group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splitfx.ir.ops.pieces import (
    Call,
    Interval,
    Job,
    Piece,
    Pieces,
    Span,
    bordered,
    lengths_read,
    padded,
    part_bytes,
    real_rows,
    window_span,
)
from splitfx.ir.ops.reading import bind
from splitfx.ir.ops.row import Bound, Channel, Raised, Sizes, Spatial, Window, rows

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# ---------------------------------------------------------------- window


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """One number for each axis, as torch reads an int or a list of one."""
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def _window(bound: Bound, axes: int, weight_shape: tuple[int, ...], transposed: bool = False) -> Window:
    weight = bound["weight"].shape if isinstance(bound["weight"], torch.Tensor) else weight_shape
    kernel = tuple(int(k) for k in weight[2:])
    stride, dilation = per_axis(bound["stride"], axes), per_axis(bound["dilation"], axes)
    before, after = _padding(bound["padding"], kernel, dilation)
    return Window(kernel, stride, before, after, dilation, transposed=transposed)


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (per_axis(padding, len(kernel)),) * 2


# ---------------------------------------------------------------- layers


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _conv(a: Bound, w: torch.Tensor) -> tuple[type[nn.Module], dict[str, Any]]:
    padding = a["padding"] if isinstance(a["padding"], str) else _plain(a["padding"])
    options = {"stride": _plain(a["stride"]), "padding": padding, "dilation": _plain(a["dilation"])}
    sizes = {"in_channels": w.shape[1] * a["groups"], "out_channels": w.shape[0], "kernel_size": tuple(w.shape[2:])}
    return _CONVS[w.dim() - 2], {**sizes, **options, "groups": a["groups"]}


def _conv_transpose(a: Bound, w: torch.Tensor) -> tuple[type[nn.Module], dict[str, Any]]:
    options = {k: _plain(a[k]) for k in ("stride", "padding", "output_padding", "dilation")}
    sizes = {"in_channels": w.shape[0], "out_channels": w.shape[1] * a["groups"], "kernel_size": tuple(w.shape[2:])}
    return _TRANSPOSED[w.dim() - 2], {**sizes, **options, "groups": a["groups"]}


# ---------------------------------------------------------------- cost


def _macs(a: Bound, of: Sizes, out: int) -> int:
    return out * math.prod(of(a["weight"])[1:])  # weight is out × in/groups × kernel


def _transposed_macs(a: Bound, of: Sizes, out: int) -> int:
    return math.prod(of(a["input"])) * math.prod(of(a["weight"])[1:])


# ---------------------------------------------------------------- pieces


def _piece(job: Job) -> Call:
    weight, bias, given = job.argument("weight"), job.argument("bias"), bind(job.node)
    stride, dilation, groups = given["stride"], given["dilation"], given["groups"]
    axes = len(job.values[job.node].shape) - 2
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, padding = bordered(job, pieces[0], run, 0.0)
        w, b = weight(pieces, wholes), bias(pieces, wholes)
        if axes == 1:
            return convolve(x.squeeze(3), w, b, stride, padding[:1], dilation, groups).unsqueeze(3)
        return convolve(x, w, b, stride, padding, dilation, groups)

    return call


def _workspace(job: Job, span: Span) -> int:
    real, explicit, _ = real_rows(job, span)
    return job.reads[0].bytes([n + more for n, more in zip(real, explicit, strict=True)]) if any(explicit) else 0


def _ends(rule: Window, spans: Sequence[Interval], starts: Sequence[int], lengths: Sequence[int]) -> list[Interval]:
    """What a transposed convolution of a piece lacks before and after, along every axis; negative: what is too much."""
    found = []
    for axis, (start, stop) in enumerate(spans):
        first = (starts[axis] if axis < 2 else 0) * rule.stride[axis] - rule.padding[axis]
        found.append((first - start, stop - first - window_span(rule, axis, lengths[axis])))
    return found


def _transposed_piece(job: Job) -> Call:
    weight, bias, given = job.argument("weight"), job.argument("bias"), bind(job.node)
    stride, groups, dilation = given["stride"], given["groups"], given["dilation"]
    axes = len(job.values[job.node].shape) - 2
    several: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]

    def convolve(x: torch.Tensor, *more: Any) -> torch.Tensor:
        return several(x.squeeze(3), *more).unsqueeze(3) if axes == 1 else several(x, *more)

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        w, b = weight(pieces, wholes), bias(pieces, wholes)
        ends = _ends(job.rule, job.spans(run), run.starts[0], pieces[0].shape[2:])
        if max(map(max, ends)) <= 0:  # only rows and columns that are cut off
            return padded(convolve(pieces[0], w, b, stride, 0, 0, groups, dilation), ends)
        y = convolve(pieces[0], w, None, stride, 0, 0, groups, dilation)
        if any(min(one) < -n for one, n in zip(ends, y.shape[2:], strict=True)):  # none of its rows are wanted
            y = padded(y, [(max(before, 0), max(after, 0)) for before, after in ends])
            ends = [(min(before, 0), min(after, 0)) for before, after in ends]
        y = padded(y, ends)
        if b is None:
            return y
        b = b.to(y.dtype)[(..., *[None] * len(ends))]
        return y + b if torch.is_grad_enabled() else y.add_(b)

    return call


def _transposed_workspace(job: Job, span: Span) -> int:
    read, lengths = job.reads[0], lengths_read(job, span)
    starts = [edge.need(*part)[0] for edge, part in ((read.h, span.rows), (read.w, span.columns))]
    if not any(map(any, _ends(job.rule, job.spans(span), starts, lengths))):
        return 0
    rows_, columns, *rest = (window_span(job.rule, axis, n) for axis, n in enumerate(lengths))
    return math.prod(rest) * part_bytes(job.row_bytes, job.sizes[1], rows_, columns) // math.prod(job.rest)


rows(
    "conv1d conv2d conv3d",
    keeps_output=False,
    spatial=Spatial.WINDOW,
    channel=Channel.MIXES,
    modules={"conv1d": [nn.Conv1d], "conv2d": [nn.Conv2d], "conv3d": [nn.Conv3d]},
    macs=_macs,
    window=_window,
    raised=Raised(_conv, optional_bias=True),
    piece=_piece,
    workspace=_workspace,
)
rows(
    "conv_transpose1d conv_transpose2d conv_transpose3d",
    spatial=Spatial.WINDOW,
    channel=Channel.MIXES,
    modules={
        "conv_transpose1d": [nn.ConvTranspose1d],
        "conv_transpose2d": [nn.ConvTranspose2d],
        "conv_transpose3d": [nn.ConvTranspose3d],
    },
    macs=_transposed_macs,
    window=lambda bound, axes, weight: _window(bound, axes, weight, transposed=True),
    raised=Raised(_conv_transpose, optional_bias=True),
    piece=_transposed_piece,
    workspace=_transposed_workspace,
)
