"""What the GPU checks share: where and how big, the models, and the rows that they yield."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

PARITY = 2e-5  # largest difference from float64, relative to the largest output: float32 without TF32
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how big; a dry run is small and on the CPU."""

    device: str
    pixels: int
    batches: tuple[int, ...]
    runs: int
    models: tuple[str, ...]
    tiled: int = 2048  # pixels of the images that are tiled
    tiled_models: tuple[str, ...] = ("resnet18", "resnet50", "mobilenet_v2", "vgg16", "efficientnet_b0")

    def image(self, batch: int = 1, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, 3, self.pixels, self.pixels, generator=generator).to(self.device, **options)


GPU = Setting("cuda", 224, (1, 16), 30, ("resnet18", "vgg16", "densenet121", "mobilenet_v2", "convnext_tiny", "swin_t"))
DRY = Setting("cpu", 64, (1,), 2, ("resnet18", "mobilenet_v2"), 128, ("resnet18",))


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval()


def row(check: str, model: str, what: str, figure: str, against: str, ok: bool | None, **values: Any) -> Row:
    return {
        "check": check,
        "model": model,
        "what": what,
        "figure": figure,
        "against": against,
        "ok": ok,
        **values,
    }
