"""A checkpoint of a training run, edited: gone on with for one step where that is not refused."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splitfx.train import checkpoint
from splitfx.train.history import Epoch, Score
from splitfx.train.objective import Objective
from splitfx.train.recipe import Recipe
from tests.fuzz.mutate import edited, values

SAMPLE = 100


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def parts(name: str) -> tuple[Recipe, nn.Module, Any, checkpoint.About]:
    recipe, model = Recipe(epochs=3, optimizer=name), network()  # type: ignore[arg-type]
    optimizer = recipe.make_optimizer(list(model.parameters()), [])
    return (
        recipe,
        model,
        optimizer,
        checkpoint.About.of(recipe, model, {"train": 4, "val": 4}, Objective(model, recipe)),
    )


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def prepare() -> None:
    for name in ("sgd", "adamw"):
        template(name)


@cache
def template(name: str) -> dict[str, Any]:
    _, model, optimizer, about = parts(name)
    step(model, optimizer)
    score = {"accuracy": 50.0, "loss": 1.0, "samples": 4}
    epoch = {"epoch": 1, "rate": 0.1, "losses": {"loss": 1.0}, "val": score, "samples": 4, "seconds": 0.5}
    return {
        "format": checkpoint.FORMAT,
        "about": copy.deepcopy(vars(about)),
        "epoch": 1,
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "before": score,
        "epochs": [epoch],
        "best": {"epoch": 1, "model": dict(model.state_dict())},
    }


def draw(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    name = rng.choice(("sgd", "adamw"))
    found = edited(template(name), rng, folder)
    if rng.random() < 0.3:
        _edit_tensor(found, rng, folder)
    torch.save(found, folder / checkpoint.NAME)
    _, model, optimizer, about = parts(name)
    stored = checkpoint.read(folder, about)
    assert stored is not None
    checkpoint.require_fit(folder, stored, {"model": model}, optimizer)
    model.load_state_dict(stored.modules["model"])
    optimizer.load_state_dict(stored.optimizer)
    step(model, optimizer)
    assert isinstance(stored.before, Score)
    assert all(isinstance(one, Epoch) for one in stored.epochs)
    return "accepted"


def _edit_tensor(found: dict[str, Any], rng: random.Random, folder: Path) -> None:
    """Another tensor, or something else, in the place of one."""
    state = found.get("model")
    if isinstance(state, dict) and state:
        others = [
            torch.zeros(2),
            torch.zeros((), dtype=torch.int64),
            torch.empty(4, device="meta"),
            torch.eye(3).to_sparse(),
        ]
        state[rng.choice(list(state))] = rng.choice([*others, rng.choice(values(rng, folder))])
