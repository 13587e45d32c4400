"""The verifier: a graph that a pass leaves is legal, or the pass is refused. Runs after every pass, also under -O.

Legal: nodes are read behind where they are made and name what the module holds (fx's own lint); the graph has one
output, at its end; what overwrites memory is its last reader, views of it included, as the schemas of the operators say
(`splitfx.ir.schema`).
"""

from __future__ import annotations

from torch import fx

from splitfx.ir.ops import in_place
from splitfx.ir.schema import sharing
from splitfx.text import first_line


class IllegalGraph(RuntimeError):
    """One line: which node breaks which law."""


def verify(graph: fx.GraphModule) -> None:
    """Raise `IllegalGraph` for the first law that a graph breaks."""
    try:
        graph.graph.lint()
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise IllegalGraph(first_line(error)) from error
    nodes = list(graph.graph.nodes)
    outputs = [n for n in nodes if n.op == "output"]
    if outputs != nodes[-1:]:
        raise IllegalGraph(f"it has {len(outputs)} outputs, or nodes behind the output")
    place, family = {node: i for i, node in enumerate(nodes)}, sharing(graph.graph)
    for node in nodes:
        if not in_place(node) or node.meta.get("writes_view") or not isinstance(node.args[0], fx.Node):
            continue
        earlier = [m for m in family[node.args[0]] if place[m] < place[node]]
        late = next((r for m in earlier for r in m.users if place[r] > place[node]), None)
        if late is not None:
            raise IllegalGraph(f"{node.name} overwrites {node.args[0].name}, which {late.name} reads later")
