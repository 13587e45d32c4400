"""A checkpoint that somebody has edited: one line, before any weight is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfx.errors import TrainingError
from splitfx.train import checkpoint
from tests.fuzz.kind_checkpoint import parts, step, template

Change = Callable[[dict[str, Any]], Any]


def resumed(folder: Path, change: Change, name: str = "adamw") -> None:
    found = copy.deepcopy(template(name))
    change(found)
    torch.save(found, folder / checkpoint.NAME)
    _, model, optimizer, about = parts(name)
    stored = checkpoint.read(folder, about)
    assert stored is not None
    checkpoint.require_fit(folder, stored, {"model": model}, optimizer)
    model.load_state_dict(stored.modules["model"])
    optimizer.load_state_dict(stored.optimizer)
    step(model, optimizer)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_as_it_was_written(name: str, tmp_path: Path) -> None:
    resumed(tmp_path, lambda found: None, name)


CHANGES: dict[str, tuple[Change, str]] = {
    "no format": (lambda c: c.pop("format"), "cannot be read"),
    "another format": (lambda c: c.update(format="x" * 5000), "has format 'xx"),
    "no recipe": (lambda c: c["about"].pop("recipe"), "cannot be read"),
    "a shape": (lambda c: c["about"].update(model={"0.weight": "x"}), "cannot be read.*about.model"),
    "a tensor in the recipe": (lambda c: c["about"]["recipe"].update(lr=torch.ones(2)), "cannot be read"),
    "epochs": (lambda c: c.update(epochs=[]), "it is of epoch 1 and knows 0"),
    "an epoch": (lambda c: c["epochs"][0].update(rate="x"), r"epochs\[0\].rate"),
    "the loss": (lambda c: c["before"].update(loss=float("nan")), "not finite"),
    "the best": (lambda c: c["best"].update(epoch=2), "its best epoch"),
    "the best weights": (lambda c: c["best"].pop("model"), "the best model has other tensors"),
    "a weight": (lambda c: c["model"].pop("0.weight"), "model has other tensors"),
    "a weight's size": (lambda c: c["model"].update({"0.weight": torch.ones(4)}), "0.weight is no tensor of .4, 3"),
    "a weight's type": (lambda c: c["model"].update({"0.bias": [1.0] * 4}), "0.bias is no tensor"),
    "a sparse weight": (lambda c: c["model"].update({"4.weight": torch.eye(4)[:2].to_sparse()}), "4.weight is no"),
    "no averages": (lambda c: c["optimizer"]["state"][0].pop("exp_avg"), "the optimiser knows a weight 0"),
    "averages' size": (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(1)), "exp_avg of weight 0"),
    "a tensor of averages": (lambda c: c["optimizer"]["state"].update({0: torch.ones(3)}), "knows a weight 0"),
    "no such weight": (lambda c: c["optimizer"]["state"].update({99: {}}), "knows a weight 99"),
    "a setting": (lambda c: c["optimizer"]["param_groups"][0].update(eps="x"), "other settings"),
    "a rate": (lambda c: c["optimizer"]["param_groups"][0].update(lr=None), "other settings"),
    "no settings": (lambda c: c["optimizer"].pop("param_groups"), "is damaged"),
    "an optimiser": (lambda c: c.update(optimizer=[]), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_checkpoint_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, why = CHANGES[name]
    with pytest.raises(TrainingError, match=why) as caught:
        resumed(tmp_path, change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_sabotage_without_the_check_training_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "require_fit", lambda *given: None)
    with pytest.raises(KeyError):
        resumed(tmp_path, CHANGES["no averages"][0])
