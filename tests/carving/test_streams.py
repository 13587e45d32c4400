"""Narrow maps that only linear layers write and read: which there are, and that channels may be any directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx import splitnet
from splitfx.analysis import facts
from splitfx.carving import reconstruction
from splitfx.carving.divider import Divider
from splitfx.carving.reconstruction import shrunk
from splitfx.carving.reconstruction.streams import Stream, streams
from splitfx.carving.reconstruction.units import units
from splitfx.frontend.trace import trace
from splitfx.ir.graph import layer
from splitfx.passes import Group, SplitNet


class Inverted(nn.Module):
    """A stem, then inverted residuals of one width; ``odd`` is done to a map on its way. Where the last layer strides,
    the sum in front of it ends a block."""

    def __init__(self, odd: Any = None, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 1)
        self.wide = nn.ModuleList(nn.Conv2d(8, 24, 1, stride) for stride in (1, 1, stride))
        self.norm = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(24, 8, 1, bias=False) for _ in range(2))
        self.fc, self.odd = nn.Linear(24, 6), odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x).relu())
        for i in range(2):
            x = x + self.norm[i](self.narrow[i](self.wide[i](x).relu()))
            x = self.odd(x) if self.odd is not None else x
        return self.fc(self.wide[2](x).relu().mean((2, 3)))


def found(model: nn.Module, x: torch.Tensor) -> list[Stream]:
    graph = trace(model.eval(), x)
    divider = Divider(Group((2,), fusion="none"), graph, facts(graph))
    divider.decide()
    return streams(units(graph, divider.divisions, ()), divider.divisions, ())


def test_a_residual_stream_is_all_maps_that_sums_tie() -> None:
    (one,) = found(Inverted(), torch.randn(2, 3, 8, 8))
    assert sorted(layer(w.end) for w in one.writers) == ["first", "norm.0", "norm.1"]
    assert sorted(map(layer, one.readers)) == ["wide.0", "wide.1", "wide.2"]
    assert one.joint == ()
    assert len(one.values) == 5  # three that layers write and two sums


@pytest.mark.parametrize(
    "odd", [torch.relu, lambda x: x + 1.0, lambda x: torch.add(x, x, alpha=2), lambda x: x * x.mean((2, 3), True)]
)
def test_where_something_looks_at_single_channels_there_is_no_stream(odd: Any) -> None:
    assert found(Inverted(odd), torch.randn(2, 3, 8, 8)) == []


class Classifier(nn.Module):
    """Two layers to be split, behind a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head, self.fc = nn.Conv2d(8, 20, 1), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.head(self.narrow(self.stem(x).relu())).relu().mean((2, 3)))


def test_groups_that_weigh_few_directions_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group's rows read 4 directions of 8 channels, all channels in each: no choice of channels keeps them."""
    torch.manual_seed(0)
    model: Any = Classifier().double().eval()
    batch, others = torch.randn(2, 64, 3, 9, 7, dtype=torch.float64)
    labels = splitnet.random(trace(model, batch[:1]), depth=2, groups=2)
    hidden, classes = (torch.as_tensor(labels[name]) for name in ("head", "fc"))
    with torch.no_grad():
        for g in (0, 1):
            rows = hidden == g
            model.head.weight[rows] = (torch.randn(int(rows.sum()), 4) @ torch.randn(4, 8))[..., None, None].double()
        model.fc.weight *= classes[:, None] == hidden[None]
    step = SplitNet(assignment=labels, lowering="branches", calibration=batch)

    def far() -> float:
        split = splitfx.transform(model, step, batch[:1]).eval()
        with torch.no_grad():
            return float((split(others) - model(others)).norm() / model(others).std(0).norm())

    assert far() < 1e-6
    monkeypatch.setattr(reconstruction, "streams", lambda *_: [])
    assert far() > 0.1


@pytest.mark.parametrize("fused", [False, True])
def test_a_residual_stream_is_solved_for_directions(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that reads it weighs the same three directions of 8 channels: each branch holds them, as it can tell them."""
    torch.manual_seed(0)
    model: Any = Inverted(stride=2 if fused else 1).double().eval()
    with torch.no_grad():
        few = torch.randn(3, 8)
        for conv in model.wide:
            conv.weight.copy_((torch.randn(24, 3) @ few)[..., None, None])
    batch, others = torch.randn(2, 96, 3, 8, 8, dtype=torch.float64)
    options: Any = {"fusion": "keep" if fused else "none", "costly": "split", "lowering": "grouped"}
    step = Group((2, 1) if fused else (2,), calibration=batch, **options)

    told: list[bool] = []

    def far() -> float:
        split = splitfx.transform(model, step, batch[:1]).eval()
        assert ("fusion1" in dict(split.named_children())) == fused
        told.append(any("hold directions of the dense map" in n.what for n in splitfx.explain(split).steps[0].notes))
        with torch.no_grad():
            return float((split(others) - model(others)).norm() / (model(others) - model(others).mean(0)).norm())

    with_streams = far()
    monkeypatch.setattr(reconstruction, "streams", lambda *_: [])
    assert with_streams < 0.75 * far()
    assert told == [True, False]


def test_refinement_compares_no_map_whose_channels_are_directions() -> None:
    torch.manual_seed(0)
    model: Any = Inverted().double().eval()
    batch = torch.randn(64, 3, 8, 8, dtype=torch.float64)
    step = Group((2,), fusion="none", lowering="grouped", calibration=batch, refine=5)
    split = splitfx.transform(model, step, batch[:1])
    (told,) = [n.what for n in splitfx.explain(split).steps[0].notes if "steps of gradient" in n.what]
    before, after = (float(w) for w in told.split() if w.startswith("0."))
    assert after <= before < 0.6


def test_a_covariance_of_few_inputs_is_shrunk_to_one_of_others() -> None:
    """Ten inputs of 60 channels: what was seen is far from the truth, the shrunk one nearer; of many it stays."""
    torch.manual_seed(0)
    mix = torch.randn(60, 60, dtype=torch.float64) / 8 + 2 * torch.diag(torch.rand(60, dtype=torch.float64))
    truth, far = mix @ mix.T, []
    for count in (10, 4000):
        x = torch.randn(count, 60, dtype=torch.float64) @ mix.T
        seen = x.T @ x / count
        far.append([float((s - truth).norm() / truth.norm()) for s in (seen, shrunk(seen, count))])
    assert far[0][1] < 0.7 * far[0][0]
    assert far[1][1] < 1.1 * far[1][0] < 0.2
