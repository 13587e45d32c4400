"""SplitNet (Kim et al., ICML 2017): which features and classes belong together.

An `Assignment` is learned (`attach`), or comes from `random` draws, a taxonomy (`semantic`), the classifier's rows
(`clustering`) or the weights alone (`weights`). `splitfx.passes.SplitNet` carves a model by it.
"""

from splitfx.splitnet.assignment import Assignment, structure
from splitfx.splitnet.learn import Convergence, Groups, attach
from splitfx.splitnet.sources import clustering, random, semantic
from splitfx.splitnet.weights import weights

__all__ = ["Assignment", "Convergence", "Groups", "attach", "clustering", "random", "semantic", "structure", "weights"]
