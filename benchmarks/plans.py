"""What `splitfx.plan` finds for half the peak, how long it looks, and whether the plan holds when it is run.

The best plan is run anew on the model: its peak and its time against what the table said, and its time against the
model's, measured in turn: the table says within which spread that is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx.ground.table import size
from splitfx.ground.turns import Ratio, ratios

NAME = "plans"
COLUMNS = (
    ("model", "model", str),
    ("plan", "plan", str),
    ("looked", "looked for", lambda v: f"{v:.0f} s"),
    ("before", "peak before", size),
    ("peak", "after", size),
    ("peak_error", "run again", lambda v: "-" if v is None else f"{v:.3f}"),
    ("time", "time", lambda v: "-" if v is None else str(Ratio(*v))),
    ("time_again", "run again", lambda v: "-" if v is None else str(Ratio(*v))),
    ("time_error", "off by", lambda v: "-" if v is None else f"{v:+.1%}"),
)
LEFT = (0, 1)


def convs(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.SiLU())


class Decoder(nn.Module):
    """The decoder of a VAE: a map of 4 channels, three times doubled to an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = convs(4, 2 * width), nn.Conv2d(width // 2, 3, 3, padding=1)
        self.ups = nn.ModuleList([convs(2 * width, 2 * width), convs(2 * width, width), convs(width, width // 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for up in self.ups:
            x = up(F.interpolate(x, scale_factor=2.0))
        return self.last(x)


class UNet(nn.Module):
    """Two levels down and up, with skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down1, self.down2, self.deep = convs(3, width), convs(width, 2 * width), convs(2 * width, 4 * width)
        self.merge2, self.merge1 = convs(6 * width, 2 * width), convs(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = F.interpolate(self.deep(F.max_pool2d(b, 2)), scale_factor=2.0)
        y = F.interpolate(self.merge2(torch.cat([y, b], 1)), scale_factor=2.0)
        return self.head(self.merge1(torch.cat([y, a], 1)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "U-Net": (lambda: UNet(16), (1, 3, 512, 512)),
    "VAE decoder": (lambda: Decoder(64), (1, 4, 48, 48)),
    "MobileNet-v2": (torchvision.models.mobilenet_v2, (1, 3, 224, 224)),
    "ResNet-50": (torchvision.models.resnet50, (1, 3, 224, 224)),
}


def run(quick: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    chosen = list(MODELS.items())[: 1 if quick else None]
    return [row(name, make().eval(), (1, 3, 96, 96) if quick else shape) for name, (make, shape) in chosen]


def row(name: str, model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    started = time.perf_counter()
    found = splitfx.plan(model, shape, peak="0.5x")
    looked = time.perf_counter() - started
    before = found.now.figures.peak_bytes
    try:
        best = found.best
    except splitfx.PlanError as why:
        return {"model": name, "plan": f"none: {why}", "looked": looked, "before": before, "peak": None, "time": None}
    split = splitfx.transform(model, found.plan, shape)
    x = torch.randn(shape)
    again = splitfx.measure(split, x, runs=1).peak_bytes
    time_again = ratios(lambda: model(x), {"split": lambda: split(x)})["split"]
    assert best.time is not None
    return {
        "model": name, "plan": best.name, "looked": looked, "before": before, "peak": best.figures.peak_bytes,
        "peak_error": again / best.figures.peak_bytes, "time": (best.time, best.spread),
        "time_again": (time_again.middle, time_again.spread), "time_error": time_again.middle / best.time - 1,
        "table": str(found),
    }  # fmt: skip
