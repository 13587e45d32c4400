"""What a solved split is worth after a little more: steps of gradient without labels, or one epoch with a teacher.

The network and the images are those of `reconstruction`; the order of channels is the solved one.
"""

from __future__ import annotations

from typing import Any

import torch

import splitfx
from benchmarks import fashion
from benchmarks.reconstruction import FACTORS
from splitfx import Recipe
from splitfx.passes import Group
from splitfx.train.finetune import evaluate

NAME = "reconstruction_epoch"
REFINED = 200  # steps of gradient
CASES = fashion.SEEDS
COLUMNS = (
    ("model", "network", str),
    ("factors", "factors", lambda v: ", ".join(map(str, v))),
    ("solved", "solved", lambda v: fashion.points(v)),
    ("refined", "refined", lambda v: fashion.points(v)),
    ("epoch", "1 epoch", lambda v: fashion.points(v)),
    ("unsplit", "unsplit", lambda v: fashion.points(v)),
)


def run(quick: bool) -> list[dict[str, Any]]:
    return [row for name, seed in CASES[: 1 if quick else None] for row in one(name, seed, quick)]


def summary(rows: list[dict[str, Any]]) -> str:
    return fashion.by_factors(rows, ("solved", "refined", "epoch"))


def one(name: str, seed: int, quick: bool) -> list[dict[str, Any]]:
    sets = fashion.data()
    model = fashion.trained(sets, seed, epochs=1 if quick else 4)
    unsplit = evaluate(model, sets.val).accuracy
    images, rows = fashion.calibration(seed=seed), []
    for factors in FACTORS[: 1 if quick else None]:
        row: dict[str, Any] = {"model": name, "factors": list(factors), "unsplit": unsplit}
        for column, steps in (("solved", 0), ("refined", 10 if quick else REFINED)):
            step = Group(factors, order="solved", calibration=images, refine=steps)
            split = splitfx.transform(model, step, images[:2])
            row[column] = evaluate(split, sets.val).accuracy
            if not steps:
                recipe = Recipe(epochs=1, batch_size=128, lr=0.02, keep="last", seed=seed)
                torch.manual_seed(seed)
                splitfx.finetune(split, sets.train, sets.val, recipe, teacher=model, progress=False)
                row["epoch"] = evaluate(split, sets.val).accuracy
        print(f"  {row}", flush=True)
        rows.append(row)
    return rows
