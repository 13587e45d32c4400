"""A weighted layer as a linear regression: what each of its blocks reads at some positions, and the layer with the
weights that were solved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from splitfx.carving.division import Division
from splitfx.carving.reconstruction.regression import Normal
from splitfx.ir.ops.channels import renewed

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LEAST, PER_FEATURE = 16_384, 48  # positions that a block is solved on: at least, and for each of its features
LEAST_GROUPED = 2_048  # of layers with groups of their own: few features each, but many of them

Place = tuple[torch.Tensor, ...]  # where in a batch of maps: number, row, column ...


@dataclass(frozen=True)
class Blocks:
    """Blocks of equal size: input channels ``ins`` [B, i] and output channels ``outs`` [B, o] of each."""

    ins: np.ndarray
    outs: np.ndarray


def blocks_of(module: nn.Module, division: Division | None) -> list[Blocks]:
    """The blocks of a layer's weight, those of one size together."""
    weight: Any = module.weight
    groups = getattr(module, "groups", 1)
    if groups > 1:
        ins, outs = (np.arange(n * groups).reshape(groups, n) for n in (weight.shape[1], len(weight) // groups))
        return [Blocks(ins, outs)]
    if division is None:
        return [Blocks(np.arange(weight.shape[1])[None], np.arange(len(weight))[None])]
    sizes: dict[tuple[int, int], list[int]] = {}
    for g, (ins, outs) in enumerate(zip(division.ins, division.outs, strict=True)):
        sizes.setdefault((len(ins), len(outs)), []).append(g)
    return [
        Blocks(np.stack([division.ins[g] for g in some]), np.stack([division.outs[g] for g in some]))
        for some in sizes.values()
    ]


def positions(sizes: tuple[int, ...], share: float, generator: torch.Generator) -> Place:
    """A share of the positions of a batch of maps of ``sizes`` (N first, no channels), drawn at random, or all."""
    total = math.prod(sizes)
    wanted = math.ceil(total * share)
    flat = torch.arange(total) if wanted >= total else torch.randperm(total, generator=generator)[:wanted]
    return torch.unravel_index(flat, sizes)


def wanted_positions(module: nn.Module, blocks: list[Blocks]) -> int:
    """How many positions a layer is solved on, where there are so many."""
    taps = math.prod(module.weight.shape[2:])  # type: ignore[union-attr, arg-type]
    least = LEAST if getattr(module, "groups", 1) == 1 else LEAST_GROUPED
    return max(least, PER_FEATURE * taps * max(b.ins.shape[1] for b in blocks))


def rows(value: torch.Tensor, at: Place, channels_last: bool) -> torch.Tensor:
    """What a map holds at some positions, [P, C]."""
    at = tuple(i.to(value.device) for i in at)
    return value[at] if channels_last else value[(at[0], slice(None), *at[1:])]


def windows(module: nn.Module, x: torch.Tensor, at: Place) -> torch.Tensor:
    """What a layer reads for some positions of its output, [P, C, taps]."""
    if isinstance(module, nn.Linear):
        return rows(x, at, channels_last=True)[:, :, None]
    conv: Any = module
    if any(conv._reversed_padding_repeated_twice):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    x = x.contiguous()
    spatial = x.shape[2:]
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(spatial, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ]
    steps = x.stride()[2:]
    moved = [s * t for s, t in zip(conv.stride, steps, strict=True)]
    tapped = [d * t for d, t in zip(conv.dilation, steps, strict=True)]
    view = x.as_strided((*x.shape[:2], *out, *conv.kernel_size), (*x.stride()[:2], *moved, *tapped))
    return rows(view, at, channels_last=False).flatten(2)


def normal(read: torch.Tensor, wanted: torch.Tensor, blocks: Blocks) -> Normal:
    """Normal equations of blocks from what the layer reads [P, C, taps] and what it should give [P, O]."""
    x = read[:, torch.as_tensor(blocks.ins, device=read.device)]  # [P, B, i, taps]
    y = wanted[:, torch.as_tensor(blocks.outs, device=read.device)]
    return Normal.of(x.flatten(2).transpose(0, 1), y.transpose(0, 1))


def weights_in(module: nn.Module, blocks: Blocks) -> torch.Tensor:
    """The weights of blocks as regressions have them, float64 [B, i · taps, o]."""
    weight: torch.Tensor = module.weight.detach().double()  # type: ignore[union-attr, operator, assignment]
    if getattr(module, "groups", 1) > 1:
        picked = weight[torch.as_tensor(blocks.outs)]
    else:
        picked = weight[torch.as_tensor(blocks.outs)[:, :, None], torch.as_tensor(blocks.ins)[:, None]]
    return picked.reshape(*blocks.outs.shape, -1).transpose(1, 2)


def put_in(weight: torch.Tensor, solved: torch.Tensor, blocks: Blocks, grouped: bool) -> None:
    """Write regressions [B, i · taps, o] into a layer's weight [out, in, ...]."""
    outs = torch.as_tensor(blocks.outs)
    turned = solved.transpose(1, 2).reshape(*blocks.outs.shape, -1, *weight.shape[2:]).to(weight.dtype)
    if grouped:
        weight[outs] = turned
    else:
        weight[outs[:, :, None], torch.as_tensor(blocks.ins)[:, None]] = turned


def with_weights(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The layer with another weight, and another bias where it has one."""
    old: Any = module
    changes = {"weight": nn.Parameter(weight, old.weight.requires_grad)}
    if bias is not None and old.bias is not None:
        changes["bias"] = nn.Parameter(bias.to(weight.dtype), old.bias.requires_grad)
    return renewed(module, **changes)


def with_moments(
    norm: nn.Module, mean: torch.Tensor, var: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor
) -> nn.Module:
    """A batch norm that gives ``slope · x + offset`` for values whose mean and variance are these: in eval mode, and in
    train mode on a batch of them."""
    old: Any = norm
    deviation = (var + old.eps).sqrt()
    kept = {"running_mean": mean.to(old.running_mean.dtype), "running_var": var.to(old.running_var.dtype)}
    gain, shift = (slope * deviation).to(old.weight.dtype), (offset + slope * mean).to(old.bias.dtype)
    return renewed(
        norm,
        **kept,
        weight=nn.Parameter(gain, old.weight.requires_grad),
        bias=nn.Parameter(shift, old.bias.requires_grad),
    )
