"""Sizes of every value, from fake tensors: nothing is computed and no memory is taken.

The graph is interpreted once on fake tensors in the traced sizes (all plain ints, also where the graph keeps the
batch free). Operations that the table calls same-shaped reuse their operand's fake tensor type, so the cost is
linear in the graph and small per node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import Autocast, casting, exclusive, twin
from splitfx.ir.graph import TensorSpec, attribute, info, layer, module_of
from splitfx.ir.ops import op, op_name


def shapes(graph: fx.GraphModule, inputs: tuple[Any, ...] | None = None, cast: Autocast = ()) -> dict[fx.Node, Any]:
    """Every node's fake value; ``inputs`` (specs, one per placeholder) replaces the traced sizes. ``cast``: the types
    are those under this autocast.

    Raises `UnsupportedError` with the layer's path when the sizes do not fit the model.
    """
    with exclusive(), casting(cast):
        return _found(graph, info(graph).inputs if inputs is None else inputs)


def _found(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[fx.Node, Any]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[Any, torch.Tensor] = {}
    given = iter(inputs)
    found: dict[fx.Node, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def weight(tensor: torch.Tensor) -> torch.Tensor:
        """Weights of one size share a fake: nobody outside their module sees them."""
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in known:
            known[key] = fake(tensor)
        return known[key]

    def place(spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)

    def run(node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: found[n])
        if node.op == "placeholder":
            return place(next(given))
        if node.op == "get_attr":
            value = attribute(graph, str(node.target))
            return fake(value) if isinstance(value, torch.Tensor) else value
        if node.op == "output":
            return args[0]
        module = module_of(node)
        if module is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if op(node).like_operand:
            return torch.empty_like(args[0])  # type: ignore[arg-type]  # as large as what it reads; the kernel's own rule is slow to ask
        if op_name(node) == "tiled":
            module = module.get_submodule("stage")  # the same values, without running every piece
        return twin(module, weight)(*args, **kwargs)

    with mode, torch.no_grad():
        for node in graph.graph.nodes:
            try:
                found[node] = run(node)
            except Exception as error:
                raise UnsupportedError(
                    f"layer {layer(node)}: the input sizes do not fit: {str(error).splitlines()[0][:200]}"
                ) from error
    return found


def shape(value: Any) -> tuple[int, ...]:
    """Sizes of a fake tensor; empty for anything that is no tensor."""
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()
