"""Group: split blocks of convolutions into branches, joined by fusion convs (MalekHosseini et al., arXiv 2002.03302).

A block (the layers between two points where the feature map shrinks) is split into ``factors[i]`` branches: every
conv inside keeps the weights between channels of one branch and loses the others. Behind each split block stands a
fusion (section 2.2: pool, concat, 1x1 conv). The fusion conv has a bias and neither norm nor activation, so that
the identity is one of its settings; the paper leaves that open.

Stays whole, with a note: a block whose fusion costs more weights than its division saves, what reads the model's
input (eq. 2), what writes its output, the first ``share`` convs, layers outside ``select`` or in ``exclude``, axes that
cannot be followed or have fewer channels than branches.
Promise RETRAIN: equal to the dense model with fusions inserted and the removed weights set to zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.blocks import Block
from splitfx.analysis.shapes import shape
from splitfx.carving.carve import carve
from splitfx.carving.divider import Divider
from splitfx.carving.division import masked
from splitfx.carving.fusion import Selection, fusion_layer, widen_readers
from splitfx.carving.lowering import Lowering, choose_lowering
from splitfx.carving.reconstruction import reconstruct
from splitfx.carving.reconstruction.order import contributions
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise, not_in_plan
from splitfx.errors import PlanError
from splitfx.ir.editing import free_path, insert_after
from splitfx.ir.graph import copy_graph, layer, set_path


@dataclass(frozen=True)
class Group(Pass):
    """Split each block of convolutions into branches with a fusion conv behind it (MalekHosseini et al.).

    ``factors``: branches per block, in order, 1 leaves a block as it is; a number alone is for every block. A list of
    one factor with ``fusion="none"`` makes the whole network one block (the naive split). ``fusion``: ``"widen"`` (1x1
    conv from the block's width to the next block's, as in the paper), ``"keep"`` (same width) or ``"none"``. ``share``:
    that many first convs stay undivided (the shared variant). ``gating``: squeeze-and-excitation is split too
    (``"strict"``) or stays dense (``"relaxed"``, which lets a few scalars per channel cross between branches).
    ``costly``: a block whose fusion costs more weights than the division saves is left ``"whole"`` or ``"split"`` all
    the same, as its factor says; a note gives both figures. ``order``: channels go to branches as they come
    (``"given"``), so that the branches keep the most weight energy (``"energy"``: squared weights), or the most of what
    the layers give on ``calibration`` (``"solved"``). ``branches``: what "solved" found, the branch of each channel by
    block, so that a saved plan gives the same graph. ``lowering``: ``"grouped"`` convs, narrow ``"branches"``,
    ``"auto"`` (measured per block), or one word per block. ``select`` and ``exclude``: globs of layer names.
    ``calibration``: example inputs on which fusions are solved by least squares and batch norms behind divided layers
    take their running statistics. ``refine``: steps of gradient on those inputs after
    they were solved, stopped by some that are held out.

    Stochastic depth on a split value draws per branch. Raises `PlanError` when ``factors`` does not fit the model.
    """

    name: ClassVar[str] = "group"
    promise: ClassVar[Promise] = Promise.RETRAIN
    writes_weights: ClassVar[bool] = False

    factors: int | tuple[int, ...]
    fusion: Literal["widen", "keep", "none"] = "widen"
    share: int = 0
    gating: Literal["strict", "relaxed"] = "strict"
    costly: Literal["whole", "split"] = "whole"
    order: Literal["given", "energy", "solved"] = "given"
    branches: dict[str, tuple[int, ...]] | None = None
    lowering: Literal["auto", "grouped", "branches"] | tuple[Literal["grouped", "branches"], ...] = "auto"
    select: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    refine: int = 0
    calibration: Any = not_in_plan()

    def __post_init__(self) -> None:
        super().__post_init__()
        factors = self.factors if isinstance(self.factors, tuple) else (self.factors,)
        if not factors:
            raise PlanError("pass 'group': factors is empty; give one factor per block, for example (2, 2, 4)")
        for factor in factors:
            if factor < 1:
                raise PlanError(f"pass 'group': a factor is the number of branches of a block, 1 or more; got {factor}")
        if isinstance(self.lowering, tuple) and len(self.lowering) != len(factors):
            raise PlanError(f"pass 'group': lowering has {len(self.lowering)} entries for {len(factors)} factors")
        if self.share < 0:
            raise PlanError(f"pass 'group': share counts convs, 0 or more; got {self.share}")
        if self.refine < 0:
            raise PlanError(f"pass 'group': refine counts steps, 0 or more; got {self.refine}")

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        job = _Job(self, graph, facts)
        return job.run()

    def divides(self, facts: Facts) -> set[str]:
        """The names of the blocks that `run` would divide; nothing is done to the graph."""
        job = _Job(self, facts.graph, facts)
        job.decide()
        return {str(block) for block in job.blocks if any(e.node in job.divisions for e in job.inside[block.index])}


class _Job(Divider[Group]):
    """One run of the pass: decide on the facts of the dense graph, then fuse, mask, solve, carve."""

    def __init__(self, options: Group, graph: fx.GraphModule, facts: Facts) -> None:
        super().__init__(options, graph, facts)
        self.fusions: dict[fx.Node, np.ndarray] = {}
        self.lowered: dict[int, Literal["grouped", "branches"]] = {}

    def run(self) -> Outcome:
        if not self.blocks:
            return Outcome((Note("model", "has no convolution: nothing to split", "declined"),))
        self.unmatched_globs()
        self.decide()
        if not self.divisions:
            self.note("model", "no convolution can be divided: nothing was changed", "declined")
            return Outcome(tuple(self.notes))
        calibration = self.options.calibration
        dense = None if calibration is None else copy_graph(self.graph, share=True)
        for block in self.blocks:
            self.fuse(block)
        if dense is not None:
            self.notes += reconstruct(dense, self.graph, self.divisions, self.fusions, calibration, self.options.refine)
        elif self.options.refine:
            self.note("model", "refine has nothing to go by: give calibration", "declined")
        reference = masked(self.graph, self.divisions)
        for node, source in self.fusions.items():  # no write into the graph may reach what it is compared with
            fusion = self.graph.get_submodule(str(node.target))
            apart = copy.deepcopy(fusion) if dense is not None else Selection(source, fusion)
            set_path(reference, str(node.target), apart)
        lowering = {node: how for block in self.blocks for node, how in self.lower(block).items()}
        self.notes += carve(self.graph, self.divisions, lowering)
        changes: dict[str, Any] = {}
        if self.options.lowering == "auto":
            changes["lowering"] = tuple(self.lowered.get(b.index, "branches") for b in self.blocks)
            if isinstance(self.options.factors, int):  # a word for each block, so a factor for each
                changes["factors"] = (self.options.factors,) * len(self.blocks)
        if self.options.order == "solved":
            changes["branches"] = self.decided_branches()
        if dense is not None:
            changes["calibration"] = None  # it is done with
        return Outcome(tuple(self.notes), reference, replace(self.options, **changes) if changes else None)

    def energies(self, edges: list[Edge]) -> dict[fx.Node, np.ndarray]:
        """What the order goes by. A layer behind a fusion reads any combinations of channels: it is left out."""
        if self.options.order == "energy":
            return super().energies(edges)
        if self.options.calibration is None:
            raise PlanError("pass 'group': order='solved' needs calibration, a few hundred inputs without labels")
        fused = {b.end for b in self.blocks if self.factor[b.index] > 1 and self.options.fusion != "none"}
        nodes = [e.node for e in edges if e.node.all_input_nodes[0] not in fused]
        return contributions(self.graph, nodes, self.options.calibration)

    # ------------------------------------------------------------ fusion

    def fuse(self, block: Block) -> None:
        if self.factor[block.index] > 1 and not self.divided(block):
            self.note(
                str(block),
                f"block {block.index}: none of its convs can be divided, so it has no branches and needs no fusion",
                "declined",
            )
            return
        if not self.fuses(block):
            if self.divided(block) and block.end is not None and self.options.fusion != "none":
                self.note(
                    str(block),
                    f"block {block.index}: no fusion, {layer(block.end)} is the model's output",
                    "info",
                )
            return
        end = block.end
        assert end is not None
        wide = shape(self.facts.shapes[end])
        width, why = self.widened(block, wide[1])
        chosen = np.arange(wide[1])
        if width is not None:
            readers = [n for n in end.users if n in self.divisions]
            chosen = widen_readers(readers, self.divisions, width)
        fusion = fusion_layer(self.graph, wide, chosen)
        path = free_path(self.graph, f"fusion{block.index}")
        node = insert_after(self.graph, end, path, fusion)
        self.fusions[node] = chosen
        what = f"widens {wide[1]} channels to {len(chosen)}" if width is not None else f"keeps {wide[1]} channels{why}"
        self.note(path, f"fusion behind block {block.index}, after {layer(end)}: {what}")

    # ------------------------------------------------------------ lowering

    def asked_lowering(self, block: Block) -> Lowering:
        asked = self.options.lowering
        return asked[block.index - 1] if isinstance(asked, tuple) else asked

    def lower(self, block: Block) -> dict[fx.Node, str]:
        """Grouped convs or narrow branches for one block, with the reason in the notes."""
        nodes = [e.node for e in self.inside[block.index] if e.node in self.divisions]
        if not nodes:
            return {}
        factor = self.factor[block.index]
        how, why = choose_lowering(self.asked_lowering(block), self.facts, block, nodes, self.divisions)
        self.lowered[block.index] = how
        self.note(
            str(block),
            f"block {block.index}: {len(nodes)} {'layer' if len(nodes) == 1 else 'layers'} in {factor} branches as "
            f"{'grouped convs' if how == 'grouped' else 'narrow branches'} ({why})",
        )
        return dict.fromkeys(nodes, how)
