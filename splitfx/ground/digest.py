"""A few letters that other weights do not have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest(state: Mapping[str, torch.Tensor], words: str = "") -> str:
    """Of the numbers of a ``state_dict``, and of ``words`` beside them."""
    found = hashlib.sha256(words.encode())
    for key in sorted(state):
        tensor = state[key]
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
