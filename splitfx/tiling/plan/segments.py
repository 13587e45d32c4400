"""Segments: where a stage is divided for training, and into how many bands of rows each part.

Kept from forward to backward are the maps at the cuts; alive while one segment is computed again are its activations,
of one band. More cuts keep more maps and have shorter halos; fewer have taller bands. For every pair of cuts the rows
that a band needs are walked back once; then, for a bound on the largest band, the cheapest way along the cuts is the
shortest path, and the best of all bounds is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx

from splitfx.analysis.cuts import cuts
from splitfx.analysis.regions import reduced_dims
from splitfx.ir.graph import layer
from splitfx.ir.ops import bind, in_place, is_size, op
from splitfx.tiling.plan.instructions import widen
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind

BANDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WORK = 1.25  # the most that bands of a segment may compute, of what the whole segment does


def plain_sum(kernel: Kernel) -> bool:
    """A sum or mean over rows and columns, and nothing else."""
    read = kernel.reads[0][0]
    dims = reduced_dims(read.dims or (), kernel.values[read.node].dim())
    over = set(dims) if kernel.row.over is None else kernel.row.over(bind(kernel.node), kernel.values[read.node].dim())
    return kernel.row.reduces in ("mean", "sum") and over == set(dims)


def is_mean(kernel: Kernel) -> bool:
    return kernel.row.reduces == "mean"


def overwrites(user: fx.Node, node: fx.Node) -> bool:
    return in_place(user) and user.args[0] is node


@dataclass(frozen=True)
class Plan:
    """A segment: nodes of the stage's graph, how many bands, and why only one where there is no choice."""

    nodes: list[fx.Node]
    bands: int
    why: str = ""

    def words(self) -> str:
        first, last = layer(self.nodes[0]), layer(self.nodes[-1])
        name = first if first == last else f"{first} to {last}"
        again = f"in {self.bands} bands of rows" if self.bands > 1 else "as a whole"
        return f"{name}: computed again {again}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class _Edge:
    """A possible segment, from one cut (-1: the sources) to another, by place in the list of kernels."""

    start: int
    stop: int
    bands: int
    bytes: int  # alive while it is computed again
    why: str


def divided(graph: fx.GraphModule, stage: Stage) -> list[Plan]:
    """The segments of a stage, in order."""
    chosen = _path(list(_edges(stage, _places(graph, stage))), stage)
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    working = [n for n in graph.graph.nodes if n.op not in ("placeholder", "get_attr", "output") and not is_size(n)]
    plans, low = [], -1
    for edge in chosen:
        high = order[stage.kernels[edge.stop].node] if edge.stop < len(stage.kernels) else len(order)
        nodes = [n for n in working if low < order[n] <= high]
        plans.append(Plan(nodes, edge.bands, edge.why))
        low = high
    return plans


def _places(graph: fx.GraphModule, stage: Stage) -> list[int]:
    """Cuts at which a stage may be divided: maps that no layer overwrites or merely renames."""
    on_path = set(cuts(graph))
    found = []
    for place, kernel in enumerate(stage.kernels):
        users = [u for u in kernel.node.users if u.op != "output"]
        renamed = any(overwrites(u, kernel.node) or op(u).result.renames for u in users)
        if kernel.node in on_path and kernel.kind is Kind.ROWS and not renamed and users:
            found.append(place)
    return found


# ---------------------------------------------------------------- what a segment costs


def _edges(stage: Stage, places: list[int]) -> Iterator[_Edge]:
    for stop in (*places, len(stage.kernels)):
        best: dict[int, _Edge] = {}
        full: dict[int, int] = {}
        for bands in BANDS:
            for start, size, why in _walk(stage, places, stop, bands):
                full.setdefault(start, size)
                better = start not in best or (not why and size < best[start].bytes)
                if bands == 1 or (better and size * bands <= WORK * full[start]):
                    best[start] = _Edge(start, stop, bands, size, why)
        yield from best.values()


def _walk(stage: Stage, places: list[int], stop: int, bands: int) -> Iterator[tuple[int, int, str]]:
    """For every start: its place, the bytes of the kernels behind it up to ``stop`` for one band, why not in bands."""
    wanted: dict[Kernel, tuple[int, int]] = {}
    total, why, cut = 0, "", set(places)
    part = bands // 2
    for place in range(min(stop, len(stage.kernels) - 1), -1, -1):
        kernel = stage.kernels[place]
        if place in cut and place < stop:
            yield place, total, why
        if kernel.kind is Kind.SOURCE:
            continue
        why = why or _barrier(kernel)
        if place == stop or kernel.exit >= 0 or kernel.kind is Kind.REDUCE:
            first = kernel.rows * part // bands
            widen(wanted, kernel, first, min(kernel.rows, first - (-kernel.rows // bands)))  # the tallest of all bands
        if kernel not in wanted:
            total += 0 if kernel.kind is Kind.ROWS else kernel.row_bytes
            continue
        low, high = wanted[kernel]
        total += kernel.row_bytes * (high - low) if kernel.kind is Kind.ROWS else kernel.row_bytes
        for operand, edge, _ in kernel.reads:
            first, last, _, _ = edge.need(low, high)
            widen(wanted, operand, first, last)
    yield -1, total, why


def _barrier(kernel: Kernel) -> str:
    """Why a segment with this kernel has to be computed again as a whole."""
    if any(k.dims is not None for k in kernel.takes):
        return f"{layer(kernel.node)} reads the whole map"
    if kernel.kind is Kind.ROWS and any(k.kind in (Kind.REDUCE, Kind.WHOLE) for k in kernel.takes):
        return f"{layer(kernel.node)} applies to the map what was reduced over it"
    other = kernel.kind is Kind.REDUCE and not kernel.role and not plain_sum(kernel)
    if kernel.kind is Kind.REDUCE and (kernel.role or other):
        return f"{layer(kernel.node)} is no sum over the map"
    return ""


# ---------------------------------------------------------------- which segments


def _path(edges: list[_Edge], stage: Stage) -> list[_Edge]:
    """The segments with the least bytes alive: maps kept, and the largest segment with the gradients at its ends."""

    def kept(place: int) -> int:
        kernel = stage.kernels[place] if 0 <= place < len(stage.kernels) else None
        return kernel.row_bytes * kernel.rows if kernel is not None else 0

    def alive(edge: _Edge) -> int:
        return edge.bytes + kept(edge.start) + kept(edge.stop)

    bounds = sorted({alive(e) for e in edges})
    step = max(1, len(bounds) // 40)
    best: tuple[int, int, list[_Edge]] | None = None
    for bound in (*bounds[::step], bounds[-1]):
        found = _shortest([e for e in edges if alive(e) <= bound], len(stage.kernels), kept)
        if found is None:
            continue
        total = found[0] + max(alive(e) for e in found[1])
        if best is None or (total, len(found[1])) < best[:2]:
            best = (total, len(found[1]), found[1])
    assert best is not None, "a segment from the sources to the end is always there"
    return best[2]


def _shortest(edges: list[_Edge], end: int, kept: Callable[[int], int]) -> tuple[int, list[_Edge]] | None:
    """The chain of segments from the sources to the end that keeps the fewest bytes of maps."""
    reached: dict[int, tuple[int, list[_Edge]]] = {-1: (0, [])}
    for edge in sorted(edges, key=lambda e: e.stop):
        if edge.start in reached:
            size, chain = reached[edge.start]
            size += kept(edge.stop) if edge.stop < end else 0
            if edge.stop not in reached or size < reached[edge.stop][0]:
                reached[edge.stop] = (size, [*chain, edge])
    return reached.get(end)
