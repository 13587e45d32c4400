"""An assignment: the group of every channel of every vector. Plain data, part of a plan, readable.

Does: holds labels by vector name with what they were made for (levels, boundary, class names), checks them against a
graph's structure, says what they keep.
Refuses: labels of another model, with the layer that differs; a group left empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from splitfx.analysis import facts
from splitfx.carving.fusion import squares
from splitfx.compiler.options import FrozenDict
from splitfx.errors import PlanError, nearest
from splitfx.ir.graph import is_canonical, layer, module_of
from splitfx.splitnet.levels import Levels
from splitfx.splitnet.structure import Structure, Vector

OPTIONS = ("levels", "depth", "groups", "boundary", "gating", "classes")


class Assignment(FrozenDict):
    """Group numbers, from 0, per vector name: ``assignment["layer4.0.conv1"] == (0, 1, 1, 0, ...)``, one per channel
    (or per unit of channels that stay together). Immutable.

    ``options`` say what it is for: ``levels`` or ``depth`` and ``groups``, ``boundary``, ``gating``, and ``classes``,
    the names of the model's classes, if given. ``source``: where it comes from, in a few words.
    """

    def __init__(self, labels: Mapping[str, Sequence[int] | np.ndarray], source: str = "given", **options: Any) -> None:
        super().__init__({name: tuple(int(g) for g in given) for name, given in labels.items()})
        unknown = next((o for o in options if o not in OPTIONS), None)
        if unknown is not None:
            raise PlanError(f"an assignment has no option {unknown!r}.{nearest(unknown, OPTIONS)}")
        self.options, self.source = FrozenDict(options), source

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (dict(self), self.source, dict(self.options))

    def labels(self) -> dict[str, np.ndarray]:
        return {name: np.array(given) for name, given in self.items()}


def _again(labels: dict[str, Any], source: str, options: dict[str, Any]) -> Assignment:
    return Assignment(labels, source, **options)


def structure(graph: fx.GraphModule, levels: Levels = (), **options: Any) -> Structure:
    """The `Structure` of a canonical graph for these levels. Raises `PlanError` for a module that is no such graph."""
    if not is_canonical(graph):
        raise PlanError(f"SplitNet works on a graph: give splitfx.trace(model, inputs), not a {type(graph).__name__}")
    return Structure(facts(graph), levels, **options)


def checked(found: Structure, given: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The labels of every vector of a structure. Raises `PlanError` where they are for another one."""
    lost = [n for n in found.vectors if n not in given]
    extra = [n for n in given if n not in found.vectors]
    if lost or extra:
        named = f"it says nothing of {lost[0]}" if lost else f"{extra[0]} is no layer that these levels touch"
        raise PlanError(f"the assignment is not for this model and these levels: {named}")
    return {name: _checked(vector, np.asarray(given[name], dtype=int)) for name, vector in found.vectors.items()}


def _checked(vector: Vector, labels: np.ndarray) -> np.ndarray:
    if len(labels) != vector.size:
        raise PlanError(
            f"the assignment is for another model: {vector.name} has {vector.size} channels (or units), "
            f"the assignment {len(labels)}"
        )
    if labels.min() < 0 or labels.max() >= vector.level:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise PlanError(f"{vector.name}: group {wrong} is not among its {vector.level} groups, 0 to {vector.level - 1}")
    empty = np.flatnonzero(np.bincount(labels, minlength=vector.level) == 0)
    if len(empty):
        raise PlanError(f"{vector.name}: group {empty[0]} of {vector.level} is left empty")
    return labels


def class_names(found: Structure, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes in the order of the logits: as given, else their numbers. Raises `PlanError`."""
    count = found.facts.shapes[found.output].shape[1]
    if names and len(names) != count:
        raise PlanError(f"{len(names)} class names were given for the model's {count} classes")
    if len(set(names)) != len(names):
        twice = next(n for n in names if list(names).count(n) > 1)
        raise PlanError(f"two classes are named {twice!r}: give every class a name of its own")
    return tuple(names) or tuple(str(i) for i in range(count))


def group_lines(labels: Sequence[int], names: Sequence[str], shown: int | None = None) -> list[str]:
    """The classes of each group by name, a line per group; at most ``shown`` of them by name."""
    groups = np.asarray(labels)
    lines = []
    for g in range(groups.max() + 1):
        own = [names[i] for i in np.flatnonzero(groups == g).tolist()]
        some = own if shown is None or len(own) <= shown else [*own[:shown], f"and {len(own) - shown} more"]
        classes = "1 class" if len(own) == 1 else f"{len(own)} classes"
        lines.append(f"group {g + 1}, {classes}: {', '.join(some)}")
    return lines


def kept(found: Structure, labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of the weight energy that each split layer keeps, by layer."""
    result: dict[str, float] = {}
    for split in found.splits:
        if split.edge.groups > 1:
            continue  # its blocks lie whole within the groups, whatever the labels
        energy = squares(module_of(split.edge.node))
        ins = found.along(split.edge.ins, labels, split.level)
        outs = found.along(split.edge.outs, labels, split.level)
        inside = (outs[:, None] == ins[None]) | (ins[None] < 0)
        total = float(energy.sum())
        result[layer(split.edge.node)] = float(energy[inside].sum()) / total if total else 1.0
    return result
