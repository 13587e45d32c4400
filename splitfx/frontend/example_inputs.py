"""Example inputs: their four spellings, and what of them torch.export is shown.

Does: reads a tensor, a tuple, a dict or ``((...), {...})`` as ``(args, kwargs)``, where shapes and numpy arrays may
stand for tensors; makes a batch of one a batch of two, and heights and widths larger, where a size of one would be a
case apart; says which sizes are free.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from splitfx.errors import UnsupportedError
from splitfx.frontend.size_rules import TooLong
from splitfx.ground import limits
from splitfx.ir.graph import TensorSpec, is_canonical, random_inputs
from splitfx.text import shown

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def split_inputs(example_inputs: Any, model: nn.Module | None = None) -> Inputs:
    """The four accepted spellings of example inputs as ``(args, kwargs)`` of tensors and other values.

    Where no tensor or array is among them, tuples of numbers such as (1, 3, 224, 224) are shapes: of normal values, the
    same in each call, in ``model``'s type and on its device. An array of floats takes the model's type. Raises
    `UnsupportedError` for shapes that no machine holds, and for a word or a number alone.
    """
    if example_inputs is None or isinstance(example_inputs, str | int | float):
        what = "there are none" if example_inputs is None else f"got {shown(example_inputs)}"
        raise UnsupportedError(f"example inputs are tensors, arrays or shapes, such as (1, 3, 224, 224); {what}")
    leaves = pytree.tree_leaves(example_inputs)
    if not any(isinstance(one, torch.Tensor | np.ndarray) for one in leaves):
        example_inputs = _of_shapes(example_inputs, _like(model))
    elif any(isinstance(one, np.ndarray) for one in leaves):
        example_inputs = pytree.tree_map_only(np.ndarray, lambda one: _of_array(one, _like(model)), example_inputs)
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        return (example_inputs,), {}
    pair = len(example_inputs) == 2 and isinstance(example_inputs[0], tuple | list)
    if pair and isinstance(example_inputs[1], dict) and all(isinstance(k, str) for k in example_inputs[1]):
        return tuple(example_inputs[0]), dict(example_inputs[1])
    return tuple(example_inputs), {}


def inputs_for(example_inputs: Any, *models: nn.Module) -> Inputs:
    """As `split_inputs`; where nothing is given, random ones of the sizes that the last of ``models`` was traced with.

    Raises `UnsupportedError` where none of them is a graph from `trace` or `transform`."""
    if example_inputs is not None:
        return split_inputs(example_inputs, models[0])
    for model in reversed(models):
        if is_canonical(model):
            return random_inputs(model)
    raise UnsupportedError(f"{type(models[-1]).__name__} is no traced graph: give its example_inputs")


def _like(model: nn.Module | None) -> torch.Tensor:
    """A number of the type and on the device that a model computes with."""
    found = (p for p in (model.parameters() if model is not None else ()) if p.dtype.is_floating_point)
    return next(found, torch.zeros(()))


def _of_shapes(given: Any, like: torch.Tensor) -> Any:
    """``given`` with a tensor in the place of each shape."""
    if _is_shape(given):
        shape = tuple(map(int, given))
        limits.check_shape(shape, UnsupportedError, "an example input")
        limits.check_memory(math.prod(shape) * 8, UnsupportedError, f"an example input of {shape}")
        return TensorSpec(shape, like.dtype, str(like.device)).random(torch.Generator().manual_seed(0))
    if isinstance(given, dict):
        return {name: _of_shapes(one, like) for name, one in given.items()}
    if type(given) in (tuple, list):
        return type(given)(_of_shapes(one, like) for one in given)
    return given


def _is_shape(given: Any) -> bool:
    if not isinstance(given, tuple | list) or not given:
        return False
    return all(isinstance(one, int | np.integer) and not isinstance(one, bool) and one >= 1 for one in given)


def _of_array(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    made = torch.from_numpy(np.ascontiguousarray(array))
    return made.to(device=like.device, dtype=like.dtype if made.dtype.is_floating_point else None)


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
