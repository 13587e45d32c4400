"""Carving any blocks, balanced and contiguous or not, equals the dense network with the rest set to zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.partition import WHOLE
from splitfx.carving import carve as carving
from splitfx.carving import narrow
from splitfx.carving.carve import carve
from splitfx.carving.division import Division, masked
from splitfx.frontend.trace import trace
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph
from splitfx.ir.ops import text
from splitfx.passes import Group
from tests import oracle
from tests.models import conv_bn
from tests.strategies import networks
from tests.traced import odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


def random_divisions(graph: fx.GraphModule, factor: int, rng: np.random.Generator) -> dict[fx.Node, Division]:
    """Every channel that may be divided thrown to a random branch; some axes left whole."""
    axes = facts(graph).axes
    labels = rng.integers(0, factor, len(axes.unit))[axes.unit]
    whole = set(axes.frozen) | axes.outputs
    families: dict[int, set[int]] = {}
    for axis, unit in zip(axes.axis, axes.unit, strict=True):
        families.setdefault(int(unit), set()).add(int(axis))
    for axis in np.unique(axes.axis):
        if rng.random() < 0.15:
            whole.add(int(axis))
    for _ in families:  # axes that share a unit are whole together
        grown = {a for f in families.values() if f & whole for a in f}
        if grown <= whole:
            break
        whole |= grown
    labels[np.isin(axes.axis, list(whole))] = WHOLE
    found: dict[fx.Node, Division] = {}
    for edge in axes.edges:
        ins, outs = labels[edge.ins], labels[edge.outs]
        if edge.computed or (outs == WHOLE).any() or (edge.groups > 1 and (ins == WHOLE).any()):
            continue
        division = Division(
            tuple(np.flatnonzero((ins == g) | (ins == WHOLE)) for g in range(factor)),
            tuple(np.flatnonzero(outs == g) for g in range(factor)),
        )
        if all(map(len, division.ins)) and all(map(len, division.outs)) and not (ins == WHOLE).all():
            found[edge.node] = division
    return found


def check(graph: fx.GraphModule, x: torch.Tensor, divisions: dict[fx.Node, Division], how: str) -> None:
    reference = masked(graph, divisions)
    carve(graph, divisions, dict.fromkeys(divisions, how))
    oracle.assert_equal_outputs(graph, reference, x)


def law(network: tuple[nn.Module, torch.Tensor], factor: int, seed: int, how: str) -> None:
    model, x = network
    graph = trace(model, x)
    check(graph, x, random_divisions(graph, factor, np.random.default_rng(seed)), how)


@settings(max_examples=10)
@given(networks(), st.integers(2, 4), st.integers(0, 999), st.sampled_from(("grouped", "branches")))
def test_any_blocks(network: tuple[nn.Module, torch.Tensor], factor: int, seed: int, how: str) -> None:
    law(network, factor, seed, how)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=200)
@given(networks(10), st.integers(2, 5), st.integers(0, 999), st.sampled_from(("grouped", "branches")))
def test_any_blocks_of_larger_networks(
    network: tuple[nn.Module, torch.Tensor], factor: int, seed: int, how: str
) -> None:
    law(network, factor, seed, how)


@pytest.mark.parametrize("name", ["residual", "concats", "squeeze_excite", "depthwise", "grouped", "channel_shuffle"])
@pytest.mark.parametrize("how", ["grouped", "branches"])
def test_odd_models(name: str, how: str) -> None:
    _, inputs, graph = odd(name, double=True)
    for seed in range(3):
        work = copy_graph(graph)
        check(work, inputs, random_divisions(work, 2, np.random.default_rng(seed)), how)


# ---------------------------------------------------------------- what the graph looks like


def pair() -> tuple[fx.GraphModule, torch.Tensor]:
    model = nn.Sequential(conv_bn(3, 6), conv_bn(6, 4), conv_bn(4, 6), nn.Conv2d(6, 2, 1)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    return trace(model, x), x


def halves(graph: fx.GraphModule, *paths: str) -> dict[fx.Node, Division]:
    found = {}
    for node in graph.graph.nodes:
        if str(node.target) in paths:
            module = graph.get_submodule(str(node.target))
            assert isinstance(module, nn.Conv2d)
            split = [tuple(np.array_split(np.arange(n), 2)) for n in (module.in_channels, module.out_channels)]
            found[node] = Division(split[0], split[1])
    return found


def test_grouped_lowering_costs_nothing_else() -> None:
    """Contiguous equal blocks in a chain become ``groups=2`` and no other node."""
    graph, x = pair()
    before = len(graph.graph.nodes)
    check(graph, x, halves(graph, "1.0", "2.0"), "grouped")
    assert len(graph.graph.nodes) == before
    assert "groups=2" in text(graph)


def test_an_order_is_folded_into_the_weights() -> None:
    """Interleaved blocks: the convs around take the order up, and no channel is moved at run time."""
    graph, x = pair()
    even, odd = (lambda n: np.arange(0, n, 2)), (lambda n: np.arange(1, n, 2))
    nodes = {str(n.target): n for n in graph.graph.nodes}
    divisions = {nodes["2.0"]: Division((even(4), odd(4)), (even(6), odd(6)))}
    divisions[nodes["1.0"]] = Division((np.arange(3), np.arange(3, 6)), (even(4), odd(4)))
    check(graph, x, divisions, "grouped")
    assert "index_select" not in text(graph)


def test_a_layer_of_two_calls_of_which_one_needs_another_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.both = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.both(self.both(self.conv(self.stem(x))))  # the second call reads channels as they come

    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    graph = trace(Twice().double().eval(), x)
    (conv,) = halves(graph, "conv")
    apart = (np.array([0, 2]), np.array([1, 3]))
    division = {conv: Division(apart, apart)}
    reference = masked(graph, division)
    (said,) = carve(graph, division, {conv: "branches"})
    oracle.assert_equal_outputs(graph, reference, x)
    assert (said.where, "2 layers take its place" in said.what) == ("both", True)
    assert {str(n.target) for n in graph.graph.nodes if n.op == "call_module"} >= {"both", "both_2"}


def test_what_an_earlier_carve_has_made_is_left_alone() -> None:
    """Both gather channels by an index of their own, at a path of their own."""
    model = nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(4))).double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    graph, parts = trace(model, x), (np.array([0, 3, 5]), np.array([1, 2, 4]))
    for path in ("1", "2"):
        (node,) = halves(graph, path)
        reference = masked(graph, {node: Division(parts, parts)})
        carve(graph, {node: Division(parts, parts)}, {node: "branches"})
        tidy(graph)
        oracle.assert_equal_outputs(graph, reference, x)
    indices = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert len(set(indices)) == len(indices) > 2


def test_branches_of_one_branch_come_together() -> None:
    """Branch after branch: a branch's feature maps can die before the next branch's are made."""
    graph, x = pair()
    check(graph, x, halves(graph, "1.0", "2.0"), "branches")
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_module" and "branch" in str(n.target)]
    numbers = [int(path.partition(".branch")[2][0]) for path in called]
    assert numbers == sorted(numbers)
    assert len(called) == 8  # two convs and two norms in two branches


def test_division_is_even_only_without_shared_inputs() -> None:
    a, b, both = np.array([0]), np.array([1]), np.array([0, 1])
    assert Division((a, b), (a, b)).even
    assert not Division((both, both), (a, b)).even
    assert not Division((a, b), (a, np.array([1, 2]))).even


def test_mask_keeps_the_blocks_only() -> None:
    division = Division((np.array([0, 2]), np.array([1])), (np.array([1]), np.array([0])))
    assert division.clear(torch.ones(2, 3, 1, 1))[..., 0, 0].tolist() == [[0, 1, 0], [1, 0, 1]]


# ---------------------------------------------------------------- sabotage


@pytest.mark.parametrize("how", ["grouped", "branches"])
@pytest.mark.parametrize("fault", ["swapped", "shifted", "scaled"])
def test_a_wrong_carve_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str, how: str) -> None:
    right = narrow._block

    def wrong(weight: torch.Tensor, outs: np.ndarray, ins: np.ndarray) -> torch.Tensor:
        if fault == "swapped":  # the other branch's inputs
            ins = np.setdiff1d(np.arange(weight.shape[1]), ins)
        if fault == "shifted":  # one position off
            outs = (outs + 1) % weight.shape[0]
        return right(weight, outs, ins) * (1.01 if fault == "scaled" else 1)

    monkeypatch.setattr(narrow, "_block", wrong)
    graph, x = pair()
    with pytest.raises(AssertionError, match="off by"):
        check(graph, x, halves(graph, "1.0", "2.0"), how)


def test_a_wrong_position_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carving._Carver.divided

    def wrong(self: carving._Carver, node: fx.Node, division: Division) -> carving.Value:
        value = right(self, node, division)
        return carving.Value([(n, np.roll(p, 1)) for n, p in value.pieces], value.dim, value.size)

    monkeypatch.setattr(carving._Carver, "divided", wrong)
    graph, x = pair()
    with pytest.raises(AssertionError, match="off by"):
        check(graph, x, halves(graph, "1.0", "2.0"), "branches")


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
def test_layers_that_the_user_calls_branches(lowering: str) -> None:
    """Narrow modules are named branch0, branch1 ... below their layer; a user's own names must not be taken for it."""

    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.branch1 = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
            self.branch2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.pool(torch.cat([self.branch1(x), self.branch2(x)], 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inception = Inception()
            self.head = nn.Conv2d(16, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inception(x))

    step = Group(factors=(2, 1), lowering=lowering, fusion="keep")  # type: ignore[arg-type]
    split = splitfx.transform(Net().eval(), step, torch.randn(1, 3, 12, 12))
    assert split(torch.randn(2, 3, 12, 12)).shape == (2, 4, 6, 6)
