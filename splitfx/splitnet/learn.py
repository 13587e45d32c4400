"""Learning an assignment together with the weights (Kim et al., section 3.2): soft groups and three regularisers.

    groups = splitfx.splitnet.attach(graph, {"layer4.*": 2, "fc": 4})
    splitfx.finetune(graph, train, val, recipe, regulariser=groups)      # or: loss + groups.penalty() in your own loop
    plan = splitfx.Plan([SplitNet(groups.assignment())])

Every vector has a parameter α [G, n], softmax over the groups. The penalties push the weights between groups to zero
(weight), the groups apart (disjoint) and to equal sizes (balance); each is 1 where all groups are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import fx, nn

from splitfx.carving.narrow import BatchNorm, transposed
from splitfx.errors import PassError, PlanError
from splitfx.ir.graph import module_of, weighted
from splitfx.splitnet.activations import contributions
from splitfx.splitnet.assignment import Assignment, class_names, structure
from splitfx.splitnet.balance import balanced
from splitfx.splitnet.levels import Levels
from splitfx.splitnet.structure import Split, Structure, Vector
from splitfx.splitnet.weights import energies, heaviest

SPREAD = 0.01  # standard deviation of the logits at the start
LEAN = 1.0  # what the logits of a group that the start suggests are raised by
HINT = 0.02  # the same where groups stay undecided for a while
TINY = 1e-12  # under square roots: their slope at zero is infinite


@dataclass(frozen=True)
class Convergence:
    """How far an assignment is decided. ``surest``: per vector the least probability with which any of its items is in
    its likeliest group; ``disjoint``: per vector the disjoint penalty, 1 undecided, 0 decided."""

    surest: dict[str, float]
    disjoint: dict[str, float]
    epsilon: float
    tolerance: float

    @property
    def undecided(self) -> list[str]:
        """The vectors that are not decided."""
        return [n for n, p in self.surest.items() if p <= 1 - self.epsilon or self.disjoint[n] >= self.tolerance]

    def __bool__(self) -> bool:
        return not self.undecided

    def __str__(self) -> str:
        if self:
            return f"all {len(self.surest)} vectors are decided"
        worst = min(self.undecided, key=lambda n: self.surest[n])
        return (
            f"{len(self.undecided)} of {len(self.surest)} vectors are undecided; the least decided is {worst}, with a "
            f"channel in its likeliest group at probability {self.surest[worst]:.3f} (wanted: above "
            f"{1 - self.epsilon:.3f}) and a disjoint penalty of {self.disjoint[worst]:.3f} (wanted: below "
            f"{self.tolerance:.3f})"
        )


def attach(
    graph: fx.GraphModule,
    levels: Levels = (),
    *,
    weight: float = 1.0,
    disjoint: float = 1.0,
    balance: float = 10.0,
    start: Literal["noise", "weights", "activations"] = "noise",
    calibration: Any = None,
    anneal: int = 0,
    seed: int = 0,
    classes: Sequence[str] = (),
    freeze_norms: bool = True,
    **options: Any,
) -> Groups:
    """Soft groups for a graph from `splitfx.trace`, which is trained as it is and computes what it did.

    ``weight``, ``disjoint``, ``balance``: the factors γ of the three penalties. ``start``: ``"noise"``, as in the
    paper; for a model that is trained already, ``"weights"`` leans towards the groups that keep the most weight,
    ``"activations"`` towards those that keep the most of what classes use of ``calibration``, example inputs.
    ``anneal``: calls (training steps) over which the disjoint penalty comes in, so that groups stay undecided while
    items that belong together find each other; a start is a hint then.
    ``freeze_norms``: scales of batch norms are not trained while groups are learned (they would undo the weight
    penalty); `Groups.release` gives them back.
    ``options``: ``depth``, ``groups``, ``boundary``, ``gating``. Raises `PlanError` and `UnsupportedError`.
    """
    found = structure(graph, levels, **options)
    names = class_names(found, classes) if classes else ()
    for factor in (weight, disjoint, balance):
        if not 0 <= factor < float("inf"):
            raise PlanError(f"a penalty's factor is 0 or more, not {factor}")
    if start not in ("noise", "weights", "activations"):
        raise PlanError(f"start is 'noise', 'weights' or 'activations', not {start!r}")
    if (start == "activations") != (calibration is not None):
        raise PlanError("start='activations' needs calibration, example inputs; the other starts take none")
    if type(anneal) is not int or anneal < 0:
        raise PlanError(f"anneal is a number of steps, 0 or more; got {anneal!r}")
    counted = {"weights": lambda: energies(found), "activations": lambda: contributions(found, calibration)}
    lean = heaviest(found, seed, counted[start]()) if start in counted else None
    kept = {"levels": levels, "classes": names, **options}
    groups = Groups(found, (weight, disjoint, balance), seed, lean, kept, anneal)
    if freeze_norms:
        groups.freeze(graph)
    return groups


class Groups(nn.Module):
    """Soft assignments of a graph's channels, one parameter α [G, n] per vector, to be trained without weight decay.

    The logits are √n α: each penalty is a mean over a vector's n items, and so every item's logits move at the same
    pace, whether its vector has ten classes or a thousand channels.

    Called, it gives the three penalties by name, each with its factor: `splitfx.finetune` takes it as its
    ``regulariser``. The weights stay the graph's: this module owns none of them.
    """

    def __init__(
        self,
        found: Structure,
        factors: tuple[float, float, float],
        seed: int,
        lean: dict[str, np.ndarray] | None,
        options: dict[str, Any],
        anneal: int = 0,
    ) -> None:
        super().__init__()
        self.vectors = list(found.vectors.values())
        self.options, self.factors, self.anneal = options, factors, anneal
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(v.level, v.size, generator=generator) * SPREAD for v in self.vectors]
        if lean is not None:
            for v, logits in zip(self.vectors, made, strict=True):
                logits[torch.as_tensor(lean[v.name]), torch.arange(v.size)] += HINT if anneal else LEAN
        self.alpha = nn.ParameterList([nn.Parameter(m / v.size**0.5) for v, m in zip(self.vectors, made, strict=True)])
        self.layers = [_Layer(found, split) for split in found.splits if split.edge.groups == 1]
        self.frozen: list[nn.Parameter] = []
        self.history: list[torch.Tensor] = []

    # ------------------------------------------------------------ penalties

    def forward(self) -> dict[str, torch.Tensor]:
        """The penalties, scalars, with their factors."""
        soft = self.soft()
        parts = torch.stack(
            [
                weight_penalty([one(soft) for one in self.layers]),
                torch.stack([disjoint_penalty(p) for p in soft.values()]).mean(),
                torch.stack([balance_penalty(p) for p in soft.values()]).mean(),
            ]
        )
        weight, disjoint, balance = self.factors
        come = min(1.0, len(self.history) / self.anneal) if self.anneal else 1.0
        self.history.append(parts.detach())
        return dict(zip(PENALTIES, (weight * parts[0], come * disjoint * parts[1], balance * parts[2]), strict=True))

    def penalty(self) -> torch.Tensor:
        """The sum of the penalties with their factors: add it to your loss."""
        return torch.stack(list(self().values())).sum()

    def soft(self) -> dict[str, torch.Tensor]:
        """The probability [G, n] of every group for every item, by vector."""
        return {v.name: (v.size**0.5 * a).softmax(0) for v, a in zip(self.vectors, self.alpha, strict=True)}

    def curves(self) -> dict[str, list[float]]:
        """Each penalty, without its factor, at every call so far."""
        rows = torch.stack(self.history).tolist() if self.history else []
        return {name: [row[i] for row in rows] for i, name in enumerate(PENALTIES)}

    # ------------------------------------------------------------ phases

    def freeze(self, graph: fx.GraphModule) -> None:
        for module in graph.modules():
            if isinstance(module, BatchNorm) and module.weight is not None and module.weight.requires_grad:
                module.weight.requires_grad_(False)
                self.frozen.append(module.weight)

    def release(self) -> None:
        """Let the scales of batch norms be trained again."""
        for scale in self.frozen:
            scale.requires_grad_(True)
        self.frozen = []

    def convergence(self, epsilon: float = 0.05, tolerance: float = 0.05) -> Convergence:
        """Whether every item is in one group with more than 1 - ``epsilon`` and every vector's disjoint penalty is
        below ``tolerance``; it tells both numbers per vector."""
        with torch.no_grad():
            soft = self.soft()
            surest = {name: float(p.amax(0).min()) for name, p in soft.items()}
            apart = {name: float(disjoint_penalty(p)) for name, p in soft.items()}
        return Convergence(surest, apart, epsilon, tolerance)

    def assignment(
        self, *, balance: bool = False, unconverged: bool = False, epsilon: float = 0.05, tolerance: float = 0.05
    ) -> Assignment:
        """The learned groups: each item's likeliest, or, with ``balance``, the likeliest among groups of equal size.

        Raises `PassError` while the groups are not decided, with the numbers, unless ``unconverged``, and where a group
        is left empty.
        """
        state = self.convergence(epsilon, tolerance)
        if not state and not unconverged:
            raise PassError(f"{state}. Train on, or take it as it is with unconverged=True.")
        with torch.no_grad():
            likely = {n: p.clamp_min(1e-30).log().double().cpu().numpy().T for n, p in self.soft().items()}
        labels = {n: balanced(s) if balance else s.argmax(1) for n, s in likely.items()}
        for vector in self.vectors:
            counts = np.bincount(labels[vector.name], minlength=vector.level)
            if (counts == 0).any():
                raise PassError(
                    f"{vector.name}: group {int(counts.argmin()) + 1} of {vector.level} is left empty; take a larger "
                    "balance factor, or balance=True"
                )
        told = f"learned, {state}" + (f"; balanced, {self.moved(labels)}" if balance else "")
        return Assignment(labels, told, **self.options)

    def moved(self, labels: dict[str, np.ndarray]) -> str:
        """How many items balancing moved out of their likeliest group."""
        with torch.no_grad():
            likeliest = {n: p.argmax(0).cpu().numpy() for n, p in self.soft().items()}
        count = sum(int((likeliest[n] != labels[n]).sum()) for n in labels)
        return f"{count} of {sum(map(len, labels.values()))} channels moved"


PENALTIES = ("weight", "disjoint", "balance")


class _Layer:
    """A split layer's weight penalty, on the weight that the graph trains."""

    def __init__(self, found: Structure, split: Split) -> None:
        module = module_of(split.edge.node)
        assert module is not None
        self.module, self.level = module, split.level
        self.ins, self.outs = (_views(found, names, split.level) for names in (split.edge.ins, split.edge.outs))
        count = len(split.edge.ins)
        # Channels that every group reads have no group of their own: they drop out.
        self.grouped = np.sort(np.concatenate([places.numpy() for _, places, _, _ in self.ins]))
        self.whole = len(self.grouped) == count and bool((self.grouped == np.arange(count)).all())

    def __call__(self, soft: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = weighted(self.module).weight
        if transposed(self.module):
            weight = weight.transpose(0, 1)
        square = weight.square().to(next(iter(soft.values())).dtype)
        square = square.flatten(2).mean(2) if square.dim() > 2 else square
        if not self.whole:
            square = square[:, torch.as_tensor(self.grouped, device=square.device)]
        kernel = float(np.sqrt(weight[0, 0].numel()))
        return layer_penalty(square, self.along(self.ins, soft), self.along(self.outs, soft), kernel)

    def along(self, views: list[_View], soft: dict[str, torch.Tensor]) -> torch.Tensor:
        """Probabilities [level, channels] of the layer's groups along its channels."""
        parts = []
        for vector, _, items, merge in views:
            own = soft[vector.name]
            merged = own.new_zeros(self.level, vector.size).index_add(0, merge.to(own.device), own)
            parts.append(merged[:, items.to(own.device)])
        order = torch.cat([places for _, places, _, _ in views]).argsort()
        return torch.cat(parts, 1)[:, order.to(parts[0].device)] if len(parts) > 1 else parts[0]


_View = tuple[Vector, torch.Tensor, torch.Tensor, torch.Tensor]  # a vector, its places, items, and merged groups


def _views(found: Structure, names: np.ndarray, level: int) -> list[_View]:
    return [
        (vector, torch.as_tensor(places), torch.as_tensor(items), torch.as_tensor(found.merged(vector, level)))
        for vector, places, items in found.views(names)
    ]


def layer_penalty(square: torch.Tensor, p: torch.Tensor, q: torch.Tensor, kernel: float) -> torch.Tensor:
    """R_W of one layer: the norms of what leaves and what enters a group from outside (eq. 4 of the paper).

    ``square`` [out, in]: mean squares of the weight over its kernel of ``kernel``² positions; ``p`` [G, in] and ``q``
    [G, out]: probabilities. Scaled so that weights of variance 1 / (kernel² · in) give 1 where all groups are alike.
    """
    outs, ins = square.shape
    groups = len(p)
    leaving = ((1 - p) * (q.square() @ square + TINY).sqrt()).sum() / (ins * outs**0.5)
    entering = ((1 - q) * (p.square() @ square.T + TINY).sqrt()).sum() / (ins**0.5 * outs)
    scale = 2 * (groups - 1) / groups / (kernel * ins**0.5)
    return (leaving + entering) / scale


def weight_penalty(layers: list[torch.Tensor]) -> torch.Tensor:
    """The mean over layers, in which those farther from split weigh more."""
    each = torch.stack(layers) if layers else torch.zeros(1)
    share = each.detach()
    return (share * each).sum() / share.sum().clamp_min(TINY)


def disjoint_penalty(p: torch.Tensor) -> torch.Tensor:
    """R_D of one vector [G, n]: 1 where all groups are alike, 0 where every item is in one group (eq. 5)."""
    groups, size = p.shape
    return (size - p.square().sum()) / (size * (groups - 1) / groups)


def balance_penalty(p: torch.Tensor) -> torch.Tensor:
    """R_E of one vector [G, n]: 1 for groups of equal size, G where one holds all (eq. 6)."""
    groups, size = p.shape
    return p.sum(1).square().sum() / (size**2 / groups)
