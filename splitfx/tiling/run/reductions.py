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

Parts = tuple[torch.Tensor, ...]


class Reduction:
    """One reduction of a kernel: `add` takes pieces in, `value` is what they give.

    ``totals``: what has been added up of ``count`` values each. Reductions of other pieces of the map are merged by
    their totals (`join`), each of which is of ``shape``.
    """

    held = 1  # totals that it keeps

    def __init__(self, kernel: Kernel, stage: Stage) -> None:
        self.kernel, self.stage = kernel, stage
        self.given: dict[str, Any] = bind(kernel.node)
        source = kernel.reads[0][0]
        assert source.dims is not None
        self.sizes = [int(s) for s in stage.values[source.node].shape]  # of the map
        rank, row = len(self.sizes), kernel.row
        over = reduced_dims(source.dims, rank) if row.over is None else row.over(self.given, rank)
        self.dims = sorted({d % rank for d in over})
        self.totals: Parts = ()
        self.count = 0

    @property
    def shape(self) -> list[int]:
        return [size for dim, size in enumerate(self.sizes) if dim not in self.dims]

    def add(self, *pieces: torch.Tensor) -> None:
        self.join(self.part(*pieces), pieces[0].numel() // max(1, prod(self.shape)))

    def join(self, part: Parts, count: int) -> None:
        """Take in the totals of ``count`` values each."""
        self.totals = self.joined(self.totals, part, count) if self.totals else part
        self.count += count

    def part(self, *pieces: torch.Tensor) -> Parts:
        raise NotImplementedError

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        return (a[0] + b[0],)

    def number(self) -> torch.Tensor:
        """The result, in whatever shape and type it was added up."""
        assert self.totals, f"{self.kernel.name} was given no rows"
        return self.totals[0]

    def value(self) -> torch.Tensor:
        wanted = self.stage.values[self.kernel.node]
        wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
        return self.number().reshape([int(s) for s in wanted.shape]).to(wanted.dtype)


class _Sum(Reduction):
    def part(self, *pieces: torch.Tensor) -> Parts:
        return (pieces[0].sum(self.dims, dtype=_accumulator(pieces[0].dtype)).double(),)


class _Mean(_Sum):
    def number(self) -> torch.Tensor:
        return super().number() / self.count


class _Max(Reduction):
    def part(self, *pieces: torch.Tensor) -> Parts:
        return (pieces[0].amax(self.dims),)

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        return (torch.maximum(a[0], b[0]),)


class _Min(Reduction):
    def part(self, *pieces: torch.Tensor) -> Parts:
        return (pieces[0].amin(self.dims),)

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        return (torch.minimum(a[0], b[0]),)


class _Norm(Reduction):
    """The p-norm of vectors: sums of powers, or the largest."""

    def __init__(self, kernel: Kernel, stage: Stage) -> None:
        super().__init__(kernel, stage)
        power = self.given.get("ord", self.given.get("p"))
        self.power = 2.0 if power is None else float(power)

    def part(self, *pieces: torch.Tensor) -> Parts:
        x = pieces[0].to(_accumulator(pieces[0].dtype))
        found = torch.linalg.vector_norm(x, self.power, self.dims).double()
        return (found if self.power == float("inf") else found**self.power,)

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        return (torch.maximum(a[0], b[0]) if self.power == float("inf") else a[0] + b[0],)

    def number(self) -> torch.Tensor:
        found = super().number()
        return found if self.power == float("inf") else found ** (1 / self.power)


class _Product(Reduction):
    """A product of matrices over the places of two maps."""

    @property
    def shape(self) -> list[int]:
        return [int(s) for s in self.stage.values[self.kernel.node].shape]

    def part(self, *pieces: torch.Tensor) -> Parts:
        places = self.kernel.places
        a, b = (pieces[places[self.given[name]]] for name in ("input", self._second))
        return (torch.matmul(a.to(_accumulator(a.dtype)), b.to(_accumulator(b.dtype))).double(),)

    @property
    def _second(self) -> str:
        return "other" if "other" in self.given else "mat2"


class _Moments(Reduction):
    """Means and sums of squares about them, of values that are ``taken`` together."""

    held = 2

    @property
    def shape(self) -> list[int]:
        return [self.sizes[0], int(self.given.get("num_groups") or self.sizes[1])]

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """A piece as [N, what has statistics of its own, places]."""
        return x.reshape(*self.shape, -1)

    def part(self, *pieces: torch.Tensor) -> Parts:
        return _moments(self.taken(pieces[0].to(_accumulator(pieces[0].dtype))))

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        both, apart = self.count + count, b[0] - a[0]
        return a[0] + apart * (count / both), a[1] + b[1] + apart.square() * (self.count * count / both)

    def value(self) -> torch.Tensor:
        eps = float(self.given["eps"])
        return torch.stack([self.number(), (self.totals[1] / self.count + eps).rsqrt()])


class _Deviation(_Moments):
    """A variance or a standard deviation."""

    @property
    def shape(self) -> list[int]:
        return [1, prod(size for dim, size in enumerate(self.sizes) if dim not in self.dims)]

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        kept = [d for d in range(x.dim()) if d not in self.dims]
        return x.permute(*kept, *self.dims).reshape(*self.shape, -1)

    def value(self) -> torch.Tensor:
        return Reduction.value(self)

    def number(self) -> torch.Tensor:
        lost = self.given.get("correction", 1 if self.given.get("unbiased", True) else 0)
        found = self.totals[1] / max(0.0, self.count - (1 if lost is None else float(lost)))
        return found.sqrt() if self.kernel.row.name == "std" else found


class _Exponentials(Reduction):
    """Of a softmax: the largest value of each vector, and the sum of exponentials relative to it."""

    held = 2

    @property
    def shape(self) -> list[int]:
        return [1 if dim in self.dims else size for dim, size in enumerate(self.sizes)]

    def part(self, *pieces: torch.Tensor) -> Parts:
        x = pieces[0].to(_accumulator(pieces[0].dtype))
        most = x.amax(self.dims, keepdim=True)
        apart = x - most
        powers = apart.exp() if joins_by_hand() else apart.exp_()
        return most.double(), powers.sum(self.dims, keepdim=True).double()

    def joined(self, a: Parts, b: Parts, count: int) -> Parts:
        both = torch.maximum(a[0], b[0])
        return both, a[1] * (a[0] - both).exp() + b[1] * (b[0] - both).exp()

    def value(self) -> torch.Tensor:
        return torch.stack([self.number(), self.totals[1]])


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


def _moments(y: torch.Tensor) -> Parts:
    """Means [N, groups] of a piece [N, groups, places], and the sums of squares about them."""
    if joins_by_hand() or y.device.type != "cpu":
        mean = y.mean(2)
        return mean.double(), torch.linalg.vector_norm(y - mean[:, :, None], dim=2).double().square()
    # The kernel of torch's own norm: one pass, where the lines above take three.
    count = y.shape[2]
    _, mean, scale = torch.native_group_norm(y, None, None, y.shape[0], y.shape[1], count, y.shape[1], 0.0)
    deviation = scale.double().reciprocal()  # of places that are all alike the scale is infinite
    return mean.double(), deviation.square() * count


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
