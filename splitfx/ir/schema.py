"""What an aten operator's schema says: its name and arguments, what it overwrites, what it returns a view of.

Promises: everything is read from the operator's own schema; no table of operators is kept here.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx, nn

from splitfx.ir.graph import Staged, module_of

_ON_SIZES = "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ not_"
FUNCTIONS: dict[str, Callable[..., Any]] = {  # what graphs call beside operators, to reckon with sizes
    **{f"operator.{name}": getattr(operator, name) for name in _ON_SIZES.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.sym_{name}": getattr(torch, f"sym_{name}") for name in ("int", "float", "max", "min", "not", "ite")},
}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}


def schema_of(node: fx.Node) -> torch.FunctionSchema:
    """The schema of the operator that a node calls."""
    target: Any = node.target
    return target._schema


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments under their aten schema names, defaults filled in."""
    bound = dict(node.kwargs)
    for position, spec in enumerate(schema_of(node).arguments):
        if position < len(node.args):
            bound[spec.name] = node.args[position]
        elif spec.name not in bound:
            bound[spec.name] = spec.default_value if spec.has_default_value() else None
    return bound


@functools.cache
def aten_name(target: Any) -> str:
    """``relu`` for ``aten.relu.default`` and ``aten.relu_.default``; empty for what is no aten overload."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    name = target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.startswith("_") and mutates(target) else name


def qualified_name(target: Any) -> str:
    """``lib::op`` for an operator of another library than aten; empty for anything else."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace == "aten":
        return ""
    return str(target._schema.name)


def mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def written(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """The values that a node overwrites, each with whether the node's result *is* that value afterwards."""
    if node.op != "call_function" or not mutates(node.target):
        return []
    schema, bound = schema_of(node), arguments(node)
    results = [r.alias_info.before_set for r in schema.returns if r.alias_info is not None]
    single = len(schema.returns) == 1
    values_written = []
    for spec in schema.arguments:
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        value, returned = bound[spec.name], single and spec.alias_info.before_set in results
        values = value if isinstance(value, list | tuple) else [value]
        values_written += [(v, returned and v is value) for v in values if isinstance(v, fx.Node)]
    return values_written


def may_share(node: fx.Node) -> Iterator[fx.Node]:
    """The operands whose storage a function's result may share: views, in-place results, parts of tuples."""
    if node.target is operator.getitem:
        yield from node.all_input_nodes[:1]
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    name, bound = aten_name(node.target), arguments(node)
    if "dropout" in name:
        yield from node.all_input_nodes[:1]  # returns its operand in eval mode, which no schema says
        return
    for spec in node.target._schema.arguments:
        if spec.alias_info is not None and isinstance(bound[spec.name], fx.Node):
            yield bound[spec.name]


def sharing(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node those, in order, whose results may lie in the same memory, itself among them. The nodes may stand
    in any order, as they do while a graph is rewritten."""
    joined = UnionFind(graph.nodes)
    for node in graph.nodes:
        for operand in node.all_input_nodes[:1] if may_do_nothing(node) else may_share(node):
            joined.union(node, operand)
    families: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        families.setdefault(joined[node], []).append(node)
    return {node: families[joined[node]] for node in graph.nodes}


def may_do_nothing(node: fx.Node) -> bool:
    """Dropout and train-dependent leaves return their operand itself in eval mode; layers in place always."""
    module = module_of(node)
    if module is None or isinstance(module, Staged):  # whose results lie in memory of their own
        return False
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) or getattr(module, "inplace", False)
    return dropout or not type(module).__module__.startswith("torch.nn")
