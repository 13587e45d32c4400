"""Plans worth a look for some goals, the cheapest change first: the same function before what must be trained again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from torch import fx

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.compiler.pipeline import figures, run_plan
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass
from splitfx.errors import SplitfxError
from splitfx.ir.graph import info
from splitfx.passes import FoldBatchNorm, Group, SeparablePool, Tile
from splitfx.planning.goals import Goals
from splitfx.report.pareto import pareto
from splitfx.tiling.plan.planner import enough

FACTORS = (2, 4, 8)
SPILL = "maps that wait for a reduction, such as a norm, lie in a temporary file meanwhile"


@dataclass(frozen=True)
class Candidate:
    """A plan with a name for people and the reason it is worth a look."""

    name: str
    why: str
    passes: tuple[Pass, ...]
    same: bool  # the same function; else it must be trained again
    instead: str = ""  # of the plan of this name, where that cannot be had or takes more memory


def candidates(graph: fx.GraphModule, goals: Goals) -> Iterator[Candidate]:
    """Every plan worth a look; `SplitfxError` of a pass that cannot be had is the caller's to tell."""
    folds = _changes(graph, FoldBatchNorm())
    fold: tuple[Pass, ...] = (FoldBatchNorm(),) if folds else ()
    if goals.macs is None or goals.macs >= figures(graph).macs:  # the same function takes the same work
        if folds:
            yield Candidate("fold", "batch norms become part of the convolutions before them", fold, True)
        if goals.peak_bytes is None and not goals.least and _changes(graph, SeparablePool()):
            name = "fold + separable pools" if folds else "separable pools"
            yield Candidate(name, "max pools along rows, then along columns", (*fold, SeparablePool()), True)
        yield from _tilings(graph, goals, fold)
    if goals.macs is not None or goals.seconds is not None or goals.drop is not None:
        yield from _groups(graph, goals, fold)


def _changes(graph: fx.GraphModule, step: Pass) -> bool:
    return info(run_plan(graph, Plan([step]), verify=False)).steps[-1].changed


def _tilings(graph: fx.GraphModule, goals: Goals, fold: tuple[Pass, ...]) -> Iterator[Candidate]:
    name = "fold + tile" if fold else "tile"
    if goals.peak_bytes is not None:
        tile, why = Tile(budget=goals.peak_bytes), "the fastest that keeps the budget"
        plain = f"{name} to {enough(goals.peak_bytes)}"
        yield Candidate(plain, why, (*fold, tile), True)
        yield Candidate(f"{plain}, spill to disk", SPILL, (*fold, replace(tile, spill="disk")), True, plain)
    if goals.least:
        tile = Tile(budget="least")
        yield Candidate(name, "the least memory", (*fold, tile), True)
        yield Candidate(f"{name}, spill to disk", SPILL, (*fold, replace(tile, spill="disk")), True, name)
    if goals.peak_bytes is not None or goals.least:
        return  # the whole curve takes a minute, and the budget says which point of it is wanted
    base = run_plan(graph, Plan(fold), verify=False) if fold else graph
    try:
        curve = pareto(base).choices
    except SplitfxError:  # the pass itself says why, where the candidate is tried
        yield Candidate(name, "the least memory", (*fold, Tile(budget="least")), True)
        return
    tiled = [one for one in curve if one.budget]
    free = [one for one in tiled if one.time <= 1.0]
    chosen = {
        "as small as it gets at no loss of time": min(free, key=lambda c: c.peak_bytes, default=None),
        "the least memory": min(tiled, key=lambda c: c.peak_bytes, default=None),
    }
    for why, one in chosen.items():
        if one is not None:
            yield Candidate(f"{name} to {enough(one.peak_bytes)}", why, (*fold, Tile(budget=one.budget)), True)


def _groups(graph: fx.GraphModule, goals: Goals, fold: tuple[Pass, ...]) -> Iterator[Candidate]:
    """Norms stay: what is split is trained again, and they are folded after that."""
    mixed = None if goals.macs is None else _least_change(graph, goals.macs)
    if mixed is not None and len(set(mixed)) > 1:
        words = ",".join(map(str, mixed))
        yield from _group(words, f"blocks in {words} branches: as few as keep the budget", mixed, goals, fold)
    for factor in FACTORS:
        yield from _group(str(factor), f"every block in {factor} branches", factor, goals, fold)


def _group(
    words: str, why: str, factors: int | tuple[int, ...], goals: Goals, fold: tuple[Pass, ...]
) -> Iterator[Candidate]:
    why += "; fewer connections"
    yield Candidate(f"group by {words}", why, (Group(factors=factors),), False)
    if goals.peak_bytes is not None:
        tile = Tile(budget=goals.peak_bytes)
        name = f"group by {words} + {'fold + ' * bool(fold)}tile"
        yield Candidate(name, f"{why}; then strip by strip", (Group(factors=factors), *fold, tile), False)


def _least_change(graph: fx.GraphModule, macs: int) -> tuple[int, ...] | None:
    """Factors of the blocks that keep most of the work and of the weights within ``macs``; None where no factor does.

    Begins with the least that keeps it for all blocks, and halves those of single blocks while that still keeps it.
    """
    whole = figures(graph)

    @cache
    def kept(factors: tuple[int, ...]) -> float:
        """Shares of the work and of the weights, 0 beyond the budget."""
        try:
            made = figures(run_plan(graph, Plan([Group(factors=factors, lowering="branches")]), verify=False))
        except SplitfxError:  # the pass itself says why, where every block is tried
            return 0.0
        return made.macs / whole.macs + made.params / whole.params if made.macs <= macs else 0.0

    count = len(blocks(facts(graph)))
    best = next((one for factor in FACTORS if kept(one := (factor,) * count)), None)
    while best is not None:
        halved = [(*best[:i], factor // 2, *best[i + 1 :]) for i, factor in enumerate(best) if factor > 1]
        found = max(halved, key=kept, default=best)
        if kept(found) <= kept(best):
            break
        best = found
    return best
