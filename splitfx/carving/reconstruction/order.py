"""What an order of channels should keep within the branches: not weight energy, but what a channel contributes to an
output on inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.carving.narrow import BatchNorm
from splitfx.carving.reconstruction import layers
from splitfx.carving.reconstruction.lockstep import Walk, batched, check_range
from splitfx.carving.reconstruction.regression import Normal
from splitfx.ir.graph import module_of

RIDGE = 1e-3  # of the mean square of what is read


def contributions(graph: fx.GraphModule, nodes: Iterable[fx.Node], inputs: Any) -> dict[fx.Node, np.ndarray]:
    """For each conv or linear layer, [out, in]: by how much an output's squared error grows when an input channel is
    left out and the others make up for it as well as they can, on inputs; all of a layer together are 1.

    Errors count as the batch norm behind the layer scales them. Layers of other kinds are left out.
    """
    given = batched(graph, inputs)
    check_range(graph, given)
    walk, found = Walk(graph, given), dict[fx.Node, np.ndarray]()
    generator = torch.Generator().manual_seed(0)
    for node in sorted(nodes, key=walk.place.__getitem__):
        module: Any = module_of(node)
        if type(module) in layers.KINDS and getattr(module, "groups", 1) == 1:
            walk.before(node)
            covariance = _covariance(module, walk.of(node.all_input_nodes[0]), generator)
            weight = module.weight.detach().double().reshape(*module.weight.shape[:2], -1)
            found[node] = _grown(weight * _scale(node, weight)[:, None, None], covariance).cpu().numpy()
    return found


def _covariance(module: Any, values: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Of what the layer reads, [in · taps, in · taps], on as many positions as a block is solved on at least."""
    with torch.no_grad():
        outs = [module(x[:1]) for x in values]
    linear = isinstance(module, nn.Linear)
    sizes = [(len(x), *(y.shape[1:-1] if linear else y.shape[2:])) for x, y in zip(values, outs, strict=True)]
    share = min(1.0, layers.LEAST / sum(math.prod(s) for s in sizes))
    total: Normal | None = None
    for x, size in zip(values, sizes, strict=True):
        read = layers.windows(module, x, layers.positions(size, share, generator)).flatten(1)
        total = Normal.of(read[None], read.new_zeros(1, len(read), 1)).plus(total)
    assert total is not None
    return total.centred(True)[0][0] / total.rows


def _scale(node: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """How the batch norm behind a layer scales its outputs."""
    norm: Any = module_of(next(iter(node.users)))
    if not isinstance(norm, BatchNorm) or norm.running_var is None or norm.weight is None:
        return weight.new_ones(len(weight))
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().abs()


def _grown(weight: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """By how much errors grow, [out, in]: with P the inverse of the covariance, w_i' (P_ii)^-1 w_i for channel i."""
    ins, taps = weight.shape[1:]
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance)).to(covariance))
    at = torch.arange(ins)
    own = inverse.view(ins, taps, ins, taps)[at, :, at]  # [in, taps, taps]
    grown = torch.einsum("oit,its,ois->oi", weight, torch.linalg.inv(own), weight)
    return grown / grown.sum().clamp_min(1e-300)
