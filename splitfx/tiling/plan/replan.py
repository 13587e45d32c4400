"""Planning again: a stage that was planned for one size of its inputs is called at another.

The budget stays what it was: a number of bytes is that number, "half" and "least" are those of the new size. Where a
number cannot be met any more (a larger image, a larger batch) the stage runs as small as it can and a warning says
both figures: a call in the middle of a program is no place to refuse one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shapes
from splitfx.ground.amounts import parse_bytes
from splitfx.ground.table import size as words
from splitfx.ir.graph import TensorSpec
from splitfx.ir.ops import is_size
from splitfx.tiling.plan import planner
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.planner import Candidates
from splitfx.tiling.stage.kernel import Spill

HALF = "half"


@dataclass(frozen=True)
class Goal:
    """What a stage was planned for. ``budget``: a number of bytes as `Tile` takes it, "least" or "half"; ``mode`` as in
    `Tile`. ``sizes``: of each input the bytes of an element, then its shape. ``outside``: bytes alive beside the stage
    then; at another size they are taken to grow like the inputs. ``spill``: where maps that wait may go."""

    budget: str
    mode: planner.Mode
    sizes: tuple[tuple[int, ...], ...]
    outside: int = 0
    spill: Spill = ""

    def fits(self, specs: Sequence[TensorSpec]) -> bool:
        """Whether these are the inputs that were planned for."""
        return self.sizes == sizes_of(specs)


def sizes_of(specs: Sequence[TensorSpec]) -> tuple[tuple[int, ...], ...]:
    return tuple((s.dtype.itemsize, *s.shape) for s in specs)


def replanned(stage: fx.GraphModule, specs: tuple[TensorSpec, ...], goal: Goal) -> Schedule:
    """The schedule of a stage for inputs of another size than it was planned for."""
    known = Facts(stage)
    known.shapes = shapes(stage, specs)
    nodes = [n for n in stage.graph.nodes if n.op in ("call_function", "call_module") and not is_size(n)]
    planned, now = (sum(map(prod, sizes)) for sizes in (goal.sizes, sizes_of(specs)))
    candidates = Candidates(stage, known, nodes, round(goal.outside * now / max(1, planned)), goal.spill)
    if goal.budget in (HALF, "least"):
        least = goal.budget == "least"
        half = candidates.untiled().peak_bytes // 2
        found = planner.least(candidates, goal.mode) if least else planner.half(candidates, half, goal.mode)
        return found.schedule or Schedule()
    budget = parse_bytes(goal.budget)
    at_once = candidates.point(Schedule())
    point = at_once if at_once.peak_bytes <= budget else planner.within(candidates, budget, goal.mode)
    if point.peak_bytes > budget:
        asked = " and ".join("x".join(map(str, s.shape)) for s in specs)
        warnings.warn(
            f"the tiled stage was planned within {goal.budget}; with inputs of {asked} it takes "
            f"{words(point.peak_bytes)}, the least that is possible, reached at {point.layer}",
            stacklevel=2,
        )
    assert point.schedule is not None, "every candidate but the untiled one has a schedule"
    return point.schedule
