"""Which layers of a split graph are solved, and for what."""

from __future__ import annotations

import torch
from torch import nn

from splitfx.analysis import facts
from splitfx.carving.divider import Divider
from splitfx.carving.reconstruction.units import Unit, units
from splitfx.frontend.trace import trace
from splitfx.ir.graph import layer
from splitfx.passes import Group


def found(model: nn.Module, x: torch.Tensor, factors: tuple[int, ...]) -> list[Unit]:
    graph = trace(model, x)
    divider = Divider(Group(factors, fusion="none"), graph, facts(graph))
    divider.decide()
    return [u for u in units(graph, divider.divisions, ()) if u.behind]


class Residual(nn.Module):
    """conv, norm, relu, conv, norm, added to a skip; then a norm alone and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return self.fc(self.last(x).relu().mean((2, 3)))


def test_units_of_a_residual_network() -> None:
    got = found(Residual().eval(), torch.randn(2, 3, 8, 8), (2,))
    names = [(layer(u.first), layer(u.end), u.target.name.partition("_")[0], u.skip is not None) for u in got]
    assert [n[:2] for n in names] == [("first", "norm1"), ("second", "norm2"), ("last", "last"), ("fc", "fc")]
    assert [n[3] for n in names] == [False, True, False, False]
    assert names[1][2] == "add"
    assert got[1].skip is not None
    assert got[1].skip.name == "relu"


class Shared(nn.Module):
    """A layer that is called twice, two that hold one weight, and one whose weight the model reads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.other.weight = self.one.weight
        self.read, self.plain = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.stem(x).relu()).relu()).relu()
        x = self.other(self.one(x).relu()).relu()
        x = self.plain(self.read(x) * self.read.weight.mean())
        return self.fc(x.mean((2, 3)))


def test_what_others_share_is_left_alone() -> None:
    names = [layer(u.first) for u in found(Shared().eval(), torch.randn(2, 3, 8, 8), (2,))]
    assert names == ["plain", "fc"]
