"""Reductions over rows that take a map in piece by piece: sums, means, extremes, deviations, norms of vectors, products
of two maps over their places, and the statistics of norms and of softmax.

Sums are kept in float64, moments are merged by Chan's rule, exponentials by their running maximum.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from splitfx.analysis.regions import reduced_dims
from splitfx.ir.ops import bind
from splitfx.ir.ops.pieces import joins_by_hand
from splitfx.tiling.stage.kernel import Kernel, Stage


class Reduction:
    """One reduction of a kernel: `add` takes pieces in, `value` is what they give."""

    def __init__(self, kernel: Kernel, stage: Stage) -> None:
        self.kernel, self.stage = kernel, stage
        self.given: dict[str, Any] = bind(kernel.node)
        source = kernel.reads[0][0]
        assert source.dims is not None
        rank, row = stage.values[source.node].dim(), kernel.row
        over = reduced_dims(source.dims, rank) if row.over is None else row.over(self.given, rank)
        self.dims = sorted({d % rank for d in over})
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, *pieces: torch.Tensor) -> None:
        part = self.part(*pieces)
        self.total = part if self.total is None else self.joined(self.total, part)

    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def number(self) -> torch.Tensor:
        """The result, in whatever shape and type it was added up."""
        assert self.total is not None, f"{self.kernel.name} was given no rows"
        return self.total

    def value(self) -> torch.Tensor:
        wanted = self.stage.values[self.kernel.node]
        wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
        return self.number().reshape([int(s) for s in wanted.shape]).to(wanted.dtype)


class _Sum(Reduction):
    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        x = pieces[0]
        self.count += prod(x.shape[dim] for dim in self.dims)
        return x.sum(self.dims, dtype=_accumulator(x.dtype)).double()


class _Mean(_Sum):
    def number(self) -> torch.Tensor:
        return super().number() / self.count


class _Max(Reduction):
    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        return pieces[0].amax(self.dims)

    def joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.maximum(a, b)


class _Min(Reduction):
    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        return pieces[0].amin(self.dims)

    def joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.minimum(a, b)


class _Norm(Reduction):
    """The p-norm of vectors: sums of powers, or the largest."""

    def __init__(self, kernel: Kernel, stage: Stage) -> None:
        super().__init__(kernel, stage)
        power = self.given.get("ord", self.given.get("p"))
        self.power = 2.0 if power is None else float(power)

    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        x = pieces[0].to(_accumulator(pieces[0].dtype))
        found = torch.linalg.vector_norm(x, self.power, self.dims).double()
        return found if self.power == float("inf") else found**self.power

    def joined(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.maximum(a, b) if self.power == float("inf") else a + b

    def number(self) -> torch.Tensor:
        found = super().number()
        return found if self.power == float("inf") else found ** (1 / self.power)


class _Product(Reduction):
    """A product of matrices over the places of two maps."""

    def part(self, *pieces: torch.Tensor) -> torch.Tensor:
        places = self.kernel.places
        a, b = (pieces[places[self.given[name]]] for name in ("input", self._second))
        return torch.matmul(a.to(_accumulator(a.dtype)), b.to(_accumulator(b.dtype))).double()

    @property
    def _second(self) -> str:
        return "other" if "other" in self.given else "mat2"


class _Moments(Reduction):
    """Means and sums of squares about them, of values that are ``taken`` together."""

    squares: torch.Tensor

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """A piece as [N, what has statistics of its own, places]."""
        groups = int(self.given.get("num_groups") or x.shape[1])
        return x.reshape(x.shape[0], groups, -1)

    def add(self, *pieces: torch.Tensor) -> None:
        mean, squares, count = _moments(self.taken(pieces[0].to(_accumulator(pieces[0].dtype))))
        if self.total is None:
            self.total, self.squares, self.count = mean, squares, count
            return
        both, apart = self.count + count, mean - self.total
        self.total = self.total + apart * (count / both)
        self.squares = self.squares + squares + apart.square() * (self.count * count / both)
        self.count = both

    def value(self) -> torch.Tensor:
        eps = float(self.given["eps"])
        return torch.stack([self.number(), (self.squares / self.count + eps).rsqrt()])


class _Deviation(_Moments):
    """A variance or a standard deviation."""

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        kept = [d for d in range(x.dim()) if d not in self.dims]
        return x.permute(*kept, *self.dims).reshape(1, max(1, prod(x.shape[d] for d in kept)), -1)

    def value(self) -> torch.Tensor:
        return Reduction.value(self)

    def number(self) -> torch.Tensor:
        lost = self.given.get("correction", 1 if self.given.get("unbiased", True) else 0)
        found = self.squares / max(0.0, self.count - (1 if lost is None else float(lost)))
        return found.sqrt() if self.kernel.row.name == "std" else found


class _Exponentials(Reduction):
    """Of a softmax: the largest value of each vector, and the sum of exponentials relative to it."""

    sums: torch.Tensor

    def add(self, *pieces: torch.Tensor) -> None:
        x = pieces[0].to(_accumulator(pieces[0].dtype))
        most = x.amax(self.dims, keepdim=True)
        sums = (x - most).exp().sum(self.dims, keepdim=True).double()
        most = most.double()
        if self.total is None:
            self.total, self.sums = most, sums
            return
        both = torch.maximum(self.total, most)
        self.sums = self.sums * (self.total - both).exp() + sums * (most - both).exp()
        self.total = both

    def value(self) -> torch.Tensor:
        return torch.stack([self.number(), self.sums])


_KINDS: dict[str, type[Reduction]] = {
    "sum": _Sum,
    "mean": _Mean,
    "max": _Max,
    "min": _Min,
    "norm": _Norm,
    "product": _Product,
    "moments": _Moments,
    "deviation": _Deviation,
    "exponentials": _Exponentials,
}


def reduction_of(kernel: Kernel, stage: Stage) -> Reduction:
    """A reduction that has taken in nothing yet."""
    return _KINDS[kernel.row.reduces](kernel, stage)


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
