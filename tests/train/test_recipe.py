"""Recipes: checked settings, learning rates by hand, the presets' sources."""

from __future__ import annotations

import pytest
import torch

from splitfx.errors import PlanError
from splitfx.train.recipe import RECIPES, Recipe


def test_presets_are_whole_and_name_their_source() -> None:
    for name in RECIPES:
        assert Recipe.named(name).source
    cnsn = Recipe.named("subnetworks-cifar10")
    assert (cnsn.epochs, cnsn.batch_size, cnsn.lr, cnsn.momentum, cnsn.weight_decay) == (300, 32, 0.01, 0.9, 6e-4)
    with pytest.raises(PlanError, match=r"no recipe 'fine'.*Known: finetune"):
        Recipe.named("fine")


def test_steps_after_the_epochs_of_the_paper() -> None:
    cnsn = Recipe.named("subnetworks-cifar10")
    assert [round(cnsn.rate(epoch), 8) for epoch in (2, 50, 51, 100, 101, 151, 300)] == [
        0.01, 0.01, 0.001, 0.001, 1e-4, 1e-5, 1e-5,
    ]  # fmt: skip
    assert cnsn.rate(1, 0.5) == pytest.approx(0.005)
    assert 0 < cnsn.rate(1, 0.0) < 1e-4


def test_cosine_and_constant() -> None:
    cosine = Recipe(epochs=4, lr=1.0)
    assert [round(cosine.rate(e), 4) for e in (1, 2, 3, 4)] == [1.0, 0.8536, 0.5, 0.1464]
    assert cosine.rate(4, 1.0) == pytest.approx(0.0)
    assert Recipe(epochs=4, lr=1.0, schedule="constant").rate(4, 0.9) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"lr": 0.0}, "lr must be more than 0"),
        ({"lr": float("inf")}, "lr must be more than 0"),
        ({"epochs": "3"}, "epochs must be"),
        ({"optimizer": "adam"}, "optimizer must be"),
        ({"milestones": (2, 1), "schedule": "steps"}, "rising order"),
        ({"milestones": (1,)}, "milestones belong to schedule 'steps'"),
        ({"distillation": 1.5}, "from 0 to 1, or -1"),
        ({"warmup_epochs": 10}, "less than epochs"),
        ({"momentum": 1.0}, "from 0 to below 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe(**settings)


def test_words_of_the_command_line() -> None:
    made = Recipe.from_words("subnetworks-cifar10", ["lr=0.1", "milestones=3,6", "nesterov=true", "keep=last"])
    assert (made.lr, made.milestones, made.nesterov, made.keep, made.batch_size) == (0.1, (3, 6), True, "last", 32)
    for word, message in (
        ("lr", "no setting=value"),
        ("rate=1", "no setting 'rate'"),
        ("lr=fast", "lr must be"),
        ("milestones=3,x", "milestones must be"),
    ):
        with pytest.raises(PlanError, match=message):
            Recipe.from_words("subnetworks-cifar10", [word])


def test_decay_spares_norms_biases_and_what_is_free() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    own = list(model.parameters())
    free = [torch.nn.Parameter(torch.zeros(2, 2))]
    decays = lambda recipe: {  # noqa: E731
        id(p): g["weight_decay"] for g in recipe.make_optimizer(own, free).param_groups for p in g["params"]
    }
    found = decays(Recipe(weight_decay=0.5))
    assert [found[id(p)] for p in (*own, *free)] == [0.5, 0.0, 0.0, 0.0, 0.0]
    found = decays(Recipe(weight_decay=0.5, decay="all", optimizer="adamw"))
    assert [found[id(p)] for p in (*own, *free)] == [0.5, 0.5, 0.5, 0.5, 0.0]
