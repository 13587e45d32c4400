"""Carved models for the tests of trees: small networks in float64, equal and ragged groups, flat and hierarchical."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

import splitfx
from benchmarks.networks import WideResNet
from splitfx.passes import SplitNet
from splitfx.splitnet import structure
from tests.models import Head, Residual, SqueezeExcite, conv_bn

EXACT = 1e-12  # of the largest value, in float64
CLASSES = 7
FLAT: dict[str, int] = {"stage[23].*": 2, "fc": 2}
NESTED: dict[str, int] = {"stage2.*": 2, "stage3.*": 4, "fc": 4}


def unlike(model: nn.Module) -> nn.Module:
    """Norms as after training: fresh ones are all alike and hide channels that are mixed up."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return model.double().eval()


def wide() -> nn.Module:
    torch.manual_seed(1)
    return unlike(WideResNet(10, 1, CLASSES))


class InPlace(Head):
    """Residual blocks that overwrite what others read earlier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 16, 2), Residual(16, 16)), 16, CLASSES
        )


class Mobile(nn.Module):
    """Inverted residuals: the expanding conv in front of a split depthwise one is divided with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.stage2 = nn.Sequential(*conv_bn(8, 16, 1), *conv_bn(16, 16, groups=16, stride=2), *conv_bn(16, 12, 1))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.fc(F.adaptive_avg_pool2d(self.stage2(self.stem(x)), 1).flatten(1)), 1)


class Chain(nn.Module):
    """As little as has a stem and two branches: exporting is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2)
        self.stage3, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stage3(F.relu(self.stage2(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class Gated(nn.Module):
    """A squeeze-and-excitation in the middle: with relaxed gating all groups read each other there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage2, self.gate = conv_bn(3, 8), conv_bn(8, 12), SqueezeExcite(12)
        self.stage3, self.fc = conv_bn(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.gate(self.stage2(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def image(batch: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def carved(model: nn.Module, levels: dict[str, int], ragged: bool = False, **options: Any) -> fx.GraphModule:
    """``model`` split by ``levels`` into branches, with random groups of equal or of quite unequal sizes."""
    graph = splitfx.trace(model, image(2).to(next(model.parameters()).dtype))
    given: dict[str, Any] = {"source": "random"}
    options = {"lowering": "branches", "boundary": "full", **options}
    if ragged:
        structural = {k: v for k, v in options.items() if k in ("boundary", "gating")}
        found = structure(graph, levels, **structural)
        given = {"assignment": {name: uneven(v.size, v.level, i) for i, (name, v) in enumerate(found.vectors.items())}}
    return splitfx.transform(
        graph, SplitNet(levels=levels, **given, **options), verify=False
    )  # the pass has its own tests


def uneven(size: int, groups: int, seed: int) -> tuple[int, ...]:
    """Group 0 has about half of everything, the others what is left."""
    labels = np.concatenate([np.arange(groups), np.arange(size - groups) % (2 * groups)])
    labels = np.where(labels < groups, labels, 0)
    return tuple(np.random.default_rng(seed).permutation(labels).tolist())


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())
