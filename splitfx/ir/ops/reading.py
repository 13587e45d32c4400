"""Reading a node: its row, its arguments by name in either spelling, whether it overwrites or moves sizes alone."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from splitfx.ir.graph import module_of
from splitfx.ir.ops.discovery import discover
from splitfx.ir.ops.row import BY_MODULE, ROWS, STRUCTURE, UNKNOWN, Channel, Op, Window
from splitfx.ir.schema import arguments, aten_name, mutates, qualified_name


def op_name(node: fx.Node) -> str:
    """The name of a node's row; empty for structure, and for what is neither an aten operator nor registered."""
    if node.op == "call_module":
        kind = type(module_of(node))
        # A module of another class in a canonical graph is a train-dependent leaf, one tensor in and one out; one that
        # a pass made says what it is.
        row = BY_MODULE.get(kind)
        return row.name if row is not None else getattr(kind, "op_name", "leaf")
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    if name := aten_name(node.target):
        return name
    name = qualified_name(node.target)
    if name and name not in ROWS:
        discover()
    return name if name in ROWS else ""


def op(node: fx.Node) -> Op:
    """The row of a node's operation; `UNKNOWN` where there is none."""
    if node.op in ("placeholder", "get_attr", "output") or is_size(node):
        return STRUCTURE
    row = ROWS.get(op_name(node), UNKNOWN)
    if row.layer is not None and len(node.all_input_nodes) > 1:
        return replace(row, channel=Channel.UNKNOWN)  # its per-channel values are computed: no module to narrow
    return row


def is_size(node: fx.Node) -> bool:
    """Arithmetic on sizes (dynamic batch), which moves no tensor."""
    target: Any = node.target
    if node.op != "call_function" or target is operator.getitem:
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target is _SYM_SIZE
    return target in _ON_SIZES or getattr(target, "__module__", "") in ("_operator", "math")


_SYM_SIZE = torch.ops.aten.sym_size.int
_ON_SIZES = (torch.sym_max, torch.sym_min, torch.sym_sqrt, torch.sym_float)


def in_place(node: fx.Node) -> bool:
    """The node overwrites its first operand."""
    if node.op == "call_function":
        return mutates(node.target)
    return bool(getattr(module_of(node), "inplace", False))


def out_of_place(target: Any) -> Any:
    """The functional twin of an in-place aten overload; other targets as they are."""
    if not mutates(target):
        return target
    packet = getattr(torch.ops.aten, aten_name(target))
    return getattr(packet, target._overloadname)


_MODULE_FIELDS = (
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "ceil_mode",
    "groups",
    "output_padding",
    "eps",
    "momentum",
    "num_groups",
    "normalized_shape",
    "p",
    "running_mean",
    "running_var",
)


_TO_THE_END = 2**62  # x[:] slices up to the largest integer


def slices_all(node: fx.Node) -> bool:
    """A slice over a whole axis, whatever its size: ``x[:]``."""
    given = bind(node)
    if op_name(node) != "slice" or given["start"] not in (None, 0) or given["step"] != 1:
        return False
    end = given["end"]
    return end is None or (isinstance(end, int) and end >= _TO_THE_END)


def bind(node: fx.Node, values: Mapping[fx.Node, Any] | None = None) -> dict[str, Any]:
    """A node's arguments by schema name, the same for both spellings; the data operand is ``input``.

    ``weight`` and ``bias`` are tensors where a module holds them, nodes where the graph computes them. With ``values``
    (of all nodes, at one size of the inputs) arguments that follow from sizes are the numbers that they are there.
    """
    if values is not None:
        bound: Any = map_arg(bind(node), lambda n: values[n] if is_size(n) else n)
        return bound
    if node.op == "call_function":
        if not hasattr(node.target, "_schema"):
            return {"input": node.args[0], "args": node.args[1:]}
        found = arguments(node)
        if "self" in found:
            found["input"] = found.pop("self")
        elif "input" not in found and not aten_name(node.target) and found:
            found["input"] = next(iter(found.values()))  # of a registered operator, under whatever name
        return found
    module = module_of(node)
    assert module is not None, f"{node.op} {node.name} calls nothing"
    held = {**vars(module), **module._buffers}  # of a module, to ask for what it has not is slow
    options = {name: held[name] for name in _MODULE_FIELDS if name in held}
    return {"input": node.args[0], **options, **{name: getattr(module, name, None) for name in ("weight", "bias")}}


def window(node: fx.Node, axes: int = 2, weight_shape: tuple[int, ...] = ()) -> Window:
    """The window of a conv or pool node; ``weight_shape`` for a conv whose weight the graph computes."""
    row = op(node)
    assert row.window is not None, f"{row.name} has no window"
    return row.window(bind(node), axes, weight_shape)


def per_channel(node: fx.Node) -> list[fx.Node]:
    """The operands that hold one value per channel, of an operation that takes them as arguments."""
    names = op(node).per_channel
    if node.op == "call_module":
        return node.all_input_nodes[1:] if names else []
    given = bind(node) if names else {}
    return [given[name] for name in names if isinstance(given.get(name), fx.Node)]
