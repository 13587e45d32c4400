"""What a trace cannot show is noted: other paths by mode or batch, heads that left no trace, Python values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from tests import oracle
from tests.models import ZOO, auxiliary_head, image, plain
from tests.traced import notes


def test_auxiliary_head_is_reported() -> None:
    model, inputs = auxiliary_head()
    graph = trace(model, inputs)
    found = info(graph)
    assert found.train_only == ("aux",)
    assert found.untouched == ("aux.weight", "aux.bias")
    assert "aux: Linear left no trace" in notes(graph)
    assert set(graph.state_dict()) | set(found.untouched) == set(model.state_dict())


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = torch.tanh(y) if self.training else y
        tokens = y.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]


def test_other_paths_in_train_mode_are_reported() -> None:
    said = notes(trace(ByMode(), image()))
    assert "model: ByMode acts differently in train mode (tanh)" in said
    assert "attention: MultiheadAttention acts differently in train mode" in said
    assert "acts differently" not in notes(trace(*plain()))


class ByBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] == 1 else x.sigmoid()


class UpToFour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] > 4 else x.sigmoid()


@pytest.mark.parametrize(("model", "batch"), [(ByBatch(), 1), (ByBatch(), 2), (UpToFour(), 1), (UpToFour(), 6)])
def test_code_that_depends_on_the_batch_fixes_it(model: nn.Module, batch: int) -> None:
    inputs = image(batch, 3, 4, 4)
    graph = trace(model, inputs)
    oracle.assert_equal_outputs(graph, model, inputs)
    if info(graph).dynamic in ("all", "batch"):
        for other in (1, 2, 3, 8):
            oracle.assert_equal_outputs(graph, model, image(other, 3, 4, 4))
    else:
        assert "sizes are fixed" in notes(graph)


class OneOfEach(nn.Module):
    """Takes an image and a tensor of one scale, whatever the batch; a batch of two scales fails."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale.view(1)


def test_input_that_is_no_batch_fixes_the_sizes() -> None:
    inputs = (image(1, 3, 4, 4), image(1))
    graph = trace(OneOfEach(), inputs)
    oracle.assert_equal_outputs(graph, OneOfEach(), inputs)
    assert info(graph).dynamic == "sizes"
    assert "cannot be run in train mode" not in notes(graph)


class NeedsTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and targets is None:
            raise ValueError("targets are needed in train mode")
        return self.conv(x)


def test_model_that_cannot_train_on_these_inputs_is_noted() -> None:
    graph = trace(NeedsTargets(), image())
    assert "cannot be run in train mode on these inputs (ValueError: targets are needed" in notes(graph)


class Flattening(nn.Module):
    """A leaf that acts on self.training and changes the size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if not self.training else x.flatten(1) * 2


def test_leaf_that_changes_the_size_is_traced_into() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Flattening(), nn.Linear(1024, 2)).eval()
    graph = trace(model, image())
    oracle.assert_equal_outputs(graph, model, image())
    assert "1: Flattening acts differently in train mode" in notes(graph)


def test_python_inputs_are_noted() -> None:
    model, inputs = ZOO["keyword_inputs"]()
    graph = trace(model, (inputs[0], {**inputs[1], "scale": 3.0}))
    assert "these Python values only: 3.0" in notes(graph)
    oracle.assert_equal_outputs(graph, model, (inputs[0], {"scale": 3.0, **inputs[1]}))
