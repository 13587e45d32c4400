"""Operations: one row each, in a file per family, and how a node is read by them.

`splitfx.ir.ops.row` says what a row holds. `op(node)` finds a node's row, `bind(node)` its arguments under one set of
names in either spelling, module or operator, in place or not.
"""

from __future__ import annotations

from splitfx.ir.ops import (  # the families fill the table
    convolution,
    elementwise,
    movement,
    norms,
    padding,
    pooling,
    products,
    reductions,
    resizing,
    structure,
)
from splitfx.ir.ops.reading import (
    bind,
    in_place,
    is_size,
    op,
    op_name,
    out_of_place,
    per_channel,
    slices_all,
    window,
)
from splitfx.ir.ops.registered import register_op
from splitfx.ir.ops.row import ROWS, STRUCTURE, UNKNOWN, Channel, Op, Result, Spatial, Window
from splitfx.ir.ops.text import describe, text

__all__ = [
    "ROWS",
    "STRUCTURE",
    "UNKNOWN",
    "Channel",
    "Op",
    "Result",
    "Spatial",
    "Window",
    "bind",
    "convolution",
    "describe",
    "elementwise",
    "in_place",
    "is_size",
    "movement",
    "norms",
    "op",
    "op_name",
    "out_of_place",
    "padding",
    "per_channel",
    "pooling",
    "products",
    "reductions",
    "register_op",
    "resizing",
    "slices_all",
    "structure",
    "text",
    "window",
]
