"""Partition channels into branches: every axis, concat segment and unit balanced, whatever the graph around it.

Channels that must go together (units of grouped convs, GroupNorms, heads) are dealt out as one item; items that the
same convolutions read are spread evenly over the branches, so that a channel shuffle or a sliced concat still gives
every branch its share. An axis with fewer items than branches is left whole, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from splitfx.analysis.axes import Axes, Edge

WHOLE = -1


@dataclass
class Partition:
    """``branch[label]`` is a channel's branch, `WHOLE` for one that is not divided; ``whole[axis]`` says why not."""

    factor: int
    branch: np.ndarray
    whole: dict[int, str]


def partition(axes: Axes, edges: Sequence[Edge], factor: int, whole: Mapping[int, str]) -> Partition:
    """Branches 0 .. factor-1 for the channels that ``edges`` read and write; ``whole`` axes stay undivided.

    Sizes differ by at most one item: 64 channels by 6 give 11, 11, 11, 11, 10, 10.
    """
    touched = np.unique(np.concatenate([a for e in edges for a in (e.ins, e.outs)]))
    reasons = dict(whole)
    branch = np.full(len(axes.channel), WHOLE)
    by_unit = np.full(len(axes.unit), WHOLE)
    readers = _Readers(axes, edges)
    for names in families(axes, touched):
        family = np.unique(axes.axis[names]).tolist()
        kept = next((reasons[a] for a in family if a in reasons), None)
        items, first = np.unique(axes.unit[names], return_index=True)
        if kept is None and len(items) < factor:
            kept = f"{len(items)} {'channels' if len(items) == len(names) else 'groups'}, fewer than {factor} branches"
        if kept is not None:
            reasons.update(dict.fromkeys(family, kept))
            continue
        _deal(readers, items[np.argsort(first)], factor, by_unit)
    branch[touched] = by_unit[axes.unit[touched]]
    return Partition(factor, branch, reasons)


def families(axes: Axes, names: np.ndarray) -> list[np.ndarray]:
    """The names, in order, of each set of axes that share a unit: those are divided together."""
    present, place = np.unique(axes.axis[names], return_inverse=True)
    order = np.argsort(axes.unit[names], kind="stable")
    unit, axis = axes.unit[names][order], place[order]
    pairs = np.flatnonzero((unit[1:] == unit[:-1]) & (axis[1:] != axis[:-1]))
    size = len(present), len(present)
    links = coo_matrix((np.ones(len(pairs), dtype=np.int8), (axis[pairs], axis[pairs + 1])), shape=size)
    family = connected_components(links, directed=False)[1][place]
    order = np.argsort(family, kind="stable")
    return np.split(names[order], np.flatnonzero(np.diff(family[order])) + 1)


class _Readers:
    """Which edges read each unit, in order."""

    def __init__(self, axes: Axes, edges: Sequence[Edge]) -> None:
        read = [np.unique(axes.unit[e.ins]) for e in edges]
        unit, edge = np.concatenate(read), np.repeat(np.arange(len(read)), [len(r) for r in read])
        order = np.argsort(unit, kind="stable")
        self.edge = edge[order]
        count = np.bincount(unit, minlength=len(axes.unit))
        self.end = np.cumsum(count)
        self.start = self.end - count

    def of(self, unit: int) -> list[int]:
        return self.edge[self.start[unit] : self.end[unit]].tolist()

    def alike(self, units: np.ndarray) -> bool:
        """Every edge that reads one of the units reads them all."""
        start, count = self.start[units], self.end[units] - self.start[units]
        if (count != count[0]).any():
            return False
        return bool(
            (self.edge[start[:, None] + np.arange(count[0])] == self.edge[start[0] : start[0] + count[0]]).all()
        )


def _deal(readers: _Readers, items: np.ndarray, factor: int, by_unit: np.ndarray) -> None:
    """Deal the items of one family, in the order of their channels, out; contiguous where every reader reads all."""
    if readers.alike(items):
        for g, part in enumerate(np.array_split(items, factor)):
            by_unit[part] = g
        return
    dealt = sorted(items.tolist(), key=readers.of)
    by_unit[dealt] = np.arange(len(dealt)) % factor  # in turn: every reader's share is even to within one


# ---------------------------------------------------------------- the order that keeps the most weight energy


def kept_energy(edges: Iterable[tuple[Edge, np.ndarray]], branch: np.ndarray) -> float:
    """Share of the weight energy that lies inside the blocks, over ``(edge, energy [out, in])``."""
    kept = total = 0.0
    for edge, energy in edges:
        outs, ins = branch[edge.outs], branch[edge.ins]
        inside = (outs[:, None] == ins[None]) | (outs[:, None] == WHOLE) | (ins[None] == WHOLE)
        kept, total = kept + float((energy * inside).sum()), total + float(energy.sum())
    return kept / total if total else 1.0


def most_energy(
    axes: Axes,
    edges: Sequence[tuple[Edge, np.ndarray]],
    start: Partition,
    sweeps: int = 10,
    restarts: int = 4,
    seed: int = 0,
) -> Partition:
    """Re-assign channels, branch sizes as they are, so that the blocks keep the most weight energy.

    Block-coordinate ascent: each axis in turn is assigned exactly (linear sum assignment with one slot per place in
    a branch) while the others hold still, from the given order and from random ones; monotone, so it ends.
    ``edges`` carry their energy [out, in], the squared weights summed over the kernel.
    """
    rng = np.random.default_rng(seed)
    divided = np.flatnonzero(start.branch != WHOLE)
    sets = families(axes, divided) if len(divided) else []
    best, value = start.branch, kept_energy(edges, start.branch)
    for trial in range(restarts):
        branch = start.branch.copy()
        for names in sets if trial else []:
            units, where = np.unique(axes.unit[names], return_inverse=True)
            labels = np.array([branch[names[where == i][0]] for i in range(len(units))])
            branch[names] = rng.permutation(labels)[where]
        climbed = _ascend(axes, edges, sets, branch, start.factor, sweeps)
        reached = kept_energy(edges, climbed)
        if reached > value:
            best, value = climbed, reached
    return Partition(start.factor, best, start.whole)


def _ascend(
    axes: Axes,
    edges: Sequence[tuple[Edge, np.ndarray]],
    sets: list[np.ndarray],
    branch: np.ndarray,
    factor: int,
    sweeps: int,
) -> np.ndarray:
    value = kept_energy(edges, branch)
    for _ in range(sweeps):
        for names in sets:
            trial = _assign(axes, edges, names, branch, factor)
            branch = trial if kept_energy(edges, trial) >= kept_energy(edges, branch) else branch
        reached = kept_energy(edges, branch)
        if reached <= value + 1e-9:
            break
        value = reached
    return branch


def _assign(
    axes: Axes, edges: Sequence[tuple[Edge, np.ndarray]], names: np.ndarray, branch: np.ndarray, factor: int
) -> np.ndarray:
    units, where = np.unique(axes.unit[names], return_inverse=True)
    index = np.full(len(branch), -1)
    index[names] = where
    score = np.zeros((len(units), factor))
    for edge, energy in edges:
        for mine, other, m in ((edge.outs, edge.ins, energy), (edge.ins, edge.outs, energy.T)):
            rows = index[mine]
            if (rows >= 0).any():
                gain = m[:, branch[other] >= 0] @ np.eye(factor)[branch[other][branch[other] >= 0]]
                np.add.at(score, rows[rows >= 0], gain[rows >= 0])
    labels = np.array([branch[names[where == i][0]] for i in range(len(units))])
    slots = np.sort(labels)
    rows, columns = linear_sum_assignment(-score[:, slots])
    fresh = np.empty(len(units), dtype=int)
    fresh[rows] = slots[columns]
    result = branch.copy()
    result[names] = fresh[where]
    return result
