"""Carving: run a graph whose weights are block-diagonal as what it is, narrow branches or grouped convolutions.

Input: a dense graph and, per weighted node, a `Division`: which input channels each branch reads and which output
channels it writes. Output: the same graph, rewritten, equal to the dense one with the weights outside the blocks set
to zero (`splitfx.carving.division.masked`); nothing else is promised or changed.

One idea carries it: during the rewrite a tensor is a list of pieces (`splitfx.carving.pieces`). Weighted nodes ask for
the arrangement that they want (one piece per branch, or one piece in any order, folded into their weights); elementwise
nodes run on the pieces as they come; concat, slice and channel shuffle are bookkeeping and cost nothing at run time.
Whatever else asks for the whole tensor gets it, in the user's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis import Facts, facts
from splitfx.analysis.shapes import shape
from splitfx.carving import narrow
from splitfx.carving.division import Division, Divisions
from splitfx.carving.moving import Moving
from splitfx.carving.pieces import Value, nodes_of
from splitfx.errors import UnsupportedError
from splitfx.ir.editing import reorder_nodes
from splitfx.ir.graph import layer, module_of, set_path
from splitfx.ir.notes import Note
from splitfx.ir.ops import Channel, Spatial, bind, in_place, op, out_of_place, per_channel
from splitfx.ir.schema import may_do_nothing, may_share

aten = torch.ops.aten


def carve(graph: fx.GraphModule, divisions: Divisions, lowering: Mapping[fx.Node, str]) -> list[Note]:
    """Rewrite ``graph`` in place; ``lowering`` says ``"grouped"`` or ``"branches"`` per divided node.

    A node whose division is not even is lowered to branches whatever ``lowering`` says. What nobody reads any more
    is dropped by `splitfx.ir.editing.tidy`, which the pipeline calls. Layers that hold one weight still do where they
    need the same parts of it; the notes name those that do not.
    """
    return _Carver(graph, facts(graph), divisions, lowering).run()


class _Carver(Moving):
    def __init__(
        self, graph: fx.GraphModule, known: Facts, divisions: Divisions, lowering: Mapping[fx.Node, str]
    ) -> None:
        super().__init__(graph, known)
        self.divisions, self.lowering = divisions, lowering
        self.calls = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_module")

    def run(self) -> list[Note]:
        for node in self.graph.graph.nodes:
            self.origin = node
            self.visit(node)
            self.holders.update(nodes_of(self.split[node]) if node in self.split else [self.whole[node]])
        self.keep_dense()
        self.install()
        return self.untied() + self.apart()

    def install(self) -> None:
        """Swap the graph in, and the narrow modules for the dense ones that nobody calls any more."""
        called = {str(n.target) for n in self.new.nodes if n.op == "call_module"}
        for path in sorted(self.parted - called):
            set_path(self.graph, path, nn.Module())
        for path, module in self.modules.items():
            set_path(self.graph, path, module)
        if self.branch:
            self.new.owning_module = self.graph
            reorder_nodes(self.new, self.rank)
        self.graph.graph = self.new

    def rank(self, node: fx.Node) -> tuple[int, ...]:
        """Branch after branch, so that one branch's feature maps die before the next branch's are made."""
        return (self.branch.get(node, 0),)

    def visit(self, node: fx.Node) -> None:
        if node in self.divisions:
            self.keep(node, self.divided(node, self.divisions[node]))
            return
        if not any(n in self.split for n in node.all_input_nodes):
            self.whole[node] = self.copy(node)
            return
        rule = op(node).channel
        if node.op == "call_module" and str(node.target) in self.read:
            held = None  # the graph reads its tensors by itself, in their order
        elif rule is Channel.MIXES:
            held = self.grouped(node) if getattr(module_of(node), "groups", 1) > 1 else self.dense(node)
        elif rule in (Channel.SAME, Channel.UNIT):
            held = self.same(node)
        elif rule is Channel.UNKNOWN and op(node).layer is not None:
            held = self.normalised(node)
        else:
            held = self.moved(node) if rule is Channel.MOVE else None
        if held is None:
            self.whole[node] = self.copy(node)
        else:
            self.keep(node, held)

    def keep(self, node: fx.Node, held: Any) -> None:
        """One piece that holds all channels in their order is the value itself."""
        alone = isinstance(held, Value) and len(held.pieces) == 1
        if alone and np.array_equal(held.pieces[0][1], np.arange(held.size)):
            self.whole[node] = held.pieces[0][0]
        else:
            self.split[node] = held

    def copy(self, node: fx.Node) -> Any:
        """The node as it is, on whole tensors. What it overwrites may be a piece of others: then it gets a copy."""
        first, given = node.args[0] if node.args else None, dict[fx.Node, fx.Node]()
        if in_place(node) and isinstance(first, fx.Node) and self.shared(first):
            if node.meta.get("writes_view"):
                raise UnsupportedError(f"{layer(first)} cannot be split: {layer(node)} overwrites a part of it")
            given[first] = self.make(aten.clone.default, self.need(first))
        new = self.note(self.new.node_copy(node, lambda n: given.get(n) or self.need(n)))
        new.meta |= {key: node.meta[key] for key in ("transient", "writes_view") if key in node.meta}
        return new

    def divided(self, node: fx.Node, division: Division) -> Value:
        operand, module = bind(node)["input"], module_of(node)
        value = self.value(operand) or self.undivided(operand, op(node).channel_dim)
        assert module is not None
        size = sum(map(len, division.outs))
        dim = self.dim(node)
        assert dim is not None
        existing = getattr(module, "groups", 1)
        if existing == 1 and self.calls[str(node.target)] == 1:
            # The order that the channels have goes into the weights.
            division = Division(tuple(value.in_order(i) for i in division.ins), division.outs)
        grouped = self.lowering.get(node) == "grouped" and division.even and isinstance(module, nn.modules.conv._ConvNd)
        if grouped and existing == 1:
            source = self.assemble(value, np.concatenate(division.ins))
            new = self.call(
                node,
                "",
                (*division.ins, *division.outs),
                lambda: narrow.grouped(module, division.ins, division.outs),
                source,
                None,
            )
            return Value([(new, np.concatenate(division.outs))], dim, size)
        pieces = []
        alone = len(division.outs) == 1
        for g, (ins, outs) in enumerate(zip(division.ins, division.outs, strict=True)):
            source = self.assemble(value, ins, g)
            make = partial(narrow.weighted, module, ins, outs)
            name, branch = ("", None) if alone else (f"branch{g}", g)
            pieces.append((self.call(node, name, (ins, outs), make, source, branch), outs))
        return Value(pieces, dim, size)

    def undivided(self, node: fx.Node, dim: int) -> Value:
        """A tensor whose channels carry no names (a single one, or laid anew in a way that is not followed)."""
        sizes = shape(self.values[node])
        return Value([(self.need(node), np.arange(sizes[dim]))], dim % len(sizes), sizes[dim])

    def dense(self, node: fx.Node) -> Value | None:
        """An undivided weighted node reads its input in any order: the order goes into its weight."""
        operand = bind(node)["input"]
        value, module = self.value(operand), module_of(node)
        dim = self.dim(node)
        if value is None or module is None or dim is None:
            return None
        order = np.concatenate([p for _, p in value.pieces])
        if np.array_equal(order, np.arange(value.size)):
            return None  # the concat of the pieces is the tensor itself
        size = shape(self.values[node])[dim]
        everything = np.arange(size)
        make = partial(narrow.weighted, module, order, everything)
        new = self.call(node, "", (order,), make, self.assemble(value, order), None)
        return Value([(new, everything)], dim, size)

    def grouped(self, node: fx.Node) -> Value | None:
        """A conv with groups, each of which lies whole within a piece (depthwise above all)."""
        value, module = self.value(bind(node)["input"]), module_of(node)
        if value is None or module is None or not isinstance(node.args[0], fx.Node):
            return None
        groups: int = module.groups  # type: ignore[assignment]
        per_in, per_out = value.size // groups, shape(self.values[node])[value.dim] // groups
        pieces = []
        for g, (piece, positions) in enumerate(value.pieces):
            rows = positions.reshape(-1, per_in) if len(positions) % per_in == 0 else None
            if rows is None or (rows != rows[:, :1] // per_in * per_in + np.arange(per_in)).any():
                return None
            outs = (rows[:, :1] // per_in * per_out + np.arange(per_out)).flatten()
            make = partial(narrow.groups_of, module, rows[:, 0] // per_in, outs)
            name = f"branch{g}" if len(value.pieces) > 1 else ""
            pieces.append((self.call(node, name, (positions,), make, piece, self.branch.get(piece)), outs))
        return Value(pieces, value.dim, per_out * groups)

    def normalised(self, node: fx.Node) -> Value | None:
        """A norm over all channels takes them in any order: the order goes into its scale and shift."""
        value, module = self.value(bind(node)["input"]), module_of(node)
        layer_of = op(node).layer
        if value is None or module is None or layer_of is None or not hasattr(module, "normalized_shape"):
            return None
        order = np.concatenate([p for _, p in value.pieces])
        last = len(shape(self.values[node])) - 1
        if (
            value.dim != last
            or module.normalized_shape != (value.size,)
            or np.array_equal(order, np.arange(len(order)))
        ):
            return None
        make = partial(layer_of.narrow, module, order)
        new = self.call(node, "", (order,), make, self.assemble(value, order), None)
        return Value([(new, order)], last, value.size)

    def same(self, node: fx.Node) -> Value | None:
        """An elementwise, norm or pool node runs on the pieces; its operands are arranged alike."""
        dim = self.dim(node)
        if dim is None:
            return None
        size = shape(self.values[node])[dim]
        rank = len(shape(self.values[node]))
        operands = {n: self.value(n) for n in node.all_input_nodes if isinstance(self.values[n], torch.Tensor)}
        along = {n: v for n, v in operands.items() if v is not None and v.size == size}
        for n in operands.keys() - along.keys():  # a value per channel that no layer writes: a parameter, viewed
            sizes = shape(self.values[n])
            if n not in self.split and len(sizes) >= rank - dim and sizes[dim - rank] == size:
                along[n] = self.undivided(n, dim - rank)
        if not along or any(n in self.split and n not in along for n in operands):
            return None
        reduces = op(node).spatial is Spatial.GLOBAL
        apart = per_channel(node)
        beside = {n: v for n, v in along.items() if n not in apart}
        if not reduces and any(v.dim - len(shape(self.values[n])) != dim - rank for n, v in beside.items()):
            return None
        lead = self.lead(beside)
        made = [(self.piecewise(node, along, positions, g), positions) for g, (_, positions) in enumerate(lead.pieces)]
        return None if any(n is None for n, _ in made) else Value(made, dim, size)  # type: ignore[arg-type]

    def piecewise(self, node: fx.Node, along: dict[fx.Node, Value], positions: np.ndarray, g: int) -> fx.Node | None:
        source = {n: self.assemble(v, positions, g) for n, v in along.items()}
        branch = (
            g if len(next(iter(along.values())).pieces) > 1 or any(n in self.branch for n in source.values()) else None
        )
        if branch is not None:
            branch = next((self.branch[n] for n in source.values() if n in self.branch), g)
        module, held = module_of(node), op(node).layer
        if module is not None and held is not None and held.held(module):
            if not held.fits(module, positions):
                return None
            whole = len(positions) == next(iter(along.values())).size
            make = partial(held.narrow, module, positions)
            return self.call(
                node, "" if whole else f"branch{g}", (positions,), make, next(iter(source.values())), branch
            )
        first = node.args[0]
        owned = not in_place(node) or self.owns(source[first], first)  # type: ignore[index, arg-type]
        if not owned and node.op == "call_module":
            source[first] = self.make(aten.clone.default, source[first], branch=branch)  # type: ignore[index]
        new = self.note(self.new.node_copy(node, lambda n: source[n] if n in source else self.need(n)), branch)
        if not owned and node.op == "call_function":
            new.target = out_of_place(new.target)
        return new

    def shared(self, node: fx.Node) -> bool:
        """The whole tensor is put together from pieces, or is one of another value's."""
        return node in self.split or self.holders[self.need(node)] > 1

    def owns(self, piece: fx.Node, operand: fx.Node) -> bool:
        """The piece lies in memory of its own and is a part of this operand alone, so it may be overwritten."""
        alone = self.holders[piece] == 1 and piece in nodes_of(self.split.get(operand)) and not piece.users
        view = any(True for _ in may_share(piece)) or may_do_nothing(operand)
        return alone and not view and piece not in self.arranged
