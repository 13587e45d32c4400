"""Small classifiers and data for tests of training."""

from __future__ import annotations

import torch
from torch import fx, nn

import splitfx
from splitfx.passes import Group
from splitfx.train.data import Data, planted


def network(classes: int = 6, width: int = 8) -> nn.Module:
    """Two blocks with norms and dropout, for 1x12x12."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(4 * width, classes),
    ).eval()


def split_network(model: nn.Module | None = None) -> fx.GraphModule:
    return splitfx.transform(model or network(), Group(factors=(2, 1), lowering="branches"), torch.zeros(1, 1, 12, 12))


def data(samples: int = 300) -> Data:
    return planted(samples=samples)
