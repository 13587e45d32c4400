"""Gates: the weighted layers of squeeze-and-excitation, which see no map but one number per channel."""

from __future__ import annotations

from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.ir.ops import Channel, op, op_name
from splitfx.ir.walks import ancestors


def gates(known: Facts) -> set[fx.Node]:
    """Weighted nodes on the way from a global pool to a product with a larger map."""
    found: set[fx.Node] = set()
    area = lambda n: shape(known.shapes[n])[2:]  # noqa: E731
    for node in known.graph.graph.nodes:
        operands = [n for n in node.all_input_nodes if len(shape(known.shapes[n])) == 4]
        if op_name(node) != "mul" or len(operands) != 2 or area(operands[0]) == area(operands[1]):
            continue
        pooled = [n for n in operands if set(area(n)) == {1}]
        small = lambda n: n.op != "get_attr" and set(area(n)) <= {1}  # noqa: E731
        found.update(n for n in ancestors(pooled, small) if small(n) and op(n).channel is Channel.MIXES)
    return found
