"""What a run minimises: the loss of a batch, a teacher's part of it, and what a regulariser adds.

Everything lies in one module's `forward`, since data parallelism needs each step to be one call of the module that it
wraps, however often the network inside is run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splitfx.errors import TrainingError
from splitfx.train.recipe import Recipe

Losses = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Any, Any], torch.Tensor | Losses]
Regulariser = Callable[[], torch.Tensor | Losses]


class Objective(nn.Module):
    """Maps a batch to what is minimised: the sum of its losses and penalties.

    ``loss(split, inputs, targets)`` is a mean over the batch, a scalar or several by name; by default cross-entropy of
    the logits [N, C] with class numbers [N], with the recipe's label smoothing, summed over a base model and its
    sub-models where there are any, and with a teacher its share of

        temperature² · KL(softmax(teacher / temperature) ‖ softmax(logits / temperature))

    (Hinton et al., arXiv 1503.02531, section 2). ``regulariser()`` depends on weights alone; a module's parameters are
    trained along.
    """

    def __init__(
        self,
        split: nn.Module,
        recipe: Recipe,
        teacher: nn.Module | None = None,
        loss: Loss | None = None,
        regulariser: Regulariser | None = None,
    ) -> None:
        super().__init__()
        self.split, self.recipe, self.loss = split, recipe, loss
        self.regulariser = regulariser
        # In a tuple: a teacher is no part of what is trained, saved or sent between processes.
        self.teacher: tuple[nn.Module, ...] = ()
        if teacher is not None:
            self.teacher = (copy.deepcopy(teacher).eval().requires_grad_(False),)

    def forward(self, inputs: Any, targets: Any, share: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What is minimised, and its parts by name. ``share``: what the batch counts beside those of other processes,
        1 where all have equally many samples; a penalty, which all share, counts 1 everywhere."""
        losses = named("loss", (self.loss or self.classification)(self.split, inputs, targets))
        penalties = {} if self.regulariser is None else named("penalty", self.regulariser())
        total = torch.stack([share * one.float() for one in losses.values()] + [p.float() for p in penalties.values()])
        return total.sum(), {name: one.detach() for name, one in (losses | penalties).items()}

    def classification(self, split: nn.Module, inputs: Any, targets: Any) -> Losses:
        """Of one model, or of a base model and its sub-models, each as if it were alone (see `MultiModelLoss`)."""
        several = getattr(split, "forward_all", None)
        if several is None:
            return self.of_one(split(inputs), inputs, targets)
        outputs = several(inputs)
        wanted = self.wanted(inputs)
        parts = [self.of_one(out, inputs, targets, wanted) for out in outputs]
        return {
            model if name == "loss" else f"{model} {name}": value
            for model, part in zip(model_names(len(outputs)), parts, strict=True)
            for name, value in part.items()
        }

    def of_one(self, output: Any, inputs: Any, targets: Any, wanted: torch.Tensor | None = None) -> Losses:
        found = logits(output)
        entropy = F.cross_entropy(found, targets, label_smoothing=self.recipe.label_smoothing)
        part = self.distillation
        if not part:
            return {"loss": entropy}
        wanted = self.wanted(inputs) if wanted is None else wanted
        assert wanted is not None
        follow = follows(found, wanted, self.recipe.temperature)
        return {"loss": (1 - part) * entropy, "distillation": part * follow}

    @torch.no_grad()
    def wanted(self, inputs: Any) -> torch.Tensor | None:
        """What the teacher says; None where nothing follows one."""
        return logits(self.teacher[0](inputs)) if self.distillation else None

    @property
    def distillation(self) -> float:
        """The share of the loss that follows the teacher."""
        if not self.teacher:
            return 0.0
        return 0.5 if self.recipe.distillation < 0 else self.recipe.distillation

    def follow(self, device: torch.device) -> None:
        """Bring the teacher to where the batches are."""
        for teacher in self.teacher:
            teacher.to(device)

    def free(self) -> list[nn.Parameter]:
        """Parameters of the regulariser that the network does not own."""
        owned = {id(p) for p in self.split.parameters()}
        module = self.regulariser
        return [p for p in module.parameters() if id(p) not in owned] if isinstance(module, nn.Module) else []


def named(name: str, value: Any) -> dict[str, torch.Tensor]:
    """A loss, or several by name, as a dict. Raises `TrainingError`."""
    found = dict(value) if isinstance(value, Mapping) else {name: value}
    for key, one in found.items():
        if not isinstance(one, torch.Tensor) or one.dim():
            what = f"a tensor of shape {list(one.shape)}" if isinstance(one, torch.Tensor) else type(one).__name__
            raise TrainingError(f"the {name} '{key}' is {what}, not a scalar tensor: return a mean over the batch")
    return found


def follows(found: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature² · KL(softmax(wanted / temperature) ‖ softmax(found / temperature)), a mean over the batch."""
    t = temperature
    ours, theirs = (found / t).log_softmax(1), (wanted.to(found.dtype) / t).log_softmax(1)
    return t**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def model_names(count: int) -> list[str]:
    """``base``, ``sub0``, ``sub1`` …"""
    return ["base", *(f"sub{i}" for i in range(count - 1))]


def logits(output: Any) -> torch.Tensor:
    """The class scores in a model's output. Raises `TrainingError` where there are none, or several."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), torch.Tensor):
        return output["logits"]
    raise TrainingError(
        f"the model's output is {type(output).__name__}, not one tensor of class scores [N, C]: give a loss of your "
        "own, loss(split, inputs, targets)"
    )
