"""Networks that SplitNet and Group split rightly, or leave whole with the reason: never a broken promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackNoConvergence
from torch import nn

import splitfx
from splitfx.passes import Group, SplitNet
from splitfx.splitnet import weights
from tests import oracle
from tests.models import image

Forward = Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward, *modules: nn.Module) -> None:
        super().__init__()
        self.m, self.f = nn.ModuleList(modules), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(self.m, x)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def notes(split: Any) -> list[str]:
    return [f"{n.where}: {n.what}" for step in splitfx.explain(split).steps for n in step.notes]


def net(forward: Forward, *modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(forward, *modules).double().eval()


def split_by(model: nn.Module, depth: int, source: Any = "weights") -> Any:
    return splitfx.transform(model, SplitNet(depth=depth, groups=2, source=source), image(2, 3, 8, 8).double())


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_grouped_conv_in_front_of_a_split(depth: int) -> None:
    """Its inputs move with its groups, whoever wrote them."""
    forward: Forward = lambda m, x: m[3](m[2](m[1](m[0](x)).relu()).relu().mean((2, 3)))  # noqa: E731
    model = net(forward, conv(3, 12), conv(12, 12, groups=3), conv(12, 12, 1), nn.Linear(12, 4))
    for source in ("weights", "random"):
        try:
            split_by(model, depth, source)
        except splitfx.UnsupportedError:
            assert depth > 2


def written(m: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    x = m[0](x).relu()
    y = m[1](x).clone()
    y[:, 3:5] = x[:, 1:3]
    return m[3](m[2](y.relu()).relu().mean((2, 3)))


def test_channels_written_in_place() -> None:
    model = net(written, conv(3, 12), conv(12, 12), conv(12, 12, 1), nn.Linear(12, 4))
    split = split_by(model, 3)
    assert any("m.1: left undivided: a part of it is overwritten" in one for one in notes(split))
    x = image(2, 3, 8, 8).double()
    splitfx.transform(model, Group(factors=(2,), fusion="none", order="energy", lowering="grouped"), x)


def shuffled(m: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    y = m[0](x).relu()
    y = m[1](y)
    return m[3](m[2](y + F.channel_shuffle(y, 3).relu_()).mean((2, 3)))


@pytest.mark.parametrize("lowering", ["branches", "grouped"])
def test_a_copy_that_costs_nothing_is_not_overwritten(lowering: Any) -> None:
    """Carved, a shuffled map is the pieces of the map itself, which is read after the shuffled one is overwritten."""
    model = net(shuffled, conv(3, 12), conv(12, 12), conv(12, 12, 1), nn.Linear(12, 4))
    x = image(2, 3, 8, 8).double()
    splitfx.transform(model, Group(factors=(2,), fusion="none", lowering=lowering), x)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def one(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu()).relu().mean((2, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc((self.one(x) - self.one(y)).abs())


def test_depth_counts_a_layer_that_is_called_twice_once() -> None:
    pair = image(2, 3, 12, 12), image(2, 3, 12, 12)
    split = splitfx.transform(Siamese().eval(), SplitNet(depth=2, groups=2, source="weights"), pair)
    assert {n.split(":")[0] for n in notes(split) if "2 groups, from" in n} == {"b", "fc"}
    with pytest.raises(splitfx.PlanError, match="3 weighted layers"):
        splitfx.transform(Siamese().eval(), SplitNet(depth=4, groups=2, source="weights"), pair)


class Dynamic(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w, self.f = nn.Parameter(torch.randn(3, width, width, 3, 3) / 10), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        k = torch.einsum("bk,koihw->boihw", self.f(x.mean((2, 3))).softmax(-1), self.w).reshape(b * c, c, 3, 3)
        return F.conv2d(x.reshape(1, b * c, h, w), k, padding=1, groups=b).view(b, c, h, w)


def test_a_convolution_whose_weight_depends_on_the_image() -> None:
    layers = [conv(3, 8), nn.ReLU(), Dynamic(8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double().eval()
    x = image(2, 3, 8, 8).double()
    assert splitfx.profile(model, x).macs > 0
    splitfx.transform(model, Group(factors=(2,), fusion="none"), x)


@pytest.mark.parametrize("lowering", ["branches", "grouped"])
def test_tied_weights_stay_tied_where_they_can(lowering: Any) -> None:
    forward: Forward = lambda m, x: m[3](m[2](m[1](m[0](x).relu()).relu()))  # noqa: E731
    model = net(forward, conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4))
    model.m[2].weight = model.m[1].weight  # type: ignore[union-attr, index]
    x = image(2, 3, 8, 8).double()
    split = splitfx.transform(model, Group(factors=(2,), fusion="none", lowering=lowering), x)
    assert not any("tied" in one for one in notes(split))
    name = "weight" if lowering == "grouped" else "branch1.weight"
    assert split.get_parameter(f"m.1.{name}") is split.get_parameter(f"m.2.{name}")
    apart = splitfx.transform(model, Group(factors=(2,), fusion="none", lowering=lowering, exclude=("m.2",)), x)
    assert any(one.startswith("m.2: was tied to m.1") for one in notes(apart))


def test_a_block_that_costs_more_than_it_saves_is_left_whole() -> None:
    """The 1x1 conv has 64 weights, of which two branches remove half; a fusion behind it has 8 x 8 and a bias of 8."""
    layers = [conv(3, 8), nn.ReLU(), conv(8, 8, 1), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4)).double().eval()
    x, before = image(2, 3, 8, 8).double(), sum(p.numel() for p in model.parameters())
    figures = "its fusion costs 72 weights, more than the 32 that 2 branches save"
    for costly, more in (("whole", 0), ("split", 72 - 32)):
        step = Group(factors=(2, 1), fusion="keep", costly=costly, lowering="grouped")  # type: ignore[arg-type]
        split = splitfx.transform(model, step, x)
        assert sum(p.numel() for p in split.parameters()) == before + more
        assert any(figures in one for one in notes(split))
        assert any("left whole" in one for one in notes(split)) == (costly == "whole")


def test_no_convergence_is_said_and_changes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).random((64, 64))
    matrix = matrix + matrix.T
    wanted, quiet = weights.__globals__["leading"](matrix, 3, np.random.default_rng(0))

    def gives_up(*_: Any, **__: Any) -> Any:
        raise ArpackNoConvergence(
            "No convergence (641 iterations, 0/3 eigenvectors converged)", np.zeros(0), np.zeros(0)
        )

    monkeypatch.setitem(weights.__globals__, "eigsh", gives_up)
    found, told = weights.__globals__["leading"](matrix, 3, np.random.default_rng(0))
    assert "64 channels" in told
    assert not quiet
    oracle.assert_equal(torch.from_numpy(np.abs(found)), torch.from_numpy(np.abs(wanted)))
    model = net(lambda m, x: m[2](m[1](m[0](x)).mean((2, 3))), conv(3, 32), conv(32, 32), nn.Linear(32, 8))
    assert any("ARPACK gave up" in one for one in notes(split_by(model, 2)))


def test_layers_that_an_option_keeps_whole_are_told() -> None:
    """A level that ``boundary="full"`` lowers to one; and layers that Group's own options spare."""
    forward: Forward = lambda m, x: m[2](m[1](m[0](x).relu()).relu().mean((2, 3)))  # noqa: E731
    model, x = net(forward, conv(3, 8), conv(8, 8), nn.Linear(8, 4)), image(2, 3, 8, 8).double()
    with pytest.raises(splitfx.UnsupportedError, match=r"m\.1: left undivided: boundary='full'"):
        splitfx.transform(model, SplitNet(levels={"m.1": 2}, boundary="full", source="random"), x)
    spared: list[tuple[dict[str, Any], str]] = [
        ({"share": 2}, "option share=2: m.0, m.1"),
        ({"select": ("m.2",)}, "option select: m.0, m.1"),
        ({"exclude": ("m.0",)}, "option exclude: m.0"),
    ]
    for options, told in spared:
        split = splitfx.transform(model, Group(factors=(2,), costly="split", **options), x)
        assert any(told in note for note in notes(split)), options
