"""A recipe: all the settings of a training run, as data.

The learning rate is a function of the recipe and the epoch alone, so a resumed run needs no state of a schedule.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_type_hints

import torch

from splitfx.compiler import options
from splitfx.errors import PlanError, nearest


@dataclass(frozen=True)
class Recipe:
    """How to train. Raises `PlanError` for a value that makes no sense.

    ``batch_size`` is that of all processes together, so a result does not depend on their number. ``lr`` is the highest
    learning rate, reached after ``warmup_epochs``; then ``schedule`` "cosine" falls to 0 at the end, "steps" is
    multiplied by ``gamma`` after each epoch in ``milestones``. ``weight_decay`` is that of "all" parameters or of
    "weights" only (not biases and norms), as ``decay`` says. ``clip_norm``: the gradient's largest 2-norm, 0 for no
    limit. ``distillation``: the share of the loss that follows a teacher's outputs at ``temperature``; -1 is 0.5 where
    there is a teacher. ``frozen_norms``: batch norms use, and keep, their running statistics. ``patience``: epochs
    without a better validation accuracy before the run stops, 0 for never. ``keep``: the weights that the run ends
    with. ``source`` says where the settings are from.
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay: Literal["all", "weights"] = "weights"
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    clip_norm: float = 0.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    distillation: float = -1.0
    temperature: float = 4.0
    frozen_norms: bool = False
    patience: int = 0
    keep: Literal["best", "last"] = "best"
    seed: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        options.normalise(self, "recipe: {}")
        for name, right, rule in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("lr", 0 < self.lr < math.inf, "more than 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("milestones", list(self.milestones) == sorted(set(self.milestones)), "epochs in rising order"),
            ("gamma", 0 < self.gamma <= 1, "above 0, at most 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs or self.warmup_epochs == 0, "less than epochs"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("clip_norm", 0 <= self.clip_norm < math.inf, "0 or more"),
            ("distillation", self.distillation == -1 or 0 <= self.distillation <= 1, "from 0 to 1, or -1"),
            ("temperature", 0 < self.temperature < math.inf, "more than 0"),
            ("patience", self.patience >= 0, "0 or more"),
        ):
            if not right:
                raise PlanError(f"recipe: {name} must be {rule}; got {getattr(self, name)!r}")
        if self.milestones and self.schedule != "steps":
            raise PlanError(f"recipe: milestones belong to schedule 'steps', not to {self.schedule!r}")

    @classmethod
    def named(cls, name: str) -> Self:
        """One of `RECIPES`. Raises `PlanError` with the nearest name."""
        if name not in RECIPES:
            raise PlanError(f"there is no recipe '{name}'.{nearest(name, RECIPES)} Known: {', '.join(RECIPES)}")
        return cls(**RECIPES[name])

    @classmethod
    def from_words(cls, name: str, words: list[str]) -> Self:
        """A named recipe with changes such as ``lr=0.1`` and ``milestones=30,60``. Raises `PlanError`."""
        hints, changed = get_type_hints(cls), dataclasses.asdict(cls.named(name))
        for word in words:
            key, equals, text = word.partition("=")
            if not equals:
                raise PlanError(f"'{word}' is no setting=value of a recipe")
            if key not in hints:
                raise PlanError(f"a recipe has no setting '{key}'.{nearest(key, hints)} Known: {', '.join(hints)}")
            changed[key] = _value(text, hints[key])
        return cls(**changed)

    def rate(self, epoch: int, progress: float = 0.0) -> float:
        """The learning rate in ``epoch``, from 1, when the share ``progress`` of it is done."""
        done = epoch - 1 + progress
        if done < self.warmup_epochs:
            return self.lr * max(done, 1e-3) / self.warmup_epochs
        if self.schedule == "steps":
            return self.lr * self.gamma ** sum(epoch > m for m in self.milestones)
        if self.schedule == "cosine":
            share = (done - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1)
            return self.lr * 0.5 * (1 + math.cos(math.pi * share))
        return self.lr

    def make_optimizer(
        self, weights: list[torch.nn.Parameter], free: list[torch.nn.Parameter]
    ) -> torch.optim.Optimizer:
        """The optimiser of ``weights``; ``free`` are trained too, without decay (a regulariser's own)."""
        decayed = [p for p in weights if self.decay == "all" or p.dim() > 1]
        others = [p for p in weights if not (self.decay == "all" or p.dim() > 1)]
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, self.weight_decay), ([*others, *free], 0.0))
            if params
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


def _value(text: str, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(text, text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            return text
    if hint == tuple[int, ...]:
        return tuple(int(one) if one.isdigit() else one for one in text.split(",") if one)
    return text


_CNSN: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 1e-2,
    "momentum": 0.9,
    "decay": "all",
    "schedule": "steps",
    "milestones": (50, 100, 150),
    "warmup_epochs": 1,
    "distillation": 0.0,
}
_SPLITNET: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "decay": "all",
    "schedule": "steps",
    "milestones": (60, 120, 160),
    "gamma": 0.2,
    "distillation": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {
        "source": "splitfx: a short cosine at a low rate with the unsplit model as teacher",
    },
    "grouped-cifar10": {
        "epochs": 30,
        "batch_size": 128,
        "nesterov": True,
        "source": "MalekHosseini et al., arXiv 2002.03302: fine-tuning on CIFAR-10; the paper prints no settings, "
        "these are splitfx's",
    },
    "subnetworks-cifar10": {
        **_CNSN,
        "weight_decay": 6e-4,
        "source": "Fuengfusin and Tamukoh, Convolutional Network with Sub-Networks, section 3, CNSN; weight decay as "
        "in its Table 1",
    },
    "subnetworks-baseline-cifar10": {
        **_CNSN,
        "weight_decay": 6e-3,
        "source": "Fuengfusin and Tamukoh, Convolutional Network with Sub-Networks, section 3, the baseline model",
    },
    "splitnet-grouping": {
        **_SPLITNET,
        "weight_decay": 1e-4,
        "keep": "last",  # groups that are decided, not the epoch before they cost accuracy
        "source": "Kim et al., SplitNet (ICML 2017): the grouping phase, learning rate 0.1 in steps, L2 1e-4; epochs, "
        "batch and milestones are those of wide residual networks on CIFAR-100",
    },
    "splitnet-split": {
        **_SPLITNET,
        "weight_decay": 5e-4,
        "source": "Kim et al., SplitNet (ICML 2017): the split phase, L2 5e-4; epochs, batch and milestones are those "
        "of wide residual networks on CIFAR-100",
    },
}
