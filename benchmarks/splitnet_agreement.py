"""Which source finds groups that were planted, after ordinary training: agreement by seed for two generators.

*planted* is that of `splitnet_learning`: 64 classes in two groups, each the signs of its group's patterns. *shared*:
each group has six 5x5 patterns, and each of its 16 classes three of them, with random amplitudes at random places. The
networks are trained for 15 epochs by a cosine with a weight decay of 5e-4, then every source groups them; *learned*
trains on for 9 epochs with the penalties. Agreement is the adjusted Rand index of the classes' groups.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

import splitfx
from benchmarks.splitnet_learning import Small
from examples.planted import planted_features
from splitfx import Recipe, splitnet
from splitfx.train.data import Data, divided
from splitfx.train.finetune import evaluate

NAME = "splitnet_agreement"
SEEDS = 5
DENSE, GROUPING, UNDECIDED = 15, 9, 4  # epochs; undecided: while the disjoint penalty comes in
CALIBRATION = 1_024
AGREED = 0.95
COLUMNS = (
    ("model", "data", str),
    ("source", "groups", str),
    ("agreement", "agreement by seed", lambda v: ", ".join(f"{one:.2f}" for one in v)),
    ("agreement", f"at {AGREED} or more", lambda v: f"{sum(one >= AGREED for one in v)} of {len(v)}"),
    ("accuracy", "unsplit", lambda v: f"{v:.1f} %"),
)
LEFT = (0, 1, 2)


def four(classes: int) -> nn.Module:
    """Four convolutions and a linear classifier."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (ins, outs) in enumerate(itertools.pairwise((1, 16, 32, 48, 48)), 1):
        layers[f"conv{i}"] = nn.Conv2d(ins, outs, 3, padding=1, bias=False)
        layers[f"bn{i}"], layers[f"relu{i}"] = nn.BatchNorm2d(outs), nn.ReLU()
        if i < 3:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(48, classes)}
    return nn.Sequential(layers)


def shared_patterns(samples: int = 8_000, seed: int = 0) -> Data:
    """Images of 1x16x16 of 32 classes, named ``a0`` … ``a15``, ``b0`` … ``b15``."""
    groups, classes, patterns, uses, side = 2, 16, 6, 3, 16
    made = torch.Generator().manual_seed(1000 + seed)
    bank = torch.randn(groups, patterns, 5, 5, generator=made)
    bank = 5 * bank / bank.flatten(2).norm(dim=2)[..., None, None]
    sets = torch.tensor(list(itertools.combinations(range(patterns), uses)))
    own = torch.stack([sets[torch.randperm(len(sets), generator=made)[:classes]] for _ in range(groups)])
    targets = torch.arange(samples) % (groups * classes)
    group, number = targets // classes, targets % classes
    images = 0.1 * torch.randn(samples, 1, side, side, generator=made)
    amplitude = 0.75 + 0.5 * torch.rand(samples, uses, generator=made)
    place = torch.randint(side - 4, (samples, uses, 2), generator=made)
    for i, j in itertools.product(range(samples), range(uses)):
        top, left = place[i, j].tolist()
        shown = bank[group[i], own[group[i], number[i], j]]
        images[i, 0, top : top + 5, left : left + 5] += amplitude[i, j] * shown
    names = tuple(f"{letter}{c}" for letter in "ab" for c in range(classes))
    return divided("shared", images, targets, names)


CASES: dict[str, tuple[Callable[[int], Data], Callable[[int], nn.Module], dict[str, int]]] = {
    "planted": (
        lambda seed: planted_features(groups=2, classes=32, samples=6000, noise=1.0, seed=seed),
        Small,
        {"conv3": 2, "fc": 2},
    ),
    "shared": (lambda seed: shared_patterns(seed=seed), four, {"conv3": 2, "conv4": 2, "fc": 2}),
}


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (make, network, levels) in CASES.items():
        found: dict[str, list[float]] = {}
        accuracies = []
        for seed in range(1 if quick else SEEDS):
            data = make(seed)
            graph = trained(network, data, 1 if quick else DENSE, seed)
            accuracies.append(evaluate(graph, data.val).accuracy)
            for source, assignment in sources(graph, data, levels, seed, quick):
                found.setdefault(source, []).append(agreement(data, assignment))
            print(f"  {name}, seed {seed}: { ({source: round(v[-1], 2) for source, v in found.items()}) }", flush=True)
        accuracy = statistics.mean(accuracies)
        rows += [{"model": name, "source": source, "agreement": v, "accuracy": accuracy} for source, v in found.items()]
    return rows


def trained(network: Callable[[int], nn.Module], data: Data, epochs: int, seed: int) -> fx.GraphModule:
    torch.manual_seed(seed)
    graph = splitfx.trace(network(len(data.classes)).eval(), torch.zeros(1, *data.train[0][0].shape))
    splitfx.finetune(graph, data.train, data.val, recipe(epochs, seed), progress=False)
    return graph.eval()


def recipe(epochs: int, seed: int) -> Recipe:
    return Recipe(epochs=epochs, lr=0.05, weight_decay=5e-4, batch_size=64, seed=seed, keep="last")


def sources(
    graph: fx.GraphModule, data: Data, levels: dict[str, int], seed: int, quick: bool
) -> Iterator[tuple[str, splitnet.Assignment]]:
    train: Any = data.train
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    images = train.images[some]
    yield "random", splitnet.random(graph, levels, seed=seed)
    yield "clustering", splitnet.clustering(graph, levels, seed=seed)
    yield "weights", splitnet.weights(graph, levels, seed=seed)
    yield "activations", splitnet.activations(graph, levels, calibration=images, seed=seed)
    for start, undecided in (("noise", 0), ("noise", UNDECIDED), ("weights", 0), ("weights", UNDECIDED),
                             ("activations", UNDECIDED)):  # fmt: skip
        work, steps = copy.deepcopy(graph), undecided * -(-len(train) // 64)
        seen = images if start == "activations" else None
        groups = splitnet.attach(work, levels, start=start, calibration=seen, seed=seed, anneal=steps)  # type: ignore[arg-type]
        more = recipe(1 if quick else GROUPING, seed)
        splitfx.finetune(work, data.train, data.val, more, regulariser=groups, progress=False)
        way = "annealed" if undecided else "at once"
        yield f"learned {way}, from {start}", groups.assignment(balance=True, unconverged=True)


def agreement(data: Data, assignment: splitnet.Assignment) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score([name[0] for name in data.classes], assignment["fc"]))
