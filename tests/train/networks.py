"""Small classifiers and data for tests of training."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

import splitfx
from splitfx.passes import Group
from splitfx.train.data import Data, _as, divided
from tests.traced import made_once


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


def of_digits() -> nn.Module:
    """For the command line: ``digits`` is the one data set that it makes without files."""
    return network(classes=10)


def split_network(model: nn.Module | None = None) -> fx.GraphModule:
    return _split(model) if model is not None else _split_network()


@made_once
def _split_network() -> fx.GraphModule:
    return _split(network())


def _split(model: nn.Module) -> fx.GraphModule:
    return splitfx.transform(model, Group(factors=(2, 1), lowering="branches"), torch.zeros(1, 1, 12, 12))


def planted(shape: tuple[int, int, int] | None = None, samples: int = 1200, noise: float = 0.7) -> Data:
    """A generated data set with a hierarchy: two groups of three classes each, ``a0`` … ``a2`` and ``b0`` … ``b2``.

    Classes of a group share a smooth pattern that the others do not have, and differ by a weaker one of their own, so a
    network that learns it finds features that only one group needs. By default images of 1x12x12.
    """
    groups, classes = 2, 3
    made = torch.Generator().manual_seed(0)
    pattern = lambda count: F.interpolate(  # noqa: E731
        torch.randn(count, 1, 4, 4, generator=made), (12, 12), mode="bilinear", align_corners=False
    )
    shared, own = pattern(groups), pattern(groups * classes)
    targets = torch.arange(samples) % (groups * classes)
    clean = shared[targets // classes] + 0.5 * own[targets]
    images = clean + noise * torch.randn(clean.shape, generator=made)
    names = tuple(f"{chr(ord('a') + g)}{c}" for g in range(groups) for c in range(classes))
    return divided("planted", _as(images, shape), targets, names)


def data(samples: int = 300) -> Data:
    return planted(samples=samples)
