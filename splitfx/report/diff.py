"""`diff`: two models on the same inputs, layer by layer: what only one has, and the first layer that differs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.compiler.pipeline import Figures, figures
from splitfx.frontend.example_inputs import inputs_for
from splitfx.frontend.trace import trace
from splitfx.ground.difference import apart
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, told
from splitfx.ground.table import number, size, table, wrap
from splitfx.ir.graph import is_canonical, layer
from splitfx.ir.modes import in_eval
from splitfx.report.explanation import ratio

NOISE = 1e-4  # of the largest value: float32 sums in another order
SHOWN = 40


@dataclass(frozen=True)
class LayerDifference:
    """The output of a layer that both have: how far apart, relative to its largest value; None where shapes differ."""

    layer: str
    shape: tuple[int, ...]
    relative: float | None


@dataclass(frozen=True)
class Difference(Shown):
    """``layers``: what both have, in the order of the first. ``first``: the first of them that differs by more than
    rounding; empty where none does. ``only_first``, ``only_second``: layers that one of them has alone."""

    before: Figures
    after: Figures
    layers: tuple[LayerDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def first(self) -> str:
        return next((one.layer for one in self.layers if one.relative is None or one.relative > NOISE), "")

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "first": self.first}, indent=2)

    def __str__(self) -> str:
        a, b = self.before, self.after
        rows = [
            ("parameters", number(a.params), number(b.params), ratio(a.params, b.params)),
            ("MACs", number(a.macs), number(b.macs), ratio(a.macs, b.macs)),
            ("peak memory", size(a.peak_bytes), size(b.peak_bytes), ratio(a.peak_bytes, b.peak_bytes)),
        ]
        lines = [table(("", "first", "second", "change"), rows), ""]
        differing = [one for one in self.layers if one.relative is None or one.relative > NOISE]
        if differing:
            lines.append(f"the first layer whose output differs is {self.first}")
            cells = [(one.layer, _words(one.relative)) for one in differing[:SHOWN]]
            lines += ["", table(("layer", "output differs by"), cells)]
            lines += [f"and {len(differing) - SHOWN} more layers"] if len(differing) > SHOWN else []
        elif self.layers:
            every = "all " * (len(self.layers) > 1) + _many(len(self.layers))
            lines.append(f"the outputs of {every} that both have are the same but for rounding")
        else:
            lines.append(
                "no layer stands in both, so there are no outputs to compare; splitfx compare sets the models'"
            )
        for which, names in (("first", self.only_first), ("second", self.only_second)):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines += ["", wrap(f"{_many(len(names))} in the {which} only: {', '.join(names[:6])}{more}")]
        return "\n".join(lines)


@told
def diff(first: nn.Module, second: nn.Module, example_inputs: Any = None, *, progress: Say = True) -> Difference:
    """Run both in eval mode on the same inputs and compare what every layer gives.

    A model that is no graph from `trace`, `transform` or `load` is traced. ``example_inputs`` is spelled as for
    `trace`; without them, random ones of the sizes that the second, or else the first, was made for. Layers are matched
    by the user's path; what runs inside a tiled stage is not seen. Raises `TraceError`, and `UnsupportedError` where
    there are no inputs.
    """
    args, kwargs = inputs_for(example_inputs, first, second)
    graphs = [one if is_canonical(one) else trace(one, (args, kwargs), verify=False) for one in (first, second)]
    ours, theirs = (_outputs(one, args, kwargs) for one in graphs)  # type: ignore[arg-type]
    both = [name for name in ours if name in theirs]
    return Difference(
        figures(graphs[0]),  # type: ignore[arg-type]
        figures(graphs[1]),  # type: ignore[arg-type]
        tuple(_compared(name, ours[name], theirs[name]) for name in both),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
    )


class _Watch(fx.Interpreter):
    """Keeps what the last operation of every layer gives."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.kept: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op in ("call_module", "call_function") and isinstance(found, torch.Tensor):
            self.kept[layer(n)] = found.double()
        return found


def _outputs(graph: fx.GraphModule, args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    watch = _Watch(graph)
    with in_eval(graph), torch.inference_mode():
        watch.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
    return watch.kept


def _compared(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> LayerDifference:
    shape = tuple(ours.shape)
    if shape != tuple(theirs.shape):
        return LayerDifference(name, shape, None)
    far, largest = apart(theirs, ours)
    return LayerDifference(name, shape, far / (largest or 1.0))


def _many(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _words(relative: float | None) -> str:
    return "another shape" if relative is None else f"{100 * relative:.2g} %"
