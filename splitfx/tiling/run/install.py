"""Puts a `Tiled` module into a graph in the place of the nodes that it runs."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from splitfx.ir.editing import free_path, like, reorder
from splitfx.ir.ops import is_size
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.replan import Goal
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.extract import stage_graph


def install(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], schedule: Schedule, name: str = "tiled", goal: Goal | None = None
) -> fx.Node:
    """Replace the nodes of a stage by one call of a `Tiled` module."""
    stage, sources, exits, _ = stage_graph(graph, nodes)
    path = free_path(graph, name)
    tiled = Tiled(stage, schedule, goal)
    tiled.training = graph.training
    graph.add_module(path, tiled)
    with graph.graph.inserting_after(nodes[-1]):
        call = graph.graph.call_module(path, tuple(sources))
    call.meta["layer"] = path
    after = call
    for place, node in enumerate(exits):
        with graph.graph.inserting_after(after):
            after = like(graph.graph.call_function(operator.getitem, (call, place)), node)
        inside = set(nodes)
        node.replace_all_uses_with(after, delete_user_cb=lambda user, inside=inside: user not in inside)
    moved = {str(n.target) for n in nodes if n.op == "call_module"}
    for node in reversed(nodes):
        graph.graph.erase_node(node)
    for node in reversed(graph.graph.nodes):
        if is_size(node) and not node.users:
            graph.graph.erase_node(node)  # the stage has its own
    for target in moved - {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}:
        graph.delete_submodule(target)  # the stage holds it now
    reorder(graph, lambda node: ())
    return call
