"""Editing a graph: the few moves that passes make, each of which leaves the graph legal.

New nodes take the layer path and source line of the node that they come from, so that notes, tables and pictures
keep speaking the user's words.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from copy import copy
from itertools import pairwise

import torch
from torch import fx, nn

from splitfx.ir.graph import resolve, set_path
from splitfx.ir.ops import in_place
from splitfx.ir.schema import sharing
from splitfx.ir.verifier import verify

aten = torch.ops.aten


def like(new: fx.Node, origin: fx.Node) -> fx.Node:
    """Mark ``new`` as coming from the user's layer of ``origin``."""
    new.meta = {key: origin.meta[key] for key in ("layer", "source") if key in origin.meta}
    return new


def free_path(graph: nn.Module, wanted: str) -> str:
    """``wanted``, or ``wanted_1`` ... when something is there already."""
    taken = {name for name, _ in graph.named_modules(remove_duplicate=False)}
    taken |= set(graph.state_dict()) | set(graph._modules)
    if wanted not in taken:
        return wanted
    return next(f"{wanted}_{i}" for i in range(1, len(taken) + 2) if f"{wanted}_{i}" not in taken)


def insert_after(graph: fx.GraphModule, node: fx.Node, path: str, module: nn.Module) -> fx.Node:
    """Put ``module`` (one tensor in, one out) between ``node`` and all its readers; returns the new node."""
    set_path(graph, path, module)
    readers = list(node.users)
    with graph.graph.inserting_after(node):
        new = like(graph.graph.call_module(path, (node,)), node)
    new.meta["layer"] = path
    for reader in readers:
        reader.replace_input_with(node, new)
    return new


def bypass(graph: fx.GraphModule, node: fx.Node) -> None:
    """Remove a node, its readers reading its first operand instead."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    node.replace_all_uses_with(operand)
    graph.graph.erase_node(node)


def tidy(graph: fx.GraphModule) -> None:
    """Drop modules, parameters and buffers that no node reads, verify the graph (`IllegalGraph`), compile it again."""
    used_modules = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    used_values = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    second, moved = _aliases(graph, used_modules | used_values)
    kept = used_modules | used_values | second
    above = {path[:end] for path in kept for end in (*(i for i, c in enumerate(path) if c == "."), len(path))}
    _prune(graph, "", kept, above)
    for alias, path in moved.items():
        set_path(graph, alias, resolve(graph, path))
    verify(graph)
    graph.recompile()


def _aliases(graph: fx.GraphModule, used: set[str]) -> tuple[set[str], dict[str, str]]:
    """(the second names that stay, those whose layer has moved into a part that a pass has made and its path there);
    names of what is in use nowhere are forgotten."""
    from splitfx.ir.graph import Staged, info

    aliases = info(graph).aliases
    staged = {path: part for path in used if isinstance(part := graph._modules.get(path), Staged)}
    moved = {f"{path}.stage.{n.target}" for path, part in staged.items() for n in part.stage.graph.nodes}
    under = lambda path: any(path == u or path.startswith(u + ".") or u.startswith(path + ".") for u in used)  # noqa: E731
    gone = {a: path for a, path in aliases.items() if not under(path)}
    new: dict[str, str] = {}
    for alias, path in gone.items():
        del aliases[alias]
        there = (f"{part}.stage.{path}" for part in staged)
        held = next((p for p in there if any(m == p or m.startswith(p + ".") for m in moved)), None)
        if held is not None:
            new[alias] = held
    second = set(aliases)
    aliases |= new
    return second, new


def _prune(module: nn.Module, path: str, kept: set[str], above: set[str]) -> None:
    """Remove what is neither ``kept`` nor ``above`` something that is, at and under ``path``."""
    full = (lambda name: f"{path}.{name}") if path else str
    for name, child in list(module._modules.items()):
        if child is None or full(name) not in above:
            del module._modules[name]
        elif full(name) not in kept:  # a part that a pass has made may hold the same module, with all its tensors
            module._modules[name] = own = _shallow(child)
            _prune(own, full(name), kept, above)
    plain = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    for name in (*module._parameters, *module._buffers, *plain):
        if full(name) not in kept:
            delattr(module, name)


def _shallow(module: nn.Module) -> nn.Module:
    """The module anew, to take things out of: it holds the same tensors and modules, in tables of its own."""
    made = object.__new__(type(module))
    tables = {name: copy(held) for name, held in vars(module).items() if isinstance(held, dict | set)}
    vars(made).update(vars(module) | tables)
    return made


def readers_of_memory(node: fx.Node) -> set[fx.Node]:
    """Who reads a value, or another one that may lie in its memory."""
    return {reader for member in sharing(node.graph)[node] for reader in member.users}


def reorder(graph: fx.GraphModule, key: Callable[[fx.Node], tuple[int, ...]]) -> None:
    """Sort the nodes by ``key`` as far as their dependencies, and the order of overwriting, allow."""
    reorder_nodes(graph.graph, key)


def reorder_nodes(graph: fx.Graph, key: Callable[[fx.Node], tuple[int, ...]]) -> None:
    """`reorder` for a graph that is not compiled yet; its ``owning_module`` holds the modules that it calls."""
    nodes = list(graph.nodes)
    if any(n.meta.get("writes_view") for n in nodes):
        return  # a write through a view is ordered by position alone
    place, family = {n: i for i, n in enumerate(nodes)}, sharing(graph)
    needs: dict[fx.Node, set[fx.Node]] = {n: set(n.all_input_nodes) for n in nodes}
    for node in nodes:
        if in_place(node) and isinstance(node.args[0], fx.Node):
            held = (r for member in family[node.args[0]] for r in member.users)
            needs[node] |= {r for r in held if place[r] < place[node]}
    first = [n for n in nodes if n.op == "placeholder"]
    for a, b in pairwise(first):
        needs[b].add(a)  # the signature keeps its order
    output = nodes[-1]
    needs[output] |= set(nodes[:-1])
    readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in nodes}
    for node, before in needs.items():
        for b in before:
            readers[b].append(node)
    left = {n: len(needs[n]) for n in nodes}
    ready = [(n.op != "placeholder", *key(n), place[n]) for n in nodes if not left[n]]
    heapq.heapify(ready)
    cursor = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)[-1]]
        if cursor.next is not node:
            cursor.append(node)
        cursor = node
        for reader in readers[node]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, (reader.op != "placeholder", *key(reader), place[reader]))
