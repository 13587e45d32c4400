"""Which layers of which blocks are divided, into which branches, and what the fusions behind them cost.

Decides on the facts of the dense graph for the options of a `Group` pass, whose words notes and errors use. Nothing is
changed: what comes out is a `Division` per node, the fusions' widths, and the notes that say what stays whole and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.blocks import Block, blocks
from splitfx.analysis.gates import gates
from splitfx.analysis.partition import WHOLE, Partition, kept_energy, most_energy, partition
from splitfx.analysis.shapes import shape
from splitfx.carving.division import Division, alike, weights_of
from splitfx.carving.fusion import squares
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of, read_alone, tied
from splitfx.ir.notes import Note
from splitfx.ir.ops import op


class Options(Protocol):
    """The options of `Group` that decide what is divided."""

    @property
    def factors(self) -> int | tuple[int, ...]: ...
    @property
    def fusion(self) -> str: ...
    @property
    def share(self) -> int: ...
    @property
    def gating(self) -> str: ...
    @property
    def costly(self) -> str: ...
    @property
    def order(self) -> str: ...
    @property
    def branches(self) -> Mapping[str, tuple[int, ...]] | None: ...
    @property
    def select(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


Asked = TypeVar("Asked", bound=Options)


class Divider(Generic[Asked]):
    """What is divided of one graph; `decide` says what."""

    def __init__(self, options: Asked, graph: fx.GraphModule, facts: Facts) -> None:
        self.options, self.graph, self.facts, self.axes = options, graph, facts, facts.axes
        self.blocks = self.matched(blocks(facts))
        self.factor = self.factors()
        self.notes: list[Note] = []
        self.left: dict[int, str] = {}  # blocks that cost more than they save
        self.read, self.tied = read_alone(graph), {path for paths in tied(graph).values() for path in paths}
        self.divisions: dict[fx.Node, Division] = {}
        self.partitions: dict[int, Partition] = {}  # of the split blocks, by number
        self.energy: dict[fx.Node, np.ndarray] | None = None
        self.relaxed = gates(facts) if options.gating == "relaxed" else set()
        place = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.inside = {b.index: self.edges_of(b, place) for b in self.blocks}

    def note(self, where: str, what: str, kind: Literal["did", "declined", "info"] = "did") -> None:
        self.notes.append(Note(where, what, kind))

    # ------------------------------------------------------------ blocks and factors

    def matched(self, found: list[Block]) -> list[Block]:
        """The naive split takes all blocks as one."""
        given = self.options.factors
        if self.options.fusion == "none" and isinstance(given, tuple) and len(given) == 1 and len(found) > 1:
            return [Block(1, tuple(e for b in found for e in b.edges), found[-1].end)]
        return found

    def factors(self) -> dict[int, int]:
        given = self.options.factors
        if isinstance(given, int):
            return {b.index: given for b in self.blocks}
        if self.blocks and len(given) != len(self.blocks):
            listed = "; ".join(f"{b.index}: {b}" for b in self.blocks)
            raise PlanError(
                f"pass 'group': factors has {len(given)} entries, the model has {len(self.blocks)} blocks "
                f"({listed}). Give one factor per block, 1 to leave it as it is"
            )
        return {b.index: f for b, f in zip(self.blocks, given, strict=False)}

    def unmatched_globs(self) -> None:
        names = [layer(e.node) for e in self.axes.edges]
        for glob in (*self.options.select, *self.options.exclude):
            if not any(fnmatchcase(n, glob) for n in names):
                raise PlanError(
                    f"pass 'group': no layer matches {glob!r}; weighted layers are {', '.join(names[:6])} ..."
                )

    def spared(self, edge: Edge, shared: set[fx.Node]) -> str:
        """The option that leaves a layer undivided; empty where none does."""
        name = layer(edge.node)
        if not any(fnmatchcase(name, g) for g in self.options.select):
            return "select"
        if any(fnmatchcase(name, g) for g in self.options.exclude):
            return "exclude"
        if edge.node in shared:
            return f"share={self.options.share}"
        return "gating='relaxed'" if edge.node in self.relaxed else ""

    # ------------------------------------------------------------ which blocks are split

    def decide(self) -> None:
        """Divide the blocks; and again, with the costliest left whole, while there is one that costs more weights than
        it saves."""
        self.divide_all()
        found = self.costly()
        while found and self.options.costly == "whole":
            block, what = max(found, key=lambda one: one[0])[1:]
            self.factor[block.index], self.left[block.index] = 1, what
            self.divide_all()
            found = self.costly()
        for _, block, what in found:
            self.note(str(block), f"block {block.index}: {what}", "info")

    def divide_all(self) -> None:
        self.divisions, self.partitions, self.notes = {}, {}, []
        for block in self.blocks:
            self.divide(block)
        self.drop_conflicts()

    def costly(self) -> list[tuple[int, Block, str]]:
        """The split blocks without which the model has fewer weights: how many, and that in words."""
        found = []
        for block in [b for b in self.blocks if self.fuses(b)]:
            saved = self.saved(block)
            # Left whole it spares its fusion, and the one before it the width that it has for this block.
            if sum(self.cost(b) for b in self.blocks if b.index in (block.index - 1, block.index)) <= saved:
                continue
            before, factor = self.weights(), self.factor[block.index]
            kept = self.divisions, self.partitions, self.notes
            self.factor[block.index] = 1
            self.divide_all()
            more = before - self.weights()
            self.factor[block.index] = factor
            self.divisions, self.partitions, self.notes = kept
            if more > 0:
                what = f"its fusion costs {saved + more:,} weights, more than the {saved:,} that {factor} branches save"
                found.append((more, block, what))
        return found

    def weights(self) -> int:
        """Weights of all blocks with their fusions."""
        return sum(self.cost(b) - self.saved(b) for b in self.blocks)

    def saved(self, block: Block) -> int:
        """Weights that the division of a block removes; a layer that is called again counts once."""
        nodes = {str(e.node.target): e.node for e in self.inside[block.index] if e.node in self.divisions}
        return sum(weights_of(n).numel() - self.divisions[n].kept(n) for n in nodes.values())

    def cost(self, block: Block) -> int:
        """Weights of the fusion behind a block, and those that it adds to the layers that it widens."""
        if not self.fuses(block) or block.end is None:
            return 0
        channels = shape(self.facts.shapes[block.end])[1]
        width, _ = self.widened(block, channels)
        total = (channels + 1) * (width or channels)
        for node in block.end.users if width is not None else ():
            old = self.divisions[node]
            slots = tuple(np.array_split(np.arange(width or 0), len(old.outs)))
            total += Division(slots, old.outs).kept(node) - old.kept(node)
        return total

    # ------------------------------------------------------------ which channels go to which branch

    def divide(self, block: Block) -> None:
        """Divide the block's convs (and the linear layers of its gates); notes say what stays whole and why."""
        factor = self.factor[block.index]
        if block.index in self.left:
            what = f"left whole: {self.left[block.index]} (costly='split' splits it all the same)"
            self.note(str(block), f"block {block.index}: {what}", "declined")
            return
        if factor == 1:
            self.note(str(block), f"block {block.index}: factor 1, left as it is", "info")
            return
        shared = self.shared()
        edges = self.divisible(block, shared)
        if not edges:
            self.note(str(block), f"block {block.index}: no layer to divide", "declined")
            return
        found = partition(self.axes, edges, factor, self.whole_axes(block, shared))
        if self.options.branches is not None:
            found = self.as_planned(block, found)
        elif self.options.order != "given":
            found = self.ordered(block, edges, found)
        self.partitions[block.index] = found
        for edge in edges:
            division = self.division(edge, found)
            if isinstance(division, str):
                self.note(layer(edge.node), f"left undivided: {division}", "declined")
            else:
                self.divisions[edge.node] = division

    def divisible(self, block: Block, shared: set[fx.Node]) -> list[Edge]:
        """The block's layers that may be divided; notes say why the others may not."""
        edges, spared = [], dict[str, list[str]]()
        for edge in self.inside[block.index]:
            option = self.spared(edge, shared)
            if option:
                spared.setdefault(option, []).append(layer(edge.node))
            elif edge.computed:
                self.note(layer(edge.node), "left undivided: its weight is computed by the model", "declined")
            elif str(edge.node.target) in self.read:
                self.note(layer(edge.node), "left undivided: the model reads its weight elsewhere too", "declined")
            else:
                edges.append(edge)
        for option, layers in spared.items():
            names = ", ".join(dict.fromkeys(layers))
            self.note(str(block), f"block {block.index}: left undivided by option {option}: {names}", "info")
        return edges

    def edges_of(self, block: Block, place: dict[fx.Node, int]) -> list[Edge]:
        """The block's convs, and linear layers between them (gates written with nn.Linear)."""
        first, last = place[block.edges[0].node], place[block.edges[-1].node]
        return [e for e in self.axes.edges if first <= place[e.node] <= last]

    def shared(self) -> set[fx.Node]:
        convs = [e.node for e in self.axes.edges if op(e.node).convolves]
        return set(convs[: self.options.share])

    def whole_axes(self, block: Block, shared: set[fx.Node]) -> dict[int, str]:
        """Axes that stay whole in this block: frozen ones, the model's output, those that only whole layers write."""
        whole = dict(self.axes.frozen)
        whole |= dict.fromkeys(self.axes.outputs, "its channels are the model's output")
        untouched = set(shared)
        for other in self.blocks:
            if self.factor[other.index] == 1:
                untouched |= {e.node for e in other.edges}
        for axis, edges in self.axes.writers().items():
            if axis not in whole and all(e.node in untouched for e in edges):
                whole[axis] = "only undivided layers write its input"
        return whole

    def ordered(self, block: Block, edges: list[Edge], found: Partition) -> Partition:
        """Channels in branches such that these keep the most of what the order goes by."""
        energy = self.weighed()
        weighed = [(e, energy[e.node]) for e in edges if e.node in energy]
        if not weighed:
            return found
        before = kept_energy(weighed, found.branch)
        best = most_energy(self.axes, weighed, found)
        after = kept_energy(weighed, best.branch)
        what = "weight energy" if self.options.order == "energy" else "contributions to outputs"
        self.note(
            str(block),
            f"block {block.index}: channel order keeps {after:.1%} of the {what}, the given order {before:.1%}",
            "info",
        )
        return best

    def weighed(self) -> dict[fx.Node, np.ndarray]:
        """What the order goes by, [out, in] of every layer that it counts."""
        if self.energy is None:
            every = [e for inside in self.inside.values() for e in inside]
            edges = [e for e in every if e.groups == 1 and module_of(e.node) is not None]
            self.energy = self.energies(edges)
        return self.energy

    def energies(self, edges: list[Edge]) -> dict[fx.Node, np.ndarray]:
        return {e.node: squares(module_of(e.node)) for e in edges}

    def as_planned(self, block: Block, found: Partition) -> Partition:
        """The branch of every channel as an earlier run wrote it down."""
        assert self.options.branches is not None
        given, divided = self.options.branches.get(str(block.index)), np.flatnonzero(found.branch != WHOLE)
        if given is None:
            return found
        if len(given) != len(divided) or set(given) != set(range(found.factor)):
            raise PlanError(
                f"pass 'group': branches has {len(given)} channels in {len(set(given))} branches for block "
                f"{block.index}, which has {len(divided)} in {found.factor}: it was decided for another model"
            )
        branch = found.branch.copy()
        branch[divided] = given
        return Partition(found.factor, branch, found.whole)

    def decided_branches(self) -> dict[str, tuple[int, ...]]:
        """The branch of every divided channel, block by block."""
        return {
            str(index): tuple(found.branch[found.branch != WHOLE].tolist()) for index, found in self.partitions.items()
        }

    def division(self, edge: Edge, found: Partition) -> Division | str:
        ins, outs = found.branch[edge.ins], found.branch[edge.outs]
        for names, labels in ((edge.ins, ins), (edge.outs, outs)):
            if (labels == WHOLE).all() or (labels is outs and (labels == WHOLE).any()):
                return found.whole.get(int(self.axes.axis[names[labels == WHOLE][0]]), "its channels are undivided")
        if edge.groups > 1 and (ins == WHOLE).any():
            return "its groups read undivided channels"
        branches = range(found.factor)
        division = Division(
            tuple(np.flatnonzero((ins == g) | (ins == WHOLE)) for g in branches),
            tuple(np.flatnonzero(outs == g) for g in branches),
        )
        empty = [g for g in branches if not len(division.ins[g]) or not len(division.outs[g])]
        return f"branch {empty[0] + 1} of {found.factor} would have no channels" if empty else division

    def drop_conflicts(self) -> None:
        """A module that is called again must be divided alike every time."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.graph.graph.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        for path, nodes in calls.items():
            held = [self.divisions.get(n) for n in nodes]
            if len(nodes) > 1 and any(h is not None for h in held) and not all(alike(held[0], h) for h in held):
                for n in nodes:
                    self.divisions.pop(n, None)
                self.note(
                    path,
                    "left undivided: the model calls it in places that split differently",
                    "declined",
                )

    # ------------------------------------------------------------ fusions

    def divided(self, block: Block) -> list[fx.Node]:
        return [e.node for e in block.edges if e.node in self.divisions]

    def fuses(self, block: Block) -> bool:
        return (
            self.options.fusion != "none"
            and block.end is not None
            and bool(self.divided(block))
            and not self.is_output(block.end)
        )

    def is_output(self, end: fx.Node) -> bool:
        """A map whose channels are the model's output is left to the model."""
        names = self.axes.of(end)
        return names is not None and bool({int(a) for a in self.axes.axis[names]} & self.axes.outputs)

    def widened(self, block: Block, width: int) -> tuple[int | None, str]:
        """The next block's width, or None with the reason why the fusion keeps its own."""
        follower = next((b for b in self.blocks if b.index == block.index + 1), None)
        if self.options.fusion == "keep":
            return None, ""
        if follower is None or follower.end is None:
            return None, " (no block with an end follows)"
        if self.factor[follower.index] == 1:
            return None, f" (block {follower.index} is not split)"
        wanted = shape(self.facts.shapes[follower.end])[1]
        if self.is_output(follower.end):
            return None, f" (block {follower.index} ends in the model's output)"
        if wanted <= width:
            return None, f" (block {follower.index} is {wanted} wide)"
        end = block.end
        assert end is not None
        for reader in end.users:
            convolves = reader in self.divisions and _plain_conv(reader)
            calls = sum(n.target == reader.target for n in self.graph.graph.nodes if n.op == "call_module")
            if not convolves or calls > 1 or str(reader.target) in self.tied:
                return None, f" ({layer(reader)} reads it and cannot be widened)"
        return wanted, ""


def _plain_conv(node: fx.Node) -> bool:
    module = module_of(node)
    return type(module) is nn.Conv2d and module.groups == 1
