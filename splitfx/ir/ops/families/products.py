"""Products of matrices: linear layers, matmul, einsum, attention; softmax, which stands between them; embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from splitfx.ir.ops.row import Bound, CannotCount, Channel, Dims, Placed, Raised, Sizes, Spatial, rows


def _linear(a: Bound, of: Sizes, out: int) -> int:
    return out * of(a["weight"])[-1]


def _attention(a: Bound, of: Sizes, out: int) -> int:
    query, keys, value = of(a["query"]), of(a["key"]), of(a["value"])
    return math.prod(query[:-1]) * keys[-2] * (query[-1] + value[-1])


def _einsum(a: Bound, of: Sizes, out: int) -> int:
    """Every index of a product of two operands runs once through the multiply-accumulates."""
    equation, sizes = str(a["equation"]), [of(one) for one in a["tensors"]]
    operands = equation.replace(" ", "").partition("->")[0].split(",")
    if len(sizes) != 2 or "." in equation:
        raise CannotCount(f"einsum {equation!r} is no product of two operands with named indices")
    extent: dict[str, int] = {}
    for letters, size in zip(operands, sizes, strict=True):
        extent |= {i: n for i, n in zip(letters, size, strict=True) if n > 1 or i not in extent}
    return math.prod(extent.values())


def _along_last(at: Placed) -> Dims | None:
    return at.outside([at.rank - 1])


def _along_dim(at: Placed) -> Dims | None:
    return at.outside([int(at.bound.get("dim", -1))])


def _embedding(a: Bound, w: torch.Tensor) -> tuple[type[nn.Module], dict[str, Any]] | None:
    if a["scale_grad_by_freq"] or a["sparse"]:
        return None
    sizes = {"num_embeddings": w.shape[0], "embedding_dim": w.shape[1]}
    return nn.Embedding, {**sizes, "padding_idx": a["padding_idx"] if a["padding_idx"] >= 0 else None}


rows(
    "linear",
    spatial=Spatial.POINTWISE,
    channel=Channel.MIXES,
    channel_dim=-1,
    keeps_output=False,
    modules={"linear": [nn.Linear]},
    macs=_linear,
    follows=_along_last,
    raised=Raised(
        lambda a, w: (nn.Linear, {"in_features": w.shape[1], "out_features": w.shape[0]}), optional_bias=True
    ),
)
rows("scaled_dot_product_attention", channel=Channel.CONTRACT, macs=_attention)
rows("einsum", macs=_einsum)
rows("matmul bmm mm", macs=lambda a, of, out: out * of(a["input"])[-1])
rows("addmm", macs=lambda a, of, out: out * of(a["mat1"])[-1], biased=lambda a: True)
rows("baddbmm", macs=lambda a, of, out: out * of(a["batch1"])[-1], biased=lambda a: True)
rows("softmax log_softmax", per_output=3, follows=_along_dim, keeps_channels=True)
rows("glu", per_output=None, follows=_along_dim)
rows("embedding", modules={"embedding": [nn.Embedding]}, raised=Raised(_embedding, ("weight",), data="indices"))
