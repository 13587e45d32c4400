"""The oracle of `trace`: the graph computes what the model computes, on the example inputs, in eval mode.

The model has run once, on a private copy (`splitfx.frontend.first_call`); the graph runs once beside it, on the same
inputs, with copies of its buffers and the same random numbers. Structure, sizes, types and values of the outputs must
agree, and what both write into inputs and buffers. Only when they do not, both run again to find the first layer whose
output the graph does not compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis.oracle import ROUNDING, TOLERANCE
from splitfx.errors import TraceError
from splitfx.frontend.failures import reason
from splitfx.frontend.first_call import FirstCall, own_copy, run
from splitfx.ground.difference import relative_error
from splitfx.ir.graph import Staged, layer
from splitfx.ir.modes import in_eval
from splitfx.ir.notes import Note

_ODD = 1e-3  # of the integers of an output: where two values are near, their order is a matter of rounding

_LARGE = 2**20  # numbers of all inputs, beyond which a part of them is run


def require_same(graph: fx.GraphModule, model: nn.Module, inputs: Any, seen: FirstCall) -> list[Note]:
    """`TraceError` unless ``graph`` does what the first call of ``model`` on ``inputs`` did; else notes on it."""
    limit = _limit(model, inputs)
    outputs: Any = None
    try:
        with in_eval(graph), _own_buffers(graph) as buffers:
            outputs, after = run(graph, inputs)
            what = _unlike(outputs, seen.outputs, limit, "output") or _unlike(after, seen.inputs, limit, "input")
            what = what or _unlike_buffers(buffers, seen.buffers, limit)
    except Exception as error:
        what = f"the graph does not run on the example inputs ({reason(error)})"
    if not what:
        return []
    if outputs is not None and _draws(graph) and _same_form(outputs, seen.outputs):
        return [Note("model", "draws random numbers in eval mode, in another order than the graph does", "info")]
    where = first_difference(graph, model, inputs, limit)
    raise TraceError(
        f"the graph of {type(model).__name__} is not what the model computes: {what}. {where}. What to do: see whether "
        "the model acts otherwise when it is traced (torch.compiler.is_compiling, state that it keeps between calls); "
        "if it does not, this is a fault of splitfx"
    )


def cut_down(inputs: Any) -> Any:
    """Large inputs cut to their first rows and columns, and at most two images; None for inputs of ordinary size.

    A size that is odd stays odd: strides and pads treat it otherwise.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    if sum(t.numel() for t in tensors) <= _LARGE:
        return None

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 4:
            return value
        kept = [slice(2), slice(None), *(slice(64 + size % 2) for size in value.shape[2:])]
        return value[tuple(kept)]

    small = pytree.tree_map(cut, inputs)
    return None if shapes_of(small) == shapes_of(inputs) else small


def shapes_of(inputs: Any) -> tuple[Any, ...]:
    leaves = pytree.tree_leaves(inputs)
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves)


def _limit(model: nn.Module, inputs: Any) -> float:
    """How far results may be apart for rounding alone, of the largest value: that of the coarsest type there is."""
    given = (t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))
    types = {t.dtype for ts in (model.parameters(), model.buffers(), given) for t in ts}
    return max((ROUNDING.get(dtype, TOLERANCE) for dtype in types), default=TOLERANCE)


@contextmanager
def _own_buffers(graph: fx.GraphModule) -> Iterator[dict[str, torch.Tensor]]:
    """Within, the graph holds copies of its buffers; yields those that it comes to write, in the end, by path."""
    own: dict[int, torch.Tensor] = {}
    kept = [(module._buffers, dict(module._buffers)) for module in graph.modules()]
    for table, before in kept:
        for name, t in before.items():
            if t is not None:
                table[name] = own.setdefault(id(t), t.detach().clone())
    try:
        yield dict(graph.named_buffers(remove_duplicate=False))
    finally:
        for table, before in kept:
            table.update(before)


def _unlike_buffers(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float) -> str:
    for path, value in ours.items():
        if path in theirs:
            what = _unlike(value, theirs[path], limit, f"buffer {path}")
        else:
            what = f"the graph writes buffer {path}, and the model does not" if value._version else ""
        if what:
            return what
    return ""


def _unlike(ours: Any, theirs: Any, limit: float, word: str) -> str:
    """What differs, in a few words; empty where nothing does."""
    (got, our_form), (wanted, their_form) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    if our_form != their_form:
        return f"its {word}s are {_form(ours)} instead of {_form(theirs)}"
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        name = word if word.startswith("buffer") else f"{word} {number}"
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            if a is not b and a != b:
                return f"{name} is {str(a)[:60]!r} instead of {str(b)[:60]!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} is {a.dtype} of {tuple(a.shape)} instead of {b.dtype} of {tuple(b.shape)}"
        elif not (far := apart(a, b)) <= max(limit, ROUNDING.get(b.dtype, TOLERANCE)):
            return f"{name} is off by {far:.1e} of its largest value"
    return ""


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference relative to the largest value; of integers, 0 where nearly all are the same."""
    if ours.device.type == "meta" or theirs.device.type == "meta" or not theirs.numel() or torch.equal(ours, theirs):
        return 0.0
    if not (theirs.dtype.is_floating_point or theirs.dtype.is_complex):
        return 0.0 if float((ours != theirs).double().mean()) <= _ODD else float("inf")
    return relative_error(ours, theirs)


def _form(value: Any) -> str:
    return f"a {type(value).__name__} of {len(pytree.tree_leaves(value))}"


def _same_form(ours: Any, theirs: Any) -> bool:
    bare = lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v  # noqa: E731
    return not _unlike(pytree.tree_map(bare, ours), pytree.tree_map(bare, theirs), 0.0, "output")


def _draws(graph: fx.GraphModule) -> bool:
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in graph.graph.nodes)


# ---------------------------------------------------------------- the first layer that differs


def first_difference(graph: fx.GraphModule, model: nn.Module, inputs: Any, limit: float) -> str:
    """The first layer of the model, in the order in which they end, whose output the graph does not hand on."""
    listening, problem = _listened(graph, inputs)
    if problem:
        return problem
    for path, name, outputs in _layers(model, inputs):
        ours = listening.handed_on(path)
        for wanted in outputs:
            alike = (v for v in ours if v.shape == wanted.shape and v.dtype == wanted.dtype)
            if not any(apart(v, wanted) <= limit for v in alike):
                place = f"{path} ({name})" if path else f"the model's own forward ({name})"
                return f"The first layer that differs is {place}"
    return "Every layer's output agrees, so what differs is what the model writes or how it puts outputs together"


def _inside(node: fx.Node, path: str) -> bool:
    own = str(node.target) if node.op == "call_module" else node.meta.get("layer", "")
    return node.op != "output" and (not path or f"{own}.".startswith(f"{path}."))


class _Listening(fx.Interpreter):
    """Keeps every value as it was when it was computed: a later node may overwrite it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, list[torch.Tensor]] = {}
        self.last: fx.Node | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wanted = len(self.graph.find_nodes(op="placeholder"))  # type: ignore[operator, union-attr]
        return self.run(*pytree.tree_leaves((args, kwargs))[:wanted], enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        value = super().run_node(n)
        self.seen[n] = [t.clone() for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        return value

    def handed_on(self, path: str) -> list[torch.Tensor]:
        """The values that are read outside of the layer ``path``, with those of all other layers."""
        return [t for n, ts in self.seen.items() if any(not _inside(user, path) for user in n.users) for t in ts]


def _listened(graph: fx.GraphModule, inputs: Any) -> tuple[_Listening, str]:
    """The graph, run; and the layer in which it fails."""
    listening = _Listening(graph)
    try:
        with in_eval(graph), _own_buffers(graph):
            run(listening, inputs)
    except Exception as error:
        return listening, f"It fails in {layer(listening.last) if listening.last else 'its inputs'} ({reason(error)})"
    return listening, ""


def _layers(model: nn.Module, inputs: Any) -> list[tuple[str, str, list[torch.Tensor]]]:
    own = own_copy(model)
    seen: list[tuple[str, str, list[torch.Tensor]]] = []
    stages = [path for path, m in own.named_modules() if isinstance(m, Staged)]

    def keep(path: str, module: nn.Module, result: Any) -> None:
        tensors = [t.clone() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        seen.append((path, type(module).__name__, tensors))

    for path, module in own.named_modules():
        if not any(path.startswith(f"{stage}.") for stage in stages):
            module.register_forward_hook(lambda m, _args, result, path=path: keep(path, m, result))
    run(own, inputs)
    return seen
