"""Small modules, each with one spatial rule (or one way to combine them) between two convolutions.

`RULES` are wholly inside the stage, with one phase, so grids work too; `PHASES` hold a reduction; `SPLIT` are cut by
something that reads whole maps. Sizes, widths and paddings are odd, and H is never W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Make = Callable[[], nn.Module]
C = 6


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.parts)


def call(function: Callable[..., Any], *modules: Callable[[], nn.Module]) -> Make:
    return lambda: Call(function, *(m() for m in modules))


def conv(**options: Any) -> Make:
    options = {"kernel_size": 3, "out_channels": 5, **options}
    return lambda: nn.Conv2d(C, **options)


def up(**options: Any) -> Make:
    return lambda: nn.ConvTranspose2d(C, 4, **options)


def resize(**options: Any) -> Make:
    return call(lambda x: F.interpolate(x, **options))


def pad(*sizes: int, **options: Any) -> Make:
    return call(lambda x: F.pad(x, sizes, **options))


RULES: dict[str, Make] = {
    # convolutions
    "conv 1x1": conv(kernel_size=1),
    "conv 3x3": conv(padding=1),
    "conv 3x3 without padding": conv(),
    "conv stride 2": conv(stride=2, padding=1),
    "conv 1x1 stride 2": conv(kernel_size=1, stride=2),
    "conv stride 4, kernel 2": conv(kernel_size=2, stride=4),
    "conv 7x7 stride 2": conv(kernel_size=7, stride=2, padding=3),
    "conv 4x4": conv(kernel_size=4, stride=2, padding=1),
    "conv of one axis": conv(kernel_size=(5, 1), padding=(2, 0)),
    "conv of the other": conv(kernel_size=(1, 7), padding=(0, 3), stride=(1, 2)),
    "conv asymmetric": conv(kernel_size=(3, 2), padding=(2, 1), dilation=(2, 3), stride=(1, 2)),
    "conv dilated": conv(padding=4, dilation=4),
    "conv dilated, strided": conv(padding=2, dilation=3, stride=3),
    "conv same": conv(kernel_size=4, padding="same"),
    "conv same, dilated": conv(kernel_size=(2, 4), padding="same", dilation=(3, 1)),
    "conv valid": conv(padding="valid"),
    "conv all padding": conv(kernel_size=2, padding=3),
    "conv all padding, strided": conv(kernel_size=2, padding=4, stride=3),
    "conv larger than the map": conv(kernel_size=21, padding=10),
    "conv reflect": conv(padding=2, kernel_size=5, padding_mode="reflect"),
    "conv replicate": conv(padding=(1, 3), padding_mode="replicate", stride=2),
    "conv reflect same": conv(padding="same", kernel_size=4, padding_mode="reflect"),
    "conv grouped": conv(groups=2, padding=1, out_channels=4),
    "conv depthwise": conv(groups=C, padding=1, out_channels=2 * C, bias=False),
    # transposed convolutions
    "transposed": up(kernel_size=2, stride=2),
    "transposed 3x3": up(kernel_size=3, stride=2, padding=1, output_padding=1),
    "transposed 4x4": up(kernel_size=4, stride=2, padding=1),
    "transposed stride 1": up(kernel_size=3, padding=1),
    "transposed dilated": up(kernel_size=2, stride=3, dilation=2),
    "transposed with gaps": up(kernel_size=2, stride=3, output_padding=2),
    "transposed grouped": up(kernel_size=3, stride=2, padding=2, groups=2, bias=False),
    "transposed asymmetric": up(kernel_size=(3, 2), stride=(1, 3), padding=(1, 0), output_padding=(0, 1)),
    # pools
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool 3x3": lambda: nn.MaxPool2d(3, 2, 1),
    "max pool ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
    "max pool ceil padded": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max pool ceil stride 3": lambda: nn.MaxPool2d(2, 3, ceil_mode=True),
    "max pool dilated": lambda: nn.MaxPool2d(2, 1, 1, dilation=3),
    "max pool asymmetric": lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0)),
    "max pool of one axis": lambda: nn.MaxPool2d((1, 3), 1, (0, 1)),
    "max pool 1x1": lambda: nn.MaxPool2d(1, 2),
    "max pool with stride 5": lambda: nn.MaxPool2d(2, 5),
    "avg pool": lambda: nn.AvgPool2d(2),
    "avg pool 3x3": lambda: nn.AvgPool2d(3, 1, 1),
    "avg pool without padding": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg pool ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
    "avg pool ceil padded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg pool ceil, no padding": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg pool ceil stride 3": lambda: nn.AvgPool2d(2, 3, ceil_mode=True),
    "avg pool divisor": lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "avg pool divisor ceil": lambda: nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=2),
    "avg pool asymmetric": lambda: nn.AvgPool2d((3, 2), (2, 1), (1, 0)),
    "avg pool of one axis": lambda: nn.AvgPool2d((1, 3), 1, (0, 1), count_include_pad=False),
    "adaptive avg pool": lambda: nn.AdaptiveAvgPool2d((4, 3)),
    "adaptive avg pool, uneven": lambda: nn.AdaptiveAvgPool2d((7, 6)),
    "adaptive avg pool, larger": lambda: nn.AdaptiveAvgPool2d((21, 30)),
    "adaptive avg pool, same height": lambda: nn.AdaptiveAvgPool2d((None, 4)),
    # resizes
    **{
        f"{mode} {what}": resize(mode=mode, **options)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic")
        for what, options in {
            "x2": {"scale_factor": 2},
            "x1.7": {"scale_factor": (1.7, 2.3)},
            "x1.7, recomputed": {"scale_factor": (1.7, 2.3), "recompute_scale_factor": True},
            "x0.4": {"scale_factor": 0.4},
            "up": {"size": (29, 23)},
            "down": {"size": (6, 9)},
            "one axis": {"size": (19, 31)},
            "one row": {"size": (1, 5)},
        }.items()
    },
    **{
        f"{mode} corners {what}": resize(mode=mode, align_corners=True, **options)
        for mode in ("bilinear", "bicubic")
        for what, options in {
            "x2": {"scale_factor": 2},
            "x1.7": {"scale_factor": 1.7},
            "up": {"size": (29, 23)},
            "down": {"size": (6, 9)},
            "one row": {"size": (1, 5)},
        }.items()
    },
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(C, 9, 1), nn.PixelShuffle(3)),
    "pixel unshuffle": call(lambda x: F.pixel_unshuffle(F.pad(x, (1, 0, 2, 0)), 3)),
    "rms norm of channels": call(
        lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda: nn.RMSNorm(C)
    ),
    # pads
    "pad": pad(1, 2, 3, 4),
    "pad columns": pad(2, 1),
    "pad with a value": pad(1, 0, 2, 0, value=1.5),
    "crop": pad(-1, -2, -3, 0),
    "crop and pad": pad(-1, 2, 3, -2),
    "pad channels": pad(1, 1, 1, 1, 2, 1),
    "pad channels alone": pad(0, 0, 0, 0, 2, 3, value=0.5),
    "pad channels last": call(lambda x: F.pad(x.permute(0, 2, 3, 1), (1, 0, 1, 2, 3, 4)).permute(0, 3, 1, 2)),
    "crop channels last": call(lambda x: F.pad(x.permute(0, 2, 3, 1), (0, 0, -1, 2, -3, 1)).permute(0, 3, 1, 2)),
    "pad far, channels last": call(lambda x: F.pad(x.permute(0, 2, 3, 1), (0, 0, 9, 9, 12, 12)).permute(0, 3, 1, 2)),
    "pad reflect": pad(3, 2, 4, 1, mode="reflect"),
    "pad replicate": pad(1, 4, 0, 3, mode="replicate"),
    "pad modules": lambda: nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 0)), nn.ZeroPad2d(2), nn.ReplicationPad2d(1)),
    "pad all": lambda: nn.Sequential(nn.ConstantPad2d(25, 0.5), nn.Conv2d(C, 4, 3, 2)),
    # point by point
    "relu": lambda: nn.ReLU(),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "prelu": lambda: nn.PReLU(C),
    "prelu, one": lambda: nn.PReLU(),
    "batch norm": lambda: nn.BatchNorm2d(C),
    "dropout": lambda: nn.Dropout2d(0.5),
    "rrelu": lambda: nn.RReLU(),
    "softmax over channels": lambda: nn.Softmax2d(),
    "numbers": call(lambda x: (x * 2 + 1).clamp(-1, 3) / 3 - x.pow(2)),
    "rsub, swapped": call(lambda x: 1 - x + (2 / (x.abs() + 1))),
    "three operands, two maps": call(lambda x: torch.addcdiv(x, x, x.square() + 1)),
    "two maps and a number": call(lambda x, c: torch.lerp(c(x), x, 0.3), lambda: nn.Conv2d(C, C, 3, padding=1)),
    "where": call(lambda x: torch.where(x > 0, x, x.exp())),
    "in place": call(lambda x: x.relu().add_(1).mul_(x).sigmoid_()),
    "in place, both": call(lambda x, a, b: a(x).add_(b(x)), conv(padding=1), conv(kernel_size=1)),
    # layer norm over channels, and other movements of channels
    "layer norm": call(lambda x, m: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), lambda: nn.LayerNorm(C)),
    "linear": call(lambda x, m: m(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2), lambda: nn.Linear(C, 7)),
    "transposes": call(lambda x: x.transpose(1, 3).exp().transpose(-1, 1)),
    "channels last": call(lambda x: x.permute(0, 2, 3, 1).contiguous().softmax(-1).permute(0, 3, 1, 2)),
    "H behind W": call(lambda x: (x.transpose(2, 3) * 2).transpose(2, 3).relu()),
    "shuffle": call(
        lambda x: x.view(x.shape[0], 3, C // 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape[0], C, *x.shape[2:])
    ),
    "channel shuffle": lambda: nn.ChannelShuffle(3),
    "chunk": call(lambda x: torch.cat(x.chunk(4, 1)[::-1], 1)),
    "split": call(lambda x: [p.relu() for p in x.split((1, 3, 2), 1)][1] * 2),
    "tensor split": call(lambda x: torch.cat([p * i for i, p in enumerate(x.tensor_split(4, -3))], 1)),
    "unused parts": call(lambda x: x.chunk(3, 1)[2]),
    "slice": call(lambda x: x[:, 1:4] + x[:, 3:]),
    "slice, step": call(lambda x: x[:, ::2]),
    "narrow": call(lambda x: x.narrow(1, 2, 3)),
    "glu": call(lambda x: F.glu(x, 1)),
    # several operands and users
    "residual": call(lambda x, m: (m(x) + x).relu_(), lambda: nn.Conv2d(C, C, 3, padding=1)),
    "residual, strided": call(
        lambda x, m, s: m(x).add_(s(x)), conv(stride=2, padding=1), conv(kernel_size=1, stride=2)
    ),
    "concat": call(lambda x, m: torch.cat([x, m(x), x.relu()], 1), conv(padding=1)),
    "concat of one value twice": call(lambda x: torch.cat([x, x], -3)),
    "many users": call(
        lambda x, a, b, c: a(x)[:, :2] + b(x)[:, 1:3] * c(x)[:, 2:4],
        conv(padding=1),
        conv(kernel_size=5, padding=2),
        conv(padding=4, dilation=4),
    ),
    "shared twice": call(lambda x, m: m(m(x).relu()), lambda: nn.Conv2d(C, C, 3, padding=1)),
    "shared pool": call(lambda x, m: m(x) + m(x.relu()), lambda: nn.MaxPool2d(3, 2, 1)),
    "branches of many sizes": call(
        lambda x, a, p: torch.cat([a(x), p(x), F.avg_pool2d(x, 3, 2, 1)], 1),
        conv(stride=2, padding=1),
        lambda: nn.MaxPool2d(3, 2, 1),
    ),
    "up and down": call(
        lambda x, d, u: u(d(x))[:, :, :, :] + F.interpolate(d(x)[:, :4], size=(20, 18), mode="bilinear"),
        conv(stride=2, padding=1),
        lambda: nn.ConvTranspose2d(5, 4, 2, 2),
    ),
}


class Gate(nn.Module):
    """Squeeze and excitation; ``swap``: the gate is the first factor."""

    def __init__(self, width: int = C, swap: bool = False, keep: bool = True) -> None:
        super().__init__()
        self.down, self.up, self.swap, self.keep = nn.Linear(width, 3), nn.Linear(3, width), swap, keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return gate * x if self.swap else x * gate


class Aspp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(C, 3, 1), nn.Conv2d(C, 4, 3, padding=4, dilation=4), nn.Conv2d(C, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.interpolate(self.c(F.adaptive_avg_pool2d(x, 1)).relu(), size=x.shape[-2:], mode="bilinear")
        return torch.cat([self.a(x), self.b(x), pooled], 1)


PHASES: dict[str, Make] = {
    "mean": call(lambda x: x.mean((2, 3))),
    "mean, kept": call(lambda x: x.mean((-1, -2), keepdim=True)),
    "sum": call(lambda x: x.sum((2, 3)) + 1),
    "amax": call(lambda x: x.amax((2, 3), keepdim=True)),
    "global avg pool": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 3)),
    "global max pool": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    "mean channels last": call(lambda x: x.permute(0, 2, 3, 1).mean((1, 2))),
    "gate": lambda: Gate(),
    "gate swapped": lambda: Gate(swap=True),
    "gate by pool": call(
        lambda x, m: x * m(F.adaptive_avg_pool2d(x, 1)).sigmoid(), lambda: nn.Conv2d(C, C, 1, groups=2)
    ),
    "two gates": lambda: nn.Sequential(
        Gate(), nn.Conv2d(C, 4, 3, 2, 1), nn.ReLU(), Gate(4, swap=True), nn.MaxPool2d(2)
    ),
    "gate of mean and max": call(
        lambda x, m: x * (m(F.adaptive_avg_pool2d(x, 1)) + m(F.adaptive_max_pool2d(x, 1))).sigmoid(),
        lambda: nn.Conv2d(C, C, 1),
    ),
    "gate behind a residual": call(
        lambda x, m, g: (g(m(x)) + x).relu(), lambda: nn.Conv2d(C, C, 3, padding=1), lambda: Gate()
    ),
    "group norm": lambda: nn.GroupNorm(3, C),
    "group norm, plain": lambda: nn.GroupNorm(2, C, affine=False),
    "group norm of all": lambda: nn.GroupNorm(1, C),
    "instance norm": lambda: nn.InstanceNorm2d(C),
    "instance norm, affine": lambda: nn.InstanceNorm2d(C, affine=True),
    "functional norm": call(lambda x: F.group_norm(x, 2) + F.instance_norm(x)),
    "norms": lambda: nn.Sequential(
        nn.GroupNorm(2, C), nn.ReLU(), nn.Conv2d(C, 4, 3, 2), nn.InstanceNorm2d(4), nn.ReLU()
    ),
    "aspp": lambda: Aspp(),
    "a value read in two phases": call(lambda x: torch.cat([x.relu(), x - x.mean((2, 3), keepdim=True)], 1)),
    "spread": call(lambda x: (x - x.mean((2, 3), keepdim=True)).square().mean((2, 3))),
    "mean of a gate": call(lambda x, g: g(x).mean((2, 3)), lambda: Gate()),
}

SPLIT: dict[str, Make] = {
    "circular": conv(padding=1, padding_mode="circular"),
    "circular pad": pad(1, 1, 1, 1, mode="circular"),
    "instance norm with running statistics": lambda: nn.InstanceNorm2d(C, track_running_stats=True),
    "batch norm without statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "batch norm, training": call(lambda x: F.batch_norm(x, None, None, training=True)),
    "normalize": call(lambda x: F.normalize(x, dim=1)),
    "norm over channels": call(lambda x: x / (x.norm(dim=1, keepdim=True) + x.std(1, keepdim=True))),
    "groups as images": call(lambda x: x.view(x.shape[0] * 2, C // 2, *x.shape[2:]).relu().view(x.shape)),
    "types": call(lambda x: (x > 0).to(x.dtype) * x.to(torch.float32).to(x.dtype) + (x * 3).to(torch.int64)),
    "area": call(lambda x: F.interpolate(x, size=(5, 7), mode="area")),
    "antialias": call(lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", antialias=True)),
    "response norm": lambda: nn.LocalResponseNorm(3),
    "power pool": lambda: nn.LPPool2d(2, 3, stride=2),
    "sum of all": call(lambda x: x / (x.sum() + 100)),
    "in place, swapped": call(
        lambda x, m: x.div_(m(x).exp()).mul_(m(x)).sub_(x.exp(), alpha=2), conv(out_channels=C, padding=1)
    ),
    "mean over H": call(lambda x: x - x.mean(2, keepdim=True)),
    "mean over W": call(lambda x: x - x.mean(3, keepdim=True)),
    "softmax over W": call(lambda x: x.softmax(3)),
    "layer norm over the map": lambda: nn.LayerNorm([19, 17]),
    "flip": call(lambda x: x.flip(2)),
    "roll": call(lambda x: x.roll(1, 3)),
    "cumsum": call(lambda x: x.cumsum(2)),
    "concat of rows": call(lambda x: torch.cat([x, x], 2)),
    "concat of images": call(lambda x: torch.cat([x, x], 0)),
    "max over channels": call(lambda x: x * x.amax(1, keepdim=True)),
    "variance": call(lambda x: x / x.var((2, 3), keepdim=True)),
    "batch statistics": call(lambda x: x - x.mean((0, 2, 3), keepdim=True)),
    "rows sliced": call(lambda x: x[:, :, 1:] - x[:, :, :-1]),
    "transposed map": call(lambda x: x.transpose(2, 3)),
    "matmul": call(lambda x: x @ x.transpose(2, 3)),
    "position": call(lambda x: x + torch.arange(x.shape[3], dtype=x.dtype)),
    "sizes": call(lambda x: x * x.shape[2] / x.shape[3]),
    "pool with indices": call(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool2d(3),
    "group norm channels last": call(lambda x: F.group_norm(x.permute(0, 2, 3, 1), 19).permute(0, 3, 1, 2)),
    "linear over W": lambda: nn.Linear(17, 5),
    "unfold": call(lambda x: F.unfold(x, 3).mean(2)),
    "reflect channels": call(lambda x: F.pad(x.permute(0, 2, 3, 1), (1, 1, 1, 1), mode="reflect").permute(0, 3, 1, 2)),
}
