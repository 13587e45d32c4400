"""What a schedule costs, and what kernels allocate for themselves: counted while the instructions are made.

The planner estimates time from multiply-accumulates, bytes moved, weights read and calls. What a kernel allocates
(padded pieces, rows of a pool or a resize) the rows of the operations say (`splitfx.ir.ops`), by the same functions by
which pieces are computed, so that kernels and the prediction of the peak cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from splitfx.ir.ops import Spatial
from splitfx.ir.ops.pieces import Interval, Pads, Span, part_bytes
from splitfx.tiling.stage.kernel import Kernel
from splitfx.tiling.stage.roles import Kind

# Seconds per multiply-accumulate, per byte written or read, per byte of weights read by a call, and per call: one core
# of a server, measured once. Only their ratios matter: they rank candidates.
MAC, BYTE, WEIGHT, CALL = 1.1e-11, 1.5e-10, 6e-11, 2.5e-5
SPILL = 6e-10  # seconds per byte that goes to another memory or comes back


class CostMeter:
    """Multiply-accumulates, bytes read and written, and ``calls`` of kernels, each ``fired`` so many times."""

    def __init__(self) -> None:
        self.macs = 0.0
        self.moved_bytes = 0.0
        self.spilled_bytes = 0.0
        self.fired: Counter[Kernel] = Counter()

    @property
    def calls(self) -> int:
        return self.fired.total()

    @property
    def seconds(self) -> float:
        weights = sum(count * kernel.weight_bytes for kernel, count in self.fired.items())
        seconds = self.macs * MAC + self.moved_bytes * BYTE + weights * WEIGHT + self.calls * CALL
        return seconds + self.spilled_bytes * SPILL

    def count(self, kernel: Kernel, rows: Interval, columns: Interval, size: int) -> None:
        """A kernel has made a piece of ``size`` bytes."""
        count, share = rows[1] - rows[0], (columns[1] - columns[0]) / max(1, kernel.sizes[1])
        self.macs += kernel.macs_per_row * count * share
        self.moved_bytes += size + sum(k.row_bytes * count * share for k, _, _ in kernel.reads)
        self.fired[kernel] += 1

    def once(self, kernel: Kernel) -> None:
        """A kernel has made a whole value."""
        self.macs += kernel.macs_per_row * max(1, kernel.sizes[0])
        self.moved_bytes += kernel.bytes + sum(k.bytes for k in kernel.takes)
        self.fired[kernel] += 1


@dataclass(frozen=True)
class Spent:
    """What one phase holds at most, in bytes, and what it costs."""

    peak: int
    cost: CostMeter


def moved(kernel: Kernel, rows: Interval, size: int) -> int:
    """Bytes of the copy in which a piece of ``size`` bytes is put into, or taken from, rows one behind the other."""
    assert kernel.dims is not None
    value = kernel.values[kernel.node]
    return 0 if rows[1] - rows[0] == 1 or prod(value.shape[: kernel.dims[0]]) == 1 else size


def workspace_bytes(kernel: Kernel, rows: Interval, columns: Interval, pads: Pads | None) -> int:
    """The most bytes that a kernel holds beyond its operands and its result, for one piece of it."""
    span = Span(rows, columns, pads)
    if kernel.kind is Kind.REDUCE:
        read = kernel.reads[0][0] if kernel.reads else kernel
        return part_bytes(read.row_bytes, read.sizes[1], *span.count) if kernel.role == "statistics" else 0
    workspace = kernel.row.workspace
    if workspace is None:
        return kernel.temporary_bytes * span.count[0] // max(1, kernel.rows)
    if kernel.role or (not kernel.reads and kernel.spatial not in (Spatial.RESIZE, Spatial.PAD, Spatial.MOVE)):
        return 0
    if kernel.spatial is Spatial.WINDOW and pads is None:
        return 0
    return workspace(kernel.job, span)
