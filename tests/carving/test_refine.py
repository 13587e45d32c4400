"""Reconstruction by gradient, and inputs drawn from batch norms' statistics."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.carving.narrow import BatchNorm
from splitfx.carving.reconstruction.synthetic import _apart
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.passes import Group, SplitNet
from tests.passes.grouping import grouped, notes
from tests.passes.test_group_calibration import with_norms


def far(split: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((split.eval()(x) - model(x)).norm() / model(x).norm())


def test_steps_of_gradient_bring_the_split_nearer_and_stay_within_the_blocks() -> None:
    torch.manual_seed(0)
    batch, others = torch.randn(384, 3, 12, 12, dtype=torch.float64), torch.randn(96, 3, 12, 12, dtype=torch.float64)
    model = with_norms(batch)
    graph = trace(model, batch[:2])
    solved, _ = grouped(graph, Group((4, 4), lowering="branches", calibration=batch))
    refined, outcome = grouped(graph, Group((4, 4), lowering="branches", calibration=batch, refine=100))
    assert far(refined, model, others) < 1.05 * far(solved, model, others)  # the ends of blocks count, not this alone
    (said,) = [note for note in notes(outcome, "did") if "100 steps of gradient" in note]
    before, after = map(float, re.findall(r"(\S+) before, (\S+) after", said)[0])
    assert after < before
    splitfx.transform(graph, Group((2, 2), lowering="grouped", calibration=batch, refine=5))  # held to the masked form


def test_held_out_inputs_stop_what_does_not_help() -> None:
    """Eight images only: what fits them does not fit others, and the solved weights stay."""
    torch.manual_seed(0)
    few, others = torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.randn(96, 3, 12, 12, dtype=torch.float64)
    model = with_norms(others)
    graph = trace(model, few[:2])
    apart = [
        far(grouped(graph, Group((2, 2), lowering="branches", calibration=few, refine=steps))[0], model, others)
        for steps in (0, 300)
    ]
    assert apart[1] < 1.1 * apart[0]


def test_a_split_is_the_same_in_train_mode_after_refining() -> None:
    batch = torch.randn(96, 3, 12, 12, dtype=torch.float64)
    graph = trace(with_norms(batch), batch[:2])
    split, _ = grouped(graph, Group((2, 2), lowering="branches", calibration=batch, refine=50))
    with torch.no_grad():
        exact = split.eval()(batch)
        assert float((split.train()(batch) - exact).norm() / exact.norm()) < 0.02


def test_splitnet_is_solved_and_refined_too() -> None:
    batch, others = torch.randn(2, 96, 3, 12, 12, dtype=torch.float64)
    model = with_norms(batch)
    apart = []
    for given, steps in ((None, 0), (batch, 0), (batch, 100)):
        step = SplitNet(depth=2, groups=2, source="random", lowering="branches", calibration=given, refine=steps)
        apart.append(far(splitfx.transform(model, step, batch[:2]), model, others))
    assert apart[1] < 0.8 * apart[0], apart
    assert apart[2] <= 1.02 * apart[1], apart


def test_refine_without_calibration_says_so() -> None:
    batch = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    model = with_norms(batch)
    for step in (Group((2, 2), refine=10), SplitNet(depth=2, groups=2, source="random", refine=10)):
        said = splitfx.explain(splitfx.transform(model, step, batch[:2])).steps[0].notes
        assert any("refine has nothing to go by" in note.what for note in said)
    with pytest.raises(PlanError, match="refine counts steps, 0 or more; got -1"):
        Group((2, 2), refine=-1)
    with pytest.raises(PlanError, match="refine counts steps, 0 or more; got -1"):
        SplitNet(depth=2, groups=2, source="random", refine=-1)


# ---------------------------------------------------------------- inputs without data


def test_drawn_inputs_are_read_as_in_training() -> None:
    torch.manual_seed(0)
    seen = torch.randn(96, 3, 12, 12, dtype=torch.float64).cumsum(3) * 0.5 + 0.3
    model = with_norms(seen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = splitfx.draw_inputs(model, (40, 3, 12, 12), steps=60, batch=16)
    assert drawn.shape == (40, 3, 12, 12)
    assert drawn.dtype == torch.float64
    assert not drawn.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    noise = torch.randn_like(drawn)
    assert apart(model, drawn) < 0.2 * apart(model, noise)
    again = splitfx.draw_inputs(model, (40, 3, 12, 12), steps=60, batch=16)
    assert torch.equal(again, drawn)


def apart(model: nn.Module, x: torch.Tensor) -> float:
    found: list[float] = []
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BatchNorm)]
    hooks = [n.register_forward_pre_hook(lambda m, given: found.append(float(_apart(m, given[0])))) for n in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


def test_a_split_is_solved_on_drawn_inputs() -> None:
    torch.manual_seed(0)
    seen = torch.randn(96, 3, 12, 12, dtype=torch.float64)
    model = with_norms(seen)
    drawn = splitfx.draw_inputs(model, (64, 3, 12, 12), steps=60)
    splits = [splitfx.transform(model, Group((2, 2), calibration=given), seen[:2]) for given in (None, drawn)]
    assert far(splits[1], model, seen) < 0.7 * far(splits[0], model, seen)


def test_inputs_that_cannot_be_drawn() -> None:
    model = with_norms(torch.randn(4, 3, 12, 12, dtype=torch.float64))
    with pytest.raises(PlanError, match=r"does not take \[4, 5, 12, 12\]"):
        splitfx.draw_inputs(model, (4, 5, 12, 12))
    with pytest.raises(PlanError, match="four numbers of 1 or more"):
        splitfx.draw_inputs(model, (4, 3, 12))
    with pytest.raises(PlanError, match="no batch norm with statistics"):
        splitfx.draw_inputs(nn.Sequential(nn.Conv2d(3, 4, 3)), (4, 3, 12, 12))
