"""Calibration inputs in batches, and a walk through a graph on all of them, one node at a time.

Two walks, one through a dense graph and one through its split, give at every node what both compute there; a node may
be changed before its walk comes to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.carving.narrow import BatchNorm
from splitfx.errors import PlanError
from splitfx.frontend.example_inputs import split_inputs
from splitfx.ir.graph import info, module_of
from splitfx.ir.modes import in_eval
from splitfx.ir.ops import in_place
from splitfx.text import first_line

BATCH = 64  # inputs that are run at a time

APART = 6.0  # in spread squared; images in [0, 1] where the model takes normalised ones are 8 and more apart

Batches = list[list[Any]]
Values = list[torch.Tensor]  # of one node, batch by batch


def batched(graph: fx.GraphModule, inputs: Any) -> Batches:
    """Example inputs [N, ...] in batches, each the flat inputs of the graph. Raises `PlanError` where they do not fit.

    A graph that takes one size of batch only gets batches of that size where N is a multiple of it, else all at once.
    """
    args, kwargs = split_inputs(inputs)
    flat, known = pytree.tree_leaves((args, kwargs)), info(graph)
    if len(flat) != len(known.inputs):
        raise PlanError(f"calibration has {len(flat)} inputs, the model takes {len(known.inputs)}")
    tensors = [one for one in flat if isinstance(one, torch.Tensor) and one.dim() > 0]
    counts = {len(one) for one in tensors}
    if any(one.is_floating_point() and not bool(one.isfinite().all()) for one in tensors):
        raise PlanError("calibration has values that are not finite")
    size, traced = BATCH, next((s[0] for s in known.shapes if s), 1)
    if known.dynamic not in ("all", "batch"):
        size = traced
    if len(counts) != 1 or (known.dynamic not in ("all", "batch") and counts.pop() % size):
        return [flat]
    apart = [torch.split(one, size) if any(one is t for t in tensors) else one for one in flat]
    parts = len(next(p for p in apart if isinstance(p, tuple)))
    return [[p[i] if isinstance(p, tuple) else p for p in apart] for i in range(parts)]


def check_range(graph: fx.GraphModule, given: Batches) -> None:
    """Raises `PlanError` where the first batch norm reads values of quite another spread than in training: images that
    are not normalised as they were there."""
    norm = next((n for n in graph.graph.nodes if _has_learned(module_of(n))), None)
    if norm is None:
        return
    walk, module = Walk(graph, given[:1]), cast(Any, module_of(norm))
    walk.before(norm)
    mean, var = moments(walk.of(norm.all_input_nodes[0]))
    usual = module.running_var.double() + module.eps
    spread = float((((mean - module.running_mean.double()).square() + var) / usual).median())
    if not 1 / APART < spread < APART:
        raise PlanError(
            f"calibration is of another range than the model was trained on: batch norm {norm.target} reads values "
            f"of {spread**0.5:.2g} times the spread that it knows. Prepare the inputs as for training"
        )


def _has_learned(module: nn.Module | None) -> bool:
    """A batch norm with other statistics than those that it starts with."""
    if not isinstance(module, BatchNorm) or module.running_mean is None or module.running_var is None:
        return False
    return bool(module.running_mean.any()) and not bool((module.running_var == 1).all())


def moments(values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [C] over batches of maps, in float64."""
    count = sum(v.numel() // v.shape[1] for v in values)
    mean = torch.stack([channels(v).sum(1) for v in values]).sum(0) / count
    var = torch.stack([(channels(v) - mean[:, None]).square().sum(1) for v in values]).sum(0) / count
    return mean, var


def channels(value: torch.Tensor) -> torch.Tensor:
    """A map as [C, everything else], in float64."""
    return value.double().movedim(1, 0).flatten(1)


class Walk(fx.Interpreter):
    """A graph run on several batches, node by node; a value lives until its last reader is done, and those of ``kept``
    nodes until `release`."""

    def __init__(self, graph: fx.GraphModule, batches: Batches, kept: Iterable[fx.Node] = ()) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.nodes: list[fx.Node] = list(graph.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.done, self.kept = 0, set(kept)
        self.last = {operand: node for node in self.nodes for operand in node.all_input_nodes}
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.envs: list[dict[fx.Node, Any]] = [dict(zip(placeholders, given, strict=True)) for given in batches]
        self.overwrites = any(in_place(n) for n in self.nodes)

    def step(self) -> None:
        """Run the next node on all batches. Raises `PlanError` where the inputs do not fit the model."""
        node = self.nodes[self.done]
        self.done += 1
        if node.op not in ("placeholder", "output"):
            try:
                with in_eval(self.module), torch.no_grad():
                    self._run(node)
            except (RuntimeError, ValueError, TypeError) as error:
                raise PlanError(f"calibration inputs do not fit the model: {first_line(error)}") from error
        for operand in node.all_input_nodes:
            if self.last[operand] is node and operand not in self.kept:
                self.drop(operand)

    def _run(self, node: fx.Node) -> None:
        for env in self.envs:
            self.env = env
            value = self.run_node(node)
            if node in self.kept and self.overwrites:
                value = pytree.tree_map_only(torch.Tensor, torch.clone, value)
            env[node] = value

    def until(self, node: fx.Node) -> None:
        """Run up to and with a node."""
        while self.done <= self.place[node]:
            self.step()

    def before(self, node: fx.Node) -> None:
        """Run up to and without a node."""
        while self.done < self.place[node]:
            self.step()

    def of(self, node: fx.Node) -> Values:
        return [env[node] for env in self.envs]

    def drop(self, node: fx.Node) -> None:
        for env in self.envs:
            env.pop(node, None)

    def release(self, node: fx.Node) -> None:
        """Forget a kept value, now or when its last reader is done."""
        self.kept.discard(node)
        if node not in self.last or self.place[self.last[node]] < self.done:
            self.drop(node)
