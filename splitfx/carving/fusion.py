"""Fusion layers: the 1x1 conv behind a split block, and the wider convs that read it (MalekHosseini et al., 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.carving.division import Division
from splitfx.carving.narrow import transposed
from splitfx.ir.graph import module_of

ROWS = 64  # of a weight at a time: what is worked on stays in the cache


def fusion_layer(graph: fx.GraphModule, sizes: tuple[int, ...], source: np.ndarray) -> nn.Module:
    """A fusion for a value of ``sizes`` (a feature map, or [N, C]), at first a selection.

    Output channel j copies input channel ``source[j]``; the bias is zero.
    """
    like = next(graph.parameters())
    rank, channels = len(sizes), sizes[1]
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    kernel = (1,) if rank > 2 else ()
    fusion: Any = kinds[rank](channels, len(source), *kernel, bias=True, device="meta")  # no random start to throw away
    weight = torch.zeros(fusion.weight.shape, device=like.device, dtype=like.dtype)
    weight[np.arange(len(source)), source] = 1
    fusion.weight, fusion.bias = nn.Parameter(weight), nn.Parameter(weight.new_zeros(len(source)))
    fusion.training = graph.training
    return fusion


class Selection(nn.Module):
    """What a fusion does at first, said without a weight: output channel j is input channel ``source[j]``."""

    def __init__(self, source: np.ndarray, fusion: nn.Module) -> None:
        super().__init__()
        self.training = fusion.training
        self.register_buffer("source", torch.as_tensor(source, device=next(fusion.parameters()).device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, self.source)  # type: ignore[arg-type]


def widen_readers(readers: list[fx.Node], divisions: dict[fx.Node, Division], width: int) -> np.ndarray:
    """Widen the convs that read a fusion to ``width``: each branch gets the channels that its own rows weigh most.

    Returns the source channel of each widened channel; ``divisions`` of the readers are brought up to date. A branch
    with room for all channels keeps the dense function; where there is more room than that, copies share the weight.
    """
    branches = len(divisions[readers[0]].outs)
    slots = np.array_split(np.arange(width), branches)
    source = np.empty(width, dtype=int)
    for g, places in enumerate(slots):
        weighed = sum(_squares_read(module_of(n), divisions[n].outs[g]) for n in readers)
        order = np.argsort(-np.asarray(weighed), kind="stable")
        best = np.sort(order[: len(places)])
        source[places] = best[np.arange(len(places)) % len(order)]
    for n in readers:
        module = module_of(n)
        assert isinstance(module, nn.Conv2d)
        outs = divisions[n].outs
        dense = module.weight.detach()
        weight = dense.new_zeros(module.out_channels, width, *module.kernel_size)
        for places, rows in zip(slots, outs, strict=True):
            copies = np.bincount(source[places], minlength=module.in_channels)[source[places]]
            share = torch.as_tensor(1 / copies, dtype=weight.dtype, device=weight.device)[:, None, None]
            columns = torch.as_tensor(source[places], device=weight.device)
            for some in torch.as_tensor(rows, device=weight.device).split(ROWS):
                weight[some, places[0] : places[-1] + 1] = dense[some].index_select(1, columns) * share
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
        module.in_channels = width
        divisions[n] = Division(tuple(slots), outs)
    return source


def _squares_read(module: nn.Module | None, rows: np.ndarray) -> np.ndarray:
    """Squared weights [in] of a conv, summed over the output channels ``rows`` and the kernel."""
    assert module is not None
    weight: torch.Tensor = module.weight.detach()  # type: ignore[assignment, operator, union-attr]
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for some in torch.as_tensor(rows, device=weight.device).split(ROWS):
        total += weight[some].double().square().flatten(2).sum((0, 2))
    return total.cpu().numpy()


def squares(module: nn.Module | None) -> np.ndarray:
    """Squared weights [out, in] of a conv or linear layer, summed over the kernel."""
    assert module is not None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    weight = (weight.transpose(0, 1) if transposed(module) else weight).detach().double().square()
    return (weight.flatten(2).sum(2) if weight.dim() > 2 else weight).cpu().numpy()
