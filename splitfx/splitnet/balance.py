"""Balanced labels, whose groups have the same size to within one: the most likely ones, or random ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

from splitfx.splitnet.structure import Vector


def capacities(size: int, groups: int) -> np.ndarray:
    """Sizes of ``groups`` balanced groups of ``size`` items: 10 by 4 gives 3, 3, 2, 2."""
    return np.array([len(part) for part in np.array_split(np.arange(size), groups)])


def drawn(vectors: Mapping[str, Vector], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Balanced labels of every vector, drawn at random."""
    return {n: rng.permutation(np.repeat(np.arange(v.level), capacities(v.size, v.level))) for n, v in vectors.items()}


def balanced(score: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Labels [n] that maximise the summed ``score`` [n, G] under group sizes (balanced ones by default); exact, by a
    linear sum assignment with one slot per place in a group."""
    count, groups = score.shape
    slots = np.repeat(np.arange(groups), capacities(count, groups) if sizes is None else sizes)
    rows, columns = linear_sum_assignment(-score[:, slots])
    labels = np.empty(count, dtype=int)
    labels[rows] = slots[columns]
    return labels
