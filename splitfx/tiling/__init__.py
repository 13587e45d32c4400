"""Exact tiling: a stage of a network executed strip by strip, with line buffers, to a chosen peak of memory.

`stage` says which nodes can be tiled, makes kernels of them and orders those; `plan` turns a stage and a `Schedule`
into a list of instructions and the bytes that they hold, and chooses the schedule; `run` computes pieces and runs the
instructions as a module; `stream` feeds it from files and into files.
"""
