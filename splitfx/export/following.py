"""From a graph to torch's exported program: which sizes are free in it, and the layers on its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.analysis.shapes import shapes
from splitfx.errors import ExportError, UnsupportedError
from splitfx.ir import graph as graphs
from splitfx.ir.ops import is_size
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


AHEAD = ((1, 1), (1, 2), (1, 3), (1, 5), (1, 6), (1, 7), (5, 3))  # times, and more, of the sizes in between


def unsteady(gm: fx.GraphModule, call: Call) -> str:
    """Why a graph that does the same at the traced sizes as at those of ``call`` may do something else at others: the
    first layer that computes with sizes and makes of two of them the same number, or leaves its operand as it is, but
    not of others. Empty where there is none."""
    record = graphs.info(gm)
    leaves = [v for v in pytree.tree_leaves(call) if isinstance(v, torch.Tensor)]
    there = iter(tuple(v.shape) for v in leaves)
    shapes_ = [next(there) if shape is not None else None for shape in record.shapes]
    pairs = [(a, b) for a, b in zip(record.shapes, shapes_, strict=True) if a is not None and b is not None]
    dims = tuple({d for a, b in pairs for d, (x, y) in enumerate(zip(a, b, strict=True)) if x != y})
    first, last = _made_of_sizes(gm, record.inputs), _made_of_sizes(gm, _at(record, shapes_))
    for times, more in AHEAD if first else ():
        between = [_grown(record, i, dims, times, more) for i in range(len(record.inputs))]
        if record.sizes.broken(record.shapes, between):
            continue
        try:
            found = _made_of_sizes(gm, _at(record, between))
        except UnsupportedError:  # sizes that it does not take
            continue
        for name, (layer, *now) in found.items():
            if any(a == b != c for a, b, c in zip(first[name][1:], last[name][1:], now, strict=True)):
                return f"{layer} makes something else of the sizes at some of them"
    return ""


def _at(record: graphs.TraceInfo, shapes_: list[tuple[int, ...] | None]) -> tuple[Any, ...]:
    """The inputs of a graph, with these shapes."""
    pairs = zip(record.inputs, shapes_, strict=True)
    return tuple(replace(spec, shape=shape) if shape is not None else spec for spec, shape in pairs)


def _made_of_sizes(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[str, tuple[str, list[Any], bool]]:
    """For every node that reads sizes, in tiled stages too: its layer, the numbers, and whether what comes out is as
    large as what goes in."""
    if not any(is_size(n) for g in (graph, *_stages(graph)) for n in g.graph.nodes):
        return {}
    values, found = shapes(graph, inputs), dict[str, tuple[str, list[Any], bool]]()
    for node in graph.graph.nodes:
        module = graphs.module_of(node)
        if isinstance(module, graphs.Staged):
            given = [values[n] for n in node.all_input_nodes]
            specs = tuple(graphs.TensorSpec(tuple(t.shape), t.dtype, str(t.device)) for t in given)
            found |= {f"{node.name}.{name}": one for name, one in _made_of_sizes(module.stage, specs).items()}
        read = [values[n] for n in node.all_input_nodes if is_size(n)]
        if read and not is_size(node) and node.op != "output":
            of = [values[n] for n in (*node.all_input_nodes[:1], node)]
            same = len({tuple(v.shape) for v in of if isinstance(v, torch.Tensor)}) == 1
            found[node.name] = (graphs.layer(node), read, same)
    return found


def _stages(graph: fx.GraphModule) -> list[fx.GraphModule]:
    return [module.stage for module in graph.modules() if isinstance(module, graphs.Staged)]


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


def name_batch(model: Any, names: dict[str, str]) -> None:
    """Give the free dimensions their names; torch calls them s77 or whatever symbol it took."""
    import onnx_ir as ir

    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbol, names) for size in value.shape])


def _renamed(size: Any, symbol: re.Pattern[str], names: dict[str, str]) -> Any:
    known = getattr(size, "value", size)  # a number, or the expression of a free size
    return symbol.sub(lambda m: names[m[1]], known) if isinstance(known, str) else known
