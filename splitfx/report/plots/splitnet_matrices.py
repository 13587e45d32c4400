"""The weights of split layers as matrices [out, in]: in the user's order, sorted by group, and as carved.

Does: gives each split layer's weights with its groups, the blocks of a carved layer, and smaller matrices to look at.
Refuses: layers that are not split, an assignment of another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import numpy as np
from torch import fx, nn

from splitfx.carving.fusion import squares
from splitfx.carving.narrow import transposed
from splitfx.errors import PlanError, nearest
from splitfx.ir.graph import info, layer, module_of
from splitfx.splitnet.assignment import checked
from splitfx.splitnet.structure import WHOLE, Split, Structure


@dataclass(frozen=True)
class Matrix:
    """The weights of one split layer. ``rms`` [out, in]: root mean square over the kernel, in the user's order;
    ``rows`` and ``columns``: the order by group; ``row_groups`` and ``column_groups``: the group of every channel in
    the user's order, `WHOLE` where every group reads it."""

    layer: str
    level: int
    rms: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    row_groups: np.ndarray
    column_groups: np.ndarray

    @property
    def sorted(self) -> np.ndarray:
        """The weights with the channels of each group together."""
        return self.rms[np.ix_(self.rows, self.columns)]

    @property
    def kept(self) -> float:
        """The share of the weight energy within the groups."""
        inside = (self.row_groups[:, None] == self.column_groups[None]) | (self.column_groups[None] == WHOLE)
        total = float((self.rms**2).sum())
        return float((self.rms[inside] ** 2).sum()) / total if total else 1.0

    @property
    def blocks(self) -> list[tuple[int, int, int, int]]:
        """Each group's first row, last row + 1, first column, last column + 1 in `sorted`."""
        rows, columns = self.row_groups[self.rows], self.column_groups[self.columns]
        return [
            (*np.searchsorted(rows, (g, g + 1)).tolist(), *np.searchsorted(columns, (g, g + 1)).tolist())
            for g in range(self.level)
        ]


def matrices(found: Structure, assignment: Mapping[str, Sequence[int]], layers: Sequence[str] | None) -> list[Matrix]:
    """The matrices of the layers asked for. Raises `PlanError` for a layer that is not split."""
    labels = checked(found, assignment)
    by_name = {layer(s.edge.node): s for s in found.splits}
    for name in layers or ():
        if name not in by_name:
            raise PlanError(f"{name!r} is no split layer.{nearest(name, by_name)} They are {', '.join(by_name)}")
    return [_matrix(found, by_name[name], labels) for name in (by_name if layers is None else layers)]


def _matrix(found: Structure, split: Split, labels: Mapping[str, np.ndarray]) -> Matrix:
    edge = split.edge
    module = module_of(edge.node)
    assert module is not None
    return Matrix(
        layer(edge.node),
        split.level,
        diagonal(pieces(module))[0],
        np.argsort(found.along(edge.outs, labels), kind="stable"),
        np.argsort(found.along(edge.ins, labels), kind="stable"),
        found.along(edge.outs, labels, split.level),
        found.along(edge.ins, labels, split.level),
    )


def pieces(module: nn.Module) -> list[np.ndarray]:
    """Root mean squares [out, in] of a layer over its kernel, one matrix per group of the layer."""
    weight: Any = module.weight
    groups = getattr(module, "groups", 1)
    rms = np.sqrt(squares(module) / weight[0, 0].numel())
    return np.split(rms, groups, axis=1 if transposed(module) else 0)


def diagonal(blocks: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """One matrix with the blocks along its diagonal, and where each lies (first and last + 1 row, column)."""
    rows, columns = (np.cumsum([0, *(b.shape[i] for b in blocks)]) for i in (0, 1))
    whole = np.zeros((rows[-1], columns[-1]))
    places = []
    for i, block in enumerate(blocks):
        whole[rows[i] : rows[i + 1], columns[i] : columns[i + 1]] = block
        places.append((int(rows[i]), int(rows[i + 1]), int(columns[i]), int(columns[i + 1])))
    return whole, places


def carved_blocks(graph: fx.GraphModule) -> dict[str, list[np.ndarray]]:
    """The blocks of every layer that SplitNet carved, by the user's layer, as they are in the graph now."""
    modules = dict(graph.named_modules())
    split = [n.where for s in info(graph).steps if s.name == "splitnet" for n in s.notes if n.kind == "did"]
    found: dict[str, list[np.ndarray]] = {}
    for where in dict.fromkeys(split):
        branches = (modules.get(f"{where}.branch{number}") for number in count())
        own = [*takewhile(lambda m: m is not None, branches)] or [modules.get(where)]
        blocks = [b for m in own if m is not None and hasattr(m, "weight") for b in pieces(m)]
        if len(blocks) > 1:
            found[where] = blocks
    return found


def reduced(matrix: np.ndarray, most: int) -> np.ndarray:
    """A matrix with at most ``most`` rows and columns: root mean squares over equal patches."""
    result = matrix**2
    for axis in (0, 1):
        size = result.shape[axis]
        if size > most:
            starts = np.linspace(0, size, most, endpoint=False).astype(int)
            counts = np.diff(starts, append=size)
            result = np.add.reduceat(result, starts, axis) / np.expand_dims(counts, 1 - axis)
    return np.sqrt(result)
