"""What the benchmarks on Fashion-MNIST share: the data, a small VGG that `finetune` trained, kept in the folder for
temporary files, and images without labels to calibrate on."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splitfx
from splitfx import Recipe
from splitfx.ground.table import table
from splitfx.train.data import FASHION, FASHION_MEAN, FASHION_STD, Data, Images, load_data

FETCHED = "build/usr/share/datasets/fashion-mnist"
WIDTHS = (32, 64, 128)
SEEDS = tuple((f"seed {seed}", seed) for seed in range(5))  # of the network's training and of the images drawn
TRAINED, CALIBRATION = 40_000, 1_024  # images that networks are trained on, and those behind them that calibrate


def word() -> str:
    """The data set: the user's folder, Debian's package, or what ``benchmarks/fashion_mnist.sh`` fetched."""
    folder = os.environ.get("SPLITFX_FASHION_MNIST") or ("" if FASHION.is_dir() else FETCHED)
    return f"fashion-mnist:{folder}" if folder else "fashion-mnist"


def data(images: int = TRAINED) -> Data:
    """The first so many images to train on; the 10,000 of the test set to validate."""
    whole = load_data(word())
    train: Any = whole.train
    first = Images(train.images[:images], train.targets[:images], whole.classes, train.change)
    return Data(whole.word, first, whole.val, whole.classes)


def calibration(count: int = CALIBRATION, seed: int = 0) -> torch.Tensor:
    """Images [N, 1, 28, 28] that no network was trained on."""
    train: Any = load_data(word(), augment=False).train
    rest = torch.randperm(len(train) - TRAINED, generator=torch.Generator().manual_seed(seed))[:count] + TRAINED
    return (train.images[rest].float() / 255 - FASHION_MEAN[0]) / FASHION_STD[0]


def network(seed: int, widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def trained(sets: Data, seed: int, epochs: int = 4) -> nn.Module:
    """The network after `finetune`, about twelve minutes on one core; kept for the next benchmark."""
    kept = Path(tempfile.gettempdir()) / "splitfx_benchmarks" / f"fashion_{seed}_{epochs}.safetensors"
    model = network(seed)
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model.eval()
    recipe = Recipe(epochs=epochs, batch_size=128, lr=0.1, nesterov=True, warmup_epochs=1, keep="last", seed=seed)
    splitfx.finetune(model.eval(), sets.train, sets.val, recipe, progress=False)
    kept.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, kept)
    return model


def points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def by_factors(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Over the seeds: accuracies, and how many points they are below the unsplit network of their seed."""
    lines = []
    for factors in dict.fromkeys(tuple(row["factors"]) for row in rows):
        own = [row for row in rows if tuple(row["factors"]) == factors]
        cells = [spread([row[c] for row in own]) for c in ("unsplit", *columns)]
        below = [spread([row["unsplit"] - row[c] for row in own]) for c in columns]
        lines += [[", ".join(map(str, factors)), f"{len(own)} seeds", *cells], ["", "below", None, *below]]
    return table(["factors", "", "unsplit", *columns], lines, left=(0, 1))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f}"
