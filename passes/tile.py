"""Tile: the memory-hungry part of a network runs piece by piece, with the same output.

`stream` feeds rows and keeps line buffers, so nothing is computed twice and the depth of the cut is free; `grid` cuts
the result into tiles and computes their halos again. A byte budget is enough: the planner finds the schedule that runs
fastest within it, and the least feasible budget is named where it cannot be met. Everything up to the first operations
that read whole maps is one stage; what lies behind them stays as it is. See `splitfx.tiling`.

Promise EQUAL, for a model in eval mode. `TileZeroHalo` is the approximate split, a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import fx

from splitfx.analysis import Facts
from splitfx.compiler import options
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.errors import PlanError, nearest
from splitfx.ground import limits
from splitfx.ground.amounts import bytes_text, parse_bytes, share
from splitfx.ground.table import size as words
from splitfx.ir.editing import tidy
from splitfx.ir.graph import TensorSpec, copy_graph, layer, module_of
from splitfx.ir.ops import op_name
from splitfx.text import shown
from splitfx.tiling.plan import planner
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.planner import Candidates
from splitfx.tiling.plan.replan import HALF, Goal, sizes_of
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import sources_of, stages
from splitfx.tiling.stage.kernel import Keeping, Spill
from splitfx.tiling.stage.roles import Kind

Nodes = list[fx.Node]


@dataclass(frozen=True)
class TileStage:
    """How one stage runs; every field as the option of `Tile` of that name. ``as_it_is``: it is not tiled. ``keep``:
    the bytes of maps that may wait in memory, where others are spilled (-1: all)."""

    rows: int = 0
    grid: tuple[int, int] = (1, 1)
    recompute: int = -1
    firing_intervals: tuple[int, ...] = ()
    as_it_is: bool = False
    keep: int = -1

    def __post_init__(self) -> None:
        options.normalise(self, "pass 'tile': {} of a stage")
        of = f"the stage {shown(options.changed(self))}: "
        _check_counts(self.rows, self.grid, self.recompute, self.firing_intervals, of)
        _check_bytes("keep", self.keep, of)
        if self.as_it_is and len(options.changed(self)) > 1:
            raise PlanError(
                "pass 'tile': a stage that stays as_it_is has no rows, grid, recompute, firing_intervals or keep"
            )

    @classmethod
    def of(cls, schedule: Schedule | None) -> Self:
        """The entry of a plan for a schedule; None: the stage stays as it is."""
        if schedule is None:
            return cls(as_it_is=True)
        recompute, keep = (
            -1 if n == float("inf") else int(n) for n in (schedule.keeping.recompute, schedule.keeping.spill)
        )
        return cls(schedule.rows, schedule.tiles, recompute, schedule.firing_intervals, keep=keep)

    def schedule(self, spill: Spill = "") -> Schedule | None:
        """``spill``: as the option of `Tile`. Raises `PlanError` where it is empty and the stage needs it."""
        if self.as_it_is:
            return None
        if self.keep >= 0 and not spill:
            raise PlanError(
                "pass 'tile': a stage with keep spills the other maps: say where to, spill='disk' or 'host'"
            )
        recompute, keep = (float("inf") if n < 0 else float(n) for n in (self.recompute, self.keep))
        return Schedule(
            self.rows, self.firing_intervals, self.grid, Keeping(recompute, keep, spill if self.keep >= 0 else "")
        )


@dataclass(frozen=True)
class Tile(Pass):
    """Run the network piece by piece below a budget of memory, with the same output.

    ``budget``: the most bytes of live tensors, inputs counted and parameters not, as a number or as in "64 MiB"; a
    share of what the model takes now, as in "0.5x"; "least" for the least possible; empty: half of what the model
    takes now, or the least that is possible. ``mode``: "stream" keeps line buffers, "grid" computes halos twice,
    "auto" lets the planner choose. ``until``: the last layer that is tiled; empty: the planner chooses.

    Instead of a budget, by hand: ``rows``: the height of a strip, the input rows of a step. ``firing_intervals``: the
    steps between two firings of each group of layers. ``grid``: rows and columns of tiles. ``recompute``: the bytes of
    maps that may wait for a reduction; where there are more, some are computed twice instead of being kept (-1: never).

    ``spill``: maps that wait for a reduction (the statistics of a norm, say) may go elsewhere meanwhile, where the
    budget asks for it: "host" is the memory beside a GPU, "disk" a file in the folder of temporary files (``TMPDIR``)
    that is gone when it has been read. Given by hand, all of them do. Where gradients are wanted nothing is spilled.

    ``checkpoint``: where gradients are wanted, pieces are computed again in the backward pass instead of keeping
    their activations; norms and dropout inside must be in eval mode.

    Of a volume, [N, C, D, H, W], rows lie along D and columns along H; W is whole in every piece.

    The budget holds at other sizes than the traced too: there a stage is planned again when it is first called, and a
    warning says what it takes where the budget cannot be met.

    ``stages``: what the planner decided for the traced sizes, an entry for each stage, so that a saved plan gives the
    same graph.
    """

    name: ClassVar[str] = "tile"
    promise: ClassVar[Promise] = Promise.EQUAL
    needs_eval: ClassVar[bool] = True
    writes_weights: ClassVar[bool] = False

    budget: int | str = ""
    mode: Literal["auto", "stream", "grid"] = "auto"
    until: str = ""
    rows: int = 0
    grid: tuple[int, int] = (1, 1)
    firing_intervals: tuple[int, ...] = ()
    recompute: int = -1
    checkpoint: bool = False
    spill: Spill = ""
    stages: tuple[TileStage, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.budget, int):
            object.__setattr__(self, "budget", bytes_text(self.budget))
        if self.budget and self.budget != "least" and self._share is None:
            parse_bytes(str(self.budget))
        _check_counts(self.rows, self.grid, self.recompute, self.firing_intervals)
        if self.by_hand and (self.budget or self.stages):
            raise PlanError("pass 'tile': give a budget, or rows and grid by hand, not both")
        if self.by_hand and self.mode != "auto":
            raise PlanError("pass 'tile': mode tells the planner what to look for; rows and grid by hand leave nothing")
        if not self.by_hand and (self.firing_intervals or self.recompute != -1):
            raise PlanError(
                "pass 'tile': firing_intervals and recompute go with rows or grid; with a budget the planner sets them"
            )

    @property
    def by_hand(self) -> bool:
        return self.rows > 0 or self.grid != (1, 1)

    @property
    def _share(self) -> float | None:
        """The budget as a share of what the model takes now; None where it is none."""
        return share(str(self.budget)) or None

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        if self._share is not None:  # of this graph: the resolved plan holds the bytes
            count = max(1, int(self._share * facts.memory.peak_bytes))
            return replace(self, budget=bytes_text(count)).run(graph, facts)
        self._require_place(facts)
        found, roles = stages(graph, facts.regions)
        if self.until:
            found = _until(found, self.until)
        notes = list(_whole(graph, roles.why, {n for nodes in found for n in nodes}))
        if not found:
            why = next((f" ({reason})" for reason in roles.why.values() if reason), "")
            nothing = f"no layer works on rows of a map: nothing to tile{why}"
            return Outcome((*notes, Note("model", nothing, "declined")))
        decided = self._decided(graph, facts, found)
        for number, (nodes, (schedule, note)) in enumerate(zip(found, decided, strict=True), 1):
            where = f"{layer(nodes[0])} to {layer(nodes[-1])}"
            notes.append(Note(where, note, "did" if schedule is not None else "info"))
            if schedule is not None:
                name = "tiled" if len(found) == 1 else f"tiled_{number}"
                goal = None if self.by_hand else self._goal(graph, facts, nodes)
                tiled = module_of(install(graph, nodes, schedule, name, goal))
                tiled.checkpoint = self.checkpoint  # type: ignore[union-attr]
        if self.by_hand:
            return Outcome(tuple(notes))
        resolved = replace(self, stages=tuple(TileStage.of(schedule) for schedule, _ in decided))
        return Outcome(tuple(notes), resolved=None if resolved == self else resolved)

    def _require_place(self, facts: Facts) -> None:
        """Raise `PlanError` where there is no other memory than the one that is to be spared."""
        devices = {value.device.type for value in facts.shapes.values() if isinstance(value, torch.Tensor)}
        if self.spill == "host" and devices <= {"cpu", "meta"}:
            raise PlanError("pass 'tile': spill='host' spares the memory of a GPU; on a CPU use spill='disk'")

    def _candidates(self, graph: fx.GraphModule, facts: Facts, nodes: Nodes) -> Candidates:
        return Candidates(graph, facts, nodes, spill=self.spill)

    def _goal(self, graph: fx.GraphModule, facts: Facts, nodes: Nodes) -> Goal:
        sizes = sizes_of(tuple(_spec(facts.shapes[n]) for n in sources_of(nodes)))
        return Goal(str(self.budget) or HALF, self.mode, sizes, planner.around(graph, facts, nodes), self.spill)

    def _decided(self, graph: fx.GraphModule, facts: Facts, found: list[Nodes]) -> list[tuple[Schedule | None, str]]:
        """For each stage its schedule, None where it stays as it is, and what a note says."""
        if self.stages:
            if len(self.stages) != len(found):
                raise PlanError(
                    f"pass 'tile': the plan was made for {len(self.stages)} stages, this model has {len(found)}: leave "
                    "`stages` out and give a budget"
                )
            schedules = [one.schedule(self.spill) for one in self.stages]
            for nodes, schedule in zip(found, schedules, strict=True):
                _check_grid(Candidates(graph, facts, nodes), schedule.tiles if schedule is not None else (1, 1))
            return [(one, _how(one)) for one in schedules]
        if self.by_hand:
            keep = 0 if self.spill else -1
            schedule = TileStage(self.rows, self.grid, self.recompute, self.firing_intervals, keep=keep).schedule(
                self.spill
            )
            for nodes in found:
                _check_grid(Candidates(graph, facts, nodes), self.grid)
            return [(schedule, _how(schedule)) for _ in found]
        if self.budget and self.budget != "least":
            return self._within(graph, facts, found, parse_bytes(str(self.budget)))
        decided = []
        for nodes in found:
            candidates = self._candidates(graph, facts, nodes)
            goal = (
                candidates.untiled().peak_bytes
                if self.budget
                else min(facts.memory.peak_bytes // 2, candidates.untiled().peak_bytes)
            )
            plan = planner.least(candidates, self.mode) if self.budget else planner.half(candidates, goal, self.mode)
            decided.append((plan.schedule, plan.words()))
        return decided

    def _within(
        self, graph: fx.GraphModule, facts: Facts, found: list[Nodes], budget: int
    ) -> list[tuple[Schedule | None, str]]:
        tall = _tallest(graph, facts, {n for nodes in found for n in nodes})
        if tall is not None and tall[1] > budget:
            tall = _tallest(*_apart(graph, found))  # what no map is needed for runs before there are maps
        if tall is not None and tall[1] > budget:
            least = [
                planner.least(self._candidates(graph, facts, nodes), self.mode).point.peak_bytes for nodes in found
            ]
            raise PlanError(
                f"pass 'tile': a budget of {words(budget)} cannot be met: the least is "
                f"{planner.enough(max(tall[1], *least))}; {layer(tall[0])} ({op_name(tall[0])}) needs "
                f"{words(tall[1])} and reads whole maps, so it is not tiled"
            )
        plans = [planner.plan(self._candidates(graph, facts, nodes), budget, self.mode) for nodes in found]
        return [(plan.schedule, plan.words()) for plan in plans]


def _tallest(graph: fx.GraphModule, facts: Facts, inside: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """Of the nodes outside the stages, the one where most bytes are alive, and how many."""
    live = facts.memory.live_bytes
    whole = [n for n in graph.graph.nodes if n not in inside and n.op not in ("placeholder", "get_attr", "output")]
    tall = max(whole, key=live.__getitem__, default=None)
    return (tall, live[tall]) if tall is not None else None


def _apart(graph: fx.GraphModule, found: list[Nodes]) -> tuple[fx.GraphModule, Facts, set[fx.Node]]:
    """The graph in the order in which it will run, its facts, and the calls of its stages."""
    work = copy_graph(graph)
    named = {n.name: n for n in work.graph.nodes}
    calls = {
        install(work, [named[n.name] for n in nodes], Schedule(), f"tiled_{number}")
        for number, nodes in enumerate(found, 1)
    }
    tidy(work)
    results = {user for call in calls for user in call.users}
    return work, Facts(work), calls | results


def _check_counts(
    rows: int, grid: Sequence[int], recompute: int, firing_intervals: Sequence[int], of: str = ""
) -> None:
    """Raise `PlanError` for settings that no map can have, before any is looked at."""
    if rows < 0 or min(grid) < 1 or any(e < 1 for e in firing_intervals):
        raise PlanError(
            f"pass 'tile': {of}rows, grid and firing_intervals are counts: rows at least 0, the others at least 1"
        )
    if grid[0] * grid[1] > limits.TILES:
        raise PlanError(f"pass 'tile': {of}a grid has at most {limits.TILES} tiles; got {shown(tuple(grid))}")
    most = max(rows, *firing_intervals, 0)
    if most > limits.ELEMENTS:
        raise PlanError(
            f"pass 'tile': {of}rows and firing_intervals count rows and steps of a map; no map has {shown(most)}"
        )
    _check_bytes("recompute", recompute, of)


def _check_bytes(name: str, given: int, of: str) -> None:
    if not -1 <= given <= limits.BUDGET_BYTES:
        raise PlanError(f"pass 'tile': {of}{name} is a number of bytes, or -1 for never; got {shown(given)}")


def _check_grid(candidates: Candidates, grid: tuple[int, int]) -> None:
    """Raise `PlanError` where a grid cannot be laid over what the stage gives."""
    if grid == (1, 1):
        return
    stage = candidates.stage()
    if not stage.divides:
        waits = (k for k in stage.kernels if k.kind is Kind.REDUCE or any(o.dims is not None for o in k.takes))
        whole = stage.across or next(waits)
        raise PlanError(
            f"pass 'tile': a grid needs every tile to stand alone, but {layer(whole.node)} ({op_name(whole.node)}) "
            "reads the whole map and layers behind it read the result: use rows, or until=... before it"
        )
    for kernel in stage.exits:
        if kernel.dims is not None and any(n > size for n, size in zip(grid, kernel.sizes, strict=True)):
            raise PlanError(
                f"pass 'tile': a grid of {grid[0]} x {grid[1]} tiles is larger than the map of "
                f"{kernel.sizes[0]} x {kernel.sizes[1]} that {layer(kernel.node)} gives"
            )


def _whole(graph: fx.GraphModule, why: dict[fx.Node, str], inside: set[fx.Node]) -> Iterator[Note]:
    """What takes whole maps, in a stage or where one ends: the first operations behind tiled ones, with the reason, and
    not all that follow them."""
    for node in graph.graph.nodes:
        behind = any(not why.get(n) and n.op not in ("get_attr", "placeholder") for n in node.all_input_nodes)
        if not why.get(node) or node.op == "output" or not behind:
            continue
        if node in inside:
            yield Note(layer(node), f"runs once, on whole maps: {why[node]}", "info")
        else:
            yield Note(layer(node), f"not tiled: {why[node]}", "declined")


def _until(found: list[Nodes], last: str) -> list[Nodes]:
    """The stage that holds a layer, as far as what that layer reads; earlier stages whole."""
    names = [layer(n) for nodes in found for n in nodes]
    if last not in names:
        raise PlanError(f"pass 'tile': no layer {last!r} can be tiled.{nearest(last, names)}")
    place = next(i for i, nodes in enumerate(found) if any(layer(n) == last for n in nodes))
    nodes = found[place]
    inside, kept = set(nodes), set[fx.Node]()
    waiting = [next(n for n in reversed(nodes) if layer(n) == last)]
    while waiting:
        node = waiting.pop()
        if node in inside and node not in kept:
            kept.add(node)
            waiting.extend(node.all_input_nodes)
    for node in nodes:  # a split is no value of its own: its parts come along
        if op_name(node) == "getitem" and node.all_input_nodes[0] in kept:
            kept.add(node)
    return [*found[:place], [n for n in nodes if n in kept]]


def _spec(value: Any) -> TensorSpec:
    return TensorSpec(tuple(map(int, value.shape)), value.dtype, str(value.device))


def _how(schedule: Schedule | None) -> str:
    if schedule is None:
        return "left as it is"
    rows = f"strips of {schedule.rows} rows" if schedule.rows else "whole tiles"
    return rows + (f", {schedule.tiles[0]} x {schedule.tiles[1]} tiles" if schedule.tiles != (1, 1) else "")
