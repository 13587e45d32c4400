"""Groups from what classes use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

import splitfx
from splitfx import splitnet
from splitfx.errors import PlanError
from splitfx.passes import SplitNet


class Two(nn.Module):
    """Classes 0, 2, 4 and 6 use the even channels, the others the odd ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.conv = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 8)
        with torch.no_grad():
            used = torch.arange(16) % 8 == torch.arange(8)[:, None]
            self.lift.weight.view(16, 8).copy_(used.T)
            self.fc.weight.copy_(used * 4.0)
            self.conv.weight.view(16, 16).copy_((torch.arange(16) % 2 == torch.arange(16)[:, None] % 2) * 0.2)
            self.conv.weight.view(16, 16).fill_diagonal_(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(self.lift(x).relu()).relu().mean((2, 3)))


def seen(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in which the channel of their class is bright."""
    labels = torch.arange(count) % 8
    images = torch.rand(count, 8, 5, 5) * 0.2 + torch.nn.functional.one_hot(labels, 8)[:, :, None, None]
    return images, labels


@pytest.mark.parametrize("labelled", [True, False])
def test_groups_are_those_of_what_classes_use(labelled: bool) -> None:
    images, labels = seen()
    graph = splitfx.trace(Two().eval(), images[:2])
    given = splitnet.activations(graph, {"conv": 2, "fc": 2}, calibration=images, labels=labels if labelled else None)
    for name, groups in given.items():
        assert adjusted_rand_score(np.arange(len(groups)) % 2, groups) == 1.0, name
    assert given.source == "activations"
    split = splitfx.transform(graph, SplitNet(depth=2, groups=2, source="activations", calibration=images), images[:2])
    assert bool((split(images).argmax(1) == labels).all())


def test_labels_count() -> None:
    """With labels that mix the classes of the two halves, the groups are others."""
    images, labels = seen()
    graph = splitfx.trace(Two().eval(), images[:2])
    true = splitnet.activations(graph, {"conv": 2, "fc": 2}, calibration=images, labels=labels)
    mixed = splitnet.activations(graph, {"conv": 2, "fc": 2}, calibration=images, labels=(labels // 2 * 3 + 1) % 8)
    assert dict(true) != dict(mixed)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.long), "one class number for each of the 64 inputs"),
        (torch.zeros(64), "one class number for each of the 64 inputs"),
        (torch.full((64,), 8), "a class number is 8, the model has 8 classes"),
        (torch.full((64,), -1), "a class number is -1"),
    ],
)
def test_labels_that_do_not_fit(labels: Any, message: str) -> None:
    images, _ = seen()
    graph = splitfx.trace(Two().eval(), images[:2])
    with pytest.raises(PlanError, match=message):
        splitnet.activations(graph, {"fc": 2}, calibration=images, labels=labels)


def test_activations_need_inputs() -> None:
    images, _ = seen()
    with pytest.raises(PlanError, match="source='activations' needs calibration"):
        splitfx.transform(Two().eval(), SplitNet(depth=2, groups=2, source="activations"), images[:2])
