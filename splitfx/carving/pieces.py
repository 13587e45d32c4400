"""Tensors in pieces: the bookkeeping of a rewrite that takes channels apart.

During carving a tensor is a list of *pieces*, each a new node with the dense channel positions that it holds, in any
order. Whoever reads it says which positions it wants, in which order; what is there already costs nothing, the rest
is a slice, a concat or, last, one gather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.moves import channel_dim
from splitfx.analysis.shapes import shape
from splitfx.ir.editing import like
from splitfx.ir.graph import module_of, read_alone, tied
from splitfx.ir.notes import Note
from splitfx.ir.ops import in_place, out_of_place

aten = torch.ops.aten


@dataclass
class Value:
    """A tensor in pieces: new nodes with the dense positions they hold along ``dim``. All together: every channel."""

    pieces: list[tuple[fx.Node, np.ndarray]]
    dim: int
    size: int

    def in_order(self, wanted: np.ndarray) -> np.ndarray:
        """The wanted positions in the order in which the pieces hold them, which costs least to read."""
        chosen = np.zeros(self.size, dtype=bool)
        chosen[wanted] = True
        held = np.concatenate([p for _, p in self.pieces])
        return held[chosen[held]]


@dataclass
class Deferred:
    """A value in the middle of a chain of data movement: which channel of ``base`` sits where, and which of the other
    positions (batch, rows, columns), each as an array of labels."""

    base: Value
    ids: torch.Tensor
    rest: torch.Tensor
    sizes: tuple[int, ...]  # of the tensor that ``base`` stands for


def nodes_of(held: Any) -> list[fx.Node]:
    """The new nodes that a value in pieces consists of, however far it has come."""
    if isinstance(held, Deferred):
        held = held.base
    if isinstance(held, Value):
        return list(dict.fromkeys(n for n, _ in held.pieces))
    return list(dict.fromkeys(n for one in held for n in nodes_of(one))) if isinstance(held, list) else []


class Pieces:
    """The graph that is being written, and what every old node's value has become in it."""

    def __init__(self, graph: fx.GraphModule, known: Facts) -> None:
        self.graph, self.values, self.axes = graph, known.shapes, known.axes
        self.new = fx.Graph()
        self.new.set_codegen(graph.graph._codegen)
        self.whole: dict[fx.Node, Any] = {}
        self.split: dict[fx.Node, Any] = {}  # Value, Deferred, or a list of Values (chunk)
        self.cut: dict[Any, fx.Node] = {}  # arrangements made so far
        self.modules: dict[str, nn.Module] = {}
        self.made: dict[Any, str] = {}
        # By the user, or by an earlier pass that carved too.
        self.taken = {name for name, _ in graph.named_modules(remove_duplicate=False)}
        self.callers: dict[str, list[fx.Node]] = {}  # of each narrow module
        self.parted: set[str] = set()  # layers that have become several narrow ones, below their own path
        self.read = read_alone(graph)  # these layers stay as they are
        self.tied = tied(graph)
        self.parts: dict[Any, nn.Parameter] = {}  # of a weight that several layers hold: each part is made once
        self.remade: dict[tuple[int, str], set[int]] = {}  # by weight and layer: the parts that took its place
        self.holders: Counter[fx.Node] = Counter()  # how many old values a new node is a piece of
        self.arranged: set[fx.Node] = set()
        self.branch: dict[fx.Node, int] = {}
        self.origin: fx.Node | None = None

    def dim(self, node: fx.Node) -> int | None:
        """The dim along which an old node's channels lie; None where there is no single one."""
        labels = self.axes.labels.get(node)
        return channel_dim(labels) if isinstance(labels, torch.Tensor) else None

    def note(self, new: fx.Node, branch: int | None = None) -> fx.Node:
        assert self.origin is not None
        like(new, self.origin)
        if branch is not None:
            self.branch[new] = branch
        return new

    def make(self, target: Any, *args: Any, branch: int | None = None) -> fx.Node:
        return self.note(self.new.call_function(target, args), branch)

    def need(self, node: fx.Node) -> fx.Node:
        """The whole tensor of an old node, in the user's order."""
        if node in self.whole:
            return self.whole[node]
        held = self.split[node]
        if isinstance(held, Value):
            made = self.assemble(held, np.arange(held.size))
        else:
            made = self.note(self.new.node_copy(node, self.need))
            if in_place(node):
                made.target = out_of_place(made.target)
        self.whole[node] = made
        return made

    def value(self, node: fx.Node) -> Value | None:
        """An old node's value in pieces; whole tensors with a channel dim are one piece."""
        held = self.split.get(node)
        if isinstance(held, Value):
            return held
        if held is not None or node not in self.whole:
            return None
        dim = self.dim(node)
        if dim is None:
            return None
        size = shape(self.values[node])[dim]
        return Value([(self.whole[node], np.arange(size))], dim, size)

    def assemble(self, value: Value, wanted: np.ndarray, branch: int | None = None) -> fx.Node:
        """One tensor that holds the ``wanted`` positions in that order: a piece, a slice, a concat or a gather."""
        key = (tuple(id(n) for n, _ in value.pieces), value.dim, wanted.tobytes())
        if key in self.cut:
            return self.cut[key]
        for piece, positions in value.pieces:
            if np.array_equal(positions, wanted):
                return piece
        self.cut[key] = made = self.gather(value, wanted, branch)
        self.arranged.add(made)
        return made

    def gather(self, value: Value, wanted: np.ndarray, branch: int | None) -> fx.Node:
        home = np.full(value.size, -1)
        for index, (_, positions) in enumerate(value.pieces):
            home[positions] = index
        used = [i for i in range(len(value.pieces)) if (home[wanted] == i).any()]
        pieces = [value.pieces[i] for i in used]
        source = pieces[0][0]
        if len(pieces) > 1:
            # Only what is wanted of each piece, then one concat, then at most one gather.
            pieces = [self.trim(value, piece, wanted, branch) for piece in pieces]
            source = self.make(aten.cat.default, [n for n, _ in pieces], value.dim, branch=branch)
        held = np.concatenate([p for _, p in pieces])
        place = np.full(value.size, -1)
        place[held] = np.arange(len(held))
        return self.select(source, place[wanted], len(held), value.dim, branch)

    def trim(
        self, value: Value, piece: tuple[fx.Node, np.ndarray], wanted: np.ndarray, branch: int | None
    ) -> tuple[fx.Node, np.ndarray]:
        node, positions = piece
        kept = np.isin(positions, wanted)
        if kept.all():
            return piece
        index = np.flatnonzero(kept)
        return self.select(node, index, len(positions), value.dim, branch), positions[index]

    def select(self, node: fx.Node, index: np.ndarray, size: int, dim: int, branch: int | None) -> fx.Node:
        if len(index) == size and np.array_equal(index, np.arange(size)):
            return node
        if np.array_equal(index, np.arange(index[0], index[0] + len(index))):
            return self.make(aten.slice.Tensor, node, dim, int(index[0]), int(index[0] + len(index)), branch=branch)
        path = self.free(f"channel_order.{i}" for i in count(len(self.modules)))
        holder = nn.Module()
        holder.register_buffer("index", torch.from_numpy(np.ascontiguousarray(index)))
        self.modules[path] = holder
        read = self.note(self.new.get_attr(f"{path}.index"), branch)
        return self.make(aten.index_select.default, node, dim, read, branch=branch)

    def call(
        self,
        node: fx.Node,
        name: str,
        positions: tuple[np.ndarray, ...],
        make: Callable[[], nn.Module],
        operand: fx.Node,
        branch: int | None,
    ) -> fx.Node:
        """Call a narrow module of the node's layer; two calls of one shared layer share its narrow form."""
        path = str(node.target)
        key = (path, name, *(p.tobytes() for p in positions))
        if key not in self.made:
            wanted = f"{path}.{name}" if name else path
            taken = wanted in self.modules
            self.parted |= {path} if name else set()
            self.made[key] = self.another(wanted) if taken else wanted
            self.modules[self.made[key]] = module = make()
            module.training = module_of(node).training  # type: ignore[union-attr]
            self.tie(node, module, key[1:])
        new = self.note(self.new.call_module(self.made[key], (operand,)), branch)
        self.callers.setdefault(self.made[key], []).append(new)
        return new

    def another(self, path: str) -> str:
        """A path for a further form of a layer, which neither the user nor we have taken."""
        return self.free(f"{path}_{i}" for i in count(2))

    def free(self, paths: Iterator[str]) -> str:
        """The first of some paths that nothing lies at."""
        return next(path for path in paths if path not in self.taken and path not in self.modules)

    def keep_dense(self) -> None:
        """A layer that one call reads as it is keeps its path; the form that other calls have made of it moves."""
        ours = {node for nodes in self.callers.values() for node in nodes}
        dense = {str(n.target) for n in self.new.nodes if n.op == "call_module" and n not in ours}
        for path in sorted(dense & self.modules.keys()):
            moved = self.another(path)
            self.modules[moved] = self.modules.pop(path)
            self.made |= {key: moved for key, made in self.made.items() if made == path}
            for node in self.callers[path]:
                node.target = moved

    def tie(self, node: fx.Node, made: nn.Module, part: tuple[Any, ...]) -> None:
        """Layers that hold one weight hold one part of it, where they need the same part."""
        dense = module_of(node)
        for name, whole in dense._parameters.items():  # type: ignore[union-attr]
            own = made._parameters.get(name)
            if own is None or id(whole) not in self.tied:
                continue
            made._parameters[name] = kept = self.parts.setdefault((id(whole), type(made), own.shape, *part), own)
            self.remade.setdefault((id(whole), str(node.target)), set()).add(id(kept))

    def apart(self) -> list[Note]:
        """Layers of several calls that have become several layers, because the calls need other channels or orders."""
        forms: dict[str, set[str]] = {}
        for (path, name, *_), made in self.made.items():
            if not name:
                forms.setdefault(path, set()).add(made)
        for node in [n for n in self.new.nodes if n.op == "call_module" and str(n.target) in forms]:
            forms[str(node.target)].add(str(node.target))
        what = "its calls need its weights in other orders or parts, so {} layers take its place"
        return [Note(path, what.format(len(made)), "info") for path, made in forms.items() if len(made) > 1]

    def untied(self) -> list[Note]:
        """Layers that held one weight, and do no more because they need different parts of it."""
        notes = []
        for weight, (first, *others) in self.tied.items():
            held = [self.remade.get((weight, path), {weight}) for path in (first, *others)]
            for path, own in zip(others, held[1:], strict=True):
                if own != held[0]:
                    what = f"was tied to {first} by one weight; they need other parts of it, or another order, so "
                    what += "each has its own"
                    notes.append(Note(path, what, "info"))
        return notes
