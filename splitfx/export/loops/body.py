"""The nodes of a loop over strips of rows: what each strip reads, what it keeps for the next, what it adds up.

A group of nodes runs in the strips in which it is due. What it reads of earlier groups gathers until then; of what its
windows reach back for, the last rows are kept: at first the padding in front of the map, so the top border is the first
state and the bottom border are rows put behind the last strip. Every row is computed once, from real rows and real
padding, and nothing is masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from splitfx.export.loops.flow import Flow, Rule, reduced
from splitfx.export.loops.writer import END, Scope, loose


@dataclass(frozen=True)
class Pace:
    """Strips of ``rows`` rows of the source; each group runs in every ``firing_intervals[group]``-th."""

    rows: int
    firing_intervals: tuple[int, ...]


class Loop:
    """Writes a flow as a Loop node. ``first``: the map whose rows are counted; ``ends``: the values of the flow that
    are read behind the loop; ``names``: the names that are taken, with how many values bear them."""

    def __init__(
        self, flow: Flow, first: ir.Value, ends: Sequence[ir.Value], pace: Pace, names: dict[str, int]
    ) -> None:
        self.flow, self.first, self.ends, self.pace, self.names = flow, first, list(ends), pace, names
        self._needs = flow.needs()
        self.sources = [v for v, p in flow.places.items() if v.producer() not in flow.rules]
        self.outer, self.body = Scope("main", self.names), Scope("strip", self.names)
        self.states: list[
            tuple[ir.Value, ir.Value, ir.Value]
        ] = []  # first value, as the body reads it, as it leaves it
        self.there: dict[ir.Value, ir.Value] = {}  # a value -> its rows of this strip
        self._fillers: dict[Any, ir.Value] = {}
        self.totals: dict[ir.Node, tuple[ir.Value, ir.Value | None]] = {}  # of reductions: the total, the rows counted
        self.found: dict[ir.Value, ir.Value] = {}  # a value of the graph -> what the loop makes of it

    def write(self) -> list[ir.Node]:
        """The nodes that take the place of the flow's; what they give is in ``found``."""
        self._strips()
        members: list[list[Any]] = [[] for _ in range(self.flow.groups)]
        for node in self.flow.rules:
            members[self._group(node)].append(node)
        for group, nodes in enumerate(members):
            if nodes:
                _Group(self, group, nodes).write()
        finals = self._ends()
        go_on = self.body("Identity", self._go)
        inputs = [self._i, self._go, *(inside for _, inside, _ in self.states)]
        body = self.body.graph(inputs, [go_on, *(after for _, _, after in self.states)])
        ends = [self.outer.value("end", loose(inside)) for _, inside, _ in self.states]
        self.outer.add(
            "Loop",
            [self._trips, self.outer.constant(np.array(True)), *(first for first, _, _ in self.states)],
            ends,
            body=body,
        )
        self._finish(dict(zip([inside for _, inside, _ in self.states], ends, strict=True)), finals)
        return self.outer.nodes

    def _group(self, node: Any) -> int:
        return max(self.flow.places[v].group for v in (*node.inputs, *node.outputs) if v in self.flow.places)

    # ------------------------------------------------------------ strips

    def _strips(self) -> None:
        """The number of strips: the last has no fewer rows than a stride needs."""
        outer, body, rows = self.outer, self.body, self.pace.rows
        unit = max(self.flow.unit(g) for g in range(self.flow.groups) if g == 0 or self.always(g))
        size = outer.count(self.first)
        # The states have other heights later on: OpenVINO must not take the first one for granted, so it is taken from
        # a value of the map; from its height, it is known once a user has fixed that.
        rank = len(self.first.shape.dims)  # type: ignore[union-attr]
        corner = outer("Slice", self.first, outer.number([0] * rank), outer.number([1] * rank))
        number = outer("Cast", outer("Reshape", corner, outer.number([1])), to=7)
        self._nothing = outer("Mod", number, outer.number([1]))
        whole = outer("Div", outer("Sub", size, outer.number([unit])), outer.number([rows]))
        trips = outer("Max", outer("Add", whole, outer.number([1])), outer.number([1]))
        self._trips = outer("Squeeze", trips)
        self._size = outer("Squeeze", size)
        self._i = ir.Value(name="loop/strip", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
        self._go = ir.Value(name="loop/go", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
        self._next = body("Add", self._i, body.number(1))
        self.last = body("Equal", self._next, self._trips)
        self.lasts = body("Reshape", body("Cast", self.last, to=7), body.number([1]))
        for source in self.sources:
            share = body.number([int(rows * self.flow.places[source].share)])
            start, stop = (body("Mul", number, share) for number in (self._i, self._next))
            stop = body("Where", self.last, body.number([END]), stop)
            self.there[source] = body.rows(source, start, stop)

    def times(self, group: int) -> tuple[int, int]:
        """A group runs in every so many strips, from so many on."""
        return self.pace.firing_intervals[group], max(1, -(-self._needs[group] // self.pace.rows))

    def always(self, group: int) -> bool:
        return self.times(group) == (1, 1)

    def due(self, group: int) -> ir.Value:
        """In every so many strips once all its values have a row, unless too few rows for another time were left."""
        body, (every, first) = self.body, self.times(group)
        due = body("GreaterOrEqual", self._next, body.number(first))
        left = body("Sub", self._size, body("Mul", self._next, body.number(self.pace.rows)))
        due = body("And", due, body("GreaterOrEqual", left, body.number(self.flow.unit(group))))
        if every > 1:
            due = body("And", due, body("Equal", body("Mod", self._next, body.number(every)), body.number(0)))
        return body("Or", due, self.last)

    # ------------------------------------------------------------ states

    def state(self, first: ir.Value, like: ir.Value) -> ir.Value:
        """A state as the body reads it; `leave` says what it becomes."""
        inside = self.body.value("state", like)
        self.states.append((first, inside, inside))
        return inside

    def leave(self, inside: ir.Value, after: ir.Value) -> None:
        self.states = [(f, i, after if i is inside else a) for f, i, a in self.states]

    def filler(self, value: ir.Value, rows: int, fill: float = 0.0) -> ir.Value:
        """So many rows of padding of a value, for all columns; in the outer graph."""
        dims: list[Any] = list(value.shape.dims) if value.shape is not None else []
        dims[2] = None
        return self.full(dims, value.dtype, fill, rows)

    def full(self, dims: Sequence[Any], dtype: Any, fill: float, rows: int | None = None) -> ir.Value:
        key = (*map(str, dims), dtype, fill, rows)
        if key not in self._fillers:
            outer = self.outer
            parts = [outer.number([d]) if isinstance(d, int) else None for d in dims]
            if parts[0] is None:
                parts[0] = outer("Shape", self.first, start=0, end=1)
            if rows is not None:
                parts[2] = outer("Add", self._nothing, outer.number([rows]))
            shape = outer("Concat", *parts, axis=0)
            one = ir.tensor(np.array([fill], dtype.numpy()), name="fill")
            like = ir.Value(
                type=ir.TensorType(dtype), shape=ir.Shape([d if isinstance(d, int) else None for d in dims])
            )
            self._fillers[key] = outer("ConstantOfShape", shape, like=like, value=one)
        return self._fillers[key]

    # ------------------------------------------------------------ what is read behind the loop

    def _ends(self) -> dict[ir.Value, ir.Value]:
        """For each map that is read behind the loop the sequence of its pieces."""
        found = {}
        for value in self.ends:
            dtype: Any = value.dtype
            kind = ir.SequenceType(ir.TensorType(dtype))
            empty = self.outer("SequenceEmpty", dtype=int(dtype))
            empty.type = kind
            inside = self.body.value("pieces")
            inside.type = kind
            after = self.body("SequenceInsert", inside, self.there[value])
            after.type = kind
            self.states.append((empty, inside, after))
            found[value] = inside
        return found

    def _finish(self, ends: dict[ir.Value, ir.Value], pieces: dict[ir.Value, ir.Value]) -> None:
        for value, inside in pieces.items():
            ends[inside].type = inside.type
            self.found[value] = self.outer("ConcatFromSequence", ends[inside], like=value, axis=2)
        for node, (total, count) in self.totals.items():
            self.found[node.outputs[0]] = self._number(node, ends[total], ends[count] if count is not None else None)

    def _number(self, node: Any, total: Any, count: ir.Value | None) -> ir.Value:
        outer, out = self.outer, node.outputs[0]
        if count is not None:
            shape = node.inputs[0].shape.dims
            others = math.prod(int(shape[a]) for a in _axes(node) if a != 2)
            wide = outer("Cast", outer("Mul", count, outer.number([others])), to=int(total.dtype))
            total = outer("Div", total, outer("Squeeze", wide))
        return outer("Cast", total, like=out, to=int(out.dtype))


def _axes(node: Any) -> list[int]:
    rank = len(node.inputs[0].shape)
    return sorted(range(2, rank)) if node.op_type.startswith("Global") else sorted(reduced(node, rank) or ())


class _Group:
    """The nodes of one group, in a branch of their own unless they run in every strip."""

    def __init__(self, loop: Loop, group: int, nodes: Sequence[Any]) -> None:
        self.loop, self.group, self.nodes = loop, group, list(nodes)
        self.inline = loop.always(group)
        self.scope = loop.body if self.inline else Scope(f"group_{group}", loop.names)
        self.there: dict[ir.Value, ir.Value] = {}
        self.gives: list[tuple[ir.Value, ir.Value, ir.Value]] = []  # (state, what it becomes here, or else)
        self._kept: dict[Any, ir.Value] = {}
        self._given: set[ir.Value] = set()

    def write(self) -> None:
        loop, places = self.loop, self.loop.flow.places
        own = {v for n in self.nodes for v in n.outputs}
        for value in dict.fromkeys(v for n in self.nodes for v in n.inputs if v in places and v not in own):
            self.there[value] = self._gathered(value)
        for node in self.nodes:
            self.scope.layer = dict(node.metadata_props)
            self._node(node, loop.flow.rules[node])
        self.scope.layer = {}
        later = [v for n in self.nodes for v in n.outputs if v in places and self._leaves(v)]
        if self.inline:
            loop.there |= {v: self.there[v] for v in later}
            for state, after, _ in self.gives:
                loop.leave(state, after)
            return
        self._branch(later)

    def _leaves(self, value: ir.Value) -> bool:
        """Later groups read it, or what is behind the loop."""
        rules = self.loop.flow.rules
        users = [u.node for u in value.uses()]
        return value in self.loop.ends or any(u in rules and self.loop._group(u) > self.group for u in users)

    def _gathered(self, value: ir.Value) -> ir.Value:
        """Rows of what comes from earlier groups, since this one ran last."""
        loop, piece = self.loop, self.loop.there[value]
        came = (1, 1) if value in loop.sources else loop.times(loop.flow.places[value].group)
        if came == loop.times(self.group):
            return piece  # they run in the same strips
        inside = loop.state(loop.filler(value, 0), loose(value))
        joined = loop.body("Concat", inside, piece, like=loose(value), axis=2)
        self.gives.append((inside, loop.filler(value, 0), joined))
        return joined

    def _branch(self, later: Sequence[ir.Value]) -> None:
        """If the group is due; else nothing comes of it, and its states stay."""
        loop = self.loop
        other = Scope(f"group_{self.group}_waits", loop.names)
        outputs = [self._own(self.scope, self.there[v]) for v in later]
        outputs += [self._own(self.scope, after) for _, after, _ in self.gives]
        waits = [other("Identity", loop.filler(v, 0), like=loose(v)) for v in later]
        waits += [other("Identity", kept, like=kept) for _, _, kept in self.gives]
        found = [loop.body.value("piece", loose(v)) for v in later]
        found += [loop.body.value("kept", state) for state, _, _ in self.gives]
        branches = {"then_branch": self.scope.graph([], outputs), "else_branch": other.graph([], waits)}
        loop.body.add("If", [loop.due(self.group)], found, **branches)
        loop.there |= dict(zip(later, found, strict=False))
        for (state, _, _), after in zip(self.gives, found[len(later) :], strict=True):
            loop.leave(state, after)

    def _own(self, scope: Scope, value: ir.Value) -> ir.Value:
        """A branch gives values of its own, each once."""
        if value.producer() not in scope.nodes or value in self._given:
            value = scope("Identity", value, like=value)
        self._given.add(value)
        return value

    # ------------------------------------------------------------ nodes

    def _node(self, node: Any, rule: Rule) -> None:
        if rule.kind == "reduce":
            self._reduce(node, rule)
            return
        places, value = self.loop.flow.places, node.outputs[0]
        if rule.kind == "window":
            first = self._behind(node, rule)
            inputs = [first, *(self._operand(v) for v in node.inputs[1:])]
        else:
            inputs = self._level([self._operand(v) for v in node.inputs], node, places[value].lag)
        attributes = _without_rows(node) if rule.kind == "window" else [*node.attributes.values()]
        out = self.scope.value(value.name or "value", loose(value))
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            attributes,
            outputs=[out],
            metadata_props=dict(node.metadata_props),
            name=node.name,
        )
        self.scope.nodes.append(made)
        self.there[value] = out

    def _operand(self, value: ir.Value | None) -> ir.Value | None:
        if value is None or value in self.there:
            return None if value is None else self.there[value]
        tensor = ir.convenience.get_const_tensor(value)
        return value if tensor is None else self.scope.parameter(value, tensor)

    def _behind(self, node: Any, rule: Rule) -> ir.Value:
        """What a window reads: the rows kept, those of this strip, and behind the last one the padding."""
        value, places = node.inputs[0], self.loop.flow.places
        assert value is not None
        kept = rule.before - places[value].lag + rule.stride * places[node.outputs[0]].lag
        key = (value, kept, rule.before, rule.after, rule.fill if rule.before or rule.after else 0)
        if key not in self._kept:
            self._kept[key] = self._with_state(value, kept, rule)
        return self._kept[key]

    def _with_state(self, value: ir.Value, kept: int, rule: Rule) -> ir.Value:
        loop, scope, piece = self.loop, self.scope, self.there[value]
        parts, state = [piece], None
        if kept > 0 or rule.before:
            state = loop.state(loop.filler(value, rule.before, rule.fill if rule.before else 0.0), loose(value))
            parts.insert(0, state)
        if rule.after:
            parts.append(self._bottom(value, rule))
        whole = scope("Concat", *parts, like=loose(value), axis=2) if len(parts) > 1 else piece
        if state is not None:
            after = scope.rows(whole, scope.number([-kept if kept > 0 else END]), scope.number([END]))
            self.gives.append((state, after, state))
        if kept < 0:  # rows of the next strip that no window reads
            one = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
            skip = loop.state(loop.outer.number([0]), one)
            whole = scope.rows(whole, skip, scope.number([END]))
            self.gives.append((skip, scope.number([-kept]), skip))
        return whole

    def _bottom(self, value: ir.Value, rule: Rule) -> ir.Value:
        loop, scope = self.loop, self.scope
        stop = scope("Mul", loop.lasts, scope.number([rule.after]))
        return scope.rows(loop.filler(value, rule.after, rule.fill), scope.number([0]), stop)

    def _level(self, inputs: list[Any], node: Any, lag: int) -> list[Any]:
        """The same rows of all maps: those that are ahead wait for the last."""
        places = self.loop.flow.places
        maps = [(i, v) for i, v in enumerate(node.inputs) if v in places]
        last = next((i for i, v in maps if places[v].lag == lag), maps[0][0])
        for i, value in maps:
            if places[value].lag < lag:
                inputs[i] = self._delayed(value, lag - places[value].lag, inputs[last])
        return inputs

    def _delayed(self, value: ir.Value, by: int, last: ir.Value) -> ir.Value:
        key = ("delay", value, by)
        if key not in self._kept:
            scope, piece = self.scope, self.there[value]
            state = self.loop.state(self.loop.filler(value, 0), loose(value))
            whole = scope("Concat", state, piece, like=loose(value), axis=2)
            count = scope.count(last)
            self._kept[key] = scope.rows(whole, scope.number([0]), count)
            self.gives.append((state, scope.rows(whole, count, scope.number([END])), state))
        return self._kept[key]

    def _reduce(self, node: Any, rule: Rule) -> None:
        loop, scope, out = self.loop, self.scope, node.outputs[0]
        x = self.there[node.inputs[0]]
        dtype = ir.DataType.FLOAT if out.dtype == ir.DataType.FLOAT16 else out.dtype
        if dtype != out.dtype:
            x = scope("Cast", x, to=int(dtype))
        how = {"mean": "ReduceSum", "sum": "ReduceSum", "max": "ReduceMax", "min": "ReduceMin"}[rule.how]
        keep = node.attributes.get("keepdims")
        like = ir.Value(type=ir.TensorType(dtype), shape=out.shape)
        part = scope(how, x, scope.number(_axes(node)), like=like, keepdims=int(keep.value) if keep is not None else 1)
        fill = {"max": -math.inf, "min": math.inf}.get(rule.how, 0.0)
        total = loop.state(loop.full(list(out.shape.dims), dtype, fill), like)
        self.gives.append(
            (total, scope({"max": "Max", "min": "Min"}.get(rule.how, "Add"), total, part, like=like), total)
        )
        count = None
        if rule.how == "mean":
            one = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
            count = loop.state(loop.outer.number([0]), one)
            self.gives.append((count, scope("Add", count, scope.count(x), like=one), count))
        loop.totals[node] = (total, count)


def _without_rows(node: Any) -> list[ir.Attr]:
    """The attributes of a window that pads no rows, and rounds up by its padding of columns."""
    given = {name: a for name, a in node.attributes.items() if name != "ceil_mode"}
    sizes, made = (list(v.shape.dims)[2:] for v in (node.inputs[0], node.outputs[0]))
    pads = list(given["pads"].value) if "pads" in given else [0] * (2 * len(sizes))
    pads[0] = pads[len(sizes)] = 0
    if "ceil_mode" in node.attributes and node.attributes["ceil_mode"].value:
        for axis in range(1, len(sizes)):
            kernel, stride, dilation = (
                given[n].value[axis] if n in given else 1 for n in ("kernel_shape", "strides", "dilations")
            )
            read = (made[axis] - 1) * stride + dilation * (kernel - 1) + 1
            pads[len(sizes) + axis] = max(pads[len(sizes) + axis], read - sizes[axis] - pads[axis])
    return [*(a for name, a in given.items() if name != "pads"), ir.AttrInt64s("pads", pads)]
