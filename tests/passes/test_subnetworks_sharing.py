"""SubNetworks: what the models share, after saving, moving, training and copying."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import splitfx
from splitfx.frontend.trace import trace
from splitfx.subnetworks.model import SubNetworksGraph
from tests import oracle
from tests.subnetworks.networks import X, assert_shared, divided, small


@pytest.mark.parametrize("statistics", ["shared", "private"])
def test_parameters_are_the_same_objects_after_save_load_to_and_copies(statistics: str, tmp_path: Path) -> None:
    split = divided(cuts=(1, 3), statistics=statistics)
    splitfx.save(split, tmp_path / "split")
    wanted = split.forward_all(X)
    for again in (
        splitfx.load(tmp_path / "split"),
        splitfx.load(tmp_path / "split", small(9)),
        copy.deepcopy(split),
        trace(split, X),
    ):
        assert isinstance(again, SubNetworksGraph)
        assert_shared(again)
        oracle.assert_equal(again.forward_all(X), wanted)
    assert_shared(copy.deepcopy(split).to(torch.float64))


def test_what_is_detached_moves_with_the_whole() -> None:
    split = divided()
    sub = split.detach(1)
    split.to(torch.float64)
    assert {t.dtype for t in (*sub.parameters(), *sub.buffers()) if t.is_floating_point()} == {torch.float64}
    sub.to(torch.float32)
    split.to(torch.float32)
    oracle.assert_equal(split.forward_all(X)[2], sub(X))
    with torch.no_grad():
        sub.get_parameter("10.weight").add_(1)
    oracle.assert_equal(split.detach(1)(X), sub(X))
    assert sub.get_parameter("10.weight") is split.get_parameter("10.weight")


def test_training_one_moves_the_other_and_a_copy_stands_alone() -> None:
    split = divided()
    sub, alone = split.detach(0), split.detach(0, copy=True)
    before = split(X).detach()
    kept = alone(X).detach()
    optimizer = torch.optim.SGD(sub.parameters(), lr=0.1)
    sub.train()(X).square().mean().backward()
    optimizer.step()
    assert float((split(X) - before).abs().max()) > 1e-3
    oracle.assert_equal(alone(X), kept)
    assert not {id(p) for p in alone.parameters()} & {id(p) for p in split.parameters()}


def test_modes_are_each_model_s_own() -> None:
    split = divided().train()
    sub = split.detach(0)
    assert all(m.training for m in sub.modules())
    sub.eval()
    assert all(m.training for m in split.modules())


def test_statistics_of_their_own() -> None:
    split = divided(cuts=(1, 3)).train()
    before = {k: v.clone() for k, v in split.state_dict().items() if "running_mean" in k}
    split.detach(1)(X + 1)
    moved = {k for k, v in split.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved == {"sub1.step_down.norm.running_mean", "sub1.norms.norm0.running_mean"}
    both = divided(cuts=(1, 3), statistics="shared").train()
    both.detach(1)(X + 1)
    assert not torch.equal(both.get_buffer("11.running_mean"), small().get_buffer("11.running_mean"))
    assert split.get_parameter("sub1.norms.norm0.weight") is split.get_parameter("11.weight")


def test_shared_statistics_are_one() -> None:
    split = divided(cuts=(1, 3), statistics="shared")
    assert split.detach(1).get_buffer("11.running_mean") is split.get_buffer("11.running_mean")


class Scaled(nn.Module):
    """Convs, and buffers that forward itself reads: of the model, and of a module of it."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
        self.register_buffer("scale", torch.rand(1) + 1)
        self.last.register_buffer("shift", torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()) * self.scale
        return self.last(x.mean((2, 3)) + self.last.get_buffer("shift"))


def test_buffers_that_forward_reads_move_with_the_whole() -> None:
    torch.manual_seed(0)
    split = divided(Scaled().eval(), cuts=("second",))
    models = (split.base(), split.detach(0))
    split.bfloat16()
    for made, wanted in zip(models, split.forward_all(X.bfloat16()), strict=True):
        assert {t.dtype for t in made.state_dict().values()} == {torch.bfloat16}
        oracle.assert_equal(made(X.bfloat16()), wanted)
    models[1].double()
    assert split.get_buffer("scale").dtype is split.get_buffer("last.shift").dtype is torch.float64
    oracle.assert_equal(models[1](X.double()), split.double().forward_all(X.double())[1])
    assert models[1].state_dict().keys() == copy.deepcopy(models[1]).state_dict().keys()


class Normalised(Scaled):
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.mean)


def test_a_sub_model_holds_no_buffers_that_it_does_not_read() -> None:
    split = divided(Normalised().eval(), cuts=("second",))
    assert "mean" in split.state_dict()
    assert "mean" not in split.detach(0).state_dict()
    split.double()
    oracle.assert_equal(split.detach(0)(X.double()), split.forward_all(X.double())[1])
