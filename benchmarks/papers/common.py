"""What the papers' tables share: 32x32 Fashion-MNIST, how networks are trained, and what is kept for the next table."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset

import splitfx
from benchmarks import fashion
from benchmarks.networks import ResNet18, vgg16
from splitfx import Recipe
from splitfx.train.data import Data, Images, load_data
from splitfx.train.finetune import evaluate

SHAPE = (3, 32, 32)
CALIBRATION = 256
Row = dict[str, Any]
Rows = dict[str, Row]
Job = Callable[[Rows], Row]


@functools.cache
def data(images: int, val: int) -> Data:
    """The first images of both sets."""
    whole: Any = load_data(fashion.word(), SHAPE)
    train = whole.train
    first = Images(train.images[:images], train.targets[:images], whole.classes, train.change)
    return Data(whole.word, first, Subset(whole.val, range(min(val, len(whole.val)))), whole.classes)


@functools.cache
def calibration(count: int = CALIBRATION) -> torch.Tensor:
    """Images [N, 3, 32, 32] without labels, the last of the training set."""
    whole: Any = load_data(fashion.word(), SHAPE, augment=False).train
    return torch.stack([whole[len(whole) - 1 - i][0] for i in range(count)])


def example() -> torch.Tensor:
    return torch.zeros(1, *SHAPE)


def fit(model: nn.Module, size: Row, epochs: int, lr: float = 0.05, images: int = 0, **options: Any) -> None:
    """SGD with a cosine, as `finetune` has it; weight decay 5e-4."""
    sets: Any = data(images or size["images"], size["val"])
    recipe = Recipe(
        epochs=epochs,
        batch_size=size["batch"],
        lr=lr,
        nesterov=True,
        weight_decay=5e-4,
        warmup_epochs=int(epochs > 1),
        keep="last",
    )
    few = Subset(sets.val, range(min(16, len(sets.val))))  # nothing is chosen by it
    splitfx.finetune(model, sets.train, few, recipe, progress=False, **options)


def accuracy(model: nn.Module, size: Row) -> float:
    return evaluate(model, data(size["images"], size["val"]).val, progress=False).accuracy


def trained(name: str, make: Callable[[], nn.Module], size: Row) -> nn.Module:
    """A network trained on the first images, kept in the folder for temporary files."""
    words = "_".join(str(size[key]) for key in ("images", "batch", "epochs", "part"))
    kept = Path(tempfile.gettempdir()) / "splitfx_benchmarks" / f"papers_{name}_{words}.safetensors"
    torch.manual_seed(0)
    model = make().eval()
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model
    fit(model, size, size["epochs"])
    kept.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, kept)
    return model


def vgg(size: Row) -> nn.Module:
    return trained("vgg16", lambda: vgg16(size["part"]), size)


def resnet(size: Row) -> nn.Module:
    return trained("resnet18", lambda: ResNet18(64 // size["part"], 10, small=True), size)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
