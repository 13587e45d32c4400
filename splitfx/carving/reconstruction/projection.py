"""What a fusion hands to the branches behind it: few directions of the dense map instead of few of its channels.

A branch of the next block has room for r of C channels. Its layers are linear in them, so the best r linear
combinations are those that carry the most of what its layers give: with S the covariance of the map and W the weights
that read it, the first r right singular vectors of W S^½.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from splitfx.carving.division import Division

SWEEPS = 4  # over the branches
DEAD = 1e-9  # of the largest eigenvalue of S: a direction that never varies


@dataclass(frozen=True)
class Reader:
    """A divided layer that reads a fusion: its dense weight [out, C, taps] in float64, each row as it counts."""

    weight: torch.Tensor
    division: Division


def projected(
    readers: list[Reader], covariance: torch.Tensor, joint: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor] | None:
    """What the outputs of all branches take of the dense map, [outs, C], each reader's weight [out, outs, taps] for
    them, and [C, outs], what of the dense map they give back; None where the readers do not share their branches, or
    have room for all channels. ``joint``: weights [out, C, taps] of layers that read all branches."""
    ins = readers[0].division.ins
    alike = all(len(r.division.ins) == len(ins) for r in readers)
    if not alike or any(not np.array_equal(a, b) for r in readers for a, b in zip(r.division.ins, ins, strict=True)):
        return None
    count, channels = sum(map(len, ins)), len(covariance)
    apart = count == len(np.unique(np.concatenate(ins)))
    if not apart or max(map(len, ins)) >= channels:
        return None
    values, vectors = torch.linalg.eigh(covariance)
    alive = values > DEAD * values[-1].clamp_min(1e-300)
    root = vectors[:, alive] * values[alive].sqrt()  # [C, alive]: S = root · rootᵀ
    inverse = (vectors[:, alive] / values[alive].sqrt()).T
    rows = [[r.weight[torch.as_tensor(r.division.outs[g])] for r in readers] for g in range(len(ins))]
    own = [_gram(some, root) for some in rows]
    bases = _leading(own, _gram(list(joint), root) if joint else None, [len(slots) for slots in ins])
    takes = covariance.new_zeros(count, channels)
    basis = covariance.new_zeros(len(root.T), count)
    weights = [r.weight.new_zeros(len(r.weight), count, r.weight.shape[2]) for r in readers]
    for g, (slots, best) in enumerate(zip(ins, bases, strict=True)):
        used = torch.as_tensor(slots[: best.shape[1]])
        takes[used] = best.T @ inverse
        basis[:, used] = best
        for weight, reader, row in zip(weights, readers, rows[g], strict=True):
            outs = torch.as_tensor(reader.division.outs[g])
            weight[outs[:, None], used] = torch.einsum("oct,cr->ort", row, root @ best)
    return takes, weights, root @ torch.linalg.pinv(basis.T, rtol=1e-6)


def _gram(weights: list[torch.Tensor], root: torch.Tensor) -> torch.Tensor:
    """What layers with weights [out, C, taps] make of each direction, [alive, alive]."""
    return root.T @ torch.stack([torch.einsum("oct,odt->cd", w, w) for w in weights]).sum(0) @ root


def _leading(own: list[torch.Tensor], joint: torch.Tensor | None, sizes: list[int]) -> list[torch.Tensor]:
    """For each branch orthonormal directions [alive, r]: those that its own layers make the most of, and of what is
    read jointly those that the other branches do not hold yet. Branch by branch, while the others hold still."""
    bases = [torch.linalg.eigh(gram)[1].flip(1)[:, :size] for gram, size in zip(own, sizes, strict=True)]
    if joint is None:
        return bases
    for g in list(range(len(own))) * SWEEPS:
        others = torch.linalg.qr(torch.cat([b for i, b in enumerate(bases) if i != g], 1))[0]
        left = torch.eye(len(joint)).to(joint) - others @ others.T
        bases[g] = torch.linalg.eigh(own[g] + left @ joint @ left)[1].flip(1)[:, : sizes[g]]
    return bases
