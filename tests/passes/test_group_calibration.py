"""Group's fusions solved by least squares."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.passes import Group
from tests.models import Head
from tests.passes.grouping import chain, grouped, notes


def test_least_squares_lowers_the_error() -> None:
    model, _ = chain()
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    graph = trace(model, batch[:2])
    for fusion in ("keep", "widen"):
        plain, _ = grouped(graph, Group((2, 2, 2), fusion, lowering="branches"))  # type: ignore[arg-type]
        solved, outcome = grouped(graph, Group((2, 2, 2), fusion, lowering="branches", calibration=batch))  # type: ignore[arg-type]
        wanted = model(batch)
        far = [float((m(batch) - wanted).norm()) for m in (plain, solved)]
        assert far[1] < far[0]
        said = [n for n in notes(outcome, "did") if "least squares" in n]
        assert said
        for note in said:
            before, after = map(float, re.findall(r"(\S+) before, (\S+) after", note)[0])
            assert after < before


def test_calibration_that_fits_nothing_is_refused() -> None:
    model, x = chain()
    graph = trace(model, x)
    with pytest.raises(PlanError, match="do not fit the model"):
        grouped(graph, Group((2, 2, 2), calibration=torch.randn(2, 5, 12, 12, dtype=torch.float64)))
    with pytest.raises(PlanError, match="calibration has 2 inputs"):
        grouped(graph, Group((2, 2, 2), calibration=(x, x)))
    with pytest.raises(PlanError, match="calibration gives 1 position"):
        grouped(graph, Group((1, 2, 2), calibration=x[:1]))


def test_calibration_in_half_precision_is_solved_in_float64() -> None:
    model, x = chain()
    step = Group(factors=(2, 2, 2), lowering="branches", calibration=torch.randn(32, 3, 12, 12).bfloat16())
    split = splitfx.transform(model.bfloat16(), step, x.bfloat16())
    assert bool(split(x.bfloat16()).isfinite().all())


def test_norms_behind_divided_layers_take_the_statistics_of_the_batch() -> None:
    """In train mode, which uses a batch's own statistics, the split then gives the same; without, it does not."""
    batch = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    model = with_norms(batch)
    graph = trace(model, batch[:2])
    before = {key: value.clone() for key, value in graph.state_dict().items()}

    def far(calibration: torch.Tensor | None) -> float:
        split = splitfx.transform(graph, Group((2, 2), lowering="branches", calibration=calibration))
        with torch.no_grad():
            exact = split.eval()(batch)
            return float((split.train()(batch) - exact).norm() / exact.norm())

    assert far(batch) < 0.01  # a variance of n values and one of n - 1
    assert far(None) > 0.05
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())
    split = splitfx.transform(graph, Group((2, 2), lowering="branches", calibration=batch))
    first = "body.1"  # reads what is not divided
    assert torch.equal(split.get_submodule(first).running_mean, model.get_submodule(first).running_mean)  # type: ignore[arg-type]
    assert any("take statistics from the batch" in note.what for note in splitfx.explain(split).steps[0].notes)


def with_norms(batch: torch.Tensor) -> nn.Module:
    """Its running statistics are those of ``batch``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 12):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    body = nn.Sequential(*layers)
    model = Head(body, channels).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(batch)
    return model.eval()
