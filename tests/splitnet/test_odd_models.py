"""What stands between two split convolutions in models that people write: carved and padded, it stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.passes import SplitNet
from splitfx.splitnet import structure
from splitfx.splitnet.padding import Padding
from tests.sampled import sampled
from tests.splitnet.networks import ragged
from tests.splitnet.test_carving import EXACT, error, masked_by_hand

Between = Callable[["Middle", torch.Tensor], torch.Tensor]
LEVELS = {"a": 3, "b": 3, "fc": 3}


class Middle(nn.Module):
    """A stem of one image channel and two convolutions with something between them."""

    def __init__(self, between: Between, wider: int = 1) -> None:
        super().__init__()
        self.between = between
        self.stem, self.a, self.b = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16 * wider, 12, 3, padding=1)
        self.fc = nn.Linear(12, 10)
        self.gamma = nn.Parameter(torch.rand(16) + 0.5)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self, F.relu(self.a(F.relu(self.stem(x)))))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


def norm(m: Middle, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)


SAME: dict[str, Between] = {  # channel by channel: padding may follow or say that it does not
    "flip": lambda m, x: x.flip(2),
    "roll": lambda m, x: x.roll(1, 3),
    "square transpose": lambda m, x: x.transpose(2, 3),
    "there and back": lambda m, x: x.permute(0, 3, 2, 1).permute(0, 3, 1, 2),
    "last and back": lambda m, x: (x.permute(0, 2, 3, 1) * 2).permute(0, 3, 1, 2),
    "turned in a view": lambda m, x: x.view(len(x), 4, 4, 6, 6).transpose(3, 4).reshape(len(x), 16, 6, 6),
    "shuffle": lambda m, x: x.view(len(x), 4, 4, 6, 6).transpose(1, 2).reshape(len(x), 16, 6, 6),
    "temporal shift": lambda m, x: torch.cat([x[:, :5].roll(1, 2), x[:, 5:]], 1),
    "rows": lambda m, x: x[:, :, 1:-1].unsqueeze(2).squeeze(2),
    "gamma viewed": lambda m, x: x * m.gamma.view(1, -1, 1, 1),
    "gamma indexed": lambda m, x: x + m.gamma[:, None, None],
    "gamma computed": lambda m, x: x * m.gamma.exp().reshape(1, 16, 1, 1),
    "batch norm of tensors": norm,
}
TOGETHER: dict[str, Between] = {  # all channels at once
    "mean over channels": lambda m, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "response norm": lambda m, x: (
        x * (x.norm(dim=(2, 3), keepdim=True) / x.norm(dim=(2, 3), keepdim=True).mean(1, True))
    ),
    "variance": lambda m, x: x - x.var(1, keepdim=True),
    "cumulative": lambda m, x: x.cumsum(1),
    "softmax": lambda m, x: x.softmax(1),
    "maxout": lambda m, x: torch.cat([x.view(len(x), 8, 2, 6, 6).amax(2)] * 2, 1),
    "stacked": lambda m, x: torch.stack([x[:, :8], x[:, 8:]], 2).flatten(1, 2),
    "turned around": lambda m, x: x.rot90(1, (2, 3)),
    "channels padded": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1))[:, 1:-1],
    "gated": lambda m, x: torch.cat([F.glu(x, 1)] * 2, 1),
}
WIDER: dict[str, Between] = {
    "repeated": lambda m, x: x.repeat(1, 2, 1, 1),
    "in pairs": lambda m, x: x.repeat_interleave(2, 1),
}
CASES = {**SAME, **TOGETHER, **WIDER}


@pytest.mark.parametrize("lowering", ["branches", "padded"])
@pytest.mark.parametrize("name", sampled(CASES, 2))
def test_carved_is_the_masked_model(name: str, lowering: Any) -> None:
    torch.manual_seed(0)
    model = Middle(CASES[name], 2 if name in WIDER else 1).eval()
    model.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    graph = splitfx.trace(model, torch.zeros(2, 1, 10, 10))
    found = structure(graph, LEVELS)
    given = ragged(found)
    split, _ = run_pass(graph, SplitNet(given, levels=LEVELS, lowering=lowering))
    x = torch.randn(2, 1, 10, 10, dtype=torch.float64)
    assert error(split, masked_by_hand(graph, found, given.labels()), x) <= EXACT


@pytest.mark.parametrize("name", [*TOGETHER, "shuffle", "gamma viewed", "batch norm of tensors"])
def test_channels_that_are_read_together_are_not_padded(name: str) -> None:
    graph = splitfx.trace(Middle(CASES[name]).eval(), torch.zeros(2, 1, 10, 10))
    found = structure(graph, LEVELS)
    padding = Padding(found, ragged(found).labels())
    assert "a" not in padding.added
    assert "stem" in padding.added


class Tied(nn.Module):
    """One weight of two layers, and a weight that the model reads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(1, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(self.stem(x)))))
        return self.fc((self.c(x) + F.conv2d(x, self.c.weight, padding=1)).mean((2, 3)))


def test_weights_that_are_tied_or_read_elsewhere() -> None:
    torch.manual_seed(0)
    graph = splitfx.trace(Tied().eval(), torch.zeros(2, 1, 10, 10))
    levels = {"a": 2, "b": 2, "c": 2, "fc": 2}
    for lowering in ("branches", "grouped", "padded"):
        split = splitfx.transform(graph, SplitNet(levels=levels, source="random", lowering=lowering))  # type: ignore[arg-type]
        told = " ".join(str(splitfx.explain(split)).split())
        assert "b was tied to a by one weight" in told
        assert "left undivided: the model reads its weight elsewhere too" in told
