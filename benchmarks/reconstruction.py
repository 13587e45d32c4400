"""What a split is worth before any training: Fashion-MNIST, a small VGG, images without labels.

The network (32-32-64-64-128-128) is trained by `finetune`, then split: as it is, solved on 1,024 images in the given
order of channels and in the one that is best for it, and solved on inputs that were drawn from the batch norms'
statistics alone.
"""

from __future__ import annotations

import time
from typing import Any

import splitfx
from benchmarks import fashion
from splitfx.passes import Group
from splitfx.train.finetune import evaluate

NAME = "reconstruction"
FACTORS = ((2, 2, 2), (4, 4, 4), (8, 8, 8))
DRAWN, STEPS = 256, 150  # inputs without data, and steps of gradient that they are drawn by
CASES = fashion.SEEDS
COLUMNS = (
    ("model", "network", str),
    ("factors", "factors", lambda v: ", ".join(map(str, v))),
    ("macs", "MACs", lambda v: f"{v:.2f}"),
    ("plain", "plain", lambda v: fashion.points(v)),
    ("given", "solved", lambda v: fashion.points(v)),
    ("solved", "solved, ordered", lambda v: fashion.points(v)),
    ("seconds", "seconds", lambda v: f"{v:.0f}"),
    ("drawn", "data-free", lambda v: fashion.points(v)),
    ("unsplit", "unsplit", lambda v: fashion.points(v)),
)


def run(quick: bool) -> list[dict[str, Any]]:
    return [row for name, seed in CASES[: 1 if quick else None] for row in one(name, seed, quick)]


def summary(rows: list[dict[str, Any]]) -> str:
    return fashion.by_factors(rows, ("plain", "given", "solved", "drawn"))


def one(name: str, seed: int, quick: bool) -> list[dict[str, Any]]:
    sets = fashion.data()
    model = fashion.trained(sets, seed, epochs=1 if quick else 4)
    unsplit = evaluate(model, sets.val).accuracy
    images = fashion.calibration(seed=seed)
    drawn = splitfx.draw_inputs(model, (64 if quick else DRAWN, 1, 28, 28), steps=10 if quick else STEPS)
    rows = []
    for factors in FACTORS[: 1 if quick else None]:
        row: dict[str, Any] = {"model": name, "factors": list(factors), "unsplit": unsplit, "calibration": len(images)}
        for column, step in (
            ("plain", Group(factors)),
            ("given", Group(factors, calibration=images)),
            ("drawn", Group(factors, order="solved", calibration=drawn)),
            ("solved", Group(factors, order="solved", calibration=images)),
        ):
            started = time.perf_counter()
            split = splitfx.transform(model, step, images[:2])
            row["seconds"] = time.perf_counter() - started  # of the last: what the ordered one takes in all
            row[column] = evaluate(split, sets.val).accuracy
            figures = splitfx.explain(split).steps[0]
            row["macs"] = figures.after.macs / figures.before.macs
        print(f"  {row}", flush=True)
        rows.append(row)
    return rows
