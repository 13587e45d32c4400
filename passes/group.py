"""Group: split blocks of convolutions into branches, joined by fusion convs (MalekHosseini et al., arXiv 2002.03302).

A block (the layers between two points where the feature map shrinks) is split into ``factors[i]`` branches: every
conv inside keeps the weights between channels of one branch and loses the others. Behind each split block stands a
fusion (section 2.2: pool, concat, 1x1 conv). The fusion conv has a bias and neither norm nor activation, so that
the identity is one of its settings; the paper leaves that open.

Stays whole, with a note: what reads the model's input (eq. 2), what writes its output, the first ``share`` convs,
layers outside ``select`` or in ``exclude``, axes that cannot be followed or have fewer channels than branches.
Promise RETRAIN: equal to the dense model with fusions inserted and the removed weights set to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.blocks import Block, blocks
from splitfx.analysis.partition import WHOLE, Partition, kept_mass, most_mass, partition
from splitfx.analysis.shapes import shape
from splitfx.calibrate import activations, solve_fusions
from splitfx.carve import Division, carve, mask_weights
from splitfx.editing import free_path, insert_after
from splitfx.errors import PassError, PlanError
from splitfx.graph import copy_graph, layer, module_of
from splitfx.lowering import lowering_seconds
from splitfx.narrow import transposed
from splitfx.ops import Channel, op, op_name
from splitfx.protocol import Note, Outcome, Pass, Promise, not_in_plan


@dataclass(frozen=True)
class Group(Pass):
    """Split each block of convolutions into branches with a fusion conv behind it (paper A).

    ``factors``: branches per block, in order, 1 leaves a block as it is; one factor with ``fusion="none"`` makes the
    whole network one block (the naive split). ``fusion``: ``"widen"`` (1x1 conv from the block's width to the next
    block's, as in the paper), ``"keep"`` (same width) or ``"none"``. ``share``: that many first convs stay undivided
    (the shared variant). ``gating``: squeeze-and-excitation is split too (``"strict"``) or stays dense
    (``"relaxed"``, which lets a few scalars per channel cross between branches). ``order``: channels go to branches
    as they come (``"given"``) or so that the branches keep the most squared weight (``"mass"``). ``lowering``:
    ``"grouped"`` convs, narrow ``"branches"``, ``"auto"`` (measured per block), or one word per block. ``select`` and ``exclude``: globs
    of layer names. ``calibration``: example inputs on which fusions are solved by least squares (not in the plan).

    Stochastic depth on a split value draws per branch. Raises `PlanError` when ``factors`` does not fit the model.
    """

    name: ClassVar[str] = "group"
    promise: ClassVar[Promise] = Promise.RETRAIN

    factors: tuple[int, ...]
    fusion: Literal["widen", "keep", "none"] = "widen"
    share: int = 0
    gating: Literal["strict", "relaxed"] = "strict"
    order: Literal["given", "mass"] = "given"
    lowering: Literal["auto", "grouped", "branches"] | tuple[Literal["grouped", "branches"], ...] = "auto"
    select: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    calibration: Any = not_in_plan()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.factors:
            raise PlanError(
                "pass 'group': factors is empty; give one factor per block, for example (2, 2, 4)"
            )
        for factor in self.factors:
            if factor < 1:
                raise PlanError(
                    f"pass 'group': a factor is the number of branches of a block, 1 or more; got {factor}"
                )
        if isinstance(self.lowering, tuple) and len(self.lowering) != len(self.factors):
            raise PlanError(
                f"pass 'group': lowering has {len(self.lowering)} entries for {len(self.factors)} factors"
            )
        if self.share < 0:
            raise PlanError(f"pass 'group': share counts convs, 0 or more; got {self.share}")

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        job = _Job(self, graph, facts)
        return job.run()


class _Job:
    """One run of the pass: decide on the facts of the dense graph, then fuse, mask, solve, carve."""

    def __init__(self, options: Group, graph: fx.GraphModule, facts: Facts) -> None:
        self.options, self.graph, self.facts, self.axes = options, graph, facts, facts.axes
        self.blocks = self.matched(blocks(facts))
        self.factor = self.factors()
        self.notes: list[Note] = []
        self.divisions: dict[fx.Node, Division] = {}
        self.fusions: dict[fx.Node, torch.Tensor] = {}
        self.settled: dict[int, Literal["grouped", "branches"]] = {}
        relaxed = self.gates() if options.gating == "relaxed" else set()
        place = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.inside = {b.index: self.edges_of(b, place, relaxed) for b in self.blocks}

    def run(self) -> Outcome:
        if not self.blocks:
            return Outcome((Note("model", "has no convolution: nothing to split", "declined"),))
        self.unmatched_globs()
        parts = {block.index: self.divide(block) for block in self.blocks}
        if not self.divisions:
            self.notes.append(Note("model", "no convolution can be divided: nothing was changed", "declined"))
            return Outcome(tuple(self.notes))
        ends = [b.end for b in self.blocks if self.fuses(b) and b.end is not None]
        calibration = self.options.calibration
        dense = activations(self.graph, ends, calibration) if calibration is not None and ends else []
        for block in self.blocks:
            self.fuse(block, parts)
        mask_weights(self.graph, self.divisions)
        self.solve(dense)
        lowering = {node: how for block in self.blocks for node, how in self.lower(block).items()}
        self.graph.recompile()
        reference = copy_graph(self.graph)
        carve(self.graph, self.divisions, lowering)
        settled = tuple(self.settled.get(b.index, "branches") for b in self.blocks)
        return Outcome(tuple(self.notes), reference, replace(self.options, lowering=settled))

    # ------------------------------------------------------------ blocks and factors

    def matched(self, found: list[Block]) -> list[Block]:
        """The naive split takes all blocks as one."""
        if self.options.fusion == "none" and len(self.options.factors) == 1 and len(found) > 1:
            return [Block(1, tuple(e for b in found for e in b.edges), found[-1].end)]
        return found

    def factors(self) -> dict[int, int]:
        given = self.options.factors
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

    def asked(self, edge: Edge) -> bool:
        name = layer(edge.node)
        chosen = any(fnmatchcase(name, g) for g in self.options.select)
        return chosen and not any(fnmatchcase(name, g) for g in self.options.exclude)

    # ------------------------------------------------------------ which channels go to which branch

    def divide(self, block: Block) -> Partition | None:
        """Divide the block's convs (and the linear layers of its gates); notes say what stays whole and why."""
        factor = self.factor[block.index]
        if factor == 1:
            self.notes.append(Note(str(block), f"block {block.index}: factor 1, left as it is", "info"))
            return None
        shared = self.shared()
        edges = [
            e for e in self.inside[block.index] if self.asked(e) and e.node not in shared and not e.computed
        ]
        for edge in block.edges:
            if edge.computed:
                self.notes.append(
                    Note(layer(edge.node), "left undivided: its weight is computed by the model", "declined")
                )
        if not edges:
            self.notes.append(Note(str(block), f"block {block.index}: no layer to divide", "declined"))
            return None
        found = partition(self.axes, edges, factor, self.whole_axes(block, shared))
        if self.options.order == "mass":
            found = self.by_mass(block, edges, found)
        for edge in edges:
            division = self.division(edge, found)
            if isinstance(division, str):
                self.notes.append(Note(layer(edge.node), f"left undivided: {division}", "declined"))
            else:
                self.divisions[edge.node] = division
        self.drop_conflicts()
        return found

    def edges_of(self, block: Block, place: dict[fx.Node, int], relaxed: set[fx.Node]) -> list[Edge]:
        """The block's convs, and linear layers between them (gates written with nn.Linear)."""
        first, last = place[block.edges[0].node], place[block.edges[-1].node]
        return [e for e in self.axes.edges if first <= place[e.node] <= last and e.node not in relaxed]

    def gates(self) -> set[fx.Node]:
        """Weighted nodes of squeeze-and-excitation: on the way from a global pool to a product with a larger map."""
        found: set[fx.Node] = set()
        area = lambda n: shape(self.facts.shapes[n])[2:]  # noqa: E731
        for node in self.graph.graph.nodes:
            operands = [n for n in node.all_input_nodes if len(shape(self.facts.shapes[n])) == 4]
            if op_name(node) != "mul" or len(operands) != 2 or area(operands[0]) == area(operands[1]):
                continue
            waiting = [n for n in operands if set(area(n)) == {1}]
            while waiting:
                n = waiting.pop()
                found |= {n} if op(n).channel is Channel.MIXES else set()
                waiting += [m for m in n.all_input_nodes if m.op != "get_attr" and set(area(m)) <= {1}]
        return found

    def shared(self) -> set[fx.Node]:
        convs = [e.node for e in self.axes.edges if op_name(e.node).startswith("conv")]
        return set(convs[: self.options.share])

    def whole_axes(self, block: Block, shared: set[fx.Node]) -> dict[int, str]:
        """Axes that stay whole in this block: frozen ones, the model's output, those that only whole layers write."""
        whole = dict(self.axes.frozen)
        whole |= {a: "its channels are the model's output" for a in self.axes.outputs}
        untouched = set(shared)
        for other in self.blocks:
            if self.factor[other.index] == 1:
                untouched |= {e.node for e in other.edges}
        for axis, edges in self.axes.writers().items():
            if axis not in whole and all(e.node in untouched for e in edges):
                whole[axis] = "only undivided layers write its input"
        return whole

    def by_mass(self, block: Block, edges: list[Edge], found: Partition) -> Partition:
        weighed = [(e, _mass(e)) for e in edges if e.groups == 1]
        before = kept_mass(weighed, found.branch)
        best = most_mass(self.axes, weighed, found)
        after = kept_mass(weighed, best.branch)
        self.notes.append(
            Note(
                str(block),
                f"block {block.index}: channel order keeps {after:.1%} of the squared weight, "
                f"the given order {before:.1%}",
                "info",
            )
        )
        return best

    def division(self, edge: Edge, found: Partition) -> Division | str:
        ins, outs = found.branch[edge.ins], found.branch[edge.outs]
        for names, labels in ((edge.ins, ins), (edge.outs, outs)):
            if (labels == WHOLE).all() or (labels is outs and (labels == WHOLE).any()):
                return found.whole.get(
                    int(self.axes.axis[names[labels == WHOLE][0]]), "its channels are undivided"
                )
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
            if (
                len(nodes) > 1
                and any(h is not None for h in held)
                and not all(_alike(held[0], h) for h in held)
            ):
                for n in nodes:
                    self.divisions.pop(n, None)
                self.notes.append(
                    Note(
                        path,
                        "left undivided: the model calls it in places that split differently",
                        "declined",
                    )
                )

    # ------------------------------------------------------------ fusion

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

    def fuse(self, block: Block, parts: Mapping[int, Partition | None]) -> None:
        if self.factor[block.index] > 1 and not self.divided(block):
            self.notes.append(
                Note(
                    str(block),
                    f"block {block.index}: none of its convs can be divided, so it has no "
                    "branches and needs no fusion",
                    "declined",
                )
            )
            return
        if not self.fuses(block):
            if self.divided(block) and block.end is not None and self.options.fusion != "none":
                self.notes.append(
                    Note(
                        str(block),
                        f"block {block.index}: no fusion, {layer(block.end)} is the model's output",
                        "info",
                    )
                )
            return
        end = block.end
        assert end is not None
        wide = shape(self.facts.shapes[end])
        follower = next((b for b in self.blocks if b.index == block.index + 1), None)
        width, why = self.widened(block, follower, wide[1])
        chosen = np.arange(wide[1])
        if width is not None and follower is not None:
            chosen = self.widen_readers(end, follower, width, parts)
        like = next(self.graph.parameters())
        kind: Any = nn.Conv2d if len(wide) == 4 else nn.Linear if len(wide) == 2 else None
        if kind is None:
            raise PassError(
                f"block {block.index} ends at {layer(end)} with {len(wide)} dimensions; a fusion needs "
                "a 2d feature map: use fusion='none'"
            )
        options: dict[str, Any] = {"kernel_size": 1} if kind is nn.Conv2d else {}
        fusion = kind(wide[1], len(chosen), bias=True, device=like.device, dtype=like.dtype, **options)
        fusion.training = self.graph.training
        target = torch.eye(wide[1], dtype=torch.float64, device=like.device)[
            torch.as_tensor(chosen, device=like.device)
        ]
        with torch.no_grad():
            fusion.weight.copy_(target.reshape(fusion.weight.shape))
            fusion.bias.zero_()
        path = free_path(self.graph, f"fusion{block.index}")
        node = insert_after(self.graph, end, path, fusion)
        self.fusions[node] = target
        what = (
            f"widens {wide[1]} channels to {len(chosen)}"
            if width is not None
            else f"keeps {wide[1]} channels{why}"
        )
        self.notes.append(Note(path, f"fusion behind block {block.index}, after {layer(end)}: {what}"))

    def widened(self, block: Block, follower: Block | None, width: int) -> tuple[int | None, str]:
        """The next block's width, or None with the reason why the fusion keeps its own."""
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
            convolves = reader in self.divisions and type(module_of(reader)) is nn.Conv2d and _groups(reader) == 1
            calls = sum(n.target == reader.target for n in self.graph.graph.nodes if n.op == "call_module")
            if not convolves or calls > 1:
                return None, f" ({layer(reader)} reads it and cannot be widened)"
        return wanted, ""

    def widen_readers(
        self, end: fx.Node, follower: Block, width: int, parts: Mapping[int, Partition | None]
    ) -> np.ndarray:
        """Widen the convs that read ``end``: each branch gets the channels that its own rows weigh most.

        Returns the source channel of each widened channel. A branch with room for all channels keeps the dense
        function; where there is more room than channels, copies share the weight.
        """
        part = parts[follower.index]
        assert part is not None
        readers = [n for n in end.users if n in self.divisions]
        factor = part.factor
        slots = np.array_split(np.arange(width), factor)
        source = np.empty(width, dtype=int)
        mass = {n: _squares(module_of(n)) for n in readers}
        for g, places in enumerate(slots):
            weighed = sum(mass[n][self.divisions[n].outs[g]].sum(0) for n in readers)
            channels = len(weighed)
            best = np.sort(np.argsort(-weighed, kind="stable")[: len(places)])
            source[places] = best[np.arange(len(places)) % channels]
        for n in readers:
            module = module_of(n)
            assert isinstance(module, nn.Conv2d)
            outs = self.divisions[n].outs
            weight = module.weight.detach().new_zeros(module.out_channels, width, *module.kernel_size)
            for places, rows in zip(slots, outs, strict=True):
                copies = np.bincount(source[places], minlength=module.in_channels)[source[places]]
                share = torch.as_tensor(1 / copies, dtype=weight.dtype, device=weight.device)
                block = module.weight.detach()[torch.as_tensor(rows)][:, torch.as_tensor(source[places])]
                weight[np.ix_(rows, places)] = block * share[:, None, None]
            module.weight = nn.Parameter(weight, module.weight.requires_grad)
            module.in_channels = width
            self.divisions[n] = Division(tuple(slots), outs)
        return source

    def solve(self, dense: list[torch.Tensor]) -> None:
        if not dense:
            return
        self.graph.recompile()
        errors = solve_fusions(self.graph, self.fusions, dense, self.options.calibration)
        for node, (before, after) in errors.items():
            self.notes.append(
                Note(
                    str(node.target),
                    f"least squares on {shape_words(dense[0])}: relative error against "
                    f"the dense activations {before:.3f} before, {after:.3f} after",
                )
            )

    # ------------------------------------------------------------ lowering

    def lower(self, block: Block) -> dict[fx.Node, str]:
        """Grouped convs or narrow branches for one block, with the reason in the notes."""
        nodes = [e.node for e in self.inside[block.index] if e.node in self.divisions]
        if not nodes:
            return {}
        factor = self.factor[block.index]
        how, why = self.how(block, nodes)
        self.settled[block.index] = how
        self.notes.append(
            Note(
                str(block),
                f"block {block.index}: {len(nodes)} layers in {factor} branches as "
                f"{'grouped convs' if how == 'grouped' else 'narrow branches'} ({why})",
            )
        )
        return dict.fromkeys(nodes, how)

    def how(self, block: Block, nodes: list[fx.Node]) -> tuple[Literal["grouped", "branches"], str]:
        uneven = next((n for n in nodes if not self.divisions[n].even and _groups(n) == 1), None)
        if uneven is not None:
            sizes = "/".join(str(len(o)) for o in self.divisions[uneven].outs)
            return "branches", f"{layer(uneven)} has branches of unequal width or shared input, {sizes}"
        asked = self.options.lowering
        if asked != "auto":
            return (asked[block.index - 1] if isinstance(asked, tuple) else asked), "as asked"
        relaid = self.relays_channels(block)
        if relaid:
            return "branches", f"{relaid} lays channels anew, which grouped convs would have to undo"
        seconds = [
            lowering_seconds(module_of(n), self.divisions[n], self.input_sizes(n))  # type: ignore[arg-type]
            for n in nodes
            if isinstance(module_of(n), nn.Conv1d | nn.Conv2d | nn.Conv3d) and _groups(n) == 1
        ]
        grouped, separate = (1000 * sum(s[i] for s in seconds) for i in (0, 1))
        return (
            "grouped" if grouped <= separate else "branches"
        ), f"measured: grouped {grouped:.2f} ms, branches {separate:.2f} ms"

    def input_sizes(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes that the conv reads, at its width after widening."""
        before = shape(self.facts.shapes[node])
        operand = node.args[0]
        while operand not in self.facts.shapes:
            operand = operand.args[0]  # type: ignore[union-attr]
        before = shape(self.facts.shapes[operand])  # type: ignore[index]
        return (before[0], module_of(node).in_channels, *before[2:])  # type: ignore[union-attr, return-value]

    def relays_channels(self, block: Block) -> str:
        inside = False
        for node in self.graph.graph.nodes:
            inside = inside or node is block.edges[0].node
            if inside and op_name(node) in (
                "cat",
                "chunk",
                "split",
                "view",
                "reshape",
                "transpose",
                "channel_shuffle",
            ):
                return f"{op_name(node)} at {layer(node)}"
            if node is block.edges[-1].node:
                break
        return ""


def _mass(edge: Edge) -> np.ndarray:
    """Squared weights [out, in], summed over the kernel."""
    return _squares(module_of(edge.node))


def _squares(module: nn.Module | None) -> np.ndarray:
    assert module is not None
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    weight = weight.transpose(0, 1) if transposed(module) else weight
    return (
        weight.detach().double().square().flatten(2).sum(2).cpu().numpy()
        if weight.dim() > 2
        else (weight.detach().double().square().cpu().numpy())
    )


def _groups(node: fx.Node) -> int:
    return getattr(module_of(node), "groups", 1)


def _alike(a: Division | None, b: Division | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(x, y) for x, y in zip((*a.ins, *a.outs), (*b.ins, *b.outs), strict=True))


def shape_words(value: torch.Tensor) -> str:
    return f"a batch of {value.shape[0]}"
