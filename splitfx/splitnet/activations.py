"""An assignment from what each class uses: how much a channel is active for some classes and not for others.

On inputs, with labels or with the model's own probabilities in their place: a channel counts for a class by its weight
in the classifier times how much its mean activation on that class exceeds its mean; in the layers before, a weight
counts as its square times how much the channel's mean differs between classes. The groups that keep the most of that
are found as those that keep the most weight are (`splitfx.splitnet.weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from splitfx.carving.fusion import squares
from splitfx.carving.reconstruction.lockstep import Walk, batched
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of
from splitfx.splitnet.assignment import Assignment, class_names, structure
from splitfx.splitnet.levels import Levels
from splitfx.splitnet.structure import Structure
from splitfx.splitnet.weights import Energies, heaviest


def activations(
    graph: fx.GraphModule,
    levels: Levels = (),
    *,
    calibration: Any,
    labels: Any = None,
    seed: int = 0,
    classes: Sequence[str] = (),
    **options: Any,
) -> Assignment:
    """The assignment that keeps the most of what classes use. ``calibration``: example inputs [N, ...]; ``labels``:
    their class numbers [N], without which the model's probabilities stand for them. ``options``: ``depth``,
    ``groups``, ``boundary``, ``gating``. Raises `PlanError` for labels that do not fit."""
    found = structure(graph, levels, **options)
    names = class_names(found, classes) if classes else ()
    made = heaviest(found, seed, contributions(found, calibration, labels))
    return Assignment(made, "activations", levels=levels, classes=names, **options)


def contributions(found: Structure, inputs: Any, labels: Any = None) -> Energies:
    """What of each split layer's weights, [out, in], classes use."""
    graph = found.facts.graph
    walk = Walk(graph, batched(graph, inputs))
    operands = {s.edge.node: s.edge.node.all_input_nodes[0] for s in found.splits}
    means: dict[fx.Node, torch.Tensor] = {}
    for node in sorted({*operands.values(), found.output}, key=walk.place.__getitem__):
        walk.until(node)
        means[node] = torch.cat([pooled(value) for value in walk.of(node)])
    logits = means[found.output]
    own = torch.softmax(logits, 1) if labels is None else _one_hot(labels, *logits.shape)
    own = own.to(logits)
    share = own.sum(0).clamp_min(1e-9)
    result = {}
    for node, operand in operands.items():
        x = means[operand]
        if not bool(x.isfinite().all()):
            raise PlanError(f"{layer(node)}: what it reads in the calibration is not finite")
        result[node] = _used(found, node, (own.T @ x) / share[:, None] - x.mean(0), share / share.sum())
    return result


def pooled(value: torch.Tensor) -> torch.Tensor:
    """The mean of a map, or of tokens [N, T, C], per channel: [N, C]."""
    value = value.double()
    return value.mean(1) if value.dim() == 3 else value.flatten(2).mean(2) if value.dim() > 2 else value


def _one_hot(labels: Any, count: int, classes: int) -> torch.Tensor:
    given = torch.as_tensor(labels)
    if given.dim() != 1 or given.is_floating_point() or len(given) != count:
        raise PlanError(f"labels: give one class number for each of the {count} inputs; got {list(given.shape)}")
    if count and not 0 <= int(given.min()) <= int(given.max()) < classes:
        wrong = int(given.max()) if int(given.max()) >= classes else int(given.min())
        raise PlanError(f"labels: a class number is {wrong}, the model has {classes} classes, from 0 on")
    return torch.nn.functional.one_hot(given.long(), classes)


def _used(found: Structure, node: fx.Node, apart: torch.Tensor, share: torch.Tensor) -> np.ndarray:
    """``apart`` [classes, in]: how much the mean on each class exceeds the mean."""
    edge = next(s.edge for s in found.splits if s.edge.node is node)
    module: Any = module_of(node)
    if all(vector.classes for vector, _, _ in found.views(edge.outs)) and len(edge.outs) == len(apart):
        weight = module.weight.detach().double().flatten(1)
        return (weight * apart).clamp_min(0).cpu().numpy()
    return squares(module) * (share[:, None] * apart.square()).sum(0).cpu().numpy()
