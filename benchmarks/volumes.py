"""Volumes below a budget: a 3-D U-Net for segmentation, cut along depth and height, against the model as it is.

In one process, in turn, medians; peaks are the most bytes of live tensor storage, the input counted and parameters not.
"""

from __future__ import annotations

from typing import Any

import torch

import splitfx
from benchmarks import tile
from benchmarks.networks import UNet3d
from splitfx.passes import FoldBatchNorm, Tile

NAME = "volumes"
SIDE, BUDGETS = 96, ("170 MiB", "125 MiB", "least")
COLUMNS = (
    ("model", "model", str),
    ("image", "volume", str),
    ("how", "how", str),
    *[one for one in tile.COLUMNS if one[0] in ("peak_bytes", "predicted_bytes", "error")],
    ("seconds", "time", lambda v: f"{v:.2f} s"),
    ("ratio", "x", lambda v: f"{v:.2f}"),
)
LEFT = (0, 2)


def run(quick: bool) -> list[dict[str, Any]]:
    side = 24 if quick else SIDE
    torch.manual_seed(0)
    model, x = UNet3d(4 if quick else 16).eval(), torch.randn(1, 1, side, side, side)
    folded = splitfx.transform(splitfx.trace(model, x), FoldBatchNorm(), verify=False)
    calls, rows = {"eager": lambda: model(x), "folded": lambda: folded(x)}, {}
    for budget in ("least",) if quick else BUDGETS:
        split = splitfx.transform(folded, Tile(budget=budget), verify=False)
        step = splitfx.explain(split).steps[-1]
        how = f"tiled, {budget}"
        rows[how] = {"predicted_bytes": step.after.peak_bytes, "plan": repr(step.options)}
        calls[how] = lambda split=split: split(x)
    rows = {how: {"model": "U-Net", "image": f"{side}³", "how": how, **rows.get(how, {})} for how in calls}
    return tile.finished(rows, calls, model, x, 1 if quick else 3)
