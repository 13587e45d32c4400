"""What every model costs, and which one fits a budget: MACs, seconds or peak bytes.

MACs and peaks are counted for the traced sizes; seconds are medians of this machine, all models called in turn, in eval
mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from splitfx.analysis import facts
from splitfx.errors import PlanError, UnsupportedError
from splitfx.ground.amounts import parse_bytes, share
from splitfx.ground.table import number, seconds, size, table
from splitfx.ground.turns import alternate
from splitfx.ir.graph import random_inputs
from splitfx.ir.modes import in_eval
from splitfx.subnetworks.entry import entries

if TYPE_CHECKING:
    from splitfx.subnetworks.model import SubNetworksGraph

RUNS = 7  # timed calls of each model when seconds decide
_KEPT = "_splitfx_figures"


@dataclass(frozen=True)
class ModelFigures:
    """One model of several: multiply-accumulates, all operations, parameters, peak bytes of live tensors, and median
    seconds where they were measured. ``number`` is -1 for the base model."""

    name: str
    number: int
    macs: int
    ops: int
    params: int
    peak_bytes: int
    seconds: float | None = None


class Figures(tuple[ModelFigures, ...]):
    """The figures of all models; ``str()`` is a table."""

    def __str__(self) -> str:
        rows = [
            (m.name, number(m.macs), number(m.ops), number(m.params), size(m.peak_bytes), seconds(m.seconds))
            for m in self
        ]
        return table(("model", "MACs", "operations", "parameters", "peak", "latency"), rows)


def figures(split: SubNetworksGraph, runs: int = 0) -> Figures:
    """The figures of the base model and every sub-model; seconds with ``runs`` timed calls of each."""
    graphs = [split.base(), *(split.detach(i) for i in range(len(entries(split))))]
    times = latencies(graphs, runs) if runs else [None] * len(graphs)
    found = []
    for index, (name, graph, time) in enumerate(zip(split.names, graphs, times, strict=True)):
        known = facts(graph)
        counted = known.cost.macs, known.cost.ops, known.cost.params, known.memory.peak_bytes
        found.append(ModelFigures(name, index - 1, *counted, time))
    return Figures(found)


def latencies(graphs: Sequence[fx.GraphModule], runs: int = RUNS) -> list[float]:
    """Median seconds of each graph in eval mode on random inputs of the traced sizes, called in turn."""
    args, kwargs = random_inputs(graphs[0])
    calls: dict[str, Callable[[], Any]] = {
        str(i): (lambda graph=graph: graph(*args, **kwargs)) for i, graph in enumerate(graphs)
    }
    device = next((p.device for p in graphs[0].parameters()), "cpu")
    with in_eval(*graphs):
        found = alternate(calls, runs, device)
    return [found[str(i)] for i in range(len(graphs))]


def select(
    split: SubNetworksGraph, max_macs: float | None, max_latency: float | None, max_peak: float | str | None
) -> fx.GraphModule:
    """See `SubNetworksGraph.select`."""
    limits: dict[str, float] = {}
    for name, value in (("macs", max_macs), ("seconds", max_latency), ("peak_bytes", max_peak)):
        if value is not None:
            limits[name] = float(parse_bytes(value)) if isinstance(value, str) else float(value)
    if not limits:
        raise UnsupportedError("select needs a limit: max_macs, max_latency (seconds) or max_peak (bytes or '8 MiB')")
    found = remembered(split, "seconds" in limits)
    fits = [m for m in found if all(getattr(m, name) <= limit for name, limit in limits.items())]
    if not fits:
        least = "; ".join(_least(found, name, limit) for name, limit in limits.items())
        raise UnsupportedError(f"no model fits: {least}")
    best = max(fits, key=lambda m: m.macs)
    return split.base() if best.number < 0 else split.detach(best.number)


def remembered(split: SubNetworksGraph, timed: bool) -> Figures:
    """Figures are kept with the graph until its code changes, or the model is moved or converted."""
    kept, places = vars(split).get(_KEPT), _places(split)
    if kept is not None and (kept.code is not split._code or kept.places != places):
        kept = None
    if kept is None or (timed and kept.figures[0].seconds is None):
        kept = vars(split)[_KEPT] = _Remembered(split._code, places, figures(split, RUNS if timed else 0))
    return kept.figures


def _places(split: fx.GraphModule) -> frozenset[tuple[torch.dtype, torch.device]]:
    """What bytes and seconds depend on besides the code: the types and devices of the weights."""
    return frozenset((p.dtype, p.device) for p in split.parameters())


@dataclass(frozen=True)
class _Remembered:
    code: str
    places: frozenset[tuple[torch.dtype, torch.device]]
    figures: Figures

    def __reduce__(self) -> tuple[Any, ...]:  # another machine may be faster
        return _forgotten, ()


def _forgotten() -> None:
    """What a copy of a graph has in place of the figures."""


_UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "macs": ("MACs", number),
    "seconds": ("latency", seconds),
    "peak_bytes": ("peak", size),
}


def _least(found: Figures, name: str, limit: float) -> str:
    word, form = _UNITS[name]
    best = min(found, key=lambda m: getattr(m, name))
    return f"the least {word} are those of {best.name} with {form(getattr(best, name))}, {form(limit)} were allowed"


# ---------------------------------------------------------------- budgets of a plan


def parse_budget(text: str) -> float:
    """``"0.4x"`` as 0.4. Raises `PlanError`."""
    part = share(text)
    if part is None or not 0 < part < 1:
        raise PlanError(f"pass 'subnetworks': a budget is a share of the base model such as '0.4x'; got {text!r}")
    return part


def closest_below(budget: str, costs: Sequence[float], base: float, names: Sequence[str], of: str) -> int:
    """Which cost is the largest within the budget. Raises `PlanError`, with the closest, where none is."""
    most = parse_budget(budget) * base
    fits = [i for i, cost in enumerate(costs) if cost <= most]
    if fits:
        return max(fits, key=lambda i: costs[i])
    closest = min(range(len(costs)), key=lambda i: costs[i])
    raise PlanError(
        f"pass 'subnetworks': no cut meets {budget} of the {of}: the closest is {names[closest]!r} with "
        f"{costs[closest] / base:.3g}x"
    )
