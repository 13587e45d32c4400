"""From a graph to torch's exported program: which sizes are free in it, and the layers on its nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError
from splitfx.ir import graph as graphs
from splitfx.text import first_line

Call = tuple[tuple[Any, ...], dict[str, Any]]


def mark(copy: fx.GraphModule, key: str) -> None:
    """Write the layer of every node where torch.export hands it on: "custom" is the one entry of meta that it does."""
    for node in copy.graph.nodes:
        node.meta["custom"] = {key: graphs.layer(node)}


def _grown(
    record: graphs.TraceInfo, place: int, dims: tuple[int, ...], times: int, more: int
) -> tuple[int, ...] | None:
    shape = record.shapes[place]
    if shape is None:
        return None
    grow = {d for d in dims if (d == 0 or len(shape) > 2) and record.sizes.free(place, d)}
    return tuple(size * times + more if d in grow else size for d, size in enumerate(shape))


NEAR, FAR = 1, 2


def other_sizes(gm: fx.GraphModule, times: int) -> Iterator[Call]:
    """Random inputs of other sizes that the graph takes: with another batch and another height, then with one of the
    two; so many ``times`` as large and one more, then multiples. `NEAR` is quick to run, `FAR` changes what a layer
    computes of its size."""
    record = graphs.info(gm)
    seen = {record.shapes}
    for dims in ((0, 2), (0,), (2,)):
        for by, more in ((times, 1), (2, 0), (3, 0)):
            shapes = tuple(_grown(record, i, dims, by, more) for i in range(len(record.inputs)))
            if shapes not in seen and not record.sizes.broken(record.shapes, shapes):
                wanted = iter([shape for shape in shapes if shape is not None])
                yield graphs.drawn(record, 0, lambda spec, wanted=wanted: replace(spec, shape=next(wanted)))
            seen.add(shapes)


def freed(
    copy: fx.GraphModule, gm: fx.GraphModule, asked: bool | None, key: str, fixed: str = ""
) -> tuple[torch.export.ExportedProgram, str]:
    """The exported program, and why its batch is fixed ("" when it is free)."""
    mark(copy, key)
    if asked is False:
        return follow(copy, graphs.random_inputs(gm), None), "fixed on request"
    why = "the model was traced with a fixed batch size" if graphs.info(gm).dynamic in ("none", "sizes") else fixed
    if not why:
        exported, why = _with_free_batch(copy, gm)
        if exported is not None:
            return exported, ""
    if asked:
        raise ExportError(f"the batch cannot be dynamic: {why}. Leave dynamic_batch out to export the traced size.")
    return follow(copy, graphs.random_inputs(gm), None), why


def _with_free_batch(copy: fx.GraphModule, gm: fx.GraphModule) -> tuple[torch.export.ExportedProgram | None, str]:
    tensors = [spec for spec in graphs.info(gm).inputs if isinstance(spec, graphs.TensorSpec) and spec.shape]
    ones = all(spec.shape[0] == 1 for spec in tensors)
    inputs = graphs.random_inputs(gm, batch=2 if ones else None)  # torch.export bakes a size of 1 into the graph
    shapes = torch.export.ShapesCollection()
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        exported = follow(copy, inputs, shapes)
    except ExportError as error:
        return None, str(error)
    return (exported, "") if batch_symbols(exported) else (None, "the graph fixes the sizes of its inputs")


def follow(gm: fx.GraphModule, inputs: tuple[tuple, dict], shapes: Any) -> torch.export.ExportedProgram:
    args, kwargs = inputs
    try:
        return torch.export.export(gm, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises many kinds here; all mean the same to the caller
        raise ExportError(f"torch.export cannot follow the graph: {first_line(error)}") from error


def batch_symbols(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """torch's symbol of each input's free dimension 0 -> its name in the file, `batch` or `batch_<input>`."""
    free: dict[str, str] = {}
    for name in exported.graph_signature.user_inputs:
        value = next((n.meta.get("val") for n in exported.graph.nodes if n.name == name), None)
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 1
        if isinstance(size, torch.SymInt) and not str(size).isdigit():  # a fixed one prints as digits
            free.setdefault(str(size), str(name))
    if len(free) == 1:
        return dict.fromkeys(free, "batch")
    return {symbol: f"batch_{name}" for symbol, name in free.items()}
