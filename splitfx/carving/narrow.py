"""Narrow modules: the part of a layer that some of its channels need, in the order in which they come; and wider ones,
with channels of zeros.

Each function returns a new module with its own parameters and never touches the one it is given. What is kept of a
weight is a view of it where it lies in one block, so that nothing is copied that may be thrown away; the pipeline
takes the graph that it returns apart from every other (`splitfx.ir.graph.take_apart`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from splitfx.ir.copies import unhooked

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
BatchNorm = nn.modules.batchnorm._BatchNorm
PAD = -1  # in the place of a channel: one that is added


def _new(module: nn.Module, **changes: Any) -> nn.Module:
    """The module again, some of its tensors and plain attributes changed."""
    made = unhooked(module)
    for name, value in changes.items():
        if isinstance(value, nn.Parameter) or name in made._parameters:
            made._parameters[name] = value
        elif name in made._buffers:
            made._buffers[name] = value
        else:
            setattr(made, name, value)
    return made


def _pick(tensor: torch.Tensor | None, rows: np.ndarray) -> torch.Tensor | None:
    if tensor is None:
        return None
    picked = _part(tensor, (0, rows))
    return nn.Parameter(picked, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else picked


def _part(tensor: torch.Tensor, *picks: tuple[int, np.ndarray]) -> torch.Tensor:
    """The positions picked along some dims; a view where all of them are runs."""
    part = tensor.detach()
    for dim, positions in sorted(picks, key=lambda pick: not _is_run(pick[1])):  # runs are free and leave less to move
        if _is_run(positions):
            part = part.narrow(dim, int(positions[0]), len(positions))
        else:
            part = part.index_select(dim, torch.as_tensor(positions, device=tensor.device))
    return part.contiguous(memory_format=torch.channels_last) if is_channels_last(tensor) else part


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Its channels lie last in memory, and not because of sizes for which that is the same."""
    last = torch.channels_last
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)


def _block(weight: torch.Tensor, outs: np.ndarray, ins: np.ndarray) -> torch.Tensor:
    return _part(weight, (0, outs), (1, ins))


def _is_run(positions: np.ndarray) -> bool:
    return len(positions) > 0 and bool((np.diff(positions) == 1).all())


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
    bias = _pick(module.bias, outs)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return _new(module, weight=kept, bias=bias, in_features=len(ins), out_features=len(outs))
    return _new(module, weight=kept, bias=bias, in_channels=len(ins), out_channels=len(outs))


def grouped(module: nn.Module, ins: tuple[np.ndarray, ...], outs: tuple[np.ndarray, ...]) -> nn.Module:
    """One conv with ``groups=len(ins)`` for equal blocks; its channels come branch after branch."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    blocks = [_blocks(module, o, i) for i, o in zip(ins, outs, strict=True)]
    order = np.concatenate(outs)
    return _new(
        module,
        weight=nn.Parameter(torch.cat(blocks), weight.requires_grad),
        bias=_pick(module.bias, order),  # type: ignore[arg-type]
        in_channels=sum(map(len, ins)),
        out_channels=len(order),
        groups=len(ins),
    )


def groups_of(module: nn.Module, groups: np.ndarray, outs: np.ndarray) -> nn.Module:
    """A conv that keeps some of its groups: ``groups`` are their numbers, ``outs`` their output channels."""
    per: int = module.in_channels // module.groups  # type: ignore[operator, assignment]
    rows = (groups[:, None] * per + np.arange(per)).flatten() if transposed(module) else outs
    return _new(
        module,
        weight=_pick(module.weight, rows),  # type: ignore[arg-type]
        bias=_pick(module.bias, outs),  # type: ignore[arg-type]
        in_channels=len(groups) * per,
        out_channels=len(outs),
        groups=len(groups),
    )


def has_channels(module: nn.Module) -> bool:
    """The module holds something per channel, so a piece of the channels needs a narrow one."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, BatchNorm | nn.GroupNorm | nn.modules.instancenorm._InstanceNorm)


def divides(module: nn.Module, positions: np.ndarray) -> bool:
    """The channels at ``positions`` do not cut a group of a GroupNorm apart."""
    if not isinstance(module, nn.GroupNorm):
        return True
    per = module.num_channels // module.num_groups
    if len(positions) % per:
        return False
    rows = positions.reshape(-1, per)
    return bool((rows // per == rows[:, :1] // per).all())


def channelwise(module: nn.Module, positions: np.ndarray) -> nn.Module:
    """A norm or PReLU on some of its channels; a layer norm on all of them, in another order."""
    if isinstance(module, nn.LayerNorm):
        return _new(module, weight=_pick(module.weight, positions), bias=_pick(module.bias, positions))
    if isinstance(module, nn.RMSNorm):
        return _new(module, weight=_pick(module.weight, positions))
    if isinstance(module, nn.PReLU):
        return _new(module, weight=_pick(module.weight, positions), num_parameters=len(positions))
    if isinstance(module, nn.GroupNorm):
        per = module.num_channels // module.num_groups
        return _new(
            module,
            weight=_pick(module.weight, positions),
            bias=_pick(module.bias, positions),
            num_groups=len(positions) // per,
            num_channels=len(positions),
        )
    tensors = {
        name: _pick(getattr(module, name), positions) for name in ("weight", "bias", "running_mean", "running_var")
    }
    counted = module._buffers.get("num_batches_tracked")
    if counted is not None:
        tensors["num_batches_tracked"] = counted.clone()
    return _new(module, **tensors, num_features=len(positions))


# ---------------------------------------------------------------- wider


def _grown(tensor: torch.Tensor | None, places: np.ndarray, dim: int = 0, fill: float = 0.0) -> Any:
    """The tensor with its positions at ``places`` along a dim, and ``fill`` where that is `PAD`."""
    if tensor is None:
        return None
    sizes = list(tensor.shape)
    sizes[dim] = len(places)
    old = torch.as_tensor(places[places != PAD], device=tensor.device)
    at = torch.as_tensor(np.flatnonzero(places != PAD), device=tensor.device)
    held = tensor.detach()
    grown = held.new_full(sizes, fill).index_copy_(dim, at, held.index_select(dim, old))
    return nn.Parameter(grown, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else grown


def wider(module: nn.Module, ins: np.ndarray, outs: np.ndarray) -> nn.Module:
    """A conv or linear layer with the input channels ``ins`` and the output channels ``outs``, rows and columns of
    zeros for those that are `PAD`; a depthwise conv stays depthwise."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    bias = _grown(module.bias, outs)  # type: ignore[arg-type]
    if getattr(module, "groups", 1) > 1:
        sizes = {"in_channels": len(ins), "out_channels": len(outs), "groups": len(ins)}
        return _new(module, weight=_grown(weight, outs), bias=bias, **sizes)
    rows, columns = (1, 0) if transposed(module) else (0, 1)
    grown = _grown(_grown(weight, outs, rows), ins, columns)
    if isinstance(module, nn.Linear):
        return _new(module, weight=grown, bias=bias, in_features=len(ins), out_features=len(outs))
    return _new(module, weight=grown, bias=bias, in_channels=len(ins), out_channels=len(outs))


def wider_norm(module: nn.Module, places: np.ndarray) -> nn.Module:
    """A norm or PReLU with the channels ``places``; those that are `PAD` give zero for zero."""
    if isinstance(module, nn.PReLU):
        return _new(module, weight=_grown(module.weight, places), num_parameters=len(places))
    fill = {"weight": 0.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    tensors = {name: _grown(getattr(module, name), places, fill=value) for name, value in fill.items()}
    counted = module._buffers.get("num_batches_tracked")
    if counted is not None:
        tensors["num_batches_tracked"] = counted.clone()
    return _new(module, **tensors, num_features=len(places))
