"""Resizes and shuffles of pixels: rows at a scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, Span, Table, joins_by_hand, part_bytes, picked
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import At, Channel, Spatial, Taps, rows

# ---------------------------------------------------------------- interpolation


def weighted_taps(node: fx.Node, axis: int, count: int, size: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Source rows [taps, output rows] of a resize along an axis, and their weights.

    Coordinates come from the sizes of the whole map: `interpolate` on a piece would start its grid anew. Weights, and
    nearest rows, are asked of torch's own kernel: how it rounds depends on the number type, and far down a map that
    shows. Each map that it is given marks every n-th row, of which no more than one is in the reach of n taps.
    """
    name, axes, corners = op_name(node), _axes(node), bool(bind(node).get("align_corners"))
    scale = given_scale(node, axis)
    dtype = dtype if dtype == torch.float64 else torch.float32

    def asked(maps: torch.Tensor) -> np.ndarray:
        """Maps [n, size] resized to [n, count]."""
        n, along = len(maps), [i == axis for i in range(axes)]
        wanted, scales = [count if here else 1 for here in along], [scale if here else None for here in along]
        shaped = maps.view(1, n, *(size if here else 1 for here in along))
        return _resized(name, shaped, wanted, corners, scales).view(n, count).numpy()

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
        read = np.clip(low + reach[:, None], 0, size - 1)
        n = len(reach)
        share = asked((torch.arange(size, device="cpu") % n == torch.arange(n, device="cpu")[:, None]).to(dtype))
    share = np.take_along_axis(share, read % n, 0)
    share[1:][read[1:] == read[:-1]] = 0  # at the border, where several taps read one row
    return read, share


def _resized(
    name: str, x: torch.Tensor, sizes: list[int], corners: bool, scales: Sequence[float | None]
) -> torch.Tensor:
    """A resize of ``x`` by the kernel of torch that bears this name, to ``sizes``, at the factors given."""
    kernel = getattr(torch.ops.aten, name)
    return kernel(x, sizes, *scales) if "nearest" in name else kernel(x, sizes, corners, *scales)


def _axes(node: fx.Node) -> int:
    return int(op_name(node)[-2])  # upsample_nearest3d


def given_scale(node: fx.Node, axis: int) -> float | None:
    """The factor that a resize was given along an axis; None where it was given a size."""
    a, names = bind(node), ("scales_d", "scales_h", "scales_w")[-_axes(node) :]
    factors = a.get("scale_factors") or [a.get(name) for name in names]
    factor = factors[axis]
    return None if factor is None else float(factor)


def _taps(at: At) -> Taps:
    if at.axis >= _axes(at.node):
        return at.rows, at.rows + 1
    read, _ = weighted_taps(at.node, at.axis, at.count, at.size, at.values[at.node].dtype)
    return read.min(0), read.max(0) + 1


def _weighted_sum(
    x: torch.Tensor, dim: int, taps: list[tuple[Table, Table]], span: tuple[int, int], start: int
) -> torch.Tensor:
    """The span of a resize along a dim of ``x``, whose first position is ``start`` in the whole map."""
    if len(taps) == 1:
        return picked(x, dim, taps[0][0], span, start)
    form, total = (-1, *[1] * (x.dim() - 1 - dim)), None
    for read, share in taps:
        part = x.index_select(dim, read(x, torch.int64, span) - start)
        factor = share(x, x.dtype, span).view(form)
        if joins_by_hand():
            total = part * factor if total is None else total + part * factor
        else:
            total = part.mul_(factor) if total is None else total.addcmul_(part, factor)
        del part  # before the next one is made
    assert total is not None
    return total


def _resize(job: Job) -> Call:
    """Along rows by hand, each a weighted sum of few source rows; then along columns, by torch where all are there."""
    node, name = job.node, op_name(job.node)
    sizes = job.reads[0].sizes if job.reads else cast(tuple[int, int, int], job.whole)[:2]
    dtype = job.values[node].dtype
    found = [weighted_taps(node, axis, job.sizes[axis], sizes[axis], dtype) for axis in range(min(2, _axes(node)))]
    tables = [[(Table(read), Table(share)) for read, share in zip(*both, strict=True)] for both in found]
    scales, corners = [given_scale(node, axis) for axis in range(_axes(node))], bool(bind(node).get("align_corners"))

    def behind(y: torch.Tensor, axis: int) -> torch.Tensor:
        """The axes from this one on, by torch: as many rows as there are in front of them it leaves alone."""
        wanted = [*y.shape[2 : 2 + axis], *(job.sizes[1], *job.rest)[axis - 1 :]]
        return _resized(name, y, wanted, corners, [None] * axis + scales[axis:])

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, starts = (pieces[0], run.starts[0]) if pieces else (wholes[0].to(dtype), (0, 0))
        y = _weighted_sum(x, 2, tables[0], run.rows, starts[0])
        if len(tables) == 1:
            return y.clone() if y is x else y
        # ONNX has no nearest rows at a given scale that are not those of the sizes, and no nearest-exact ones.
        portable = "nearest" not in name or not torch.compiler.is_exporting()
        if portable and run.columns == (0, job.sizes[1]) and x.shape[3] == sizes[1]:
            y = behind(y, 1)
        else:
            y = _weighted_sum(y, 3, tables[1], run.columns, starts[1])
            y = behind(y, 2) if job.rest else y
        return y.clone() if y is x else y

    return call


def _workspace(job: Job, span: Span) -> int:
    """Rows are resized first, on as many columns as are read; then columns, at once where all of them are wanted."""
    size = part_bytes(job.row_bytes, job.sizes[1], *span.count)
    if job.reads:
        read = job.reads[0]
        first, last, _, _ = read.w.need(*span.columns)
        tall, width = read.h.need(*span.rows), read.sizes[1]
        half = read.bytes([span.count[0], last - first, *read.rest])
    else:
        assert job.whole is not None
        height, width, whole_bytes = job.whole
        first, last, tall = 0, width, (0, height, 0, 0)
        half = part_bytes(whole_bytes, width, span.count[0], width) // max(1, height)
    full = span.columns == (0, job.sizes[1]) and last - first == width
    if job.rest and not full:  # one axis after the other
        across, twice = size * job.reads[0].rest[0] // job.rest[0], 1 if "nearest" in op_name(job.node) else 2
        return max(twice * half - size, half + twice * across - size, across)
    if "nearest" in op_name(job.node):
        return 0 if span.count[0] == tall[1] - tall[0] else half
    return max(2 * half - size, half if full else half + size)


# ---------------------------------------------------------------- shuffles


def _ratio(node: fx.Node) -> int:
    return int(bind(node)["upscale_factor" if op_name(node) == "pixel_shuffle" else "downscale_factor"])


def _fewer_rows(at: At) -> Taps:
    ratio = _ratio(at.node)
    return at.rows // ratio, at.rows // ratio + 1


def _more_rows(at: At) -> Taps:
    ratio = _ratio(at.node)
    return at.rows * ratio, at.rows * ratio + ratio


def _shuffle(job: Job) -> Call:
    up, ratio = op_name(job.node) == "pixel_shuffle", _ratio(job.node)

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        if not up:
            return F.pixel_unshuffle(pieces[0], ratio)
        y = F.pixel_shuffle(pieces[0], ratio)
        top, left = (run.rows[0] - run.starts[0][0] * ratio, run.columns[0] - run.starts[0][1] * ratio)
        height, width = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        same = (height, width) == tuple(y.shape[2:])
        return y if same else y[:, :, top : top + height, left : left + width].clone()

    return call


def _shuffle_workspace(job: Job, span: Span) -> int:
    """A shuffle whose piece does not lie on the operand's rows is cut out of a larger one."""
    if not job.reads:
        return 0
    read = job.reads[0]
    needs = (read.h.need(*span.rows), read.w.need(*span.columns))
    made = part_bytes(read.row_bytes, read.sizes[1], *(last - first for first, last, _, _ in needs))
    return made if made != part_bytes(job.row_bytes, job.sizes[1], *span.count) else 0


def _every_square(node: fx.Node, labels: torch.Tensor, before: tuple[int, ...]) -> torch.Tensor | None:
    return labels[:, :: _ratio(node) ** 2] if _in_front(labels) else None


def _one_square(node: fx.Node, labels: torch.Tensor, before: tuple[int, ...]) -> torch.Tensor | None:
    return labels.repeat_interleave(_ratio(node) ** 2, 1) if _in_front(labels) else None


def _in_front(labels: torch.Tensor) -> bool:
    """The labels depend on the second dim alone."""
    return [d for d in range(labels.dim()) if labels.shape[d] > 1] == [1]


_RESIZES: dict[str, Any] = {"spatial": Spatial.RESIZE, "channel": Channel.SAME, "per_output": 1, "taps": _taps}
rows(
    """upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d""",
    **_RESIZES,
    piece=_resize,
    workspace=_workspace,
)
_SHUFFLES: dict[str, Any] = {
    "refuses": lambda at: "" if at.rank == 4 else f"{op_name(at.node)} reads other than a batch of images",
    "spatial": Spatial.RESIZE,
    "channel": Channel.MOVE,
    "piece": _shuffle,
    "workspace": _shuffle_workspace,
}
rows("pixel_shuffle", **_SHUFFLES, taps=_fewer_rows, relabels=_every_square, joins_channels=True)
rows("pixel_unshuffle", **_SHUFFLES, taps=_more_rows, relabels=_one_square)
