"""Exact tiling: a stage of a network executed strip by strip, with line buffers, to a chosen peak of memory.

`stage` says which nodes can be tiled and orders them, `schedule` turns a stage and a `Schedule` into a list of
instructions and the bytes that they hold, `kernels` computes pieces, `executor` runs the instructions as a module,
`planner` chooses the schedule.
"""
