"""Paper D, Kim et al.: groups of classes and features in a WRN-16-8 (Tables 1 and 2)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import splitfx
from benchmarks import splitnet_tables
from benchmarks.networks import WideResNet
from benchmarks.papers import common
from benchmarks.papers.common import Job, Row, Rows, percent
from splitfx import splitnet
from splitfx.ground.table import table
from splitfx.passes import SplitNet
from splitfx.train.data import FASHION_CLASSES

# levels of the split; the paper's errors by method (Table 1), S, C, R and learned
SPLITS: dict[str, tuple[dict[str, int], tuple[float, float, float, float]]] = {
    "FC split": ({"fc": 4}, (23.80, 23.72, 24.30, 24.26)),
    "shallow": ({"stage3.*": 2, "fc": 2}, (24.46, 24.54, 25.46, 23.96)),
    "deep": ({"stage[23].*": 2, "fc": 2}, (25.04, 26.04, 27.12, 24.62)),
    "hierarchical": ({"stage2.*": 2, "stage3.*": 4, "fc": 4}, (24.92, 25.98, 26.78, 24.80)),
}
METHODS = ("semantic", "clustering", "random", "learned")
BASELINE = 24.28
TAXONOMY = {
    "for the upper body": {"thin": ["T-shirt", "Shirt", "Dress"], "thick": ["Pullover", "Coat"]},
    "other": {"shoes": ["Sandal", "Sneaker", "Boot"], "neither": ["Trouser", "Bag"]},
}
BOUNDARY: Any = "full"


def jobs(size: Row) -> dict[str, Job]:
    found: dict[str, Job] = {"D1 baseline": functools.partial(_baseline, size)}
    for method in METHODS:
        found |= {f"D1 {name}, {method}": functools.partial(_split, name, method, size) for name in SPLITS}
    return found | {"D2 counts": _counts}


def wide(size: Row) -> nn.Module:
    return common.trained("wrn16", lambda: WideResNet(width=max(1, 8 // size["part"]), classes=10), size)


def _baseline(size: Row, done: Rows) -> Row:
    """Trained on for as long as the splits are."""
    model = wide(size)
    _train(model, size, 2 * size["tuned"])
    return {"error": 100 - common.accuracy(model, size)}


def _split(name: str, method: str, size: Row, done: Rows) -> Row:
    """Carved from one trained network; all train for equally long afterwards, learned groups half of it before."""
    levels = SPLITS[name][0]
    graph = splitfx.trace(wide(size), common.example())
    epochs = size["tuned"]
    if method == "learned":
        groups = splitnet.attach(graph, levels, start="weights", classes=FASHION_CLASSES, boundary=BOUNDARY)
        _train(graph, size, epochs, regulariser=groups)
        groups.release()
        made = groups.assignment(balance=True, unconverged=True)
    elif method == "semantic":
        made = splitnet.semantic(graph, TAXONOMY, FASHION_CLASSES, levels, boundary=BOUNDARY)
    elif method == "clustering":
        made = splitnet.clustering(graph, levels, classes=FASHION_CLASSES, boundary=BOUNDARY)
    else:
        made = splitnet.random(graph, levels, classes=FASHION_CLASSES, boundary=BOUNDARY)
    split = splitfx.transform(graph, SplitNet(made, lowering="branches"), common.example(), verify=False)
    _train(split, size, epochs if method == "learned" else 2 * epochs)
    return {"error": 100 - common.accuracy(split, size)}


def _train(model: nn.Module, size: Row, epochs: int, **options: Any) -> None:
    torch.manual_seed(0)
    common.fit(model, size, epochs, lr=0.02, images=size["tuned_images"], **options)


def _counts(done: Rows) -> Row:
    """Table 2: parameters and FLOPs of the paper's network, from real modules."""
    return {"counts": splitnet_tables.table_of("WRN-16-8")}


def report(rows: Rows) -> str:
    base = rows.get("D1 baseline", {}).get("error")
    lines = [["not split", percent(base), *["", "", ""], percent(BASELINE), *["", "", ""]]]
    for name, (_, printed) in SPLITS.items():
        found = [rows.get(f"D1 {name}, {method}", {}).get("error") for method in METHODS]
        lines.append([name, *map(percent, found), *map(percent, printed)])
    counts = rows.get("D2 counts", {}).get("counts", [])
    learned = {name: rows.get(f"D1 {name}, learned", {}).get("error") for name in SPLITS} | {"baseline": base}
    printed_error = {name: p[3] for name, (_, p) in SPLITS.items()} | {"baseline": BASELINE}
    second = [
        [
            c["row"],
            f"{c['params'] / 1e6:.3f} M",
            c["paper_params"],
            f"{c['flops'] / 1e9:.3f} G",
            c["paper_flops"],
            percent(learned[c["row"]]),
            percent(printed_error[c["row"]]),
        ]
        for c in counts
    ]
    short = ("seman.", "clust.", "random", "learned")
    return "\n\n".join(
        (
            "D, Table 1: test error [%] of a WRN by method; then the paper's, on CIFAR-100\n\n"
            + table(["", *short, *short], lines),
            "D, Table 2: WRN-16-8, parameters and FLOPs of the full network; errors of learned groups\n\n"
            + table(["", "parameters", "paper (millions)", "FLOPs", "paper (10^9)", "error [%]", "paper"], second),
        )
    )
