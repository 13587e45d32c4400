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
def steps(draw: st.DrawFn, width: int) -> tuple[nn.Module, int]:  # noqa: C901 - an arm for each kind of step
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


class Spread(nn.Module):
    """What a pooled branch of ASPP does: one value a channel, resized to the map again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.adaptive_avg_pool2d(x, 1)).relu()
        return torch.cat([x, F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)], 1)


class Resize(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, **self.options)


class ChannelsLast(nn.Module):
    """Layer norm and linear over channels, as in ConvNeXt."""

    def __init__(self, width: int, wanted: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, wanted)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.linear(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Skip(nn.Module):
    """Down, and up again beside what was there."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.down(x))
        return torch.cat([x, F.interpolate(y, size=x.shape[2:], mode="nearest")], 1)


@st.composite
def maps(draw: st.DrawFn, width: int, whole: bool) -> tuple[nn.Module, int]:
    """A step that tiling has a rule for and splitting has not; ``whole``: it may reduce over the map."""
    kinds = ["pad", "resize", "window", "transposed", "last", "skip", "pool", "adaptive"]
    kind = draw(st.sampled_from(kinds + ["norm", "spread", "gate"] * whole))
    wanted = draw(st.integers(3, 8))
    pair = lambda low, high: draw(st.tuples(st.integers(low, high), st.integers(low, high)))  # noqa: E731
    if kind == "pad":
        mode = draw(st.sampled_from(("constant", "reflect", "replicate")))
        sides = draw(st.tuples(*[st.integers(-1 if mode == "constant" else 0, 3)] * 4))
        return Call(lambda x: F.pad(x, sides, mode=mode)), width
    if kind == "resize":
        mode = draw(st.sampled_from(("nearest", "nearest-exact", "bilinear", "bicubic")))
        corners = {"align_corners": draw(st.booleans())} if mode.startswith("bi") else {}
        factor: dict[str, Any] = {"scale_factor": draw(st.sampled_from((0.6, 1.3, 2.0)))}
        size = {"size": pair(5, 24)} if draw(st.booleans()) else factor
        return Resize(mode=mode, **corners, **size), width
    if kind == "window":
        k, dilation = pair(1, 4), pair(1, 2)
        most = min(d * (n - 1) for d, n in zip(dilation, k, strict=True)) + 2
        conv = nn.Conv2d(width, wanted, k, pair(1, 3), draw(st.integers(most // 2, most)), dilation)
        return conv, wanted
    if kind == "transposed":
        stride = draw(st.integers(1, 3))
        extra = draw(st.integers(0, stride - 1))
        return nn.ConvTranspose2d(width, wanted, pair(1, 4), stride, output_padding=extra, dilation=pair(1, 2)), wanted
    if kind == "last":
        return ChannelsLast(width, wanted), wanted
    if kind == "skip":
        return Skip(draw(convs(width, wanted, 2)), draw(convs(wanted, wanted))), width + wanted
    if kind == "pool":
        k, ceil = draw(st.integers(2, 3)), draw(st.booleans())
        options = {"stride": draw(st.integers(1, 3)), "padding": draw(st.integers(0, 1)), "ceil_mode": ceil}
        average = nn.AvgPool2d(k, count_include_pad=draw(st.booleans()), **options)
        return draw(st.sampled_from((average, nn.MaxPool2d(k, **options)))), width
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d(pair(3, 9)), width
    if kind == "norm":
        groups = [g for g in (1, 2, 3) if width % g == 0]
        norm = nn.GroupNorm(draw(st.sampled_from(groups)), width)
        return draw(st.sampled_from((norm, nn.InstanceNorm2d(width)))), width
    if kind == "spread":
        return Spread(width), width + 3
    return SqueezeExcite(width, 3), width


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@st.composite
def tileable(draw: st.DrawFn, whole: bool, length: int = 6) -> tuple[nn.Module, torch.Tensor]:
    """A network of which every layer has a rule for tiling, on an image of odd sizes; as `networks` otherwise."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    width = draw(st.integers(3, 9))
    layers: list[nn.Module] = [draw(convs(3, width))]
    for _ in range(draw(st.integers(1, length))):
        layer, width = draw(maps(width, whole) if draw(st.booleans()) else steps(width))
        layers.append(layer)
    model = nn.Sequential(*layers)
    if not whole:
        model = nn.Sequential(*(layer for layer in model if not isinstance(layer, SqueezeExcite)))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    sizes = draw(st.tuples(st.integers(9, 30), st.integers(9, 30)))
    return model.double().eval(), torch.randn(draw(st.integers(1, 2)), 3, *sizes, dtype=torch.float64)


@st.composite
def schedules(draw: st.DrawFn, grids: bool) -> Any:
    """How to tile: steps, firings, recomputation, and a grid where nothing reduces over the map."""
    from splitfx.tiling.plan.instructions import Schedule
    from splitfx.tiling.stage.kernel import Keeping

    tiles = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) if grids else (1, 1)
    every = tuple(draw(st.lists(st.integers(1, 4), max_size=6)))
    recompute = draw(st.sampled_from((float("inf"), 0.0, 20_000.0)))
    return Schedule(draw(st.integers(0 if tiles != (1, 1) else 1, 12)), every, tiles, Keeping(recompute))
