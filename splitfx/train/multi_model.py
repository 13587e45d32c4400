"""The multi-model loss: a base model and its sub-models trained together (Fuengfusin and Tamukoh, eq. 1).

One batch, all forwards, one backward: l = l_base + Σ l_n. Beyond the paper: a weight per model; the sandwich (the base
model, the smallest and a few drawn ones in each step) and in-place distillation (the base model teaches the others) of
Yu and Huang, *Universally Slimmable Networks*; and ``accumulate``, one model at a time, which holds the activations of
one model instead of all and gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splitfx.errors import TrainingError
from splitfx.train.objective import Losses, follows, logits, model_names


class MultiModelLoss:
    """One loss over a base model and its sub-models, for `finetune(loss=...)` or a loop of your own:

        sum(MultiModelLoss()(split, inputs, targets).values()).backward()

    For a graph whose ``forward_all(x)`` gives the logits of every model, the base model's first. ``weights``: one
    factor per model. ``sandwich``: train the base model and the smallest in every call, and so many of the others,
    drawn anew each time from torch's generator; None trains all. ``distillation``: the share, 0 to 1, of a sub-model's
    loss that follows the base model's output at ``temperature``, through which no gradient goes. ``accumulate``: run
    one model at a time and keep its gradients only; with float16 small gradients may vanish, since no scale reaches
    them.

    Returns one loss per model by name: ``base``, ``sub0``, ``sub1`` … Raises `TrainingError`.
    """

    def __init__(
        self,
        weights: tuple[float, ...] | None = None,
        label_smoothing: float = 0.0,
        *,
        sandwich: int | None = None,
        distillation: float = 0.0,
        temperature: float = 1.0,
        accumulate: bool = False,
    ) -> None:
        if weights is not None and any(w < 0 for w in weights):
            raise TrainingError(f"weights of models are 0 or more; got {weights}")
        if not 0 <= distillation <= 1:
            raise TrainingError(f"distillation is a share from 0 to 1; got {distillation}")
        if temperature <= 0:
            raise TrainingError(f"temperature is more than 0; got {temperature}")
        if sandwich is not None and sandwich < 0:
            raise TrainingError(f"sandwich counts models that are drawn, 0 or more; got {sandwich}")
        self.weights, self.label_smoothing, self.sandwich = weights, label_smoothing, sandwich
        self.distillation, self.temperature, self.accumulate = distillation, temperature, accumulate

    def __call__(self, split: nn.Module, inputs: Any, targets: Any) -> Losses:
        if not hasattr(split, "forward_all"):
            raise TrainingError(f"{type(split).__name__} has no sub-models: make them with the pass SubNetworks")
        models: Any = split
        if self.sandwich is None and not self.accumulate:
            outputs = models.forward_all(inputs)
            return self._losses(enumerate(outputs), len(outputs), targets)
        if not hasattr(split, "forward_one"):
            raise TrainingError(f"sandwich and accumulate need forward_one, which {type(split).__name__} has not")
        count, forward = len(models.names), models.forward_one
        chosen = self._chosen(models, count)
        if not self.accumulate or not torch.is_grad_enabled():
            return self._losses(((i, forward(i - 1, inputs)) for i in chosen), count, targets)
        return self._one_by_one(split, chosen, count, lambda i: forward(i - 1, inputs), targets)

    def _chosen(self, split: Any, count: int) -> list[int]:
        if self.sandwich is None or count <= 2:
            return list(range(count))
        least = min(split.figures(), key=lambda m: m.macs).number + 1
        others = [i for i in range(1, count) if i != least]
        drawn = [others[i] for i in torch.randperm(len(others))[: self.sandwich].tolist()]
        return sorted({0, least, *drawn})

    def _losses(self, outputs: Iterable[tuple[int, Any]], count: int, targets: Any) -> dict[str, torch.Tensor]:
        names, weights = model_names(count), self._weights(count)
        found: dict[str, torch.Tensor] = {}
        teacher: torch.Tensor | None = None
        for index, output in outputs:
            teacher = logits(output).detach() if index == 0 else teacher
            found[names[index]] = weights[index] * self._loss(logits(output), targets, teacher if index else None)
        return found

    def _weights(self, count: int) -> tuple[float, ...]:
        weights = self.weights or (1.0,) * count
        if len(weights) != count:
            raise TrainingError(f"{len(weights)} weights for {count} models: give one per model, the base first")
        return weights

    def _loss(self, found: torch.Tensor, targets: Any, teacher: torch.Tensor | None) -> torch.Tensor:
        if teacher is None or not self.distillation:
            return F.cross_entropy(found, targets, label_smoothing=self.label_smoothing)
        taught = follows(found, teacher, self.temperature)
        if self.distillation == 1:
            return taught
        own = F.cross_entropy(found, targets, label_smoothing=self.label_smoothing)
        return (1 - self.distillation) * own + self.distillation * taught

    def _one_by_one(
        self, split: nn.Module, chosen: list[int], count: int, run: Callable[[int], Any], targets: Any
    ) -> dict[str, torch.Tensor]:
        """The losses as values; the first carries the gradients of all, which were taken model by model."""
        names, weights = model_names(count), self._weights(count)
        parameters = [p for p in split.parameters() if p.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        found: dict[str, torch.Tensor] = {}
        teacher: torch.Tensor | None = None
        for index in chosen:
            output = logits(run(index))
            teacher = output.detach() if index == 0 else teacher
            loss = weights[index] * self._loss(output, targets, teacher if index else None)
            trained = parameters and loss.requires_grad  # not so where all that this model reads is frozen
            for i, grad in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True) if trained else ()):
                if grad is not None:
                    held = sums[i]
                    sums[i] = grad if held is None else held + grad
            found[names[index]] = loss.detach()
            del output, loss
        reached = [(p, g) for p, g in zip(parameters, sums, strict=True) if g is not None]
        if not reached:
            raise TrainingError("no model has a parameter that is trained: all of them are frozen (requires_grad)")
        first = names[chosen[0]]
        carried = _Carried.apply(found[first], [g for _, g in reached], *(p for p, _ in reached))
        return {**found, first: carried}


class _Carried(torch.autograd.Function):
    """A value whose gradients were computed before."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, grads: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, None, *(grad.to(g.dtype) * g for g in ctx.grads)
