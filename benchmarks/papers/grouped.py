"""Paper A, MalekHosseini et al.: the trend of splitting ResNet-18 (Table 1), ways of splitting VGG-16 (Table 2)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn

import splitfx
from benchmarks.networks import vgg16
from benchmarks.papers import common
from benchmarks.papers.common import Job, Row, Rows, percent
from splitfx.ground.table import table
from splitfx.passes import Group

FACTORS, TOLERANCE = (2, 4, 6, 8), 0.5
TREND = {  # the paper's, by block: factors 1, 2, 4, 6, 8
    1: (93.57, 93.64, 93.55, 93.41, 93.46),
    2: (93.46, 93.36, 93.38, 93.03, 93.03),
    3: (93.38, 93.06, 92.78, 92.95, 92.75),
    4: (93.06, 93.21, 92.89, 92.71, 92.34),
    5: (93.21, 93.16, 93.20, 93.45, 93.14),
}
# Table 2: options of `Group`, the paper's accuracy and thousands of kernels
WAYS: dict[str, tuple[dict[str, Any], float, int]] = {
    "original": ({}, 92.12, 1634),
    "naive": ({"factors": (4,), "fusion": "none"}, 89.81, 408),
    "shared": ({"factors": (4,), "fusion": "none", "share": 3}, 91.31, 430),
    "proposed I": ({"factors": (8, 2, 2, 4, 4)}, 91.51, 508),
    "proposed II": ({"factors": (8, 2, 2, 2, 4)}, 91.37, 705),
}


def jobs(size: Row) -> dict[str, Job]:
    ways = {f"A2 {name}": functools.partial(_way, name, size) for name in WAYS}
    return ways | {f"A1 block {block}": functools.partial(_block, block, size) for block in TREND}


def _block(block: int, size: Row, done: Rows) -> Row:
    """The accuracies of one block's factors, behind those that the blocks before it selected."""
    model = common.resnet(size)
    before = [done[f"A1 block {b}"] for b in range(1, block)]
    original = before[0]["1"] if before else common.accuracy(model, size)
    started = before[-1][str(before[-1]["selected"])] if before else original
    row: Row = {"1": started, "selected": 1}
    passing = True
    for factor in FACTORS:
        factors = (*(b["selected"] for b in before), factor, *[1] * (len(TREND) - block))
        row[str(factor)] = _tuned(model, {"factors": factors}, size)
        passing = passing and row[str(factor)] >= original - TOLERANCE
        row["selected"] = factor if passing else row["selected"]
    return row


def _way(name: str, size: Row, done: Rows) -> Row:
    options = WAYS[name][0]
    model = common.vgg(size)
    found = _tuned(model, options, size) if options else common.accuracy(model, size)
    return {"accuracy": found, "kernels": kernels(options)}


def _tuned(model: nn.Module, options: dict[str, Any], size: Row) -> float:
    """Solved on images without labels, then trained with the unsplit network as teacher."""
    step = Group(**options, costly="split", lowering="branches", calibration=common.calibration(size["calibration"]))
    split = splitfx.transform(model, step, common.example(), verify=False)
    common.fit(split, size, size["tuned"], lr=0.01, images=size["tuned_images"], teacher=model)
    return common.accuracy(split, size)


def kernels(options: dict[str, Any]) -> int:
    """3x3 kernels (pairs of an input and an output channel) of the paper's network, whole or split."""
    with torch.device("meta"):
        model = vgg16()
    graph = splitfx.trace(model.to_empty(device="cpu").eval(), common.example(), verify=False)
    step = Group(**options, costly="split", lowering="grouped") if options else None
    split: fx.GraphModule = splitfx.transform(graph, step, verify=False) if step else graph
    convs = [m for m in split.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return sum(m.in_channels * m.out_channels // m.groups for m in convs)


def report(rows: Rows) -> str:
    trend = [
        [f"block {b}", *(_marked(rows.get(f"A1 block {b}"), k) for k in (1, *FACTORS)), *map(percent, printed)]
        for b, printed in TREND.items()
    ]
    ways = [
        [
            name,
            percent(row.get("accuracy")),
            percent(printed),
            f"{row['kernels'] / 1e3:.1f} k" if "kernels" in row else "-",
            f"{count} k",
        ]
        for name, (_, printed, count) in WAYS.items()
        for row in [rows.get(f"A2 {name}", {})]
    ]
    return "\n\n".join(
        (
            "A, Table 1: accuracy [%] of ResNet-18 by the factor of a block (* selected)\n\n"
            + table(["", *map(str, (1, *FACTORS)), *(f"paper {k}" for k in (1, *FACTORS))], trend),
            "A, Table 2: VGG-16\n\n"
            + table(["", "accuracy [%]", "paper", "kernels of the full network", "paper"], ways),
        )
    )


def _marked(row: Row | None, factor: int) -> str:
    return "-" if row is None else percent(row[str(factor)]) + "*" * (row["selected"] == factor)
