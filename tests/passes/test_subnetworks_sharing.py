"""SubNetworks: what the models share, after saving, moving, training and copying."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import splitfx
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.tracing import trace
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
    split = divided(cuts=(1, 3), statistics="private").train()
    before = {k: v.clone() for k, v in split.state_dict().items() if "running_mean" in k}
    split.detach(1)(X + 1)
    moved = {k for k, v in split.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert moved == {"sub1.step_down.norm.running_mean", "sub1.norms.norm0.running_mean"}
    both = divided(cuts=(1, 3)).train()
    both.detach(1)(X + 1)
    assert not torch.equal(both.get_buffer("11.running_mean"), small().get_buffer("11.running_mean"))
    assert split.get_parameter("sub1.norms.norm0.weight") is split.get_parameter("11.weight")


def test_shared_statistics_are_one() -> None:
    split = divided()
    assert split.detach(1).get_buffer("11.running_mean") is split.get_buffer("11.running_mean")
