"""Reconstruction: a split graph's layers solved against what the dense graph computes, from inputs without labels.

Every unit (`units`) is solved in order, in closed form: a divided layer by ridge regression on what the layers in front
of it, solved already, really give; the batch norm behind it takes the statistics of that; a fusion is the affine map
back to the dense values, projected, where only divided layers read it, on those directions of them that each branch's
layers weigh most. No training, no labels.
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
from splitfx.carving.reconstruction.units import Unit, units
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, module_of, set_path
from splitfx.ir.notes import Note

HELD = 4  # the last of so many parts of the inputs is held out, to choose how strongly solutions are drawn to the start
FEW = 64  # inputs

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
        self.units = units(split, divisions, fusions)
        self.by_node = {u.node: u for u in self.units if u.node is not None}
        self.twin = {n.name: n for n in dense.graph.nodes}
        self.left = Counter(u.target for u in self.units)
        self.given = given = batched(dense, inputs)
        check_range(dense, given)
        self.there = Walk(dense, given, kept=[self.twin[t.name] for t in self.left])
        self.here = _Split(split, given)
        self.here.divided = {str(n.target): d for n, d in divisions.items()}
        self.generator = torch.Generator().manual_seed(0)
        self.notes: list[Note] = []
        count = sum(len(next(t for t in some if isinstance(t, torch.Tensor))) for some in given)
        if count < FEW:
            what = f"calibration is {count} inputs only: layers fit these and may be far off on others; give hundreds"
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
        places = [f.all_input_nodes[0].name for f in self.fusions]
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
        if unit.skip is None:
            return values
        return [v - s for v, s in zip(values, self.here.of(unit.skip), strict=True)]

    # ------------------------------------------------------------ layers

    def weighted(self, unit: Unit, wanted: Values) -> None:
        """A conv or linear layer with the norm behind it: solved for what the norm should give."""
        node = unit.node
        assert node is not None
        module: Any = module_of(node)
        slope, _ = self.affine(unit)
        # What the solution is drawn to: the weights as they are, as the norm scales them.
        start = layers.with_weights(module, module.weight.detach().double() * _rowwise(slope, module.weight), None)
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
        pairs = self.normals(start, blocks, read, wanted)
        for some, (fit, held) in zip(blocks, pairs, strict=True):
            found, offset, error = solved(fit, held, layers.weights_in(start, some), free)
            layers.put_in(weight, found, some, getattr(start, "groups", 1) > 1)
            bias[torch.as_tensor(some.outs, device=bias.device)] = offset
            left, total = left + float(error.sum()), total + float(held.varies(free).sum())
        return (weight, bias), (left / total) ** 0.5 if total else 0.0

    def normals(
        self, module: nn.Module, blocks: list[layers.Blocks], read: Values, wanted: Values
    ) -> list[tuple[Normal, Normal]]:
        """Normal equations of each kind of block, over inputs to fit and over inputs that are held out."""
        last = isinstance(module, nn.Linear)
        sizes = [tuple(y.shape[:-1]) if last else (len(y), *y.shape[2:]) for y in wanted]
        count = sum(s[0] for s in sizes)
        if count < 2:
            raise PlanError("calibration is a single input; give several: a few hundred do")
        share = min(1.0, layers.wanted_positions(module, blocks) / sum(math.prod(s) for s in sizes))
        sums: list[list[Normal | None]] = [[None, None] for _ in blocks]
        first, others = 0, count - math.ceil(count / HELD)
        for x, y, size in zip(read, wanted, sizes, strict=True):
            at = layers.positions(size, share, self.generator)
            held = at[0] + first >= others
            first += size[0]
            for kind, some in enumerate(tuple(i[mask] for i in at) for mask in (~held, held)):
                if not len(some[0]):
                    continue
                taken, right = layers.windows(module, x, some), layers.rows(y, some, last)
                for slot, block in zip(sums, blocks, strict=True):
                    slot[kind] = layers.normal(taken, right, block).plus(slot[kind])
        return [(fit, held) for fit, held in sums if fit is not None and held is not None]

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
        start = layers.with_weights(module, one.reshape(width, width, *module.weight.shape[2:]), None)
        read = self.here.of(node.all_input_nodes[0])
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
            dense: Any = module_of(self.twin[reader.name])
            slope, _ = self.affine(unit)
            weight = dense.weight.detach().double() * _rowwise(slope, dense.weight)
            if weight.shape[1] != module_of(node).weight.shape[1]:  # type: ignore[union-attr]
                return {}
            found[reader] = Reader(weight.flatten(2) if weight.dim() > 2 else weight[:, :, None], division)
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


def _rowwise(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One factor for each row of a weight [out, in, ...]."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def covariance(values: Values) -> torch.Tensor:
    """The covariance [C, C] of the channels of maps, in float64."""
    count = sum(v.numel() // v.shape[1] for v in values)
    mean, _ = moments(values)
    return torch.stack([(one := channels(v) - mean[:, None]) @ one.T for v in values]).sum(0) / count
