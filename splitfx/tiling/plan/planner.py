"""Planner: the schedule that runs a stage fastest within a budget of bytes, or with the least bytes.

Candidates differ in the rows of a step, in how large the pieces of deep layers grow before these fire, in what is
computed twice around a reduction, and, where full-width strips are over budget, in column bands. The peak of each is
counted from its own instructions (`schedule.Scheduler`), so it is exact; its time is estimated from multiply-
accumulates, bytes moved, weights read and calls. The best candidate is then improved group by group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx

from splitfx.analysis import Facts
from splitfx.errors import PlanError
from splitfx.ground import limits
from splitfx.ground.table import size as words
from splitfx.ir.graph import layer, module_of
from splitfx.text import shown
from splitfx.tiling.plan.extract import sources_of, stage_graph
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.plan.stage import Kind, Stage, compile_stage

Mode = Literal["auto", "stream", "grid"]
# Seconds per multiply-accumulate, per byte written or read, per byte of weights read by a call, and per call: one core
# of a server, measured once. Only their ratios matter: they rank candidates.
MAC, BYTE, WEIGHT, CALL = 1.1e-11, 1.5e-10, 6e-11, 2.5e-5
ROWS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
TARGETS = (2**16, 2**18, 2**19, 2**20, 2**21, 2**22)  # bytes of a piece of a deep layer
WORK = 150_000  # kernels x steps of one candidate that may still be counted: a few seconds
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """``"64 MiB"`` -> 67108864. Raises `PlanError` for anything that is no positive number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?i?[bB])\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise PlanError(f"a budget is a number of bytes with its unit, such as '64 MiB'; got {shown(text)}")
    value = float(found[1]) * _UNITS[found[2].lower()]
    if value > limits.BUDGET_BYTES:
        raise PlanError(f"a budget is at most 1024 PiB; got {shown(text)}")
    value = int(value)
    if value <= 0:
        raise PlanError(f"a budget must be more than 0 bytes; got {shown(text)}")
    return value


def enough(count: int) -> str:
    """Bytes in words, rounded up: a budget that is named as feasible must be."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{-(-count * 100 // scale) / 100:.2f} {unit}"
    return f"{count} B"


@dataclass(frozen=True)
class Point:
    """One way to run a stage: peak bytes (inputs counted), estimated seconds, the layer where the peak is reached."""

    peak_bytes: int
    seconds: float
    schedule: Schedule | None  # None: not tiled
    layer: str


@dataclass(frozen=True)
class Planned:
    """What was chosen for a stage, beside the stage as it is."""

    point: Point
    before: Point

    @property
    def schedule(self) -> Schedule | None:
        return self.point.schedule

    def words(self) -> str:
        s = self.schedule
        if s is None:
            return f"left as it is: its peak is {words(self.before.peak_bytes)}"
        how = f"{s.rows} rows a step" if s.rows else "whole tiles"
        grid = f", {s.tiles[0]} x {s.tiles[1]} tiles" if s.tiles != (1, 1) else ""
        return f"{how}{grid}: predicted peak {words(self.point.peak_bytes)} of {words(self.before.peak_bytes)}"


class Candidates:
    """All ways to run one stage of a graph that are worth a look; counted once each."""

    def __init__(self, graph: fx.GraphModule, facts: Facts, nodes: Sequence[fx.Node], outside: int = 0) -> None:
        """``outside``: bytes that are alive while the stage runs, besides those of ``graph``."""
        self.graph, self.facts, self.nodes = graph, facts, nodes
        self.small, _, _, copied = stage_graph(graph, nodes)
        shapes, cost = facts.shapes, facts.cost
        self.values = {new: shapes[old] for old, new in copied.items()}
        self.macs = {new: float(cost.rows[old].macs) for old, new in copied.items() if old in cost.rows}
        self.beyond = outside
        self.outside = outside + around(graph, facts, nodes)
        self._stages: dict[float, Stage] = {}
        self._known: dict[Schedule, Point] = {}

    def stage(self, recompute: float) -> Stage:
        if recompute not in self._stages:
            self._stages[recompute] = compile_stage(self.small, self.values, recompute, self.macs)
        return self._stages[recompute]

    def point(self, schedule: Schedule) -> Point:
        """Peak and estimated time under a schedule."""
        if schedule not in self._known:
            stage = self.stage(schedule.recompute)
            counted = Scheduler(stage, schedule)
            for _ in counted.instructions():
                pass
            cost, held = counted.cost, counted.registers
            weights = sum(n * b for n, b in _weights(stage, cost.fired))
            seconds = cost.macs * MAC + cost.moved_bytes * BYTE + weights * WEIGHT + cost.calls * CALL
            named = layer(held.binding.node) if held.binding is not None else ""
            self._known[schedule] = Point(held.peak + self.outside, seconds, schedule, named)
        return self._known[schedule]

    def untiled(self) -> Point:
        """The stage as it is."""
        memory = self.facts.memory
        tall = max(self.nodes, key=lambda n: memory.live_bytes[n])
        moved = 2.0 * sum(memory.new_bytes[n] for n in self.nodes)
        seconds = sum(self.macs.values()) * MAC + moved * BYTE * 2 + CALL * len(self.nodes)
        return Point(memory.live_bytes[tall] + self.beyond, seconds, None, layer(tall))

    # ------------------------------------------------------------ the search

    def strips(self, recompute: float) -> list[int]:
        """Rows of a step worth a look, most first; steps so small that only counting them takes long are left out."""
        stage = self.stage(recompute)
        work = len(stage.kernels) * stage.clock
        return [r for r in ROWS if r * 2 <= stage.clock and work / r <= WORK] or [max(1, stage.clock // 8)]

    def fastest(self, budget: int, mode: Mode) -> Point | None:
        """The candidate with the least time within a budget; None where none fits."""
        best: Point | None = None
        for recompute in self.recomputes():
            if best is not None:
                break  # computing values twice is slower than any way of keeping them
            for schedule in self._grids(recompute) if mode == "grid" else ():
                best = _quicker(best, self.point(schedule), budget)
            worse = 0
            for rows in self.strips(recompute) if mode != "grid" else ():
                found = self._largest(rows, recompute, budget)
                worse = worse + 1 if best is not None and (found is None or found.seconds >= best.seconds) else 0
                best = _quicker(best, found, budget)
                if worse == 2:
                    break
        return best

    def _largest(self, rows: int, recompute: float, budget: int) -> Point | None:
        """At some rows of a step, the largest pieces of deep layers that fit."""
        stage, found = self.stage(recompute), None
        low, high = 0, len(TARGETS) - 1
        while low <= high:
            middle = (low + high) // 2
            point = self.point(Schedule(rows, self.every(stage, rows, TARGETS[middle]), (1, 1), recompute))
            if point.peak_bytes <= budget:
                found, low = _quicker(found, point, budget), middle + 1
            else:
                high = middle - 1
        return found

    def least(self, mode: Mode) -> Point:
        """The candidate with the least peak; column bands only where they take less than full-width strips."""
        found: list[Point] = []
        for recompute in self.recomputes():
            if mode == "grid":
                found += [self.point(s) for s in self._grids(recompute)]
                continue
            stage, smallest, worse = self.stage(recompute), 1 << 62, 0
            for rows in self.strips(recompute):
                point = self.point(Schedule(rows, self.every(stage, rows, TARGETS[0]), (1, 1), recompute))
                found.append(point)
                worse = worse + 1 if point.peak_bytes > smallest * 0.99 else 0
                smallest = min(smallest, point.peak_bytes)
                if worse == 2:
                    break
        if not found:
            raise PlanError(
                "pass 'tile': mode='grid' cannot be used here: a reduction over the map lies inside the stage, and "
                "tiles of a grid are independent. Use mode='stream', or until= a layer before the reduction"
            )
        best = min(found, key=_small)
        if best.schedule is not None and mode != "grid":
            best = min([best, *(self.point(s) for s in self.bands(best.schedule))], key=_small)
        return best

    def _grids(self, recompute: float) -> Iterator[Schedule]:
        stage = self.stage(recompute)
        if stage.phases == 1:
            yield from (Schedule(0, (), (n, n), recompute) for n in (1, 2, 3, 4, 6, 8) if self._fits(stage, n))

    def _fits(self, stage: Stage, n: int) -> bool:
        return all(min(k.sizes) >= n for k in stage.exits if k.dims is not None)

    def bands(self, schedule: Schedule) -> Iterator[Schedule]:
        """The same strips in column bands."""
        stage = self.stage(schedule.recompute)
        if stage.phases == 1:
            yield from (replace(schedule, tiles=(1, n)) for n in (2, 4, 8) if self._fits(stage, n))

    def recomputes(self) -> list[float]:
        """Thresholds for computing values twice, from never to always."""
        stage = self.stage(float("inf"))
        waiting = sorted(
            {
                k.row_bytes * k.rows
                for k in stage.kernels
                for u, _, _ in k.users
                if u.phase > k.phase and k.kind is Kind.ROWS
            }
        )
        middle = [float(waiting[len(waiting) // 2])] if waiting else []
        return list(dict.fromkeys([float("inf"), *middle, 0.0])) if waiting else [float("inf")]

    def curve(self, mode: Mode = "auto") -> list[Point]:
        """Bytes against seconds, from the least bytes to not tiled; no point is beaten in both by another."""
        found = [self.untiled(), self.least(mode)]
        for recompute in self.recomputes():
            stage = self.stage(recompute)
            for rows in self.strips(recompute) if mode != "grid" else ():
                for target in TARGETS[::2]:
                    found.append(self.point(Schedule(rows, self.every(stage, rows, target), (1, 1), recompute)))
            found += [self.point(s) for s in self._grids(recompute)] if mode == "grid" else []
        return front(found)

    def every(self, stage: Stage, rows: int, target: int) -> tuple[int, ...]:
        """Steps between two firings of each group, so that the pieces of its results are about ``target`` bytes."""
        found = []
        for group in range(stage.groups):
            kernels = [k for k in stage.kernels if k.group == group and k.kind is Kind.ROWS]
            heavy = max(kernels, key=lambda k: k.row_bytes, default=None)
            if heavy is None:
                found.append(1)
                continue
            step = rows * heavy.rows / stage.clock * heavy.row_bytes
            count = 1
            while count * step < target / 1.5 and count * rows < stage.clock:
                count *= 2
            found.append(count)
        return tuple(found)

    def improved(self, point: Point, better: Callable[[Point, Point], bool], enough: int = 0) -> Point:
        """Change one group's firing at a time as long as it is ``better(new, old)``; until ``enough`` bytes."""
        best = point
        if best.schedule is None:
            return best
        stage = self.stage(best.schedule.recompute)
        steps = stage.clock / best.schedule.rows if best.schedule.rows else 1
        tries = max(4, min(40, int(WORK * 6 / (len(stage.kernels) * steps * best.schedule.tiles[1]))))
        while tries > 0 and best.schedule is not None:
            start = best
            for other in self._neighbours(best.schedule):
                tries -= 1
                found = self.point(other)
                if better(found, best):
                    best = found
                if tries <= 0 or best.peak_bytes <= enough:
                    break
            if best is start:
                break
        return best

    def _neighbours(self, schedule: Schedule) -> Iterable[Schedule]:
        every = schedule.every
        for group in range(len(every)):
            for changed in (every[group] * 2, every[group] // 2):
                if 1 <= changed <= 512:
                    yield replace(schedule, every=(*every[:group], changed, *every[group + 1 :]))


def around(graph: fx.GraphModule, facts: Facts, nodes: Sequence[fx.Node]) -> int:
    """Bytes alive across a stage that it does not read: earlier values for later readers, other inputs."""
    memory, inside = facts.memory, {*nodes, *sources_of(nodes)}
    order = {n: i for i, n in enumerate(graph.graph.nodes)}
    first, last = order[nodes[0]], order[nodes[-1]]
    crossing = [
        n for n in graph.graph.nodes
        if n not in inside and order[n] < last
        and (n.op == "placeholder" or any(order[u] > first and u not in inside for u in n.users))
    ]  # fmt: skip
    return sum(memory.new_bytes[n] for n in crossing)


def _weights(stage: Stage, fired: dict[Any, int]) -> Iterator[tuple[int, int]]:
    for kernel, count in fired.items():
        module = module_of(kernel.node)
        if module is not None:
            yield count, sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def least(candidates: Candidates, mode: Mode = "auto") -> Planned:
    """The schedule with the least peak; none where the stage takes no less when it is tiled."""
    before = candidates.untiled()
    found = candidates.improved(candidates.least(mode), lambda a, b: _small(a) < _small(b))
    return Planned(found if found.peak_bytes < before.peak_bytes else before, before)


def plan(candidates: Candidates, budget: int, mode: Mode = "auto") -> Planned:
    """The fastest schedule of a stage within ``budget`` bytes.

    Raises `PlanError` with the smallest feasible budget and the layer that binds where none fits.
    """
    before = candidates.untiled()
    if before.peak_bytes <= budget:
        return Planned(before, before)
    best = within(candidates, budget, mode)
    if best.peak_bytes > budget:
        raise PlanError(
            f"pass 'tile': a budget of {words(budget)} cannot be met: the least is {enough(best.peak_bytes)}, "
            f"reached at {best.layer}. Ask for budget='least', a smaller input, or a narrower number type"
        )
    return Planned(best, before)


def within(candidates: Candidates, budget: int, mode: Mode = "auto") -> Point:
    """The fastest way to tile a stage within ``budget`` bytes; the one with the least peak where none fits."""
    best = candidates.fastest(budget, mode)
    if best is None:
        best = candidates.improved(candidates.least(mode), lambda a, b: _small(a) < _small(b), enough=budget)
    if best.peak_bytes > budget:
        return best
    return candidates.improved(best, lambda a, b: a.peak_bytes <= budget and _fast(a) < _fast(b))


def half(candidates: Candidates, budget: int, mode: Mode = "auto") -> Planned:
    """Within a budget, or the least where that is not possible."""
    try:
        return plan(candidates, budget, mode)
    except PlanError:
        return least(candidates, mode)


def _small(point: Point) -> tuple[float, float]:
    return point.peak_bytes, point.seconds


def _fast(point: Point) -> tuple[float, float]:
    return point.seconds, point.peak_bytes


def _quicker(best: Point | None, point: Point | None, budget: int) -> Point | None:
    if point is None or point.peak_bytes > budget:
        return best
    return point if best is None or _fast(point) < _fast(best) else best


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bytes and seconds, by rising bytes."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.seconds)):
        if not found or point.seconds < found[-1].seconds:
            found.append(point)
    return found
