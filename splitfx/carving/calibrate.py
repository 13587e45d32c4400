"""Least-squares fusion: closed-form weights for a layer, from what a split and a dense graph compute on real inputs.

After the blocks of a network are split, each fusion conv is set to the affine map from the split graph's
activations to the dense graph's that is best in the mean square. No training, no labels; fusions are solved in
order, each on what the solved ones before it give.

Batch norms behind a divided layer take new running statistics on the way, such that each gives values of the mean and
variance that it gives in the dense network. The old ones are of other values: a fusion solved on them would make up for
the difference with large weights, and training, which uses the statistics of its batch, would start from something else
than what was solved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.carving.narrow import BatchNorm
from splitfx.errors import PlanError
from splitfx.frontend.example_inputs import split_inputs
from splitfx.ir.graph import info, layer, module_of
from splitfx.ir.modes import in_eval

Moments = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by the name of a norm's node: mean and variance per channel
SAMPLES = 65_536  # positions per solve: enough for thousands of channels, small enough to hold


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes; stops at the last of them."""

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[fx.Node]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.wanted, self.kept = set(wanted), {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value.detach().clone()
        return value


class _Moments(_Watch):
    """Keeps, by name, mean and variance per channel of what batch norms give before their scale and shift."""

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[fx.Node], norms: Iterable[str]) -> None:
        super().__init__(graph, wanted)
        self.norms, self.moments = set(norms), {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.norms:
            mean, var = _per_channel(self.env[n.all_input_nodes[0]])
            norm: Any = module_of(n)
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            self.moments[n.name] = (mean - norm.running_mean.double()) * scale, var * scale.square()
        return super().run_node(n)


class _Matched(_Watch):
    """Sets the running statistics of batch norms so that they give values of known moments, as it comes to them."""

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[fx.Node], moments: Moments) -> None:
        super().__init__(graph, wanted)
        self.moments = moments

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.moments:
            norm: Any = module_of(n)
            mean, var = _per_channel(self.env[n.all_input_nodes[0]])
            wanted_mean, wanted_var = self.moments[n.name]
            fits = (var > 0) & (wanted_var > 0)  # a channel that never varies says nothing
            square = torch.where(fits, var / wanted_var, norm.running_var.double() + norm.eps)
            norm.running_mean.copy_(torch.where(fits, mean - wanted_mean * square.sqrt(), norm.running_mean.double()))
            norm.running_var.copy_((square - norm.eps).clamp_min(0))
        return super().run_node(n)


def _per_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.double().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


@dataclass(frozen=True)
class Target:
    """What a dense graph computes: ``values`` at the places of the fusions, ``moments`` of ``norms``."""

    values: list[torch.Tensor]
    norms: list[fx.Node]
    moments: Moments


def target(graph: fx.GraphModule, nodes: list[fx.Node], divided: Iterable[fx.Node], inputs: Any) -> Target:
    """What ``nodes`` of a dense graph, and the batch norms behind ``divided`` ones, give on ``inputs`` in eval mode."""
    norms = _norms_behind(divided)
    watch = _Moments(graph, nodes, [n.name for n in norms])
    run_watched(watch, graph, inputs)
    return Target([watch.kept[n] for n in nodes], norms, watch.moments)


def run_watched(watch: fx.Interpreter, graph: fx.GraphModule, inputs: Any) -> None:
    """Run an interpreter of the graph on example inputs, in eval mode. Raises `PlanError` where they do not fit."""
    args, kwargs = split_inputs(inputs)
    flat = pytree.tree_leaves((args, kwargs))
    if len(flat) != len(info(graph).inputs):
        raise PlanError(f"calibration has {len(flat)} inputs, the model takes {len(info(graph).inputs)}")
    try:
        with in_eval(graph), torch.no_grad():
            watch.run(*flat, enable_io_processing=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PlanError(f"calibration inputs do not fit the model: {str(error).splitlines()[0]}") from error


def _norms_behind(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The batch norms with running statistics that read what ``nodes`` give, directly or not, and are called once."""
    seen, waiting = set[fx.Node](), list(nodes)
    while waiting:
        for user in waiting.pop().users:
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    if not seen:
        return []
    every = [n for n in next(iter(seen)).graph.nodes if n.op == "call_module"]
    calls = Counter(n.target for n in every)
    once = [n for n in every if n in seen and calls[n.target] == 1]
    return [n for n in once if isinstance(m := module_of(n), BatchNorm) and m.running_mean is not None]


def solve_fusions(
    split: fx.GraphModule, fusions: Mapping[fx.Node, np.ndarray], dense: Target, inputs: Any
) -> dict[fx.Node, tuple[float, float]]:
    """Set each fusion's weight and bias, in order; returns the relative error before and after per fusion.

    ``fusions`` maps a fusion node of ``split`` to the dense channel that each of its output channels copies;
    ``dense`` is what the dense graph gives at the same places. The batch norms that it names change: they must own
    their buffers.
    """
    errors: dict[fx.Node, tuple[float, float]] = {}
    for (node, source), wanted in zip(fusions.items(), dense.values, strict=True):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        module = split.get_submodule(str(node.target))
        watch = _Matched(split, [operand], dense.moments)
        run_watched(watch, split, inputs)
        x, y = _rows(watch.kept[operand]), _rows(wanted)
        if len(x) < 2:
            raise PlanError(f"{layer(node)}: calibration gives {len(x)} position; give a batch of inputs")
        best = _affine(x, y)
        errors[node] = (_error(x, y), _error(x @ best[0] + best[1], y))
        rows = torch.as_tensor(source, device=x.device)
        _install(module, best[0].T[rows], best[1][rows])
    run_watched(_Matched(split, (), dense.moments), split, inputs)  # for the norms behind the last fusion
    return errors


def _rows(value: torch.Tensor) -> torch.Tensor:
    """[positions, channels] in float64, evenly thinned."""
    rows = value.double().movedim(1, -1).reshape(-1, value.shape[1])
    return rows[:: max(1, len(rows) // SAMPLES)]


def _affine(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map ``x @ a + b`` nearest to ``y`` in the mean square, drawn towards the identity.

    The pull weighs channels / positions of a channel's mean square: nothing where data abounds, and with fewer
    positions than channels (behind a global pool) directions that the data does not show stay as they are.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    pull = gram.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny) * (x.shape[1] / len(x))
    wanted = x.T @ y
    gram.diagonal().add_(pull)
    wanted.diagonal().add_(pull)
    a = torch.linalg.solve(gram, wanted)
    return a, mean_y - mean_x @ a


def _error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny))


def _install(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight.reshape(module.weight.shape))  # type: ignore[union-attr, operator]
        module.bias.copy_(bias)  # type: ignore[union-attr, operator]


def own_statistics(graph: fx.GraphModule, path: str, other: fx.GraphModule) -> None:
    """Give a norm copies of another graph's running statistics: the tensors it has may be shared with the model."""
    norm, source = graph.get_submodule(path), other.get_submodule(path)
    for name in ("running_mean", "running_var"):
        norm.register_buffer(name, getattr(source, name).clone())
