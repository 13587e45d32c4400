"""Norms: over the batch, over a map, over groups of channels, over the last dims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from splitfx.ir.graph import module_of
from splitfx.ir.layers import FunctionalBatchNorm
from splitfx.ir.ops.channels import grown, picked, renewed
from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, Span, part_bytes
from splitfx.ir.ops.reading import bind, op_name
from splitfx.ir.ops.row import Bound, Channel, Dims, Layer, Op, Placed, Raised, Spatial, add, rows

# ---------------------------------------------------------------- layers

_FILLS = {"weight": 0.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


def _of_features(module: Any, change: Callable[[Any, str], Any], count: int) -> nn.Module:
    """A batch or instance norm whose tensors were changed, one by one."""
    tensors = {name: change(getattr(module, name), name) for name in _FILLS}
    counted = module._buffers.get("num_batches_tracked")
    if counted is not None:
        tensors["num_batches_tracked"] = counted.clone()
    return renewed(module, **tensors, num_features=count)


_FEATURES = Layer(
    narrow=lambda module, positions: _of_features(module, lambda t, _: picked(t, positions), len(positions)),
    widen=lambda module, places: _of_features(module, lambda t, name: grown(t, places, fill=_FILLS[name]), len(places)),
)


def _fewer_groups(module: Any, positions: np.ndarray) -> nn.Module:
    per, count = module.num_channels // module.num_groups, len(positions)
    tensors = {"weight": picked(module.weight, positions), "bias": picked(module.bias, positions)}
    return renewed(module, **tensors, num_groups=count // per, num_channels=count)


def _whole_groups(module: Any, positions: np.ndarray) -> bool:
    """The channels at these positions do not cut a group apart."""
    per = module.num_channels // module.num_groups
    if len(positions) % per:
        return False
    groups = positions.reshape(-1, per) // per
    return bool((groups == groups[:, :1]).all())


def _reordered(module: Any, positions: np.ndarray) -> nn.Module:
    """A norm over all channels, which come in another order."""
    tensors = {name: picked(value, positions) for name, value in module._parameters.items()}
    return renewed(module, **tensors)


def _normalized(kind: type[nn.Module]) -> Raised:
    held = ("weight",) if kind is nn.RMSNorm else ("weight", "bias")
    options = lambda a, w: (kind, {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"]})  # noqa: E731
    return Raised(options, held, optional_bias=kind is nn.LayerNorm)


# ---------------------------------------------------------------- where they leave rows by themselves


def _of_the_batch(at: Placed) -> str:
    """A batch norm without running statistics, or one that is called in train mode for good."""
    module = module_of(at.node)
    if isinstance(module, FunctionalBatchNorm):
        batch = len(at.node.args) > 3 and at.node.args[3] is None
    elif module is not None:
        batch = getattr(module, "running_mean", None) is None
    else:
        batch = bool(at.bound.get("training")) or at.bound.get("running_mean") is None
    return "batch_norm takes its statistics from the batch, in eval mode too" if batch else ""


def last_dims(at: Placed) -> Dims | None:
    """The axes stay where the normalised dims are others."""
    return at.outside(range(at.rank - len(at.bound["normalized_shape"]), at.rank))


def _over_the_map(at: Placed) -> str:
    """Why a norm cannot take its map in row by row."""
    name = op_name(at.node)
    if at.bound.get("running_mean") is not None:
        return f"{name} uses running statistics"
    return "" if at.channels_first else f"{name} does not read a map with channels in front"


# ---------------------------------------------------------------- pieces


def applied(job: Job, statistics: int) -> Call:
    """The second half of a norm over a map: its mean and scale, which stand among the whole values at a place."""
    weight, bias = job.argument("weight"), job.argument("bias")

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, (mean, scale) = pieces[0], wholes[statistics].unbind(0)
        each = x.shape[1] // mean.shape[1]
        mean, scale = mean.repeat_interleave(each, 1), scale.repeat_interleave(each, 1)
        w, b = weight(pieces, wholes), bias(pieces, wholes)
        scale = scale * w if w is not None else scale
        shift = b - mean * scale if b is not None else -mean * scale
        spread = (..., *[None] * (x.dim() - 2))
        return torch.addcmul(shift.to(x.dtype)[spread], x, scale.to(x.dtype)[spread])

    return call


def _moments(job: Job, span: Span) -> int:
    """Of a norm over the last dims: the mean and the scale of every place."""
    size = part_bytes(job.row_bytes, job.sizes[1], *span.count)
    return 2 * size // max(1, int(np.prod(bind(job.node)["normalized_shape"])))


def _squares(job: Job, span: Span) -> int:
    """Of a norm that torch makes of several operations: the scale of every place, and what is scaled, not yet
    multiplied by the weight."""
    module = module_of(job.node)
    weight = module.weight if module is not None else bind(job.node).get("weight")
    size = part_bytes(job.row_bytes, job.sizes[1], *span.count)
    return _moments(job, span) // 2 + size if weight is not None else _moments(job, span)


def _groups(a: Bound, w: torch.Tensor) -> tuple[type[nn.Module], dict[str, Any]]:
    return nn.GroupNorm, {"num_groups": a["num_groups"], "num_channels": w.numel(), "eps": a["eps"]}


add(
    Op(
        name="batch_norm",
        normalizes=True,
        spatial=Spatial.POINTWISE,
        channel=Channel.SAME,
        per_output=2,
        modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FunctionalBatchNorm),
        per_channel=("weight", "bias", "running_mean", "running_var"),
        like_operand=True,
        keeps_output=False,
        refuses=_of_the_batch,
        layer=_FEATURES,
    )
)
add(
    Op(
        name="instance_norm",
        normalizes=True,
        spatial=Spatial.GLOBAL,
        channel=Channel.SAME,
        per_output=4,
        modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        per_channel=("weight", "bias", "running_mean", "running_var"),
        reduces="moments",
        consumes=_over_the_map,
        layer=_FEATURES,
    )
)
add(
    Op(
        name="group_norm",
        normalizes=True,
        spatial=Spatial.GLOBAL,
        channel=Channel.UNIT,
        per_output=4,
        modules=(nn.GroupNorm,),
        per_channel=("weight", "bias"),
        reduces="moments",
        consumes=_over_the_map,
        layer=Layer(narrow=_fewer_groups, fits=_whole_groups),
        raised=Raised(_groups),
    )
)
for _kind, _name, _workspace in ((nn.LayerNorm, "layer_norm", _moments), (nn.RMSNorm, "rms_norm", _squares)):
    rows(
        _name,
        modules={_name: [_kind]},
        per_output=4,
        follows=last_dims,
        workspace=_workspace,
        layer=Layer(narrow=_reordered),
        raised=_normalized(_kind),
    )
