"""What a split is worth before any training, and after one epoch: Fashion-MNIST, a small VGG, images without labels.

The network (32-32-64-64-128-128) is trained by `finetune`, then split: as it is, solved on 1,024 images, refined by
gradient on these, solved on inputs that were drawn from the batch norms' statistics alone, and solved and then trained
for one epoch with the dense network as teacher.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import splitfx
from benchmarks import fashion
from splitfx import Recipe
from splitfx.ir.graph import copy_graph
from splitfx.passes import Group
from splitfx.train.finetune import evaluate

NAME = "reconstruction"
FACTORS = ((2, 2, 2), (4, 4, 4), (8, 8, 8))
REFINED, DRAWN = 200, 512  # steps of gradient; inputs without data
COLUMNS = (
    ("factors", "factors", lambda v: ", ".join(map(str, v))),
    ("macs", "MACs", lambda v: f"{v:.2f}"),
    ("plain", "plain", lambda v: _points(v)),
    ("solved", "solved", lambda v: _points(v)),
    ("seconds", "seconds", lambda v: f"{v:.0f}"),
    ("refined", "refined", lambda v: _points(v)),
    ("drawn", "data-free", lambda v: _points(v)),
    ("epoch", "1 epoch", lambda v: _points(v)),
    ("unsplit", "unsplit", lambda v: _points(v)),
)


def run(quick: bool) -> list[dict[str, Any]]:
    sets = fashion.data()
    model = fashion.trained(sets, seed=0, epochs=1 if quick else 4)
    unsplit = evaluate(model, sets.val).accuracy
    images = fashion.calibration()
    drawn = splitfx.draw_inputs(model, (64 if quick else DRAWN, 1, 28, 28), steps=10 if quick else 150)
    rows = []
    for factors in FACTORS[: 1 if quick else None]:
        plain = splitfx.transform(model, Group(factors), images[:2])
        started = time.perf_counter()
        solved = splitfx.transform(model, Group(factors, calibration=images), images[:2])
        row: dict[str, Any] = {"factors": list(factors), "unsplit": unsplit, "seconds": time.perf_counter() - started}
        step = splitfx.explain(solved).steps[0]
        row |= {"macs": step.after.macs / step.before.macs, "calibration": len(images)}
        refined = splitfx.transform(model, Group(factors, calibration=images, refine=REFINED), images[:2])
        free = splitfx.transform(model, Group(factors, calibration=drawn), images[:2])
        for name, split in (("plain", plain), ("solved", solved), ("refined", refined), ("drawn", free)):
            row[name] = evaluate(split, sets.val).accuracy
        row["epoch"] = after_an_epoch(solved, model, sets)
        print(f"  {row}", flush=True)
        rows.append(row)
    return rows


def after_an_epoch(solved: Any, teacher: nn.Module, sets: Any) -> float:
    split = copy_graph(solved)
    torch.manual_seed(0)
    recipe = Recipe(epochs=1, batch_size=128, lr=0.02, keep="last")
    splitfx.finetune(split, sets.train, sets.val, recipe, teacher=teacher, progress=False)
    return evaluate(split, sets.val).accuracy


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
