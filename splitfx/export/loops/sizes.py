"""Sizes that a file leaves free: those in which two exports of one graph, at different sizes, do not differ.

torch can export symbolic sizes itself, which takes six times as long for a MobileNet as two exports at fixed ones.
Where only the batch that a flattening wrote down differs, it is taken from the flattened map instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

NAMES = {0: "batch", 2: "height"}


def free_sizes(model: ir.Model, others: Iterable[ir.Model]) -> str:
    """Leave free the sizes in which the inputs of a model differ from those of the first other that has the same nodes;
    why its batch is fixed, "" where it is free."""
    found = "the graph fixes the sizes of its inputs"
    for other in others:
        flattened: list[ir.Node] = []
        why = _different(model.graph, other.graph, flattened)
        if not why:
            _free(model.graph, other.graph, flattened)
            batches = [v.shape[0] for v in model.graph.inputs if v.shape is not None and len(v.shape)]
            return found if all(isinstance(size, int) for size in batches) else ""
        found = why
    return found


def _different(a: ir.Graph, b: ir.Graph, flattened: list[ir.Node]) -> str:
    """The first node that depends on the sizes; ``flattened`` takes those that depend on the batch alone."""
    nodes = [*a], [*b]
    if len(nodes[0]) != len(nodes[1]):
        return "the graph has other nodes at other sizes"
    pairs = zip(*nodes, strict=True)
    return next((f"{x.op_type} {x.name} {why}" for x, y in pairs if (why := _apart(x, y, flattened))), "")


def _free(graph: ir.Graph, other: ir.Graph, flattened: list[ir.Node]) -> None:
    named = {*graph.inputs, *graph.outputs}
    for a, b in zip(_values(graph), _values(other), strict=True):
        if a.shape is not None and b.shape is not None:
            pairs = enumerate(zip(a.shape.dims, b.shape.dims, strict=True))
            a.shape = ir.Shape([x if x == y else NAMES.get(d) if not d or a in named else None for d, (x, y) in pairs])
    for node in flattened:
        shape = ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]
        sizes = np.array([0, *shape.numpy()[1:]], np.int64)  # type: ignore[union-attr]
        made = ir.Value(name=f"{node.outputs[0].name}/shape", const_value=ir.tensor(sizes))
        made.type, made.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(sizes)])
        graph.register_initializer(made)
        node.replace_input_with(1, made)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _apart(a: ir.Node, b: ir.Node, flattened: list[ir.Node]) -> str:
    """What differs between two nodes beyond the sizes of what they compute."""
    if (a.domain, a.op_type, len(a.inputs), len(a.outputs)) != (b.domain, b.op_type, len(b.inputs), len(b.outputs)):
        return "is another node at other sizes"
    if a.attributes.keys() != b.attributes.keys() or any(
        not _equal(one.value, b.attributes[name].value) for name, one in a.attributes.items()
    ):
        return "has other attributes at other sizes"
    for place, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=True)):
        held = [None if v is None else ir.convenience.get_const_tensor(v) for v in (x, y)]
        if (held[0] is None) != (held[1] is None):
            return "reads another constant at other sizes"
        if held[0] is None or _equal(*held):
            continue
        if a.op_type != "Reshape" or place != 1 or not _flattens(a, b, [t.numpy() for t in held if t is not None]):
            return "reads another constant at other sizes"
        flattened.append(a)
    return ""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, ir.TensorProtocol):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return bool(a == b)


def _flattens(a: ir.Node, b: ir.Node, shapes: Sequence[np.ndarray]) -> bool:
    """The first number is the batch, and nothing else differs."""
    first = [n.inputs[0].shape for n in (a, b) if n.inputs[0] is not None]
    alike = len(shapes[0]) == len(shapes[1]) and np.array_equal(shapes[0][1:], shapes[1][1:]) and 0 not in shapes[0]
    return alike and all(s is not None and s[0] == shape[0] for s, shape in zip(first, shapes, strict=True))


__all__ = ["NAMES", "free_sizes"]
