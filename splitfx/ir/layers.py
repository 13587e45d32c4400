"""Layers of our own that stand in canonical graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splitfx.ir.graph import weighted


class FunctionalBatchNorm(nn.Module):
    """``F.batch_norm`` on tensors that the user keeps under other names; follows train() and eval()."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(self, x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any) -> torch.Tensor:
        return F.batch_norm(x, mean, var, weight, bias, self.training, self.momentum, self.eps)


class Masked(nn.Module):
    """A layer of which a part of the weights counts as zero: `clear` sets that part to zero in a tensor of the weight's
    size. Masked when it is called, so it takes no memory."""

    layer: nn.Module

    def clear(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def weight(self) -> torch.Tensor:
        return self.clear(weighted(self.layer).weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.layer, {"weight": self.weight()}, (x,))
