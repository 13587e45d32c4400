"""Generated images whose classes come in groups: what a network learns from them, SplitNet can find and divide."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from splitfx.train.data import Data, divided


def planted_features(
    groups: int = 2,
    classes: int = 4,
    samples: int = 1200,
    noise: float = 0.7,
    seed: int = 0,
) -> Data:
    """A generated data set with a hierarchy: ``groups`` of ``classes`` each, named ``a0``, ``a1`` … ``b0``, ``b1`` ….

    Every group has smooth patterns of its own, and its classes are the combinations of their signs. Every image shows
    the patterns of all groups: those of its own group with its class's signs, the others with random ones, and faintly
    one pattern that says which group counts. So each feature matters to the classes of one group and to no other.
    Images of 1x12x12.
    """
    made = torch.Generator().manual_seed(seed)
    bits = max(1, (classes - 1).bit_length())
    if groups * (1 + bits) > 16:
        raise ValueError(f"{groups} groups of {classes} classes need {groups * (1 + bits)} patterns; there are 16")
    apart = 4 * torch.linalg.qr(torch.randn(16, 16, generator=made))[0]  # patterns that do not overlap
    patterns = F.interpolate(apart.view(16, 1, 4, 4), (12, 12), mode="bilinear", align_corners=False)
    which, own = patterns[:groups], patterns[groups : groups * (1 + bits)].view(groups, bits, 1, 12, 12)
    targets = torch.arange(samples) % (groups * classes)
    group, code = targets // classes, targets % classes
    signs = torch.randint(2, (samples, groups, bits), generator=made)
    signs[torch.arange(samples), group] = code[:, None] >> torch.arange(bits) & 1
    clean = 0.5 * which[group] + torch.einsum("ngb,gbchw->nchw", 2.0 * signs - 1, own)
    images = clean + noise * torch.randn(clean.shape, generator=made)
    names = tuple(f"{chr(ord('a') + g)}{c}" for g in range(groups) for c in range(classes))
    return divided("planted", images, targets, names)
