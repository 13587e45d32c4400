"""Writing nodes of an ONNX graph one after the other, in the main graph or in a body of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

END = np.iinfo(np.int64).max


class Scope:
    """Nodes of one graph, in order, and the weights that only it reads. ``names`` numbers values over all scopes."""

    def __init__(self, name: str, names: dict[str, int], layer: dict[str, str] | None = None) -> None:
        self.name, self.names = name, names
        self.nodes: list[ir.Node] = []
        self.held: dict[ir.Value, ir.Value] = {}
        self.layer = layer or {}
        self._numbers: dict[Any, ir.Value] = {}

    def value(self, name: str, like: ir.Value | None = None, shape: Sequence[Any] | None = None) -> ir.Value:
        """A new value; of the type and, if no ``shape`` is given, of the shape of another."""
        number = self.names[name] = self.names.get(name, 0) + 1
        made = ir.Value(name=f"loop/{name}_{number}")
        if like is not None:
            made.type = like.type
            made.shape = ir.Shape(shape if shape is not None else like.shape.dims) if like.shape is not None else None
        return made

    def __call__(self, kind: str, *inputs: ir.Value | None, like: ir.Value | None = None, **options: Any) -> ir.Value:
        made = self.value(kind.lower(), like)
        self.add(kind, inputs, [made], **options)
        return made

    def add(self, kind: str, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value], **options: Any) -> ir.Node:
        given = ir.convenience.convert_attributes(options)
        node = ir.Node("", kind, inputs, given, outputs=outputs, metadata_props=dict(self.layer))
        self.nodes.append(node)
        return node

    def number(self, value: int | Sequence[int]) -> ir.Value:
        """An int64 constant."""
        key = tuple(value) if isinstance(value, Sequence) else value
        if key not in self._numbers:
            self._numbers[key] = self.constant(np.array(value, np.int64))
        return self._numbers[key]

    def constant(self, array: np.ndarray) -> ir.Value:
        made = self.value("constant")
        return self._hold(made, str(made.name), ir.tensor(array))

    def parameter(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A parameter as one of this graph: a runtime lays out anew what belongs to the graph of its reader alone."""
        name = str(value.name)
        number = self.names[name] = self.names.get(name, 0) + 1
        return self._hold(value, name if number == 1 else f"{name}_{number}", tensor)

    def _hold(self, key: ir.Value, name: str, tensor: Any) -> ir.Value:
        if key not in self.held:
            kind = ir.TensorType(tensor.dtype)
            self.held[key] = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=kind)
        return self.held[key]

    def rows(self, x: ir.Value, start: ir.Value, stop: ir.Value) -> ir.Value:
        return self("Slice", x, start, stop, self.number([2]), like=loose(x))

    def count(self, x: ir.Value) -> ir.Value:
        """How many rows a value has, as a vector of one."""
        return self("Shape", x, start=2, end=3)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        return ir.Graph(inputs, outputs, nodes=self.nodes, initializers=[*self.held.values()], name=self.name)


def loose(x: ir.Value) -> ir.Value:
    """The type of a value, and its shape with any number of rows."""
    dims: list[Any] | None = list(x.shape.dims) if x.shape is not None else None
    if dims is not None and len(dims) > 2:
        dims[2] = None
    return ir.Value(type=x.type, shape=None if dims is None else ir.Shape(dims))
