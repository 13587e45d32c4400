"""Reconstruction goes on by gradient: all solved layers together, against the dense values at the ends of blocks.

Every step takes some of the inputs, computes what dense graph and split have at a few places (what the fusions read,
and the output) and moves the weights within the blocks by Adam. The last quarter of the inputs is held out: the
weights that it ends with are those that were nearest to the dense graph on these, perhaps those that it began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from splitfx.carving.division import Division
from splitfx.carving.reconstruction.lockstep import BATCH, Batches
from splitfx.ir.graph import copy_graph, output_node, set_path
from splitfx.ir.modes import in_eval

RATE = 1e-3  # of Adam, falling as a cosine
LOOKS = 10  # how often held-out inputs are looked at
HELD = 4  # the last of so many parts of the inputs is held out

Weights = dict[str, torch.Tensor]  # by their names in the graph


def refine(
    dense: fx.GraphModule, split: fx.GraphModule, places: Sequence[str], masks: Mapping[str, Division | None],
    given: Batches, steps: int,
) -> tuple[float, float]:  # fmt: skip
    """Train the layers at the paths of ``masks`` (a division, or None for a whole layer) in place; returns the mean
    squared error, as a share of the dense values' variance, on held-out inputs before and after.

    ``places``: names of nodes that both graphs have; the outputs are compared too.
    """
    inputs = [
        torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0] for parts in zip(*given, strict=True)
    ]
    count = max(len(one) for one in inputs if isinstance(one, torch.Tensor))
    rest, held = torch.arange(count).split([count - math.ceil(count / HELD), math.ceil(count / HELD)])
    there, here = (observed(graph, places) for graph in (dense, split))
    weights = {name: t.detach().clone().requires_grad_() for name, t in trained(split, masks).items()}
    inside = {f"{path}.weight": d for path, d in masks.items() if d is not None}
    keep = {name: inside[name].clear(torch.ones_like(t)) for name, t in weights.items() if name in inside}
    optimizer = torch.optim.Adam(weights.values(), lr=RATE)
    generator = torch.Generator().manual_seed(0)

    def loss(at: torch.Tensor) -> torch.Tensor:
        some = [one[at] if isinstance(one, torch.Tensor) and len(one) == count else one for one in inputs]
        with torch.no_grad():
            wanted = there(*some)
        blocked = {name: t * keep[name] if name in keep else t for name, t in weights.items()}
        return apart(torch.func.functional_call(here, blocked, tuple(some)), wanted)

    def on_held() -> float:
        with torch.no_grad():
            parts = held.split(BATCH)
            return sum(float(loss(part)) * len(part) for part in parts) / len(held)

    with in_eval(there, here):
        first = least = on_held()
        best = {name: t.detach().clone() for name, t in weights.items()}
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss(rest[torch.randperm(len(rest), generator=generator)[:BATCH]]).backward()
            optimizer.step()
            if (step + 1) % max(1, steps // LOOKS) == 0 or step + 1 == steps:
                now = on_held()
                if now < least:
                    least, best = now, {name: t.detach().clone() for name, t in weights.items()}
    for name, tensor in best.items():
        tensor = tensor * keep[name] if name in keep else tensor
        set_path(split, name, nn.Parameter(tensor, trained(split, masks)[name].requires_grad))
    return first, least


def observed(graph: fx.GraphModule, places: Sequence[str]) -> fx.GraphModule:
    """A graph over the same tensors that gives the values at some places, as they are there, and then its outputs."""
    copied = copy_graph(graph, share=True)
    named = {node.name: node for node in copied.graph.nodes}
    seen: list[Any] = []
    for name in places:
        with copied.graph.inserting_after(named[name]):
            seen.append(copied.graph.call_function(torch.ops.aten.clone.default, (named[name],)))
    last = output_node(copied)
    last.args = ((*seen, *last.all_input_nodes),)
    copied.recompile()
    return copied


def trained(split: fx.GraphModule, paths: Mapping[str, Division | None]) -> Weights:
    """The weights and biases of the layers at some paths."""
    found = {}
    for path in paths:
        found |= {f"{path}.{name}": p for name, p in split.get_submodule(path).named_parameters(recurse=False)}
    return found


def apart(values: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over places of the squared error as a share of the variance."""
    shares = [(v - w).square().mean() / w.var().clamp_min(1e-12) for v, w in zip(values, wanted, strict=True)]
    return torch.stack(shares).mean()
