"""From an exported program to the canonical graph: signature, names, modes and what left no trace.

The walk over the operators is `splitfx.frontend.raising`. Parameterless leaves that act on ``self.training``
(DropPath, StochasticDepth), and stages of a graph that splitfx has rewritten (`splitfx.ir.graph.Staged`), pass
through torch.export as one opaque operator each and come back as calls of the module. The private pieces of
torch that this project leans on (``ExportedProgram.module(check_guards=...)``, ``nn_module_stack``,
``fx.Graph._codegen``, ``wrap_with_set_grad_enabled``) are all in these two files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from splitfx.frontend.behaviour import Behaviour
from splitfx.frontend.called import CanonicalGraph
from splitfx.frontend.raising import Raiser, mark_view_writes
from splitfx.ir.graph import (
    INFO,
    Staged,
    TensorSpec,
    TraceInfo,
    by_path,
    dress,
    dressed,
    info,
    is_canonical,
    restore_aliases,
    set_path,
)
from splitfx.ir.notes import Note
from splitfx.ir.schema import mutates, sharing


@torch.library.custom_op("splitfx::leaf", mutates_args=())
def _leaf(x: torch.Tensor, path: str) -> torch.Tensor:
    return x.clone()


@_leaf.register_fake
def _leaf_shape(x: torch.Tensor, path: str) -> torch.Tensor:
    return torch.empty_like(x)


_STAGES: dict[str, nn.Module] = {}  # by path: what the stages compute that are being traced


@torch.library.custom_op("splitfx::stage", mutates_args=())
def _stage(inputs: list[torch.Tensor], path: str) -> list[torch.Tensor]:
    return [t.clone() for t in _STAGES[path](*inputs)]


@_stage.register_fake
def _stage_shapes(inputs: list[torch.Tensor], path: str) -> list[torch.Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in _STAGES[path](*inputs)]


@contextmanager
def opaque_leaves(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Within, these leaves of the private copy call one opaque operator that carries their path."""
    leaves = [(path, model.get_submodule(path)) for path in paths if path]
    for path, module in leaves:
        module.forward = MethodType(lambda self, x, _path=path: torch.ops.splitfx.leaf(x, _path), module)
    try:
        yield
    finally:
        for _, module in leaves:
            del module.forward


@contextmanager
def whole_stages(model: nn.Module) -> Iterator[None]:
    """Within, every `Staged` module of the private copy calls one opaque operator that carries its path."""
    stages = [(path, module) for path, module in model.named_modules() if isinstance(module, Staged)]
    for path, module in stages:
        tensors = {id(t): t for ts in (module.parameters(), module.buffers()) for t in ts}
        _STAGES[path] = copy.deepcopy(
            module.stage, tensors
        ).eval()  # apart: torch.export swaps the tensors of ``model``
        call = lambda self, *inputs, _path=path: torch.ops.splitfx.stage(list(inputs), _path)  # noqa: E731
        module.forward = MethodType(call, module)
    try:
        yield
    finally:
        for path, module in stages:
            del module.forward
            del _STAGES[path]


# Tensors that take their type from another one, and views through which such a tensor may be filled.
_LIKE_TYPE = tuple(getattr(torch.ops.aten, name).default for name in ("new_zeros", "new_ones", "new_full", "new_empty"))
_VIEWS = (torch.ops.aten.slice.Tensor, torch.ops.aten.select.int, torch.ops.aten.view.default)


def canonicalise(
    program: torch.export.ExportedProgram,
    private: nn.Module,
    model: nn.Module,
    record: TraceInfo,
    seen: Behaviour | None = None,
) -> fx.GraphModule:
    """The canonical graph of an exported program of ``private``, a copy of the user's ``model``.

    ``seen`` is how the model behaves in train mode. ``found`` is completed with aliases and notes.
    """
    exported = _unlifted(program, private)
    _made_at_the_start(exported)
    raiser = Raiser(exported, private, model, seen)
    graph = raiser.run()
    root = nn.Module()
    for path in sorted(raiser.modules, key=lambda p: p.count(".")):
        set_path(root, path, raiser.modules[path])
    persistent = set(by_path(private))
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        path, value = str(node.target), raiser.values[str(node.target)]
        buffer = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        node.meta["transient"] = buffer and path not in persistent
        set_path(root, path, value, path in persistent)
    _signature(graph, exported, program)
    result = CanonicalGraph(root, graph, type(model).__name__)
    _drop_dead(result)
    _copy_modes(result, model)
    result.meta[INFO] = record
    record.aliases = _aliases(private, result)
    restore_aliases(result)
    dressed(result)
    _report(record, model, result)
    if is_canonical(model):
        _carry_over(record, model, result)
    result.graph.lint()
    mark_view_writes(result.graph)
    return dress(result)


def input_specs(inputs: Any) -> tuple[tuple[Any, ...], pytree.TreeSpec]:
    """One `TensorSpec` or constant per leaf of ``(args, kwargs)``, and their structure."""
    leaves, spec = pytree.tree_flatten(inputs)
    return tuple(TensorSpec.of(v) if isinstance(v, torch.Tensor) else v for v in leaves), spec


def _unlifted(program: torch.export.ExportedProgram, private: nn.Module) -> fx.GraphModule:
    """The exported graph, reading weights as attributes instead of taking them as inputs.

    As ``ExportedProgram.module()``, without its search among a module's siblings, which is quadratic in a long chain,
    and without compiling what is never run; where there is more to do than that, it is left to torch.
    """
    signature = program.graph_signature
    kinds = {s.kind.name for s in (*signature.input_specs, *signature.output_specs)}
    if not _is_plain(program) or not kinds <= {"USER_INPUT", "PARAMETER", "BUFFER", "CONSTANT_TENSOR", "USER_OUTPUT"}:
        return program.module(check_guards=False)
    exported = program.graph_module
    holes = exported.graph.find_nodes(op="placeholder")
    for hole, spec in zip(holes, signature.input_specs, strict=True):
        if spec.kind.name == "USER_INPUT":
            continue
        path = str(spec.target)
        with exported.graph.inserting_after(hole):
            read = exported.graph.create_node("get_attr", path)
        read.meta = hole.meta
        hole.replace_all_uses_with(read)
        exported.graph.erase_node(hole)
        if not _holds(private, path):  # a constant of the model's code
            set_path(exported, path, program.constants[path])
    return exported


def _made_at_the_start(exported: fx.GraphModule) -> None:
    """A tensor that is filled through views, such as the mask of a shifted window, is often made like a map in the
    middle of the network only for its type. It is made like an input of the same type, so that it depends on no map."""
    types = lambda node: (getattr(node.meta.get("val"), "dtype", None), getattr(node.meta.get("val"), "device", None))  # noqa: E731
    inputs = {types(node): node for node in reversed(exported.graph.find_nodes(op="placeholder"))}
    for target in _LIKE_TYPE:
        for node in exported.graph.find_nodes(op="call_function", target=target):
            origin, place = node.args[0], inputs.get(types(node.args[0]))
            filled = any(_writes(user) for view in _within_views(node) for user in view.users)
            if place is not None and origin is not place and filled:
                node.replace_input_with(origin, place)


def _within_views(node: fx.Node) -> list[fx.Node]:
    """The views of a value, and the views of those."""
    direct = [user for user in node.users if user.target in _VIEWS]
    return direct + [below for view in direct for below in _within_views(view)]


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _holds(root: Any, path: str) -> bool:
    for part in path.split("."):
        root = getattr(root, part, None)
    return root is not None


def _is_plain(program: torch.export.ExportedProgram) -> bool:
    """Positional tensors in and a tensor or a tuple of tensors out."""
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    args_spec, kwargs_spec = in_spec.children()
    if kwargs_spec.children() or not all(c.is_leaf() for c in args_spec.children()) or out_spec is None:
        return False
    return out_spec.is_leaf() or (out_spec.type is tuple and all(c.is_leaf() for c in out_spec.children()))


def _signature(graph: fx.Graph, exported: fx.GraphModule, program: torch.export.ExportedProgram) -> None:
    """Plain positional tensors in and a tensor or tuple out need no pytree code around the graph."""
    if not _is_plain(program):
        graph.set_codegen(exported.graph._codegen)
        return
    graph.set_codegen(CodeGen())
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    values = output.args[0]
    out_spec = program.call_spec.out_spec
    assert isinstance(values, tuple | list)
    assert out_spec is not None
    output.args = (values[0],) if out_spec.is_leaf() else (tuple(values),)


def _drop_dead(graph: fx.GraphModule) -> None:
    """Drop what no output depends on; a write into memory that nothing reads later goes too, and what led to it."""
    family = sharing(graph.graph)
    place = {node: i for i, node in enumerate(graph.graph.nodes)}

    def seen(written: fx.Node) -> bool:
        members = family[written]
        outside = any(m.op in ("placeholder", "get_attr") for m in members)
        return outside or any(place[reader] > place[written] for m in members for reader in m.users)

    def kept(node: fx.Node) -> bool:
        switch = node.target is torch._C._set_grad_enabled
        return node.op in ("placeholder", "output") or switch or (mutates(node.target) and seen(node))

    graph.graph.eliminate_dead_code(kept)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _copy_modes(graph: fx.GraphModule, model: nn.Module) -> None:
    """train() or eval(), module by module, as the user has set it."""
    flags = {path: m.training for path, m in model.named_modules(remove_duplicate=False)}
    for path, module in graph.named_modules():
        module.training = flags.get(path, module.training)


def _prefixes(keys: Iterable[str]) -> set[str]:
    """Every path that one of these dotted keys lies under."""
    prefixes: set[str] = set()
    for key in keys:
        parent = key.rpartition(".")[0]
        while parent and parent not in prefixes:
            prefixes.add(parent)
            parent = parent.rpartition(".")[0]
    return prefixes


def _aliases(private: nn.Module, graph: fx.GraphModule) -> dict[str, str]:
    """Second names of shared modules and tied tensors whose first name the graph holds, outermost first."""
    have = set(by_path(graph))
    touched = _prefixes(have)
    everything = list(private.named_modules(remove_duplicate=False))
    by_module: dict[int, str] = {}
    for path, module in everything:
        if path in touched:
            by_module.setdefault(id(module), path)
    aliases: dict[str, str] = {}

    def covered(path: str) -> bool:
        while path and path not in aliases:
            path = path.rpartition(".")[0]
        return bool(path)

    for path, module in everything:
        first = by_module.get(id(module), path)
        if path and path != first and path not in touched and not covered(path):
            aliases[path] = first
    tensors = by_path(private)
    by_tensor = {id(tensors[k]): k for k in tensors if k in have}
    for key, tensor in tensors.items():
        if key not in have and not covered(key) and id(tensor) in by_tensor:
            aliases[key] = by_tensor[id(tensor)]
    return aliases


def _report(record: TraceInfo, model: nn.Module, graph: fx.GraphModule) -> None:
    """What of the model left no trace: state_dict keys, and the submodules that hold nothing else."""
    keys, have = list(model.state_dict()), set(graph.state_dict())
    record.untouched = tuple(k for k in keys if k not in have)
    with_state, touched = _prefixes(keys), _prefixes(have)
    lost = [p for p, _ in model.named_modules() if p in with_state and p not in touched]
    inner = {p for p in lost if p.rpartition(".")[0] in lost}
    record.train_only = tuple(p for p in lost if p not in inner)
    notes = [
        Note(
            path,
            f"{type(model.get_submodule(path)).__name__} left no trace in the eval-mode forward "
            "(an auxiliary head, or unused): it is not part of the graph",
            "info",
        )
        for path in record.train_only
    ]
    rest = [k for k in record.untouched if not any(k.startswith(p + ".") for p in record.train_only)]
    if rest:
        listed = ", ".join(rest[:5]) + (" ..." if len(rest) > 5 else "")
        notes.append(Note("state_dict", f"{len(rest)} keys are read by nothing in the graph: {listed}", "info"))
    record.notes = (*record.notes, *notes)


def _carry_over(record: TraceInfo, model: fx.GraphModule, graph: fx.GraphModule) -> None:
    """Tracing a canonical graph again keeps its record, and the layer and source of nodes that are still
    there.
    """
    before = info(model)
    for name in ("model_class", "front_end", "notes", "train_only", "untouched", "plan"):
        setattr(record, name, getattr(before, name))
    record.steps = list(before.steps)
    metas = {(n.name, str(n.target)): n.meta for n in model.graph.nodes}
    for node in graph.graph.nodes:
        meta = metas.get((node.name, str(node.target)), {})
        node.meta.update({k: meta[k] for k in ("layer", "source") if k in meta})
