"""The four papers' tables on real images, 32x32 Fashion-MNIST, beside what the papers print: one seed, resumable.

Networks have a quarter of the papers' width, and are trained on 10,000 images for 3 epochs; splits start from solved
layers or trained weights and get one epoch (two, where nothing is learned before) on 5,000 of them. What follows from
layer shapes alone (kernels, operations, parameters) is counted on networks of the papers' width. Each row is stored as
it is finished, and a second call goes on: ``--set images=60000 epochs=30 part=1`` is a run of its own.
"""

from __future__ import annotations

from typing import Any

from benchmarks.papers import classes, grouped, pieces, submodels
from benchmarks.papers.common import Job, Row

NAME = "papers"
CASES = {"A": grouped, "B": submodels, "C": pieces, "D": classes}
NOT_COMPARABLE = """What cannot be compared: the papers use CIFAR-10 (A, B), ImageNet (C) and CIFAR-100 (D), networks
of full width and up to 300 epochs; here it is what a processor does in an hour or two, one seed,
and 4,000 test images, whose standard error is 0.5 points. A: ResNet-18 has a 3x3 stem with a pool;
the tolerance is 0.5 points, as there. B: norms have statistics of their own in each model, where
the paper shares them. C: the paper prints a figure without numbers, for 224x224 and more; peaks
here are predicted for one 32x32 image. D: ten classes instead of a hundred, an own taxonomy,
groups that are learned for one epoch from the heaviest ones, no dropout; the shallow split of
Table 1 has 2 groups throughout, its counts in Table 2 have 5 in the classifier, as fits there."""


def settings(quick: bool) -> dict[str, Any]:
    """``part``: what widths are divided by. ``tuned``: epochs of a split on ``tuned_images``; ``val``: test images."""
    if quick:
        sizes = {"images": 96, "batch": 8, "epochs": 1, "tuned": 1, "tuned_images": 32, "val": 32, "part": 8}
        return sizes | {"calibration": 16}
    sizes = {"images": 10000, "batch": 64, "epochs": 3, "tuned": 1, "tuned_images": 5000, "val": 4000, "part": 4}
    return sizes | {"calibration": 256}


def jobs(size: Row) -> dict[str, Job]:
    return {name: job for case in CASES.values() for name, job in case.jobs(size).items()}


def report(rows: list[Row]) -> str:
    known = {row["job"]: row for row in rows}
    return "\n\n".join([*(case.report(known) for case in CASES.values()), NOT_COMPARABLE])
