"""What readers of docs/*.md bring along: a small network of their own in a file, with its weights, images and data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from splitfx.train.data import divided

SOURCE = """
from collections import OrderedDict
from torch import nn

def layer(channels, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

class Net(nn.Sequential):
    def __init__(self, channels=3):
        super().__init__(OrderedDict(
            stem=layer(channels, 16), layer1=layer(16, 16, 2), layer2=layer(16, 32), layer3=layer(32, 32, 2),
            layer4=layer(32, 32), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(32, 10)))

def Gray():
    return Net(1)
"""


def network(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    made: dict = {}
    exec(SOURCE, made)
    return made["Net"](channels).eval()


def file(name: str = "mynet.py") -> None:
    """``name`` in the working folder with the classes ``Net`` and ``Gray``, and weights of the second beside it."""
    Path(name).write_text(SOURCE)
    torch.save(network(1).state_dict(), Path(name).with_suffix(".pt"))


def images(count: int = 64, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def data() -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """To train on, to measure on, and the names of the classes."""
    made = divided("noise", images(80), torch.arange(80) % 10, tuple(f"class {i}" for i in range(10)))
    return made.train, made.val, made.classes
