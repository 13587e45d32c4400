"""How rows flow through the nodes of an ONNX graph: what a piece of each value is made of, and which values a loop over
strips of rows can make.

Once `A` rows of the source have been read, a value has ``share * A - lag`` rows, where ``A`` is a multiple of the
loop's ``unit``, the least common multiple of all strides, and large enough for every value to have one. So an
operation's operands are a constant number of rows apart, and what it keeps of each from one strip to the next is too.

What does not follow strip by strip is left out, with the reason in ``Flow.why``: it is computed behind the loop.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

POINTWISE = {
    "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "Concat", "Cos", "Div", "Elu",
    "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub",
    "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
}  # fmt: skip
WINDOWS = {"Conv", "MaxPool", "AveragePool"}
REDUCTIONS = {
    "GlobalAveragePool": "mean", "GlobalMaxPool": "max",
    "ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min",
}  # fmt: skip
ROWS = 2  # the axis behind batch and channels
Kind = Literal["same", "window", "grow", "reduce"]


@dataclass(frozen=True)
class Rule:
    """What a row of a node's output is made of. ``same``: the same row. ``window``: rows under a kernel of ``reach``
    rows, every ``stride`` rows, behind ``before`` and in front of ``after`` rows of ``fill``. ``grow``: ``stride`` rows
    for each. ``reduce``: all rows, added up as ``how`` says."""

    kind: Kind
    reach: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0
    fill: float = 0.0
    how: str = ""


SAME = Rule("same")


@dataclass
class Place:
    """Where a value lies: with ``share * A - lag`` rows made of ``A`` rows of the source. ``group``: of nodes that run
    in the same steps. ``windows``: the rows that its group has to read in front, in rows of the value."""

    share: Fraction
    lag: int
    group: int = 0
    deep: int = 0  # windows of more than a row that lie before it in its group
    entry: Fraction = Fraction(1)  # the share of the map that its group reads


@dataclass
class Flow:
    """One loop: its sources, its nodes in order with their rules, the places of their values, and why others are not in
    it."""

    places: dict[Any, Place] = field(default_factory=dict)
    rules: dict[Any, Rule] = field(default_factory=dict)
    why: dict[Any, str] = field(default_factory=dict)

    def unit(self, group: int) -> int:
        """Source rows after which all strides up to those of a group begin anew."""
        return math.lcm(*(p.share.denominator for p in self.places.values() if p.group <= group))

    @property
    def groups(self) -> int:
        return 1 + max(p.group for p in self.places.values())

    def needs(self) -> list[int]:
        """For each group the source rows behind which all its values have a row."""
        found = [0] * self.groups
        for place in self.places.values():
            found[place.group] = max(found[place.group], math.floor((place.lag + 1) / place.share) + 1)
        return [max(found[: group + 1]) for group in range(self.groups)]  # none before those that it reads


def followed(sources: Mapping[Any, Fraction], nodes: Iterable[Any], inside: Container[Any]) -> Flow:
    """The loop that starts from these maps, whose heights are these shares of one: every node ``inside`` that can be in
    it is. ``nodes``: of the whole graph, in order."""
    flow = Flow({value: Place(share, 0, entry=share) for value, share in sources.items()})
    late: set[Any] = set()  # values that are known behind the loop only
    for node in nodes:
        read = [v for v in node.inputs if v in flow.places]
        if not read and not late.intersection(node.inputs):
            continue  # known before the loop
        found = _in_loop(node, read, flow, late) if node in inside else "it is not tiled"
        if isinstance(found, str):
            flow.why[node] = found
        else:
            flow.rules[node] = found
            if found.kind != "reduce":
                flow.places[node.outputs[0]] = _placed(found, [flow.places[v] for v in read])
                continue
        late.update(node.outputs)
    return flow


def _in_loop(node: Any, read: list[Any], flow: Flow, late: set[Any]) -> Rule | str:
    if late.intersection(node.inputs):
        return "it reads what is known behind the loop only"
    found = rule(node, read)
    if not isinstance(found, str) and len({flow.places[v].share for v in read}) > 1:
        return "it joins maps of different heights"
    return found


DEEP = 5  # windows in a group: its first piece is as tall as they reach


def _placed(found: Rule, read: list[Place]) -> Place:
    share, lag = read[0].share, max(p.lag for p in read)
    last = max(read, key=lambda p: (p.group, p.deep))
    group, deep, entry = last.group, last.deep, last.entry
    if found.kind == "window":
        if found.reach > 1 and deep >= (2 if share < entry else DEEP):
            group, deep, entry = group + 1, 0, share
        lag = -((-lag + found.before - found.reach) // found.stride + 1)
        share, deep = share / found.stride, deep + (found.reach > 1)
    elif found.kind == "grow":
        share, lag = share * found.stride, lag * found.stride
    return Place(share, lag, group, deep, entry)


# ---------------------------------------------------------------- rules


def rule(node: Any, read: Sequence[Any]) -> Rule | str:
    """The rule of a node that reads these maps, or why there is none."""
    kind = node.op_type
    maps = read if kind in REDUCTIONS else (*read, *node.outputs)  # a total needs no axes
    if node.domain or any(v.shape is None or len(v.shape) < 3 for v in maps):
        return f"{kind} has no rule of rows here"
    if kind in WINDOWS:
        return _window(node) if read == [node.inputs[0]] and len(node.outputs) == 1 else f"{kind} of several maps"
    if kind in REDUCTIONS:
        return _reduction(node)
    if kind == "Resize":
        return _resize(node)
    if kind == "ConvTranspose":
        return _transposed(node) if read == [node.inputs[0]] else "ConvTranspose of several maps"
    if kind == "DepthToSpace":
        return Rule("grow", stride=_int(node, "blocksize", 1))
    if kind not in POINTWISE:
        return f"{kind} has no rule of rows"
    return _pointwise(node, read)


def _pointwise(node: Any, read: Sequence[Any]) -> Rule | str:
    rank = len(node.outputs[0].shape)
    if any(len(v.shape) != rank for v in read):
        return f"{node.op_type} of maps with other axes"
    if node.op_type == "Concat" and _int(node, "axis", 0) % rank != 1:
        return "Concat along rows or columns"
    if node.op_type == "BatchNormalization":
        return SAME
    others = [v.shape for v in node.inputs if v is not None and v not in read]
    if any(shape is None or (len(shape) >= rank - ROWS and shape[len(shape) - rank + ROWS] != 1) for shape in others):
        return f"{node.op_type} reads a table of rows"
    return SAME


def _window(node: Any) -> Rule | str:
    kind = node.op_type
    if _text(node, "auto_pad", "NOTSET") != "NOTSET":
        return f"{kind} that pads by itself"
    pads, axes = _ints(node, "pads"), len(node.outputs[0].shape) - ROWS
    pads = pads or (0,) * (2 * axes)
    kernel = _ints(node, "kernel_shape") or tuple(node.inputs[1].shape[ROWS:])
    stride, dilation = (_ints(node, "strides") or (1,))[0], (_ints(node, "dilations") or (1,))[0]
    reach, before, after = dilation * (kernel[0] - 1) + 1, pads[0], pads[axes]
    if max(before, after) >= reach or (before and reach < stride):
        return f"{kind} with windows that lie in the padding alone"
    if _int(node, "ceil_mode", 0):
        if stride + before > reach or kind != "MaxPool":
            return f"{kind} that rounds up"
        after += stride - 1
    if kind == "AveragePool" and (before or after) and not _int(node, "count_include_pad", 0):
        return "AveragePool that leaves its padding out"
    return Rule("window", reach, stride, before, after, -math.inf if kind == "MaxPool" else 0.0)


def _transposed(node: Any) -> Rule | str:
    kernel = _ints(node, "kernel_shape") or tuple(node.inputs[1].shape[ROWS:])
    stride, axes = (_ints(node, "strides") or (1,))[0], len(kernel)
    pads, more = _ints(node, "pads") or (0,) * 2 * axes, _ints(node, "output_padding") or (0,)
    plain = kernel[0] == stride and not pads[0] and not pads[axes] and not more[0]
    return Rule("grow", stride=stride) if plain else "ConvTranspose whose windows overlap"


def _resize(node: Any) -> Rule | str:
    import onnx_ir as ir

    scales = ir.convenience.get_const_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if scales is None or scales.size < ROWS + 1 or _text(node, "mode", "nearest") != "nearest":
        return "Resize by other than a whole number of nearest rows"
    by = float(scales.numpy()[ROWS])
    floor = _text(node, "coordinate_transformation_mode", "half_pixel") == "asymmetric"
    floor = floor and _text(node, "nearest_mode", "round_prefer_floor") == "floor"
    if by != int(by) or by < 1 or not floor:
        return "Resize by other than a whole number of nearest rows"
    return Rule("grow", stride=int(by))


def _reduction(node: Any) -> Rule | str:
    how, rank = REDUCTIONS[node.op_type], len(node.inputs[0].shape)
    if node.op_type.startswith("Global"):
        return Rule("reduce", how=how)
    axes = reduced(node, rank)
    if axes is None:
        return f"{node.op_type} over axes that are not known"
    if ROWS not in axes:
        kept = _int(node, "keepdims", 1)
        return SAME if kept else f"{node.op_type} that drops an axis"
    return Rule("reduce", how=how)


def reduced(node: Any, rank: int) -> set[int] | None:
    """The axes that a Reduce* node takes together; None where they are computed."""
    import onnx_ir as ir

    if len(node.inputs) < 2 or node.inputs[1] is None:
        return set() if _int(node, "noop_with_empty_axes", 0) else set(range(rank))
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    return None if axes is None else {int(a) % rank for a in axes.numpy().reshape(-1)}


def _int(node: Any, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.value)


def _ints(node: Any, name: str) -> tuple[int, ...]:
    found = node.attributes.get(name)
    return () if found is None else tuple(int(v) for v in found.value)


def _text(node: Any, name: str, default: str) -> str:
    found = node.attributes.get(name)
    return default if found is None else str(found.value)
