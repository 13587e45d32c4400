"""SplitNet (Kim et al., ICML 2017): which features and classes belong together.

An `Assignment` is learned (`attach`), or comes from `random` draws, a taxonomy (`semantic`), the classifier's rows
(`clustering`), the weights alone (`weights`) or what classes use of them (`activations`). `splitfx.passes.SplitNet`
carves a model by it. `plot_weights`, `plot_classes` and `plot_curves` draw it. `export_branches` writes a carved
model's parts as ONNX files, which `Branches` runs. The last five load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitfx.splitnet.activations import activations
from splitfx.splitnet.assignment import Assignment, structure
from splitfx.splitnet.learn import Convergence, Groups, attach
from splitfx.splitnet.sources import clustering, random, semantic
from splitfx.splitnet.weights import weights

if TYPE_CHECKING:
    from splitfx.export.bundles.branches import export_branches
    from splitfx.export.bundles.branches_runner import Branches
    from splitfx.report.plots.splitnet import plot_classes, plot_curves, plot_weights

__all__ = [
    "Assignment",
    "Branches",
    "Convergence",
    "Groups",
    "activations",
    "attach",
    "clustering",
    "export_branches",
    "plot_classes",
    "plot_curves",
    "plot_weights",
    "random",
    "semantic",
    "structure",
    "weights",
]
_HOME = {
    **dict.fromkeys(("plot_classes", "plot_curves", "plot_weights"), "splitfx.report.plots.splitnet"),
    "export_branches": "splitfx.export.bundles.branches",
    "Branches": "splitfx.export.bundles.branches_runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
