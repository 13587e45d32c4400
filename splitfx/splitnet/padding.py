"""Padding: groups of unequal size are filled up with channels of zeros, so that grouped convolutions can run them.

A vector's groups of 30 and 34 channels become 34 and 34: the layers that write the vector get rows of zeros, those that
read it columns of zeros, norms a scale and shift of zero. The graph computes what it did. Behind an activation that
keeps zero (ReLU, SiLU, GELU, tanh) a channel's weights get no gradient and stay zero when the model is trained on;
behind another (sigmoid, softplus) training makes it one more channel of its group. Whether the fewer, larger kernels
are worth the work is measured (`splitfx.carving.lowering`).

Left ragged, with a note: vectors whose channels are laid anew (channel shuffle, heads, slices), read together (a mean
over channels, softmax, GroupNorm) or with a value per channel that is no layer's, or returned by the model.
"""

from __future__ import annotations

import numpy as np
from torch import fx

from splitfx.analysis import Facts, facts
from splitfx.carving import narrow
from splitfx.ir.graph import layer, module_of, set_path, tied
from splitfx.ir.notes import Note
from splitfx.ir.ops import Channel, Spatial, bind, op, op_name
from splitfx.ir.ops.channels import PAD
from splitfx.splitnet.structure import WHOLE, Labels, Structure


class Padding:
    """What would be added: ``added``, the group of every padding channel by vector; none where groups are equal.

    ``wide``: the labels with those channels behind the others. ``notes`` say which vectors stay ragged, and why.
    """

    def __init__(self, found: Structure, labels: Labels) -> None:
        self.found, self.graph = found, found.facts.graph
        self.order, self.old = list(found.vectors), labels
        self.edges = {e.node: e for e in found.axes.edges}
        self.added: dict[str, np.ndarray] = {}
        self.tied = {path for paths in tied(self.graph).values() for path in paths}
        returned = self.touched(found.axes.of(found.output))
        for name, vector in found.vectors.items():
            sizes = np.bincount(labels[name], minlength=vector.level)
            if name not in returned and sizes.min() < sizes.max():
                self.added[name] = np.repeat(np.arange(vector.level), sizes.max() - sizes)
        self.notes: list[Note] = []
        while self.added and (refused := self.refused()) is not None:
            node, name, why = refused
            del self.added[name]
            self.notes.append(Note(name, f"its groups are not padded: {layer(node)} {why}", "info"))
        none = np.zeros(0, dtype=int)
        self.wide = {name: np.concatenate([own, self.added.get(name, none)]) for name, own in labels.items()}

    def refused(self) -> tuple[fx.Node, str, str] | None:
        """A node that does not allow one of the vectors to be padded, the vector, and why."""
        calls: dict[str, tuple[list[int], ...]] = {}
        for node in self.graph.graph.nodes:
            for held in (*node.all_input_nodes, node):
                names = self.found.axes.of(held)
                touched = [name for name in self.touched(names) if name in self.added]
                why = self.reason(node, held, names) if touched and names is not None else ""
                if why:
                    return node, touched[0], why
                if touched and node.op == "call_module":
                    laid = tuple(self.laid(one).tolist() for one in self.along(node))
                    if calls.setdefault(str(node.target), laid) != laid:
                        return node, touched[0], "is called again on other channels"
        return None

    def reason(self, node: fx.Node, held: fx.Node, names: np.ndarray) -> str:
        """Why a node that reads or writes ``names``, the channels of ``held``, does not let them be padded."""
        module, rule, mine = module_of(node), op(node).channel, self.found.axes.of(node)
        if node.op == "output":
            return "is what the model returns"
        if node.op == "get_attr":
            return "holds a value per channel"
        if not all(self.is_whole(run, names) for run in self.runs(names)):
            return "reads a part of its channels"
        if rule is Channel.MIXES:
            if module is None or str(node.target) in self.found.read:
                return "has a weight that the model reads by itself"
            if str(node.target) in self.tied:
                return "shares its weight with another layer"
            apart = getattr(module, "groups", 1) > 1 and not self.depthwise(node)
            return "has groups of its own" if apart else ""
        if op_name(node) in ("cat", "flatten"):
            return "" if mine is not None else "mixes its channels with others"
        if rule is not Channel.SAME and op(node).spatial is not Spatial.PAD:
            return "lays its channels anew"
        if mine is None or not np.array_equal(self.places(mine), self.places(names)):
            return "reads all channels at once"
        return "reads a value per channel" if any(self.per_channel(node, n) for n in node.all_input_nodes) else ""

    def places(self, names: np.ndarray) -> np.ndarray:
        return np.stack([self.found.vector_of[names], self.found.item_of[names]])

    def per_channel(self, node: fx.Node, operand: fx.Node) -> bool:
        """An operand that is no feature map and has an entry per channel, which nobody would widen."""
        value = self.found.facts.shapes[operand]
        if not hasattr(value, "shape") or self.found.axes.of(operand) is not None:
            return False
        if operand.op == "get_attr":
            return value.numel() > 1
        labels = self.found.axes.labels[node]
        back = next(d for d, size in enumerate(labels.shape) if size > 1) - labels.dim()  # from the last dim
        return value.dim() >= -back and value.shape[back] > 1

    def depthwise(self, node: fx.Node) -> bool:
        module = module_of(node)
        return getattr(module, "groups", 1) == getattr(module, "in_channels", 0) and not narrow.transposed(module)

    # ------------------------------------------------------------ channels along a node

    def along(self, node: fx.Node) -> list[np.ndarray]:
        """The channels that a weighted layer reads and those that it writes; of any other node, those it writes."""
        if node in self.edges:
            return [self.edges[node].ins, self.edges[node].outs]
        operands = [bind(node)["input"]] if op(node).channel is Channel.MIXES else []
        found = [self.found.axes.of(n) for n in (*operands, node)]
        return [names for names in found if names is not None]

    def touched(self, names: np.ndarray | None) -> list[str]:
        """The vectors that some channels belong to."""
        return [] if names is None else [self.order[v] for v in np.unique(self.found.vector_of[names]) if v != WHOLE]

    def runs(self, names: np.ndarray) -> list[np.ndarray]:
        """The places along an axis, cut where another vector begins."""
        number = self.found.vector_of[names]
        return np.split(np.arange(len(names)), np.flatnonzero(np.diff(number)) + 1)

    def vector(self, run: np.ndarray, names: np.ndarray) -> str | None:
        number = self.found.vector_of[names[run[0]]]
        return None if number == WHOLE else self.order[number]

    def is_whole(self, run: np.ndarray, names: np.ndarray) -> bool:
        """A run holds all of its vector once, each item in as many places as any other (a flattened map)."""
        name = self.vector(run, names)
        if name not in self.added:
            return True
        size = self.found.vectors[name].size
        items = self.found.item_of[names[run]]
        each = items[:: max(1, len(run) // size)]
        return (
            len(run) % size == 0
            and np.array_equal(items, np.repeat(each, len(run) // size))
            and len(np.unique(each)) == size
        )

    def laid(self, names: np.ndarray) -> np.ndarray:
        """The old place of every channel of the wider axis, `PAD` for what is added behind each vector."""
        parts = []
        for run in self.runs(names):
            name = self.vector(run, names)
            more = len(self.added[name]) * (len(run) // self.found.vectors[name].size) if name in self.added else 0
            parts += [run, np.full(more, PAD)]
        return np.concatenate(parts)

    # ------------------------------------------------------------ what it makes

    def evens(self, node: fx.Node) -> bool:
        """A split layer's groups are equal once its vectors are padded: both sides are, or have equal groups."""
        split = next(s for s in self.found.splits if s.edge.node is node)
        for names in (split.edge.ins, split.edge.outs):
            for vector, _, _ in self.found.views(names):
                sizes = np.bincount(self.wide[vector.name], minlength=vector.level)
                if len(set(np.bincount(self.found.merged(vector, split.level), sizes).tolist())) > 1:
                    return False
        return bool((self.found.vector_of[split.edge.ins] != WHOLE).all())

    def told(self) -> list[Note]:
        """What is added, by vector, and what stays ragged."""
        made = []
        for name in self.added:
            sizes = np.bincount(self.old[name])
            text = f"groups of {'/'.join(map(str, sizes))} channels are padded to {sizes.max()} each"
            made.append(Note(name, text, "info"))
        return [*made, *self.notes]

    def widen(self) -> Facts:
        """Replace every layer along the vectors by a wider one, in the graph's own place; the facts of the result."""
        done = set()
        for node in self.graph.graph.nodes:
            module = module_of(node)
            if module is None or node.target in done or not self.along(node):
                continue
            laid = [self.laid(names) for names in self.along(node)]
            if not any((one == PAD).any() for one in laid):
                continue
            if op(node).channel is Channel.MIXES:
                set_path(self.graph, str(node.target), narrow.wider(module, *laid))
            elif (row := op(node).layer) is not None and row.widen is not None and row.held(module):
                set_path(self.graph, str(node.target), row.widen(module, laid[-1]))
            done.add(node.target)
        return facts(self.graph)
