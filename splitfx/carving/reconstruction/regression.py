"""Ridge regression by normal equations, accumulated in float64 over batches, for many equal blocks of a layer at once.

The ridge draws the solution to a given start, the dense weights: directions that the data does not show stay as they
are. How strongly is chosen among `PULLS` and no change at all by cross-validation: each part of the inputs is held out
once, since a part of few photographs may be like the others or like none; then all inputs count.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PULLS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean square of an input


@dataclass
class Normal:
    """Sums over rows of ``x`` [B, P, d] and ``y`` [B, P, o], block by block."""

    rows: int
    x: torch.Tensor  # [B, d]
    y: torch.Tensor  # [B, o]
    xx: torch.Tensor  # [B, d, d]
    xy: torch.Tensor  # [B, d, o]
    yy: torch.Tensor  # [B, o]

    @staticmethod
    def of(x: torch.Tensor, y: torch.Tensor) -> Normal:
        x, y = x.double(), y.double()
        turned = x.transpose(1, 2)
        return Normal(x.shape[1], x.sum(1), y.sum(1), turned @ x, turned @ y, y.square().sum(1))

    def plus(self, other: Normal | None) -> Normal:
        if other is None:
            return self
        return Normal(
            self.rows + other.rows,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def less(self, other: Normal) -> Normal:
        """The sums without those rows."""
        return Normal(
            self.rows - other.rows,
            self.x - other.x,
            self.y - other.y,
            self.xx - other.xx,
            self.xy - other.xy,
            self.yy - other.yy,
        )

    def centred(self, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The Gram matrix and the cross products about the means; as they are for a layer without an intercept."""
        if not intercept:
            return self.xx, self.xy
        mean = self.x / self.rows
        return self.xx - mean[:, :, None] * self.x[:, None], self.xy - mean[:, :, None] * self.y[:, None]

    def solve(self, pull: float, start: torch.Tensor, intercept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [B, d, o] and intercepts [B, o], nearest in the mean square and drawn to ``start``."""
        gram, cross = self.centred(intercept)
        mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        pulled = torch.diag_embed((pull * mean)[:, None].expand(gram.shape[:2]))
        weight = start + torch.linalg.solve(gram + pulled, cross - gram @ start)
        return weight, self.intercept(weight, intercept)

    def intercept(self, weight: torch.Tensor, intercept: bool) -> torch.Tensor:
        if not intercept:
            return torch.zeros_like(self.y)
        return (self.y - torch.einsum("bd,bdo->bo", self.x, weight)) / self.rows

    def varies(self, intercept: bool) -> torch.Tensor:
        """The sum of squares [B] of ``y``, about its mean where there is an intercept."""
        return (self.yy - self.y.square() / self.rows if intercept else self.yy).sum(1)

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The sum of squares [B] of what is left of ``y``."""
        fitted = torch.einsum("bdo,bde,beo->b", weight, self.xx, weight) + self.rows * bias.square().sum(1)
        fitted = fitted + 2 * torch.einsum("bd,bdo,bo->b", self.x, weight, bias)
        crossed = torch.einsum("bdo,bdo->b", self.xy, weight) + (self.y * bias).sum(1)
        return (self.yy.sum(1) + fitted - 2 * crossed).clamp_min(0)


def solved(
    parts: Sequence[Normal], start: torch.Tensor, intercept: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [B, d, o], intercepts [B, o], and the sum of squares [B] that is left of all rows, each part solved
    without it. Each block gets the pull that is best for it there."""
    every = functools.reduce(lambda a, b: b.plus(a), parts)
    errors = every.x.new_zeros(1 + len(PULLS), len(start))
    for part in parts:
        rest = every.less(part)
        errors[0] += part.error(start, rest.intercept(start, intercept))
        for number, pull in enumerate(PULLS, 1):
            errors[number] += part.error(*rest.solve(pull, start, intercept))
    least, chosen = errors.min(0)
    weight, bias = start.clone(), every.intercept(start, intercept)
    for number in sorted(set(chosen.tolist()) - {0}):
        of = (chosen == number)[:, None]
        again = every.solve(PULLS[number - 1], start, intercept)
        weight, bias = torch.where(of[:, :, None], again[0], weight), torch.where(of, again[1], bias)
    return weight, bias, least
