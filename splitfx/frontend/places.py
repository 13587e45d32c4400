"""Where a tensor that torch.export took for a constant is held in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def places(private: nn.Module) -> dict[Any, tuple[str, torch.Tensor]]:
    """Path and value of parameters and buffers by the memory that they lie in: torch.export takes them for constants
    where forward finds them in a list, or through a global name. Not of one whose memory is also kept without
    gradients, as a constant."""
    held = (*private.named_buffers(), *private.named_parameters())
    found: dict[Any, tuple[str, torch.Tensor]] = {memory(t): (path, t) for path, t in held}
    for module in private.modules():
        own = [v for name, v in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
        for leaf in pytree.tree_leaves(own):
            twin = found.get(memory(leaf), ("", leaf))[1]
            if isinstance(leaf, torch.Tensor) and twin.requires_grad and not leaf.requires_grad:
                del found[memory(leaf)]
    found.pop(None, None)
    return found


def memory(value: Any) -> Any:
    """What is equal for two tensors with the same numbers in the same memory; None where there is none."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout is not torch.strided or not value.data_ptr():
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
