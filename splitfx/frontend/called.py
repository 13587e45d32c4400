"""The canonical graph as a module that is called: it refuses sizes for which it is not right, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.analysis.shapes import shapes
from splitfx.errors import SplitfxError, UnsupportedError
from splitfx.frontend.behaviour import quiet
from splitfx.ir.graph import INFO, TensorSpec, TraceInfo, dressed, load_by_users_names, restore_aliases
from splitfx.ir.sizes import refusal


class CanonicalGraph(fx.GraphModule):
    """A graph that knows for which sizes it is right: a call at any other raises `UnsupportedError`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record: Any = self.meta.get(INFO)
        leaves: Any = _leaves(self, record, args, kwargs) if record is not None else None
        if record is None or leaves is None:
            return super().__call__(*args, **kwargs)
        if record.sizes.bound or _ranks(leaves) != [len(s) if s is not None else None for s in record.shapes]:
            why = record.sizes.broken(record.shapes, _shapes(leaves))
            if why:
                raise refusal(record.model_class, record.shapes, _shapes(leaves), why, record.sizes)
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            sizes = _shapes(leaves)
            why = "" if isinstance(error, SplitfxError) or sizes == record.shapes else _misfit(self, record, sizes)
            if not why:
                raise
            raise refusal(record.model_class, record.shapes, sizes, why, record.sizes) from error

    def __copy__(self) -> fx.GraphModule:
        made = type(self).__mro__[1](self, self.graph)  # the first is a class of this instance alone
        made.meta, made._deepcopy_hooks = self.meta, list(self._deepcopy_hooks)
        made.register_load_state_dict_pre_hook(load_by_users_names)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (super().__reduce__(), type(self).__mro__[1], self.meta)


def _unpickled(made: tuple[Any, tuple[Any, ...]], kind: type[fx.GraphModule], meta: dict[str, Any]) -> fx.GraphModule:
    """A pickled graph, with its class and its record, which fx leaves out."""
    graph = made[0](*made[1])
    graph.__class__ = type("GraphModuleImpl", (kind,), {"__qualname__": "GraphModuleImpl"})
    graph.meta = meta
    dressed(graph)
    restore_aliases(graph)
    graph.recompile()
    return graph


def _leaves(graph: fx.GraphModule, record: TraceInfo, args: Any, kwargs: Any) -> list[Any] | None:
    """What a graph is called with, one for each of its inputs; None where that is something else."""
    if kwargs:
        names = record.in_spec.children()[1].context if record.in_spec.num_children == 2 else []
        if set(names) != set(kwargs):
            names = [n.target for n in graph.graph.nodes if n.op == "placeholder"][len(args) :]
        if set(names) != set(kwargs):
            return None
        args = (*args, *(kwargs[name] for name in names))
    leaves = list(args) if all(isinstance(a, torch.Tensor) for a in args) else pytree.tree_leaves(args)
    if len(leaves) != len(record.inputs) or any(isinstance(leaf, fx.Proxy) for leaf in leaves):
        return None
    return leaves


def _ranks(leaves: list[Any]) -> list[int | None]:
    return [leaf.dim() if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _shapes(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves)


def _misfit(graph: fx.GraphModule, record: TraceInfo, sizes: tuple[Any, ...]) -> str:
    """Which layer the sizes do not fit; empty where they fit all, and something else is wrong."""
    sized = lambda spec, shape: replace(spec, shape=shape) if isinstance(spec, TensorSpec) else spec  # noqa: E731
    try:
        with quiet():
            shapes(graph, tuple(sized(spec, shape) for spec, shape in zip(record.inputs, sizes, strict=True)))
    except UnsupportedError as error:
        return str(error).rstrip(".")
    return ""
