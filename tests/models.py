"""Odd tiny models: each is odd in one way that a compiler of other people's models must survive.

`ZOO` holds all that trace, by name: a function that makes the model and its example inputs (batch 2,
float32), the same every time. Sizes are small and channel counts differ, so that a swapped axis or channel
shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, Any]
ZOO: dict[str, Callable[[], Case]] = {}


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 16, 16)), generator=torch.Generator().manual_seed(7))


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a maker; random weights are seeded, and running statistics are not left at zero and one."""

    def seeded() -> Case:
        torch.manual_seed(0)
        model, inputs = make()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return model, inputs

    ZOO[make.__name__] = seeded
    return seeded


def conv_bn(i: int, o: int, k: int = 3, **options: Any) -> nn.Sequential:
    padding = options.pop("padding", k // 2)
    conv = nn.Conv2d(i, o, k, padding=padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Head(nn.Module):
    """A body with a pooled linear classifier."""

    def __init__(self, body: nn.Module, width: int, classes: int = 5) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.body(x), 1), 1))


@case
def plain() -> Case:
    body = nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(2), conv_bn(8, 12), nn.Dropout(0.3))
    return Head(body, 12), image()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.shift = nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(6, 4, 1)
        self.register_buffer("mean", torch.rand(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.kernel, self.shift, stride=2, padding=1)
        x = F.batch_norm(x, self.mean, self.var, training=self.training)  # type: ignore[arg-type]
        x = F.dropout(F.leaky_relu(x, 0.1), 0.25, self.training)
        return F.conv2d(x, self.conv.weight, self.conv.bias)


@case
def functional() -> Case:
    """Convolutions and norms called as functions on parameters with names of their own."""
    return Functional(), image()


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)


@case
def computed_weights() -> Case:
    return nn.Sequential(Standardised(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)), image()


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(x)
        z = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.out(torch.cat([z, self.up(y)], 1))


@case
def interpolate() -> Case:
    return Upsampler(), image()


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 1, groups=2), conv_bn(4, 4, groups=4)
        self.first = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x).chunk(2, dim=1)
        x = torch.cat([self.left(a), self.right(b)], dim=1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@case
def channel_shuffle() -> Case:
    return Shuffle(), image()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 4, 1)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, scale: float = 2.0) -> tuple[torch.Tensor, ...]:
        y = self.a(x) * scale
        return y + self.b(mask), y.mean((2, 3))


@case
def keyword_inputs() -> Case:
    """A positional and a keyword input, a default that is not given, two outputs."""
    return TwoInputs(), ((image(),), {"mask": image(2, 2, 16, 16)})


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        y = self.conv(batch["image"])
        return {"features": [y, y.relu()], "sum": y.sum(1) + batch["bias"][:, None, None], "version": 3}


@case
def dicts() -> Case:
    """A dict in, a nested dict with a number out."""
    return DictOutput(), ({"image": image(), "bias": image(2)},)


@dataclass
class Detection:
    boxes: torch.Tensor
    scores: torch.Tensor


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> Detection:
        return Detection(self.boxes(x), self.scores(x).sigmoid())


@case
def dataclass_output() -> Case:
    return DataclassOutput(), image()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.block = conv_bn(6, 6)
        self.again = self.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.block(self.block(self.first(x))))


@case
def shared_module() -> Case:
    """One block called three times, under two names."""
    return Shared(), image()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(4, 6)
        self.same = nn.Linear(6, 4)
        self.decode.weight = nn.Parameter(torch.randn(6, 4))
        self.same.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x)) + F.linear(self.same(x), self.encode.weight.t())


@case
def tied_weights() -> Case:
    """Two layers with one weight, which is also read transposed."""
    return Tied(), image(2, 6)


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *conv_bn(i, o, stride=stride), nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)
        )
        self.short = nn.Identity() if stride == 1 and i == o else nn.Conv2d(i, o, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x)
        y += self.short(x)
        return F.relu(y, inplace=True)


@case
def residual() -> Case:
    return Head(nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 12, 2), Residual(12, 12)), 12), image()


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_bn(3 + 5 * i, 5) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


@case
def concats() -> Case:
    return Head(Dense(), 18), image()


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


@case
def squeeze_excite() -> Case:
    return Head(nn.Sequential(conv_bn(3, 8), SqueezeExcite(8), conv_bn(8, 12, stride=2)), 12), image()


@case
def depthwise() -> Case:
    return Head(nn.Sequential(conv_bn(3, 8), conv_bn(8, 8, 5, groups=8, stride=2), conv_bn(8, 12, 1)), 12), image()


@case
def grouped() -> Case:
    return Head(nn.Sequential(conv_bn(3, 12), conv_bn(12, 18, groups=3), conv_bn(18, 6, groups=2)), 6), image()


@case
def dilation_and_ceil() -> Case:
    """Dilated convolution, string padding, ceil_mode and overlapping pools, odd sizes and channel counts."""
    layers = [
        nn.Conv2d(3, 7, 3, padding="same", dilation=2),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Conv2d(7, 5, (3, 1), stride=(1, 2), padding=(0, 1), padding_mode="reflect"),
        nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False),
    ]
    return nn.Sequential(*layers), image(2, 3, 19, 23)


class ReadAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.Hardtanh(-2, 2, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        z = self.act(y)
        y.add_(0.5)
        return y + z.clamp(max=1) + torch.sigmoid(y)


@case
def in_place_read_again() -> Case:
    """The operand of in-place operations is read under its old name afterwards."""
    return ReadAgain(), image()


class ViewWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        flat = y.flatten(1)
        y[:, 0] = 0
        y[:, 1:3] *= 2
        flat.clamp_(max=1.5)
        return self.bn(y) + flat.mean()


@case
def in_place_views() -> Case:
    """Writes into slices and through a flattened view of a tensor that is read later."""
    return ViewWrites(), image()


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.aux, self.fc = conv_bn(3, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x).mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.blocks = nn.ModuleList(conv_bn(6, 6) for _ in range(3))
        self.drops = nn.ModuleList(DropPath(0.3 * i) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x = x + drop(block(x))
        return x


@case
def stochastic_depth() -> Case:
    return Stochastic(), image()


@case
def frozen_norm() -> Case:
    """A batch norm in eval mode inside a model in train mode."""
    model = nn.Sequential(conv_bn(3, 6), conv_bn(6, 4)).train()
    model[0][1].eval()  # type: ignore[index]
    return model, image()


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)
        self.constant, self.factor = torch.rand(4, 1, 1), 1.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) * self.scale + self.shift
        return y * self.factor - torch.tensor([0.5]) * self.constant


@case
def buffers() -> Case:
    """Buffers, a non-persistent one, a tensor that is no buffer, a tensor made in forward, a plain number."""
    return Buffers(), image()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_bn(3, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


@case
def no_grad_backbone() -> Case:
    return Backbone(), image()


@case
def norms() -> Case:
    """Every norm that keeps statistics or scales of its own."""
    layers = [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.PReLU(6)]
    layers += [nn.GroupNorm(2, 6), nn.BatchNorm2d(6, momentum=None), nn.RReLU(), nn.InstanceNorm2d(6)]
    return nn.Sequential(*layers, nn.BatchNorm2d(6, affine=False), nn.LayerNorm([14, 14])), image()


@case
def attention() -> Case:
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(12, 5)), image(2, 7, 12)


def auxiliary_head() -> Case:
    """A head that runs in train mode only (not in `ZOO`: the graph keeps the eval-mode signature)."""
    torch.manual_seed(0)
    return Auxiliary(), image()
