"""Layers of our own that stand in canonical graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
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


# ---------------------------------------------------------------- maxima


def separable_max(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    before: Sequence[int], count: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """Maxima over windows of [N, C, H, W], along rows and then along columns: ``count`` windows on each axis, the first
    of which begins ``before`` the first value. What lies outside is no value. Without gradients."""
    for axis in (0, 1):
        x = _slide(x, 2 + axis, kernel[axis], stride[axis], dilation[axis], before[axis], count[axis])
    return x


def _slide(x: torch.Tensor, dim: int, kernel: int, stride: int, dilation: int, before: int, count: int) -> torch.Tensor:
    """Maxima over windows along one axis, of the values at each place of the window in turn."""
    size = x.shape[dim]
    out = x.new_empty((*x.shape[:dim], count, *x.shape[dim + 1 :]))
    parts = []  # (first window, value that it has at this place of the window, windows)
    for offset in (i * dilation - before for i in range(kernel)):
        first = max(0, -(offset // stride))
        last = min(count, (size - 1 - offset) // stride + 1)
        if last > first:
            parts.append((first, first * stride + offset, last - first))
    parts.sort(key=lambda part: -part[2])
    all_have = sum(length == count for _, _, length in parts)
    values = [x[(slice(None),) * dim + (slice(at, at + (n - 1) * stride + 1, stride),)] for _, at, n in parts]
    if all_have >= 2:
        torch.maximum(values[0], values[1], out=out)
    elif all_have:
        out.copy_(values[0])
    else:
        out.fill_(float("-inf"))
    for (first, _, n), value in list(zip(parts, values, strict=True))[min(all_have, 2) :]:
        here = out.narrow(dim, first, n)
        torch.maximum(here, value, out=here)
    return out


def _separable(x: torch.Tensor) -> bool:
    """On a CPU, in contiguous memory, without gradients and outside `torch.vmap`, `torch.func` and forward-mode
    differentiation, which take no results in memory that is given to them."""
    recorded = torch.is_grad_enabled() and x.requires_grad
    transformed = is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
    return x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous() and not recorded and not transformed


class SeparableMaxPool2d(nn.Module):
    """`torch.nn.MaxPool2d` as `separable_max`, where that is faster: on a CPU, in contiguous memory, when no gradient
    is wanted; elsewhere, in exports and when compiled, torch's own. The same values."""

    def __init__(
        self, kernel_size: Sequence[int] | int, stride: Sequence[int] | int | None = None,
        padding: Sequence[int] | int = 0, dilation: Sequence[int] | int = 1, ceil_mode: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        both = lambda size: tuple(int(n) for n in ((size, size) if isinstance(size, int) else size))  # noqa: E731
        self.kernel_size, self.stride = both(kernel_size), both(kernel_size if stride is None else stride)
        self.padding, self.dilation, self.ceil_mode = both(padding), both(dilation), ceil_mode

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not _separable(x):
            return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        count = [self._windows(x.shape[2 + axis], axis) for axis in (0, 1)]
        return separable_max(x, self.kernel_size, self.stride, self.dilation, self.padding, count)

    def _windows(self, size: int, axis: int) -> int:
        """How many windows torch lays over an axis: a last one that begins in the padding behind does not count."""
        stride, padding = self.stride[axis], self.padding[axis]
        room = size + 2 * padding - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1
        count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
        count -= self.ceil_mode and (count - 1) * stride >= size + padding
        if count < 1:
            raise RuntimeError(f"max_pool2d: no window of {self.kernel_size} fits a map of {size} values")
        return count
