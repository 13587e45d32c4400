"""SplitNet: carve a classifier into groups of features and classes that do not see each other (Kim et al., ICML 2017).

An assignment gives every channel and every class a group; a split layer keeps the weights within its groups. Groups may
become finer from layer to layer (2, then 4): a tree of branches over a common stem. Channels are laid in the order of
the finest groups once, folded into the weights around them, so that a group is a run of channels and nothing is
gathered at run time; the logits come out in the user's order.

Stays whole, with a note: a layer whose input or output channels cannot be followed, the layer that reads the image.
Refuses: models that are no classifiers, more groups than channels or classes, an assignment of another model.
Promise RETRAIN: equal to the dense model with the weights outside the blocks set to zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.carving.carve import carve
from splitfx.carving.division import Division, alike, masked
from splitfx.carving.lowering import lowering_seconds
from splitfx.carving.reconstruction import reconstruct
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise, not_in_plan
from splitfx.errors import PlanError
from splitfx.ir.graph import copy_graph, layer, module_of
from splitfx.ir.ops import op_name
from splitfx.splitnet.activations import contributions
from splitfx.splitnet.assignment import OPTIONS, Assignment, checked, class_names, group_lines, kept
from splitfx.splitnet.best import best
from splitfx.splitnet.padding import Padding
from splitfx.splitnet.sources import clustered_labels, random_labels
from splitfx.splitnet.structure import WHOLE, Structure
from splitfx.splitnet.weights import energies, heaviest

Lowering = Literal["grouped", "padded", "branches"]
SHOWN = 12  # groups, and classes of a group, named in the notes


@dataclass(frozen=True)
class SplitNet(Pass):
    """Carve a classifier into independent groups of channels and classes (Kim et al.).

    ``assignment``: the group of every channel by layer, as `splitfx.splitnet` makes it (learned, ``random``,
    ``semantic``, ``clustering``, ``weights``); it brings its levels along. ``source``: how one is made where none is
    given: ``"random"``, by ``"weights"`` (most kept weight), by ``"activations"`` (most of what classes use, on
    ``calibration``), by ``"clustering"`` of the classifier's rows, or ``"best"``: the one of these that does best on a
    quarter of the calibration once it is solved on the rest. ``seed``: of what is drawn at random on the way.
    ``levels``: groups per layer, by globs of names (``{"layer4.*": 2, "fc": 4}``), or per stage, or ``depth`` and
    ``groups``: the last ``depth`` weighted layers. ``boundary``: the first split layers are ``"grouped"`` on their
    input too, or keep (``"full"``) the grouping of what they read. ``gating``: squeeze-and-excitation is split
    (``"strict"``) or stays dense (``"relaxed"``). ``classes``: names of the classes, in the order of the logits.
    ``lowering``: ``"grouped"`` convs (layers of unequal groups become branches), ``"padded"`` (unequal groups are
    filled up with zeros, to be grouped too), narrow ``"branches"``, or ``"auto"`` (measured). ``calibration``: example
    inputs, a few hundred without labels, on which ``source="weights"`` weighs the channels and all split layers are
    solved against what the dense model computes. ``refine``: steps of gradient after that, stopped by inputs that are
    held out.
    """

    name: ClassVar[str] = "splitnet"
    promise: ClassVar[Promise] = Promise.RETRAIN
    writes_weights: ClassVar[bool] = False

    assignment: dict[str, tuple[int, ...]] | None = None
    levels: dict[str, int] | tuple[int, ...] = ()
    depth: int = 0
    groups: int = 0
    boundary: Literal["grouped", "full"] = "grouped"
    gating: Literal["strict", "relaxed"] = "strict"
    source: Literal["random", "weights", "clustering", "activations", "best"] | None = None
    seed: int = 0
    classes: tuple[str, ...] = ()
    lowering: Literal["auto", "grouped", "padded", "branches"] = "auto"
    refine: int = 0
    calibration: Any = not_in_plan()

    def __post_init__(self) -> None:
        if isinstance(self.assignment, Assignment):
            self.take(self.assignment.options)
        super().__post_init__()
        if self.assignment is None and self.source is None:
            raise PlanError(
                "pass 'splitnet': give an assignment, or a source to make one: random, weights, clustering, "
                "activations, best"
            )
        if not self.levels and not self.depth:
            raise PlanError(
                "pass 'splitnet': give levels, such as {'layer4.*': 2, 'fc': 4}, or depth and groups: what to split"
            )

        if self.refine < 0:
            raise PlanError(f"pass 'splitnet': refine counts steps, 0 or more; got {self.refine}")

    def take(self, brought: dict[str, Any]) -> None:
        """What the assignment was made for. Raises `PlanError` where the pass asks for something else."""
        for option in (o for o in OPTIONS if o != "classes"):
            own, default = getattr(self, option), self.__dataclass_fields__[option].default
            if brought and own != default and own != brought.get(option, default):
                made = ", ".join(f"{o}={brought[o]}" for o in OPTIONS[:-1] if brought.get(o))
                raise PlanError(
                    f"pass 'splitnet': {option} is {own!r}, but the assignment was made for {made}: leave {option} out"
                )
        for option in OPTIONS:
            if brought.get(option) and (option != "classes" or not self.classes):
                object.__setattr__(self, option, brought[option])

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        found = self.structure(facts)
        names = class_names(found, self.classes)
        labels, chosen = (checked(found, self.assignment), []) if self.assignment is not None else self.made(found)
        divisions = found.divisions(labels)
        apart = _called_apart(divisions)
        if apart:
            raise PlanError(f"pass 'splitnet': {apart} is called twice with channels that are grouped differently")
        solved: list[Note] = []
        if self.calibration is not None:
            solved = reconstruct(copy_graph(graph, share=True), graph, divisions, {}, self.calibration, self.refine)
        elif self.refine:
            solved = [Note("model", "refine has nothing to go by: give calibration", "declined")]
        padding = Padding(found, labels)
        lowering, why = self.lower(found, divisions, padding)
        notes = [*found.notes, *chosen, *_told(found, labels, divisions, names), *solved, Note("model", why, "info")]
        reference = masked(graph, divisions)
        if lowering == "padded":
            notes += padding.told()
            wider = self.structure(padding.widen())
            notes += _carved(graph, wider, padding.wide, wider.divisions(padding.wide), "grouped")
        else:
            notes += _carved(graph, found, labels, divisions, lowering)
        plain = {name: tuple(given.tolist()) for name, given in labels.items()}
        return Outcome(tuple(notes), reference, replace(self, assignment=plain, lowering=lowering, calibration=None))

    def structure(self, known: Facts) -> Structure:
        return Structure(known, self.levels, self.depth, self.groups, self.boundary, self.gating)

    def made(self, found: Structure) -> tuple[dict[str, np.ndarray], list[Note]]:
        if self.source in ("activations", "best") and self.calibration is None:
            raise PlanError(f"pass 'splitnet': source={self.source!r} needs calibration: example inputs")
        if self.source == "best":
            return best(found, self.seed, self.calibration)
        if self.source == "random":
            return random_labels(found, self.seed), []
        if self.source == "clustering":
            return clustered_labels(found, self.seed), []
        if self.source == "activations":
            return heaviest(found, self.seed, contributions(found, self.calibration)), []
        return heaviest(found, self.seed, energies(found, self.calibration)), []

    def lower(self, found: Structure, divisions: dict[fx.Node, Division], padding: Padding) -> tuple[Lowering, str]:
        """Grouped convs, padded where groups are unequal, or narrow branches, for the whole model; linear layers are
        branches."""
        convs = {
            n: d
            for n, d in divisions.items()
            if isinstance(module_of(n), nn.Conv1d | nn.Conv2d | nn.Conv3d) and _groups(n) == 1
        }
        fitting = {n: d for n, d in convs.items() if d.even or padding.evens(n)}
        if self.lowering == "padded" and not padding.added:
            return "grouped", "all groups are equal, or cannot be padded: grouped"
        if self.lowering != "auto":
            return self.lowering, f"{self.lowering}, as asked"
        if not fitting:
            return "branches", "no convolution has equal groups: every split layer is one narrow layer per group"
        joined = _joins(found)
        if joined:
            return "branches", f"branches: grouped convs would have to gather their channels behind {joined}"
        seconds = [
            lowering_seconds(module_of(n), d, shape(found.facts.shapes[n.all_input_nodes[0]]))  # type: ignore[arg-type]
            for n, d in fitting.items()
        ]
        grouped, separate = (1000 * sum(s[i] for s in seconds) for i in (0, 1))
        together: Lowering = "grouped" if all(d.even for d in fitting.values()) else "padded"
        lowering = together if grouped <= separate else "branches"
        return lowering, f"{lowering}; measured: {together} {grouped:.2f} ms, branches {separate:.2f} ms"


def _carved(
    graph: fx.GraphModule,
    found: Structure,
    labels: dict[str, np.ndarray],
    divisions: dict[fx.Node, Division],
    lowering: Literal["grouped", "branches"],
) -> list[Note]:
    laid = {e.node: found.permuted(e, labels) for e in found.producers}
    if lowering == "grouped":  # a conv with groups of its own loses nothing: it only changes their order
        laid |= {s.edge.node: found.permuted(s.edge, labels) for s in found.splits if s.edge.groups > 1}
    return carve(graph, divisions | laid, dict.fromkeys(divisions, lowering))


def _joins(found: Structure) -> str:
    """A concat of channels that carry groups: narrow layers read its parts, grouped convs need a permuted copy."""
    for node in found.facts.graph.graph.nodes:
        if op_name(node) == "cat":
            whole, first = (found.axes.of(n) for n in (node, node.all_input_nodes[0]))
            along = whole is not None and first is not None and len(whole) > len(first)
            if along and (found.vector_of[whole] != WHOLE).any():
                return layer(node)
    return ""


def _groups(node: fx.Node) -> int:
    return getattr(module_of(node), "groups", 1)


def _called_apart(divisions: dict[fx.Node, Division]) -> str:
    """A layer that is called again with other groups, or none."""
    first: dict[str, Division] = {}
    for node, division in divisions.items():
        other = first.setdefault(str(node.target), division)
        if not alike(other, division):
            return layer(node)
    calls = Counter(str(n.target) for n in divisions)
    for node in divisions:
        made = sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes)
        if made != calls[str(node.target)]:
            return layer(node)
    return ""


def _sizes(groups: Sequence[Sized]) -> str:
    """The channels of each group; one number where all have as many."""
    sizes = [str(len(one)) for one in groups]
    return sizes[0] if len(set(sizes)) == 1 else "/".join(sizes)


def _told(
    found: Structure, labels: dict[str, np.ndarray], divisions: dict[fx.Node, Division], names: tuple[str, ...]
) -> list[Note]:
    """What was split, what the blocks keep of the weights, and which classes are together."""
    notes = []
    shares = kept(found, labels)
    for split in found.splits:
        where, division = layer(split.edge.node), divisions[split.edge.node]
        sizes = f"{_sizes(division.ins)} to {_sizes(division.outs)}"
        share = f", keeps {shares[where]:.1%} of the weight energy" if where in shares else ", keeps all its weights"
        notes.append(Note(where, f"{split.level} groups, from {sizes} channels{share}"))
    own = found.classes
    if own is not None:
        for line in group_lines(labels[own.name].tolist(), names, SHOWN)[:SHOWN]:
            notes.append(Note("classes", line, "info"))
    return notes
