"""Candidates: the ways to run one stage that are worth a look, with the peak of each and an estimate of its time.

The peak of a schedule is counted from its own instructions (`schedule.Scheduler`), so it is exact; its time is
estimated from multiply-accumulates, bytes moved, weights read and calls. What a stage holds between two *phases* does
not depend on how tall the pieces are within them. So the schedules of a family, from the finest pieces to whole maps,
are counted once each, phase by phase, and every phase takes the one that suits it best: a handful of counts answers all
budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from torch import fx

from splitfx.analysis import Facts
from splitfx.ir.graph import layer
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.meter import BYTE, CALL, MAC
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.extract import sources_of, stage_graph
from splitfx.tiling.stage.kernel import KEEP_ALL, Keeping, Spill, Stage
from splitfx.tiling.stage.roles import Kind

Mode = Literal["auto", "stream", "grid"]
TARGETS = (2**23, 2**22, 2**21, 2**20, 2**19, 2**18, 2**16, 2**14)  # bytes of a piece of the heaviest map of a group
SMALL = 2**19  # pieces of so many bytes and less are looked at only while they save memory
FEW = 8  # and pieces of a map that is cut into so many and more
WORK = 150_000  # kernels x steps of one schedule that may still be counted: a few seconds
TRIES = 12  # changes of a single group that are counted for one choice, at most
CALLS = 40_000  # calls of kernels that may be counted for them
LEVELS = 4  # amounts of what may wait before maps are computed twice, or spilled, that are looked at
ROOM = (0.9, 0.75, 0.5)  # shares of a budget that may wait


@dataclass(frozen=True)
class Point:
    """One way to run a stage: peak bytes (inputs counted), estimated seconds, the layer where the peak is reached."""

    peak_bytes: int
    seconds: float
    schedule: Schedule | None  # None: not tiled
    layer: str


@dataclass(frozen=True)
class _Count:
    """What a schedule takes: of the whole, and (peak bytes, seconds) of each phase."""

    point: Point
    phases: tuple[tuple[int, float], ...]
    calls: int


def strips(stage: Stage, keeping: Keeping, targets: Sequence[int]) -> Schedule:
    """Strips whose pieces are about as large as wanted: ``targets`` in bytes, one for each phase."""
    rows = 1
    while len(stage.kernels) * stage.clock / rows > WORK:
        rows *= 2
    every = []
    for group in range(stage.groups):
        kernels = [k for k in stage.kernels if k.group == group and k.kind is Kind.ROWS]
        heavy = max(kernels, key=lambda k: k.row_bytes, default=None)
        count = 1
        if heavy is not None:
            step, target = rows * heavy.rows / stage.clock * heavy.row_bytes, targets[heavy.phase]
            while count * step < target / 1.5 and count * rows < stage.clock:
                count *= 2
        every.append(count)
    fewest = min(every, default=1)
    return Schedule(min(stage.clock, rows * fewest), tuple(n // fewest for n in every), (1, 1), keeping)


class Candidates:
    """All ways to run one stage of a graph that are worth a look; counted once each."""

    def __init__(
        self, graph: fx.GraphModule, facts: Facts, nodes: Sequence[fx.Node], outside: int = 0, spill: Spill = ""
    ) -> None:
        """``outside``: bytes that are alive while the stage runs, besides those of ``graph``. ``spill``: where maps
        that wait may go."""
        self.graph, self.facts, self.nodes = graph, facts, nodes
        self.small, _, _, copied = stage_graph(graph, nodes)
        self.values = {new: facts.shapes[old] for old, new in copied.items()}
        self.beyond = outside
        self.outside = outside + around(graph, facts, nodes)
        self.spill: Spill = spill
        self._stages: dict[Keeping, Stage] = {}
        self._structures: dict[Any, Keeping] = {}
        self._known: dict[Schedule, _Count] = {}

    def spilling(self, to: Spill) -> Candidates:
        """The same stage where maps that wait may be spilled. It knows what has been counted; what it counts itself is
        no choice for those who may not spill."""
        other = copy(self)
        other.spill, other._known = to, dict(self._known)
        return other

    def counted(self) -> list[Point]:
        """All schedules that have been looked at."""
        return [count.point for count in self._known.values()]

    def stage(self, keeping: Keeping = KEEP_ALL) -> Stage:
        if keeping not in self._stages:
            self._stages[keeping] = compile_stage(self.small, self.values, keeping)
        return self._stages[keeping]

    # ------------------------------------------------------------ what a schedule takes

    def point(self, schedule: Schedule) -> Point:
        """Peak and estimated time under a schedule."""
        return self._count(schedule).point

    def _count(self, schedule: Schedule) -> _Count:
        if schedule not in self._known:
            counted = Scheduler(self.stage(schedule.keeping), schedule).count()
            held = counted.registers
            phases = tuple((one.peak + self.outside, one.cost.seconds) for one in counted.spent)
            named = layer(held.binding.node) if held.binding is not None else ""
            point = Point(held.peak + self.outside, sum(s for _, s in phases), schedule, named)
            self._known[schedule] = _Count(point, phases, counted.calls)
        return self._known[schedule]

    def untiled(self) -> Point:
        """The stage as it is."""
        memory = self.facts.memory
        tall = max(self.nodes, key=lambda n: memory.live_bytes[n])
        moved = 2.0 * sum(memory.new_bytes[n] for n in self.nodes)
        macs = sum(self.facts.cost.rows[n].macs for n in self.nodes)
        seconds = macs * MAC + moved * BYTE * 2 + CALL * len(self.nodes)
        return Point(memory.live_bytes[tall] + self.beyond, seconds, None, layer(tall))

    # ------------------------------------------------------------ families of schedules

    def keepings(self, budget: float = float("inf")) -> Iterator[list[Keeping]]:
        """What may become of maps that wait for a reduction, by how many bytes may wait: any; then as many as leave
        room within a ``budget``, and from what waits behind some phase down to none; the others are computed again, or
        spilled. Those between which no map lies make the same stage, which comes once."""
        sums = sorted(set(self.stage().waiting_bytes), reverse=True)
        yield [KEEP_ALL]
        if not sums[0]:
            return
        lower = [float(size) for size in (*sums[1:], 0) if size < sums[0]]
        places = {round(i * (len(lower) - 1) / (LEVELS - 2)) for i in range(LEVELS - 1)}
        levels = {lower[place] for place in places}
        if budget < float("inf"):
            room = max(0, budget - self.outside)
            levels |= {size for share in ROOM if (size := float(int(share * room))) < sums[0]}
        spilled = lambda size: [Keeping(spill=size, to=self.spill)] if self.spill else []  # noqa: E731
        seen = {KEEP_ALL}
        for size in sorted(levels, reverse=True):
            ways = dict.fromkeys(self._first(keeping) for keeping in (Keeping(recompute=size), *spilled(size)))
            if fresh := [keeping for keeping in ways if keeping not in seen]:
                yield fresh
            seen |= set(ways)

    def _first(self, keeping: Keeping) -> Keeping:
        """The first that was found to make the same stage: what has been counted of it holds."""
        self._structures.setdefault(_structure(self.stage()), KEEP_ALL)
        return self._structures.setdefault(_structure(self.stage(keeping)), keeping)

    def strips(self, keeping: Keeping, targets: Sequence[int]) -> Schedule:
        return strips(self.stage(keeping), keeping, targets)

    def _family(self, keeping: Keeping, budget: float = float("inf")) -> Iterator[tuple[int, _Count]]:
        """(bytes of a piece, what it takes), from the tallest strips to the lowest that any phase gains by.

        A peak is about a constant and a number of bytes for every row of a strip, so half the rows gain half of what
        the last halving gained: where all that is still to gain does not bring a phase within the ``budget``, or is
        less than a hundredth, or was twice in a row, lower strips are not looked at.
        """
        stage = self.stage(keeping)
        phases, last, least, flat = stage.phases, None, [1 << 62] * stage.phases, 0
        for target in TARGETS:
            schedule = self.strips(keeping, [target] * phases)
            if schedule == last:
                continue
            count, last = self._count(schedule), schedule
            yield target, count
            gains = [max(0, known - peak) for (peak, _), known in zip(count.phases, least, strict=True)]
            least = [min(peak, known) for (peak, _), known in zip(count.phases, least, strict=True)]
            tall = _tall(count)
            flat = flat + 1 if gains[tall] < 0.01 * least[tall] else 0
            if schedule.rows * max(schedule.firing_intervals, default=1) * FEW > stage.clock:
                continue
            hopeless = any(peak - gain > budget for peak, gain in zip(least, gains, strict=True))
            if flat >= 2 or (target <= SMALL and (hopeless or flat)):
                return

    def grids(self, keeping: Keeping = KEEP_ALL) -> Iterator[Schedule]:
        stage = self.stage(keeping)
        if stage.divides:
            yield from (Schedule(0, (), (n, n), keeping) for n in (1, 2, 3, 4, 6, 8) if self._fits(stage, n))

    def bands(self, point: Point) -> Point:
        """The same strips in as many column bands as gain anything: half of a band gains about half of what the last
        halving did."""
        schedule, best, worth = point.schedule, point, 0.01 * point.peak_bytes
        if schedule is None or not self.stage(schedule.keeping).divides:
            return point
        for n in (2, 4, 8):
            if not self._fits(self.stage(schedule.keeping), n):
                break
            last, best = best, min(best, self.point(replace(schedule, tiles=(1, n))), key=small)
            if last.peak_bytes - best.peak_bytes < 2 * worth:
                break
        return best

    def floor(self, keeping: Keeping) -> int:
        """Fewer bytes than this no schedule takes: the maps that wait behind a phase are all there at its end."""
        return self.outside + max(self.stage(keeping).waiting_bytes)

    def _fits(self, stage: Stage, n: int) -> bool:
        return all(min(k.sizes) >= n for k in stage.exits if k.dims is not None)

    # ------------------------------------------------------------ choices

    def fastest(self, budget: int, mode: Mode) -> Point | None:
        """The candidate with the least time within a budget; None where none fits."""
        best: Point | None = None
        for ways in self.keepings(budget):
            found: list[Point | None] = []
            for keeping in ways:
                if self.floor(keeping) > budget:
                    continue
                if mode == "grid":
                    found += [self.point(schedule) for schedule in self.grids(keeping)]
                else:
                    found.append(self._within(keeping, budget))
            best = min((p for p in found if p is not None and p.peak_bytes <= budget), key=fast, default=None)
            if best is not None:
                break  # the more has to be computed twice or spilled, the slower
        return best

    def _within(self, keeping: Keeping, budget: int) -> Point | None:
        """Strips that keep of waiting maps what ``keeping`` says: for every phase the fastest within the budget."""
        chosen: list[tuple[float, int] | None] = [None] * self.stage(keeping).phases
        worse = 0
        for target, count in self._family(keeping, budget):
            changed = False
            for phase, (peak, seconds) in enumerate(count.phases):
                known = chosen[phase]
                if peak <= budget and (known is None or seconds < known[0]):
                    chosen[phase], changed = (seconds, target), True
            worse = 0 if changed or None in chosen else worse + 1
            if worse == 2:
                break
        targets = [one[1] for one in chosen if one is not None]
        return self._lowered(keeping, targets, budget) if len(targets) == len(chosen) else None

    def _lowered(self, keeping: Keeping, targets: list[int], budget: int) -> Point | None:
        """The phases put together; where one takes more beside the others than alone, its pieces are made smaller."""
        while True:
            count = self._count(self.strips(keeping, targets))
            over = [i for i, (peak, _) in enumerate(count.phases) if peak > budget]
            if not over:
                return count.point
            lower = [TARGETS[min(TARGETS.index(t) + (i in over), len(TARGETS) - 1)] for i, t in enumerate(targets)]
            if lower == targets:
                return None
            targets = lower

    def least(self, mode: Mode, near: float = 0.0) -> Point | None:
        """The candidate with the least peak; None where there is none in this mode. Column bands only where they take
        less than full-width strips. Of all whose peak is ``near`` to it, as a share, the fastest: the last percent
        costs pieces so low that calls take all the time."""
        found: list[Point] = []
        for keeping in reversed(list(chain(*self.keepings()))):
            if found and self.floor(keeping) > min(p.peak_bytes for p in found):
                continue
            if mode == "grid":
                found += [self.point(schedule) for schedule in self.grids(keeping)]
                continue
            below = min((point.peak_bytes for point in found), default=float("inf"))
            counts = [count for _, count in self._family(keeping, below)]
            peaks = [min(peaks) for peaks in zip(*([p for p, _ in c.phases] for c in counts), strict=True)]
            found += [c.point for c in counts]
            lowest = max(peaks, default=0)
            together = self._within(keeping, lowest) if lowest < below else None
            found += [together] if together is not None else []
        if not found:
            return None
        best = min(found, key=small)
        if mode != "grid":
            best = self.bands(best)
        most = round(best.peak_bytes * (1 + near))
        if near and best.schedule is not None and mode != "grid" and best.schedule.tiles == (1, 1):
            self._within(best.schedule.keeping, most)  # what it counts is looked at below
        return min((c.point for c in self._known.values() if c.point.peak_bytes <= most), key=fast)

    def curve(self, mode: Mode = "auto") -> list[Point]:
        """Bytes against seconds, from the least bytes to not tiled; no point is beaten in both by another."""
        least = self.least(mode)
        if least is None or mode == "grid":
            return front([self.untiled(), *(self.point(schedule) for schedule in self.grids())])
        found = [self.untiled(), least]
        for keeping in chain(*self.keepings()):
            for _, count in self._family(keeping):
                found.append(count.point)
                found += [p for p in [self._within(keeping, count.point.peak_bytes)] if p is not None]
        return front(found)

    def improved(self, point: Point, better: Callable[[Point, Point], bool], enough: int = 0) -> Point:
        """Change one group's firing at a time as long as it is ``better(new, old)``; until ``enough`` bytes."""
        calls = self._count(point.schedule).calls if point.schedule is not None else 1
        best, tries = point, min(TRIES, CALLS // max(1, calls))
        while tries > 0 and best.schedule is not None and best.schedule.rows:
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
        """One group of the phase in which the peak lies fires more or less often."""
        stage, tall = self.stage(schedule.keeping), _tall(self._count(schedule))
        groups = sorted({k.group for k in stage.kernels if k.kind is Kind.ROWS and k.phase == tall})
        intervals = schedule.firing_intervals or (1,) * stage.groups
        for group in groups:
            for changed in (intervals[group] * 2, intervals[group] // 2):
                if 1 <= changed <= 512:
                    yield replace(schedule, firing_intervals=(*intervals[:group], changed, *intervals[group + 1 :]))


def _structure(stage: Stage) -> tuple[Any, ...]:
    """All in which the stages of one graph differ by what they keep."""
    return tuple((k.name, k.role, k.again, k.phase, k.group, k.part, k.home, k.spilled) for k in stage.kernels)


def _tall(count: _Count) -> int:
    """The phase in which the peak lies."""
    return max(range(len(count.phases)), key=lambda i: count.phases[i])


def around(graph: fx.GraphModule, facts: Facts, nodes: Sequence[fx.Node]) -> int:
    """Bytes alive across a stage that it does not read: other inputs, and what is made before it for readers behind."""
    stage, sources, last = set(nodes), set(sources_of(nodes)), nodes[-1]
    before: set[fx.Node] = set()
    behind = set(stage)
    passed = False
    for node in graph.graph.nodes:
        if node not in stage and (passed or any(n in behind for n in node.all_input_nodes)):
            behind.add(node)
        elif node not in stage:
            before.add(node)
        passed = passed or node is last
    new, crossing = facts.memory.new_bytes, set[fx.Node]()
    for node in reversed([n for n in graph.graph.nodes if n in before]):
        needed = any(
            (user in behind and user not in stage) or (user in crossing and not new[user]) for user in node.users
        )
        if needed or node.op == "placeholder":  # a view keeps what it lies in
            crossing.add(node)
    return sum(new[n] for n in crossing - sources)


def small(point: Point) -> tuple[float, float]:
    return point.peak_bytes, point.seconds


def fast(point: Point) -> tuple[float, float]:
    return point.seconds, point.peak_bytes


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both bytes and seconds, by rising bytes."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.peak_bytes, p.seconds)):
        if not found or point.seconds < found[-1].seconds:
            found.append(point)
    return found
