"""Random small convolutional networks for hypothesis: everything that splitting and tiling must survive.

A network is a list of steps that any width can be put through: convolutions of every kind, pools, residual
sums, concats, squeeze-and-excitation, channel shuffles, sliced halves. Widths and images are small and odd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn


class Conv(nn.Module):
    """A conv with what surrounds it: norm, activation."""

    def __init__(self, i: int, o: int, k: int, norm: bool, act: str, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, bias=not norm, **options)
        self.norm = nn.BatchNorm2d(o) if norm else None
        self.act = {"relu": nn.ReLU(inplace=True), "prelu": nn.PReLU(o), "silu": nn.SiLU(), "": None}[act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.act is None else self.act(x)


class Residual(nn.Module):
    def __init__(self, main: nn.Module, short: nn.Module | None) -> None:
        super().__init__()
        self.main, self.short = main, short

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x)
        y += x if self.short is None else self.short(x)
        return y.relu()


class Concat(nn.Module):
    """Two paths side by side, or a path beside its own input (DenseNet)."""

    def __init__(self, first: nn.Module, second: nn.Module | None) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), x if self.second is None else self.second(x)], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halves(nn.Module):
    """One half goes through a conv, the other around it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a, self.conv(b)], 1)


class Classifier(nn.Module):
    def __init__(self, body: nn.Module, width: int, flat: int) -> None:
        super().__init__()
        self.body, self.flat, self.fc = body, flat, nn.Linear(width * flat * flat, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(x), self.flat), 1))


KINDS = (
    "conv",
    "conv",
    "pool",
    "depthwise",
    "grouped",
    "residual",
    "concat",
    "dense",
    "se",
    "shuffle",
    "halves",
    "up",
)


@st.composite
def convs(draw: st.DrawFn, i: int, o: int, stride: int = 1) -> Conv:
    """A conv that keeps the image size at stride 1."""
    k = draw(st.sampled_from((1, 3, 3, 5)))
    dilation = draw(st.sampled_from((1, 1, 2))) if k == 3 else 1
    return Conv(
        i,
        o,
        k,
        draw(st.booleans()),
        draw(st.sampled_from(("relu", "prelu", "silu", ""))),
        stride=stride,
        dilation=dilation,
        padding=dilation * (k // 2),
    )


@st.composite
def steps(draw: st.DrawFn, width: int) -> tuple[nn.Module, int]:
    """One step on ``width`` channels and how many it gives."""
    kind = draw(st.sampled_from(KINDS))
    wanted = draw(st.integers(4, 13))
    if kind == "conv":
        return draw(convs(width, wanted, draw(st.sampled_from((1, 2))))), wanted
    if kind == "pool":
        ceil = draw(st.booleans())
        pools = (nn.MaxPool2d(3, 2, 1, ceil_mode=ceil), nn.AvgPool2d(2, ceil_mode=ceil), nn.MaxPool2d(2, 1))
        return draw(st.sampled_from(pools)), width
    if kind == "depthwise":
        multiple = draw(st.sampled_from((1, 1, 2)))
        return Conv(width, width * multiple, 3, True, "relu", groups=width, padding=1), width * multiple
    if kind == "up":
        groups = draw(st.sampled_from((1, 1, 2))) if width % 2 == 0 else 1
        return nn.ConvTranspose2d(width, 2 * wanted, 3, 2, 1, groups=groups), 2 * wanted
    if kind == "grouped" and width % 2 == 0:
        return Conv(width, 2 * wanted, 3, False, "relu", groups=2, padding=1), 2 * wanted
    if kind == "residual":
        stride = draw(st.sampled_from((1, 2)))
        out = width if stride == 1 and draw(st.booleans()) else wanted
        main = nn.Sequential(draw(convs(width, wanted, stride)), draw(convs(wanted, out)))
        same = stride == 1 and out == width
        return Residual(main, None if same else nn.Conv2d(width, out, 1, stride)), out
    if kind == "concat":
        second = draw(st.integers(4, 9))
        return Concat(draw(convs(width, wanted)), draw(convs(width, second))), wanted + second
    if kind == "dense" and width < 24:
        return Concat(draw(convs(width, wanted)), None), width + wanted
    if kind == "se":
        return SqueezeExcite(width, draw(st.integers(3, 6))), width
    if kind == "shuffle":
        divisors = [g for g in (2, 3, 4) if width % g == 0]
        if divisors:
            return Shuffle(draw(st.sampled_from(divisors))), width
    if kind == "halves" and width % 2 == 0:
        return Halves(draw(convs(width // 2, width // 2))), width
    return draw(convs(width, wanted)), wanted


@st.composite
def networks(draw: st.DrawFn, length: int = 6) -> tuple[nn.Module, torch.Tensor]:
    """A network in eval mode and float64 with example inputs (batch 2); its statistics are not 0 and 1."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.integers(4, 13))
    layers: list[nn.Module] = [draw(convs(3, width))]
    for _ in range(draw(st.integers(1, length))):
        layer, width = draw(steps(width))
        layers.append(layer)
    body = nn.Sequential(*layers)
    model = Classifier(body, width, draw(st.sampled_from((1, 2)))) if draw(st.booleans()) else body
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    sizes = draw(st.tuples(st.integers(13, 21), st.integers(13, 21)))
    return model.double().eval(), torch.randn(2, 3, *sizes, dtype=torch.float64)
