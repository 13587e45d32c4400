"""Execution: the instructions of a stage, acted out on tensors.

One run-time for eager calls, export, streaming and the bands of a backward pass: those that take or store pieces in
another way override the method of that instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch

from splitfx.ir.ops import out_of_place
from splitfx.tiling.plan.instructions import (
    Finish,
    Free,
    Instruction,
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
from splitfx.tiling.run.kernels import Calls
from splitfx.tiling.run.reductions import Reduction, reduction_of
from splitfx.tiling.run.spill import Spilled
from splitfx.tiling.stage.kernel import Kernel, Stage, overwriting
from splitfx.tiling.stage.roles import Kind

KEPT = 20_000  # instructions of one input size that are kept; longer lists are made anew at every call


class Program:
    """A stage at one size of its inputs: kernels and the instructions that run them, as a ``scheduler`` makes them."""

    def __init__(
        self, stage: Stage, schedule: Schedule, scheduler: Callable[[Stage, Schedule], Scheduler] = Scheduler
    ) -> None:
        self.stage, self.schedule, self.calls = stage, schedule, Calls(stage)
        self._scheduler, self._kept = scheduler, cast(list[Instruction] | None, None)
        counted = scheduler(stage, schedule)
        found = list(islice(counted.instructions(), KEPT + 1))
        if len(found) <= KEPT:
            self._kept = found
        else:
            counted = scheduler(stage, schedule).count()
        self.peak, self.binding = counted.registers.peak, counted.registers.binding
        self.firings = counted.calls

    def instructions(self) -> Iterable[Instruction]:
        return self._kept if self._kept is not None else self._scheduler(self.stage, self.schedule).instructions()


class Execution:
    """One run of a program on tensors. ``functional``: nothing is overwritten, for autograd and export."""

    def __init__(self, program: Program, functional: bool) -> None:
        self.program, self.stage, self.functional = program, program.stage, functional
        self.registers: dict[int, torch.Tensor] = {}
        self.wholes: dict[Kernel, int] = {}
        self.reductions: dict[Kernel, Reduction] = {}
        self.results: dict[int, torch.Tensor] = {}
        self.pieces: dict[int, list[tuple[Any, Any, torch.Tensor]]] = {}
        self.spilled: dict[int, Spilled] = {}  # by register

    def run(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        for place, (kernel, tensor) in enumerate(zip(self.stage.sources, inputs, strict=True)):
            self.registers[place] = tensor
            self.wholes[kernel] = place
        for instruction in self.program.instructions():
            self.act(instruction)
        return [self._result(k) for k in self.stage.exits]

    def act(self, instruction: Instruction) -> None:
        getattr(self, _ACTIONS[type(instruction)])(instruction)

    def _result(self, kernel: Kernel) -> torch.Tensor:
        if kernel.exit not in self.results:
            self.results[kernel.exit] = self._joined(kernel)
        return self.results[kernel.exit]

    def _joined(self, kernel: Kernel) -> torch.Tensor:
        """A value of which the pieces are there."""
        assert kernel.dims is not None
        if kernel.users and self.program.schedule.tiles != (1, 1):  # tiles of it overlap: what is read in them
            return self._canvas(kernel)
        bands: dict[Any, list[torch.Tensor]] = {}
        for _, columns, piece in self.pieces[kernel.home]:
            bands.setdefault(columns, []).append(piece)
        joined = [_cat(pieces, kernel.dims[0]) for pieces in bands.values()]
        return _cat(joined, kernel.dims[1])

    def _canvas(self, kernel: Kernel) -> torch.Tensor:
        """The pieces of an output that are there, each in its place."""
        assert kernel.dims is not None
        pieces = self.pieces[kernel.home]
        found = pieces[0][2].new_zeros(tuple(self.stage.values[kernel.node].shape))
        for rows, columns, piece in pieces:
            kernel.cut(found, rows, columns).copy_(piece)
        return found

    # ------------------------------------------------------------ instructions

    def take(self, one: Take) -> None:
        if one.src in self.spilled:
            self.registers[one.dst] = self.spilled[one.src].read(one.rows, one.columns)
            return
        x = one.kernel.cut(self.registers[one.src], one.rows, one.columns)
        self.registers[one.dst] = x.clone() if one.copy and not self.functional else x

    def join(self, one: Join) -> None:
        assert one.kernel.dims is not None
        self.registers[one.dst] = torch.cat([self.registers[s] for s in one.srcs], one.kernel.dims[0])

    def compute(self, one: Run) -> None:
        pieces = [self.registers[s] for s in one.srcs]
        wholes = [self.registers[self.wholes[k]] for k in one.kernel.takes]
        y = self.program.calls[one.kernel](one if not self.functional else replace(one, over=-1), pieces, wholes)
        if one.over >= 0:
            del self.registers[one.over]
        self.registers[one.dst] = y

    def patch(self, one: Patch) -> None:
        node, dims = one.kernel.node, one.kernel.dims
        assert dims is not None
        base = self.registers.pop(one.over)
        if self.functional:
            other = _cat([self.registers[part] for part, _, _ in one.parts], dims[0])
            given = (base, other) if one.place == 0 else (other, base)
            self.registers[one.dst] = out_of_place(node.target)(*given)
            return
        for part, first, count in one.parts:
            overwriting(node)(one.kernel.cut(base, (first, first + count)), self.registers[part])
        self.registers[one.dst] = base

    def open(self, one: Open) -> None:
        if self.functional:
            return
        value = self.stage.values[one.kernel.node]
        like = next(iter(self.registers.values()))
        if one.kernel.spilled:
            self.spilled[one.memory] = Spilled(one.kernel, value, like.device)
            return
        self.registers[one.memory] = torch.empty(tuple(value.shape), dtype=value.dtype, device=like.device)
        self._keep(one.kernel, one.memory)

    def _keep(self, kernel: Kernel, memory: int) -> None:
        """Where a value will be found that has a memory of its own."""
        if kernel.exit >= 0:
            self.results[kernel.exit] = self.registers[memory]
        self.wholes[kernel] = memory

    def store(self, one: Store) -> None:
        kernel, piece = one.kernel, self.registers[one.src]
        if kernel.kind is not Kind.ROWS:
            self.results[one.home] = piece
        elif self.functional:
            self.pieces.setdefault(one.home, []).append((one.rows, one.columns, piece))
            self.registers[one.memory] = self._so_far(one)
            self.wholes[kernel] = one.memory
        elif one.memory in self.spilled:
            self.spilled[one.memory].write(piece, one.rows)
        else:
            kernel.cut(self.registers[one.memory], one.rows, one.columns).copy_(piece)

    def _so_far(self, one: Store) -> torch.Tensor:
        """A whole value that kernels of the stage read again, as far as it is there."""
        kernel, last = one.kernel, one.rows[1] == one.kernel.rows
        at_once = kernel.users and not kernel.spilled
        if not at_once and not (last and (kernel.takers or kernel.spilled)):
            return self.registers[one.src]
        assert one.kernel.dims is not None
        if self.program.schedule.tiles != (1, 1):
            return self._canvas(one.kernel)
        return _cat([piece for _, _, piece in self.pieces[one.home]], one.kernel.dims[0])

    def reduce(self, one: Reduce) -> None:
        if one.kernel not in self.reductions:
            self.reductions[one.kernel] = reduction_of(one.kernel, self.stage)
        self.reductions[one.kernel].add(*(self.registers[src] for src in one.srcs))

    def finish(self, one: Finish) -> None:
        kernel = one.kernel
        if kernel.kind is Kind.REDUCE:
            found = self.reductions.pop(kernel).value()
        else:
            wholes = [self.registers[self.wholes[k]] for k in kernel.takes]
            run = Run(one.dst, kernel, (), (), (), (0, 0), (0, 0), -1)
            found = self.program.calls[kernel](run, (), wholes)
            if kernel.exit >= 0 and kernel.lies_in is not None:  # results own their memory
                found = found.clone(memory_format=torch.contiguous_format)
        self.registers[one.dst] = found
        self.wholes[kernel] = one.dst

    def free(self, one: Free) -> None:
        for register in one.registers:
            self.registers.pop(register, None)
            self.spilled.pop(register, None)


def _cat(pieces: list[torch.Tensor], dim: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


# By name, so that a class that acts in another way has its own methods called.
_ACTIONS: dict[type, str] = {
    Take: "take",
    Join: "join",
    Run: "compute",
    Patch: "patch",
    Open: "open",
    Store: "store",
    Reduce: "reduce",
    Finish: "finish",
    Free: "free",
}
