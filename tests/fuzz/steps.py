"""One step of a drawn network: a layer or an expression, and which values it reads.

Expressions are texts, so that a listing shows what is computed. A family is chosen first, then its options, so that
rare operations are drawn as often as convolutions have options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

Made = tuple[nn.Module, tuple[int, ...]]


class Call(nn.Module):
    """An expression of ``x``, ``y`` and ``z``, and of a parameter ``p``, a buffer ``b`` or indices ``k``."""

    def __init__(self, text: str, p: Any = None, b: Any = None, k: Any = None, persistent: bool = True) -> None:
        super().__init__()
        self.text = text
        self.inplace = ("_(" in text and "clone" not in text) or "inplace=True" in text
        self.function = eval(f"lambda s, x, y=None, z=None: {text}", {"torch": torch, "F": F})
        if p is not None:
            self.p = nn.Parameter(p)
        if b is not None:
            self.register_buffer("b", b, persistent=persistent)
        if k is not None:
            self.register_buffer("k", k)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.function(self, *values)

    def __repr__(self) -> str:
        return self.text


@dataclass
class Reads:
    """The values so far, and the one that a step reads first."""

    values: list[torch.Tensor]
    i: int

    @property
    def x(self) -> torch.Tensor:
        return self.values[self.i]

    def others(self, fits: Callable[[torch.Tensor], bool]) -> list[int]:
        return [j for j, v in enumerate(self.values) if j != self.i and v.dim() == self.x.dim() and fits(v)]


# ---------------------------------------------------------------- expressions

OWNED = {  # expressions with tensors of their own; c channels, n the last size
    "x * s.p + s.b": lambda c, n: {"p": torch.rand(c, 1, 1) + 0.5, "b": torch.randn(c, 1, 1)},
    "x + s.p": lambda c, n: {"p": torch.randn(1, c, 1, 1)},
    "x - s.b": lambda c, n: {"b": torch.randn(n), "persistent": False},
    "x[:, s.k]": lambda c, n: {"k": torch.randperm(c)},
    "x.index_select(1, s.k)": lambda c, n: {"k": torch.randperm(c)[: max(1, c - 1)]},
    "F.conv2d(x, s.p, s.b, padding=1)": lambda c, n: {"p": torch.randn(3, c, 3, 3) / 3, "b": torch.randn(3)},
    "F.conv2d(x, s.p - s.p.mean((1, 2, 3), keepdim=True))": lambda c, n: {"p": torch.randn(4, c, 1, 1)},
    "F.batch_norm(x, s.b, s.b.square() + 0.5)": lambda c, n: {"b": torch.randn(c)},
    "F.prelu(x, s.p)": lambda c, n: {"p": torch.rand(c)},
    "F.linear(x, s.p)": lambda c, n: {"p": torch.randn(4, n) / 3},
    "F.group_norm(x, 1, s.p)": lambda c, n: {"p": torch.rand(c)},
    "x + F.embedding(s.k, s.p).t()[None, :, None]": lambda c, n: {"p": torch.randn(5, c), "k": torch.arange(n) % 5},
    "F.conv2d(x, x.mean((0, 2, 3)).view(-1, 1, 1, 1).expand(-1, -1, 2, 2), groups=x.shape[1])": lambda c, n: {},
}


def _texts() -> dict[str, list[str]]:
    """The expressions of each section of expressions.txt, one a line."""
    sections = (Path(__file__).parent / "expressions.txt").read_text(encoding="utf-8").split("\n\n")
    return {name.strip("[]"): lines for name, *lines in (s.strip().splitlines() for s in sections)}


TEXTS = _texts()
RANKS = ("x.flatten(2)", "x.flatten(2).transpose(1, 2)", "x.unsqueeze(2)", "x.mean((2, 3))")  # to other kinds of values


# ---------------------------------------------------------------- layers


class Gate(nn.Module):
    """Squeeze and excitation, or a gate over the map."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.down, self.up = nn.Conv2d(width, 2, 1), nn.Conv2d(2, 1 if form == "spatial" else width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x if self.form == "spatial" else F.adaptive_avg_pool2d(x, 1)
        gate = self.up(self.down(pooled).relu())
        return x * (F.hardsigmoid(gate) if self.form == "hard" else gate.sigmoid())

    def extra_repr(self) -> str:
        return self.form


def gate(rng: Random, c: int) -> nn.Module:
    return Gate(c, rng.choice(("excite", "hard", "spatial")))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.body, self.adds = body, inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.adds:
            y += x
            return y
        return x + y


class Last(nn.Module):
    """A layer over channels that come last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """The weight of another layer, in a layer of its own."""

    def __init__(self, other: nn.Conv2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(other.in_channels, other.out_channels, other.kernel_size, padding=1, groups=other.groups)  # type: ignore[arg-type]
        self.conv.weight = other.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def convolution(rng: Random, c: int) -> nn.Conv2d:
    out = rng.randint(2, 9)
    k: Any = rng.choice((1, 1, 2, 3, 3, 5, (1, 3), (3, 2)))
    groups = rng.choice([g for g in range(1, c + 1) if c % g == 0] if rng.random() < 0.4 else [1])
    out = groups * rng.randint(1, max(1, 8 // groups)) if groups > 1 else out
    stride = rng.choice((1, 1, 1, 2, (2, 1), 3))
    padding: Any = rng.choice((0, 1, 1, "same", (1, 0), 2))
    mode = rng.choice(("zeros",) * 5 + ("reflect", "replicate", "circular"))
    dilation = rng.choice((1, 1, 1, 2))
    return nn.Conv2d(c, out, k, 1 if padding == "same" else stride, padding, dilation, groups, rng.random() < 0.7, mode)


def transposed(rng: Random, c: int) -> nn.Module:
    stride, groups = rng.randint(1, 2), rng.choice([g for g in (1, 2) if c % g == 0])
    k, out = rng.randint(1, 3), groups * rng.randint(1, 3)
    return nn.ConvTranspose2d(c, out, k, stride, rng.randint(0, k // 2), rng.randint(0, stride - 1), groups)


def norm(rng: Random, c: int) -> nn.Module:
    groups = [g for g in (1, 2, 3) if c % g == 0]
    return rng.choice(
        (
            lambda: nn.BatchNorm2d(c),
            lambda: nn.BatchNorm2d(c, affine=False),
            lambda: nn.BatchNorm2d(c, track_running_stats=False),
            lambda: nn.SyncBatchNorm(c),
            lambda: nn.GroupNorm(rng.choice(groups), c),
            lambda: nn.InstanceNorm2d(c, affine=rng.random() < 0.5, track_running_stats=rng.random() < 0.5),
            lambda: Last(nn.LayerNorm(c)),
            lambda: Last(nn.RMSNorm(c)),
        )
    )()


def other_layer(rng: Random, c: int) -> nn.Module:
    return rng.choice(
        (
            lambda: Last(nn.Linear(c, rng.randint(2, 6))),
            lambda: nn.PReLU(c),
            lambda: nn.Dropout(0.2),
            lambda: nn.Dropout2d(0.2),
            lambda: nn.AlphaDropout(0.2),
            lambda: nn.Identity(),
            lambda: StochasticDepth(0.3, "row"),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.MaxPool2d(2, 2, ceil_mode=rng.random() < 0.5),
            lambda: nn.AvgPool2d(rng.randint(2, 3), 2, 1, rng.random() < 0.5, rng.random() < 0.5),
            lambda: nn.AdaptiveAvgPool2d(rng.randint(1, 4)),
            lambda: nn.Upsample(scale_factor=2, mode=rng.choice(("nearest", "bilinear"))),
            lambda: nn.ZeroPad2d((0, 1, 1, 0)),
            lambda: nn.ReflectionPad2d(1),
        )
    )()


def bottleneck(rng: Random, c: int) -> nn.Module:
    """Conv, norm, activation, conv: what residuals are made of."""
    width = rng.randint(2, 8)
    first = nn.Conv2d(c, width, 3, padding=1, bias=rng.random() < 0.5)
    middle = rng.choice((nn.BatchNorm2d(width), nn.GroupNorm(1, width), nn.Identity()))
    act = rng.choice((nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(width)))
    return Residual(
        nn.Sequential(first, middle, act, nn.Conv2d(width, c, rng.choice((1, 3)), padding="same")), rng.random() < 0.4
    )


def block(rng: Random, c: int) -> nn.Module:
    conv = convolution(rng, c)
    norms = [nn.BatchNorm2d(conv.out_channels)] * (rng.random() < 0.7)
    return nn.Sequential(
        conv, *norms, rng.choice((nn.ReLU(), nn.ReLU(inplace=True), nn.Hardswish(), nn.LeakyReLU(0.1)))
    )


def volume(rng: Random, c: int) -> nn.Module:
    return rng.choice(
        (
            lambda: nn.Conv3d(c, 3, (1, 3, 3), padding=(0, 1, 1)),
            lambda: nn.Sequential(nn.BatchNorm3d(c), nn.ReLU()),
            lambda: nn.MaxPool3d((1, 2, 2)),
            lambda: nn.AvgPool3d((1, 2, 2)),
            lambda: nn.ConvTranspose3d(c, 2, (1, 2, 2)),
            lambda: nn.InstanceNorm3d(c),
            lambda: nn.Dropout3d(0.2),
            lambda: nn.AdaptiveAvgPool3d((1, 3, 3)),
            lambda: Call("x.squeeze(2)"),
            lambda: Call("x.flatten(1, 2)"),
        )
    )()


def signal(rng: Random, c: int, n: int) -> nn.Module:
    return rng.choice(
        (
            lambda: nn.Conv1d(c, rng.randint(2, 5), 3, padding=1, stride=rng.randint(1, 2)),
            lambda: nn.Sequential(nn.Conv1d(c, 4, 1), nn.BatchNorm1d(4), nn.ReLU()),
            lambda: nn.ConvTranspose1d(c, 3, 2),
            lambda: nn.Linear(n, rng.randint(2, 6)),
            lambda: nn.LayerNorm(n),
            lambda: nn.RMSNorm(n),
            lambda: nn.InstanceNorm1d(c),
            lambda: Attention(n),
            lambda: nn.Dropout1d(0.2),
            lambda: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 6), nn.GELU(), nn.Linear(6, n)),
        )
    )()


def vector(rng: Random, c: int) -> nn.Module:
    return rng.choice(
        (
            lambda: nn.Linear(c, rng.randint(2, 8)),
            lambda: nn.Sequential(nn.Linear(c, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)),
            lambda: nn.LayerNorm(c),
            lambda: nn.Dropout(0.5),
            lambda: nn.BatchNorm1d(c),
        )
    )()


# ---------------------------------------------------------------- the draw


def draw_step(rng: Random, reads: Reads, model: Any, wild: bool) -> Made | None:
    """A layer and the values that it reads, or None where what was drawn does not go with the value.

    ``wild``: any operation; else mostly those of convolutional networks, which passes can take apart.
    """
    x = reads.x
    if not wild and x.dim() == 4 and rng.random() < 0.85:
        return _usual(rng, reads)
    if x.dim() == 4 and rng.random() < 0.1:
        return Call(rng.choice(RANKS)), (reads.i,)
    turn = rng.random()
    if turn < 0.22:
        return Call(rng.choice(TEXTS["pointwise"])), (reads.i,)
    if turn < 0.36:
        return _binary(rng, reads)
    c, n = x.shape[1], x.shape[-1]
    if x.dim() == 2:
        return (vector(rng, c) if rng.random() < 0.7 else Call(rng.choice(TEXTS["vector"]))), (reads.i,)
    if x.dim() == 3:
        return (signal(rng, c, n) if rng.random() < 0.6 else Call(rng.choice(TEXTS["signal"]))), (reads.i,)
    if x.dim() == 5:
        return volume(rng, c), (reads.i,)
    if x.dim() != 4:
        return Call("x.flatten(2)"), (reads.i,)
    if turn < 0.55:
        return Call(rng.choice(TEXTS["map"])), (reads.i,)
    if turn < 0.61:
        text = rng.choice(list(OWNED))
        return Call(text, **OWNED[text](c, n)), (reads.i,)
    if turn < 0.64:
        return _tied(rng, reads, model)
    makers = (convolution, convolution, block, block, norm, bottleneck, other_layer, transposed, gate)
    return rng.choice(makers)(rng, c), (reads.i,)


def _usual(rng: Random, reads: Reads) -> Made | None:
    c = reads.x.shape[1]
    if rng.random() < 0.25:
        return _binary(rng, reads)
    kind = rng.choice(("conv", "conv", "block", "block", "residual", "norm", "act", "pool", "gate", "drop"))
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: nn.Conv2d(c, rng.randint(4, 10), rng.choice((1, 3, 3)), padding="same"),
        "block": lambda: block(rng, c),
        "residual": lambda: bottleneck(rng, c),
        "norm": lambda: nn.BatchNorm2d(c),
        "act": lambda: rng.choice((nn.ReLU(inplace=True), nn.SiLU(), nn.PReLU(c), nn.Hardswish())),
        "pool": lambda: rng.choice((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1))),
        "gate": lambda: gate(rng, c),
        "drop": lambda: rng.choice((nn.Dropout(0.2), nn.Dropout2d(0.2), nn.Identity(), StochasticDepth(0.3, "row"))),
    }
    return layers[kind](), (reads.i,)


def _binary(rng: Random, reads: Reads) -> Made | None:
    same = reads.others(lambda v: v.shape == reads.x.shape)
    beside = reads.others(lambda v: v.shape[2:] == reads.x.shape[2:] and math.prod(v.shape) > 0)
    if rng.random() < 0.3 and beside:
        return Call(rng.choice(("torch.cat([x, y], 1)", "torch.cat([y, x], 1)"))), (reads.i, rng.choice(beside))
    if not same:
        return None
    return Call(rng.choice(TEXTS["binary"])), (reads.i, rng.choice(same))


def _tied(rng: Random, reads: Reads, model: Any) -> Made | None:
    convs = [m for m in model.modules() if type(m) is nn.Conv2d and m.weight.shape[1] * m.groups == reads.x.shape[1]]
    return (Tied(rng.choice(convs)), (reads.i,)) if convs else None
