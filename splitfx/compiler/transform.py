"""`transform`: a model and a plan in, the rewritten graph out."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from splitfx.compiler.pipeline import run_plan
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ground import limits
from splitfx.ground.exclusive import fresh
from splitfx.ground.progress import Say, told
from splitfx.ir.graph import is_canonical
from splitfx.text import shown


@told
@fresh()
def transform(
    model: nn.Module,
    plan: Plan | Pass | Sequence[Pass | Mapping[str, Any]] | Mapping[str, Any] | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    verify: bool = True,
    progress: Say = True,
) -> fx.GraphModule:
    """Rewrite ``model`` by ``plan``; returns a new ``torch.fx.GraphModule`` and never changes ``model``.

    ``plan`` is a `Plan`, what `Plan.of` makes one of (a pass, a list of passes, a dict), or the path of a plan file.
    ``example_inputs`` (see `trace`) or the plan's ``input_shape`` say the sizes; a graph from `trace` or `transform`
    needs neither. Every pass is held to its promise in float64 unless ``verify`` is off. The result has parameters of
    its own: train it, save it, export it. ``progress``: a moving line on a terminal; False, nothing; or a function that
    is told each step. Raises `TraceError`, `PlanError`, `UnsupportedError`, `PassError`,
    `VerificationError`.
    """
    plan = Plan.of(plan)
    if not is_canonical(model) or example_inputs is not None:
        inputs = inputs_for(model, plan) if example_inputs is None else example_inputs
        model = trace(model, inputs, verify=verify)
    assert isinstance(model, fx.GraphModule)
    return run_plan(model, plan, verify)


def inputs_for(model: nn.Module, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Zero inputs of the plan's ``input_shape`` on the model's device, in its type."""
    given = plan.input_shape
    if given is None:
        raise PlanError("no input sizes: give example_inputs, or a plan with input_shape")
    shapes = given if given and isinstance(given[0], tuple) else (given,)
    owned = next((p for p in model.parameters() if p.dtype.is_floating_point), torch.zeros(()))
    limits.check_memory(
        owned.element_size() * sum(math.prod(s) for s in shapes),  # type: ignore[arg-type]
        PlanError,
        f"input_shape {shown(given)}",
    )
    return tuple(torch.zeros(s, dtype=owned.dtype, device=owned.device) for s in shapes)  # type: ignore[arg-type]
