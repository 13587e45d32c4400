"""Walks over a graph: what nodes are computed from, what is computed from them.

All give the nodes that they start at and those that they come to, each once, the nearest first. ``through``: whether a
node that was come to is walked on from; where it is not, the walk ends there, and the node is among the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

Through = Callable[[fx.Node], bool]


def reached(starts: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]) -> list[fx.Node]:
    """What ``near`` leads to, step by step."""
    found = dict.fromkeys(starts)
    order = list(found)
    for node in order:  # grows while it is walked
        fresh = [n for n in dict.fromkeys(near(node)) if n not in found]
        found.update(dict.fromkeys(fresh))
        order += fresh
    return order


def ancestors(starts: Iterable[fx.Node], through: Through = lambda node: True) -> list[fx.Node]:
    """What the nodes are computed from: operands, and their operands."""
    return reached(starts, lambda node: node.all_input_nodes if through(node) else ())


def descendants(starts: Iterable[fx.Node], through: Through = lambda node: True) -> list[fx.Node]:
    """What is computed from the nodes: readers, and their readers."""
    return reached(starts, lambda node: node.users if through(node) else ())
