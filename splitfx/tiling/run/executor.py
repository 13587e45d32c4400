"""Tiled: a stage as a module of the graph, run piece by piece.

It holds the stage as a readable graph (``stage``) whose modules are the user's layers, and a `Schedule`. Instructions
are made once for each size of inputs and kept. In a graph that is exported, or where gradients are wanted, the same
instructions run without overwriting anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from splitfx.analysis.shapes import shapes
from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import Autocast, autocasts, exclusive
from splitfx.ir.graph import Staged, TensorSpec
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
from splitfx.tiling.plan.stage import Kernel, Kind, Stage, compile_stage, overwriting
from splitfx.tiling.run.kernels import Calls
from splitfx.tiling.run.reductions import Reduction

if TYPE_CHECKING:
    from splitfx.tiling.plan.replan import Goal

KEPT = 20_000  # instructions of one input size that are kept; longer lists are made anew at every call


class Program:
    """A stage at one size of its inputs: kernels and the instructions that run them."""

    def __init__(self, stage: Stage, schedule: Schedule) -> None:
        self.stage, self.schedule, self.calls = stage, schedule, Calls(stage)
        self._kept: list[Instruction] | None = None
        counted = Scheduler(stage, schedule)
        found: list[Instruction] = []
        for instruction in counted.instructions():
            if len(found) <= KEPT:
                found.append(instruction)
        self.peak, self.binding, self.firings = counted.peak, counted.binding, counted.firings
        if len(found) <= KEPT:
            self._kept = found

    def instructions(self) -> Iterable[Instruction]:
        return self._kept if self._kept is not None else Scheduler(self.stage, self.schedule).instructions()


class Tiled(Staged):
    """Runs a stage of the network piece by piece; the same function as ``stage``, at a lower peak of memory.

    Inputs and outputs are those of ``stage``, which returns a list. Any sizes that the stage accepts; raises
    `UnsupportedError` while a norm or dropout inside is in train mode, and for inputs that do not fit.

    With a ``goal`` the schedule is for the inputs that were planned for; for others it is planned again, once for each
    size (`splitfx.tiling.plan.replan`).

    Threads may call it at once, at equal and at other sizes: what a call needs is its own, and planning waits for its
    turn. Under autocast the types are those of ``stage`` under autocast.

    Results own memory of exactly their size, in the default memory format. ``torch.compile`` of a graph that holds
    this breaks the graph here: the pieces run as they do without it, in all else it compiles. ``torch.export`` writes
    the instructions out for the sizes that it is given, so those are fixed.
    """

    op_name = "tiled"

    def __init__(self, stage: fx.GraphModule, schedule: Schedule, goal: Goal | None = None) -> None:
        super().__init__()
        self.stage = stage
        self.schedule = schedule
        self.goal = goal
        self.checkpoint = False
        self._strips = 0  # at least so many steps, whatever the schedule says
        self._programs: dict[Any, Program] = {}
        self._schedules: dict[Any, Schedule] = {}  # for sizes that were not planned for
        self._keep_transient()

    def _keep_transient(self) -> None:
        """fx registers every buffer that it copies as persistent."""
        for node in self.stage.graph.nodes:
            if node.op == "get_attr" and node.meta.get("transient"):
                parent, _, name = str(node.target).rpartition(".")
                self.stage.get_submodule(parent)._non_persistent_buffers_set.add(name)

    def extra_repr(self) -> str:
        return repr(self.schedule)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": {}, "_schedules": dict(self._schedules)}  # threads may add to them

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_transient()

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        training = [name for name, m in self.stage.named_modules() if m.training and acts_in_training(m)]
        if training:
            raise UnsupportedError(
                f"the tiled stage holds {training[0]} in train mode, which reads the whole map at once: call "
                "model.eval(), or put this layer into eval mode (frozen norms train well)"
            )
        if torch.compiler.is_dynamo_compiling():  # it would compile every piece anew
            alone: Any = torch.compiler.disable(self._run)
            return alone(*inputs)
        return self._run(*inputs)

    def _run(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        if self.checkpoint and torch.is_grad_enabled():
            from splitfx.tiling.run.checkpoint import checkpointed

            return checkpointed(self, inputs)
        functional = torch.is_grad_enabled() or torch.compiler.is_exporting()
        return Execution(self.program(inputs), functional).run(inputs)

    @contextmanager
    def in_strips(self, count: int) -> Iterator[None]:
        """Within, every run has at least ``count`` steps and computes twice whatever the schedule computes twice: for
        an oracle whose inputs are smaller than the ones that were planned for."""
        self._strips = count
        try:
            yield
        finally:
            self._strips = 0

    def program(self, inputs: Sequence[torch.Tensor], replan: bool = True) -> Program:
        """The instructions for inputs of these sizes; without ``replan`` those of the schedule at any size."""
        sizes = tuple((tuple(int(s) for s in t.shape), t.dtype, t.device) for t in inputs)
        cast = autocasts()
        key = (self._strips, replan, cast, sizes)
        found = self._programs.get(key)
        if found is not None:
            return found
        with exclusive():
            found = self._programs.get(key)  # another thread may have been here first
            if found is not None:
                return found
            specs = tuple(TensorSpec(s, d, str(v)) for s, d, v in sizes)
            found = self._made(specs, self._schedule_for(specs) if replan else self.schedule, cast)
            if torch.compiler.is_exporting():
                return found  # what was made while torch traces does not outlive the trace
            if len(self._programs) > 8:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = found
            return found

    def _schedule_for(self, specs: tuple[TensorSpec, ...]) -> Schedule:
        if self.goal is None or self._strips or self.goal.fits(specs):
            return self.schedule
        if specs not in self._schedules:
            from splitfx.tiling.plan.replan import replanned

            self._schedules[specs] = replanned(self.stage, specs, self.goal)
        return self._schedules[specs]

    def _made(self, specs: tuple[TensorSpec, ...], schedule: Schedule, cast: Autocast) -> Program:
        if self._strips and schedule.recompute < float("inf"):
            schedule = replace(schedule, recompute=0.0)
        stage = compile_stage(self.stage, shapes(self.stage, specs, cast), schedule.recompute)
        if self._strips and schedule.rows:
            schedule = replace(schedule, rows=max(1, min(schedule.rows, stage.clock // self._strips)))
        return Program(stage, schedule)


def acts_in_training(module: nn.Module) -> bool:
    from splitfx.compiler.oracle import module_has_mode

    return module_has_mode(module)


class Execution:
    """One run of a program on tensors. ``functional``: nothing is overwritten, for autograd and export."""

    def __init__(self, program: Program, functional: bool) -> None:
        self.program, self.stage, self.functional = program, program.stage, functional
        self.registers: dict[int, torch.Tensor] = {}
        self.wholes: dict[Kernel, int] = {}
        self.reductions: dict[Kernel, Reduction] = {}
        self.results: dict[int, torch.Tensor] = {}
        self.pieces: dict[int, list[tuple[Any, Any, torch.Tensor]]] = {}

    def run(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        for place, (kernel, tensor) in enumerate(zip(self.stage.sources, inputs, strict=True)):
            self.registers[place] = tensor
            self.wholes[kernel] = place
        for instruction in self.program.instructions():
            self.act(instruction)
        return [self._result(k) for k in self.stage.exits]

    def act(self, instruction: Instruction) -> None:
        _ACTIONS[type(instruction)](self, instruction)

    def _result(self, kernel: Kernel) -> torch.Tensor:
        if kernel.exit in self.results:
            return self.results[kernel.exit]
        assert kernel.dims is not None
        if kernel.users and self.program.schedule.tiles != (1, 1):  # tiles of it overlap: what is read in them
            found = self.results[kernel.exit] = self._canvas(kernel)
            return found
        bands: dict[Any, list[torch.Tensor]] = {}
        for _, columns, piece in self.pieces[kernel.exit]:
            bands.setdefault(columns, []).append(piece)
        joined = [_cat(pieces, kernel.dims[0]) for pieces in bands.values()]
        found = self.results[kernel.exit] = _cat(joined, kernel.dims[1])
        return found

    def _canvas(self, kernel: Kernel) -> torch.Tensor:
        """The pieces of an output that are there, each in its place."""
        assert kernel.dims is not None
        pieces, (h, w) = self.pieces[kernel.exit], kernel.dims
        found = pieces[0][2].new_zeros(tuple(self.stage.values[kernel.node].shape))
        for rows, columns, piece in pieces:
            found.narrow(h, rows[0], rows[1] - rows[0]).narrow(w, columns[0], columns[1] - columns[0]).copy_(piece)
        return found

    # ------------------------------------------------------------ instructions

    def take(self, one: Take) -> None:
        x, dims = self.registers[one.src], one.kernel.dims
        assert dims is not None
        if one.rows is not None:
            x = x.narrow(dims[0], one.rows[0], one.rows[1] - one.rows[0])
        if one.columns is not None:
            x = x.narrow(dims[1], one.columns[0], one.columns[1] - one.columns[0])
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
            overwriting(node)(base.narrow(dims[0], first, count), self.registers[part])
        self.registers[one.dst] = base

    def open(self, one: Open) -> None:
        if self.functional:
            return
        value = self.stage.values[one.kernel.node]
        like = next(iter(self.registers.values()))
        self.results[one.exit] = torch.empty(tuple(value.shape), dtype=value.dtype, device=like.device)
        self.registers[-1 - one.exit] = self.results[one.exit]

    def store(self, one: Store) -> None:
        kernel, piece = one.kernel, self.registers[one.src]
        if kernel.dims is None:
            self.results[one.exit] = piece
        elif self.functional:
            self.pieces.setdefault(one.exit, []).append((one.rows, one.columns, piece))
            self.registers[-1 - one.exit] = self._so_far(one)
        else:
            place = self.results[one.exit].narrow(kernel.dims[0], one.rows[0], one.rows[1] - one.rows[0])
            place = place.narrow(kernel.dims[1], one.columns[0], one.columns[1] - one.columns[0])
            place.copy_(piece)

    def _so_far(self, one: Store) -> torch.Tensor:
        """An output that kernels of the stage read again, as far as it is there."""
        if not one.kernel.users:
            return self.registers[one.src]
        assert one.kernel.dims is not None
        if self.program.schedule.tiles != (1, 1):
            return self._canvas(one.kernel)
        return _cat([piece for _, _, piece in self.pieces[one.exit]], one.kernel.dims[0])

    def reduce(self, one: Reduce) -> None:
        if one.kernel not in self.reductions:
            self.reductions[one.kernel] = Reduction(one.kernel, self.stage)
        self.reductions[one.kernel].add(self.registers[one.src])

    def finish(self, one: Finish) -> None:
        kernel = one.kernel
        if kernel.kind is Kind.REDUCE:
            found = self.reductions.pop(kernel).value()
        else:
            wholes = [self.registers[self.wholes[k]] for k in kernel.takes]
            run = Run(one.dst, kernel, (), (), (), (0, 0), (0, 0), -1)
            found = self.program.calls[kernel](run, (), wholes)
        self.registers[one.dst] = found
        self.wholes[kernel] = one.dst

    def free(self, one: Free) -> None:
        for register in one.registers:
            self.registers.pop(register, None)


def _cat(pieces: list[torch.Tensor], dim: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


_ACTIONS: dict[type, Any] = {
    Take: Execution.take,
    Join: Execution.join,
    Run: Execution.compute,
    Patch: Execution.patch,
    Open: Execution.open,
    Store: Execution.store,
    Reduce: Execution.reduce,
    Finish: Execution.finish,
    Free: Execution.free,
}
