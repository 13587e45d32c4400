"""An assignment from the weights alone: the balanced groups whose blocks keep the most weight energy.

Maximises J = sum over split layers of the kept share of M[o, i] = |W[o, i]|² · E[x_i²], rows divided by their sum where
a norm follows, over balanced labels of every vector at once (semantics.md section D, "Without training"). Start: one
spectral embedding of all vectors together, level by level, with balanced k-means; then each vector in turn is assigned
exactly (a linear sum assignment) while the others hold still, from several starts. The best is kept.

Blocks that were planted come back. Weights without structure keep about 1/G: the result says nothing of accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, eigsh
from torch import fx, nn

from splitfx.carving.fusion import squares
from splitfx.carving.narrow import BatchNorm
from splitfx.carving.reconstruction.lockstep import Walk, batched
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of
from splitfx.ir.notes import Note
from splitfx.splitnet.assignment import Assignment, class_names, structure
from splitfx.splitnet.balance import balanced, capacities, drawn
from splitfx.splitnet.levels import Levels
from splitfx.splitnet.structure import Structure, Vector

Labels = dict[str, np.ndarray]
Energies = dict[fx.Node, np.ndarray]  # [out, in] of each split layer: what counts of its weights
STARTS, SWEEPS = 4, 50
MOST_KICKS, KICKED_ITEMS = 100, 20_000  # kicks, and items that they may sweep over all together


@dataclass(frozen=True)
class Link:
    """The energy [items out, items in] of one layer between two vectors, as shares of one layer's total."""

    energy: np.ndarray
    source: str
    target: str
    level: int


def weights(
    graph: fx.GraphModule,
    levels: Levels = (),
    *,
    seed: int = 0,
    classes: Sequence[str] = (),
    calibration: Any = None,
    **options: Any,
) -> Assignment:
    """The assignment that keeps the most weight energy. ``calibration``: example inputs [N, C, H, W] that give each
    input channel its mean square E[x²]; without it all count alike. ``options``: ``depth``, ``groups``, ``boundary``,
    ``gating``."""
    found = structure(graph, levels, **options)
    names = class_names(found, classes) if classes else ()
    known = len(found.notes)
    labels = heaviest(found, seed, energies(found, calibration))
    source = "; ".join(["weights", *(note.what for note in found.notes[known:])])
    return Assignment(labels, source, levels=levels, classes=names, **options)


def energies(found: Structure, calibration: Any = None) -> Energies:
    """The squared weights of every split layer; with example inputs, times the mean square of each input channel."""
    seen = None if calibration is None else second_moments(found.facts.graph, found, calibration)
    result = {}
    for split in (s for s in found.splits if s.edge.groups == 1):
        node = split.edge.node
        energy = squares(module_of(node))
        if not np.isfinite(energy).all():
            raise PlanError(f"{layer(node)}: its weights are not finite, so none of them can be the heaviest")
        if seen is not None:
            energy = energy * seen[node]
            if not np.isfinite(energy).all():
                raise PlanError(f"{layer(node)}: what it reads in the calibration is not finite")
        result[node] = energy
    return result


def second_moments(graph: fx.GraphModule, found: Structure, inputs: Any) -> dict[fx.Node, np.ndarray]:
    """E[x²] of every input channel of the split layers, over a batch."""
    wanted = {s.edge.node: s.edge.node.all_input_nodes[0] for s in found.splits}
    walk, squares_of = Walk(graph, batched(graph, inputs)), dict[fx.Node, np.ndarray]()
    for node in sorted(set(wanted.values()), key=walk.place.__getitem__):
        walk.until(node)
        dim = 2 if walk.of(node)[0].dim() == 3 else 1  # tokens have their channels last
        rows = torch.cat([value.double().movedim(dim, 0).flatten(1) for value in walk.of(node)], 1)
        squares_of[node] = rows.square().mean(1).cpu().numpy()
    return {node: squares_of[operand] for node, operand in wanted.items()}


def links(found: Structure, energies: Energies) -> list[Link]:
    result = []
    for split in found.splits:
        if split.edge.groups > 1:
            continue  # its blocks lie whole within the groups, whatever the labels
        energy = energies[split.edge.node]
        if _feeds_a_norm(split.edge.node):
            energy = energy / (energy.sum(1, keepdims=True) + 1e-300)
        energy = energy / (energy.sum() or 1.0)
        for target, rows, outs in found.views(split.edge.outs):
            for source, columns, ins in found.views(split.edge.ins):
                block = np.zeros((target.size, source.size))
                np.add.at(block, (outs[:, None], ins[None]), energy[np.ix_(rows, columns)])
                result.append(Link(block, source.name, target.name, split.level))
    return result


def _feeds_a_norm(node: fx.Node) -> bool:
    readers = [module_of(n) for n in node.users]
    return bool(readers) and all(isinstance(m, BatchNorm | nn.GroupNorm) for m in readers)


def heaviest(found: Structure, seed: int, energies: Energies) -> Labels:
    """The labels of the most kept energy that the search finds: the best of several starts, then kicked out of its
    optimum again and again (iterated local search), as often as the size of the problem allows."""
    search = _Search(found, links(found, energies))
    rng = np.random.default_rng(seed)
    best, most = {}, -1.0
    for start in range(STARTS):
        labels = search.spectral(rng) if start < STARTS - 1 else drawn(search.vectors, rng)
        value = search.ascend(labels)
        if value > most:
            best, most = labels, value
    found.notes += [Note("model", told, "info") for told in sorted(search.told)]
    items = sum(v.size for v in found.vectors.values())
    for _ in range(min(MOST_KICKS, KICKED_ITEMS // items)):
        labels = dict(best)
        kicked = search.kick(labels, rng)
        value = search.ascend(labels, last=kicked)
        if value > most + 1e-12:
            best, most = labels, value
    return best


class _Search:
    def __init__(self, found: Structure, held: list[Link]) -> None:
        self.found, self.links, self.vectors = found, held, found.vectors
        self.merge: dict[tuple[str, int], np.ndarray] = {}
        self.told: set[str] = set()
        self.touching: dict[str, list[Link]] = {
            name: [e for e in held if name in (e.source, e.target)] for name in self.vectors
        }

    def merged(self, vector: Vector, level: int) -> np.ndarray:
        key = (vector.name, level)
        if key not in self.merge:
            self.merge[key] = self.found.merged(vector, level)
        return self.merge[key]

    def one_hot(self, name: str, labels: Labels, level: int) -> np.ndarray:
        return np.eye(level)[self.merged(self.vectors[name], level)[labels[name]]]

    def kept(self, link: Link, labels: Labels) -> float:
        source, target = (self.one_hot(n, labels, link.level) for n in (link.source, link.target))
        return float((target * (link.energy @ source)).sum())

    # ------------------------------------------------------------ coordinate ascent

    def kick(self, labels: Labels, rng: np.random.Generator) -> str:
        """Swap some items between two groups of one vector; returns its name."""
        name = str(rng.choice(list(self.vectors)))
        own = labels[name].copy()
        a, b = rng.choice(self.vectors[name].level, 2, replace=False)
        first, second = np.flatnonzero(own == a), np.flatnonzero(own == b)
        count = int(rng.integers(1, max(2, min(len(first), len(second)) // 2 + 1)))
        first, second = (rng.choice(places, count, replace=False) for places in (first, second))
        own[first], own[second] = b, a
        labels[name] = own
        return name

    def ascend(self, labels: Labels, last: str = "") -> float:
        """Improve ``labels`` in place until no vector can be improved alone; returns the kept energy. Monotone.
        The vector ``last`` comes after the others, which may follow it first."""
        value = sum(self.kept(e, labels) for e in self.links)
        order = sorted(self.vectors, key=lambda name: name == last)
        for _ in range(SWEEPS):
            before = value
            for name in order:
                value += self.improve(name, labels)
            if value - before < 1e-12:
                break
        return value

    def improve(self, name: str, labels: Labels) -> float:
        vector, touching = self.vectors[name], self.touching[name]
        score = np.zeros((vector.size, vector.level))
        for e in touching:
            merge = self.merged(vector, e.level)
            if e.target == name:
                score += (e.energy @ self.one_hot(e.source, labels, e.level))[:, merge]
            if e.source == name:
                score += (e.energy.T @ self.one_hot(e.target, labels, e.level))[:, merge]
        old = labels[name]
        before = sum(self.kept(e, labels) for e in touching)
        labels[name] = balanced(score)
        gain = sum(self.kept(e, labels) for e in touching) - before
        if gain < 0:  # a layer from a vector to itself: its two ends moved at once
            labels[name] = old
            return 0.0
        return gain

    # ------------------------------------------------------------ spectral start

    def spectral(self, rng: np.random.Generator) -> Labels:
        """Split all vectors together, coarsest level first, each group into its sub-groups."""
        coarse = {n: np.zeros(v.size, dtype=int) for n, v in self.vectors.items()}  # group so far
        size = 1
        for level in sorted({v.level for v in self.vectors.values()} | {e.level for e in self.links}):
            finer = [v for v in self.vectors.values() if v.level >= level]
            if not finer:
                break
            parent = self.merged(max(finer, key=lambda v: v.level), level)  # finest group -> group at this level
            above = self.merged(max(finer, key=lambda v: v.level), size) if size > 1 else np.zeros_like(parent)
            for group in range(size):
                children = sorted(set(parent[above == group].tolist()))
                self.divide(coarse, [v.name for v in finer], group, children, level, rng)
            for v in finer:
                coarse[v.name] = -1 - coarse[v.name]
            size = level
        return coarse

    def divide(
        self, coarse: Labels, names: list[str], group: int, children: list[int], level: int, rng: np.random.Generator
    ) -> None:
        """Give the members of ``group`` one of ``children``; numbers are written as -1 - child until all are."""
        member = {n: np.flatnonzero(coarse[n] == group) for n in names}
        start = dict(zip(names, np.cumsum([0] + [len(member[n]) for n in names[:-1]]), strict=True))
        count = sum(map(len, member.values()))
        if len(children) == 1:
            for n in names:
                coarse[n][member[n]] = -1 - children[0]
            return
        near = np.zeros((count, count))
        for e in self.links:
            if e.source in member and e.target in member:
                a = slice(start[e.target], start[e.target] + len(member[e.target]))
                b = slice(start[e.source], start[e.source] + len(member[e.source]))
                block = e.energy[np.ix_(member[e.target], member[e.source])]
                near[a, b] += block
                near[b, a] += block.T
        points, told = embedded(near, len(children), rng)
        self.told |= {told} if told else set()
        sizes = {n: self.shares(self.vectors[n], level, children) for n in names}
        spans = {n: slice(start[n], start[n] + len(member[n])) for n in names}
        for n, own in balanced_kmeans(points, spans, sizes, rng).items():
            coarse[n][member[n]] = -1 - np.array(children)[own]

    def shares(self, vector: Vector, level: int, children: list[int]) -> np.ndarray:
        """How many of the vector's items each of these groups takes."""
        sizes = np.bincount(self.merged(vector, level), capacities(vector.size, vector.level), level)
        return sizes[children].astype(int)


def embedded(near: np.ndarray, groups: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Points [n, groups - 1] of the normalised affinity's leading eigenvectors, on the unit sphere; and what there is
    to say of how they were found."""
    scale = (near.sum(1) + 1e-12) ** -0.5
    vectors, told = leading(scale[:, None] * near * scale[None], groups, rng)
    points = (vectors * scale[:, None])[:, :-1]
    return points / (np.linalg.norm(points, axis=1, keepdims=True) + 1e-12), told


def leading(matrix: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The last ``count`` eigenvectors [n, count] of a symmetric matrix, in the order of their values: iteratively, and
    where that does not converge (values that are nearly the same) by the dense solver, which always does and is slower:
    the text says so."""
    size, told = len(matrix), ""
    if size > 4 * count + 20:
        try:
            values, vectors = eigsh(matrix, k=count, which="LA", v0=rng.standard_normal(size))
            return vectors[:, np.argsort(values)], told
        except ArpackError as error:
            why = str(error).split(":")[0]
            told = f"spectral start over {size} channels: ARPACK gave up ({why}); solved by the dense solver instead"
    return eigh(matrix, subset_by_index=(max(0, size - count), size - 1))[1], told


def balanced_kmeans(
    points: np.ndarray,
    spans: dict[str, slice],
    sizes: dict[str, np.ndarray],
    rng: np.random.Generator,
    rounds: int = 25,
) -> dict[str, np.ndarray]:
    """k-means in which every vector (a span of the points) fills its groups to given sizes."""
    groups = len(next(iter(sizes.values())))
    centres = points[rng.choice(len(points), groups, replace=False)]
    labels: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        found = {n: balanced(points[span] @ centres.T, sizes[n]) for n, span in spans.items()}
        if labels and all(np.array_equal(found[n], labels[n]) for n in spans):
            break
        labels = found
        flat = np.concatenate([labels[n] for n in spans])
        centres = np.stack([points[flat == g].mean(0) if (flat == g).any() else centres[g] for g in range(groups)])
        centres /= np.linalg.norm(centres, axis=1, keepdims=True) + 1e-12
    return labels
