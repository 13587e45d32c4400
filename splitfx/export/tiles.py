"""A tiled stage that no loop holds, as the steps of its schedule, written out for the traced sizes.

The steps are the instructions of the stage's schedule, coarser where they would be more than `LIMIT`. onnxruntime
orders nodes anew, and every Slice or Concat copies its piece and breaks the blocked layout in which its convolutions
are fast: such a file may hold more than the untiled one. `splitfx.export.loops` is the better form, where the
runtime runs it.

Refuses: a stage with more than `LIMIT` steps under every schedule (`ExportError`).
Promises: a file computes what the stage computes, and never holds more than `LIMIT` steps of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import annotate

from splitfx.analysis.shapes import shapes
from splitfx.errors import ExportError
from splitfx.ir import graph as graphs
from splitfx.tiling.plan.instructions import Instruction, Schedule
from splitfx.tiling.run.execution import Execution, Program
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.kernel import Stage

LIMIT = 3000  # instructions of one stage; the exporter takes about 20 ms for each


def is_tiled(module: nn.Module) -> bool:
    return any(isinstance(m, Tiled) for m in module.modules())


def write_out(graph: fx.GraphModule, key: str, why: str = "") -> list[str]:
    """Replace every `Tiled` of a private copy by its steps, which torch.export can follow; says what each became.

    ``key`` is the name under which nodes of the exported graph carry their layer; ``why``: why it is no loop. Raises
    `ExportError`.
    """
    said: list[str] = []
    if not is_tiled(graph):
        return said
    values = shapes(graph)
    for node in [n for n in graph.graph.nodes if isinstance(graphs.module_of(n), Tiled)]:
        tiled = graphs.module_of(node)
        assert isinstance(tiled, Tiled)
        held = [values[n] for n in node.all_input_nodes]
        specs = tuple(graphs.TensorSpec(tuple(map(int, t.shape)), t.dtype, str(t.device)) for t in held)
        program, words = _program(str(node.target), tiled, shapes(tiled.stage, specs))
        said.append(f"{node.target}: {words}{f'; no loop: {why}' if why else ''}")
        graphs.set_path(graph, str(node.target), Steps(tiled.stage, program, key).eval())
    return said


class Plain(nn.Module):
    """Runs a stage as it is, each node marked with its layer."""

    def __init__(self, stage: fx.GraphModule) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: torch.Tensor) -> Any:
        return fx.Interpreter(self.stage, garbage_collect_values=False).run(*inputs)


def untiled(graph: fx.GraphModule, key: str) -> dict[str, list[str]]:
    """Replace every `Tiled` of a private copy by its stage as it is; the layers of each, by its path."""
    found: dict[str, list[str]] = {}
    for path, tiled in [(p, m) for p, m in graph.named_modules() if isinstance(m, Tiled)]:
        for one in tiled.stage.graph.nodes:
            one.meta["custom"] = {key: graphs.layer(one)}
        found[path] = [graphs.layer(one) for one in tiled.stage.graph.nodes]
        graphs.set_path(graph, path, Plain(tiled.stage).eval())
    return found


# ---------------------------------------------------------------- steps


class Steps(nn.Module):
    """Runs a program without overwriting anything, each node marked with its layer."""

    def __init__(self, stage: fx.GraphModule, program: Program, key: str) -> None:
        super().__init__()
        self.stage, self.program, self.key = stage, program, key

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return _Marked(self.program, self.key).run(inputs)


class _Marked(Execution):
    def __init__(self, program: Program, key: str) -> None:
        super().__init__(program, functional=True)
        self.key = key

    def act(self, instruction: Instruction) -> None:
        kernel = getattr(instruction, "kernel", None)  # `Free` has none, and makes no node
        with annotate({self.key: graphs.layer(kernel.node)}) if kernel is not None else nullcontext():
            super().act(instruction)


def _program(path: str, tiled: Tiled, values: dict[fx.Node, Any]) -> tuple[Program, str]:
    """The stage's program under its schedule, or under the finest one that is not longer than `LIMIT`."""
    keeping = replace(tiled.schedule.keeping, spill=float("inf"))  # a runtime has no disk to spill to
    stage = compile_stage(tiled.stage, values, keeping)
    for schedule in _coarser(stage, tiled.schedule):
        program = Program(stage, schedule)
        count = sum(1 for _ in program.instructions())
        if count > LIMIT:
            continue
        words = f"{count} steps"
        if schedule != tiled.schedule:
            asked, taken = _words(tiled.schedule), _words(schedule)
            words += f", {taken} at a time instead of {asked}, which would be more than {LIMIT}"
        return program, words
    raise ExportError(
        f"{path} has more than {LIMIT} steps under every schedule; export the graph without the pass 'tile', or tile "
        "fewer layers with until=."
    )


def _coarser(stage: Stage, schedule: Schedule) -> Iterator[Schedule]:
    """The schedule, then ones with taller steps and fewer tiles."""
    yield schedule
    down, across = schedule.tiles
    while down > 2 or across > 2:
        down, across = max(down // 2, min(down, 2)), max(across // 2, min(across, 2))
        yield replace(schedule, tiles=(down, across))
    rows = schedule.rows
    while 0 < rows < stage.clock:
        rows *= 2
        yield replace(schedule, rows=rows, tiles=(1, 1), firing_intervals=())


def _words(schedule: Schedule) -> str:
    rows = f"{schedule.rows} rows" if schedule.rows else "whole tiles"
    return rows if schedule.tiles == (1, 1) else f"{rows}, {schedule.tiles[0]} x {schedule.tiles[1]} tiles,"
