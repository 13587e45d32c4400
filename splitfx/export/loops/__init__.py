"""Tiled stages in ONNX files as loops over strips of rows, for images of any height.

Each phase of a stage is one `Loop`, whose state is the rows that windows reach back for and the running totals of
reductions (`flow`: which nodes, `body`: how they are written); maps that wait for a later phase, or that the file
gives, are collected piece by piece. Every row is computed once.

Refuses, with the reason: nodes without a rule of rows, which stay as they are behind the loop; a stage that would hold
nearly as much as it does untiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import onnx_ir as ir

from splitfx.export.loops.body import Loop, Pace
from splitfx.export.loops.flow import Flow, followed
from splitfx.export.loops.sizes import free_sizes
from splitfx.ground.table import size

WORTH = 0.75  # of what the stage holds untiled: less saved is no reason for loops
PIECE = 2 << 20  # bytes of the largest map of a group in one strip, at most, if its strides allow


def write_loops(model: ir.Model, layers: Iterable[str], key: str, rows: int) -> tuple[str, str]:
    """Put the nodes of a stage into loops; (what they became, why they did not).

    ``layers``: the stage's, by which nodes are marked under ``key``; ``rows``: of the traced image. The model is
    changed only if there are words for it.
    """
    graph, names = model.graph, set(layers)
    inside = [n for n in graph if n.metadata_props.get(key) in names]
    first = _source(inside)
    if first is None:
        return "", "it does not begin with one map"
    stage = _Stage(graph, inside, first, rows)
    phases = stage.phases()
    if not phases:
        return "", stage.why()
    if stage.held(phases) > WORTH * stage.untiled():
        return "", f"loops would hold {size(stage.held(phases))} of {size(stage.untiled())}: {stage.why()}"
    paces = [stage.pace(flow) for flow, _ in phases]
    looped = {n for flow, _ in phases for n in flow.rules}
    taken = {str(v.name): 1 for v in graph.initializers.values() if any(u.node not in looped for u in v.uses())}
    moved: dict[ir.Value, ir.Value] = {}
    for (flow, ends), pace in zip(phases, paces, strict=True):
        flow.places = {moved.get(v, v): place for v, place in flow.places.items()}
        moved |= _written(graph, Loop(flow, first, ends, pace, taken))
    graph.sort()
    strips = " and ".join(str(pace.rows) for pace in paces)
    return f"{len(phases)} loop{'s' * (len(phases) > 1)} over strips of {strips} rows", ""


def _source(inside: list[ir.Node]) -> ir.Value | None:
    """The one map that a stage reads."""
    made = {v for n in inside for v in n.outputs}
    read = [v for n in inside for v in n.inputs if v is not None and v not in made]
    maps = {v for v in read if v.const_value is None and v.shape is not None and len(v.shape) > 2}
    return maps.pop() if len(maps) == 1 else None


class _Stage:
    """The nodes of a stage, and what they hold."""

    def __init__(self, graph: ir.Graph, inside: list[ir.Node], first: ir.Value, rows: int) -> None:
        self.graph, self.inside, self.first, self.rows = graph, inside, first, rows
        self.whole: dict[ir.Node, str] = {}  # nodes that are in no loop
        self._sizes: dict[ir.Value, int] = {}

    def phases(self) -> list[tuple[Flow, list[ir.Value]]]:
        """The loops one after the other, each with the maps of it that are read behind it."""
        found, left, looped = [], set(self.inside), set[ir.Node]()
        sources = {self.first: Fraction(1)}
        while True:
            read = {v: share for v, share in sources.items() if any(u.node in left for u in v.uses())}
            flow = followed(read, [n for n in self.graph if n not in looped], left)
            self.whole = {n: why for n, why in flow.why.items() if n in left}
            if not any(rule.kind in ("window", "reduce") for rule in flow.rules.values()):
                return found
            ends = [v for v in flow.places if v.producer() in flow.rules and self._read_behind(v, flow)]
            found.append((flow, ends))
            sources |= {v: flow.places[v].share for v in ends}
            left -= set(flow.rules)
            looped |= set(flow.rules)
            self._sizes |= {v: self._bytes(v, place.share) for v, place in flow.places.items()}

    def _read_behind(self, value: ir.Value, flow: Flow) -> bool:
        return value.is_graph_output() or any(u.node not in flow.rules for u in value.uses())

    def why(self) -> str:
        """What keeps the first of the stage's other nodes out of a loop."""
        return next((f"{n.op_type} {n.name}: {why}" for n, why in self.whole.items()), "it has no window")

    # ------------------------------------------------------------ bytes

    def _bytes(self, value: ir.Value, share: Fraction) -> int:
        sizes = [d if isinstance(d, int) else 1 for d in value.shape.dims]  # type: ignore[union-attr]
        sizes[2] = int(self.rows * share)
        size = value.dtype.itemsize if value.dtype is not None else 4
        for one in sizes:
            size *= one
        return int(size)

    def untiled(self) -> int:
        """The most that a node reads and makes."""
        return max(self._around(n) for n in self.inside)

    def _around(self, node: ir.Node) -> int:
        return sum(
            self._sizes.get(v, 0) for v in {*node.inputs, *node.outputs} if v is not None and v is not self.first
        )

    def held(self, phases: list[tuple[Flow, list[ir.Value]]]) -> int:
        """What waits between loops, twice where its pieces are put together, and what other nodes hold."""
        for node in self.inside:  # of nodes in no loop nothing is known but what they read
            if node in self.whole:
                most = max((self._sizes.get(v, 0) for v in node.inputs if v is not None), default=0)
                self._sizes |= {v: most for v in node.outputs if v.shape is not None and len(v.shape) > 2}
        made, found = 0, max((self._around(n) for n in self.whole), default=0)
        for _, ends in phases:
            found = max(found, made + 2 * sum(self._sizes[v] for v in ends))
            made = max(made, sum(self._sizes[v] for v in ends))
        return found

    def pace(self, flow: Flow) -> Pace:
        """Strips as tall as the largest map of the first group allows; later groups take as many together as their
        strides need. Waiting for more was no faster and held twice as much."""
        row = [0.0] * flow.groups  # bytes for a row of the source
        for value, place in flow.places.items():
            if value.producer() in flow.rules:
                row[place.group] = max(row[place.group], self._bytes(value, place.share) / self.rows)
        rows, every = flow.unit(0), [1]
        while 2 * rows * row[0] <= PIECE and rows < self.rows:
            rows *= 2
        for group in range(1, flow.groups):
            every.append(math.lcm(every[-1] * rows, flow.unit(group)) // rows)
        return Pace(rows, tuple(every))


def _written(graph: ir.Graph, loop: Loop) -> dict[ir.Value, ir.Value]:
    """Put a loop in the place of its nodes; which value stands for which."""
    nodes = loop.write()
    for value, found in loop.found.items():
        name = value.name
        value.replace_all_uses_with(found, replace_graph_outputs=True)
        value.name, found.name = f"{name}/in_pieces", name
    graph.remove([*loop.flow.rules], safe=True)
    graph.extend(nodes)
    for value in loop.outer.held.values():
        graph.register_initializer(value)
    read = {v for n in graph.all_nodes() for v in n.inputs}
    for name, value in list(graph.initializers.items()):
        if value not in read and value not in graph.outputs:
            del graph.initializers[name]
    return loop.found


__all__ = ["free_sizes", "write_loops"]
