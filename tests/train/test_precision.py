"""Mixed precision, and the settings that accelerate keeps in a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx.errors import TrainingError
from splitfx.train.finetune import evaluate, finetune
from splitfx.train.processes import accelerated
from splitfx.train.recipe import Recipe
from splitfx.train.search.greedy import search_factors
from splitfx.train.search.space import SearchSpace
from splitfx.train.search.tuner import RecipeTuner
from tests.train.networks import data, network, split_network

HALF = Recipe(epochs=5, batch_size=32, lr=0.1, mixed_precision="bf16", keep="last")


def test_bf16_on_a_cpu_computes_in_it_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    """Layers run in bfloat16, the split learns, and a resumed run is the uninterrupted one."""
    made, seen = data(), set()

    def loss(split: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found = split(x)
        seen.add(found.dtype)
        return nn.functional.cross_entropy(found, y)

    whole = split_network()
    history = finetune(whole, made.train, made.val, HALF, loss=loss, progress=False)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert history.accuracy > history.before.accuracy + 20

    def stop(epoch: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        finetune(
            split_network(), made.train, made.val, HALF, loss=loss, folder=tmp_path, progress=False, on_epoch=stop
        )  # fmt: skip
    again = split_network()
    finetune(again, made.train, made.val, HALF, loss=loss, folder=tmp_path, resume=True, progress=False)
    mine, theirs = again.state_dict(), whole.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_fp16_on_a_cpu_is_refused() -> None:
    """Accelerate would train in full precision without a word."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made, split = data(), split_network()
    for device in ("auto", "cpu"):
        with pytest.raises(TrainingError, match="mixed_precision=fp16 is not possible on cpu.*'bf16' or 'no'"):
            finetune(split, made.train, made.val, Recipe(mixed_precision="fp16"), device=device, progress=False)


def test_one_process_trains_in_several_precisions() -> None:
    """And a search, which scores and trains in one process, in half precision too."""
    made = data()
    for precision in ("bf16", "no", "bf16"):
        recipe = Recipe(epochs=1, mixed_precision=precision)  # type: ignore[arg-type]
        finetune(split_network(), made.train, made.val, recipe, progress=False)
    found = search_factors(
        SearchSpace(network(), torch.zeros(1, 1, 12, 12), factors=(2,)),
        RecipeTuner(made.train, made.val, Recipe(epochs=1, mixed_precision="bf16")), tolerance=100.0, verify=False,
    )  # fmt: skip
    assert found.selected == (2, 2)
    assert evaluate(found.split, made.val, mixed_precision="bf16", batch_size=64).accuracy == found.accuracy


def test_an_accelerator_of_the_users_keeps_its_settings() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    states = (AcceleratorState._shared_state, PartialState._shared_state)
    before = [dict(one) for one in states]
    try:
        mine = Accelerator(mixed_precision="bf16", cpu=True)
        with accelerated("no", "cpu", unused=False) as own:
            assert own.mixed_precision == "no"
        assert mine.mixed_precision == "bf16"
    finally:
        for state, known in zip(states, before, strict=True):
            state.clear()
            state.update(known)
