"""When is how much memory alive: a liveness timeline of the graph, with the node where it peaks.

Predicts the eval-mode execution of the *graph*, whose generated code drops every value right after its last
reader. The user's own model often holds a little more, because Python locals (``x`` in a caller's forward,
while a whole stage runs) live until they are overwritten.

Counted: the graph's inputs, all the time, because the caller holds them; every value from its node to its
last reader; outputs to the end; what composite operators allocate inside. Views and in-place results share
their operand's storage, which fake tensors show exactly. Not counted: parameters and buffers (they are
apart, see `cost`) and buffers inside kernels (convolution workspaces). The analysis is linear in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from splitfx.analysis.live import LiveStorage, has_storage, key
from splitfx.analysis.shapes import like
from splitfx.ground.exclusive import Autocast, casting, exclusive, twin
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import Result, op, op_name


@dataclass(frozen=True)
class Memory:
    """``live_bytes``: bytes alive while a node runs, its operands, results and temporaries included.

    ``temporary_bytes``: the part of it that exists only inside the node. ``new_bytes``: storage that the
    node adds (0 for views and in-place operations). ``peak_node`` is the first node where ``peak_bytes`` is
    reached.
    """

    live_bytes: dict[fx.Node, int]
    temporary_bytes: dict[fx.Node, int]
    new_bytes: dict[fx.Node, int]
    input_bytes: int
    peak_bytes: int
    peak_node: fx.Node | None

    @property
    def peak_layer(self) -> str:
        """The user's path of the layer where memory peaks; empty for a graph without nodes."""
        return layer(self.peak_node) if self.peak_node is not None else ""


def memory(graph: fx.GraphModule, shapes: dict[fx.Node, Any]) -> Memory:
    """The liveness timeline of ``graph`` for the sizes in ``shapes`` (`splitfx.analysis.shapes`)."""
    nodes = list(graph.graph.nodes)
    held, size = _storages(nodes, shapes)
    born, dies = _lifetimes(nodes, held)
    new = {node: sum(size[s] for s in held[node] if born[s] is node) for node in nodes}
    leaving: dict[fx.Node, int] = dict.fromkeys(nodes, 0)
    for storage, last in dies.items():
        leaving[last] += size[storage]
    inputs = sum(new[node] for node in nodes if node.op == "placeholder")
    temporary = Temporaries(shapes)
    alive, live, inside = inputs, {}, {}
    for node in nodes:
        alive += 0 if node.op == "placeholder" else new[node]
        inside[node] = temporary(node)
        live[node] = alive + inside[node]
        alive -= leaving[node]
    peak = max(live, key=live.__getitem__, default=None)
    return Memory(live, inside, new, inputs, live[peak] if peak is not None else 0, peak)


def _storages(nodes: list[fx.Node], shapes: dict[fx.Node, Any]) -> tuple[dict[fx.Node, set[int]], dict[int, int]]:
    """The storages that each node's value lies in, parameters and buffers left out, and their bytes."""
    held: dict[fx.Node, set[int]] = {}
    size: dict[int, int] = {}
    state: set[int] = set()
    for node in nodes:
        tensors = [t for t in pytree.tree_leaves(shapes[node]) if has_storage(t)]
        if node.op == "get_attr":
            state |= {key(t) for t in tensors}
        if node.op == "call_module" and op(node).result is Result.OPERAND:
            held[node] = held[node.args[0]]  # type: ignore[index]
            continue
        held[node] = {key(t) for t in tensors} - state
        size |= {key(t): t.untyped_storage().nbytes() for t in tensors}
    return held, size


def _lifetimes(
    nodes: list[fx.Node],
    held: dict[fx.Node, set[int]],
) -> tuple[dict[int, fx.Node], dict[int, fx.Node]]:
    """The node that makes each storage, and the last one that reads it; inputs and outputs never die."""
    born: dict[int, fx.Node] = {}
    dies: dict[int, fx.Node] = {}
    for node in nodes:
        for storage in held[node]:
            born.setdefault(storage, node)
            dies[storage] = node
        for operand in node.all_input_nodes:
            dies.update(dict.fromkeys(held[operand], node))
    kept = {s for s, maker in born.items() if maker.op == "placeholder"}
    kept |= {s for node in nodes if node.op == "output" for s in held[node]}
    return born, {storage: last for storage, last in dies.items() if storage not in kept}


class Temporaries:
    """Bytes that an operator allocates and frees before it returns, found by running it on fake tensors.

    Only operators that are made of others can allocate such tensors; equal calls are run once, under the ``autocast``
    that the values are of.
    """

    def __init__(self, shapes: dict[fx.Node, Any], autocast: Autocast = ()) -> None:
        self.shapes, self.autocast = shapes, autocast
        self.known: dict[Any, int] = {}

    def __call__(self, node: fx.Node, dense: bool = False) -> int:
        """``dense``: its operands lie in memory without gaps, whatever they are in the graph."""
        if op_name(node) == "tiled":
            return self._tiled(node)
        if node.op not in ("call_function", "call_module") or not is_composite(node):
            return 0
        args, kwargs = self._values(node, dense)
        signature = self._signature(node, (args, kwargs))
        if signature not in self.known:
            self.known[signature] = self._run(node, args, kwargs)
        return self.known[signature]

    def _tiled(self, node: fx.Node) -> int:
        """What a tiled stage holds beyond its inputs and results, counted from its instructions."""
        module: Any = module_of(node)
        given = tuple(self.shapes[n] for n in node.all_input_nodes)
        apart = [*given, *pytree.tree_leaves(self.shapes[node])]
        return max(0, module.program(given).peak - sum(t.numel() * t.element_size() for t in apart))

    def _values(self, node: fx.Node, dense: bool) -> Any:
        def value(n: fx.Node) -> Any:
            held = self.shapes[n]
            return held.contiguous() if dense and has_storage(held) else held

        return map_arg((node.args, node.kwargs), value)

    def _signature(self, node: fx.Node, values: Any) -> Any:
        module = module_of(node)
        leaves = pytree.tree_leaves(values)
        what = [str(node.target)] if module is None else [repr(module), *map(_form, module.parameters())]
        return tuple(what), tuple(_form(v) if has_storage(v) else str(v) for v in leaves)

    def _run(self, node: fx.Node, args: Any, kwargs: Any) -> int:
        given = [t for t in pytree.tree_leaves((args, kwargs)) if has_storage(t)]
        if not given:
            return 0
        module, mode = module_of(node), getattr(given[0], "fake_mode", None)
        assert mode is not None, f"{node.name} has no fake operands"
        with exclusive(), casting(self.autocast), torch.no_grad(), mode:
            call: Any = node.target if module is None else twin(module, like)
            state = () if module is None else (*call.parameters(), *call.buffers())
            with LiveStorage(state=[*given, *state]) as watch:
                result = call(*args, **kwargs)
                remaining, peak = watch.now, watch.peak
            del result
        return max(0, peak - remaining)


def is_composite(node: fx.Node) -> bool:
    """The node's operator is made of others, so it may hold temporaries."""
    if node.op == "call_module":
        if op(node).like_operand and getattr(module_of(node), "running_mean", None) is not None:
            return False  # one kernel in eval mode, of which fake tensors would run every step
        return op(node).result is not Result.OPERAND
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name + ("." + target._overloadname if target._overloadname != "default" else "")
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, str(tensor.device)
