"""What a node takes, and layers with a weight: by type, or with an error that names them."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from splitfx.ir.graph import operand, operands, weighted


def test_operands_of_a_node() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    both = graph.call_function(torch.cat, ([x, y], 1))
    part = graph.call_function(operator.getitem, (both, 0))
    assert operand(part) is both
    assert operands(both) == [x, y]
    with pytest.raises(TypeError, match="getitem takes no value as argument 1: 0"):
        operand(part, 1)
    with pytest.raises(TypeError, match="x takes no value as argument 0: None"):
        operand(x)
    with pytest.raises(TypeError, match="getitem takes no list of values as argument 0"):
        operands(part)
    with pytest.raises(TypeError, match="cat takes no list of values as argument 2: None"):
        operands(both, 2)


def test_layers_with_a_weight() -> None:
    conv = nn.Conv2d(2, 3, 1)
    assert weighted(conv).weight is conv.weight
    for one in (nn.ReLU(), nn.BatchNorm2d(2, affine=False)):
        with pytest.raises(TypeError, match=f"{type(one).__name__} holds no weight"):
            weighted(one)
