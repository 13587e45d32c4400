"""A stage: the nodes of a graph that are executed together, piece by piece, and what each piece needs.

A stage is compiled from its own small graph and the sizes of its values. Its *kernels* are of three kinds:

- ``ROWS``: the output is a feature map, and a piece of it follows from pieces of the operands (`regions`).
- ``REDUCE``: consumes the rows of one map (global pool, mean over H and W, statistics of a norm); nothing comes out
  before the last row has gone in.
- ``WHOLE``: runs once, on complete values: the squeeze of a gate, a classifier, an attention over a whole map.

A kernel that reads what a reduction or a whole value gives belongs to a later *phase* than what those read: the phase
starts when the one before it is through. Values that a later phase reads are kept, or their producers are run again in
the later phase from a smaller value (the two passes of a squeeze-and-excitation), or they are spilled to another memory
meanwhile (`kernel.Keeping`); where that costs nothing, they are made in the later phase only (`_Builder._delay`).
What follows from no map at all has phase -1: it runs first.
"""
