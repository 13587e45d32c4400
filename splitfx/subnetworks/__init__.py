"""Sub-networks (Fuengfusin and Tamukoh): one set of weights, a base model and sub-models that enter it at a cut.

`stepdown` is the arithmetic of the step-down convolution, `trunk` follows sizes from the input to a cut, `sites` says
where a cut can lie, `build` makes the step-down, `entry` is its place in the graph, `model` what a user calls,
`choose` keeps budgets, `oracle` checks, `bundle` and `runner` are ONNX files over one file of weights.
"""

from splitfx.subnetworks import model as model  # gives `Entry` the class of a graph that holds one
