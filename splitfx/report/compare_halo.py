"""What the approximate split costs: for every layer where its tiles can be combined, memory saved and output changed.

Beside it the two other ways to the same memory: the exact halo, whose output does not change, and a smaller image.
Peaks are predicted, outputs computed; how far an output is off is no accuracy, which needs trained weights and data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from splitfx.analysis import facts
from splitfx.analysis.memory import memory
from splitfx.analysis.shapes import shapes
from splitfx.errors import PlanError, UnsupportedError, nearest
from splitfx.frontend.example_inputs import split_inputs
from splitfx.frontend.trace import trace
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import dims, size, table
from splitfx.ir.editing import tidy
from splitfx.ir.graph import TensorSpec, copy_graph, info, is_canonical
from splitfx.report.explain import outputs
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.zero import Grid, combine_layers, install_zero, leading_to

STRIPS = 16  # steps in which the exact halo is run


@dataclass(frozen=True)
class HaloRow:
    """One combine layer. ``difference``: of the model's output to the unsplit one, as ‖a − b‖ / ‖b‖.

    ``exact``: the same layers in strips with their halo. ``resized``: the unsplit model on an image so small that its
    peak is not above ``peak_bytes``; None where the model takes no other size. Peaks are predicted, inputs counted.
    """

    layer: str
    peak_bytes: int
    unsplit_bytes: int
    difference: float
    exact_bytes: int | None
    exact_difference: float | None
    resized: tuple[int, int] | None
    resized_bytes: int | None
    resized_difference: float | None


@dataclass(frozen=True)
class HaloComparison(Shown):
    """One row for every combine layer, in order."""

    rows: tuple[HaloRow, ...]

    def to_json(self) -> str:
        return json.dumps([asdict(one) for one in self.rows], indent=2)

    def __str__(self) -> str:
        return halo_table(self.rows)

    def plot(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Draw memory saved against change of the output to ``path``, a png, svg or pdf file.

        Raises `MissingExtraError` without matplotlib, `SplitfxError` where the file cannot be written.
        """
        from splitfx.report.plots.trade_offs import plot_halo

        plot_halo(self.rows, path, overwrite)


@told
def compare_halo(
    model: nn.Module,
    example_inputs: Any,
    grid: Grid = (2, 2),
    layers: Sequence[str] | None = None,
    *,
    progress: Say = True,
) -> HaloComparison:
    """What the approximate split of an image costs at every layer where its tiles can be combined; or at ``layers``.

    As Fig. 4 of Zhuang et al., *CNN Memory Optimization Inference with Splitting Image*, does with accuracies: peak
    memory in bytes when ``grid`` rows x columns of tiles, each with zeros at its edges, run up to a layer, beside the
    two other ways to less memory, the exact halo and a smaller image. Instead of an accuracy, which needs trained
    weights and data: how far the output moves, as ‖a − b‖ / ‖b‖ on ``example_inputs``, one image [N, C, H, W].

    ``TileZeroHalo(grid=..., until=layer)`` makes the split of a row. Raises `TraceError`, `UnsupportedError` for a
    model with other inputs, `PlanError` for a grid that does not divide the image, and for a layer where tiles cannot
    be combined.
    """
    if len(grid) != 2 or any(not isinstance(n, int) or n < 1 for n in grid):
        raise PlanError(f"a grid is rows and columns of tiles, both at least 1; got {grid}")
    if isinstance(layers, str):
        raise PlanError(f"layers is a list of layer names, not a text: write layers=[{layers!r}]")
    say("splitting at every layer")
    return HaloComparison(tuple(_Comparison(model, example_inputs, grid).rows(layers)))


def halo_table(rows: Sequence[HaloRow]) -> str:
    """The rows as a text table."""
    head = ("combined after", "peak", "of", "difference", "exact halo", "resized to", "difference")
    share = lambda value: "-" if value is None else f"{value:.2g}"  # noqa: E731
    cells = [
        (
            r.layer, size(r.peak_bytes), size(r.unsplit_bytes), share(r.difference), share(r.exact_difference),
            dims(r.resized) if r.resized is not None else None, share(r.resized_difference),
        )
        for r in rows
    ]  # fmt: skip
    return table(head, cells)


class _Comparison:
    def __init__(self, model: nn.Module, example_inputs: Any, grid: Grid) -> None:
        graph = model if is_canonical(model) else trace(model, example_inputs)
        assert isinstance(graph, fx.GraphModule)
        self.graph, self.grid = copy_graph(graph, share=True), grid
        self.graph.eval()
        args, kwargs = split_inputs(example_inputs, model)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        if len(tensors) != 1 or tensors[0].dim() != 4 or len(info(graph).inputs) != 1:
            raise UnsupportedError("comparing halos needs a model with one input, an image [N, C, H, W]")
        self.image = tensors[0]
        self.spec = TensorSpec.of(self.image)
        self.wanted = self._outputs(self.graph, self.image)
        self.unsplit = self._peak(self.graph, self.spec)
        self._resized: dict[Grid, tuple[int, float | None]] = {}

    def rows(self, layers: Sequence[str] | None) -> list[HaloRow]:
        order = {n: i for i, n in enumerate(self.graph.graph.nodes)}
        places = {name: order[n] for name, n in combine_layers(self.graph, facts(self.graph)).items()}
        if layers is not None:
            for name in layers:
                if name not in places:
                    raise PlanError(f"tiles cannot be combined after {name!r}.{nearest(name, places)}")
            return [self._row(name, places[name]) for name in layers]
        found = []
        for name, count in places.items():
            try:
                found.append(self._row(name, count))
            except PlanError as why:
                refused = why
        if not found:
            raise PlanError(f"tiles can be combined nowhere: {refused}" if places else "the model has no layer for it")
        return found

    def _row(self, name: str, place: int) -> HaloRow:
        split = copy_graph(self.graph, share=True)
        nodes = leading_to(list(split.graph.nodes)[place])
        call = install_zero(split, nodes, self.grid)
        tidy(split)
        found: Any = split.get_submodule(str(call.target))
        found.check((self.spec,))
        peak = self._peak(split, self.spec)
        exact = self._exact(place)
        small = self._smaller(peak)
        resized = self._at(small) if small is not None else (None, None)
        difference = apart(self._outputs(split, self.image), self.wanted)
        return HaloRow(name, peak, self.unsplit, difference, *exact, small, *resized)

    def _exact(self, place: int) -> tuple[int | None, float | None]:
        """(peak, difference) of the same layers in strips with their halo; None where something reads whole maps."""
        split = copy_graph(self.graph, share=True)
        nodes = leading_to(list(split.graph.nodes)[place])
        able, _ = stages(split, facts(split).regions)
        if not able or not set(nodes) <= set(able[0]):
            return None, None
        install(split, nodes, Schedule(max(1, self.image.shape[2] // STRIPS)))
        tidy(split)
        split.eval()
        return self._peak(split, self.spec), apart(self._outputs(split, self.image), self.wanted)

    # ------------------------------------------------------------ the same memory by a smaller image

    def _smaller(self, peak: int) -> tuple[int, int] | None:
        """The largest image of this shape, about, with which the unsplit model stays within ``peak``."""
        height, width = self.image.shape[2:]
        share = min(1.0, math.sqrt(peak / self.unsplit))
        for _ in range(40):
            small = (max(1, round(height * share)), max(1, round(width * share)))
            try:
                needed = self._at(small)[0]
            except UnsupportedError:
                return None  # the model takes no other size
            if needed <= peak:
                return small
            share *= min(0.99, math.sqrt(peak / needed))
        return None

    def _at(self, small: tuple[int, int]) -> tuple[int, float | None]:
        """(peak, difference of the output) of the unsplit model on the image at another size."""
        if small not in self._resized:
            spec = TensorSpec((*self.spec.shape[:2], *small), self.spec.dtype, self.spec.device)
            peak = self._peak(self.graph, spec)
            image = F.interpolate(self.image, small, mode="bilinear", antialias=True, align_corners=False)
            self._resized[small] = peak, self._far(self._outputs(self.graph, image))
        return self._resized[small]

    def _far(self, outputs: list[torch.Tensor]) -> float | None:
        """The difference of outputs, maps brought to the size they should have."""
        alike = [
            F.interpolate(ours, theirs.shape[2:], mode="bilinear") if ours.dim() == theirs.dim() == 4 else ours
            for ours, theirs in zip(outputs, self.wanted, strict=True)
        ]
        same = all(a.shape == b.shape for a, b in zip(alike, self.wanted, strict=True))
        return apart(alike, self.wanted) if same else None

    # ------------------------------------------------------------ running

    def _peak(self, graph: fx.GraphModule, spec: TensorSpec) -> int:
        return memory(graph, shapes(graph, (spec,))).peak_bytes

    def _outputs(self, graph: fx.GraphModule, image: torch.Tensor) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten([image], info(self.graph).in_spec)
        return outputs(graph, (tuple(args), dict(kwargs)))


def apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all outputs."""
    off = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True)))
    return off / max(1e-300, math.sqrt(sum(float(b.double().square().sum()) for b in theirs)))
