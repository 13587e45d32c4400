"""Channel axes: which channels of which tensors must move, be permuted or be split together.

Every channel of every tensor gets a label (`splitfx.analysis.moves`). Weighted operations (conv, linear) make new
labels and an *edge* from the labels they read to those they write; elementwise operations, residual sums, norms and
pools link the labels of their operands; data movement rearranges them. Two labels that are linked are one channel.
An *axis* is a set of label vectors linked anywhere. *Units* are channels that must stay in one group: those of a
group of a grouped conv or GroupNorm, of an attention head. What cannot be followed is *frozen*, with the reason:
an axis in doubt is left whole. One pass over the nodes and one connected-components call: linear in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from splitfx.analysis.moves import Labels, channel_dim, compress, move
from splitfx.analysis.shapes import shape
from splitfx.ir.graph import layer, output_node
from splitfx.ir.ops import Channel, Spatial, bind, op, op_name, per_channel
from splitfx.ir.schema import sharing, written

__all__ = ["Axes", "Edge", "axes"]


@dataclass(frozen=True)
class Edge:
    """A weighted operation: reads the channels ``ins``, writes ``outs`` (label per channel), in ``groups``."""

    node: fx.Node
    ins: np.ndarray
    outs: np.ndarray
    groups: int
    computed: bool  # the weight is computed by the graph, not held by a module


@dataclass
class Axes:
    """The channel structure of a graph.

    ``labels[node]`` is a label array (or list, or None); ``channel[label]`` the channel it is, ``axis[label]`` its
    axis, ``unit[label]`` its unit; ``frozen[axis]`` why an axis must stay whole.
    """

    labels: dict[fx.Node, Any]
    edges: list[Edge]
    channel: np.ndarray
    axis: np.ndarray
    unit: np.ndarray
    frozen: dict[int, str]
    outputs: set[int] = field(default_factory=set)  # axes that the graph returns

    def of(self, node: fx.Node) -> np.ndarray | None:
        """The labels along a tensor's channel dim; None where it has no single one."""
        held = self.labels.get(node)
        dim = channel_dim(held) if isinstance(held, torch.Tensor) else None
        return None if dim is None else held.flatten().numpy()  # type: ignore[union-attr]

    def carried(self, there: Mapping[fx.Node, fx.Node]) -> Axes:
        """The same of a copy of the graph: ``there`` maps each node to its copy."""
        labels = {there[node]: held for node, held in self.labels.items()}
        return replace(self, labels=labels, edges=[replace(e, node=there[e.node]) for e in self.edges])

    def writers(self) -> dict[int, list[Edge]]:
        """Edges by the axis they write."""
        found: dict[int, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(int(self.axis[edge.outs[0]]), []).append(edge)
        return found


class _Builder:
    def __init__(self, graph: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
        self.graph, self.values = graph, values
        self.labels: dict[fx.Node, Any] = {}
        self.count = 0
        self.vectors: list[np.ndarray] = []  # one per set of fresh labels: those are one axis from the start
        self.links: list[tuple[np.ndarray, np.ndarray]] = []
        self.units: list[np.ndarray] = []
        self.edges: list[Edge] = []
        self.why: list[tuple[np.ndarray, str]] = []
        self.calls: dict[str, Edge] = {}

    # -- making and linking labels

    def fresh(self, node: fx.Node, dim: int, reason: str = "") -> Labels | None:
        sizes = shape(self.values[node])
        if not -len(sizes) <= dim < len(sizes) or len(sizes) < 2:
            return None
        dim %= len(sizes)
        names = torch.arange(self.count, self.count + sizes[dim])
        self.count += sizes[dim]
        self.vectors.append(names.numpy())
        if reason:
            self.why.append((names.numpy()[:1], reason))
        return names.view([-1 if d == dim else 1 for d in range(len(sizes))])

    def link(self, a: Labels, b: Labels) -> None:
        a, b = torch.broadcast_tensors(a, b)
        self.links.append((a.flatten().numpy(), b.flatten().numpy()))

    def barrier(self, node: fx.Node) -> Any:
        """Labels after an operation that cannot be followed: new ones that stay whole."""
        value = self.values[node]
        name = op_name(node) or str(node.target)
        reason = f"{name} at {layer(node)} cannot be followed channel by channel"
        if not isinstance(value, torch.Tensor):
            return None
        # The channels most likely stay where the operand has them; else tokens have them last, feature maps second.
        before = next((self.labels.get(n) for n in self.operands(node)), None)
        dim = channel_dim(before) if isinstance(before, torch.Tensor) and before.dim() == value.dim() else None
        return self.fresh(node, dim if dim is not None else 1 if value.dim() != 3 else -1, reason)

    # -- rules

    def visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            tensor = isinstance(self.values[node], torch.Tensor)
            return self.fresh(node, 1, f"{node.name} is an input of the model") if tensor else None
        if node.op in ("get_attr", "output"):
            return None
        rule = op(node).channel
        if rule is Channel.SAME:
            return self.same(node)
        if rule is Channel.MIXES:
            return self.mixes(node)
        if rule is Channel.MOVE:
            return self.moved(node)
        if rule is Channel.UNIT:
            return self.normalised(node)
        if rule is Channel.CONTRACT:
            return self.attention(node)
        return self.along(node)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if isinstance(self.values[n], torch.Tensor)]

    def same(self, node: fx.Node) -> Any:
        if not isinstance(self.values[node], torch.Tensor):
            return self.barrier(node)
        out, operands = shape(self.values[node]), self.operands(node)
        known = [n for n in operands if isinstance(self.labels.get(n), torch.Tensor)]
        if not known:
            return None
        if any(shape(self.values[n])[-len(out) :] != out and len(shape(self.values[n])) != len(out) for n in known[:1]):
            return self.reduced(node, known[0])
        reduces = op(node).spatial is Spatial.GLOBAL and op(node).reduces != "moments"
        if reduces and len(operands) == 1:
            return self.reduced(node, known[0])
        apart = per_channel(node)
        result = self.broadcast(node, [n for n in operands if n not in apart], out)
        if result is not None:
            for operand in apart:
                self.labelled(operand, result.flatten())
        return result

    def labelled(self, operand: fx.Node, channels: Labels) -> None:
        """An operand with one value per channel has these channels."""
        if shape(self.values[operand]) != tuple(channels.shape):
            return
        held = self.labels.get(operand)
        if isinstance(held, torch.Tensor):
            self.link(held, channels)
        else:
            self.labels[operand] = channels

    def reduced(self, node: fx.Node, operand: fx.Node) -> Any:
        """A reduction over dims that hold no labels keeps the others."""
        mine, before, after = self.labels[operand], shape(self.values[operand]), shape(self.values[node])
        if len(after) == len(before):
            lost = any(mine.shape[d] > 1 and after[d] != before[d] for d in range(len(after)))
            return self.barrier(node) if lost else mine
        dims = bind(node).get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(len(before)))
        dims = {d % len(before) for d in dims}
        if any(mine.shape[d] > 1 for d in dims):
            return self.barrier(node)
        return mine.reshape([s for d, s in enumerate(mine.shape) if d not in dims])

    def broadcast(self, node: fx.Node, operands: list[fx.Node], out: tuple[int, ...]) -> Labels | None:
        result: Labels | None = None
        rank = len(out)
        full: list[tuple[fx.Node, Labels]] = []
        for n in operands:
            held = self.labels.get(n)
            if not isinstance(held, torch.Tensor):
                continue
            sizes = (1,) * (rank - held.dim()) + shape(self.values[n])
            held = held.reshape((1,) * (rank - held.dim()) + tuple(held.shape))
            full.append((n, held))
            if result is None or (channel_dim(held) is not None and channel_dim(result) is None):
                result = (
                    held if all(s == o or h == 1 for s, o, h in zip(sizes, out, held.shape, strict=True)) else result
                )
        if result is None:
            return None
        for n, held in full:
            if held is result:
                continue
            sizes = (1,) * (rank - len(shape(self.values[n]))) + shape(self.values[n])
            # A single channel that is broadcast over all of them is read by all: no link, and it stays whole.
            if any(result.shape[d] > 1 and sizes[d] == 1 for d in range(rank)):
                self.why.append((held.flatten().numpy()[:1], f"{layer(node)} spreads it over all channels"))
                continue
            self.link(result, held)
            if channel_dim(held) is not None and channel_dim(result) is None:
                result = held
        for n in operands:
            if n.op == "get_attr" and self.labels.get(n) is None:
                self.labels[n] = _follow(result, shape(self.values[n]))
        return compress(result)

    def mixes(self, node: fx.Node) -> Any:
        a = bind(node)
        operand = a["input"]
        held = self.labels.get(operand)
        rank = len(shape(self.values[node]))
        if not isinstance(held, torch.Tensor) or rank < 2:
            return self.barrier(node)
        dim = op(node).channel_dim % rank
        size = shape(self.values[operand])[dim]
        if any(held.shape[d] > 1 for d in range(held.dim()) if d != dim):
            return self.barrier(node)
        if not isinstance(a.get("groups", 1), int):
            return self.barrier(node)  # as many groups as the batch has images: the channels are not its own
        ins = held.flatten().expand(size) if held.numel() == 1 else held.flatten()
        groups = int(a.get("groups", 1))
        outs_count = shape(self.values[node])[dim]
        if groups == size and groups > 1:
            return _along_dim(ins.repeat_interleave(outs_count // groups), dim, rank)  # depthwise
        out = self.fresh(node, dim)
        assert out is not None
        edge = Edge(node, ins.numpy(), out.flatten().numpy(), groups, not isinstance(a["weight"], torch.Tensor))
        self.edges.append(edge)
        if groups > 1:
            both = np.concatenate([edge.ins.reshape(groups, -1), edge.outs.reshape(groups, -1)], axis=1)
            self.units.extend(both)
        self.called_again(node, edge)
        return out

    def called_again(self, node: fx.Node, edge: Edge) -> None:
        """A module called twice has one weight: both its inputs are one axis, and both its outputs."""
        first = self.calls.setdefault(str(node.target), edge) if node.op == "call_module" else edge
        if first is not edge and len(first.ins) == len(edge.ins):
            self.links += [(first.ins, edge.ins), (first.outs, edge.outs)]

    def moved(self, node: fx.Node) -> Any:
        if op_name(node) == "cat":
            side = self.side_by_side(node)
            if side is not None:
                return side
            for n in node.args[0]:  # type: ignore[union-attr]
                if self.labels.get(n) is None and isinstance(self.values[n], torch.Tensor):
                    self.labels[n] = self.fresh(n, 1, f"{layer(n)} has no known channels")  # type: ignore[arg-type]
        elif self.is_constant(node):
            return None  # as its parameter: whoever reads it gives it channels
        result = move(node, self.labels, self.values)
        if isinstance(result, torch.Tensor) and op(node).joins_channels:
            self.units.extend(self.labels[node.args[0]].flatten().numpy().reshape(result.numel(), -1))  # type: ignore[index]
        return self.barrier(node) if result is None else result

    def is_constant(self, node: fx.Node) -> bool:
        """Made of parameters alone and not labelled yet, such as a class token spread over the batch."""
        tensors = self.operands(node)
        return bool(tensors) and all(
            self.labels.get(n) is None and (n.op == "get_attr" or (n.op == "call_function" and self.is_constant(n)))
            for n in tensors
        )

    def side_by_side(self, node: fx.Node) -> Labels | None:
        """A concat along another dim than the channels (a class token in front of the others): they are the same
        channels in every operand, a parameter's too. None for any other concat."""
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        held = [self.labels.get(n) for n in operands]
        known = [t for t in held if isinstance(t, torch.Tensor)]
        rank = len(shape(self.values[node]))
        dims = {channel_dim(t) for t in known}
        over = bind(node).get("dim") or 0
        if len(dims) != 1 or None in dims or over % rank in dims or any(t.shape != known[0].shape for t in known):
            return None
        bare = [n for n, t in zip(operands, held, strict=True) if t is None]
        if not all(n.op == "get_attr" or self.is_constant(n) for n in bare):
            return None
        for other in known[1:]:
            self.link(known[0], other)
        self.labels |= dict.fromkeys(bare, known[0])
        return known[0]

    def normalised(self, node: fx.Node) -> Any:
        operand = bind(node)["input"]
        held, groups = self.labels.get(operand), bind(node)["num_groups"]
        if held is None or channel_dim(held) != 1:
            return self.barrier(node)
        self.units.extend(held.flatten().numpy().reshape(groups, -1))
        return held

    def attention(self, node: fx.Node) -> Any:
        """(N, heads, tokens, width): a head's query, key and value channels are one unit."""
        q, k, v = (self.labels.get(n) for n in node.args[:3])  # type: ignore[arg-type]
        held = [t for t in (q, k, v) if isinstance(t, torch.Tensor)]
        heads = shape(self.values[node])[1] if len(shape(self.values[node])) == 4 else 0
        if len(held) != 3 or any(t.dim() != 4 or t.shape[1] != heads or t.shape[2] != 1 for t in held):
            return self.barrier(node)
        for head in range(heads):
            self.units.append(np.concatenate([t[:, head].flatten().numpy() for t in held]))
        return v

    def along(self, node: fx.Node) -> Any:
        """Softmax over a dim without labels (positions) keeps the channels; everything else is a barrier."""
        operand = node.args[0] if node.args else None
        held = self.labels.get(operand) if isinstance(operand, fx.Node) else None
        dim = bind(node).get("dim") if op(node).keeps_channels else None
        if isinstance(held, torch.Tensor) and isinstance(dim, int) and held.shape[dim] == 1:
            return held
        return self.barrier(node)

    def written_in_part(self) -> None:
        """Where a part of a value is overwritten no edge shows it, so all that lies in its memory stays whole."""
        writes = [n for n in self.graph.graph.nodes if n.meta.get("writes_view")]
        family = sharing(self.graph.graph) if writes else {}
        for node in writes:
            reason = f"a part of it is overwritten at {layer(node)}"
            held = (self.labels.get(m) for value, _ in written(node) for m in family[value])
            self.why += [(t.flatten().numpy(), reason) for t in held if isinstance(t, torch.Tensor)]

    # -- the whole

    def build(self) -> Axes:
        for node in self.graph.graph.nodes:
            self.labels[node] = self.visit(node)  # get_attr labels may be set later, by their first reader
        channel = _components(self.count, self.links)
        # One axis: labels made together, and whatever is linked to any of them.
        runs = [(v[:-1], v[1:]) for v in self.vectors if len(v) > 1]
        axis = _components(self.count, [*self.links, *runs])
        unit = _components(self.count, [*self.links, *((u[:-1], u[1:]) for u in self.units if len(u) > 1)])
        frozen: dict[int, str] = {}
        self.written_in_part()
        for names, reason in self.why:
            for one in np.unique(axis[names]).tolist():
                frozen.setdefault(one, reason)
        result = Axes(self.labels, self.edges, channel, axis, unit, frozen)
        for n in output_node(self.graph).all_input_nodes:
            held = self.labels.get(n)
            result.outputs |= (
                {int(a) for a in axis[held.flatten().numpy()]} if isinstance(held, torch.Tensor) else set()
            )
        return result


def _components(count: int, links: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    pairs = list(links)
    if not pairs or not count:
        return np.arange(count)
    a, b = (np.concatenate([p[i] for p in pairs]) for i in (0, 1))
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _along_dim(names: Labels, dim: int, rank: int) -> Labels:
    return names.reshape([-1 if d == dim else 1 for d in range(rank)])


def _follow(result: Labels, sizes: tuple[int, ...]) -> Labels | None:
    """Labels of a parameter that was broadcast against labelled values (layer scale, positional embedding)."""
    if not sizes:
        return None
    mine = result[(0,) * (result.dim() - len(sizes))]
    if any(s == 1 and m > 1 for s, m in zip(sizes, mine.shape, strict=True)):
        return None
    return mine


def axes(graph: fx.GraphModule, values: dict[fx.Node, Any]) -> Axes:
    """The channel axes of a graph, from the fake values of its nodes."""
    return _Builder(graph, values).build()
