"""TensorBoard's events, where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from splitfx.train.finetune import finetune
from splitfx.train.recipe import Recipe
from tests.train.networks import data, network, split_network

pytest.importorskip("tensorboard")


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> epoch -> value, as TensorBoard shows them."""
    made = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = made.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: {one.step: one.value for one in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_events_have_the_values_of_the_history_also_when_a_run_goes_on(tmp_path: Path) -> None:
    made, recipe = data(), Recipe(epochs=3, batch_size=32, lr=0.05)

    def stop(epoch: object) -> None:
        raise InterruptedError

    for _ in range(2):
        with pytest.raises(InterruptedError):
            finetune(
                split_network(), made.train, made.val, recipe, teacher=network(), folder=tmp_path, resume=True,
                progress=False, on_epoch=stop,
            )  # fmt: skip
    history = finetune(
        split_network(), made.train, made.val, recipe, teacher=network(), folder=tmp_path, resume=True, progress=False
    )
    found = scalars(tmp_path)
    assert set(found) == {"rate", "val/loss", "val/accuracy", "train/loss", "train/distillation"}
    for one in history.epochs:
        assert found["rate"][one.epoch] == pytest.approx(one.rate)
        assert found["val/accuracy"][one.epoch] == pytest.approx(one.val.accuracy)
        assert found["val/loss"][one.epoch] == pytest.approx(one.val.loss)
        for name, value in one.losses.items():
            assert found[f"train/{name}"][one.epoch] == pytest.approx(value)
    assert {tuple(sorted(values)) for values in found.values()} == {(1, 2, 3)}
