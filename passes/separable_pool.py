"""SeparablePool: maxima over windows are taken along rows and then along columns, many values at a time.

PyTorch's max pooling on a CPU looks at one value after the other when memory is contiguous, and finds the place of each
maximum too: of VGG-16's time at 224 x 224 a tenth. Here they are maxima of slices, which run at the speed of memory:
eight to ten times as fast. In channels-last memory, on a GPU, where gradients are wanted, in exports and when compiled,
the layer is PyTorch's own.

Stays, with a note: pools whose indices are read, of sequences and volumes, of a window that follows from the input's
size. Promise EQUAL: of equal values any may be taken, and no more than the sign of a zero hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from splitfx.analysis import Facts
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.ir.editing import bypass, free_path, insert_after
from splitfx.ir.graph import layer, module_of
from splitfx.ir.layers import SeparableMaxPool2d
from splitfx.ir.ops import bind, op, op_name, window


@dataclass(frozen=True)
class SeparablePool(Pass):
    """Compute 2-D max pools as maxima along rows and columns: the same values, in a fraction of the time on a CPU.

    A gain in eager PyTorch only, for contiguous memory; `Tile` computes pools like this by itself.
    """

    name: ClassVar[str] = "separable_pool"
    promise: ClassVar[Promise] = Promise.EQUAL
    writes_weights: ClassVar[bool] = False

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        notes = []
        for node in [n for n in graph.graph.nodes if "max_pool" in op_name(n) and op(n).window is not None]:
            why = refusal(node, facts)
            if why:
                notes.append(Note(layer(node), f"{op_name(node)} stays: {why}", "declined"))
                continue
            rule = window(node)
            pool = SeparableMaxPool2d(rule.kernel, rule.stride, rule.padding, rule.dilation, rule.ceil_mode)
            where = layer(node)
            insert_after(graph, node, free_path(graph, where or "pool"), pool).meta["layer"] = where
            bypass(graph, node)
            notes.append(Note(where, "maxima along rows, then along columns"))
        return Outcome(tuple(notes) or (Note("model", "has no max pool: nothing to do", "info"),))


def refusal(node: fx.Node, facts: Facts) -> str:
    """Why a pool stays as it is; empty where it does not."""
    operand: Any = node.args[0] if node.args else None
    value = facts.shapes.get(operand)
    if op_name(node) != "max_pool2d":
        return "its indices are read" if "indices" in op_name(node) else "it is no pool of maps"
    if isinstance(module_of(node), SeparableMaxPool2d):
        return "it is separable already"
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return "its input is no batch of maps"
    if not value.dtype.is_floating_point:
        return "its values are no floating-point numbers"
    if any(isinstance(v, fx.Node) for given in _window_of(node) for v in given):
        return "its window follows from the size of the input"
    return ""


def _window_of(node: fx.Node) -> list[tuple[Any, ...]]:
    bound = bind(node)
    given = [bound.get(name) for name in ("kernel_size", "stride", "padding", "dilation")]
    return [tuple(one) if isinstance(one, list | tuple) else (one,) for one in given]
