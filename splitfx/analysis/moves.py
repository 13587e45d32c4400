"""Data movement on labels: run an operation on the names of its channels instead of on its values.

A label array names what sits where in a tensor. It has the tensor's rank, and size 1 wherever the name does not
depend on the position (batch, height, width), so a feature map of C channels needs C numbers. Concat, slice,
flatten, permute, channel shuffle need no rule of their own: the operation itself is run on the labels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from splitfx.analysis.shapes import shape
from splitfx.ir.ops import op

Labels = torch.Tensor  # int64, see above


def compress(labels: Labels) -> Labels:
    """Size 1 along every dim on which the labels do not depend."""
    for dim in range(labels.dim()):
        if labels.shape[dim] <= 1:
            continue
        first = labels.narrow(dim, 0, 1)
        if labels.stride(dim) == 0 or bool((labels == first).all()):
            labels = first
    return labels


def channel_dim(labels: Labels | None) -> int | None:
    """The one dim that the labels depend on; None where there is none or more than one."""
    if labels is None:
        return None
    dims = [d for d in range(labels.dim()) if labels.shape[d] > 1]
    return dims[0] if len(dims) == 1 else None


def reshape(labels: Labels, before: tuple[int, ...], after: tuple[int, ...]) -> Labels:
    """Labels after an order-preserving regrouping of sizes ``before`` to ``after``.

    Sizes are matched in the smallest runs with equal products; only runs that hold labels are spread out.
    """
    spread, result = list(labels.shape), [1] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        i0, j0 = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while math.prod(before[i0:i]) != math.prod(after[j0:j]):
            if (math.prod(before[i0:i]) < math.prod(after[j0:j]) or j == len(after)) and i < len(before):
                i += 1
            else:
                j += 1
        if any(labels.shape[d] > 1 for d in range(i0, i)):
            spread[i0:i] = before[i0:i]
            result[j0:j] = after[j0:j]
    return compress(labels.expand(spread).reshape(result))


def concat(parts: list[Labels], sizes: list[tuple[int, ...]], dim: int) -> Labels:
    rank = parts[0].dim()
    dim %= rank
    common = [max(p.shape[d] for p in parts) for d in range(rank)]
    spread = [
        p.expand([size[dim] if d == dim else common[d] for d in range(rank)])
        for p, size in zip(parts, sizes, strict=True)
    ]
    return compress(torch.cat(spread, dim))


def move(node: fx.Node, labels: dict[fx.Node, Any], values: dict[fx.Node, Any]) -> Any:
    """Labels of a data-movement node from those of its operands (a list where it returns several tensors).

    None when the operation invents positions (padding of a labelled dim) or cannot be run on labels.
    """
    row, operand = op(node), node.args[0]
    if row.name == "getitem":
        held = labels.get(operand)  # type: ignore[arg-type]
        return held[node.args[1]] if isinstance(held, list) and isinstance(node.args[1], int) else None
    if row.name == "cat":
        parts = list(operand)  # type: ignore[arg-type]
        if any(labels.get(p) is None for p in parts):
            return None
        return concat([labels[p] for p in parts], [shape(values[p]) for p in parts], _dim(node))
    if not isinstance(operand, fx.Node) or not isinstance(labels.get(operand), torch.Tensor):
        return None
    mine, before = labels[operand], shape(values[operand])
    if row.regroups:
        return reshape(mine, before, shape(values[node]))
    if row.relabels is not None:
        return row.relabels(node, mine, before)
    return _run(node, mine, before, values)


def _dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _run(node: fx.Node, labels: Labels, before: tuple[int, ...], values: dict[fx.Node, Any]) -> Any:
    """Run the operation itself on the labels, spread (without copying) to the operand's sizes."""
    spread = labels.expand(before)

    def given(n: fx.Node) -> Any:
        if n is node.args[0]:
            return spread
        value = values[n]
        return None if isinstance(value, torch.Tensor) else value

    args, kwargs = map_arg((node.args, node.kwargs), given)
    if any(a is None and b is not None for a, b in zip(args, node.args, strict=True)):
        return None  # reads another tensor (an index): its values are not known
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(result, torch.Tensor):
        return compress(result)
    return [compress(r) for r in result]
