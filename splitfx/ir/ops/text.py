"""A graph as text, one value a line; `splitfx.ir.ops.parse` reads it back.

    %x = input(2, 3, 9, 9)
    %conv = Conv2d(3, 8, 3, stride=2, bias=False) "conv" (%x)
    %split = split(%conv, 4, 1)
    %half = %split[0]
    %add = add(%half, 0.5)
    return %add

Layers are written as their classes are called, with the options that are not the default, and bear their paths;
operators are those of aten, or ``library.name``. Weights have no text.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
from torch import fx, nn

from splitfx.ir.graph import INFO, TensorSpec, TraceInfo, attribute, module_of
from splitfx.ir.ops.layers import LAYERS, options
from splitfx.ir.schema import FUNCTION_NAMES

_VECTOR = "vec"  # the one overload that arguments alone do not tell


def text(graph: fx.GraphModule) -> str:
    """The graph as text, one node a line."""
    record = graph.meta.get(INFO)
    inputs = iter(record.inputs if isinstance(record, TraceInfo) else ())
    nodes = [n for n in graph.graph.nodes if n.op != "get_attr" or n.users]
    return "".join(f"{_line(n, next(inputs, None) if n.op == 'placeholder' else None)}\n" for n in nodes)


def _line(node: fx.Node, spec: Any) -> str:
    """``spec`` says what an input takes, where that is known."""
    if node.op == "output":
        return f"return {_word(node.args[0])}"
    return f"%{node.name} = {_call(node, spec)}"


def _call(node: fx.Node, spec: Any) -> str:
    reads = ", ".join([*map(_word, node.args), *(f"{name}={_word(value)}" for name, value in node.kwargs.items())])
    if node.op == "placeholder":
        return f"input({_tensor_words(spec)})" if isinstance(spec, TensorSpec) else "input"
    if node.op == "get_attr":
        held = attribute(node.graph.owning_module, str(node.target)) if node.graph.owning_module is not None else None
        kind = "parameter" if isinstance(held, nn.Parameter) else "buffer"
        return f'{kind}({_tensor_words(held) if isinstance(held, torch.Tensor) else ""}) "{node.target}"'
    if node.op == "call_module":
        return f'{layer_words(module_of(node))} "{node.target}" ({reads})'
    if node.target is operator.getitem:
        return f"{_word(node.args[0])}[{_word(node.args[1])}]"
    return f"{_function_word(node.target)}({reads})"


def layer_words(layer: nn.Module | None) -> str:
    """A layer as its class is called, without the options that are as they are by default."""
    kind = type(layer)
    if layer is None or LAYERS.get(kind.__name__) is not kind:
        return getattr(kind, "op_name", kind.__name__)
    defaults = inspect.signature(kind.__init__).parameters
    words = []
    for name, value in options(layer).items():
        alike = isinstance(value, tuple) and (len(value) == 1 or name != "normalized_shape") and len(set(value)) == 1
        short, default = value[0] if alike else value, defaults[name].default
        if default is inspect.Parameter.empty:
            words.append(_word(short))
        elif default not in (short, value):
            words.append(f"{name}={_word(short)}")
    return f"{kind.__name__}({', '.join(words)})"


def _tensor_words(tensor: TensorSpec | torch.Tensor) -> str:
    """Sizes, and the type where it is none of fractions: those are as the model is."""
    words = [str(int(size)) for size in tensor.shape]
    return ", ".join(words if tensor.dtype.is_floating_point else [*words, f"dtype={tensor.dtype}"])


def _function_word(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::").replace("::", ".")
        return f"{name}.{_VECTOR}" if target._overloadname == _VECTOR else name
    return FUNCTION_NAMES.get(target) or getattr(target, "__name__", str(target))


def _word(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_word(k)}: {_word(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    return repr(str(value)) if isinstance(value, str | torch.device) else str(value)
