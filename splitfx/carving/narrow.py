"""Narrow convolutions and linear layers: the part that some channels need, in the order in which they come; and wider
ones, with channels of zeros. Layers with something per channel are narrowed by their rows (`splitfx.ir.ops`).

Each function returns a new module with its own parameters and never touches the one it is given. What is kept of a
weight is a view of it where it lies in one block, so that nothing is copied that may be thrown away; the pipeline
takes the graph that it returns apart from every other (`splitfx.ir.graph.take_apart`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from splitfx.ir.ops.channels import block, grown, picked, renewed

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm = nn.modules.batchnorm._BatchNorm


def _block(weight: torch.Tensor, outs: np.ndarray, ins: np.ndarray) -> torch.Tensor:
    return block(weight, (0, outs), (1, ins))


def transposed(module: nn.Module | None) -> bool:
    """A transposed conv, whose weight is [in, out, ...] instead of [out, in, ...]."""
    return isinstance(module, Transposed)


def _blocks(module: nn.Module, outs: np.ndarray, ins: np.ndarray) -> torch.Tensor:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return _block(weight, ins, outs) if transposed(module) else _block(weight, outs, ins)


def weighted(module: nn.Module, ins: np.ndarray, outs: np.ndarray) -> nn.Module:
    """A conv or linear layer from input channels ``ins`` to output channels ``outs``.

    For a conv with existing groups, ``ins`` and ``outs`` hold whole groups in the same order.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    existing = getattr(module, "groups", 1)
    if existing > 1:
        per = module.in_channels // existing  # type: ignore[operator]
        return groups_of(module, ins.reshape(-1, per)[:, 0] // per, outs)
    kept = nn.Parameter(_blocks(module, outs, ins), weight.requires_grad)
    bias = picked(module.bias, outs)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return renewed(module, weight=kept, bias=bias, in_features=len(ins), out_features=len(outs))
    return renewed(module, weight=kept, bias=bias, in_channels=len(ins), out_channels=len(outs))


def grouped(module: nn.Module, ins: tuple[np.ndarray, ...], outs: tuple[np.ndarray, ...]) -> nn.Module:
    """One conv with ``groups=len(ins)`` for equal blocks; its channels come branch after branch."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    blocks = [_blocks(module, o, i) for i, o in zip(ins, outs, strict=True)]
    order = np.concatenate(outs)
    return renewed(
        module,
        weight=nn.Parameter(torch.cat(blocks), weight.requires_grad),
        bias=picked(module.bias, order),  # type: ignore[arg-type]
        in_channels=sum(map(len, ins)),
        out_channels=len(order),
        groups=len(ins),
    )


def groups_of(module: nn.Module, groups: np.ndarray, outs: np.ndarray) -> nn.Module:
    """A conv that keeps some of its groups: ``groups`` are their numbers, ``outs`` their output channels."""
    per: int = module.in_channels // module.groups  # type: ignore[operator, assignment]
    rows = (groups[:, None] * per + np.arange(per)).flatten() if transposed(module) else outs
    return renewed(
        module,
        weight=picked(module.weight, rows),  # type: ignore[arg-type]
        bias=picked(module.bias, outs),  # type: ignore[arg-type]
        in_channels=len(groups) * per,
        out_channels=len(outs),
        groups=len(groups),
    )


# ---------------------------------------------------------------- wider


def wider(module: nn.Module, ins: np.ndarray, outs: np.ndarray) -> nn.Module:
    """A conv or linear layer with the input channels ``ins`` and the output channels ``outs``, rows and columns of
    zeros for those that are `PAD`; a depthwise conv stays depthwise."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias = grown(module.bias, outs)  # type: ignore[arg-type]
    if getattr(module, "groups", 1) > 1:
        sizes = {"in_channels": len(ins), "out_channels": len(outs), "groups": len(ins)}
        return renewed(module, weight=grown(weight, outs), bias=bias, **sizes)
    rows, columns = (1, 0) if transposed(module) else (0, 1)
    wide = grown(grown(weight, outs, rows), ins, columns)
    if isinstance(module, nn.Linear):
        return renewed(module, weight=wide, bias=bias, in_features=len(ins), out_features=len(outs))
    return renewed(module, weight=wide, bias=bias, in_channels=len(ins), out_channels=len(outs))
