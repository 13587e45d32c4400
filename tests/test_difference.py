"""How far a tensor is from what was wanted, and how long a call takes."""

from __future__ import annotations

import math

import pytest
import torch

from splitfx.ground.difference import apart, relative_error
from splitfx.ground.timing import synchronizer, took

ONE = torch.tensor([1.0, -4.0, 2.0])


def test_the_largest_difference_is_relative_to_the_largest_value() -> None:
    assert relative_error(ONE, ONE) == 0.0
    assert relative_error(torch.tensor([1.0, -4.0, 3.0]), ONE) == 0.25
    assert apart(torch.tensor([1.0, -4.0, 3.0]), ONE) == (1.0, 4.0)
    assert relative_error(torch.tensor([1.0 + 1j]), torch.tensor([1.0 + 0j])) == 1.0


def test_it_is_counted_in_float64() -> None:
    assert relative_error(torch.tensor([60000.0]).half(), torch.tensor([-60000.0]).half()) == 2.0


def test_zeros_have_no_size_of_their_own() -> None:
    assert relative_error(torch.tensor([1e-17]), torch.zeros(1)) == pytest.approx(1e-17)
    assert apart(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_the_same_on_both_sides(odd: float) -> None:
    with_odd = torch.tensor([1.0, odd, 2.0])
    assert relative_error(with_odd, with_odd) == 0.0
    assert relative_error(torch.tensor([2.0, odd, 2.0]), with_odd) == 0.5
    for other in {0.0, math.inf, -math.inf, math.nan} - {odd}:
        if not (math.isnan(odd) and math.isnan(other)):
            assert relative_error(torch.tensor([1.0, other, 2.0]), with_odd) == math.inf


def test_other_shapes_are_infinitely_far() -> None:
    assert relative_error(ONE, ONE[:2]) == math.inf


def test_a_call_is_timed_between_two_synchronizations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("time.perf_counter", lambda: seen.append("clock") or float(len(seen)))
    assert took(lambda: seen.append("call"), lambda: seen.append("synchronize")) == 3.0
    assert seen == ["synchronize", "clock", "call", "synchronize", "clock"]
    synchronizer(torch.device("cpu"))()
