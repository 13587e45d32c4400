"""A graph as plain data: what pictures and reports show of it after the graph itself is gone.

The pipeline keeps a sketch of the graph that a plan started from, so that a page can show before and after. It holds
no tensors and no objects of torch, and is stored with a saved split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis import facts
from splitfx.analysis.cost import Cost
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import is_size, op_name


@dataclass(frozen=True)
class Sketch:
    """One operation. ``layer``: the user's path. ``words``: what is special about it, such as "3×3 64→128".

    ``reads``: positions of the operations that it reads, in the list that it stands in. ``shape``: of its (first)
    result. ``bytes``: of all its results; ``live_bytes``: alive while it runs, 0 where that is not known.
    """

    name: str
    layer: str
    op: str
    words: str
    reads: tuple[int, ...]
    shape: tuple[int, ...]
    params: int
    macs: int
    bytes: int
    live_bytes: int
    groups: int
    weighted: bool


def sketch(graph: fx.GraphModule) -> tuple[Sketch, ...]:
    """The operations of a canonical graph in order, at its traced sizes."""
    known = facts(graph)
    return sketched(graph, known.shapes, known.cost, known.memory.live_bytes)


def sketched(
    graph: fx.GraphModule, shapes: dict[fx.Node, Any], cost: Cost, live: dict[fx.Node, int]
) -> tuple[Sketch, ...]:
    """As `sketch`, of any graph whose facts are given."""
    place: dict[fx.Node, int] = {}
    found: list[Sketch] = []
    for node in graph.graph.nodes:
        tensors = [t for t in pytree.tree_leaves(shapes.get(node)) if isinstance(t, torch.Tensor)]
        if node.op in ("get_attr", "output") or is_size(node) or not tensors:
            continue
        place[node] = len(found)
        module, counted = module_of(node), cost.rows[node]
        found.append(
            Sketch(
                node.name,
                layer(node),
                "input" if node.op == "placeholder" else op_name(node),
                words(module),
                tuple(dict.fromkeys(place[n] for n in node.all_input_nodes if n in place)),
                tuple(int(size) for size in tensors[0].shape),
                counted.params,
                counted.macs,
                counted.bytes,
                live.get(node, 0),
                getattr(module, "groups", 1) if isinstance(module, nn.modules.conv._ConvNd) else 1,
                isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.Embedding),
            )
        )
    return tuple(found)


def words(module: nn.Module | None) -> str:
    """A layer in a few letters: kernel and channels; empty for what has no weights of that kind."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{'×'.join(map(str, module.kernel_size))} {module.in_channels}→{module.out_channels}"
    if isinstance(module, nn.Linear):
        return f"linear {module.in_features}→{module.out_features}"
    if isinstance(module, nn.Embedding):
        return f"embedding {module.num_embeddings}→{module.embedding_dim}"
    return ""
