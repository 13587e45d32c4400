"""What "equal" means in the tests: one tolerance table, no tolerance at any call site.

Exactness is claimed in float64. Errors are relative to the largest value of the expected tensor, so that a
wrong scale, a swapped channel or a lost row shows, and rounding in small values does not.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

TOLERANCE = {
    torch.float64: 1e-10,  # another order of summation, no more
    torch.float32: 1e-4,  # through a deep network, and other runtimes
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
STRICT = 1e-12  # in float64, where the same numbers are added up in pieces; kernels of other CPUs give other last bits


def leaves(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists, dicts and dataclasses, in order."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
        else:
            found.append(leaf)
    return found


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite if sizes, types or nans differ."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.numel() or torch.equal(got, expected):
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    if not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(got[~finite].nan_to_num(), expected[~finite].nan_to_num()) or not finite.any():
        return 0.0 if not finite.any() and torch.equal(got.nan_to_num(), expected.nan_to_num()) else float("inf")
    scale = float(expected[finite].abs().max())
    return float((got[finite] - expected[finite]).abs().max()) / max(scale, 1e-300)


def difference(got: Any, expected: Any) -> str:
    """Empty when the two (nested) values are equal within the table; else what differs, in a few words."""
    ours, theirs = leaves(got), leaves(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} values instead of {len(theirs)}"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, torch.Tensor) or not isinstance(a, torch.Tensor):
            if a is not b and a != b:
                return f"value {i} is {a!r} instead of {b!r}"
            continue
        off, allowed = error(a, b), TOLERANCE.get(b.dtype, 0.0)
        if off > allowed:
            return f"value {i} of shape {tuple(b.shape)} is off by {off:.1e}, {allowed:.0e} allowed"
    return ""


def assert_equal(got: Any, expected: Any) -> None:
    wrong = difference(got, expected)
    assert not wrong, wrong


def run(model: nn.Module, inputs: Any, seed: int = 0) -> Any:
    """``model`` on ``(args, kwargs)``, a tensor or a tuple of tensors, after seeding torch."""
    from splitfx.frontend.example_inputs import split_inputs

    args, kwargs = copy.deepcopy(split_inputs(inputs))
    torch.manual_seed(seed)
    return model(*args, **kwargs)


def assert_equal_outputs(got: nn.Module, expected: nn.Module, inputs: Any) -> None:
    """Both modules, as they are, give the same output for the same seed."""
    with torch.no_grad():
        assert_equal(run(got, inputs), run(expected, inputs))


def training_difference(graph: nn.Module, model: nn.Module, inputs: Any) -> str:
    """One training step each, from the same seed, in the modes the modules are in: output, gradients,
    buffers.

    Works on copies; empty when all are equal. Gradients of parameters that ``graph`` lacks are not compared.
    """
    ours, theirs = copy.deepcopy(graph), copy.deepcopy(model)
    results = [run(m, inputs, seed=1) for m in (ours, theirs)]
    wrong = difference(*results)
    if wrong:
        return f"output: {wrong}"
    for result in results:
        floats = [t for t in leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
        if floats:
            # A weighted sum: the plain sum has no gradient through a softmax or a norm.
            total = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in floats)
            total.backward()  # type: ignore[union-attr]
    wanted = dict(theirs.named_parameters(remove_duplicate=False))
    for name, parameter in ours.named_parameters():
        a, b = parameter.grad, wanted[name].grad
        if (a is None) != (b is None):
            return f"gradient of {name}: {'missing' if a is None else 'not in the model'}"
        wrong = difference(a, b)
        if wrong:
            return f"gradient of {name}: {wrong}"
    buffers = dict(theirs.named_buffers(remove_duplicate=False))
    for name, buffer in ours.named_buffers():
        wrong = difference(buffer, buffers[name]) if name in buffers else ""
        if wrong:
            return f"buffer {name}: {wrong}"
    return ""


def assert_equal_training(graph: nn.Module, model: nn.Module, inputs: Any) -> None:
    wrong = training_difference(graph, model, inputs)
    assert not wrong, wrong
