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


def test_the_source_that_does_best_is_chosen_and_all_are_told() -> None:
    """The even channels and classes go together: what finds that gives the model's classes, random groups do not."""
    images, labels = seen()
    step = SplitNet(depth=2, groups=2, source="best", calibration=images)
    split = splitfx.transform(Two().eval(), step, images[:2])
    told = next(line for line in str(splitfx.explain(split)).splitlines() if "did best" in line)
    whole = " ".join(str(splitfx.explain(split)).split())
    assert "source random did best" not in told
    for name in ("random", "weights", "clustering", "activations"):
        assert f"{name} " in whole.partition("once solved:")[2]
    assert bool((split(images).argmax(1) == labels).all())
    assert "4 classes: 0, 2, 4, 6" in whole


def test_how_sources_are_compared() -> None:
    """Each is solved on three quarters and compared on the last; the graph stays as it is."""
    from splitfx.splitnet.assignment import structure
    from splitfx.splitnet.best import fidelity, parted

    images, _ = seen()
    graph = splitfx.trace(Two().eval(), images[:2])
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    found = structure(graph, {"conv": 2, "fc": 2})
    solving, held = parted(found, images)
    assert torch.equal(torch.cat([solving, held]), images)
    assert len(held) == 16
    right = {name: np.arange(v.size) % 2 for name, v in found.vectors.items()}
    wrong = {**right, "fc": np.repeat([0, 1], 4)}
    good, bad = fidelity(found, right, solving, held), fidelity(found, wrong, solving, held)
    assert good.agreement == 1.0
    assert good.error < 1e-3
    assert bad.error > 10 * good.error
    assert all(torch.equal(value, before[key]) for key, value in graph.state_dict().items())


def test_what_best_refuses() -> None:
    images, _ = seen()
    with pytest.raises(PlanError, match="source='best' needs calibration"):
        splitfx.transform(Two().eval(), SplitNet(depth=2, groups=2, source="best"), images[:2])
    with pytest.raises(PlanError, match="holds a quarter of the calibration out: give 8 inputs or more"):
        splitfx.transform(Two().eval(), SplitNet(depth=2, groups=2, source="best", calibration=images[:7]), images[:2])
