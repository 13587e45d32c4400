"""Element by element: activations, arithmetic, comparisons, casts; what returns its operand or new numbers like it."""

from __future__ import annotations

from typing import Any

from torch import nn

from splitfx.ir.graph import module_of
from splitfx.ir.ops.channels import grown, picked, renewed
from splitfx.ir.ops.pieces import Job, Span, part_bytes
from splitfx.ir.ops.row import Channel, Dims, Layer, Op, Placed, Raised, Result, Spatial, add, rows

_SAME: dict[str, Any] = {"spatial": Spatial.POINTWISE, "channel": Channel.SAME}


def acts(at: Placed) -> bool:
    """A leaf of the user's, or a dropout, that is not its operand itself in eval mode."""
    module = module_of(at.node)
    if module is None:
        return bool(at.bound.get("train"))
    if isinstance(module, nn.modules.dropout._DropoutNd | nn.RReLU):
        return False
    return at.values[at.node] is not at.values[at.operand]


def _in_eval_mode(at: Placed) -> Dims | None:
    return None if acts(at) else at.dims


def _stays(at: Placed) -> Dims | None:
    return at.dims


def _noise(job: Job, span: Span) -> int:
    """RReLU draws noise that it does not use."""
    return part_bytes(job.row_bytes, job.sizes[1], *span.count)


rows(
    """relu relu6 hardtanh sigmoid silu gelu hardswish hardsigmoid tanh leaky_relu elu selu celu mish softplus softsign
        log_sigmoid hardshrink softshrink""",
    **_SAME,
    per_output=1,
    activates=True,
)
rows("rrelu", **_SAME, per_output=1, activates=True, draws=True)
rows(
    """clamp clamp_min clamp_max sub rsub div true_divide pow neg abs exp log log2 sqrt rsqrt square erf sin cos round
        floor ceil sign threshold minimum maximum where lt le gt ge eq ne logical_and logical_or logical_not masked_fill
        addcmul addcdiv lerp reciprocal""",
    **_SAME,
    per_output=1,
)
rows("add", **_SAME, per_output=1, commutes=True, keeps_output=False)
rows("mul", **_SAME, per_output=1, commutes=True)
add(
    Op(
        name="prelu",
        **_SAME,
        activates=True,
        per_output=1,
        modules=(nn.PReLU,),
        per_channel=("weight",),
        layer=Layer(
            narrow=lambda m, positions: renewed(m, weight=picked(m.weight, positions), num_parameters=len(positions)),
            widen=lambda m, places: renewed(m, weight=grown(m.weight, places), num_parameters=len(places)),
            held=lambda module: module.num_parameters > 1,
        ),
        raised=Raised(lambda a, w: (nn.PReLU, {"num_parameters": w.numel()}), ("weight",)),
    )
)


# ---------------------------------------------------------------- the operand itself, or numbers like it

_DROPOUTS: dict[str, list[type[nn.Module]]] = {
    "dropout": [nn.Dropout],
    "feature_dropout": [nn.Dropout2d, nn.Dropout1d, nn.Dropout3d],
    "alpha_dropout": [nn.AlphaDropout],
    "feature_alpha_dropout": [nn.FeatureAlphaDropout],
}
DROPOUTS = {name: kinds[0] for name, kinds in _DROPOUTS.items()}  # operator -> the layer that it is written as
rows(
    " ".join(_DROPOUTS),
    **_SAME,
    modules=_DROPOUTS,
    result=Result.OPERAND,
    draws=True,
    drops=True,
    follows=_in_eval_mode,
)
rows("leaf", **_SAME, result=Result.OPERAND, draws=True, follows=_in_eval_mode, workspace=_noise)
rows("identity", **_SAME, modules={"identity": [nn.Identity]}, result=Result.OPERAND, follows=_stays)
rows("contiguous", **_SAME, result=Result.ALIAS, regroups=True, turns=True, follows=_stays)
rows("clone", **_SAME, result=Result.CLONE, regroups=True, turns=True, follows=_stays)
rows("detach alias", **_SAME, result=Result.ALIAS)
rows("to", **_SAME, result=Result.VIEW)
rows("_to_copy lift_fresh_copy type_as zeros_like ones_like fill zero", **_SAME)
