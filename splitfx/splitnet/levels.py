"""Into how many groups each layer is split, from what the user says: by layer name, per stage, or by depth.

A *level* is the number of groups of a layer; 1 leaves it dense. Layers are the weighted ones (convolutions and linear
layers), in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.axes import Edge
from splitfx.analysis.blocks import blocks
from splitfx.errors import PlanError
from splitfx.ir.graph import layer

Levels = Mapping[str, int] | Sequence[int]
Asked = dict[fx.Node, int]

__all__ = ["Asked", "Levels", "asked_levels", "stages"]


def asked_levels(known: Facts, levels: Levels = (), depth: int = 0, groups: int = 0) -> Asked:
    """The level that the user asks for, of every weighted layer.

    ``levels``: globs of layer names to groups (``{"layer4.*": 2, "fc": 4}``, the last that matches counts), or groups
    per stage (see `stages`). Instead of it, ``depth`` and ``groups``: the last ``depth`` weighted layers, shortcut
    convs among them, have ``groups`` groups each (the paper's depth); one that is called again counts once, where it is
    called last. Raises `PlanError` for a glob without a layer,
    another number of stages, nothing to split.
    """
    edges = known.axes.edges
    if bool(levels) == bool(depth or groups):
        raise PlanError(
            "SplitNet needs to know what to split: give levels, such as {'layer4.*': 2, 'fc': 4}, or depth and groups"
        )
    if isinstance(levels, Mapping) and levels:
        found = _by_name(edges, levels)
    elif levels:
        found = _by_stage(known, tuple(levels))  # type: ignore[arg-type]
    else:
        found = _by_depth(edges, depth, groups)
    wrong = next((g for g in found.values() if g < 1), None)
    if wrong is not None:
        raise PlanError(f"a layer is split into 1 or more groups, not {wrong}")
    if all(g == 1 for g in found.values()):
        raise PlanError("no layer is split: every level is 1; give some layers 2 groups or more")
    return found


def _by_name(edges: Sequence[Edge], levels: Mapping[str, int]) -> Asked:
    names = {e.node: layer(e.node) for e in edges}
    for glob in levels:
        if not any(fnmatchcase(n, glob) for n in names.values()):
            listed = ", ".join(list(dict.fromkeys(names.values()))[-6:])
            raise PlanError(f"levels: no layer matches {glob!r}; the last weighted layers are {listed}")
    found = dict.fromkeys(names, 1)
    for glob, groups in levels.items():
        found |= {node: groups for node, name in names.items() if fnmatchcase(name, glob)}
    return found


def stages(known: Facts) -> list[tuple[Edge, ...]]:
    """The weighted layers of each stage: the blocks between two points where the map shrinks, and what lies behind
    the last convolution (the classifier)."""
    place = {node: i for i, node in enumerate(known.graph.graph.nodes)}
    ends = [place[b.edges[-1].node] for b in blocks(known)]
    bounds = [-1, *ends, len(place)]
    found = [tuple(e for e in known.axes.edges if start < place[e.node] <= end) for start, end in pairwise(bounds)]
    return [s for s in found if s]


def _by_stage(known: Facts, levels: tuple[int, ...]) -> Asked:
    found = stages(known)
    if len(levels) != len(found):
        listed = "; ".join(f"{i}: {_span(s)}" for i, s in enumerate(found, 1))
        raise PlanError(f"levels has {len(levels)} entries, the model has {len(found)} stages ({listed})")
    return {e.node: groups for stage, groups in zip(found, levels, strict=True) for e in stage}


def _span(stage: tuple[Edge, ...]) -> str:
    first, last = layer(stage[0].node), layer(stage[-1].node)
    return first if first == last else f"{first} to {last}"


def _by_depth(edges: Sequence[Edge], depth: int, groups: int) -> Asked:
    if depth < 1 or groups < 2:
        raise PlanError(
            f"depth and groups go together: 1 layer and 2 groups at least; got depth={depth}, groups={groups}"
        )
    names = {e.node: layer(e.node) for e in edges}
    order = list(dict.fromkeys(reversed(names.values())))  # by the last call: a layer that is called again counts once
    if depth > len(order):
        raise PlanError(f"depth={depth} is more than the model's {len(order)} weighted layers")
    return {node: groups if name in order[:depth] else 1 for node, name in names.items()}
