"""The structure of a split: which channel axes carry an assignment, and which weights each group keeps.

A *vector* is an assignment's place: one per channel axis that a split layer reads or writes, over the axis's *items*
(channels, or whole units such as heads). Concat, slice, flatten and channel shuffle are views of vectors, so that the
q of a layer is the p of the next by construction (Kim et al., section 3.1). Labels live at a vector's own level, the
largest among the layers that touch it; a layer of fewer groups merges neighbouring ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.gates import gates
from splitfx.analysis.partition import families
from splitfx.analysis.shapes import shape
from splitfx.carving.division import Division
from splitfx.errors import PlanError, UnsupportedError
from splitfx.ir.graph import layer, output_node, read_alone
from splitfx.ir.notes import Note
from splitfx.ir.ops import op
from splitfx.splitnet.levels import Asked, Levels, asked_levels

Boundary = Literal["grouped", "full"]
Gating = Literal["strict", "relaxed"]
Labels = Mapping[str, np.ndarray]
WHOLE = -1


@dataclass(frozen=True)
class Vector:
    """One assignment vector: ``size`` items in ``level`` groups; ``name`` is the first layer that writes it."""

    name: str
    size: int
    level: int
    classes: bool  # its items are the model's classes


@dataclass(frozen=True)
class Split:
    """A layer in ``level`` groups, two or more."""

    edge: Edge
    level: int


class Structure:
    """What a split with these levels looks like on a graph.

    ``vectors`` by name, in the order of the graph; ``splits`` the layers that lose weights; ``producers`` the dense
    ones that write a vector; ``notes`` which layers stay whole, and why. Raises `PlanError` for more groups than
    channels, `UnsupportedError` for a model that is no classifier.
    """

    def __init__(
        self,
        known: Facts,
        levels: Levels = (),
        depth: int = 0,
        groups: int = 0,
        boundary: Boundary = "grouped",
        gating: Gating = "strict",
    ) -> None:
        self.facts, self.axes = known, known.axes
        self.output = classifier_output(known)
        self.notes: list[Note] = []
        asked = asked_levels(known, levels, depth, groups)
        if gating == "relaxed":
            asked = self.lowered(
                asked, dict.fromkeys(set(asked) & gates(known), 1), "gating='relaxed' keeps gates dense"
            )
        if boundary == "full":
            asked = self.lowered(
                asked, self.kept_at_boundaries(asked), "boundary='full', and what it reads is undivided"
            )
        touched = [e for e in self.axes.edges if asked[e.node] > 1]
        self.vector_of = np.full(len(self.axes.channel), WHOLE)  # by label: the number of its vector
        self.item_of = np.full(len(self.axes.channel), WHOLE)
        self.whole: dict[int, str] = dict(self.axes.frozen)
        self.read = read_alone(known.graph)
        if not touched:
            raise self.nothing_split()
        read = np.unique(self.axes.axis[np.concatenate([a for e in touched for a in (e.ins, e.outs)])])
        self.families = families(self.axes, np.flatnonzero(np.isin(self.axes.axis, read)))
        self.splits = [Split(e, asked[e.node]) for e in touched if self.divides(e)]
        while self.hang_together():
            self.splits = [s for s in self.splits if self.divides(s.edge)]
        self.vectors = self.named_vectors()
        if not self.splits:
            raise self.nothing_split()
        inside = {s.edge.node for s in self.splits}
        self.producers = [e for e in self.axes.edges if e.node not in inside and self.writes_a_vector(e)]

    def nothing_split(self) -> UnsupportedError:
        why = "; ".join(f"{n.where}: {n.what}" for n in self.notes[:3]) or "each is asked for in one group"
        return UnsupportedError(f"none of the layers asked for can be split ({why})")

    # ------------------------------------------------------------ levels

    def lowered(self, asked: Asked, lower: Asked, why: str) -> Asked:
        """The levels asked for with some of them lower; a note says which layers that leaves undivided."""
        for node, level in lower.items():
            if level == 1 < asked[node]:
                self.notes.append(Note(layer(node), f"left undivided: {why}", "info"))
        return asked | lower

    def kept_at_boundaries(self, asked: Asked) -> Asked:
        """``boundary="full"``: a conv at the start of a finer split stage keeps the grouping of what it reads."""
        writers = {axis: max(asked[e.node] for e in edges) for axis, edges in self.axes.writers().items()}
        found: Asked = {}
        for e in self.axes.edges:
            if op(e.node).convolves:
                before = max(writers.get(int(a), 1) for a in np.unique(self.axes.axis[e.ins]))
                found[e.node] = min(asked[e.node], before)
        calls: dict[str, int] = {}
        for node, level in found.items():  # a shared module is split alike wherever it is called
            calls[layer(node)] = min(level, calls.get(layer(node), level))
        return {node: calls[layer(node)] for node in found}

    # ------------------------------------------------------------ vectors

    def divides(self, edge: Edge) -> bool:
        """A split layer needs a vector on both sides; a note says where one is missing."""
        why = ""
        if edge.computed:
            why = "its weight is computed by the model"
        elif str(edge.node.target) in self.read:
            why = "the model reads its weight elsewhere too"
        elif self.all_whole(edge.outs):
            why = self.reason(edge.outs)
        elif self.all_whole(edge.ins):
            why = self.reason(edge.ins)
        if why:
            self.notes.append(Note(layer(edge.node), f"left undivided: {why}", "declined"))
        return not why

    def all_whole(self, names: np.ndarray) -> bool:
        return all(int(a) in self.whole for a in np.unique(self.axes.axis[names]))

    def reason(self, names: np.ndarray) -> str:
        return next(self.whole[int(a)] for a in np.unique(self.axes.axis[names]) if int(a) in self.whole)

    def levels(self) -> dict[int, int]:
        """The level of each axis that a split layer touches: the largest among those layers."""
        found: dict[int, int] = {}
        for split in self.splits:
            for axis in np.unique(self.axes.axis[np.concatenate([split.edge.ins, split.edge.outs])]).tolist():
                found[axis] = max(split.level, found.get(axis, 1))
        return found

    def wanted(self) -> Iterator[tuple[np.ndarray, list[int], int]]:
        """The labels, axes and level of each vector."""
        level = self.levels()
        for names in self.families:
            own = np.unique(self.axes.axis[names]).tolist()
            groups = max(level.get(a, 1) for a in own)
            if groups > 1 and not any(a in self.whole for a in own):
                yield names, own, groups

    def hang_together(self) -> bool:
        """Leave axes whole whose channels come in fewer units than groups; says whether there was one."""
        for names, own, groups in self.wanted():
            units, channels = (len(np.unique(held[names])) for held in (self.axes.unit, self.axes.channel))
            if channels < groups:
                raise PlanError(f"{self.name(own)} has {channels} channels, fewer than {groups} groups")
            if units < groups:
                why = f"its channels hang together in {units} units, fewer than {groups} groups"
                self.whole |= dict.fromkeys(own, why)
                return True
        return False

    def name(self, own: list[int]) -> str:
        """The first layer that writes one of these axes."""
        edges = [e for e in self.axes.edges if int(self.axes.axis[e.outs[0]]) in own]
        return layer(edges[0].node) if edges else f"axis {own[0]}"

    def named_vectors(self) -> dict[str, Vector]:
        vectors: dict[str, Vector] = {}
        for names, own, groups in self.wanted():
            units, first, item = np.unique(self.axes.unit[names], return_index=True, return_inverse=True)
            rank = np.argsort(np.argsort(first))  # items in the order of their first channel
            self.vector_of[names], self.item_of[names] = len(vectors), rank[item]
            wanted = self.name(own)
            name = wanted if wanted not in vectors else f"{wanted}+{len(vectors)}"
            classes = bool(set(own) & self.axes.outputs) and len(units) == shape(self.facts.shapes[self.output])[1]
            vectors[name] = Vector(name, len(units), groups, classes)
        return vectors

    def writes_a_vector(self, edge: Edge) -> bool:
        own = not edge.computed and str(edge.node.target) not in self.read
        return own and bool((self.vector_of[edge.outs] != WHOLE).all())

    @property
    def classes(self) -> Vector | None:
        """The vector over the model's classes, where the last layer is split."""
        return next((v for v in self.vectors.values() if v.classes), None)

    # ------------------------------------------------------------ labels along a layer

    def views(self, names: np.ndarray) -> list[tuple[Vector, np.ndarray, np.ndarray]]:
        """The vectors along a layer's channels ``names``: each with the places it fills and the items there."""
        order = list(self.vectors.values())
        number = self.vector_of[names]
        return [
            (order[v], np.flatnonzero(number == v), self.item_of[names[number == v]])
            for v in np.unique(number)
            if v != WHOLE
        ]

    def merged(self, vector: Vector, level: int) -> np.ndarray:
        """The group at ``level`` of each of the vector's own groups: neighbours are merged, step by step through the
        levels that the split uses, so that groups are nested."""
        groups = np.arange(vector.level)
        used = sorted({s.level for s in self.splits if level < s.level < vector.level}, reverse=True)
        size = vector.level
        for fewer in [*used, level]:
            groups, size = groups * fewer // size, fewer
        return groups

    def along(self, names: np.ndarray, labels: Labels, level: int | None = None) -> np.ndarray:
        """The group of every channel in ``names`` at a level (None: each vector's own); `WHOLE` where undivided."""
        found = np.full(len(names), WHOLE)
        for vector, places, items in self.views(names):
            own = labels[vector.name][items]
            found[places] = own if level is None else self.merged(vector, level)[own]
        return found

    def division(self, edge: Edge, level: int, labels: Labels) -> Division:
        """The channels of each group of a layer. Outputs come in the order of the finest groups, so that every
        coarser group and every finer one is a run of them."""
        ins, outs = self.along(edge.ins, labels, level), self.along(edge.outs, labels, level)
        first, last = (np.argsort(self.along(n, labels), kind="stable") for n in (edge.ins, edge.outs))
        found = Division(
            tuple(first[(ins[first] == g) | (ins[first] == WHOLE)] for g in range(level)),
            tuple(last[outs[last] == g] for g in range(level)),
        )
        empty = next((g for g in range(level) if not len(found.ins[g]) or not len(found.outs[g])), None)
        if empty is not None:
            raise PlanError(f"{layer(edge.node)}: group {empty + 1} of {level} has no channels")
        return found

    def permuted(self, edge: Edge, labels: Labels) -> Division:
        """A layer that keeps all its weights and writes its channels in the order of the groups."""
        order = np.argsort(self.along(edge.outs, labels), kind="stable")
        per_in, per_out = len(edge.ins) // edge.groups, len(edge.outs) // edge.groups
        groups = order[::per_out] // per_out  # a group of a conv is one unit, so it moves as a whole, inputs included
        return Division(((groups[:, None] * per_in + np.arange(per_in)).flatten(),), (order,))

    def divisions(self, labels: Labels) -> dict[fx.Node, Division]:
        """The division of every split layer."""
        return {s.edge.node: self.division(s.edge, s.level, labels) for s in self.splits}


def classifier_output(known: Facts) -> fx.Node:
    """The node of the logits [N, C]. Raises `UnsupportedError` for a model with another output."""
    nodes = output_node(known.graph).all_input_nodes
    sizes = [shape(known.shapes[n]) if hasattr(known.shapes[n], "shape") else () for n in nodes]
    if len(nodes) != 1 or len(sizes[0]) != 2:
        given = ", ".join(str(list(s)) for s in sizes) or "nothing"
        raise UnsupportedError(f"SplitNet divides classifiers, whose one output is [N, C]; this model returns {given}")
    return nodes[0]
