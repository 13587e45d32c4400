"""A rehearsal: a graph that was read from a file is run once on tensors without values, before anybody runs it.

Does: runs every node on fake tensors in the traced sizes, stages and step-downs included; holds the outputs to the
recorded ones, and the schedules of stages to their maps.
Refuses (`ExportError`, with the layer): arguments that do not fit, sizes that nothing can hold, weights without values,
outputs of other sizes than were recorded.
Promises: nothing is computed, and no memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError
from splitfx.frontend.behaviour import quiet
from splitfx.ground import limits
from splitfx.ir.graph import TensorSpec, attribute, info, layer, module_of, specs_as_now
from splitfx.storage import operators
from splitfx.subnetworks.entry import Entry, entries
from splitfx.tiling.plan.covered import require_covered
from splitfx.tiling.run.executor import Tiled

LARGEST = 2**48  # bytes of one value: no machine has more, and no size is so large that it overflows


def rehearse(graph: fx.GraphModule, outputs: Sequence[TensorSpec] | None) -> None:
    """Raise `ExportError` where a graph cannot be what was saved. ``outputs``: its recorded tensors, where known."""
    for path, one in (*graph.named_parameters(), *graph.named_buffers()):
        if one.device.type == "meta":
            raise ExportError(f"the stored program has no values for {path}.")
    if [entry.number for _, entry in entries(graph)] != list(range(len(entries(graph)))):
        raise ExportError("the stored program numbers its sub-models in another way than 0, 1, 2.")
    recorded, now = info(graph).inputs, specs_as_now(graph)
    try:
        result = _run(graph, recorded)
    except ExportError:
        if now == recorded:
            raise
        result = _run(graph, now)  # the model was converted to another type after it was traced
    made = [(tuple(t.shape), t.dtype) for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    if outputs is not None and made != [(one.shape, one.dtype) for one in outputs]:
        raise ExportError(f"the stored program gives {_listed(made)}, not what was recorded.")


def _run(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), quiet():
        return _Rehearsal().graph(graph, [_placed(spec) for spec in inputs])


def require_room(inputs: Sequence[Any]) -> None:
    """Raise `ExportError` for inputs that this machine's memory cannot hold."""
    need = sum(math.prod(s.shape) * 8 for s in inputs if isinstance(s, TensorSpec))  # drawn in float64
    limits.check_memory(need, ExportError, "what the stored program takes")


def _placed(spec: Any) -> Any:
    if not isinstance(spec, TensorSpec):
        return spec
    _require_bounded("an input", spec.shape, spec.dtype)
    return torch.empty(spec.shape, dtype=spec.dtype)


def _require_bounded(what: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    if math.prod(shape) * dtype.itemsize > LARGEST:
        raise ExportError(f"the stored program makes {what} of {'x'.join(map(str, shape))[:100]}: nothing can hold it.")


class _Rehearsal:
    """One run on fake tensors; to be used within their mode."""

    def __init__(self) -> None:
        self.weights: dict[Any, torch.Tensor] = {}

    def graph(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        """What the graph gives, in the containers of its output node."""
        values: dict[fx.Node, Any] = {}
        remaining = iter(inputs)
        for node in graph.graph.nodes:
            try:
                values[node] = value = self.node(graph, node, values, remaining)
            except ExportError:
                raise
            except Exception as error:  # whatever torch says of arguments that do not fit
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ExportError(f"the stored program does not fit at {layer(node)[:80]}: {reason}.") from error
            for one in pytree.tree_leaves(value):
                if isinstance(one, torch.Tensor):
                    _require_bounded(layer(node)[:80], one.shape, one.dtype)
                elif isinstance(one, int) and abs(one) >= 2**63:
                    raise ExportError(f"the stored program reckons beyond all sizes at {layer(node)[:80]}.")
        return values[next(iter(reversed(graph.graph.nodes)))]

    def node(self, graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], remaining: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "placeholder":
            return next(remaining)
        if node.op == "get_attr":
            return self.weight(attribute(graph, str(node.target)))
        if node.op == "output":
            return args[0]
        module = module_of(node)
        if module is not None:
            return self.layer(graph, module, args, kwargs, values)
        target: Any = node.target
        wrong = operators.unfit(target, args, kwargs)
        if wrong:
            raise ExportError(f"the stored program runs '{target}' with what does not fit: {wrong}.")
        return target(*args, **kwargs)

    def layer(
        self, graph: fx.GraphModule, module: nn.Module, args: Any, kwargs: Any, values: dict[fx.Node, Any]
    ) -> Any:
        if isinstance(module, Tiled):
            return self.stage(module, args, kwargs)
        if isinstance(module, Entry):
            return self.entry(graph, module, args, kwargs, values)
        held = {name: self.weight(t) for name, t in (*module.named_parameters(), *module.named_buffers())}
        return torch.func.functional_call(module, held, args, kwargs) if held else module(*args, **kwargs)

    def stage(self, module: Tiled, args: Any, kwargs: Any) -> Any:
        count = sum(n.op == "placeholder" for n in module.stage.graph.nodes)
        if kwargs or len(args) != count or not all(isinstance(one, torch.Tensor) for one in args):
            raise ValueError(f"a stage of {count} maps")
        result = self.graph(module.stage, list(args))
        require_covered(module.stage, [TensorSpec(tuple(t.shape), t.dtype) for t in args], module.schedule)
        return result

    def entry(self, graph: fx.GraphModule, module: Entry, args: Any, kwargs: Any, values: dict[fx.Node, Any]) -> Any:
        images = [n for n in graph.graph.nodes if n.op == "placeholder"]
        inside = [n for n in module.step_down.graph.nodes if n.op == "placeholder"]
        if kwargs or len(args) != 1 or len(inside) != 1 or module.reads >= len(images):
            raise ValueError("a step-down reads one of the inputs")
        made, cut = self.graph(module.step_down, [values[images[module.reads]]]), args[0]
        if not isinstance(made, torch.Tensor) or (made.shape, made.dtype) != (cut.shape, cut.dtype):
            raise ValueError("its step-down gives another tensor than stands there")
        return cut

    def weight(self, tensor: Any) -> torch.Tensor:
        """Weights of one form share a fake: no value is ever looked at."""
        if not isinstance(tensor, torch.Tensor):
            raise ValueError("something that is no tensor")
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.weights:
            self.weights[key] = torch.empty_strided(*key[:2], dtype=tensor.dtype)
        return self.weights[key]


def _listed(made: list[tuple[tuple[int, ...], torch.dtype]]) -> str:
    one = [f"{str(dtype).removeprefix('torch.')} {list(shape)}" for shape, dtype in made]
    return (", ".join(one) or "nothing")[:200]
