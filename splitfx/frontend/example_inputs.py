"""Example inputs: their four spellings, and what of them torch.export is shown.

Does: reads a tensor, a tuple, a dict or ``((...), {...})`` as ``(args, kwargs)``; makes a batch of one a batch of two,
and heights and widths larger, where a size of one would be a case apart; says which sizes are free.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from splitfx.frontend.size_rules import TooLong

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def split_inputs(example_inputs: Any) -> Inputs:
    """The four accepted spellings of example inputs as ``(args, kwargs)``."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        return (example_inputs,), {}
    pair = len(example_inputs) == 2 and isinstance(example_inputs[0], tuple | list)
    if pair and isinstance(example_inputs[1], dict) and all(isinstance(k, str) for k in example_inputs[1]):
        return tuple(example_inputs[0]), dict(example_inputs[1])
    return tuple(example_inputs), {}


def widen_batch(inputs: Inputs) -> Inputs:
    """A batch of one would be taken for a constant by torch.export, so show it a batch of two."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return inputs
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, torch.Tensor) else t, inputs)


def larger(inputs: Inputs, times: int) -> Inputs:
    """Inputs whose height, width and depth are some times larger, of no particular values. Raises `TooLong` for more
    than 2**28 numbers."""

    def grown(leaf: Any) -> Any:
        if times == 1 or not isinstance(leaf, torch.Tensor) or leaf.dim() < 3:
            return leaf
        shape = [size * times if dim > 1 else size for dim, size in enumerate(leaf.shape)]
        if math.prod(shape) > 2**28:
            raise TooLong("larger inputs would take too much memory")
        return leaf.new_zeros(shape).requires_grad_(leaf.requires_grad)

    return pytree.tree_map(grown, inputs)


def free_sizes(leaf: Any, how: str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    first, last = int(how == "sizes"), min(leaf.dim(), 1) if how == "batch" else leaf.dim()
    return {dim: Dim.AUTO for dim in range(first, last) if dim != 1 or leaf.dim() < 4}  # channels are the model's own


def by_name(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """torch.export wants free sizes under the names of forward's parameters: what ``*xs`` takes as one tuple, what
    ``**named`` takes as one dict."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name for p in parameters}
    found = dict(zip(names, args, strict=False))
    found |= {p.name: tuple(args[len(names) :]) for p in parameters if p.kind is p.VAR_POSITIONAL}
    found |= {name: value for name, value in kwargs.items() if name in known}
    others = {name: value for name, value in kwargs.items() if name not in known}
    return found | ({p.name: others for p in parameters if p.kind is p.VAR_KEYWORD} if others else {})
