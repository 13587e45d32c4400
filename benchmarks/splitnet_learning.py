"""What learning the groups is worth: learned, clustered, heaviest and random groups of equal networks, five seeds.

A small network is trained, then carved into two groups from its third convolution on. *learned* trains on with the
three penalties (α leaning towards the heaviest groups at the start), is carved by balanced groups and fine-tuned; the
others are carved at once and fine-tuned for as many epochs as both phases take, and the unsplit network as long.
*planted*: images whose 64 classes come in two groups that need five features of their own; agreement is the adjusted
Rand index with those. *digits*: of sklearn.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import splitfx
from examples.planted import planted_features
from splitfx import Recipe, splitnet
from splitfx.passes import SplitNet
from splitfx.train.data import Data, load_data
from splitfx.train.finetune import evaluate

NAME = "splitnet_learning"
SEEDS = 5
DENSE, GROUPING, SPLIT = 15, 6, 3  # epochs
LEVELS = {"conv3": 2, "fc": 2}
COLUMNS = (
    ("data", "data", str),
    ("source", "groups", str),
    ("carved", "just carved", lambda v: _words(v, 100, " %")),
    ("accuracy", "fine-tuned", lambda v: _words(v, 100, " %")),
    ("agreement", "agreement", lambda v: "-" if v is None else _words(v, 1, "")),
    ("least", "at 0.95 or more", lambda v: "-" if v is None else str(v)),
    ("params", "parameters", lambda v: f"{v:,.0f}"),
)
LEFT = (0, 1)


class Small(nn.Module):
    """Three convolutions and a linear classifier; the features stay apart for long enough to be grouped."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.bn1(self.conv1(x)).relu())
        x = self.pool(self.bn2(self.conv2(x)).relu())
        return self.fc(self.bn3(self.conv3(x)).relu().mean((2, 3)))


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, make in (("planted", _planted), ("digits", _digits)):
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in range(1 if quick else SEEDS):
            for source, scores in one(make(seed), seed, quick):
                found.setdefault(source, []).append(scores)
            print(f"  {name}: seed {seed} is done", flush=True)
        rows += [_row(name, source, scores) for source, scores in found.items()]
    return rows


def _planted(seed: int) -> Data:
    return planted_features(groups=2, classes=32, samples=6000, noise=1.0, seed=seed)


def _digits(seed: int) -> Data:
    return load_data("digits", (1, 12, 12))


def one(data: Data, seed: int, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Accuracy, agreement and size of every source with one seed."""
    dense, grouping, split = (1, 1, 1) if quick else (DENSE, GROUPING, SPLIT)
    graph = _trained(data, dense, seed)
    whole = copy.deepcopy(graph)
    scores: dict[str, Any] = {"carved": _accuracy(whole, data), "params": _size(whole)}
    _train(whole, data, grouping + split, seed, 1e-4)
    yield "unsplit", {**scores, "accuracy": _accuracy(whole, data)}
    made = {
        "random": splitnet.random(graph, LEVELS, seed=seed),
        "clustering": splitnet.clustering(graph, LEVELS, seed=seed),
        "weights": splitnet.weights(graph, LEVELS, seed=seed),
    }
    for source, assignment in made.items():
        yield source, _carved(graph, assignment, data, grouping + split, seed)
    yield "learned", _carved(graph, _learned(graph, data, grouping, seed, quick), data, split, seed)


def draw(path: str = "docs/splitnet.svg") -> None:
    """The README's picture: weights of the planted network at the end of the grouping phase."""
    data = _planted(0)
    graph = _trained(data, DENSE, 0)
    splitnet.plot_weights(graph, _learned(graph, data, GROUPING, 0), path, overwrite=True)


def _trained(data: Data, epochs: int, seed: int) -> Any:
    torch.manual_seed(seed)
    graph = splitfx.trace(Small(len(data.classes)), torch.zeros(1, *data.train[0][0].shape))
    # At a constant rate and with a strong decay: what a class does not need fades from its weights.
    _train(graph, data, epochs, seed, 5e-3, schedule="constant", decay="all")
    return graph


def _learned(graph: Any, data: Data, epochs: int, seed: int, unconverged: bool = False) -> splitnet.Assignment:
    """Groups learned while the graph is trained on."""
    groups = splitnet.attach(graph, LEVELS, start="weights", seed=seed)
    _train(graph, data, epochs, seed, 1e-4, groups)
    groups.release()
    return groups.assignment(balance=True, unconverged=unconverged)


def _train(
    model: nn.Module, data: Data, epochs: int, seed: int, l2: float, regulariser: Any = None, **options: Any
) -> None:
    recipe = Recipe(epochs=epochs, lr=0.05, weight_decay=l2, batch_size=64, seed=seed, keep="last", **options)
    splitfx.finetune(model, data.train, data.val, recipe, regulariser=regulariser, progress=False)


def _carved(graph: Any, assignment: splitnet.Assignment, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    split = splitfx.transform(graph, SplitNet(assignment, lowering="branches"), torch.zeros(1, *data.train[0][0].shape))
    found: dict[str, Any] = {"carved": _accuracy(split, data), "params": _size(split)}
    _train(split, data, epochs, seed, 1e-4)
    found["accuracy"] = _accuracy(split, data)
    if data.classes[0].startswith("a"):
        from sklearn.metrics import adjusted_rand_score

        found["agreement"] = float(adjusted_rand_score([n[0] for n in data.classes], assignment["fc"]))
    return found


def _accuracy(model: nn.Module, data: Data) -> float:
    return evaluate(model, data.val).accuracy / 100


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _row(data: str, source: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    agreed = [s["agreement"] for s in scores if "agreement" in s]
    return {
        "data": data,
        "source": source,
        "seeds": len(scores),
        "carved": _spread([s["carved"] for s in scores]),
        "accuracy": _spread([s["accuracy"] for s in scores]),
        "agreement": _spread(agreed) if agreed else None,
        "least": sum(a >= 0.95 for a in agreed) if agreed else None,
        "params": statistics.mean(s["params"] for s in scores),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.pstdev(values)}


def _words(value: dict[str, float], times: float, unit: str) -> str:
    digits = 1 if times > 1 else 2
    return f"{times * value['mean']:.{digits}f} ± {times * value['sd']:.{digits}f}{unit}"
