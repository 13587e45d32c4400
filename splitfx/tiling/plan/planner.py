"""Planner: the schedule that runs a stage fastest within a budget of bytes, or with the least bytes.

Candidates (`splitfx.tiling.plan.candidates`) differ in how large the pieces of each phase grow before they are
computed, in what is computed twice around a reduction, and, where full-width strips are over budget, in column bands.
The best candidate is then improved group by group.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfx.errors import PlanError
from splitfx.ground.table import size as words
from splitfx.tiling.plan.candidates import Candidates, Mode, Point, around, fast, front
from splitfx.tiling.plan.instructions import Schedule

__all__ = ["Candidates", "Mode", "Planned", "Point", "Schedule", "around", "front", "least", "plan", "within"]

NEAR = 0.01  # of the least peak: "least" may take so much more where it is faster


def enough(count: int) -> str:
    """Bytes in words, rounded up: a budget that is named as feasible must be."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{-(-count * 100 // scale) / 100:.2f} {unit}"
    return f"{count} B"


@dataclass(frozen=True)
class Planned:
    """What was chosen for a stage, beside the stage as it is."""

    point: Point
    before: Point
    weighed: tuple[Point, ...] = ()  # other ways that were counted and that no way beats in both bytes and time

    @property
    def schedule(self) -> Schedule | None:
        return self.point.schedule

    def words(self) -> str:
        s = self.schedule
        if s is None:
            return f"left as it is: its peak is {words(self.before.peak_bytes)}, reached at {self.before.layer}"
        how = f"strips of {s.rows} rows" if s.rows else "whole tiles"
        grid = f", {s.tiles[0]} x {s.tiles[1]} tiles" if s.tiles != (1, 1) else ""
        peak = f"predicted peak {words(self.point.peak_bytes)} of {words(self.before.peak_bytes)}"
        return f"{how}{grid}{_spilled(s)}: {peak}, reached at {self.point.layer}{self._others()}"

    def _others(self) -> str:
        """The alternatives, by rising time."""
        told = [f"{words(p.peak_bytes)} at x{p.seconds / self.point.seconds:.2f} of its time" for p in self.weighed]
        return f"; weighed: {', '.join(told)} (estimates)" if told else ""


def _spilled(schedule: Schedule) -> str:
    keeping = schedule.keeping
    if keeping.spill == float("inf"):
        return ""
    kept = f" beyond {words(int(keeping.spill))}" if keeping.spill else ""
    return f", maps that wait{kept} on the {keeping.to}"


def least(candidates: Candidates, mode: Mode = "auto") -> Planned:
    """The fastest schedule within a hundredth of the least peak; none where a tiled stage takes no less."""
    before = candidates.untiled()
    found = _smallest(candidates, mode, near=NEAR)
    return _planned(candidates, found if found.peak_bytes < before.peak_bytes else before, before)


def plan(candidates: Candidates, budget: int, mode: Mode = "auto") -> Planned:
    """The fastest schedule of a stage within ``budget`` bytes.

    Raises `PlanError` with the smallest feasible budget and the layer that binds where none fits.
    """
    found = _nearest(candidates, budget, mode)
    best = found.point
    if best.peak_bytes > budget:
        raise PlanError(
            f"pass 'tile': a budget of {words(budget)} cannot be met: the least is {enough(best.peak_bytes)}, "
            f"reached at {best.layer}{_with_a_disk(candidates, best, mode)}. Ask for budget='least', a smaller input, "
            "or a narrower number type"
        )
    return found


def _with_a_disk(candidates: Candidates, best: Point, mode: Mode) -> str:
    """What the least is where maps that wait may be spilled."""
    if candidates.spill or mode == "grid":
        return ""
    least = _smallest(candidates.spilling("disk"), mode).peak_bytes
    return f", and {enough(least)} with spill='disk'" if least < (1 - NEAR) * best.peak_bytes else ""


def _planned(candidates: Candidates, point: Point, before: Point) -> Planned:
    """A choice, and at most four others: from the most bytes to the least, none close to it."""
    others = [p for p in front(candidates.counted()) if not 0.9 < p.peak_bytes / point.peak_bytes < 1.1]
    places = sorted({round(i * (len(others) - 1) / 3) for i in range(4)}) if others else []
    return Planned(point, before, tuple(others[place] for place in reversed(places)))


def within(candidates: Candidates, budget: int, mode: Mode = "auto") -> Point:
    """The fastest way to tile a stage within ``budget`` bytes; the one with the least peak where none fits."""
    best = candidates.fastest(budget, mode)
    if best is None:
        best = _smallest(candidates, mode, enough=budget)
    if best.peak_bytes > budget:
        return best
    return candidates.improved(best, lambda a, b: a.peak_bytes <= budget and fast(a) < fast(b))


def half(candidates: Candidates, budget: int, mode: Mode = "auto") -> Planned:
    """Within a budget, or the least where that is not possible."""
    found = _nearest(candidates, budget, mode)
    return found if found.point.peak_bytes <= budget else least(candidates, mode)


def _nearest(candidates: Candidates, budget: int, mode: Mode) -> Planned:
    """As it is where that is within a budget, else tiled: within it, or above it where no way is."""
    before = candidates.untiled()
    if before.peak_bytes <= budget:
        return Planned(before, before)
    return _planned(candidates, within(candidates, budget, mode), before)


def _smallest(candidates: Candidates, mode: Mode, enough: int = 0, near: float = 0.0) -> Point:
    best = candidates.least(mode, near)
    if best is None:
        raise PlanError(
            "pass 'tile': mode='grid' cannot be used here: a reduction over the map lies inside the stage, and "
            "tiles of a grid are independent. Use mode='stream', or until= a layer before the reduction"
        )

    def better(new: Point, old: Point) -> bool:
        less = new.peak_bytes < (1 - near) * old.peak_bytes
        return less or (new.peak_bytes <= old.peak_bytes and fast(new) < fast(old))

    return candidates.improved(best, better, enough)
