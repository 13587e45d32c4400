"""What kernels allocate for themselves while they run: padded pieces, rows of a pool, rows of a resize.

The rows of the operations say it (`splitfx.ir.ops`), by the same functions by which their pieces are computed, so that
kernels and the prediction of the peak cannot disagree.
"""

from __future__ import annotations

from splitfx.ir.ops import Spatial
from splitfx.ir.ops.pieces import Interval, Pads, Span, part_bytes
from splitfx.tiling.plan.stage import Kernel, Kind


def scratch(kernel: Kernel, rows: Interval, columns: Interval, pads: Pads | None) -> int:
    """The most bytes that a kernel holds beyond its operands and its result, for one piece of it."""
    span = Span(rows, columns, pads)
    if kernel.kind is Kind.REDUCE:
        read = kernel.reads[0][0] if kernel.reads else kernel
        return part_bytes(read.row_bytes, read.sizes[1], *span.count) if kernel.role == "statistics" else 0
    workspace = kernel.row.workspace
    if (
        workspace is None
        or kernel.role
        or (not kernel.reads and kernel.spatial not in (Spatial.RESIZE, Spatial.PAD, Spatial.MOVE))
    ):
        return 0
    if kernel.spatial is Spatial.WINDOW and pads is None:
        return 0
    return workspace(kernel.job, span)
