"""What a piece of a value is computed from, and the arithmetic of padding that kernels of windows share.

A `Job` says which value it is and where its operands lie; ``row.piece(job)`` returns the function that computes any
piece of it, ``call(run, pieces, wholes)``, exactly as the whole would be: padding is real only where a piece lies at
the border of the map, divisors and coordinates come from the positions in the whole map. Rows and columns are the first
two axes of a map; of a volume the third is whole in every piece. ``row.workspace(job, span)``
predicts what that function allocates, by the same arithmetic, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from splitfx.ir.ops.row import Window

Interval = tuple[int, int]
Pads = tuple[Interval, Interval]
Pieces = Sequence[torch.Tensor]


class Piece(Protocol):
    """Which rows and columns of a value are wanted. ``starts``: global position of the first row and column of each
    operand's piece; ``pads``: real padding (rows before, after), (columns before, after) of each; ``over``: whether the
    result takes an operand's place (a register, or -1)."""

    @property
    def rows(self) -> Interval: ...
    @property
    def columns(self) -> Interval: ...
    @property
    def starts(self) -> tuple[Interval, ...]: ...
    @property
    def pads(self) -> tuple[Pads, ...]: ...
    @property
    def over(self) -> int: ...


class Reach(Protocol):
    """The operand rows [low[i], high[i]) of output row i, of ``size`` rows."""

    low: list[int]
    high: list[int]
    size: int

    def need(self, start: int, stop: int) -> tuple[int, int, int, int]: ...


Call = Callable[[Any, Pieces, Pieces], torch.Tensor]
Argument = Callable[[Pieces, Pieces], Any]


def _nothing(name: str) -> Argument:
    raise AssertionError(f"{name} is asked for before anything is computed")


@dataclass(frozen=True)
class Read:
    """An operand of which pieces are read: its rows and columns, the bytes of one row, the reach of both axes, and the
    sizes of the axes behind them, which are whole."""

    sizes: tuple[int, int]
    row_bytes: int
    h: Reach
    w: Reach
    rest: tuple[int, ...] = ()

    def bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of a piece of it of so many rows, columns and places along the further axes."""
        rows, columns, *more = lengths
        size = self.row_bytes * rows * columns // max(1, self.sizes[1])
        for wanted, whole in zip(more, self.rest, strict=True):
            size = size * wanted // max(1, whole)
        return size


@dataclass(frozen=True)
class Job:
    """One value: ``sizes`` are its rows and columns, ``dims`` where they lie, ``row_bytes`` the bytes of a full row.
    ``reads``: the operands that are maps; ``whole``: one that was computed whole, where there is no map (its rows,
    columns, bytes). ``before``: rows and columns that a padding puts in front. ``rest``: sizes of the axes behind rows
    and columns, of a volume one, of an image none. ``argument(name)``: how a parameter or
    an argument is found when the piece is computed."""

    node: fx.Node
    values: Mapping[fx.Node, Any]
    sizes: tuple[int, int]
    dims: tuple[int, ...] | None
    row_bytes: int
    reads: tuple[Read, ...]
    whole: tuple[int, int, int] | None
    window: Window | None
    before: tuple[int, int]
    rest: tuple[int, ...] = ()
    argument: Callable[[str], Argument] = _nothing

    @property
    def rule(self) -> Window:
        assert self.window is not None
        return self.window

    def spans(self, run: Piece | Span) -> tuple[Interval, ...]:
        """What a piece is along every axis."""
        return (run.rows, run.columns, *((0, size) for size in self.rest))

    def pads(self, pads: Pads, sizes: Sequence[int]) -> tuple[Interval, ...]:
        """The real padding of a window's piece along every axis, of operands whose further axes have these sizes."""
        both = enumerate(zip(sizes, self.rest, strict=True), 2)
        return (*pads, *(whole_pads(self.rule, axis, size, count) for axis, (size, count) in both))


@dataclass(frozen=True)
class Span:
    """A piece whose workspace is asked for; ``pads`` of its first operand, None where it reads none."""

    rows: Interval
    columns: Interval
    pads: Pads | None

    @property
    def count(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def part_bytes(row_bytes: int, width: int, rows: int, columns: int) -> int:
    """Bytes of some rows and columns of a map whose rows are ``width`` wide."""
    return row_bytes * rows * columns // max(1, width)


def joins_by_hand() -> bool:
    """Results may not be written into memory taken beforehand: gradients are wanted, or an export records them."""
    return torch.is_grad_enabled() or torch.compiler.is_exporting()


# ---------------------------------------------------------------- padding of windows


def window_span(rule: Window, axis: int, count: int) -> int:
    """Rows, padding included, that ``count`` rows of a convolution or pool read; those that a transposed convolution
    makes of ``count`` rows, before padding is cut off."""
    return (count - 1) * rule.stride[axis] + rule.dilation[axis] * (rule.kernel[axis] - 1) + 1


def own_padding(rule: Window, axis: int, pads: tuple[int, int], length: int, count: int) -> int | None:
    """The padding that a conv or pool may add by itself, on both sides, to give ``count`` outputs of ``length`` rows;
    None where the real padding is another one, and where there are no rows: torch refuses to pad nothing."""
    if not length:
        return None
    if pads[0] == pads[1]:
        return pads[0]
    k, s, d, p = rule.kernel[axis], rule.stride[axis], rule.dilation[axis], rule.padding[axis]
    fits = pads[0] == p == rule.padding_end[axis] and (length + 2 * p - d * (k - 1) - 1) // s + 1 == count
    return p if fits else None


def whole_pads(rule: Window, axis: int, size: int, count: int) -> Interval:
    """The padding of an axis that is whole in every piece; negative at its end where the last rows are read by none."""
    return rule.padding[axis], window_span(rule, axis, count) - size - rule.padding[axis]


def padded(x: torch.Tensor, pads: Sequence[Interval], mode: str = "constant", value: float = 0.0) -> torch.Tensor:
    """Padding along the axes behind the channels, the first axis first; the tensor itself where there is none."""
    if not any(map(any, pads)):
        return x
    return F.pad(x, [n for one in reversed(pads) for n in one], mode, value)


def read_alone(job: Job, x: torch.Tensor, run: Piece) -> torch.Tensor:
    """Of a piece the rows and columns that are read: none of them where windows lie in the padding alone."""
    for axis, (start, stop) in enumerate((run.rows, run.columns)):
        span = window_span(job.rule, axis, stop - start)
        if sum(run.pads[0][axis]) >= span:
            x = x.narrow(2 + axis, 0, 0)
    return x


def bordered(job: Job, x: torch.Tensor, run: Piece, value: float) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A piece with its real padding, as far as the operation cannot add it itself, and what it can."""
    x, own, explicit = read_alone(job, x, run), [], []
    for axis, (span, pads) in enumerate(zip(job.spans(run), job.pads(run.pads[0], x.shape[4:]), strict=True)):
        padding = own_padding(job.rule, axis, pads, x.shape[2 + axis], span[1] - span[0])
        own.append(padding or 0)
        explicit.append(pads if padding is None else (0, 0))
    return padded(x, explicit, value=value), tuple(own)


def lengths_read(job: Job, span: Span) -> list[int]:
    """How much of its first operand a piece reads along every axis."""
    read = job.reads[0]
    needs = [edge.need(*part) for edge, part in ((read.h, span.rows), (read.w, span.columns))]
    return [*(last - first for first, last, _, _ in needs), *read.rest]


def real_rows(job: Job, span: Span) -> tuple[list[int], list[int], tuple[Interval, ...]]:
    """What a window's piece reads of its first operand along every axis, the padding that is added to that explicitly,
    because the operation cannot add it itself, and all padding."""
    assert span.pads is not None
    rule, pads = job.rule, job.pads(span.pads, job.reads[0].rest)
    counts = [stop - start for start, stop in job.spans(span)]
    lengths = lengths_read(job, span)
    alone = [axis < 2 and sum(pads[axis]) >= window_span(rule, axis, n) for axis, n in enumerate(counts)]
    real = [0 if nothing else n for nothing, n in zip(alone, lengths, strict=True)]
    own = [own_padding(rule, axis, pads[axis], real[axis], n) for axis, n in enumerate(counts)]
    explicit = [sum(pads[axis]) if own[axis] is None else 0 for axis in range(len(counts))]
    return real, explicit, pads


# ---------------------------------------------------------------- rows by number


class Table:
    """Numbers for the rows of a map, kept as a tensor where pieces of it are wanted."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self._kept: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, dtype: torch.dtype, span: tuple[int, int]) -> torch.Tensor:
        if isinstance(x, FakeTensor) or torch.compiler.is_exporting() or torch.compiler.is_compiling():
            return torch.as_tensor(self.numbers[slice(*span)], dtype=dtype, device=x.device)
        kept = self._kept.get((dtype, x.device))
        if kept is None:
            with torch.inference_mode(False):  # it will serve in training too
                kept = self._kept[dtype, x.device] = torch.as_tensor(self.numbers, dtype=dtype, device=x.device)
        return kept.narrow(0, span[0], span[1] - span[0])


def picked(x: torch.Tensor, dim: int, table: Table, span: tuple[int, int], start: int) -> torch.Tensor:
    """Rows of a piece whose first row is ``start``; the piece itself where they are all of it."""
    rows = table.numbers[slice(*span)]
    if len(rows) == x.shape[dim] and bool((rows == np.arange(start, start + len(rows))).all()):
        return x
    return x.index_select(dim, table(x, torch.int64, span) - start)
