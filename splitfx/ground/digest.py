"""A few letters that other weights do not have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest(state: Mapping[str, torch.Tensor], words: str = "") -> str:
    """Of the numbers of a ``state_dict``, and of ``words`` beside them."""
    found = hashlib.sha256(words.encode())
    for key in sorted(state):
        values = state[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(key.encode() + values.numpy().tobytes())
    return found.hexdigest()[:16]
