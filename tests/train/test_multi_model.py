"""The multi-model loss: what it adds up to, its options, and that one model at a time gives the joint gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import splitfx
from splitfx import MultiModelLoss, Recipe
from splitfx.errors import TrainingError
from splitfx.passes import SubNetworks
from splitfx.subnetworks.entry import entries
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.train.data import load_data
from tests import oracle
from tests.subnetworks.networks import small
from tests.traced import made_once

X = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 3, 1, 9, 2, 4])


@made_once
def divided(statistics: str = "shared", cuts: tuple[int, ...] = (1, 2, 3)) -> SubNetworksGraph:
    step = SubNetworks(cuts=cuts, statistics=statistics)  # type: ignore[arg-type]
    split = splitfx.transform(small().double(), step, X)
    assert isinstance(split, SubNetworksGraph)
    return split


def gradients(split: nn.Module, loss: MultiModelLoss) -> dict[str, torch.Tensor]:
    """Of one backward pass in train mode, with the running statistics that it leaves."""
    work = copy.deepcopy(split).train()
    torch.manual_seed(0)
    losses = loss(work, X, Y)
    torch.stack(list(losses.values())).sum().backward()
    found = {name: p.grad for name, p in work.named_parameters() if p.grad is not None}
    found |= {f"loss {name}": value.detach() for name, value in losses.items()}
    return found | {name: b.clone() for name, b in work.named_buffers() if b.is_floating_point()}


def test_it_is_the_sum_of_every_model_s_own_loss() -> None:
    split = divided()
    losses = MultiModelLoss((1.0, 0.5, 2.0, 0.0), label_smoothing=0.1)(split, X, Y)
    assert list(losses) == ["base", "sub0", "sub1", "sub2"]
    models = (split, split.detach(0), split.detach(1), split.detach(2))
    for weight, value, model in zip((1.0, 0.5, 2.0, 0.0), losses.values(), models, strict=True):
        oracle.assert_equal(value.detach(), weight * F.cross_entropy(model(X), Y, label_smoothing=0.1).detach())


def test_its_gradients_are_those_of_detached_models_added_up() -> None:
    """An own loop over what is detached, model by model, without the loss and without `forward_all`."""
    split = divided("private")
    work = copy.deepcopy(split).train()
    for model in (work.base(), *(work.detach(i) for i in range(3))):
        F.cross_entropy(model(X), Y).backward()
    found = gradients(split, MultiModelLoss())
    wanted = {name: p.grad for name, p in work.named_parameters() if p.grad is not None}
    assert wanted.keys() <= found.keys()
    oracle.assert_equal({name: found[name] for name in wanted}, wanted)


@pytest.mark.parametrize("statistics", ["shared", "private"])
@pytest.mark.parametrize(
    "options", [{}, {"weights": (1.0, 0.3, 0.2, 2.0)}, {"distillation": 0.4, "temperature": 3.0}, {"sandwich": 1}]
)
def test_one_model_at_a_time_gives_the_joint_gradients(statistics: str, options: dict[str, Any]) -> None:
    """To 1e-10 in float64, running statistics and losses too."""
    split = divided(statistics)
    joint, one = (
        gradients(split, MultiModelLoss(**options)),
        gradients(split, MultiModelLoss(**options, accumulate=True)),
    )
    assert joint.keys() == one.keys()
    assert any(float(g.abs().max()) > 1e-3 for name, g in joint.items() if name.startswith("10."))
    oracle.assert_equal(one, joint)


@pytest.mark.parametrize("options", [{}, {"distillation": 0.4}, {"sandwich": 1}])
def test_one_at_a_time_where_only_step_downs_are_trained(options: dict[str, Any]) -> None:
    split = divided()
    split.requires_grad_(False)
    for _, entry in entries(split):
        entry.requires_grad_(True)
    joint, one = (gradients(split, MultiModelLoss(**options, accumulate=accumulate)) for accumulate in (False, True))
    assert any(float(g.abs().max()) > 1e-3 for name, g in joint.items() if name.startswith("sub2."))
    oracle.assert_equal(one, joint)


def test_one_at_a_time_where_all_is_frozen() -> None:
    with pytest.raises(TrainingError, match="no model has a parameter that is trained"):
        MultiModelLoss(accumulate=True)(divided().requires_grad_(False), X, Y)


def test_a_lost_model_would_be_seen() -> None:
    """Sabotage: the gradients without one of the models are others."""
    split = divided()
    joint, fewer = (
        gradients(split, MultiModelLoss()),
        gradients(split, MultiModelLoss((1.0, 1.0, 1.0, 0.0), accumulate=True)),
    )
    assert oracle.difference(fewer["15.weight"], joint["15.weight"])


def test_one_at_a_time_holds_less() -> None:
    """The activations that autograd keeps at once: all models' when joint, one model's otherwise."""
    split = divided().train()
    held = {"now": 0, "peak": 0}

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.size = tensor, tensor.numel()
            held["now"] += self.size
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.size

    def peak(loss: MultiModelLoss) -> int:
        held.update(now=0, peak=0)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            torch.stack(list(loss(split, X, Y).values())).sum().backward()
        return held["peak"]

    joint, one = peak(MultiModelLoss()), peak(MultiModelLoss(accumulate=True))
    assert one < 0.7 * joint


def test_the_sandwich_takes_the_base_the_smallest_and_drawn_ones() -> None:
    split = divided()
    seen = [tuple(MultiModelLoss(sandwich=1)(split, X, Y)) for _ in range(12)]
    assert {names[0] for names in seen} == {"base"}
    assert all(len(names) == 3 and "sub2" in names for names in seen)
    assert {"sub0", "sub1"} <= {name for names in seen for name in names}
    assert list(MultiModelLoss(sandwich=0)(split, X, Y)) == ["base", "sub2"]


def test_the_sandwich_of_a_model_converted_after_it_was_made() -> None:
    split = splitfx.transform(small(), SubNetworks(cuts=(1, 2, 3)), X.float()).double()
    assert list(MultiModelLoss(sandwich=0)(split, X, Y)) == ["base", "sub2"]


def test_the_base_teaches_and_is_not_taught() -> None:
    split = divided()
    losses = MultiModelLoss(distillation=1.0, temperature=2.0)(split, X, Y)
    outputs = [out.detach() for out in split.forward_all(X)]
    oracle.assert_equal(losses["base"].detach(), F.cross_entropy(outputs[0], Y))
    soft = (outputs[0] / 2).softmax(1)
    wanted = 4 * (soft * ((outputs[0] / 2).log_softmax(1) - (outputs[2] / 2).log_softmax(1))).sum(1).mean()
    oracle.assert_equal(losses["sub1"].detach(), wanted)
    losses["sub1"].backward()
    assert split.get_parameter("0.weight").grad is None  # nothing flows into the teacher's own layers


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights": (1.0, -1.0)}, "0 or more"),
        ({"distillation": 1.5}, "from 0 to 1; got 1.5"),
        ({"temperature": 0.0}, "more than 0"),
        ({"sandwich": -1}, "0 or more; got -1"),
    ],
)
def test_bad_options(options: dict[str, Any], why: str) -> None:
    with pytest.raises(TrainingError, match=why):
        MultiModelLoss(**options)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(TrainingError, match="2 weights for 4 models"):
        MultiModelLoss((1.0, 1.0))(divided(), X, Y)
    with pytest.raises(TrainingError, match="has no sub-models: make them with the pass SubNetworks"):
        MultiModelLoss()(nn.Linear(2, 2), X, Y)


def test_finetune_trains_all_models_with_and_without_the_loss(tmp_path: Any) -> None:
    digits = load_data("digits", (1, 16, 16))
    recipe = Recipe(epochs=1, lr=0.01, batch_size=128)
    for loss in (None, MultiModelLoss(accumulate=True)):
        step = SubNetworks(cuts=(1, 3), statistics="private")
        split = splitfx.transform(small(), step, torch.zeros(1, 1, 16, 16))
        before = {k: v.clone() for k, v in split.state_dict().items()}
        history = splitfx.finetune(split, digits.train, digits.val, recipe, loss=loss, progress=False)
        assert list(history.epochs[0].losses) == ["base", "sub0", "sub1"]
        after = split.state_dict()
        assert not torch.equal(after["sub1.step_down.conv.weight"], before["sub1.step_down.conv.weight"])
    taught = splitfx.transform(small(), SubNetworks(cuts=(3,)), torch.zeros(1, 1, 16, 16))
    history = splitfx.finetune(taught, digits.train, digits.val, recipe, teacher=small(), progress=False)
    assert list(history.epochs[0].losses) == ["base", "base distillation", "sub0", "sub0 distillation"]
