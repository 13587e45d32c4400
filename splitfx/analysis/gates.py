"""Gates: the weighted layers of squeeze-and-excitation, which see no map but one number per channel."""

from __future__ import annotations

from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.ir.ops import Channel, op, op_name


def gates(known: Facts) -> set[fx.Node]:
    """Weighted nodes on the way from a global pool to a product with a larger map."""
    found: set[fx.Node] = set()
    area = lambda n: shape(known.shapes[n])[2:]  # noqa: E731
    for node in known.graph.graph.nodes:
        operands = [n for n in node.all_input_nodes if len(shape(known.shapes[n])) == 4]
        if op_name(node) != "mul" or len(operands) != 2 or area(operands[0]) == area(operands[1]):
            continue
        waiting = [n for n in operands if set(area(n)) == {1}]
        while waiting:
            n = waiting.pop()
            found |= {n} if op(n).channel is Channel.MIXES else set()
            waiting += [m for m in n.all_input_nodes if m.op != "get_attr" and set(area(m)) <= {1}]
    return found
