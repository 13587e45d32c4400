"""Paper B, Fuengfusin and Tamukoh: a VGG-16 with two sub-models (Table 1)."""

from __future__ import annotations

import functools
from typing import Any

import torch

import splitfx
from benchmarks.networks import vgg16
from benchmarks.papers import common
from benchmarks.papers.common import Job, Row, Rows, percent
from splitfx import MultiModelLoss
from splitfx.ground.table import table
from splitfx.passes import SubNetworks

CUTS = (2, 7)
# accuracy, and MACs with every elementwise operation, in 10^9; its two sub-models have each other's names
PAPER = {"baseline": (93.16, 0.314), "base": (92.67, 0.314), "sub0": (91.15, 0.275), "sub1": (77.38, 0.124)}


def jobs(size: Row) -> dict[str, Job]:
    found = (("baseline", _alone), ("together", _together))
    return {f"B1 {name}": functools.partial(make, size) for name, make in found}


def _alone(size: Row, done: Rows) -> Row:
    return {"accuracy": {"baseline": common.accuracy(common.vgg(size), size)}}


def _together(size: Row, done: Rows) -> Row:
    torch.manual_seed(0)
    split: Any = splitfx.transform(vgg16(size["part"]).eval(), SubNetworks(cuts=CUTS), common.example())
    common.fit(split, size, size["epochs"], loss=MultiModelLoss())
    models = (split.base(), split.detach(0), split.detach(1))
    found = {name: common.accuracy(one, size) for name, one in zip(split.names, models, strict=True)}
    whole: Any = splitfx.transform(vgg16().eval(), SubNetworks(cuts=CUTS), common.example(), verify=False)
    ops = {one.name: one.ops for one in whole.figures()}
    return {"accuracy": found, "ops": ops | {"baseline": ops["base"]}}


def report(rows: Rows) -> str:
    alone, together = rows.get("B1 baseline", {}), rows.get("B1 together", {})
    found = alone.get("accuracy", {}) | together.get("accuracy", {})
    ops = together.get("ops", {})
    lines = [
        [
            name,
            percent(found.get(name)),
            percent(printed),
            f"{ops[name] / 1e9:.4f} G" if ops else "-",
            f"{macs} G",
        ]
        for name, (printed, macs) in PAPER.items()
    ]
    head = ["", "accuracy [%]", "paper", "operations of the full network", "paper"]
    return "B, Table 1: VGG-16, 2 and 7 convs dropped\n\n" + table(head, lines)
