"""Tiled: a stage as a module of the graph, run piece by piece.

It holds the stage as a readable graph (``stage``) whose modules are the user's layers, and a `Schedule`. Instructions
are made once for each size of inputs and kept. In a graph that is exported, or where gradients are wanted, the same
instructions run without overwriting anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from splitfx.analysis.shapes import shapes
from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import Autocast, autocasts, exclusive
from splitfx.ir.graph import Staged, TensorSpec
from splitfx.ir.modes import module_has_mode
from splitfx.tiling.plan.instructions import (
    Schedule,
)
from splitfx.tiling.plan.replan import Goal, replanned
from splitfx.tiling.run.checkpoint import checkpointed
from splitfx.tiling.run.execution import Execution, Program
from splitfx.tiling.stage.compiling import compile_stage


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
        training = [name for name, m in self.stage.named_modules() if m.training and module_has_mode(m)]
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
            found = self._made(specs, self.schedule_for(specs) if replan else self.schedule, cast)
            if torch.compiler.is_exporting():
                return found  # what was made while torch traces does not outlive the trace
            if len(self._programs) > 8:
                self._programs.pop(next(iter(self._programs)))
            self._programs[key] = found
            return found

    def schedule_for(self, specs: tuple[TensorSpec, ...]) -> Schedule:
        """The schedule for inputs of these sizes."""
        if self.goal is None or self._strips or self.goal.fits(specs):
            return self.schedule
        if specs not in self._schedules:
            self._schedules[specs] = replanned(self.stage, specs, self.goal)
        return self._schedules[specs]

    def _made(self, specs: tuple[TensorSpec, ...], schedule: Schedule, cast: Autocast) -> Program:
        if self._strips and schedule.keeping.recompute < float("inf"):
            schedule = replace(schedule, keeping=replace(schedule.keeping, recompute=0.0))
        if self._strips and schedule.keeping.spill < float("inf"):
            schedule = replace(schedule, keeping=replace(schedule.keeping, spill=0.0))
        stage = compile_stage(self.stage, shapes(self.stage, specs, cast), schedule.keeping, autocast=cast)
        if self._strips and schedule.rows:
            schedule = replace(schedule, rows=max(1, min(schedule.rows, stage.clock // self._strips)))
        return Program(stage, schedule)
