"""Sizes of every value, from fake tensors: nothing is computed and no memory is taken.

The graph is interpreted once on fake tensors in the traced sizes (all plain ints, also where the graph keeps the
batch free). Operations that the table calls same-shaped reuse their operand's fake tensor type, so the cost is
linear in the graph and small per node.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import Autocast, casting, exclusive, twin
from splitfx.ir.graph import TensorSpec, attribute, info, layer, module_of
from splitfx.ir.ops import op, op_name
from splitfx.text import first_line


def shapes(graph: fx.GraphModule, inputs: tuple[Any, ...] | None = None, autocast: Autocast = ()) -> dict[fx.Node, Any]:
    """Every node's fake value. ``inputs`` (specs, one per placeholder) replaces the traced sizes; the types are those
    under ``autocast``.

    Raises `UnsupportedError` with the layer's path when the sizes do not fit the model.
    """
    with exclusive(), casting(autocast), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        return _Run(graph, info(graph).inputs if inputs is None else inputs).values


class _Run:
    """A graph, run on fake tensors; to be made within their mode."""

    def __init__(self, graph: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        self.graph, self.inputs = graph, iter(inputs)
        self.values: dict[fx.Node, Any] = {}
        self.weights: dict[Any, torch.Tensor] = {}
        for node in graph.graph.nodes:
            try:
                self.values[node] = self.value(node)
            except Exception as error:
                reason = first_line(error)
                raise UnsupportedError(f"layer {layer(node)}: the input sizes do not fit: {reason}") from error

    def value(self, node: fx.Node) -> Any:
        args, kwargs = cast(Any, map_arg((node.args, node.kwargs), self.values.__getitem__))
        if node.op == "placeholder":
            return self.input(next(self.inputs))
        if node.op == "get_attr":
            held = attribute(self.graph, str(node.target))
            return like(held) if isinstance(held, torch.Tensor) else held
        if node.op == "output":
            return args[0]
        module, target = module_of(node), cast(Any, node.target)
        if module is None:
            return target(*args, **kwargs)
        if op(node).like_operand:
            return torch.empty_like(args[0])  # as large as what it reads; the kernel's own rule is slow to ask
        if op_name(node) == "tiled":
            module = module.get_submodule("stage")  # the same values, without running every piece
        return twin(module, self.weight)(*args, **kwargs)

    def input(self, spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)

    def weight(self, tensor: torch.Tensor) -> torch.Tensor:
        """Weights of one size share a fake: nobody outside their module sees them."""
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self.weights:
            self.weights[key] = like(tensor)
        return self.weights[key]


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same sizes and strides; a fake one where fake tensors are made."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def shape(value: Any) -> tuple[int, ...]:
    """Sizes of a fake tensor; empty for anything that is no tensor."""
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()
