"""Operations: one row each, in a file per family (`splitfx.ir.ops.families`), and how a node is read by them.

`splitfx.ir.ops.row` says what a row holds. `op(node)` finds a node's row, `bind(node)` its arguments under one set of
names in either spelling, module or operator, in place or not.
"""

from __future__ import annotations

from splitfx.ir.ops import families  # which fill the table
from splitfx.ir.ops.parse import parse
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
from splitfx.ir.ops.text import layer_words, text

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
    "families",
    "in_place",
    "is_size",
    "layer_words",
    "op",
    "op_name",
    "out_of_place",
    "parse",
    "per_channel",
    "register_op",
    "slices_all",
    "text",
    "window",
]
