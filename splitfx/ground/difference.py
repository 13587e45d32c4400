"""How far a tensor is from the one that was wanted, counted in float64."""

from __future__ import annotations

import math

import torch


def apart(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the largest value that was wanted, of what is finite. Infinite where one has an inf
    or nan that the other has not, or their shapes differ."""
    wide = torch.complex128 if wanted.dtype.is_complex else torch.float64
    a, b = got.to(wide), wanted.to(wide)
    odd = ~b.isfinite()
    if not torch.equal(odd, ~a.isfinite()) or not torch.equal(a[odd].nan_to_num(), b[odd].nan_to_num()):
        return math.inf, 0.0
    far, largest = (a - b)[~odd].abs(), b[~odd].abs()
    return (float(far.max()), float(largest.max())) if far.numel() else (0.0, 0.0)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference relative to the largest value that was wanted, as `apart`. Values that are all exactly
    zero have no size of their own, since rounding may make them something like 1e-17: of those, the difference."""
    far, largest = apart(got, wanted)
    return far / (largest or 1.0)
