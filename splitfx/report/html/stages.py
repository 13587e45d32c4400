"""What runs inside a tiled stage: for every layer the height of its strips and the memory that it holds, and the memory
of the whole stage over time. All of it is read off the instructions that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from splitfx.analysis import facts
from splitfx.analysis.cost import cost
from splitfx.compiler.sketch import Sketch, sketched
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import op_name
from splitfx.tiling.plan.instructions import Finish, Free, Open, Patch, Reduce, Run
from splitfx.tiling.plan.registers import Registers
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.executor import Tiled

POINTS = 600  # of a timeline that are kept


@dataclass(frozen=True)
class Strip:
    """One layer of a stage. ``rows`` of ``of`` are made at once, at most, in ``runs`` runs; ``held`` bytes of its rows
    are kept at once, at most. ``name``: of its node, as in the stage's sketches."""

    name: str
    layer: str
    op: str
    rows: int
    of: int
    runs: int
    held: int


@dataclass(frozen=True)
class StageDetail:
    """A tiled stage at its traced size. ``live``: bytes inside it over its instructions, and the layer that runs then,
    thinned, peaks kept. ``at_peak``: (layer, what of it, bytes) of what the stage holds where they are the most."""

    path: str
    rows: int
    tiles: tuple[int, int]
    peak_bytes: int
    sketches: tuple[Sketch, ...]
    strips: tuple[Strip, ...]
    live: tuple[tuple[int, str], ...]
    at_peak: tuple[tuple[str, str, int], ...]

    @property
    def how(self) -> str:
        """How it is run, in a few words: a step takes rows of the input, or a whole tile."""
        tiles = f"{self.tiles[0]} × {self.tiles[1]} tiles" if self.tiles != (1, 1) else ""
        return ", ".join(one for one in (f"{self.rows} rows a step" if self.rows else "", tiles) if one) or "whole"


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
        watch.see(one, scheduler.registers)
    strips = [
        Strip(k.node.name, layer(k.node), op_name(k.node), watch.rows[k], k.rows, watch.runs[k], watch.most.get(k, 0))
        for k in stage.kernels
        if k in watch.runs
    ]
    counted = cost(module.stage, stage.values)
    inner = sketched(module.stage, stage.values, counted, {})
    live, held = _thin(watch.live), tuple(watch.at_peak())
    return StageDetail(path, schedule.rows, schedule.tiles, program.peak, inner, tuple(strips), live, held)


class _Watch:
    """Counts what the layers hold while the instructions go by."""

    def __init__(self) -> None:
        self.rows: dict[Any, int] = {}
        self.runs: dict[Any, int] = {}
        self.most: dict[Any, int] = {}
        self.now: dict[Any, int] = {}
        self.owner: dict[int, tuple[Any, int]] = {}
        self.live: list[tuple[int, str]] = []
        self.peak: tuple[int, Any, dict[Any, int], int] = (0, None, {}, 0)  # bytes, kernel, what each holds, its own

    def see(self, one: Any, registers: Registers) -> None:
        most = registers.mark()
        if isinstance(one, Free):
            for register in one.registers:
                self._drop(register)
            return
        kernel = one.kernel
        self.live.append((most, layer(kernel.node)))
        self._hold(one, kernel, registers.bytes_of)
        if most > self.peak[0]:
            self.peak = most, kernel, dict(self.now), most - registers.live

    def at_peak(self) -> Iterator[tuple[str, str, int]]:
        """What is held where it is the most: rows of layers, and what the one that runs needs meanwhile."""
        _, running, held, extra = self.peak
        for kernel, count in held.items():
            if count:
                yield layer(kernel.node), op_name(kernel.node), count
        if extra > 0:
            yield layer(running.node), f"{op_name(running.node)}, while it runs", extra

    def _hold(self, one: Any, kernel: Any, bytes_of: Callable[[int], int | None]) -> None:
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


def _thin(values: list[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """At most `POINTS` of a timeline: the highest of every part, so that peaks stay."""
    step = -(-len(values) // POINTS)
    return tuple(max(values[i : i + step]) for i in range(0, len(values), step)) if values else ()
