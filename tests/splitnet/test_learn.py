"""Learned groups: the penalties in closed form, their scale, convergence, and a planted hierarchy that comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

import splitfx
from splitfx import Recipe, splitnet
from splitfx.errors import PassError, PlanError
from splitfx.splitnet import attach
from splitfx.splitnet.learn import balance_penalty, disjoint_penalty, layer_penalty, weight_penalty
from tests.splitnet.test_sources import LEVELS, network


def by_the_paper(weight: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """R_W in the paper's own words: ||((I - P_g) W Q_g)_i*|| and ||(P_g W (I - Q_g))_*j||, with W [in, out]."""
    total = torch.zeros((), dtype=weight.dtype)
    ins, outs = weight.shape
    for pg, qg in zip(p, q, strict=True):
        leaving = torch.diag(1 - pg) @ weight @ torch.diag(qg)
        entering = torch.diag(pg) @ weight @ torch.diag(1 - qg)
        total = total + leaving.norm(dim=1).sum() / (ins * outs**0.5) + entering.norm(dim=0).sum() / (ins**0.5 * outs)
    return total / (2 * (len(p) - 1) / len(p) / ins**0.5)


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_the_weight_penalty_is_the_paper_s(groups: int) -> None:
    torch.manual_seed(groups)
    weight = torch.randn(7, 11, dtype=torch.float64)
    p, q = (torch.randn(groups, n, dtype=torch.float64).softmax(0) for n in (7, 11))
    got = layer_penalty(weight.T.square(), p, q, kernel=1.0)
    assert float(got) == pytest.approx(float(by_the_paper(weight, p, q)), rel=1e-6)


@pytest.mark.parametrize("groups", [2, 4])
def test_every_penalty_is_one_at_the_uniform_start(groups: int) -> None:
    torch.manual_seed(0)
    outs, ins, kernel = 300, 200, 3
    weight = torch.randn(outs, ins, kernel, kernel, dtype=torch.float64) / (kernel * ins**0.5)
    p, q = (torch.full((groups, n), 1 / groups, dtype=torch.float64) for n in (ins, outs))
    square = weight.square().flatten(2).mean(2)
    assert float(layer_penalty(square, p, q, float(kernel))) == pytest.approx(1, rel=0.02)
    assert float(disjoint_penalty(p)) == pytest.approx(1)
    assert float(balance_penalty(p)) == pytest.approx(1)


def test_the_ends_of_the_penalties() -> None:
    one = torch.eye(3).repeat(1, 4)
    assert float(disjoint_penalty(one)) == 0
    assert float(balance_penalty(one)) == 1
    collapsed = torch.zeros(3, 12)
    collapsed[0] = 1
    assert float(balance_penalty(collapsed)) == 3
    inside = (one.T @ one).double()
    assert float(layer_penalty(inside, one.double(), one.double(), 1.0)) < 1e-4
    assert float(layer_penalty(inside, one.double(), one.roll(1, 0).double(), 1.0)) > 0.1


def test_layers_farther_from_split_weigh_more() -> None:
    far, near = torch.tensor(3.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    found = weight_penalty([far, near])
    assert float(found.detach()) == pytest.approx((9 + 1) / 4)
    found.backward()
    assert float(far.grad) == pytest.approx(0.75)  # type: ignore[arg-type]
    assert float(near.grad) == pytest.approx(0.25)  # type: ignore[arg-type]


def test_the_graph_computes_what_it_did() -> None:
    graph, x = network(), torch.randn(2, 3, 12, 12)
    before = graph(x)
    groups = attach(graph, LEVELS)
    assert torch.equal(graph(x), before)
    assert not {id(p) for p in groups.parameters()} & {id(p) for p in graph.parameters()}
    assert [tuple(a.shape) for a in groups.parameters()] == [(v.level, v.size) for v in groups.vectors]


def test_gradients_reach_weights_and_groups() -> None:
    graph = network()
    groups = attach(graph, LEVELS)
    groups.penalty().backward()
    for path in ("2", "5", "8"):
        weight: Any = graph.get_submodule(path).weight
        assert weight.grad.abs().sum() > 0
    assert all(a.grad is not None and a.grad.abs().sum() > 0 for a in groups.parameters())
    first: Any = graph.get_submodule("0").weight
    assert first.grad is None  # it reads the image and keeps all its weights


def test_scales_of_norms_are_frozen_and_given_back() -> None:
    graph = network()
    scale: Any = graph.get_submodule("3").weight
    groups = attach(graph, LEVELS)
    assert not scale.requires_grad
    groups.release()
    assert scale.requires_grad


def test_undecided_groups_are_not_carved_unless_told() -> None:
    groups = attach(network(), LEVELS)
    with pytest.raises(PassError, match="undecided.*probability"):
        groups.assignment()
    given = groups.assignment(unconverged=True, balance=True)
    assert "undecided" in given.source
    assert all(np.ptp(np.bincount(v)) <= 1 for v in given.values())


def test_a_group_left_empty_is_told() -> None:
    groups = attach(network(), LEVELS)
    with torch.no_grad():
        groups.alpha[0][0] += 100
    with pytest.raises(PassError, match="left empty"):
        groups.assignment(unconverged=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "a penalty's factor is 0 or more, not -1.0"),
        ({"balance": float("nan")}, "a penalty's factor is 0 or more, not nan"),
        ({"start": "magic"}, "start is 'noise', 'weights' or 'activations', not 'magic'"),
        ({"start": "activations"}, "start='activations' needs calibration"),
        ({"start": "weights", "calibration": torch.zeros(4, 3, 12, 12)}, "the other starts take none"),
        ({"anneal": -1}, "anneal is a number of steps, 0 or more; got -1"),
        ({"anneal": 0.5}, "anneal is a number of steps, 0 or more; got 0.5"),
    ],
)
def test_options_of_attach(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        attach(network(), LEVELS, **options)


def test_the_disjoint_penalty_comes_in_over_so_many_calls() -> None:
    groups, whole = (attach(network(), LEVELS, anneal=steps) for steps in (4, 0))
    full = {name: value.item() for name, value in whole().items()}
    got = [{name: value.item() for name, value in groups().items()} for _ in range(6)]
    assert [one["disjoint"] / full["disjoint"] for one in got] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    for name in ("weight", "balance"):
        assert [one[name] for one in got] == pytest.approx([full[name]] * 6)
    assert groups.curves()["disjoint"] == pytest.approx([full["disjoint"]] * 6)  # without factors


def test_a_start_is_a_hint_where_groups_stay_undecided() -> None:
    levels = {"5": 2, "8": 2}
    leaning, hinted = (
        min(attach(network(), levels, start="weights", anneal=steps).convergence().surest.values()) for steps in (0, 9)
    )
    assert leaning > 0.7
    assert hinted < 0.52


def test_a_start_from_what_classes_use() -> None:
    """The lean is that of `splitnet.activations`."""
    torch.manual_seed(0)
    graph, images = network(), torch.randn(32, 3, 12, 12)
    blocks(graph, 3.0)
    groups = attach(graph, LEVELS, start="activations", calibration=images)
    wanted = splitnet.activations(graph, LEVELS, calibration=images)
    assert dict(groups.assignment(unconverged=True)) == dict(wanted)


def blocks(graph: fx.GraphModule, ratio: float) -> Any:
    from tests.splitnet.test_sources import planted

    return planted(graph, {"5": 2, "8": 2}, ratio)


def test_the_penalties_alone_find_planted_blocks() -> None:
    """Gradient descent on the penalties, from a lean towards the heaviest groups, decides for the planted blocks."""
    from sklearn.metrics import adjusted_rand_score

    graph = network()
    truth = blocks(graph, 3.0)
    groups = attach(graph, {"5": 2, "8": 2}, start="weights")
    optimizer = torch.optim.SGD([*graph.parameters(), *groups.parameters()], lr=0.05, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        groups.penalty().backward()
        optimizer.step()
    state = groups.convergence()
    assert state, str(state)
    given = groups.assignment()
    assert min(adjusted_rand_score(truth[n], given[n]) for n in truth) == 1.0
    curves = groups.curves()
    assert len(curves["disjoint"]) == 300
    assert curves["disjoint"][-1] < 0.05 < curves["disjoint"][0]


def test_through_finetune_and_carved(tmp_path: Any) -> None:
    """The regulariser hook trains α, without decay, and what is learned carves the graph that was trained."""
    from splitfx.train.data import Images

    torch.manual_seed(0)
    graph = network()
    blocks(graph, 3.0)
    data = Images(torch.randn(64, 3, 12, 12), torch.arange(64) % 8, tuple("abcdefgh"))
    groups = attach(graph, {"5": 2, "8": 2}, start="weights", classes=tuple("abcdefgh"))
    before = [a.detach().clone() for a in groups.parameters()]
    history = splitfx.finetune(
        graph, data, data, Recipe(epochs=2, lr=0.05, keep="last"), regulariser=groups, progress=False
    )
    assert history
    assert all(not torch.equal(a, b) for a, b in zip(before, groups.parameters(), strict=True))
    groups.release()
    given = groups.assignment(unconverged=True, balance=True)
    split = splitfx.transform(graph, splitfx.passes.SplitNet(given), torch.zeros(1, 3, 12, 12))
    assert "group 1, 4 classes" in str(splitfx.explain(split))
    assert splitnet.Assignment(dict(given), given.source, **given.options).options == given.options


def test_curves_are_plain_numbers() -> None:
    groups = attach(network(), LEVELS)
    assert groups.curves() == {"weight": [], "disjoint": [], "balance": []}
    groups.penalty()
    curves = groups.curves()
    assert [len(v) for v in curves.values()] == [1, 1, 1]
    assert curves["balance"][0] == pytest.approx(1, abs=1e-3)


def test_a_graph_in_float64() -> None:
    groups = attach(network(dtype=torch.float64), LEVELS)
    penalty = groups.penalty()
    assert torch.isfinite(penalty)
    penalty.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in groups.parameters())
