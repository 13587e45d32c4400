"""Strips: the layers of a tiled stage up to a cut, once per strip of rows, in an ONNX file.

Each strip runs on its rows and their halo, padded at the halo's ends too; nothing is cropped before the cut, where the
rows that saw that padding are dropped. Strips are of unequal heights: onnxruntime re-uses the memory of equal shapes
only, and keeps it until the last of them is done. Which cut and how many strips is chosen by estimated bytes and time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from splitfx.analysis.regions import Regions
from splitfx.ir import graph as graphs
from splitfx.ir.ops import Spatial, Window, bind, op, op_name, out_of_place
from splitfx.ir.walks import ancestors

COUNTS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16)  # strips that are tried
WORTH = 0.75  # of the stage's peak: less saved is no reason for strips
COPIES = 1.25  # what is held, with copies into the runtime's blocked layout
MORE = 0.08  # the most multiply-accumulates that halos may add
TIME = 3  # a plan is worth peak x time ** TIME: 1 % more time must save 3 % of the peak


@dataclass(frozen=True)
class Strip:
    """Rows [start, stop) of the source go in; of what comes out at the cut, ``count`` rows from ``skip`` on stay."""

    start: int
    stop: int
    skip: int
    count: int


@dataclass(frozen=True)
class Plan:
    """``inside``: the nodes up to the cut, the last of them. Estimates: bytes beyond the inputs, and the share of
    multiply-accumulates that halos add."""

    source: fx.Node
    inside: tuple[fx.Node, ...]
    strips: tuple[Strip, ...]
    peak_bytes: int
    more: float

    @property
    def cut(self) -> fx.Node:
        return self.inside[-1]

    def words(self) -> str:
        where = graphs.layer(self.cut) if self.cut.op == "call_module" else self.cut.name
        extra = f", {self.more:.0%} more multiply-accumulates"
        return f"{len(self.strips)} strips up to {where}{extra}, about {self.peak_bytes / 2**20:.0f} MiB"


class Strips(nn.Module):
    """Runs a stage strip by strip up to the cut of a plan, and the rest whole."""

    def __init__(self, stage: fx.GraphModule, plan: Plan) -> None:
        super().__init__()
        self.stage, self.plan = stage, plan

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        nodes = list(self.stage.graph.nodes)
        known: dict[fx.Node, Any] = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
        walk, plan = _Walk(self.stage, garbage_collect_values=False), self.plan
        whole, pieces = known[plan.source], []
        for strip in plan.strips:
            part = {plan.source: whole.narrow(2, strip.start, strip.stop - strip.start)}
            y = walk.values(plan.inside, part)[plan.cut]
            pieces.append(y.narrow(2, strip.skip, strip.count))
        known[plan.cut] = torch.cat(pieces, 2)
        inside = set(plan.inside)
        rest = [n for n in nodes if n not in inside and n.op not in ("placeholder", "output")]
        found = walk.values(rest, known)
        return [found[n] for n in graphs.operands(graphs.output_node(self.stage))]


class _Walk(fx.Interpreter):
    """Computes some nodes of a graph; nothing is overwritten."""

    def values(self, nodes: Sequence[fx.Node], known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        self.env = dict(known)
        for node in nodes:
            self.env[node] = self.run_node(node)
        return self.env

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(out_of_place(target), args, kwargs)


def best(stage: fx.GraphModule, values: dict[fx.Node, Any]) -> Plan | None:
    """The strips that save most for their time; None where they save too little."""
    found = _Finder(stage, values)
    plans = [plan for cut in found.cuts() for count in COUNTS if (plan := found.plan(cut, count)) is not None]
    chosen = min(plans, key=lambda p: p.peak_bytes * (1 + p.more) ** TIME, default=None)
    return chosen if chosen is not None and chosen.peak_bytes <= WORTH * found.untiled else None


class _Finder:
    """Where a stage can be run in strips, and what that would hold."""

    def __init__(self, stage: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        self.stage, self.values = stage, values
        self.regions = Regions(values)
        self.nodes = [n for n in stage.graph.nodes if n.op not in ("placeholder", "output")]
        maps = [n for n in stage.graph.nodes if n.op == "placeholder" and self.regions.dims[n] == (2, 3)]
        self.source = maps[0] if maps else None
        self.scale: dict[fx.Node, int] = {} if self.source is None else {self.source: 1}  # source rows a row stands for
        for node in self.nodes:
            scale = self._scale(node)
            if scale:
                self.scale[node] = scale
        self.macs = {n: _macs(n, values) for n in self.nodes}
        self.untiled = int(COPIES * self._held(self.nodes, {}))

    def _scale(self, node: fx.Node) -> int:
        """Source rows for each row of a node that may run on a strip as on a whole map; 0 where it may not."""
        read = [n for n in node.all_input_nodes if n.op != "get_attr"]
        scales = {self.scale.get(n, 0) for n in read}
        if len(scales) != 1 or 0 in scales or self.regions.dims[node] != (2, 3) or self.regions.barrier(node):
            return 0
        tall = [n for n in node.all_input_nodes if n.op == "get_attr" and _rows(self.values[n]) > 1]
        spatial = op(node).spatial
        if spatial is Spatial.POINTWISE and not tall:
            return scales.pop() if op_name(node) != "cat" or int(bind(node).get("dim") or 0) == 1 else 0
        if spatial is not Spatial.WINDOW or "adaptive" in op_name(node):
            return 0
        rule = self.regions.window(node)
        return 0 if rule.transposed else scales.pop() * rule.stride[0]

    def cuts(self) -> Iterator[tuple[fx.Node, ...]]:
        """Nodes up to one of which all results but the last are read by each other only."""
        for node in self.nodes:
            if node not in self.scale or (op(node).spatial is Spatial.WINDOW and _activated(node)):
                continue
            inside = self._up_to(node)
            known = set(inside)
            if all(u in known for n in inside if n is not node and n.op != "get_attr" for u in n.users):
                yield inside

    def _up_to(self, node: fx.Node) -> tuple[fx.Node, ...]:
        known = set(ancestors([node], lambda n: n is not self.source))
        return tuple(n for n in self.nodes if n in known)

    # ------------------------------------------------------------ one plan

    def plan(self, inside: tuple[fx.Node, ...], count: int) -> Plan | None:
        """None where the strips are too low, add too much, or would not fit the rows they are to give."""
        assert self.source is not None
        cut, strips = inside[-1], self._strips(inside, count)
        if strips is None:
            return None
        tall, more = dict.fromkeys(inside, 0.0), 0.0  # of each map, the share that the tallest strip makes
        for strip in strips:
            rows = self._natural(inside, strip.stop - strip.start)
            if rows is None or rows[cut] < strip.skip + strip.count:
                return None
            for node in inside:
                if node in rows:
                    share = rows[node] / self.regions.rows(node, 0)
                    tall[node] = max(tall[node], share)
                    more += self.macs[node] * share
        total = sum(self.macs.values()) or 1
        more = (more - sum(self.macs[n] for n in inside)) / total
        if more > MORE:
            return None
        source, whole = self._bytes(self.source), self._bytes(cut)
        highest = max(s.stop - s.start for s in strips) / self.regions.rows(self.source, 0)
        above = int(source * highest + whole + COPIES * self._held(inside, tall))
        below = int(COPIES * (whole + self._held([n for n in self.nodes if n not in set(inside)], {}, cut)))
        hole = max(self._bytes(n) * tall[n] for n in inside)  # what lies between a strip's buffers is seldom refilled
        return Plan(self.source, inside, strips, int(max(above, 2 * whole, below) + hole), more)

    def _strips(self, inside: tuple[fx.Node, ...], count: int) -> tuple[Strip, ...] | None:
        assert self.source is not None
        cut, size = inside[-1], self.regions.rows(self.source, 0)
        scale, rows = self.scale[cut], self.regions.rows(cut, 0)
        if rows < 4 * count:
            return None
        middle = rows // 2
        first, last = self._need(inside, middle, middle + 1)
        above, below = _up(middle * scale - first, scale), _up(last - (middle + 1) * scale, scale)
        halos = [(above if i else 0) + (below if i < count - 1 else 0) for i in range(count)]
        # Heights with their halo rise by one; onnxruntime was seen to run the last, tallest strip first.
        step = (rows + sum(halos) + sum(range(count))) // count
        own = [step - (count - 1 - i) - halos[i] for i in range(count)]
        own[-1] += rows - sum(own)
        if min(own) < 1:
            return None
        found, low = [], 0
        for kept in own:
            first, last = self._need(inside, low, low + kept)
            start, stop = first // scale * scale, min(size, _up(last, scale) * scale)  # on the grid of all strides
            found.append(Strip(start, stop, low - start // scale, kept))
            low += kept
        heights = {s.stop - s.start for s in found}
        return tuple(found) if len(heights) == count and max(heights) < size else None

    def _need(self, inside: tuple[fx.Node, ...], low: int, high: int) -> tuple[int, int]:
        """The source rows that rows [low, high) of the cut need."""
        wanted: dict[fx.Node, tuple[int, int]] = {inside[-1]: (low, high)}
        for node in reversed(inside):
            if node not in wanted:
                continue
            for operand in self.regions.maps(node):
                first, last, _, _ = self.regions.edge(node, operand, 0).need(*wanted[node])
                known = wanted.get(operand, (first, last))
                wanted[operand] = (min(first, known[0]), max(last, known[1]))
        assert self.source is not None
        return wanted[self.source]

    def _natural(self, inside: tuple[fx.Node, ...], rows: int) -> dict[fx.Node, int] | None:
        """Rows of each value when a strip of ``rows`` source rows runs as a map; None where they do not fit."""
        assert self.source is not None
        found = {self.source: rows}
        for node in inside:
            given = {found[n] for n in node.all_input_nodes if n in found}
            if not given:
                continue  # a parameter
            if len(given) != 1:
                return None
            length = given.pop()
            found[node] = _windowed(self.regions.window(node), length) if _is_window(node) else length
            if found[node] < 1:
                return None
        return found

    # ------------------------------------------------------------ bytes

    def _bytes(self, node: fx.Node) -> int:
        value = self.values[node]
        return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0

    def _held(self, nodes: Sequence[fx.Node], shares: dict[fx.Node, float], given: fx.Node | None = None) -> int:
        """The most bytes alive while ``nodes`` run; activations and sums take over what they read."""
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        live: dict[fx.Node, int] = {}
        peak = 0
        for node in nodes:
            if node.op == "get_attr":
                continue
            size = int(self._bytes(node) * shares.get(node, 1.0))
            dying = [n for n in node.all_input_nodes if last[n] is node and (n in live or n is given)]
            over = [n for n in dying if live.get(n, -1) >= size] if op(node).spatial is Spatial.POINTWISE else []
            peak = max(peak, sum(live.values()) + (0 if over else size))
            live[node] = size
            for operand in dying:
                live.pop(operand, None)
        return peak


def _is_window(node: fx.Node) -> bool:
    return op(node).spatial is Spatial.WINDOW


def _activated(node: fx.Node) -> bool:
    """A cut between a convolution and its activation would keep the runtime from fusing them."""
    users = list(node.users)
    return len(users) == 1 and op(users[0]).spatial is Spatial.POINTWISE and len(users[0].all_input_nodes) == 1


def _up(rows: int, scale: int) -> int:
    return -(-rows // scale)


def _windowed(rule: Window, length: int) -> int:
    span = length + rule.padding[0] + rule.padding_end[0] - rule.dilation[0] * (rule.kernel[0] - 1) - 1
    if not rule.ceil_mode:
        return span // rule.stride[0] + 1
    count = _up(span, rule.stride[0]) + 1
    # the last window has to start on the map or its padding, as torch has it
    return count - 1 if (count - 1) * rule.stride[0] >= length + rule.padding[0] else count


def _rows(value: Any) -> int:
    return int(value.shape[-2]) if isinstance(value, torch.Tensor) and value.dim() > 2 else 1


def _macs(node: fx.Node, values: dict[fx.Node, Any]) -> float:
    value = values[node]
    if not isinstance(value, torch.Tensor) or node.op == "get_attr":
        return 0.0
    weight = bind(node).get("weight") if _is_window(node) and "pool" not in op_name(node) else None
    weight = values.get(weight) if isinstance(weight, fx.Node) else weight
    return float(value.numel() * (weight[0].numel() if isinstance(weight, torch.Tensor) else 1))
