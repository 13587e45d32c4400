"""Layers in front of a split of which every group reads a part: divided among the groups, too.

A layer of the common stem keeps all its inputs, but where one group reads one part of its output channels and another
group another, each needs no more than its own rows of the weight. Divided, the work moves out of the stem into the
branches: the same multiplications in all, fewer on each process, and no slices of a common map.

Divides: convolutions and linear layers without groups of their own, called once, that are read through elementwise
layers, norms, pools and depthwise convolutions by slices or gathers of different channels only. Everything else stays
as it is. Promises: the same function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from splitfx.analysis import facts
from splitfx.analysis.moves import channel_dim
from splitfx.analysis.shapes import shape
from splitfx.carving.carve import carve
from splitfx.carving.division import Division
from splitfx.ir.editing import tidy
from splitfx.ir.graph import attribute, module_of, read_alone
from splitfx.ir.ops import Channel, bind, op, op_name

Needs = Mapping[fx.Node, frozenset[int]]


def divide(graph: fx.GraphModule, needs: Needs) -> bool:
    """Divide what can be divided, in place; ``needs``: the groups that need each node. Says whether there was any."""
    divisions = found(graph, needs)
    if divisions:
        carve(graph, divisions, dict.fromkeys(divisions, "branches"))
        tidy(graph)
    return bool(divisions)


def found(graph: fx.GraphModule, needs: Needs) -> dict[fx.Node, Division]:
    """The division of every layer that groups read in disjoint parts: all inputs for each, their own outputs."""
    calls = Counter(str(n.target) for n in graph.graph.nodes if n.op == "call_module")
    read, result = read_alone(graph), {}
    for node in graph.graph.nodes:
        weighted = node.op == "call_module" and op(node).channel is Channel.MIXES
        if not weighted or len(needs.get(node, ())) < 2 or calls[str(node.target)] > 1:
            continue
        if getattr(module_of(node), "groups", 1) > 1 or str(node.target) in read:
            continue
        parts = _parts(graph, node, needs)
        if parts:
            ins = np.arange(shape(facts(graph).shapes[bind(node)["input"]])[_dim(graph, bind(node)["input"]) or 1])
            result[node] = Division((ins,) * len(parts), tuple(parts))
    return result


def _parts(graph: fx.GraphModule, node: fx.Node, needs: Needs) -> list[np.ndarray]:
    """The channels of a layer by who reads them, in order; empty where they are not read in disjoint parts."""
    dim = _dim(graph, node)
    if dim is None:
        return []
    size = shape(facts(graph).shapes[node])[dim]
    readers = np.zeros((size, max(max(n, default=0) for n in needs.values()) + 1), dtype=bool)
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if user in seen:
                continue
            seen.add(user)
            chosen = _chosen(graph, user, dim, size)
            if chosen is not None:
                for g in needs[user]:
                    readers[chosen, g] = True
            elif _follows(graph, user, dim, size):
                waiting.append(user)
            else:
                return []
    sets, who = np.unique(readers, axis=0, return_inverse=True)
    parts = [np.flatnonzero(who.reshape(-1) == i) for i in range(len(sets))]
    disjoint = len(sets) > 1 and int(sets.astype(int).sum(0).max()) == 1
    return sorted(parts, key=lambda p: int(p[0])) if disjoint else []


def _dim(graph: fx.GraphModule, node: fx.Node) -> int | None:
    labels = facts(graph).axes.labels.get(node)
    return channel_dim(labels) if isinstance(labels, torch.Tensor) else None


def _chosen(graph: fx.GraphModule, node: fx.Node, dim: int, size: int) -> np.ndarray | None:
    """The channels that a slice or a gather along ``dim`` takes; None for anything else."""
    name = op_name(node)
    if name not in ("slice", "index_select"):
        return None
    given: dict[str, Any] = bind(node)
    rank = len(shape(facts(graph).shapes[node]))
    if not isinstance(given["dim"], int) or given["dim"] % rank != dim:
        return None
    if name == "slice":
        edges = [given.get(k) for k in ("start", "end", "step")]
        if any(isinstance(e, fx.Node) for e in edges):
            return None
        return np.arange(size)[slice(*edges)]
    index = given["index"]
    if not isinstance(index, fx.Node) or index.op != "get_attr":
        return None
    return attribute(graph, str(index.target)).cpu().numpy()


def _follows(graph: fx.GraphModule, node: fx.Node, dim: int, size: int) -> bool:
    """Channel i of the node is channel i of what it reads: it can be computed for some channels alone."""
    module = module_of(node)
    depthwise = op(node).channel is Channel.MIXES and getattr(module, "groups", 1) == size
    if op(node).channel is not Channel.SAME and not depthwise:
        return False
    sizes = shape(facts(graph).shapes[node])
    return _dim(graph, node) == dim and len(sizes) > dim and sizes[dim] == size
