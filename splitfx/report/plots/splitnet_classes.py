"""The classes of each group by name, and how far the groups agree with a taxonomy.

Does: finds them in an assignment, or in the plan of a model that SplitNet carved; writes them as text.
Refuses: an assignment of which it cannot be told where the classes are, a taxonomy that does not hold every class once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from splitfx.errors import PlanError, nearest
from splitfx.ground.table import wrap
from splitfx.ir.graph import info, layer, module_of, output_node
from splitfx.ir.walks import ancestors
from splitfx.splitnet.assignment import Assignment, group_lines
from splitfx.splitnet.sources import Taxonomy, checked_taxonomy, leaves, read_taxonomy

UNNAMED = ", by their number in the logits; SplitNet(classes=...) gives them names"


@dataclass(frozen=True)
class Classes:
    """The classes by group: ``groups`` has the group of every class, ``names`` its name, in the order of the logits.
    ``named`` is False where the names are only numbers."""

    groups: np.ndarray
    names: tuple[str, ...]
    named: bool

    @property
    def level(self) -> int:
        return int(self.groups.max()) + 1

    def members(self, group: int) -> list[str]:
        return [self.names[i] for i in np.flatnonzero(self.groups == group)]


@dataclass(frozen=True)
class Agreement:
    """How groups agree with a taxonomy. ``parts``: its super-classes; ``part``: the super-class of every class;
    ``index``: the adjusted Rand index, 1 for the same groups, about 0 for groups by chance; ``shares`` [super-class,
    group]: the share of each super-class in each group."""

    parts: tuple[str, ...]
    part: np.ndarray
    index: float
    shares: np.ndarray


def agreement(classes: Classes, taxonomy: Taxonomy) -> Agreement:
    """The groups against the super-classes of a taxonomy, its uppermost tables. Raises `PlanError` where it does not
    hold every class once."""
    table = read_taxonomy(taxonomy)
    checked_taxonomy(table, classes.names)
    number = {name: i for i, below in enumerate(table.values()) for name in leaves(below)}
    part = np.array([number[n] for n in classes.names])
    shares = np.zeros((len(table), classes.level))
    np.add.at(shares, (part, classes.groups), 1)
    sizes = np.maximum(shares.sum(1, keepdims=True), 1)
    return Agreement(tuple(table), part, adjusted_rand(classes.groups, part), shares / sizes)


def adjusted_rand(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> float:
    """The adjusted Rand index of two groupings (Hubert and Arabie, 1985)."""
    first, second = (np.unique(given, return_inverse=True)[1] for given in (one, other))
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    together, rows, columns = (_pairs(t) for t in (table, table.sum(1), table.sum(0)))
    by_chance = rows * columns / max(_pairs(np.array([len(first)])), 1)
    most = (rows + columns) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)


def _pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1)).sum() / 2)


def grouped_classes(given: Any, names: Sequence[str] = (), vector: str = "") -> Classes:
    """The classes by group of an assignment, or of a model that SplitNet carved.

    ``names``: of the classes, where the assignment or plan has none. ``vector``: the layer of the logits, where an
    assignment leaves that open. Raises `PlanError`.
    """
    if isinstance(given, fx.GraphModule):
        found = carved_classes(given)
        if found is None:
            raise PlanError("this model's classes are not in groups: its plan has no SplitNet that reaches the logits")
        if names and len(names) != len(found.names):
            raise PlanError(f"{len(names)} class names were given for the model's {len(found.names)} classes")
        return Classes(found.groups, tuple(names), True) if names else found
    names = tuple(names or (given.options.get("classes", ()) if isinstance(given, Assignment) else ()))
    sizes = {name: len(labels) for name, labels in given.items()}
    if vector and vector not in sizes:
        raise PlanError(f"the assignment says nothing of {vector!r}.{nearest(vector, sizes)}")
    if not vector and not names:
        raise PlanError(
            "the assignment has no class names: give classes, or the layer of the logits, such as layer='fc'"
        )
    fits = [vector] if vector else [n for n, size in sizes.items() if size == len(names)]
    if len(fits) != 1:
        which = f"{' and '.join(fits)} have" if fits else "no layer has"
        raise PlanError(
            f"{which} as many channels as there are classes ({len(names)}); "
            "give the layer of the logits, such as layer='fc'"
        )
    if names and sizes[fits[0]] != len(names):
        raise PlanError(f"{len(names)} class names were given for the {sizes[fits[0]]} classes of {fits[0]}")
    return _classes(given[fits[0]], names)


def _classes(labels: Sequence[int], names: Sequence[str]) -> Classes:
    return Classes(np.array(labels), tuple(names) or tuple(map(str, range(len(labels)))), bool(names))


def carved_classes(graph: fx.GraphModule) -> Classes | None:
    """The classes by group of a carved model, from its plan; None where no SplitNet reached its logits."""
    plan = info(graph).plan
    carved = [p for p in plan.passes if p.name == "splitnet"] if plan is not None else []
    last = _writers(graph)
    for one in reversed(carved):
        for name, labels in one.assignment.items():
            if any(w == name or w.startswith(f"{name}.branch") for w in last):
                return _classes(labels, one.classes)
    return None


def _writers(graph: fx.GraphModule) -> list[str]:
    """The weighted layers that write the output: nothing but unweighted operations lies between."""

    def weighted(node: fx.Node) -> bool:
        weight = getattr(module_of(node), "weight", None)
        return weight is not None and weight.dim() > 1

    return [layer(n) for n in ancestors([output_node(graph)], lambda n: not weighted(n)) if weighted(n)]


def classes_text(classes: Classes) -> str:
    """The classes of each group by name, all of them, for the terminal."""
    head = f"{len(classes.names)} classes in {classes.level} groups" + ("" if classes.named else UNNAMED)
    return "\n".join(
        [head, *(wrap(f"  {line}", "    ") for line in group_lines(classes.groups.tolist(), classes.names))]
    )
