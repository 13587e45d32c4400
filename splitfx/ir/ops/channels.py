"""Modules on some of their channels, or on more: the helpers with which rows say how theirs is narrowed and widened.

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

PAD = -1  # in the place of a channel: one that is added


def renewed(module: nn.Module, **changes: Any) -> nn.Module:
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


def picked(tensor: torch.Tensor | None, positions: np.ndarray) -> torch.Tensor | None:
    """Its rows at these positions, a parameter where it is one."""
    if tensor is None:
        return None
    part = block(tensor, (0, positions))
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def block(tensor: torch.Tensor, *picks: tuple[int, np.ndarray]) -> torch.Tensor:
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


def _is_run(positions: np.ndarray) -> bool:
    return len(positions) > 0 and bool((np.diff(positions) == 1).all())


def grown(tensor: torch.Tensor | None, places: np.ndarray, dim: int = 0, fill: float = 0.0) -> Any:
    """The tensor with its positions at ``places`` along a dim, and ``fill`` where that is `PAD`."""
    if tensor is None:
        return None
    sizes = list(tensor.shape)
    sizes[dim] = len(places)
    old = torch.as_tensor(places[places != PAD], device=tensor.device)
    at = torch.as_tensor(np.flatnonzero(places != PAD), device=tensor.device)
    held = tensor.detach()
    wide = held.new_full(sizes, fill).index_copy_(dim, at, held.index_select(dim, old))
    return nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide
