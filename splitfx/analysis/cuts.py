"""Cuts: nodes whose one tensor carries everything from the inputs to the output (dominators, networkx).

Sizes do not carry data, so arithmetic on them is left out; so are parameters. Lengauer-Tarjan style iteration in
networkx is near linear on networks.
"""

from __future__ import annotations

import networkx as nx
from torch import fx

from splitfx.ir.graph import output_node
from splitfx.ir.ops import is_size


def cuts(graph: fx.GraphModule) -> list[fx.Node]:
    """Every cut in order, the single input included; empty when nothing lies on every path."""
    flow: nx.DiGraph = nx.DiGraph()
    start, end = "start", output_node(graph)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            flow.add_edge(start, node)
        if is_size(node):
            continue
        flow.add_edges_from((n, node) for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n))
    if end not in flow or not nx.has_path(flow, start, end):
        return []
    above = nx.immediate_dominators(flow, start)
    chain: list[fx.Node] = []
    node = above[end]
    while node != start:
        chain.append(node)
        node = above[node]
    return chain[::-1]
