"""What a split network's start and teacher are worth: accuracy after 0, 1 and 3 epochs, with and without either.

A small VGG is trained on scikit-learn's digits, split with ``FACTORS`` and fine-tuned: the fusion convs either as a
plain selection or solved by least squares on a batch of training images (``calibration``), the unsplit network as
teacher or not. Five seeds, each with a network, a shuffle and a batch of its own; mean and standard deviation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import splitfx
from splitfx import Recipe
from splitfx.passes import Group
from splitfx.train.data import load_data
from splitfx.train.finetune import evaluate

NAME = "fusion_training"
SHAPE = (1, 16, 16)
FACTORS = (4, 4, 4)
SEEDS = 5
EPOCHS = (0, 1, 3)
BATCH = 256  # images that fusions are solved on
COLUMNS = (
    ("fusion", "fusion at the start", str),
    ("teacher", "teacher", str),
    *((f"after_{e}", f"after {e} epochs" if e != 1 else "after 1 epoch", lambda v: _words(v)) for e in EPOCHS),
    ("original", "unsplit", lambda v: _words(v)),
)
LEFT = (0, 1)


def run(quick: bool) -> list[dict[str, Any]]:
    seeds = 1 if quick else SEEDS
    digits = load_data("digits", SHAPE)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(seeds):
        for key, scores in one(digits, seed, quick):
            found.setdefault(key, []).append(scores)
        print(f"  seed {seed} is done", flush=True)
    rows = []
    for (fusion, teacher), scores in found.items():
        means = {
            name: {"mean": statistics.mean(s[name] for s in scores), "sd": statistics.pstdev([s[name] for s in scores])}
            for name in scores[0]
        }
        rows.append({"fusion": fusion, "teacher": teacher, "seeds": seeds, "factors": list(FACTORS), **means})
    return rows


def one(digits: Any, seed: int, quick: bool) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """The accuracies of one seed in the four settings."""
    model = network(seed).eval()
    splitfx.finetune(
        model, digits.train, digits.val, Recipe(epochs=1 if quick else 8, lr=0.05, seed=seed), progress=False
    )
    original = evaluate(model, digits.val).accuracy
    picked = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))[:BATCH].tolist()
    batch = torch.stack([digits.train[i][0] for i in picked])
    example = torch.zeros(1, *SHAPE)
    for fusion, calibration in (("selection", None), ("least squares", batch)):
        step = Group(factors=FACTORS, lowering="branches", calibration=calibration)
        start = splitfx.transform(model, step, example)
        for name, teacher in (("no", None), ("yes", model)):
            scores = {"original": original}
            for epochs in EPOCHS:
                scores[f"after_{epochs}"] = trained(start, digits, epochs, teacher, seed)
            yield (fusion, name), scores


def trained(start: Any, digits: Any, epochs: int, teacher: nn.Module | None, seed: int) -> float:
    from splitfx.ir.graph import copy_graph

    split = copy_graph(start)
    if epochs:
        recipe = Recipe(epochs=epochs, lr=0.02, seed=seed, keep="last")
        splitfx.finetune(split, digits.train, digits.val, recipe, teacher=teacher, progress=False)
    return evaluate(split, digits.val).accuracy


def network(seed: int, widths: tuple[int, ...] = (32, 64, 64)) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 1
    for width in widths:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, 10))


def _words(value: dict[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.1f} ± {value['sd']:.1f} %"
