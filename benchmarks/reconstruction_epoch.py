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
COLUMNS = (
    ("factors", "factors", lambda v: ", ".join(map(str, v))),
    ("solved", "solved", lambda v: fashion.points(v)),
    ("refined", "refined", lambda v: fashion.points(v)),
    ("epoch", "1 epoch", lambda v: fashion.points(v)),
    ("unsplit", "unsplit", lambda v: fashion.points(v)),
)


def run(quick: bool) -> list[dict[str, Any]]:
    sets = fashion.data()
    model = fashion.trained(sets, seed=0, epochs=1 if quick else 4)
    unsplit = evaluate(model, sets.val).accuracy
    images, rows = fashion.calibration(), []
    for factors in FACTORS[: 1 if quick else None]:
        row: dict[str, Any] = {"factors": list(factors), "unsplit": unsplit}
        for name, steps in (("solved", 0), ("refined", 10 if quick else REFINED)):
            step = Group(factors, order="solved", calibration=images, refine=steps)
            split = splitfx.transform(model, step, images[:2])
            row[name] = evaluate(split, sets.val).accuracy
            if not steps:
                recipe = Recipe(epochs=1, batch_size=128, lr=0.02, keep="last")
                torch.manual_seed(0)
                splitfx.finetune(split, sets.train, sets.val, recipe, teacher=model, progress=False)
                row["epoch"] = evaluate(split, sets.val).accuracy
        print(f"  {row}", flush=True)
        rows.append(row)
    return rows
