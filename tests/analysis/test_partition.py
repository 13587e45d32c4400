"""Partitions: balanced on every axis, units whole, readers served, the most energy kept when asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from splitfx.analysis import facts
from splitfx.analysis.axes import Axes, Edge
from splitfx.analysis.partition import WHOLE, kept_energy, most_energy, partition
from splitfx.frontend.trace import trace
from tests.models import ZOO
from tests.strategies import networks


def axes_of(model: nn.Module, x: torch.Tensor) -> Axes:
    return facts(trace(model.eval(), x)).axes


def chain(*widths: int) -> Axes:
    layers = [nn.Conv2d(i, o, 1) for i, o in itertools.pairwise(widths)]
    return axes_of(nn.Sequential(*layers), torch.zeros(1, widths[0], 4, 4))


def sizes(labels: np.ndarray) -> list[int]:
    return np.bincount(labels).tolist()


def test_sixty_four_by_six() -> None:
    axes = chain(3, 64, 64, 5)
    found = partition(axes, [axes.edges[1]], 6, {})
    assert sizes(found.branch[axes.edges[1].ins]) == [11, 11, 11, 11, 10, 10]
    assert (np.diff(found.branch[axes.edges[1].outs]) >= 0).all()  # contiguous, in order


def test_whole_axes_stay_whole_with_their_reason() -> None:
    axes = chain(3, 8, 8, 5)
    frozen = {int(axes.axis[axes.edges[1].ins[0]]): "because"}
    found = partition(axes, [axes.edges[1]], 2, frozen)
    assert set(found.branch[axes.edges[1].ins]) == {WHOLE}
    assert sizes(found.branch[axes.edges[1].outs]) == [4, 4]
    assert "because" in found.whole.values()


def test_too_few_channels_or_groups() -> None:
    axes = chain(3, 4, 8, 5)
    found = partition(axes, [axes.edges[1]], 6, {})
    assert found.whole[int(axes.axis[axes.edges[1].ins[0]])] == "4 channels, fewer than 6 branches"
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 2, 1))
    axes = axes_of(model, torch.zeros(1, 3, 4, 4))
    found = partition(axes, [axes.edges[1]], 3, {})
    assert "2 groups, fewer than 3 branches" in found.whole.values()


def test_shuffled_halves_serve_every_branch() -> None:
    """Behind a channel shuffle and a chunk, both readers get channels of each branch."""
    model, x = ZOO["channel_shuffle"]()
    tail = nn.Sequential(model, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    axes = axes_of(tail, x)
    found = partition(axes, axes.edges[1:-1], 2, dict(axes.frozen))
    for edge in axes.edges[1:-1]:
        labels = found.branch[edge.ins]
        assert (labels != WHOLE).all()
        assert max(sizes(labels)) - min(sizes(labels)) <= 2


def check(axes: Axes, edges: list[Edge], factor: int) -> None:
    found = partition(axes, edges, factor, dict(axes.frozen))
    for edge in edges:
        for names in (edge.ins, edge.outs):
            labels = found.branch[names]
            for unit in np.unique(axes.unit[names]):
                assert len(set(labels[axes.unit[names] == unit])) == 1, "a unit is torn"
    used = found.branch[found.branch != WHOLE]
    assert not len(used) or (used.min() >= 0 and used.max() < factor)
    touched = np.unique(np.concatenate([a for e in edges for a in (e.ins, e.outs)]))
    plain = {int(a) for a in np.unique(axes.axis[touched]) if int(a) not in found.whole}
    for axis in plain:
        names = touched[axes.axis[touched] == axis]
        units, first = np.unique(axes.unit[names], return_index=True)
        everyone = np.unique(axes.axis[np.isin(axes.unit, units)])
        if len(everyone) > 1:
            continue  # axes that share units are balanced together
        counts = np.bincount(found.branch[names[first]], minlength=factor)
        assert counts.max() - counts.min() <= 1, counts


@settings(max_examples=12)
@given(networks(), st.integers(2, 5))
def test_every_axis_is_balanced(network: tuple[nn.Module, torch.Tensor], factor: int) -> None:
    axes = axes_of(*network)
    check(axes, axes.edges, factor)


# ---------------------------------------------------------------- energy


def by_hand(edge: Edge, energy: np.ndarray, branch: np.ndarray) -> float:
    kept = 0.0
    for o, i in itertools.product(range(len(edge.outs)), range(len(edge.ins))):
        a, b = branch[edge.outs[o]], branch[edge.ins[i]]
        kept += energy[o, i] * (WHOLE in (a, b) or a == b)
    return kept / energy.sum()


@pytest.mark.parametrize("seed", range(3))
def test_kept_energy_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = chain(3, 6, 5, 2)
    edge = axes.edges[1]
    branch = rng.integers(-1, 2, len(axes.channel))
    energy = rng.random((5, 6))
    assert kept_energy([(edge, energy)], branch) == pytest.approx(by_hand(edge, energy, branch))


def test_most_energy_never_loses_and_keeps_sizes() -> None:
    rng = np.random.default_rng(0)
    axes = chain(3, 9, 9, 9, 2)
    edges = axes.edges[1:3]
    weighed = [(e, rng.random((9, 9)) ** 8) for e in edges]
    start = partition(axes, edges, 2, {})
    best = most_energy(axes, weighed, start)
    assert kept_energy(weighed, best.branch) > kept_energy(weighed, start.branch)
    for edge in edges:
        for names in (edge.ins, edge.outs):
            assert sorted(sizes(best.branch[names])) == sorted(sizes(start.branch[names]))


def test_planted_blocks_come_back() -> None:
    rng = np.random.default_rng(1)
    axes = chain(3, 12, 12, 2)
    edge = axes.edges[1]
    rows, columns = rng.permutation(12) % 3, rng.permutation(12) % 3
    energy = (rows[:, None] == columns[None]).astype(float)
    best = most_energy(axes, [(edge, energy)], partition(axes, [edge], 3, {}), restarts=8)
    assert kept_energy([(edge, energy)], best.branch) == 1.0
