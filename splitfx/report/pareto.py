"""The whole curve: how much memory a model takes against how long it runs, over all ways to tile it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from splitfx.analysis import facts
from splitfx.frontend.trace import trace
from splitfx.ground.amounts import bytes_text
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import size, table
from splitfx.ir.graph import is_canonical
from splitfx.tiling.plan.planner import Candidates, Mode, Point, front
from splitfx.tiling.stage.extract import stages


@dataclass(frozen=True)
class Choice:
    """One point of the curve. ``peak_bytes``: inputs counted, parameters not, exact; ``time``: estimated, as a ratio to
    the model as it is; ``budget``: what to write into ``Tile(budget=...)`` to get it, empty for the model as it is."""

    peak_bytes: int
    time: float
    budget: str
    layer: str


@dataclass(frozen=True)
class Curve(Shown):
    """Choices by rising peak; none is beaten in both peak and time by another."""

    choices: tuple[Choice, ...]
    points: tuple[Point, ...] = field(repr=False, default=())

    def to_json(self) -> str:
        return json.dumps([asdict(one) for one in self.choices], indent=2)

    def __str__(self) -> str:
        rows = [[size(c.peak_bytes), f"x{c.time:.2f}", c.budget or "not tiled", c.layer] for c in self.choices]
        return table(["peak", "time", "budget", "peaks at"], rows, left=(2, 3))

    def plot(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Draw the curve to ``path``, a png, svg or pdf file.

        Raises `MissingExtraError` without matplotlib, `SplitfxError` where the file cannot be written.
        """
        from splitfx.report.plots.trade_offs import plot_pareto

        plot_pareto(self.points, path, overwrite)


@told
def pareto(model: nn.Module, example_inputs: Any = None, mode: Mode = "auto", *, progress: Say = True) -> Curve:
    """Peak memory against estimated time for every way of tiling ``model`` that is worth a choice.

    ``model`` is any model with ``example_inputs`` (see `trace`), or a graph from `trace` or `transform`. Peaks are
    counted from the instructions that would run, so they are exact; times are estimates that rank, from multiply-
    accumulates, bytes moved and calls. Fold batch norms first (`FoldBatchNorm`) to see what a tiled model can reach.
    Raises `TraceError`, and `UnsupportedError` where sizes do not fit.
    """
    graph: Any = model if is_canonical(model) and example_inputs is None else trace(model, example_inputs)
    say("counting ways to tile")
    known = facts(graph)
    found, _ = stages(graph, known.regions)
    inside = {n for nodes in found for n in nodes}
    rest = {n: b for n, b in known.memory.live_bytes.items() if n not in inside and n.op not in ("get_attr", "output")}
    floor = max(rest.values(), default=0)
    candidates = [Candidates(graph, known, nodes) for nodes in found]
    curves = [one.curve(mode) for one in candidates]
    whole = sum(one.untiled().seconds for one in candidates) or 1.0
    budgets = sorted({max(floor, p.peak_bytes) for curve in curves for p in curve})
    reached = [point for budget in budgets if (point := _within(curves, budget, floor)) is not None]
    best = front(reached)
    return Curve(tuple(_choice(p, whole, known.memory.peak_bytes) for p in best), tuple(best))


def _within(curves: Sequence[Sequence[Point]], budget: int, floor: int) -> Point | None:
    """The fastest choice for every stage below a budget, put together; None where a stage has none."""
    chosen = [
        min((p for p in curve if p.peak_bytes <= budget), key=lambda p: p.seconds, default=None) for curve in curves
    ]
    if None in chosen:
        return None
    points = [p for p in chosen if p is not None]
    tall = max(points, key=lambda p: p.peak_bytes)
    return Point(max(floor, tall.peak_bytes), sum(p.seconds for p in points), tall.schedule, tall.layer)


def _choice(point: Point, whole: float, untiled: int) -> Choice:
    budget = "" if point.peak_bytes >= untiled else bytes_text(point.peak_bytes)
    return Choice(point.peak_bytes, point.seconds / whole, budget, point.layer)
