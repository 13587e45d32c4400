"""A graph from the plain data that `splitfx.storage.serialize` wrote and a dict of tensors.

Does: builds layers, nodes, signature and record; installs the tensors; runs the graph once on tensors without values
(`splitfx.storage.rehearsal`).
Refuses: everything that is not in the closed tables of `splitfx.storage.serialize` and `splitfx.storage.operators`, and
damaged data (`ExportError`).
Promises: never imports, evaluates or unpickles what a file names; every name that ends up in generated code
is checked first. `torch.export.load` does not promise that (it evaluates guards and size expressions and
falls back to full unpickling), which is why stored programs are not its archives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from splitfx.errors import ExportError
from splitfx.frontend.behaviour import quiet
from splitfx.frontend.called import CanonicalGraph
from splitfx.frontend.raising import mark_view_writes
from splitfx.ground import names
from splitfx.ir import graph as graphs
from splitfx.ir import sizes
from splitfx.ir.graph import dress
from splitfx.ir.ops import ROWS
from splitfx.ir.ops.discovery import discover
from splitfx.ir.schema import FUNCTIONS
from splitfx.storage import operators, rehearsal, stored, values
from splitfx.storage.layers import Tensors, installed, made
from splitfx.storage.stored import Node, Program

_OPERATOR = re.compile(r"aten\.(\w+)\.(\w+)")
_MODULES = 200_000  # of a graph, second names included


def deserialize(plain: Any, tensors: Tensors) -> fx.GraphModule:
    """The graph of `serialize` with `tensors`: path -> (kind, tensor), kind one of parameter, buffer, constant.

    Parameters must come as nn.Parameter, one object per tied group. Raises `ExportError` for anything not
    known here.
    """
    return _refused_in_one_line(lambda: _build(stored.decoded(plain), tensors))


def example(plain: Any, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random `(args, kwargs)` in the shapes that the stored graph was traced with. Raises `ExportError`."""
    return _refused_in_one_line(lambda: _drawn(_make_info(stored.decoded(plain)), device))


def _drawn(record: graphs.TraceInfo, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rehearsal.require_room(record.inputs)
    return graphs.drawn(record, seed=0, device=device)


def _refused_in_one_line(read: Any) -> Any:
    try:
        with quiet():  # what Python says of code that is refused a moment later
            return read()
    except ExportError:
        raise
    except Exception as error:  # whatever damage makes of torch, fx and Python; SyntaxError and MemoryError included
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ExportError(f"the stored program is damaged: {' '.join(reason.split())[:300]}.") from error


def _build(plain: Program, tensors: Tensors) -> fx.GraphModule:
    info = _make_info(plain)
    for path in tensors:
        if not names.is_path(path):
            raise ValueError(f"an unusable layer path: {path[:80]!r}")
    gm = _graph(plain, tensors, plain.info.model_class)
    gm.meta[graphs.INFO] = info
    _check_signature(plain, info)
    if plain.tree is not None:
        gm.graph.set_codegen(_codegen(plain.tree, graphs.output_node(gm).args[0]))
        gm.recompile()
    _add_aliases(gm, info.aliases)
    graphs.dressed(gm)
    gm = dress(gm.eval())
    rehearsal.rehearse(
        gm, [values.decode_tensor(form) for form in plain.outputs] if plain.outputs is not None else None
    )
    return gm


def _graph(plain: Any, tensors: Tensors, name: str) -> fx.GraphModule:
    """Layers and nodes, with the tensors at their places; a tiled stage is a graph within this one."""
    root = nn.Module()
    layers: Mapping[str, stored.Layer] = plain.layers
    within = tuple(f"{path}." for path, layer in layers.items() if layer.nodes)
    for path, layer in sorted(layers.items(), key=lambda item: item[0].count(".")):
        graphs.set_path(root, path, made(path, layer, tensors, _graph))
    for path, (kind, tensor) in tensors.items():
        if not path.startswith(within):
            installed(root, path, kind, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for plain_node in plain.nodes:
        table: Any = {"call_module": layers, "get_attr": tensors}.get(plain_node.op)
        if table is not None and plain_node.target not in table:
            raise ExportError(f"the stored program has no layer or tensor {plain_node.target[:80]!r}.")
        nodes[plain_node.name] = _make_node(graph, plain_node, nodes)
    if [n.op for n in graph.nodes].count("output") != 1 or next(iter(reversed(graph.nodes))).op != "output":
        raise ValueError("a graph ends with its one output")
    gm = CanonicalGraph(root, graph, name)
    for path, (kind, _) in tensors.items():
        if kind == "constant":  # fx registers every buffer it copies as persistent
            parent, _, last = path.rpartition(".")
            gm.get_submodule(parent)._non_persistent_buffers_set.add(last)
    gm.graph.lint()
    mark_view_writes(gm.graph)
    return gm


def _make_node(graph: fx.Graph, plain: Node, nodes: Mapping[str, fx.Node]) -> fx.Node:
    if plain.name in nodes:
        raise ExportError(f"the stored program has two nodes named {plain.name}.")
    args = tuple(values.decode(one, nodes) for one in plain.args)
    kwargs = {key: values.decode(one, nodes) for key, one in plain.kwargs.items()}
    target: Any = plain.target
    if plain.op == "call_function":
        target = _function(plain.target)
    elif plain.op == "placeholder" and not names.is_name(target):
        raise ValueError(f"an unusable name: {target[:80]!r}")
    elif plain.op in ("placeholder", "get_attr") and (args or kwargs):
        raise ValueError(f"arguments of {plain.name}, which takes none")
    elif plain.op == "output" and (target != "output" or len(args) != 1 or kwargs):
        raise ValueError("an output gives one value")
    node = graph.create_node(plain.op, target, args, kwargs, name=str(plain.name))
    node.meta = {"layer": plain.layer, "source": ""}
    return node


def _function(name: str) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name)
    function = (
        getattr(getattr(torch.ops.aten, parts[1], None), parts[2], None) if parts is not None else _registered(name)
    )
    if not isinstance(function, torch._ops.OpOverload):
        raise ExportError(
            f"the stored program runs '{name[:80]}', which is not an operator that this torch and splitfx know; load "
            "the folder with those that saved it."
        )
    refused = operators.refusal(function)
    if refused:
        raise ExportError(f"the stored program runs '{name[:80]}', which {refused}.")
    return function


def _registered(name: str) -> Any:
    """The overload of a registered operator (`splitfx.register_op`) of this name; None where none is."""
    library, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    if f"{library}::{operator}" not in ROWS:
        discover()  # an installed package may offer it
    known = f"{library}::{operator}" in ROWS and overload.isidentifier()
    return getattr(getattr(getattr(torch.ops, library), operator), overload, None) if known else None


# ---------------------------------------------------------------- inputs, outputs and the record


def _check_signature(plain: Program, info: graphs.TraceInfo) -> None:
    """What the graph takes is what the record and the containers say; their keywords are pasted into code."""
    count = sum(one.op == "placeholder" for one in plain.nodes)
    positional, keywords = _arguments(info.in_spec)
    if not count == len(info.inputs) == info.in_spec.num_leaves:
        raise ValueError(f"the graph takes {count} values, its record knows {len(info.inputs)}")
    if plain.tree is None:
        if keywords or positional != count:
            raise ValueError("inputs in containers, of which the graph knows nothing")
        return
    inside = values.decode_structure(plain.tree.inside)
    if inside != info.in_spec or len(set(plain.tree.args)) != len(plain.tree.args):
        raise ValueError("inputs in other containers than its record says")
    if sorted(plain.tree.args[positional:]) != sorted(keywords) or "self" in plain.tree.args:
        raise ValueError("names of inputs that do not fit its containers")


def _arguments(spec: pytree.TreeSpec) -> tuple[int, list[str]]:
    """How many positional arguments, and the names of the others."""
    pair = spec.children() if spec.type is tuple else []
    if len(pair) != 2 or pair[0].type is not tuple or pair[1].type is not dict:
        raise ValueError("inputs are a tuple and a dict")
    for name in pair[1].context:
        if not names.is_name(name):
            raise ValueError(f"an unusable name: {str(name)[:80]!r}")
    return pair[0].num_children, pair[1].context


def _codegen(tree: stored.Tree, outputs: Any) -> _PyTreeCodeGen:
    outside = values.decode_structure(tree.outside)
    if not isinstance(outputs, tuple | list) or outside is None or outside.num_leaves != len(outputs):
        raise ValueError("outputs that do not fit their containers")
    return _PyTreeCodeGen(_PyTreeInfo([str(one) for one in tree.args], values.decode_structure(tree.inside), outside))


def _make_info(plain: Program) -> graphs.TraceInfo:
    stored_info = plain.info
    record = graphs.TraceInfo(
        tuple(map(values.decode_input, stored_info.inputs)),
        values.decode_structure(stored_info.in_spec),
        str(stored_info.model_class),
        stored_info.front_end,
        tuple(stored_info.notes),
        tuple(stored_info.train_only),
        tuple(stored_info.untouched),
        {str(alias): str(path) for alias, path in stored_info.aliases.items()},
    )
    record.sizes = sizes.decode(stored_info.sizes, record.shapes)
    return record


def _add_aliases(gm: fx.GraphModule, aliases: Mapping[str, str]) -> None:
    """Second names, none of which lies within what it names: a module that holds itself has no end."""
    for alias, path in aliases.items():
        held = graphs.resolve(gm, path)
        if not isinstance(held, nn.Module | torch.Tensor):
            raise ExportError(f"the stored program has an alias of something that is no layer or tensor: {path}.")
        parent = _deepest(gm, alias.split(".")[:-1])
        if isinstance(held, nn.Module) and any(parent is one for one in held.modules()):
            raise ValueError(f"a layer {path} that lies within itself")
        graphs.set_path(gm, alias, held)
        if sum(1 for _ in islice(gm.named_modules(remove_duplicate=False), _MODULES)) == _MODULES:
            raise ValueError(f"more than {_MODULES} layers")


def _deepest(root: nn.Module, parts: list[str]) -> nn.Module:
    for part in parts:
        child = root._modules.get(part)
        if child is None:
            break
        root = child
    return root
