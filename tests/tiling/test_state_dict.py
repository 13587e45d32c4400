"""A tiled model takes the state_dict of the user's model, and gives one that the model takes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import splitfx
from splitfx.ir.graph import by_path
from splitfx.passes import FoldBatchNorm, Tile
from splitfx.tiling.run.executor import Tiled
from tests import oracle


class Net(nn.Module):
    """A convolution that is called inside the stages and outside, one under two names, a parameter and buffers of its
    own, an attention between two stages."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        nn.init.normal_(self.norm.get_buffer("running_mean"), 0, 0.3)
        self.scale = nn.Parameter(torch.rand(1, 6, 1, 1))
        self.shift: torch.Tensor
        self.fixed: torch.Tensor
        self.register_buffer("shift", torch.rand(1, 6, 1, 1))
        self.register_buffer("fixed", torch.full((1,), 2.0), persistent=False)
        self.again, self.up, self.fc = self.twice, nn.Upsample(scale_factor=2), nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu() * self.scale + self.shift * self.fixed
        flat = self.twice(x).flatten(2).transpose(1, 2)
        x = F.scaled_dot_product_attention(flat, flat, flat).transpose(1, 2).reshape(x.shape)
        return self.fc(self.up(self.again(x)).relu())


def models() -> tuple[nn.Module, nn.Module]:
    return Net(0).eval(), Net(1).eval()


def image() -> torch.Tensor:
    return torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(2))


def tiled(model: nn.Module) -> fx.GraphModule:
    split = splitfx.transform(model, Tile(rows=4), image())
    assert any(isinstance(m, Tiled) for m in split.modules())
    return split


def alike(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        oracle.assert_equal(one(image()), other(image()))


def apart(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        assert oracle.difference(one(image()), other(image()))


def test_weights_go_both_ways_under_the_names_of_the_model() -> None:
    model, other = models()
    split = tiled(model)
    assert split.state_dict().keys() == model.state_dict().keys()
    apart(split, other)
    split.load_state_dict(other.state_dict())
    alike(split, other)
    apart(split, model)
    model.load_state_dict(split.state_dict())
    alike(split, model)


def test_copies_folders_and_what_holds_them(tmp_path: Path) -> None:
    model, other = models()
    split = tiled(model)
    splitfx.save(split, tmp_path / "split")
    copied, loaded = copy.deepcopy(split), splitfx.load(tmp_path / "split")
    held = nn.ModuleDict({"net": copy.deepcopy(copied)})
    alike(loaded, model)
    for one in (
        copied,
        loaded,
        splitfx.load(tmp_path / "split", Net(3).eval()),
        splitfx.trace(copy.deepcopy(split), image()),
    ):
        one.load_state_dict(other.state_dict())
        alike(one, other)
    held.load_state_dict(nn.ModuleDict({"net": other}).state_dict())
    alike(held["net"], other)
    held.load_state_dict(held.state_dict())
    alike(split, model)  # no copy shares anything with it


def test_paths_are_taken_too() -> None:
    """As checkpoints of earlier versions have them."""
    model, other = models()
    split, from_other = tiled(model), tiled(other)
    paths = by_path(from_other)
    assert any(".stage." in path for path in paths)
    split.load_state_dict(paths)
    alike(split, other)


def test_moved_and_trained() -> None:
    model, _ = models()
    split = tiled(model)
    optimizer = torch.optim.Adam(split.parameters())
    split(image()).square().sum().backward()
    optimizer.step()
    assert sum(p.grad is not None for p in split.parameters()) == len(list(model.parameters()))
    model.load_state_dict(split.state_dict())
    alike(split, model)
    assert split.double().state_dict()["shift"].dtype == torch.float64


def test_what_does_not_fit_is_named() -> None:
    model, _ = models()
    split = tiled(model)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*stem.weight"):
        split.load_state_dict({k: v for k, v in state.items() if k != "stem.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nowhere"):
        split.load_state_dict({**state, "nowhere": torch.zeros(1)})
    assert split.load_state_dict({**state, "nowhere": torch.zeros(1)}, strict=False).unexpected_keys == ["nowhere"]
    folded = splitfx.transform(model, splitfx.Plan([FoldBatchNorm(), Tile(rows=4)]), image())
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*norm.weight"):
        folded.load_state_dict(state)
