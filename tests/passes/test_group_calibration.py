"""Group's fusions solved by least squares."""

from __future__ import annotations

import re

import pytest
import torch

import splitfx
from splitfx.errors import PlanError
from splitfx.passes import Group
from splitfx.tracing import trace
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
