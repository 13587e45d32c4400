"""A graph as text, one node a line: what it is, whom it reads, what it calls with which options."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from splitfx.ir.graph import module_of
from splitfx.ir.ops.reading import in_place, op_name


def text(graph: fx.GraphModule) -> str:
    """The graph as text, one node a line: what it is, whom it reads, what it calls with which options."""
    return "\n".join(describe(node) for node in graph.graph.nodes if node.op != "get_attr" or node.users) + "\n"


def describe(node: fx.Node) -> str:
    """One node as one line: ``%conv1 = conv2d[3->64 7x7 stride 2 pad 3] "conv1" (%x)``."""
    reads = ", ".join(_word(a) for a in node.args if not _is_option(a))
    if node.op == "output":
        return f"return {_word(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "get_attr":
        return f'%{node.name} = value "{node.target}"'
    if node.op == "call_module":
        return f'%{node.name} = {_module_words(module_of(node), op_name(node))} "{node.target}" ({reads})'
    options = [str(a) for a in node.args if _is_option(a)] + [f"{k}={_word(v)}" for k, v in node.kwargs.items()]
    name = op_name(node) or getattr(node.target, "__name__", str(node.target))
    words = f"[{' '.join(options)}]" if options else ""
    return f"%{node.name} = {name}{'_' if in_place(node) else ''}{words} ({reads})"


def _is_option(value: Any) -> bool:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    return not nodes


def _word(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    return str(value)


def _module_words(module: nn.Module | None, name: str) -> str:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        words = [f"{module.in_channels}->{module.out_channels}", "x".join(map(str, module.kernel_size))]
        words += [
            f"{k} {_short(getattr(module, a))}"
            for k, a, plain in (
                ("stride", "stride", 1),
                ("pad", "padding", 0),
                ("dilation", "dilation", 1),
                ("groups", "groups", 1),
            )
            if _short(getattr(module, a)) != str(plain)
        ]
        return f"{name}[{' '.join(words)}]"
    if isinstance(module, nn.Linear):
        return f"{name}[{module.in_features}->{module.out_features}]"
    if name == "leaf":
        return type(module).__name__
    size = next((getattr(module, a) for a in ("num_features", "num_channels", "p") if hasattr(module, a)), None)
    return f"{name}[{size}]" if size is not None else name


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return str(value)
