"""Least-squares fusion: closed-form weights for a layer, from what a split and a dense graph compute on real inputs.

After the blocks of a network are split, each fusion conv is set to the affine map from the split graph's
activations to the dense graph's that is best in the mean square. No training, no labels; fusions are solved in
order, each on what the solved ones before it give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.errors import PlanError
from splitfx.graph import info, layer
from splitfx.tracing import split_inputs

SAMPLES = 65_536  # positions per solve: enough for thousands of channels, small enough to hold


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes; stops at the last of them."""

    def __init__(self, graph: fx.GraphModule, wanted: list[fx.Node]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.wanted, self.kept = set(wanted), {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value.detach().clone()
        return value


def activations(graph: fx.GraphModule, nodes: list[fx.Node], inputs: Any) -> list[torch.Tensor]:
    """The values of ``nodes`` on ``inputs``, in eval mode, gradients off; the graph's mode is restored."""
    args, kwargs = split_inputs(inputs)
    modes = {m: m.training for m in graph.modules()}
    flat = pytree.tree_leaves((args, kwargs))
    if len(flat) != len(info(graph).inputs):
        raise PlanError(f"calibration has {len(flat)} inputs, the model takes {len(info(graph).inputs)}")
    watch = _Watch(graph, nodes)
    try:
        graph.eval()
        with torch.no_grad():
            watch.run(*flat, enable_io_processing=False)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PlanError(f"calibration inputs do not fit the model: {str(error).splitlines()[0]}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [watch.kept[n] for n in nodes]


def solve_fusions(
    split: fx.GraphModule, fusions: Mapping[fx.Node, np.ndarray], dense: list[torch.Tensor], inputs: Any
) -> dict[fx.Node, tuple[float, float]]:
    """Set each fusion's weight and bias, in order; returns the relative error before and after per fusion.

    ``fusions`` maps a fusion node of ``split`` to the dense channel that each of its output channels copies;
    ``dense`` holds the dense graph's activations at the same places.
    """
    errors: dict[fx.Node, tuple[float, float]] = {}
    for (node, source), wanted in zip(fusions.items(), dense, strict=True):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        module = split.get_submodule(str(node.target))
        given = activations(split, [operand], inputs)[0]
        x, y = _rows(given), _rows(wanted)
        if len(x) < 2:
            raise PlanError(f"{layer(node)}: calibration gives {len(x)} position; give a batch of inputs")
        best = _affine(x, y)
        errors[node] = (_error(x, y), _error(x @ best[0] + best[1], y))
        rows = torch.as_tensor(source, device=x.device)
        _install(module, best[0].T[rows], best[1][rows])
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
