"""Whether a schedule that was read from a file computes its stage: every row once it is read, and all that is given.

The instructions of a schedule are made by splitfx, and torch checks where each of them reads and writes; what torch
cannot see is memory that nothing writes. Longer lists of instructions than `FIRST` are looked at as far as that.
Refuses (`ExportError`): grids finer than the maps; instructions that read what is not there, or leave a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from torch import fx

from splitfx.analysis.shapes import shapes
from splitfx.errors import ExportError
from splitfx.ir.graph import TensorSpec
from splitfx.tiling.plan.instructions import (
    Finish,
    Free,
    Instruction,
    Interval,
    Join,
    Open,
    Patch,
    Reduce,
    Run,
    Schedule,
    Store,
    Take,
)
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind

FIRST = 20_000


def require_covered(stage: fx.GraphModule, inputs: Sequence[TensorSpec], schedule: Schedule) -> None:
    """Raise `ExportError` for a schedule that does not compute a stage graph on inputs of these sizes."""
    compiled = compile_stage(stage, shapes(stage, tuple(inputs)), schedule.keeping)
    most = [max((k.sizes[axis] for k in compiled.kernels), default=1) for axis in (0, 1)]
    if any(parts > max(1, size) for parts, size in zip(schedule.tiles, most, strict=True)):
        raise ExportError(f"a stored schedule cuts maps of {most[0]}x{most[1]} into {schedule.tiles} tiles.")
    checked = _Checked(compiled)
    found = list(islice(Scheduler(compiled, schedule).instructions(), FIRST + 1))
    for instruction in found[:FIRST]:
        checked.act(instruction)
    if len(found) <= FIRST:
        checked.require_whole()


class _Checked:
    """Follows instructions by what is there and where it goes, without any tensor."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.there = set(range(len(stage.sources)))
        self.stored: dict[int, list[tuple[Interval, Interval]]] = {}

    def act(self, one: Instruction) -> None:
        self._require_read(*_reads(one))
        if isinstance(one, Take | Run | Patch):
            self._require_inside(one.kernel, one.rows, one.columns)
        elif isinstance(one, Store):
            if one.kernel.kind is Kind.ROWS:
                self._require_inside(one.kernel, one.rows, one.columns)
            self.stored.setdefault(one.home, []).append((one.rows, one.columns))
        if isinstance(one, Run | Patch):
            self.there.discard(one.over)
        if isinstance(one, Take | Join | Run | Patch | Finish):
            self.there.add(one.dst)
        elif isinstance(one, Open):
            self.there.add(one.memory)
        elif isinstance(one, Free):
            self.there -= set(one.registers)

    def require_whole(self) -> None:
        """Every output has all its rows and columns."""
        for kernel in self.stage.homes:
            pieces = self.stored.get(kernel.home, [])
            area = sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in set(pieces))
            whole = kernel.sizes[0] * kernel.sizes[1] if kernel.kind is Kind.ROWS else 0
            in_source = kernel in self.stage.sources
            if not in_source and (not pieces or area < whole):
                raise ExportError(f"a stored schedule leaves rows of {kernel.name} without values.")

    def _require_read(self, *registers: int) -> None:
        if not set(registers) <= self.there:
            raise ExportError("a stored schedule reads what has not been computed.")

    def _require_inside(self, kernel: Kernel, rows: Interval | None, columns: Interval | None) -> None:
        for given, size in zip((rows, columns), kernel.sizes, strict=True):
            if given is not None and not 0 <= given[0] <= given[1] <= size:
                raise ExportError(
                    f"a stored schedule reads or writes beyond the {size} rows or columns of {kernel.name}."
                )


def _reads(one: Instruction) -> tuple[int, ...]:
    if isinstance(one, Take | Store):
        return (one.src,)
    if isinstance(one, Join | Run | Reduce):
        return one.srcs
    if isinstance(one, Patch):
        return (one.over, *(part for part, _, _ in one.parts))
    return ()
