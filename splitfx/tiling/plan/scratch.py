"""What kernels allocate for themselves while they run: padded pieces, rows of a pool, rows of a resize.

Kernels and the prediction of the peak decide by the same functions, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfx.analysis.taps import PADS, padding_mode
from splitfx.ir.ops import Spatial, Window, bind
from splitfx.tiling.plan.stage import Kernel, Kind, own_padding

Interval = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]


def scratch(kernel: Kernel, rows: Interval, columns: Interval, pads: Pads | None) -> int:
    """The most bytes that a kernel holds beyond its operands and its result, for one piece of it."""
    count = (rows[1] - rows[0], columns[1] - columns[0])
    size = _part(kernel, *count)
    if kernel.kind is Kind.REDUCE:
        return size if kernel.role == "statistics" else 0
    if kernel.spatial is Spatial.RESIZE:
        return _resized(kernel, rows, columns, size)
    if not kernel.reads:
        return 0
    if kernel.rule is not None and pads is not None:
        return _windowed(kernel, kernel.rule, rows, columns, pads, size)
    if kernel.operation in PADS and padding_mode(kernel.node) != "constant":
        return _mirrored(kernel, rows, columns)
    if kernel.operation == "adaptive_avg_pool2d":
        return 2 * size // max(1, count[0])  # one row, and the cells that it is put together from
    if kernel.operation == "leaf":
        return size  # RReLU draws noise that it does not use
    if kernel.operation in ("layer_norm", "rms_norm"):
        return 2 * size // max(1, math.prod(bind(kernel.node)["normalized_shape"]))
    return 0


def _bytes(kernel: Kernel, rows: int, columns: int) -> int:
    return kernel.row_bytes * rows * columns // max(1, kernel.sizes[1])


def _part(kernel: Kernel, rows: int, columns: int) -> int:
    read = kernel.reads[0][0] if kernel.kind is Kind.REDUCE and kernel.reads else kernel
    return _bytes(read, rows, columns)


def _mirrored(kernel: Kernel, rows: Interval, columns: Interval) -> int:
    """Rows are taken first, then columns, each only where the piece is at a border."""
    operand, _, w = kernel.reads[0]
    for axis, (start, stop) in enumerate((rows, columns)):
        before = kernel.before[axis]
        if start >= before and stop <= before + operand.sizes[axis]:
            return 0
    first, last, _, _ = w.need(*columns)
    return _bytes(operand, rows[1] - rows[0], last - first)


# ---------------------------------------------------------------- windows


def window_span(rule: Window, axis: int, count: int) -> int:
    """Rows, padding included, that ``count`` rows of a convolution or pool read."""
    return (count - 1) * rule.stride[axis] + rule.dilation[axis] * (rule.kernel[axis] - 1) + 1


def transposed_ends(
    rule: Window, rows: Interval, columns: Interval, starts: Sequence[int], lengths: Sequence[int]
) -> list[int]:
    """What a transposed convolution of a piece lacks at its left, right, above, below; negative: what is too much."""
    found: list[int] = []
    for axis, (start, stop) in ((1, columns), (0, rows)):
        first = starts[axis] * rule.stride[axis] - rule.padding[axis]
        last = first + (lengths[axis] - 1) * rule.stride[axis] + rule.dilation[axis] * (rule.kernel[axis] - 1) + 1
        found += [first - start, stop - last]
    return found


def pool_pads_itself(rule: Window, pads: Pads, lengths: Sequence[int], rows: Interval, columns: Interval) -> bool:
    """An average pool may add all padding of a piece: its divisors are then those of the whole map."""
    for axis, (start, stop) in enumerate((rows, columns)):
        real = lengths[axis] if sum(pads[axis]) < window_span(rule, axis, stop - start) else 0
        own = own_padding(rule, axis, pads[axis], real, stop - start)
        if own is None or own > rule.padding[axis] or 2 * own > rule.kernel[axis] or not real:
            return False
    return True


def _windowed(kernel: Kernel, rule: Window, rows: Interval, columns: Interval, pads: Pads, size: int) -> int:
    operand, *edges = kernel.reads[0]
    needs = [edge.need(*span) for edge, span in zip(edges, (rows, columns), strict=True)]
    lengths = [last - first for first, last, _, _ in needs]
    if rule.transposed:
        ends = transposed_ends(rule, rows, columns, [first for first, *_ in needs], lengths)
        if not any(ends):
            return 0
        down, across = (_natural(rule, axis, lengths[axis]) for axis in (0, 1))
        return _bytes(kernel, down, across)
    spans = [window_span(rule, axis, b - a) for axis, (a, b) in enumerate((rows, columns))]
    real = [n if sum(pads[axis]) < spans[axis] else 0 for axis, n in enumerate(lengths)]
    own = [own_padding(rule, axis, pads[axis], real[axis], b - a) for axis, (a, b) in enumerate((rows, columns))]
    explicit = [sum(pads[axis]) if own[axis] is None else 0 for axis in (0, 1)]
    if "avg_pool" in kernel.operation and not pool_pads_itself(rule, pads, lengths, rows, columns):
        explicit = [sum(pads[axis]) for axis in (0, 1)]
        return _bytes(operand, real[0] + explicit[0], real[1] + explicit[1])
    if "max_pool" in kernel.operation:
        tall = _bytes(operand, real[0] + sum(pads[0]), real[1]) if any(pads[0]) else 0
        return tall + _bytes(operand, rows[1] - rows[0], real[1] + sum(pads[1]))
    return _bytes(operand, real[0] + explicit[0], real[1] + explicit[1]) if any(explicit) else 0


def _natural(rule: Window, axis: int, length: int) -> int:
    return (length - 1) * rule.stride[axis] + rule.dilation[axis] * (rule.kernel[axis] - 1) + 1


# ---------------------------------------------------------------- resizes


def _resized(kernel: Kernel, rows: Interval, columns: Interval, size: int) -> int:
    """Rows are resized first, on as many columns as are read; then columns, at once where all of them are wanted."""
    if "pixel" in kernel.operation:
        return _shuffled(kernel, rows, columns, size)
    if kernel.reads:
        operand, h, w = kernel.reads[0]
        first, last, _, _ = w.need(*columns)
        tall = h.need(*rows)
    else:
        operand, first, last, tall = kernel.takes[0], 0, kernel.takes[0].sizes[1], (0, kernel.takes[0].sizes[0], 0, 0)
    across, count = last - first, rows[1] - rows[0]
    half = _bytes(operand, count, across) // (1 if kernel.reads else max(1, operand.sizes[0]))
    full = columns == (0, kernel.sizes[1]) and across == operand.sizes[1]
    if "nearest" in kernel.operation:
        return 0 if count == tall[1] - tall[0] else half
    return max(2 * half - size, half if full else half + size)


def _shuffled(kernel: Kernel, rows: Interval, columns: Interval, size: int) -> int:
    """A shuffle whose piece does not lie on the operand's rows is cut out of a larger one."""
    operand, h, w = kernel.reads[0]
    made = _bytes(operand, *(last - first for first, last, _, _ in (h.need(*rows), w.need(*columns))))
    return made if made != size else 0
