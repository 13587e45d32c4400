"""What a fusion hands to the branches behind it: few directions of the dense map instead of few of its channels.

A branch of the next block has room for r of C channels. Its layers are linear in them, so the best r linear
combinations are those that carry the most of what its layers give: with S the covariance of the map and W the weights
that read it, the first r right singular vectors of W S^½.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from splitfx.carving.division import Division

DEAD = 1e-9  # of the largest eigenvalue of S: a direction that never varies


@dataclass(frozen=True)
class Reader:
    """A divided layer that reads a fusion: its dense weight [out, C, taps] in float64, each row as it counts."""

    weight: torch.Tensor
    division: Division


def projected(readers: list[Reader], covariance: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
    """What the fusion's outputs take of the dense map, [outs, C], and each reader's weight [out, outs, taps] for them;
    None where the readers do not share their branches, or have room for all channels."""
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
    takes = covariance.new_zeros(count, channels)
    weights = [r.weight.new_zeros(len(r.weight), count, r.weight.shape[2]) for r in readers]
    for g, slots in enumerate(ins):
        rows = [r.weight[torch.as_tensor(r.division.outs[g])] for r in readers]
        gram = sum(torch.einsum("oct,odt->cd", w, w) for w in rows)
        best = torch.linalg.eigh(root.T @ gram @ root)[1].flip(1)[:, : len(slots)]  # [alive, r]
        used = torch.as_tensor(slots[: best.shape[1]])
        takes[used] = best.T @ inverse
        for weight, reader, row in zip(weights, readers, rows, strict=True):
            outs = torch.as_tensor(reader.division.outs[g])
            weight[outs[:, None], used] = torch.einsum("oct,cr->ort", row, root @ best)
    return takes, weights
