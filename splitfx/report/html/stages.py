"""What runs inside a tiled stage: for every layer the height of its strips and the memory that it holds, and the memory
of the whole stage over time. All of it is read off the instructions that run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from splitfx.analysis import facts
from splitfx.analysis.cost import cost
from splitfx.compiler.sketch import Sketch, sketched
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import op_name
from splitfx.tiling.plan.instructions import Finish, Free, Open, Patch, Reduce, Run
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.executor import Tiled

POINTS = 600  # of a timeline that are kept


@dataclass(frozen=True)
class Strip:
    """One layer of a stage. ``rows`` of ``of`` are made at once, at most, in ``runs`` runs; ``held`` bytes of its rows
    are kept at once, at most."""

    layer: str
    op: str
    rows: int
    of: int
    runs: int
    held: int


@dataclass(frozen=True)
class StageDetail:
    """A tiled stage at its traced size. ``live``: bytes inside it over its instructions, thinned, peaks kept."""

    path: str
    how: str
    peak_bytes: int
    sketches: tuple[Sketch, ...]
    strips: tuple[Strip, ...]
    live: tuple[int, ...]


def stage_details(graph: fx.GraphModule) -> dict[str, StageDetail]:
    """Every tiled stage of a graph by its path."""
    return dict(_details(graph))


def _details(graph: fx.GraphModule) -> Iterator[tuple[str, StageDetail]]:
    shapes = facts(graph).shapes
    for node in graph.graph.nodes:
        module = module_of(node)
        if isinstance(module, Tiled):
            yield layer(node), _detail(layer(node), module, tuple(shapes[n] for n in node.all_input_nodes))


def _detail(path: str, module: Tiled, given: tuple[Any, ...]) -> StageDetail:
    program = module.program(given)
    stage, schedule = program.stage, program.schedule
    scheduler = Scheduler(stage, schedule)
    watch = _Watch()
    for one in scheduler.instructions():
        watch.see(one, scheduler.registers.bytes_of, scheduler.registers.live)
    strips = [
        Strip(layer(k.node), op_name(k.node), watch.rows[k], k.rows, watch.runs[k], watch.most.get(k, 0))
        for k in stage.kernels
        if k in watch.runs
    ]
    counted = cost(module.stage, stage.values)
    how = f"{schedule.rows} rows of the input at a time" if schedule.rows else "whole tiles"
    if schedule.tiles != (1, 1):
        how += f", in {schedule.tiles[0]} × {schedule.tiles[1]} tiles"
    return StageDetail(
        path, how, program.peak, sketched(module.stage, stage.values, counted, {}), tuple(strips), _thin(watch.live)
    )


class _Watch:
    """Counts what the layers hold while the instructions go by."""

    def __init__(self) -> None:
        self.rows: dict[Any, int] = {}
        self.runs: dict[Any, int] = {}
        self.most: dict[Any, int] = {}
        self.now: dict[Any, int] = {}
        self.owner: dict[int, tuple[Any, int]] = {}
        self.live: list[int] = []

    def see(self, one: Any, bytes_of: Any, live: int) -> None:
        self.live.append(live)
        if isinstance(one, Free):
            for register in one.registers:
                self._drop(register)
            return
        kernel = one.kernel
        if getattr(one, "over", -1) >= 0:
            self._drop(one.over)
        register = one.memory if isinstance(one, Open) else getattr(one, "dst", None)
        if register is not None and (held := bytes_of(register)):
            self.owner[register] = kernel, held
            self.now[kernel] = self.now.get(kernel, 0) + held
            self.most[kernel] = max(self.most.get(kernel, 0), self.now[kernel])
        if isinstance(one, Run | Patch | Finish | Reduce):
            first, last = getattr(one, "rows", (0, 0))
            self.rows[kernel] = max(self.rows.get(kernel, 0), last - first)
            self.runs[kernel] = self.runs.get(kernel, 0) + 1

    def _drop(self, register: int) -> None:
        kernel, held = self.owner.pop(register, (None, 0))
        if kernel is not None:
            self.now[kernel] -= held


def _thin(values: list[int]) -> tuple[int, ...]:
    """At most `POINTS` of a timeline: the highest of every part, so that peaks stay."""
    step = -(-len(values) // POINTS)
    return tuple(max(values[i : i + step]) for i in range(0, len(values), step)) if values else ()
