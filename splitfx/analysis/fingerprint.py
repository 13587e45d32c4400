"""A few letters that no other graph has."""

from __future__ import annotations

from torch import fx, nn

from splitfx.ground.digest import digest


def fingerprint(graph: fx.GraphModule, words: str = "") -> str:
    """A few letters of all that a graph's results follow from, and of ``words`` beside it: its nodes, its layers with
    their options, its parameters and buffers, also those that are not saved."""
    held = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    return digest(held, f"{graph.graph}\n{nn.Module.__repr__(graph)}\n{words}")
