"""Assignments that are not learned: random, by a taxonomy, by clustering the classifier's rows.

They are what a learned assignment is compared with (Kim et al., section 4: SplitNet-Random, -Semantic, -Clustering).
Where only the classes are grouped, channels go to groups in proportion to the classes there, in the order in which
they come. None of them looks at data; none promises any accuracy.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from splitfx.errors import MissingExtraError, PlanError
from splitfx.ground import limits
from splitfx.ground.files import read_text
from splitfx.ir.graph import layer
from splitfx.splitnet.assignment import Assignment, class_names, structure
from splitfx.splitnet.balance import drawn
from splitfx.splitnet.levels import Levels
from splitfx.splitnet.structure import Structure, Vector
from splitfx.text import shown

Taxonomy = Mapping[str, Any] | str | os.PathLike[str]
Labels = dict[str, np.ndarray]


def random(
    graph: fx.GraphModule, levels: Levels = (), *, seed: int = 0, classes: Sequence[str] = (), **options: Any
) -> Assignment:
    """Balanced groups drawn at random. ``options``: ``depth``, ``groups``, ``boundary``, ``gating``."""
    found = structure(graph, levels, **options)
    names = _named(found, classes)
    return Assignment(random_labels(found, seed), f"random, seed {seed}", levels=levels, classes=names, **options)


def semantic(
    graph: fx.GraphModule, taxonomy: Taxonomy, classes: Sequence[str], levels: Levels = (), **options: Any
) -> Assignment:
    """Groups of classes that lie together in a taxonomy: nested tables of class names (``{"plants": {"trees":
    ["oak", "maple"], "flowers": [...]}, ...}``), a dict or a JSON or TOML file. ``classes``: the names in the order of
    the logits."""
    found = structure(graph, levels, **options)
    names = class_names(found, classes)
    labels = semantic_labels(found, read_taxonomy(taxonomy), names)
    return Assignment(labels, "taxonomy", levels=levels, classes=names, **options)


def clustering(
    graph: fx.GraphModule, levels: Levels = (), *, seed: int = 0, classes: Sequence[str] = (), **options: Any
) -> Assignment:
    """Groups of classes whose rows in the classifier's weight are alike, by spectral clustering. For a trained model.
    Raises `MissingExtraError` without scikit-learn."""
    found = structure(graph, levels, **options)
    names = _named(found, classes)
    return Assignment(clustered_labels(found, seed), "clustering", levels=levels, classes=names, **options)


def _named(found: Structure, classes: Sequence[str]) -> tuple[str, ...]:
    return class_names(found, classes) if classes else ()


# ---------------------------------------------------------------- random


def random_labels(found: Structure, seed: int) -> Labels:
    return drawn(found.vectors, np.random.default_rng(seed))


# ---------------------------------------------------------------- from groups of classes to all vectors


def classes_of(found: Structure, source: str) -> Vector:
    vector = found.classes
    if vector is None:
        raise PlanError(f"{source} groups the classes, but the last layer is not split: give it a level of 2 or more")
    return vector


def spread(found: Structure, of_classes: np.ndarray) -> Labels:
    """Labels of every vector from those of the classes: as many channels as a group has classes, in proportion."""
    own = classes_of(found, "this source")
    labels: Labels = {}
    for name, vector in found.vectors.items():
        counts = np.bincount(of_classes, minlength=own.level).astype(float)
        if vector.level < own.level:
            counts = np.bincount(found.merged(own, vector.level), counts, vector.level)
        elif vector.level > own.level:
            counts = counts[found.merged(vector, own.level)]
        labels[name] = of_classes if vector is own else in_proportion(vector.size, counts)
    return labels


def in_proportion(size: int, counts: np.ndarray) -> np.ndarray:
    """Labels of ``size`` items in runs proportional to ``counts``, by cumulative rounding; no run is empty."""
    bounds = np.rint(np.cumsum(counts) / counts.sum() * size).astype(int)
    for g in range(len(bounds)):  # at least one each, and one left for each that follows
        low = (bounds[g - 1] if g else 0) + 1
        bounds[g] = min(max(bounds[g], low), size - (len(bounds) - 1 - g))
    return np.repeat(np.arange(len(bounds)), np.diff(bounds, prepend=0))


# ---------------------------------------------------------------- by a taxonomy


def read_taxonomy(given: Taxonomy) -> Mapping[str, Any]:
    """A taxonomy as nested tables. Raises `PlanError` for a value or a file that is none."""
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str | os.PathLike):
        raise PlanError(f"a taxonomy is a table of groups of class names, or a file that holds one; got {shown(given)}")
    path = Path(given)
    try:
        text = read_text(path, most=limits.PLAN_BYTES)
        limits.check_nesting(text, PlanError, f"{path}: the taxonomy")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise PlanError(f"{path}: the taxonomy cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise PlanError(f"{path}: is not a taxonomy in JSON or TOML: {error}.") from None
    if not isinstance(found, dict):
        raise PlanError(f"{path}: a taxonomy is a table of groups of class names")
    return found


def semantic_labels(found: Structure, taxonomy: Mapping[str, Any], names: Sequence[str]) -> Labels:
    own = classes_of(found, "a taxonomy")
    checked_taxonomy(taxonomy, names)
    parts = _parts(taxonomy, own.level)
    group = {name: g for g, part in enumerate(parts) for name in part}
    return spread(found, np.array([group[n] for n in names]))


def checked_taxonomy(taxonomy: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises `PlanError` for a taxonomy that does not hold every class once, and no others."""
    listed = list(leaves(taxonomy))
    known, wanted = Counter(listed), set(names)
    twice = next((n for n, count in known.items() if count > 1), None)
    if twice is not None:
        raise PlanError(f"the taxonomy names the class {twice!r} twice")
    missing = [n for n in names if n not in known]
    unknown = [n for n in listed if n not in wanted]
    if missing or unknown:
        what = f"has no place for {_some(missing)}" if missing else f"names {_some(unknown)}, which the model lacks"
        raise PlanError(f"the taxonomy {what}: it must hold every class of the model once")


def leaves(node: Any) -> list[str]:
    """The class names in a part of a taxonomy, in its order."""
    if isinstance(node, Mapping):
        return [leaf for child in node.values() for leaf in leaves(child)]
    if isinstance(node, list | tuple):
        return [leaf for child in node for leaf in leaves(child)]
    if isinstance(node, str):
        return [node]
    raise PlanError(f"a taxonomy holds tables, lists and class names; got {shown(node)}")


def _children(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else []


def _parts(taxonomy: Mapping[str, Any], groups: int) -> list[list[str]]:
    """``groups`` sets of classes in the taxonomy's order: the largest part is opened until there are enough, then the
    two neighbours that are smallest together are joined until there are not too many."""
    parts: list[Any] = _children(taxonomy)
    while len(parts) < groups:
        largest = max((p for p in parts if len(_children(p)) > 0), key=lambda p: len(leaves(p)), default=None)
        if largest is None:
            raise PlanError(f"the taxonomy's {len(parts)} classes are fewer than {groups} groups")
        at = next(i for i, p in enumerate(parts) if p is largest)
        parts[at : at + 1] = _children(largest)
    sets = [leaves(p) for p in parts]
    while len(sets) > groups:
        at = min(range(len(sets) - 1), key=lambda i: len(sets[i]) + len(sets[i + 1]))
        sets[at : at + 2] = [sets[at] + sets[at + 1]]
    return sets


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(n) for n in names[:3]) + rest


# ---------------------------------------------------------------- by the classifier's rows


def clustered_labels(found: Structure, seed: int) -> Labels:
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError:
        raise MissingExtraError("clustering needs scikit-learn: pip install 'splitfx[train]'") from None
    own = classes_of(found, "clustering")
    split = next(s for s in found.splits if any(v is own for v, _, _ in found.views(s.edge.outs)))
    rows = _rows(split.edge)
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12
    affinity = np.clip((rows @ rows.T + 1) / 2, 0, 1)  # cosine, from 0 (opposed) to 1 (alike)
    model = SpectralClustering(own.level, affinity="precomputed", random_state=seed, assign_labels="kmeans")
    groups = model.fit_predict(affinity)
    empty = own.level - len(np.unique(groups))
    if empty:
        raise PlanError(f"clustering found only {own.level - empty} groups of classes, not {own.level}")
    return spread(found, _neighbours(groups, affinity, found, own))


def _rows(edge: Any) -> np.ndarray:
    from splitfx.ir.graph import module_of, weighted

    module = module_of(edge.node)
    if module is None:
        raise PlanError(f"{layer(edge.node)}: clustering needs a layer that holds its weight")
    rows = weighted(module).weight.detach().double().cpu().flatten(1).numpy()
    if not np.isfinite(rows).all():
        raise PlanError(f"{layer(edge.node)}: its weights are not finite; clustering needs a trained model")
    return rows


def _neighbours(groups: np.ndarray, affinity: np.ndarray, found: Structure, own: Vector) -> np.ndarray:
    """Number the groups so that those that coarser levels merge are alike: each next group is the one most alike to
    the group before it."""
    member = np.eye(own.level)[groups]
    near = member.T @ affinity @ member / np.outer(member.sum(0), member.sum(0))
    order = [0]
    while len(order) < own.level:
        left = [g for g in range(own.level) if g not in order]
        order.append(max(left, key=lambda g: near[order[-1], g]))
    number = np.empty(own.level, dtype=int)
    number[order] = np.arange(own.level)
    return number[groups]
