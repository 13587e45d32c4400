"""The rows, a file per family. Importing this package fills the table."""

from __future__ import annotations

from splitfx.ir.ops.families import (
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

__all__ = [
    "convolution",
    "elementwise",
    "movement",
    "norms",
    "padding",
    "pooling",
    "products",
    "reductions",
    "resizing",
    "structure",
]
