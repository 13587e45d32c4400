"""Reductions over H and W that take a map in piece by piece: pools, means, sums, extremes, statistics of norms."""

from __future__ import annotations

from math import prod

import torch

from splitfx.analysis.regions import NCHW
from splitfx.ir.ops import bind
from splitfx.ir.ops.pieces import joins_by_hand
from splitfx.ir.ops.row import Dims
from splitfx.tiling.plan.stage import Kernel, Stage


def reduced_dims(dims: Dims, rank: int) -> Dims:
    """The dims of a map that a reduction takes in: rows and columns, and of a volume the third axis."""
    return (*dims, *range(4, rank)) if dims == NCHW else dims


class Reduction:
    """Takes a map in row by row. Sums are kept in float64; moments are merged by Chan's rule."""

    def __init__(self, kernel: Kernel, stage: Stage) -> None:
        self.kernel, self.stage, self.how = kernel, stage, kernel.row.reduces
        source = stage.regions.maps(kernel.node)[0]
        dims = stage.regions.dims[source]
        assert dims is not None
        self.dims = reduced_dims(dims, len(stage.regions.sizes(source)))
        self.total: torch.Tensor | None = None
        self.squares: torch.Tensor | None = None
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        if self.kernel.role == "statistics":
            self._moments(x)
            return
        if self.how in ("max", "min"):
            part = x.amax(self.dims) if self.how == "max" else x.amin(self.dims)
            join = torch.maximum if self.how == "max" else torch.minimum
            self.total = part if self.total is None else join(self.total, part)
            return
        part = x.sum(self.dims, dtype=_accumulator(x.dtype)).double()
        self.count += prod(x.shape[dim] for dim in self.dims)
        self.total = part if self.total is None else self.total + part

    def _moments(self, x: torch.Tensor) -> None:
        given = bind(self.kernel.node)
        groups = int(given.get("num_groups") or x.shape[1])
        mean, squares, count = _moments(x.reshape(x.shape[0], groups, -1).to(_accumulator(x.dtype)))
        if self.total is None or self.squares is None:
            self.total, self.squares, self.count = mean, squares, count
            return
        both, apart = self.count + count, mean - self.total
        self.total = self.total + apart * (count / both)
        self.squares = self.squares + squares + apart.square() * (self.count * count / both)
        self.count = both

    def value(self) -> torch.Tensor:
        assert self.total is not None, f"{self.kernel.name} was given no rows"
        if self.kernel.role == "statistics":
            assert self.squares is not None
            eps = float(bind(self.kernel.node)["eps"])
            return torch.stack([self.total, (self.squares / self.count + eps).rsqrt()])
        wanted = self.stage.values[self.kernel.node]
        wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
        total = self.total / self.count if self.how == "mean" else self.total
        return total.reshape([int(s) for s in wanted.shape]).to(wanted.dtype)


def _moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Means [N, groups] of a piece [N, groups, places], the sums of squares about them, and how many places."""
    count = y.shape[2]
    if joins_by_hand() or y.device.type != "cpu":
        mean = y.mean(2)
        return mean.double(), torch.linalg.vector_norm(y - mean[:, :, None], dim=2).double().square(), count
    # The kernel of torch's own norm: one pass, where the lines above take three.
    _, mean, scale = torch.native_group_norm(y, None, None, y.shape[0], y.shape[1], count, y.shape[1], 0.0)
    deviation = scale.double().reciprocal()  # of places that are all alike the scale is infinite
    return mean.double(), deviation.square() * count, count


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
