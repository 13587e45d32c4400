"""What Group refuses and declines, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ir.ops import text
from splitfx.passes import Group
from tests.models import ZOO, conv_bn
from tests.passes.grouping import chain, grouped, notes, per_block


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factors": ()}, "factors is empty"),
        ({"factors": (2, 0)}, "1 or more; got 0"),
        ({"factors": (-1,)}, "1 or more; got -1"),
        ({"factors": (2,), "share": -1}, "share counts convs, 0 or more; got -1"),
        ({"factors": (2,), "fusion": "wide"}, "'fusion' must be"),
        ({"factors": (2, 2), "lowering": ("grouped",)}, "lowering has 1 entries for 2 factors"),
        ({"factors": 2.5}, "'factors' must be"),
    ],
)
def test_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        Group(**options)
    assert "\n" not in str(caught.value)


def test_the_wrong_number_of_factors_lists_the_blocks() -> None:
    model, x = chain()
    with pytest.raises(PlanError, match="3 blocks") as caught:
        splitfx.transform(model, Group(factors=(2, 2)), x)
    assert "1: body.0.0 to body.1.0" in str(caught.value)
    assert "3: body.6.0" in str(caught.value)


def test_an_unknown_layer_name() -> None:
    model, x = chain()
    with pytest.raises(PlanError, match="no layer matches 'boddy.*'"):
        splitfx.transform(model, Group(factors=(2, 2, 2), select=("boddy.*",)), x)


def test_no_convolution_is_a_note() -> None:
    graph = trace(nn.Linear(4, 3), torch.randn(2, 4))
    split, outcome = grouped(graph, Group(factors=(2,)))
    assert "no convolution" in outcome.notes[0].what
    assert text(split) == text(graph)


def test_more_branches_than_channels_is_a_note() -> None:
    model, x = chain()
    _, outcome = grouped(trace(model, x), Group(factors=(9, 1, 1)))
    assert any("8 channels, fewer than 9 branches" in n for n in notes(outcome, "declined"))


def test_functional_convs_are_declined_with_a_reason() -> None:
    model, inputs = ZOO["computed_weights"]()
    graph = trace(nn.Sequential(model, conv_bn(4, 6), nn.Conv2d(6, 2, 1)).eval(), inputs)
    _, outcome = grouped(graph, Group(factors=per_block(graph, 2)))
    assert any("computed by the model" in n for n in notes(outcome, "declined"))
