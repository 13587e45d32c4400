"""Reconstruction: a split graph's layers solved against what the dense graph computes, from inputs without labels.

Every unit (`units`) is solved in order, in closed form: a divided layer by ridge regression on what the layers in front
of it, solved already, really give; the batch norm behind it takes the statistics of that; a fusion is the affine map
back to the dense values, projected, where only divided layers read it, on those directions of them that each branch's
layers weigh most, as do maps that only linear layers write and read (`streams`). No training, no labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.carving.division import Divided, Division, Divisions
from splitfx.carving.reconstruction import layers
from splitfx.carving.reconstruction.lockstep import Values, Walk, batched, channels, check_range, moments
from splitfx.carving.reconstruction.projection import Reader, projected
from splitfx.carving.reconstruction.refine import refine
from splitfx.carving.reconstruction.regression import Normal, solved
from splitfx.carving.reconstruction.streams import Stream, streams
from splitfx.carving.reconstruction.units import Unit, units
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of, set_path
from splitfx.ir.notes import Note

PARTS = 4  # of the inputs, each held out once to choose how strongly solutions are drawn to the start
FEW = 64  # inputs
PER_INPUT = 4  # what an input counts for in a covariance: its positions are alike

Solution = tuple[torch.Tensor, torch.Tensor]  # weight [out, in, ...] and intercept [out], float64


def reconstruct(
    dense: fx.GraphModule,
    split: fx.GraphModule,
    divisions: Divisions,
    fusions: Mapping[fx.Node, np.ndarray],
    inputs: Any,
    steps: int = 0,
) -> list[Note]:
    """Put solved layers into ``split``, in place; returns what was done and the errors on held-out inputs.

    ``split`` is the dense graph with fusions in it, not carved yet: its divided layers count as zero outside their
    blocks, and the solved ones are. ``fusions`` maps a fusion to the dense channel that each of its outputs copies.
    ``steps``: of gradient, afterwards. Raises `PlanError` for inputs that do not fit the model, and for a single one.
    """
    job = _Job(dense, split, divisions, fusions, inputs)
    job.solve()
    if steps:
        job.refine(dense, steps)
    return job.notes


class _Split(Walk):
    """Runs a graph that is not carved yet: divided layers without the weights outside their blocks."""

    divided: Mapping[str, Division]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module, division = self.fetch_attr(target), self.division(target)
        return (module if division is None else Divided(module, division))(*args, **kwargs)

    def division(self, path: str) -> Division | None:
        """The division of a layer that loses weights by it; one that has groups of its own does not."""
        found, module = self.divided.get(path), self.fetch_attr(path)
        whole = found is None or getattr(module, "groups", 1) > 1 or len(found.outs) == 1
        return None if whole else found


class _Job:
    def __init__(
        self,
        dense: fx.GraphModule,
        split: fx.GraphModule,
        divisions: Divisions,
        fusions: Mapping[fx.Node, np.ndarray],
        inputs: Any,
    ) -> None:
        self.split, self.divisions, self.fusions = split, divisions, fusions
        every = units(split, divisions, fusions)
        self.by_node = {u.node: u for u in every if u.node is not None}
        self.twin = {n.name: n for n in dense.graph.nodes}
        self.given = given = batched(dense, inputs)
        check_range(dense, given)
        self.count = sum(len(next(t for t in some if isinstance(t, torch.Tensor))) for some in given)
        self.rebased: dict[fx.Node, torch.Tensor] = {}  # by a map of the split: its channels, of the dense ones
        self.restored: dict[fx.Node, torch.Tensor] = {}  # and the dense ones, of its channels
        self.notes: list[Note] = []
        self.rebase(dense, streams(every, divisions, fusions))
        self.units = [u for u in every if u.behind or u.end in self.rebased or reads(u.first, self.rebased)]
        self.left = Counter(u.target for u in self.units)
        self.there = Walk(dense, given, kept=[self.twin[t.name] for t in self.left])
        self.here = _Split(split, given)
        self.here.divided = {str(n.target): d for n, d in divisions.items()}
        self.generator = torch.Generator().manual_seed(0)
        if self.count < FEW:
            what = (
                f"calibration is {self.count} inputs only: layers fit these and may be far off on others; give hundreds"
            )
            self.notes.append(Note("model", what, "info"))

    def solve(self) -> None:
        for unit in self.units:
            self.here.before(unit.first)
            wanted = self.wanted(unit)
            if unit.node is None:
                self.norm(unit, wanted)
            elif unit.node in self.fusions:
                self.fusion(unit.node, wanted)
            else:
                self.weighted(unit, wanted)
            self.left[unit.target] -= 1
            if not self.left[unit.target]:
                self.there.release(self.twin[unit.target.name])

    def refine(self, dense: fx.GraphModule, steps: int) -> None:
        """Go on by gradient; then every norm takes the statistics of what it reads now."""
        masks: dict[str, Division | None] = {}
        for unit in self.units:
            for node in (n for n in (unit.node, unit.norm) if n is not None):
                masks[str(node.target)] = self.here.division(str(node.target))
        read = [f.all_input_nodes[0] for f in self.fusions]
        places = [n.name for n in read if n not in self.rebased]
        before, after = refine(dense, self.split, places, masks, self.given, steps)
        what = f"squared error on held-out inputs, of the variance: {before:.4f} before, {after:.4f} after"
        self.notes.append(Note("model", f"{steps} steps of gradient: {what}"))
        again = _Split(self.split, self.given)
        again.divided = self.here.divided
        for unit in (u for u in self.units if u.norm is not None):
            again.before(unit.end)
            mean, var = moments(again.of(unit.end.all_input_nodes[0]))
            old: Any = module_of(unit.end)
            set_path(self.split, str(unit.end.target), layers.with_moments(old, mean, var, *self.affine(unit)))

    def wanted(self, unit: Unit) -> Values:
        """What the end of a unit should give, batch by batch."""
        target = self.twin[unit.target.name]
        self.there.until(target)
        values = self.there.of(target)
        if unit.node not in self.fusions and unit.end in self.rebased:
            values = [_mixed(self.rebased[unit.end], v) for v in values]
        if unit.skip is None:
            return values
        return [v - s for v, s in zip(values, self.here.of(unit.skip), strict=True)]

    # ------------------------------------------------------------ streams

    def rebase(self, dense: fx.GraphModule, found: list[Stream]) -> None:
        """Choose what the channels of each stream are, and start its readers from weights for those."""
        walk = Walk(dense, self.given)
        for stream in sorted(found, key=lambda s: min(walk.place[self.twin[v.name]] for v in s.values)):
            spread: Any = 0
            for value in sorted(stream.read(), key=lambda v: walk.place[self.twin[v.name]]):
                walk.until(self.twin[value.name])
                spread = spread + covariance(walk.of(self.twin[value.name]))
            spread = shrunk(spread, self.count)
            readers = {n: _in_units(self.scaled(n), spread) for n in stream.readers}
            one = torch.eye(len(spread), dtype=torch.float64, device=spread.device)[:, :, None]
            joint = [_in_units(one if n in self.fusions else self.scaled(n), spread) for n in stream.joint]
            made = projected([Reader(w, self.divisions[n]) for n, w in readers.items()], spread, joint)
            if made is None:
                continue
            takes, weights, back = made
            for (node, unit), new in zip(readers.items(), weights, strict=True):
                self.restart(node, new * (self.scaled(node).norm() / unit.norm()))
            for node in (n for n in stream.joint if n not in self.fusions):
                self.restart(node, torch.einsum("oct,cr->ort", self.scaled(node), back))
            what = (
                f"its {len(spread)} channels hold directions of the dense map: only layers without activation use them"
            )
            self.notes.append(Note(layer(stream.writers[0].end), what, "info"))
            self.rebased |= dict.fromkeys(stream.values, takes)
            self.restored |= dict.fromkeys(stream.values, back)

    def scaled(self, node: fx.Node) -> torch.Tensor:
        """The dense weight [out, in, taps] of a layer, as its norm scales it."""
        weight = module_of(self.twin[node.name]).weight.detach().double()  # type: ignore[union-attr, operator]
        weight = weight * _rowwise(self.affine(self.by_node[node])[0], weight)
        return weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]

    # ------------------------------------------------------------ layers

    def weighted(self, unit: Unit, wanted: Values) -> None:
        """A conv or linear layer with the norm behind it: solved for what the norm should give."""
        node = unit.node
        assert node is not None
        module: Any = module_of(node)
        slope, _ = self.affine(unit)
        # What the solution is drawn to: the weights as they are, as the norm scales them.
        begin = module.weight.detach().double() * _rowwise(slope, module.weight)
        if unit.end in self.rebased:
            begin = torch.einsum("ro,oi...->ri...", self.rebased[unit.end], begin)
        start = layers.with_weights(module, begin, None)
        free = unit.norm is not None or module.bias is not None
        read = self.here.of(node.all_input_nodes[0])
        (weight, bias), error = self.regressed(start, self.divisions.get(node), read, wanted, free)
        shift = bias if unit.norm is None else torch.zeros_like(bias)
        made = layers.with_weights(module, weight.to(module.weight.dtype), shift)
        set_path(self.split, str(node.target), made)
        if unit.norm is not None:
            self.moved(unit.norm, made, read, bias)
        self.note(node, error)

    def affine(self, unit: Unit) -> Solution:
        """The scale and shift [out] of the unit's norm in eval mode; 1 and 0 without one."""
        module: Any = module_of(unit.first)
        norm: Any = None if unit.norm is None else module_of(unit.norm)
        if norm is None:
            one = module.weight.new_ones(len(module.weight), dtype=torch.float64)
            return one, torch.zeros_like(one)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        return scale.detach(), (norm.bias.double() - norm.running_mean.double() * scale).detach()

    def regressed(
        self, start: nn.Module, division: Division | None, read: Values, wanted: Values, free: bool
    ) -> tuple[Solution, float]:
        """Weight and intercept (zero unless ``free``) for the values wanted, drawn to those of ``start``; the relative
        error on held-out inputs."""
        begin: Any = start
        blocks = layers.blocks_of(start, division)
        weight = torch.zeros_like(begin.weight, dtype=torch.float64)
        bias = weight.new_zeros(len(weight))
        left = total = 0.0
        for some, parts in zip(blocks, self.normals(start, blocks, read, wanted), strict=True):
            found, offset, error = solved(parts, layers.weights_in(start, some), free)
            layers.put_in(weight, found, some, getattr(start, "groups", 1) > 1)
            bias[torch.as_tensor(some.outs, device=bias.device)] = offset
            left, total = left + float(error.sum()), total + float(sum(p.varies(free).sum() for p in parts))
        return (weight, bias), (left / total) ** 0.5 if total else 0.0

    def normals(
        self, module: nn.Module, blocks: list[layers.Blocks], read: Values, wanted: Values
    ) -> list[list[Normal]]:
        """Normal equations of each kind of block, over each of some parts of the inputs."""
        last = isinstance(module, nn.Linear)
        sizes = [tuple(y.shape[:-1]) if last else (len(y), *y.shape[2:]) for y in wanted]
        count = sum(s[0] for s in sizes)
        if count < 2:
            raise PlanError("calibration is a single input; give several: a few hundred do")
        share = min(1.0, layers.wanted_positions(module, blocks) / sum(math.prod(s) for s in sizes))
        sums: list[dict[int, Normal]] = [{} for _ in blocks]
        first = 0
        for x, y, size in zip(read, wanted, sizes, strict=True):
            at = layers.positions(size, share, self.generator)
            part = (at[0] + first) * min(PARTS, count) // count
            first += size[0]
            for number in part.unique().tolist():
                some = tuple(i[part == number] for i in at)
                taken, right = layers.windows(module, x, some), layers.rows(y, some, last)
                for held, block in zip(sums, blocks, strict=True):
                    held[number] = layers.normal(taken, right, block).plus(held.get(number))
        return [list(held.values()) for held in sums]

    def moved(self, norm: fx.Node, made: nn.Module, read: Values, bias: torch.Tensor) -> None:
        """The norm behind a solved layer: it adds the intercept, and holds the statistics of what the layer gives."""
        with torch.no_grad():
            mean, var = moments([made(x) for x in read])
        old: Any = module_of(norm)
        set_path(self.split, str(norm.target), layers.with_moments(old, mean, var, torch.ones_like(mean), bias))

    # ------------------------------------------------------------ norms

    def norm(self, unit: Unit, wanted: Values) -> None:
        """A batch norm alone: each channel's own regression, with the statistics of what it reads."""
        module: Any = module_of(unit.end)
        read = self.here.of(unit.end.all_input_nodes[0])
        mean, var = moments(read)
        aimed, _ = moments(wanted)
        centred = [
            ((channels(x) - mean[:, None]) * (channels(y) - aimed[:, None])).sum(1)
            for x, y in zip(read, wanted, strict=True)
        ]
        count = sum(x.numel() // x.shape[1] for x in read)
        before, _ = self.affine(unit)
        slope = torch.where(var > 0, torch.stack(centred).sum(0) / count / var.clamp_min(1e-30), before)
        set_path(self.split, str(unit.end.target), layers.with_moments(module, mean, var, slope, aimed - slope * mean))

    # ------------------------------------------------------------ fusions

    def fusion(self, node: fx.Node, wanted: Values) -> None:
        """Back to the dense values; then on the directions of them that the branches' layers weigh most."""
        module: Any = module_of(node)
        width = module.weight.shape[1]
        one = torch.eye(width, dtype=torch.float64, device=module.weight.device)
        place = node.all_input_nodes[0]
        begin = self.restored.get(place, one)
        start = layers.with_weights(module, begin.reshape(width, width, *module.weight.shape[2:]), None)
        read = self.here.of(place)
        (weight, bias), error = self.regressed(start, None, read, wanted, True)
        weight = weight.flatten(1)
        takes = one[torch.as_tensor(self.fusions[node], device=one.device)]
        readers = self.readers(node)
        if readers:
            found = projected(list(readers.values()), weight @ covariance(read) @ weight.T)
            if found is not None:
                takes = found[0]
                for reader, new in zip(readers, found[1], strict=True):
                    self.restart(reader, new)
        final = layers.with_weights(
            module, (takes @ weight).to(module.weight.dtype).view_as(module.weight), takes @ bias
        )
        set_path(self.split, str(node.target), final)
        self.note(node, error)

    def readers(self, node: fx.Node) -> dict[fx.Node, Reader]:
        """The layers that read a fusion, by node, where all of them are divided and will be solved: then its outputs
        may be any combinations of the dense channels."""
        found = {}
        for reader in node.users:
            unit, division = self.by_node.get(reader), self.divisions.get(reader)
            if unit is None or division is None or getattr(module_of(reader), "groups", 1) > 1:
                return {}
            weight = self.scaled(reader)
            if weight.shape[1] != module_of(node).weight.shape[1]:  # type: ignore[union-attr]
                return {}
            found[reader] = Reader(weight, division)
        return found

    def restart(self, reader: fx.Node, weight: torch.Tensor) -> None:
        """Give a layer behind a projection, which is solved later, the weights to be drawn to."""
        module: Any = module_of(reader)
        slope, _ = self.affine(self.by_node[reader])
        plain = weight.reshape(module.weight.shape) / _rowwise(slope, module.weight)
        plain = torch.where(plain.isfinite(), plain, 0.0)
        set_path(self.split, str(reader.target), layers.with_weights(module, plain.to(module.weight.dtype), None))

    def note(self, node: fx.Node, error: float) -> None:
        self.notes.append(Note(layer(node), f"solved; relative error on held-out inputs {error:.3f}", "info"))


def reads(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> bool:
    return any(n in values for n in node.all_input_nodes)


def _rowwise(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One factor for each row of a weight [out, in, ...]."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def shrunk(spread: torch.Tensor, count: int) -> torch.Tensor:
    """A covariance [C, C] as it is to be expected of other inputs, from so many: the fewer there are for a channel, the
    less the channels are taken to go together."""
    share = len(spread) / (len(spread) + PER_INPUT * count)
    return (1 - share) * spread + share * torch.diag(spread.diagonal())


def _in_units(weight: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """A weight [out, C, taps] such that what it gives of maps with this covariance varies by 1 in all."""
    return weight / torch.einsum("oct,cd,odt->", weight, spread, weight).clamp_min(1e-300).sqrt()


def _mixed(mix: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Combinations [R, C] of the channels of a map [N, C, ...]."""
    return torch.einsum("rc,nc...->nr...", mix.to(value.dtype), value)


def covariance(values: Values) -> torch.Tensor:
    """The covariance [C, C] of the channels of maps, in float64."""
    count = sum(v.numel() // v.shape[1] for v in values)
    mean, _ = moments(values)
    return torch.stack([(one := channels(v) - mean[:, None]) @ one.T for v in values]).sum(0) / count
