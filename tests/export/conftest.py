"""One small network for the export tests: two inputs, a dict with a nested list out, batch norm and
dropout.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from splitfx.export.onnx import export_onnx
from splitfx.frontend.trace import trace
from splitfx.ir.graph import resolve
from tests.traced import made_once


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 4)

    def forward(self, image: torch.Tensor, bias: torch.Tensor) -> dict[str, object]:
        pooled = self.features(image).mean((2, 3))
        return {"logits": self.head(self.drop(pooled)), "extra": [pooled + bias]}


@pytest.fixture
def two_inputs() -> fx.GraphModule:
    return _graph()


@pytest.fixture(scope="session")
def two_inputs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph as a file, for tests that change a copy of it."""
    pytest.importorskip("onnx")
    return export_onnx(_graph(), tmp_path_factory.mktemp("export") / "m.onnx")


@made_once
def _graph() -> fx.GraphModule:
    model = TwoInputs()
    resolve(model, "features.1.running_var").uniform_(0.5, 2)  # a batch norm that is not the identity
    return trace(model, ((torch.randn(1, 3, 8, 8),), {"bias": torch.randn(1, 8)}))
