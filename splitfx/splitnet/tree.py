"""A carved model as what it is, a tree: a stem, shared trunks, one branch per group of classes, and the merge.

Every node is needed by the logits of some groups; nodes that the same groups need are a *part*, a graph of its own
with named inputs and outputs. Parts only read from parts that more groups need, so they run in the order of `parts`,
those of different groups side by side. A model whose groups read each other before the end (a LayerNorm over all
channels, a relaxed gate) has all of that in its stem.

Refuses (`UnsupportedError`): a model that `SplitNet` did not carve, one with grouped convolutions instead of branches.
Promises: all parts together are the model; they hold its own parameters. With ``narrow``, layers of the stem of which
each group reads other channels are divided among the groups (`splitfx.splitnet.boundary`): those hold parts of the
parameters, copied where they are no run, and the result is held to the model in float64 unless ``verify`` is off. So
train the model itself and make its tree afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from splitfx.analysis import facts
from splitfx.analysis.oracle import require_equal
from splitfx.errors import UnsupportedError
from splitfx.ground.table import number, size, table
from splitfx.ir import graph as graphs
from splitfx.ir.editing import readers_of_memory
from splitfx.ir.graph import TensorSpec, TraceInfo, attribute, layer, operands, output_node
from splitfx.ir.ops import Channel, bind, in_place, is_size, op, op_name, out_of_place
from splitfx.ir.walks import ancestors, descendants
from splitfx.splitnet import boundary
from splitfx.splitnet.arguments import arguments_of, bound
from splitfx.tiling.stage.extract import stage_graph

STEM, MERGE = "stem", "merge"


@dataclass(frozen=True)
class Part:
    """Some nodes of a tree as a canonical graph: called with its ``inputs`` in order, it returns a list, ``outputs``.

    ``groups``: those that need it; none for the merge. ``macs`` of one call and ``bytes`` of the outputs are for the
    traced sizes.
    """

    name: str
    groups: tuple[int, ...]
    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    macs: int
    params: int
    bytes: int


class Tree:
    """The parts of ``split``, the result of a plan with `SplitNet`; called like it, it runs them one by one.

    ``parts``: in an order in which they can run, the merge last. ``pieces``: the value that each group gives, its
    logits. ``classes``: the classes of each group, as numbers of the model's output, in the order of its logits.
    ``graph``: the whole. ``inputs``: names of the model's inputs; ``arguments``: where each comes
    from. Raises `UnsupportedError`, `VerificationError`.
    """

    def __init__(self, split: fx.GraphModule, narrow: bool = True, verify: bool = True) -> None:
        _carved(split)
        self.graph = graphs.inputs_as_now(graphs.copy_graph(split, share=True))
        joint = logits(self.graph)
        if narrow and boundary.divide(self.graph, needs(self.graph, joint)):
            joint = logits(self.graph)
            if verify:
                require_equal("splitnet", split, self.graph)
        self._joint, self._needs = joint, needs(self.graph, joint)
        self.pieces = tuple(n.name for n in operands(joint))
        self.inputs = tuple(n.name for n in self.graph.graph.nodes if n.op == "placeholder")
        self.arguments = arguments_of(self.graph)
        self.dim: int = bind(joint)["dim"]  # along which the groups' logits lie side by side
        self.classes = _classes(self.graph, joint)
        self.parts = self._divided()

    @property
    def groups(self) -> int:
        return len(self.pieces)

    @property
    def merge(self) -> Part:
        return self.parts[-1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = self.given(args, kwargs)
        for part in self.parts:
            values |= run(part, values)
        return self.returned(values)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs by name. Raises `UnsupportedError` where they are others than it takes."""
        try:
            return dict(zip(self.inputs, bound(self.arguments, args, kwargs), strict=True))
        except ValueError as error:
            raise UnsupportedError(str(error)) from None

    def returned(self, values: dict[str, Any]) -> Any:
        """What the model returns, from the value of the merge."""
        held = map_arg(output_node(self.graph).args[0], lambda n: values[n.name])
        return self.graph.graph.process_outputs(held)

    def program(self, groups: Iterable[int], stem: bool = True) -> Part:
        """All parts that some groups need as one, giving their logits; without ``stem`` its values are inputs."""
        own = frozenset(groups)
        if not own or not own <= set(range(self.groups)):
            raise UnsupportedError(f"the groups of this model are 0 to {self.groups - 1}; asked for {sorted(own)}")
        everyone = frozenset(range(self.groups))
        nodes = [n for n, who in self._needs.items() if who & own and (stem or who != everyone)]
        name = f"groups {', '.join(map(str, sorted(own)))}"
        return self._part(name, tuple(sorted(own)), nodes, [self.pieces[g] for g in sorted(own)])

    def __str__(self) -> str:
        rows = []
        for part in self.parts:
            held = f"{sum(len(self.classes[g]) for g in part.groups)}" if part.groups else "-"
            reads = ", ".join(part.inputs)
            rows.append((part.name, held, number(part.params), number(part.macs), size(part.bytes), reads))
        return table(("part", "classes", "parameters", "MACs", "gives", "reads"), rows, left=(0, 5))

    # ------------------------------------------------------------ parts

    def _divided(self) -> tuple[Part, ...]:
        """Parts by who needs them: those of more groups first, so that every part finds what it reads."""
        sets: dict[frozenset[int], list[fx.Node]] = {}
        for node, who in self._needs.items():
            sets.setdefault(who, []).append(node)
        order = sorted(sets, key=lambda who: (-len(who), sorted(who)))
        made = [self._part(self._name(who), tuple(sorted(who)), sets[who]) for who in order]
        return *made, self._part(MERGE, (), _behind(self.graph, self._joint))

    def _name(self, who: frozenset[int]) -> str:
        if len(who) == self.groups:
            return STEM
        return f"branch {min(who)}" if len(who) == 1 else f"trunk {', '.join(map(str, sorted(who)))}"

    def _part(
        self, name: str, groups: tuple[int, ...], nodes: Sequence[fx.Node], outputs: Sequence[str] | None = None
    ) -> Part:
        known = facts(self.graph)
        inside = set(nodes)
        small, sources, exits, copied = stage_graph(self.graph, nodes)
        for node in nodes:
            if in_place(node) and _read_elsewhere(node, inside) and node.op == "call_function":
                copied[node].target = out_of_place(node.target)
        if outputs is not None:
            exits = [next(n for n in nodes if n.name == wanted) for wanted in outputs]
            output_node(small).args = ([copied[n] for n in exits],)
        small.recompile()
        small.training = self.graph.training
        small.meta[graphs.INFO] = self._info(name, sources)
        rows = [known.cost.rows[n] for n in nodes]
        return Part(
            name,
            groups,
            small,
            tuple(n.name for n in sources),
            tuple(n.name for n in exits),
            sum(r.macs for r in rows),
            sum(p.numel() for p in small.parameters()),
            sum(known.cost.rows[n].bytes for n in exits),
        )

    def _info(self, name: str, sources: Sequence[fx.Node]) -> TraceInfo:
        known, values = graphs.info(self.graph), facts(self.graph).shapes
        given = dict(zip(self.inputs, known.inputs, strict=True))
        inputs = tuple(given[n.name] if n.name in given else _spec(values[n], n) for n in sources)
        spec = pytree.tree_flatten((inputs, {}))[1]
        return TraceInfo(inputs, spec, f"{known.model_class}, {name}", known.front_end)


def run(part: Part, values: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a part by name, from values by name."""
    return dict(zip(part.outputs, part.graph(*(values[name] for name in part.inputs)), strict=True))


def _carved(split: fx.GraphModule) -> None:
    known = graphs.info(split)
    made = {p.name: p.lowering for p in getattr(known.plan, "passes", ()) if p.name == "splitnet"}
    made |= {one.name: one.options.get("lowering") for one in known.steps if one.name == "splitnet" and one.changed}
    if not made:
        raise UnsupportedError("only a model that SplitNet carved has branches: transform it with SplitNet first")
    if made["splitnet"] != "branches":
        raise UnsupportedError(
            "this model is carved into grouped convolutions, which cannot be taken apart: transform it with "
            'SplitNet(..., lowering="branches")'
        )
    if any(one.name == "tile" and one.changed for one in known.steps):
        raise UnsupportedError("a tiled model cannot be taken apart: take the carved one apart, then tile its parts")
    writes = next((n for n in split.graph.nodes if n.meta.get("writes_view")), None)
    if writes is not None:
        raise UnsupportedError(
            f"layer {layer(writes)} writes into a part of a tensor, so the model cannot be taken apart"
        )


def logits(graph: fx.GraphModule) -> fx.Node:
    """The concat of the groups' logits: what is behind it only moves or scales them. Raises `UnsupportedError`."""
    node = output_node(graph)
    while True:
        operands = [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]
        if op_name(node) == "cat" and len(operands) > 1:
            return node
        rule = op(node).channel if node.op not in ("output", "placeholder") else Channel.SAME
        if len(operands) != 1 or rule is Channel.MIXES:
            raise UnsupportedError(
                f"the output of this model, at layer {layer(node) or node.name}, is not put together from the logits "
                "of groups: SplitNet's levels must reach the classifier"
            )
        node = operands[0]


def needs(graph: fx.GraphModule, joint: fx.Node) -> dict[fx.Node, frozenset[int]]:
    """The groups whose logits need each node, in the order of the graph; constants, sizes and inputs go with their
    readers."""
    who: dict[fx.Node, set[int]] = {}
    values = facts(graph).shapes
    for g, piece in enumerate(operands(joint)):
        for node in ancestors([piece]):
            who.setdefault(node, set()).add(g)
    for node in graph.graph.nodes:  # a tuple is taken apart where it is made
        if node in who and op_name(node) == "getitem" and not isinstance(values[node.args[0]], torch.Tensor):
            who[node] = who[node.args[0]]
    free = ("placeholder", "get_attr", "output")
    return {n: frozenset(who[n]) for n in graph.graph.nodes if n in who and n.op not in free and not is_size(n)}


def _behind(graph: fx.GraphModule, joint: fx.Node) -> list[fx.Node]:
    found = set(descendants([joint]))
    return [n for n in graph.graph.nodes if n in found and n.op != "output"]


def _classes(graph: fx.GraphModule, joint: fx.Node) -> tuple[tuple[int, ...], ...]:
    """Where each group's logits end up: carving puts a gather behind the concat where the order is not there yet."""
    values = facts(graph).shapes
    dim: int = bind(joint)["dim"]
    widths = [values[n].shape[dim] for n in operands(joint)]
    order = torch.arange(sum(widths))
    users = list(joint.users)
    if len(users) == 1 and op_name(users[0]) == "index_select":
        order = torch.argsort(attribute(graph, str(bind(users[0])["index"].target)).cpu())
    return tuple(tuple(piece.tolist()) for piece in order.split(widths))


def _read_elsewhere(node: fx.Node, inside: set[fx.Node]) -> bool:
    """What an in-place node overwrites may be read by another part, which may run later here."""
    operand = node.args[0]
    if not isinstance(operand, fx.Node) or operand not in inside or op(operand).channel is Channel.MOVE:
        return True
    return not readers_of_memory(operand) <= inside


def _spec(value: Any, node: fx.Node) -> Any:
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"layer {layer(node)} hands something that is no tensor from one part to another")
    return TensorSpec(tuple(value.shape), value.dtype, str(value.device))
