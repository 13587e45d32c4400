"""SplitNet (Kim et al., ICML 2017): which features and classes belong together.

An `Assignment` is learned (`attach`), or comes from `random` draws, a taxonomy (`semantic`), the classifier's rows
(`clustering`) or the weights alone (`weights`). `splitfx.passes.SplitNet` carves a model by it. `plot_weights`,
`plot_classes` and `plot_curves` draw it; they load what they need when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitfx.splitnet.assignment import Assignment, structure
from splitfx.splitnet.learn import Convergence, Groups, attach
from splitfx.splitnet.sources import clustering, random, semantic
from splitfx.splitnet.weights import weights

if TYPE_CHECKING:
    from splitfx.report.splitnet import plot_classes, plot_curves, plot_weights

__all__ = [
    "Assignment",
    "Convergence",
    "Groups",
    "attach",
    "clustering",
    "plot_classes",
    "plot_curves",
    "plot_weights",
    "random",
    "semantic",
    "structure",
    "weights",
]
_PICTURES = ("plot_classes", "plot_curves", "plot_weights")


def __getattr__(name: str) -> Any:
    if name not in _PICTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from splitfx.report import splitnet as pictures

    return getattr(pictures, name)
