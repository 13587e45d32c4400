"""Where ranks wait for each other: the maps whose halo is sent rather than computed twice.

From the results back, the rows that ranks compute beyond their own are added up along every path; where they would
cost more than a message, the map there is awaited and the sum starts anew. So a few rows of several layers are computed
again in place of a message for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from splitfx.parallel.shard.shares import Division, widen
from splitfx.tiling.plan.instructions import Interval
from splitfx.tiling.plan.meter import BYTE, MAC
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind


@dataclass(frozen=True)
class Costs:
    """Seconds: of a message, of a byte that crosses, of a multiply-accumulate, of a byte read or written."""

    message: float
    crossing: float
    mac: float = MAC
    byte: float = BYTE


COSTS = {"cpu": Costs(3e-4, 1e-9), "cuda": Costs(6e-5, 1e-10, MAC / 100, BYTE / 100)}


def awaited(stage: Stage, division: Division, costs: Costs) -> frozenset[fx.Node]:
    """The nodes of a stage, compiled without any, whose maps are awaited."""
    ranks = range(division.ranks)
    wanted: list[dict[Kernel, Interval]] = [{} for _ in ranks]
    paid: dict[Kernel, float] = {}  # by the readers of a value, for rows that a rank computes for its neighbour
    found: set[fx.Node] = set()
    for kernel in reversed(stage.kernels):
        own = [division.own(kernel.rows, rank) for rank in ranks]
        beyond = max(_beyond(wanted[rank].get(kernel), own[rank]) for rank in ranks)
        sent = kernel.node in found
        if beyond and kernel.kind is Kind.ROWS and kernel.dims is not None and not sent:
            again = beyond * _row(kernel, costs)
            paid[kernel] = paid.get(kernel, 0.0) + again
            sent = paid[kernel] > costs.message + beyond * kernel.row_bytes * costs.crossing
        if sent:
            found.add(kernel.node)
            paid[kernel] = 0.0
        for rank in ranks:
            if sent:
                wanted[rank].pop(kernel, None)
            if sent or kernel.exit >= 0 or kernel.kind is Kind.REDUCE or kernel.takers:
                widen(wanted[rank], kernel, own[rank])
            if kernel in wanted[rank] and kernel.kind in (Kind.ROWS, Kind.REDUCE):
                for operand, edge, _ in kernel.reads:
                    widen(wanted[rank], operand, edge.need(*wanted[rank][kernel])[:2])
        for operand, _, _ in kernel.reads:
            paid[operand] = max(paid.get(operand, 0.0), paid.get(kernel, 0.0))
    return frozenset(found)


def _beyond(wanted: Interval | None, own: Interval) -> int:
    """Rows that are wanted of a value and not owned."""
    if wanted is None:
        return 0
    return (wanted[1] - wanted[0]) - max(0, min(wanted[1], own[1]) - max(wanted[0], own[0]))


def _row(kernel: Kernel, costs: Costs) -> float:
    """Seconds for a row of a value."""
    moved = kernel.row_bytes + sum(k.row_bytes * k.rows / max(1, kernel.rows) for k, _, _ in kernel.reads)
    return kernel.macs_per_row * costs.mac + moved * costs.byte
