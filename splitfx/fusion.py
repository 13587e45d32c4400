"""Fusion layers: the 1x1 conv behind a split block, and the wider convs that read it (paper A, section 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.carve import Division
from splitfx.graph import module_of
from splitfx.narrow import transposed


def fusion_layer(graph: fx.GraphModule, sizes: tuple[int, ...], source: np.ndarray) -> tuple[nn.Module, torch.Tensor]:
    """A fusion for a value of ``sizes`` (a feature map, or [N, C]) and its weight [out, in], a selection.

    Output channel j copies input channel ``source[j]``; the bias is zero.
    """
    like = next(graph.parameters())
    options: dict[str, Any] = {"bias": True, "device": like.device, "dtype": like.dtype}
    rank, channels = len(sizes), sizes[1]
    fusion: Any = nn.Linear(channels, len(source), **options)
    if rank > 2:
        fusion = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank](channels, len(source), 1, **options)
    fusion.training = graph.training
    rows = torch.as_tensor(source, device=like.device)
    target = torch.eye(channels, dtype=torch.float64, device=like.device)[rows]
    with torch.no_grad():
        fusion.weight.copy_(target.reshape(fusion.weight.shape))
        fusion.bias.zero_()
    return fusion, target


def widen_readers(readers: list[fx.Node], divisions: dict[fx.Node, Division], width: int) -> np.ndarray:
    """Widen the convs that read a fusion to ``width``: each branch gets the channels that its own rows weigh most.

    Returns the source channel of each widened channel; ``divisions`` of the readers are brought up to date. A branch
    with room for all channels keeps the dense function; where there is more room than that, copies share the weight.
    """
    branches = len(divisions[readers[0]].outs)
    slots = np.array_split(np.arange(width), branches)
    source = np.empty(width, dtype=int)
    mass = {n: squares(module_of(n)) for n in readers}
    for g, places in enumerate(slots):
        weighed = sum(mass[n][divisions[n].outs[g]].sum(0) for n in readers)
        order = np.argsort(-np.asarray(weighed), kind="stable")
        best = np.sort(order[: len(places)])
        source[places] = best[np.arange(len(places)) % len(order)]
    for n in readers:
        module = module_of(n)
        assert isinstance(module, nn.Conv2d)
        outs = divisions[n].outs
        weight = module.weight.detach().new_zeros(module.out_channels, width, *module.kernel_size)
        for places, rows in zip(slots, outs, strict=True):
            copies = np.bincount(source[places], minlength=module.in_channels)[source[places]]
            share = torch.as_tensor(1 / copies, dtype=weight.dtype, device=weight.device)
            kept = module.weight.detach()[torch.as_tensor(rows)][:, torch.as_tensor(source[places])]
            weight[np.ix_(rows, places)] = kept * share[:, None, None]
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
        module.in_channels = width
        divisions[n] = Division(tuple(slots), outs)
    return source


def squares(module: nn.Module | None) -> np.ndarray:
    """Squared weights [out, in] of a conv or linear layer, summed over the kernel."""
    assert module is not None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    weight = (weight.transpose(0, 1) if transposed(module) else weight).detach().double().square()
    return (weight.flatten(2).sum(2) if weight.dim() > 2 else weight).cpu().numpy()
