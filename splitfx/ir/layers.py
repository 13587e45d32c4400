"""Layers of our own that stand in canonical graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class FunctionalBatchNorm(nn.Module):
    """``F.batch_norm`` on tensors that the user keeps under other names; follows train() and eval()."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> torch.Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)
