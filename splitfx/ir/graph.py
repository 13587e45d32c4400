"""The canonical graph as data: what travels with it, how its nodes are named, copied, fed and printed.

A canonical graph is a plain ``torch.fx.GraphModule``. What the compiler knows beyond the nodes lives in one
place, ``graph.meta["splitfx"]`` (a `TraceInfo`), so that a graph can be copied, saved and handed on whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.errors import UnsupportedError
from splitfx.ir.notes import Note
from splitfx.ir.sizes import Sizes

INFO = "splitfx"


@dataclass(frozen=True)
class TensorSpec:
    """One input tensor: its sizes, type and place; ``high`` bounds random integers (exclusive)."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    high: int | None = None

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        fractions = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        integers = not fractions and tensor.dtype != torch.bool
        readable = integers and tensor.numel() > 0 and tensor.device.type != "meta"
        high = int(tensor.max()) + 1 if readable else None
        return TensorSpec(tuple(int(s) for s in tensor.shape), tensor.dtype, str(tensor.device), high)

    def random(
        self,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> torch.Tensor:
        """A tensor of this shape: normal values for floats, uniform ones below ``high`` for integers."""
        device = self.device if device is None else device
        if self.dtype == torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator).bool().to(device)
        if self.dtype.is_floating_point:
            values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            return values.to(device=device, dtype=dtype or self.dtype)
        if self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator, dtype=self.dtype).to(device)
        return torch.randint(0, self.high or 2, self.shape, generator=generator, dtype=self.dtype).to(device)


@dataclass
class TraceInfo:
    """What is known of a graph beyond its nodes.

    ``inputs`` holds one entry per placeholder, in order: a `TensorSpec` or the constant that was given;
    ``in_spec`` is the pytree structure of ``(args, kwargs)``. ``train_only`` lists submodules, ``untouched``
    state_dict keys, of the user's model that left no trace. ``steps`` is what the pipeline did, pass by pass;
    ``origin`` a sketch of the graph that it started from.
    ``aliases`` maps a second path of a shared module or tensor to the path that the graph uses.
    """

    inputs: tuple[Any, ...]
    in_spec: pytree.TreeSpec
    model_class: str
    front_end: str
    notes: tuple[Note, ...] = ()
    train_only: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
    plan: Any = None
    origin: tuple[Any, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def dynamic(self) -> str:
        """Which sizes may differ from the traced ones: "all", "batch", "sizes" (all but the batch) or "none"."""
        tensors = [(i, len(shape)) for i, shape in enumerate(self.shapes) if shape]
        batch = bool(tensors) and all(self.sizes.free(i, 0) for i, _ in tensors)
        others = any(self.sizes.free(i, d) for i, rank in tensors for d in range(1, rank))
        return "all" if batch and others else "batch" if batch else "sizes" if others else "none"

    @property
    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """The traced sizes of every input; None for one that is no tensor."""
        return tuple(s.shape if isinstance(s, TensorSpec) else None for s in self.inputs)


class Staged(nn.Module):
    """A module of a rewritten graph that runs a part of it, ``stage``, in a way of its own: the same inputs and
    outputs, a list. Tracing keeps it whole. In a state_dict its layers have the names that they have in the user's
    model; `load_by_users_names` finds their places again."""

    stage: fx.GraphModule

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        above = prefix.removesuffix(".").rpartition(".")[0]
        above = f"{above}." if above else ""
        return self.stage.state_dict(*args, destination=destination, prefix=above, keep_vars=keep_vars)


class Whole(nn.Module):
    """A module of a rewritten graph that tracing keeps whole: one tensor in, one out. ``graph_class``: what a graph
    that holds one is, in place of an ordinary canonical graph."""

    graph_class: type[fx.GraphModule] | None = None


def dress(graph: fx.GraphModule) -> fx.GraphModule:
    """Give a graph the class that one of its `Whole` modules asks for, in place."""
    asked = (m.graph_class for m in graph.children() if isinstance(m, Whole) and m.graph_class is not None)
    kind = next(asked, None)
    if kind is None or isinstance(graph, kind):
        return graph
    # As fx does it: a class of its own for every instance, since `recompile` puts forward into the class.
    graph.__class__ = type("GraphModuleImpl", (kind,), {"__qualname__": "GraphModuleImpl"})
    graph.recompile()
    return graph


def info(graph: nn.Module) -> TraceInfo:
    """The `TraceInfo` of a canonical graph; `UnsupportedError` for any other module."""
    record = getattr(graph, "meta", {}).get(INFO)
    if not isinstance(record, TraceInfo):
        raise UnsupportedError(
            f"{type(graph).__name__} is not a splitfx graph: call splitfx.trace or splitfx.transform on the model first"
        )
    return record


def is_canonical(module: nn.Module) -> TypeGuard[fx.GraphModule]:
    return isinstance(module, fx.GraphModule) and isinstance(module.meta.get(INFO), TraceInfo)


def layer(node: fx.Node) -> str:
    """The user's path of the layer that a node came from, for notes, errors and tables."""
    if node.op == "call_module":
        return str(node.target)
    return node.meta.get("layer") or node.name


def source(node: fx.Node) -> str:
    """Where in the user's code a node came from, as ``file.py:line``; empty where unknown."""
    return node.meta.get("source", "")


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls, else None."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None, "a node outside a GraphModule has no module"
    module: nn.Module | None = owner
    for part in str(node.target).split("."):  # get_submodule does the same at three times the price
        module = module._modules.get(part) if module is not None else None
    return module if module is not None else owner.get_submodule(str(node.target))


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """The value that a node takes as its positional argument ``index``. Raises `TypeError` where there is none."""
    value = node.args[index] if index < len(node.args) else None
    if not isinstance(value, fx.Node):
        raise TypeError(f"{node.name} takes no value as argument {index}: {value!r}")
    return value


def operands(node: fx.Node, index: int = 0) -> list[fx.Node]:
    """As `operand`, where a list of values is taken: what is concatenated, or put out."""
    values = node.args[index] if index < len(node.args) else None
    if not isinstance(values, list | tuple) or not all(isinstance(one, fx.Node) for one in values):
        raise TypeError(f"{node.name} takes no list of values as argument {index}: {values!r}")
    return [one for one in values if isinstance(one, fx.Node)]


class Weighted(Protocol):
    """A layer that holds its weight, as torch's do."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def weighted(module: nn.Module) -> Weighted:
    """The module as one with a weight. Raises `TypeError` where it has none."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        raise TypeError(f"{type(module).__name__} holds no weight")
    return cast(Weighted, module)


def attribute(graph: nn.Module, path: str) -> Any:
    """The parameter, buffer or constant at a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(graph.get_submodule(parent), name)


def output_node(graph: fx.GraphModule) -> fx.Node:
    return next(n for n in reversed(graph.graph.nodes) if n.op == "output")


def random_inputs(
    graph: fx.GraphModule, seed: int = 0, batch: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of random tensors in the traced shapes; dim 0 is ``batch``."""

    def resized(spec: TensorSpec) -> TensorSpec:
        return spec if batch is None or not spec.shape else replace(spec, shape=(batch, *spec.shape[1:]))

    return drawn(info(graph), seed, resized)


def drawn(
    record: TraceInfo,
    seed: int,
    form: Callable[[TensorSpec], TensorSpec] = lambda spec: spec,
    device: str | torch.device | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of random tensors, of what ``form`` makes of the recorded ones."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [form(s).random(generator, device=device) if isinstance(s, TensorSpec) else s for s in record.inputs]
    args, kwargs = pytree.tree_unflatten(leaves, record.in_spec)
    return tuple(args), dict(kwargs)


def read_alone(graph: fx.GraphModule) -> set[str]:
    """Paths of the modules that hold a tensor which the graph reads by itself, whether or not it calls them too."""
    read = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    held = {id(attribute(graph, path)) for path in read}
    tied = {path for path, m in graph.named_modules() if any(id(t) in held for _, _, t in _tensors(m))}
    return tied | {path.rpartition(".")[0] for path in read}


def tied(graph: fx.GraphModule) -> dict[int, list[str]]:
    """The parameters that several called layers hold, by id, with the paths of those layers."""
    holders: dict[int, list[str]] = {}
    for path in dict.fromkeys(str(n.target) for n in graph.graph.nodes if n.op == "call_module"):
        for parameter in graph.get_submodule(path)._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path)
    return {key: paths for key, paths in holders.items() if len(paths) > 1}


def inputs_as_now(graph: fx.GraphModule) -> fx.GraphModule:
    """Bring the record of the inputs, in place, to what the model is now: it may have been moved, or converted, since
    it was traced. Returns the graph."""
    info(graph).inputs = specs_as_now(graph)
    return graph


def specs_as_now(graph: fx.GraphModule) -> tuple[Any, ...]:
    """The inputs of a graph, in the type and place of its weights."""
    known = info(graph).inputs
    # Types of one byte hold weights only; no model computes in them, so they say nothing of the inputs.
    weight = next((p for p in graph.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1), None)
    if weight is None:
        return known
    return tuple(
        replace(s, device=str(weight.device), dtype=weight.dtype if s.dtype.is_floating_point else s.dtype)
        if isinstance(s, TensorSpec)
        else s
        for s in known
    )


def by_path(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers by the paths at which they lie."""
    tensors: dict[str, torch.Tensor] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        held = (*owner._parameters.items(), *owner._buffers.items())
        kept = ((name, t) for name, t in held if t is not None and name not in owner._non_persistent_buffers_set)
        tensors.update({f"{path}.{name}" if path else name: t for name, t in kept})
    return tensors


def dressed(graph: fx.GraphModule) -> fx.GraphModule:
    """A canonical graph that keeps what fx loses in copies, and takes a state_dict of the user's model."""
    graph._register_deepcopy_hook(restore_aliases)
    graph.register_load_state_dict_pre_hook(load_by_users_names)
    return graph


def load_by_users_names(graph: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Bring the values of layers that lie in a `Staged` to their paths. What was saved under those fits as well."""
    places = by_path(graph)
    moved: set[str] = set()
    for path, child in graph.named_children():
        for name in by_path(child.stage) if isinstance(child, Staged) else ():
            if prefix + name in state:
                state.setdefault(f"{prefix}{path}.stage.{name}", state[prefix + name])
                moved.add(name)
    for name in moved - set(places):
        del state[prefix + name]


def restore_aliases(graph: fx.GraphModule) -> None:
    """Put back what fx loses when it copies a graph.

    These are second names of shared modules and tensors, to which no node refers, and before torch 2.12 that
    a buffer is no part of the state_dict.
    """
    for alias, path in info(graph).aliases.items():
        set_path(graph, alias, resolve(graph, path))
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.meta.get("transient"):
            parent, _, name = str(node.target).rpartition(".")
            graph.get_submodule(parent)._non_persistent_buffers_set.add(name)


def resolve(graph: nn.Module, path: str) -> Any:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value


def set_path(root: nn.Module, path: str, value: Any, persistent: bool = True) -> None:
    """Install a module, parameter, buffer or constant at a dotted path, with plain modules on the way."""
    *parents, name = path.split(".")
    for part in parents:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            child.training = root.training
            root.add_module(part, child)
        root = child
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(name, value, persistent=persistent)
    else:
        setattr(root, name, value)


def copy_graph(graph: fx.GraphModule, share: bool = False, apart: Iterable[torch.Tensor] = ()) -> fx.GraphModule:
    """A private copy: nodes, modules and record; ``share`` keeps the same Parameter and buffer objects, but for
    those in ``apart``."""
    memo: dict[int, Any] = {}
    if share:
        own = {id(t) for t in apart}
        memo = {id(t): t for ts in (graph.parameters(), graph.buffers()) for t in ts if id(t) not in own}
    return copy.deepcopy(graph, memo)


def take_apart(graph: fx.GraphModule, other: fx.GraphModule) -> None:
    """Give ``graph`` memory of its own: no tensor lies in ``other``'s memory, or is a part of a larger one.

    Tensors under several names stay one.
    """
    theirs = {_memory(t) for m in other.modules() for _, _, t in _tensors(m)}
    own: dict[int, torch.Tensor] = {}
    for module in graph.modules():
        for table, name, tensor in list(_tensors(module)):
            if _memory(tensor) not in theirs and not _is_part(tensor):
                continue
            if id(tensor) not in own:
                parameter = isinstance(tensor, nn.Parameter)
                own[id(tensor)] = copy.deepcopy(tensor) if parameter else tensor.detach().clone()
            table[name] = own[id(tensor)]


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every tensor that a module holds itself, with the table and the name it has there."""
    for table in (module._parameters, module._buffers, module.__dict__):
        yield from ((table, name, t) for name, t in table.items() if isinstance(t, torch.Tensor))


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    """What two tensors have in common that lie in the same memory; one without memory is alone."""
    place = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    return tensor.device, place or id(tensor)


def _is_part(tensor: torch.Tensor) -> bool:
    held = tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 0
    return held > tensor.numel() * tensor.element_size()
