"""What a schedule is, and the instructions that it becomes: registers, rows and columns, in global coordinates.

The executor, the ONNX export and the prediction of the peak read the same list (`splitfx.tiling.plan.schedule` makes
it). `splitfx.tiling.plan.registers` says how registers are numbered.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfx.tiling.stage.kernel import KEEP_ALL, Keeping, Kernel

Interval = tuple[int, int]
Pads = tuple[int, int]


def widen(wanted: dict[Kernel, Interval], kernel: Kernel, low: int, high: int) -> None:
    """Let what is wanted of a kernel include rows [low, high) too."""
    if high > low:
        known = wanted.get(kernel, (low, high))
        wanted[kernel] = (min(low, known[0]), max(high, known[1]))


@dataclass(frozen=True)
class Schedule:
    """How a stage is run. ``rows``: the height of a strip, the input rows of a step; 0: the whole tile at once.
    ``firing_intervals``: for each group of kernels, the steps between two firings (1 where it has no entry). ``tiles``:
    rows and columns of the grid. ``keeping``: what becomes of maps that wait for a reduction."""

    rows: int = 0
    firing_intervals: tuple[int, ...] = ()
    tiles: tuple[int, int] = (1, 1)
    keeping: Keeping = KEEP_ALL


@dataclass(frozen=True, slots=True)
class Take:
    """``dst`` = rows (and columns) of ``src``: a view, or, with ``copy``, a tensor of its own."""

    dst: int
    src: int
    kernel: Kernel  # whose value src holds
    rows: Interval | None
    columns: Interval | None
    copy: bool


@dataclass(frozen=True, slots=True)
class Join:
    """``dst`` = the pieces, one below the other."""

    dst: int
    srcs: tuple[int, ...]
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class Run:
    """``dst`` = rows ``rows`` and columns ``columns`` of the kernel's value. ``starts``: global position of the first
    row and column of each piece read; ``pads``: real padding (rows before, after), (columns before, after) of each.
    ``over``: the operand register whose place the result takes, or -1."""

    dst: int
    kernel: Kernel
    srcs: tuple[int, ...]
    starts: tuple[Interval, ...]
    pads: tuple[tuple[Pads, Pads], ...]
    rows: Interval
    columns: Interval
    over: int


@dataclass(frozen=True, slots=True)
class Patch:
    """``dst`` = an operation element by element of a piece, which it overwrites, and of another value that lies in
    several ``parts``: (register, first row in the piece, rows). ``place``: of the overwritten operand in ``reads``."""

    dst: int
    kernel: Kernel
    over: int
    place: int
    parts: tuple[tuple[int, int, int], ...]
    rows: Interval
    columns: Interval


@dataclass(frozen=True, slots=True)
class Store:
    """Rows and columns of a value that is whole in one place (an output, or what is taken whole) are there, to be put
    into its ``memory``; what was not computed in rows is the output itself."""

    home: int
    memory: int
    src: int
    kernel: Kernel
    rows: Interval
    columns: Interval


@dataclass(frozen=True, slots=True)
class Reduce:
    """A reduction takes a piece in, of each value that it reads."""

    kernel: Kernel
    srcs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """``dst`` = the value of a reduction, or of a kernel that runs once."""

    dst: int
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class Open:
    """The ``memory`` of a value that is whole in one place is taken."""

    home: int
    memory: int
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class Free:
    registers: tuple[int, ...]


Instruction = Take | Join | Run | Patch | Store | Reduce | Finish | Open | Free
