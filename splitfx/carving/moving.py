"""Data movement while channels are in pieces: concats, slices, views and shuffles are followed on labels, not run.

A chain of movements is a `Deferred` value until its channels are one dim again, everything else in place: then the
pieces are what they were, under new positions, and nothing was moved. What comes to no such end is done on the whole
tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import fx

from splitfx.analysis.moves import channel_dim, move
from splitfx.analysis.shapes import shape
from splitfx.carving.division import Division, Divisions
from splitfx.carving.pieces import Deferred, Pieces, Value
from splitfx.ir.ops import Channel, Spatial, op, op_name

aten = torch.ops.aten


class Moving(Pieces, ABC):
    """Pieces that follow data movement. ``divisions``: of the weighted nodes behind, whose first wishes count."""

    divisions: Divisions

    @abstractmethod
    def same(self, node: fx.Node) -> Value | None:
        """An elementwise node on pieces; see `splitfx.carving.carve`."""

    def lead(self, operands: dict[fx.Node, Value]) -> Value:
        """The operand that the others are arranged like: in most pieces, and rather one that has been laid anew."""
        return max(operands.items(), key=lambda one: (len(one[1].pieces), one[0] in self.split))[1]

    def moved(self, node: fx.Node) -> Any:
        name = op_name(node)
        if name == "getitem":
            held = self.split.get(node.args[0])  # type: ignore[arg-type]
            return held[node.args[1]] if isinstance(held, list) else None  # type: ignore[index]
        if name == "cat":
            return self.concat(node)
        operand = node.args[0]
        if not isinstance(operand, fx.Node) or any(n in self.split for n in node.all_input_nodes if n is not operand):
            return None
        held = self.split.get(operand)
        if isinstance(held, Deferred):
            return self.follow(node, held)
        if not isinstance(held, Value):
            return None
        sizes = shape(self.values[operand])
        ids = torch.arange(held.size).view([-1 if d == held.dim else 1 for d in range(len(sizes))])
        found = self.follow(node, Deferred(held, ids, _others(sizes, held.dim), sizes))
        return self.carried(node, held, found) or found if isinstance(found, Deferred) else found

    def carried(self, node: fx.Node, base: Value, found: Deferred) -> Value | None:
        """The channels stay a dim of their own, in order: what moves the other dims is done to every piece."""
        after, dim = shape(self.values[node]), channel_dim(found.ids)
        if dim is None or after[dim] != base.size or not np.array_equal(found.ids.flatten(), np.arange(base.size)):
            return None
        if len(base.pieces) > 1 and not (op(node).sized or op(node).turns):
            return None
        pieces = []
        for piece, positions in base.pieces:
            new = self.new.node_copy(node, lambda n, p=piece: p if n is node.args[0] else self.need(n))
            if op(node).sized and len(positions) < base.size:
                given = list(new.args[1])  # type: ignore[arg-type]
                given[dim] = len(positions)
                new.args = (new.args[0], given, *new.args[2:])
            pieces.append((self.note(new, self.branch.get(piece)), positions))
        return Value(pieces, dim, base.size)

    def follow(self, node: fx.Node, held: Deferred) -> Any:
        ids, rest = (move(node, {node.args[0]: one}, self.values) for one in (held.ids, held.rest))  # type: ignore[dict-item]
        if isinstance(ids, list):
            each = zip(ids, rest, self.values[node], strict=True)
            values = [self.in_place(held, i, r, shape(v)) for i, r, v in each]
            return values if all(isinstance(s, Value) for s in values) else None
        if ids is None:
            return None
        after = shape(self.values[node])
        if op_name(node) == "flatten":
            return self.flattened(node, held, ids, after)
        if op(node).spatial is Spatial.PAD or (
            after != held.sizes
            and channel_dim(ids) == held.base.dim
            and len(after) == len(held.sizes)
            and ids.numel() == held.base.size
        ):
            return self.same(node)  # it moves rows and columns, not channels
        return self.in_place(held, ids, rest, after)

    def in_place(self, held: Deferred, ids: torch.Tensor, rest: torch.Tensor, after: tuple[int, ...]) -> Any:
        """Back to one channel dim with everything else in place: the pieces as they are, under new positions."""
        base = held.base
        others = [s for d, s in enumerate(held.sizes) if d != base.dim]
        same_place = channel_dim(ids) == base.dim and len(after) == len(held.sizes)
        same_sizes = same_place and [s for d, s in enumerate(after) if d != base.dim] == others
        source = ids.flatten().numpy()
        # Rows or columns may lie elsewhere in the same sizes: flip, roll, a square transpose.
        still = same_sizes and rest is not None and torch.equal(rest, _others(held.sizes, base.dim))
        if not still or len(np.unique(source)) != len(source):
            return Deferred(base, ids, rest, held.sizes)
        position = np.full(base.size, -1)
        position[source] = np.arange(len(source))
        pieces = []
        for piece, positions in base.pieces:
            kept = np.flatnonzero(position[positions] >= 0)
            if len(kept):
                new = self.select(piece, kept, len(positions), base.dim, self.branch.get(piece))
                pieces.append((new, position[positions[kept]]))
        return Value(pieces, base.dim, len(source))

    def flattened(self, node: fx.Node, held: Deferred, ids: torch.Tensor, after: tuple[int, ...]) -> Value | None:
        """flatten(1) of a piece holds its channels' positions one after the other."""
        plain = np.array_equal(held.ids.flatten(), np.arange(held.base.size)) and held.ids.shape[1] == held.base.size
        if held.base.dim != 1 or len(after) != 2 or not plain:
            return None
        per = after[1] // held.base.size
        pieces = []
        for piece, positions in held.base.pieces:
            new = self.note(self.new.node_copy(node, lambda n, p=piece: p), self.branch.get(piece))
            pieces.append((new, (positions[:, None] * per + np.arange(per)).flatten()))
        return Value(pieces, 1, after[1])

    def concat(self, node: fx.Node) -> Value | None:
        """A concat of values in pieces: piece by piece, or simply all pieces side by side."""
        operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
        values = [self.value(n) for n in operands]
        dim = self.dim(node)
        if dim is None or any(v is None or v.dim != dim for v in values):
            return None
        parts: list[Value] = values  # type: ignore[assignment]
        if _cat_dim(node, self.values) != dim:
            return self.side_by_side(node, dict(zip(operands, parts, strict=True)))
        if max(len(v.pieces) for v in parts) != min(len(v.pieces) for v in parts):
            parts = self.alike(node, parts)
        offsets = np.cumsum([0] + [v.size for v in parts])
        pieces: list[tuple[fx.Node, np.ndarray]] = []
        if len({len(v.pieces) for v in parts}) == 1:
            for g in range(len(parts[0].pieces)):
                nodes = [v.pieces[g][0] for v in parts if len(v.pieces[g][1])]
                held = np.concatenate([v.pieces[g][1] + o for v, o in zip(parts, offsets[:-1], strict=True)])
                branch = next((self.branch[n] for n in nodes if n in self.branch), None)
                joined = nodes[0] if len(nodes) == 1 else self.make(aten.cat.default, nodes, dim, branch=branch)
                pieces.append((joined, held))
        else:  # parts that are divided differently: keep all pieces; readers take what they want
            for v, o in zip(parts, offsets[:-1], strict=True):
                pieces += [(n, p + o) for n, p in v.pieces]
        return Value(pieces, dim, int(offsets[-1]))

    def side_by_side(self, node: fx.Node, parts: dict[fx.Node, Value]) -> Value | None:
        """A concat along another dim (a class token in front of the others): all operands as one of them lies."""
        lead = self.lead(parts)
        if any(v.size != lead.size for v in parts.values()):
            return None
        pieces = []
        for piece, positions in lead.pieces:
            branch = self.branch.get(piece)
            joined = [self.assemble(v, positions, branch) for v in parts.values()]
            pieces.append((self.make(aten.cat.default, joined, _cat_dim(node, self.values), branch=branch), positions))
        return Value(pieces, lead.dim, lead.size)

    def alike(self, node: fx.Node, parts: list[Value]) -> list[Value]:
        """The operands of a concat in the pieces that its first divided reader wants: one per branch, and what all
        branches read. Without such a reader they stay as they are."""
        reader = self.reader(node)
        if reader is None:
            return parts
        times = np.bincount(np.concatenate(reader.ins), minlength=sum(v.size for v in parts))
        own = [ins[times[ins] == 1] for ins in reader.ins]
        groups = [*own, np.flatnonzero(times != 1)]
        groups = [g for g in groups if len(g)]
        made, start = [], 0
        for value in parts:
            inside = [g[(g >= start) & (g < start + value.size)] - start for g in groups]
            pieces = [(self.assemble(value, p, g) if len(p) else value.pieces[0][0], p) for g, p in enumerate(inside)]
            made.append(Value(pieces, value.dim, value.size))
            start += value.size
        return made

    def reader(self, node: fx.Node) -> Division | None:
        """The division of the first weighted node that reads ``node``, if need be through elementwise ones."""
        waiting = [node]
        while waiting:
            for user in waiting.pop(0).users:
                if user in self.divisions:
                    return self.divisions[user]
                waiting += [user] if op(user).channel is Channel.SAME and len(user.all_input_nodes) == 1 else []
        return None


def _others(sizes: tuple[int, ...], dim: int) -> torch.Tensor:
    """A label for every position of a tensor but those along the channel dim."""
    rest = [1 if d == dim else s for d, s in enumerate(sizes)]
    return torch.arange(math.prod(rest)).view(rest)


def _cat_dim(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape(values[node]))
