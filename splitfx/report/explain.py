"""`explain` and `compare`: what the compiler did to a graph, and two models side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from splitfx.compiler.pipeline import Step
from splitfx.errors import UnsupportedError
from splitfx.frontend.example_inputs import inputs_for, split_inputs
from splitfx.ground.difference import apart
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, say, told
from splitfx.ir.graph import info
from splitfx.ir.modes import in_eval
from splitfx.ir.notes import Note
from splitfx.report.profile import Profile, profile


@dataclass(frozen=True)
class Explanation(Shown):
    """What the compiler did to a graph: how it was traced, and every pass with its notes and figures."""

    model: str
    front_end: str
    notes: tuple[Note, ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        from splitfx.report.explanation import explanation_text

        return explanation_text(self)


def explain(split: nn.Module) -> Explanation:
    """The record of every step that made ``split``. Raises `UnsupportedError` for a model that splitfx did not make."""
    known = info(split)
    return Explanation(known.model_class, known.front_end, known.notes, tuple(known.steps))


@dataclass(frozen=True)
class Comparison(Shown):
    """Two models side by side on the same inputs; differences are of the outputs, in the models' own type."""

    before: Profile
    after: Profile
    max_abs: float
    max_rel: float

    def to_json(self) -> str:
        return json.dumps(
            {
                "max_abs": self.max_abs,
                "max_rel": self.max_rel,
                "before": json.loads(self.before.to_json()),
                "after": json.loads(self.after.to_json()),
            }
        )

    def __str__(self) -> str:
        from splitfx.report.explanation import comparison_text

        return comparison_text(self)


@told
def compare(model: nn.Module, split: nn.Module, example_inputs: Any = None, *, progress: Say = True) -> Comparison:
    """Profiles of both, and how far their outputs (in eval mode) are apart on ``example_inputs``, spelled as for
    `trace`; without them, on random inputs of the sizes that ``split`` was made for.

    ``max_rel`` is relative to the largest magnitude of each of ``model``'s outputs. A split network is not the
    dense one before it is fine-tuned, so a large difference is no fault. Raises `UnsupportedError` when the outputs
    have different shapes.
    """
    example_inputs = inputs_for(example_inputs, model, split)
    say("running both")
    first, second = outputs(model, example_inputs), outputs(split, example_inputs)
    if [t.shape for t in first] != [t.shape for t in second]:
        raise UnsupportedError(
            f"the outputs differ in shape: {[tuple(t.shape) for t in first]} and {[tuple(t.shape) for t in second]}"
        )
    far = [apart(b, a) for a, b in zip(first, second, strict=True)]
    return Comparison(
        profile(model, example_inputs),
        profile(split, example_inputs),
        max((d for d, _ in far), default=0.0),
        max((d / (s or 1.0) for d, s in far), default=0.0),
    )


def outputs(model: nn.Module, example_inputs: Any) -> list[torch.Tensor]:
    """The output tensors in eval mode, as float64; the model's modes are restored."""
    args, kwargs = split_inputs(example_inputs, model)
    with in_eval(model), torch.inference_mode():
        found = model(*args, **kwargs)
    return [t.double() for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
