"""Balanced labels: the most likely assignment in which all groups have the same size, to within one."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def capacities(size: int, groups: int) -> np.ndarray:
    """Sizes of ``groups`` balanced groups of ``size`` items: 10 by 4 gives 3, 3, 2, 2."""
    return np.array([len(part) for part in np.array_split(np.arange(size), groups)])


def balanced(score: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
    """Labels [n] that maximise the summed ``score`` [n, G] under group sizes (balanced ones by default); exact, by a
    linear sum assignment with one slot per place in a group."""
    count, groups = score.shape
    slots = np.repeat(np.arange(groups), capacities(count, groups) if sizes is None else sizes)
    rows, columns = linear_sum_assignment(-score[:, slots])
    labels = np.empty(count, dtype=int)
    labels[rows] = slots[columns]
    return labels
