"""Which of several assignments does best: each is solved on the first part of the calibration, and what the split gives
on the rest is held against the dense model.

Weight that is kept says little of the function that is kept, so assignments are compared by what they do. Nothing of
the graph is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from splitfx.carving.division import masked
from splitfx.carving.reconstruction import reconstruct
from splitfx.carving.reconstruction.lockstep import Walk, batched
from splitfx.errors import MissingExtraError, PlanError
from splitfx.ir.graph import copy_graph, info
from splitfx.ir.notes import Note
from splitfx.splitnet.activations import contributions, pooled
from splitfx.splitnet.sources import clustered_labels, random_labels
from splitfx.splitnet.structure import Structure
from splitfx.splitnet.weights import energies, heaviest

Labels = dict[str, np.ndarray]
HELD = 4  # one of so many inputs is held out
LEAST = 8  # inputs


@dataclass(frozen=True)
class Fidelity:
    """How far a split gives what the dense model gives: the share of inputs with the same first class, and the squared
    error of the outputs, of their variance."""

    agreement: float
    error: float

    def __str__(self) -> str:
        return f"{self.agreement:.1%} (squared error {self.error:.2g} of the variance)"


def best(found: Structure, seed: int, calibration: Any) -> tuple[Labels, list[Note]]:
    """The groups of the source that does best, and how each did. Raises `PlanError` for fewer than 8 inputs."""
    solving, held = parted(found, calibration)
    sources: dict[str, Callable[[], Labels]] = {
        "random": lambda: random_labels(found, seed),
        "weights": lambda: heaviest(found, seed, energies(found, solving)),
        "clustering": lambda: clustered_labels(found, seed),
        "activations": lambda: heaviest(found, seed, contributions(found, solving)),
    }
    made, scores, notes = dict[str, Labels](), dict[str, Fidelity](), list[Note]()
    for name, make in sources.items():
        try:
            made[name] = make()
        except (MissingExtraError, PlanError) as error:
            notes.append(Note("model", f"source {name} is left out: {error}", "declined"))
            continue
        scores[name] = fidelity(found, made[name], solving, held)
    first = max(scores, key=lambda name: (scores[name].agreement, -scores[name].error))
    told = "; ".join(f"{name} {score}" for name, score in scores.items())
    what = f"source {first} did best. First class as the model's on held-out calibration, once solved: {told}"
    return made[first], [*notes, Note("model", what, "info")]


def parted(found: Structure, calibration: Any) -> tuple[Any, Any]:
    """The inputs to solve on, and the last quarter, which is held out."""
    known = info(found.facts.graph)
    size = 1 if known.dynamic in ("all", "batch") else next((s[0] for s in known.shapes if s), 1)
    leaves, form = pytree.tree_flatten(calibration)
    counts = {len(one) for one in leaves if getattr(one, "ndim", 0)}
    count = counts.pop() if len(counts) == 1 else 0
    least = max(LEAST, 2 * size)
    if count < least:
        raise PlanError(f"source 'best' holds a quarter of the calibration out: give {least} inputs or more")
    held = max(count // HELD // size, 1) * size
    parts = [(one[:-held], one[-held:]) if getattr(one, "ndim", 0) else (one, one) for one in leaves]
    return tuple(pytree.tree_unflatten([part[i] for part in parts], form) for i in range(2))  # type: ignore[return-value]


def fidelity(found: Structure, labels: Mapping[str, np.ndarray], solving: Any, held: Any) -> Fidelity:
    """How a split by these groups, solved on some inputs, does on others."""
    graph = found.facts.graph
    work = copy_graph(graph)
    twin = {node.name: node for node in work.graph.nodes}
    divisions = {twin[node.name]: one for node, one in found.divisions(labels).items()}
    reconstruct(copy_graph(work, share=True), work, divisions, {}, solving)
    split, given = masked(work, divisions), []
    for one in (graph, split):
        output = next(node for node in one.graph.nodes if node.name == found.output.name)
        walk = Walk(one, batched(graph, held))
        walk.until(output)
        given.append(torch.cat([pooled(value) for value in walk.of(output)]))
    wanted, got = given
    error = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-300)
    return Fidelity(float((got.argmax(1) == wanted.argmax(1)).double().mean()), float(error))
