"""`trace`: any model and example inputs in, the canonical graph out.

Front ends are tried in order: ``torch.export`` on the model, then ``torch.fx.symbolic_trace`` followed by
``torch.export`` of what it found. Both end in one canonical graph (`splitfx.canonical`), so no later code
knows which one worked. The model is never changed: a private copy of its module tree, which shares the
parameters, is put in eval mode and traced. What it makes in its first call is made before (`splitfx.first_call`),
and the graph is held to what that call returned (`splitfx.trace_oracle`). What cannot be traced is a `TraceError`
(`splitfx.trace_errors`).

Promises: where the trace is not the whole truth (a part of the model that acts differently in train mode, a
size that is fixed, a Python value that is baked in), `TraceInfo.notes` says so.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from splitfx.behaviour import Behaviour, differences, observe, quiet
from splitfx.canonical import canonicalise, input_specs, is_opaque, leaf_paths, opaque_leaves, whole_stages
from splitfx.errors import TraceError
from splitfx.exclusive import exclusive
from splitfx.first_call import FirstCall, first_call, own_copy, undisturbed, unfused
from splitfx.graph import Staged, TraceInfo, anew, info
from splitfx.notes import Note
from splitfx.trace_errors import check_inputs, check_model, failure, reason
from splitfx.trace_oracle import require_same

DYNAMIC = ("batch", "all", "none")
_FEWER = {"all": ("all", "batch", "none"), "batch": ("batch", "none"), "none": ("none",)}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@exclusive()
def trace(model: nn.Module, example_inputs: Any, *, dynamic: str = "batch", verify: bool = True) -> fx.GraphModule:
    """Trace ``model`` to its canonical graph.

    ``example_inputs`` is a tensor, a tuple of positional inputs, a dict of keyword inputs, or
    ``((positional, ...), {keyword: ...})``; the graph is traced for their shapes. ``dynamic`` says which
    sizes may differ later: ``"batch"`` (dim 0 of every tensor, where the model allows it), ``"all"`` or
    ``"none"``; what the model allowed is in ``TraceInfo.dynamic``.

    The result is a ``torch.fx.GraphModule`` that holds the model's own parameters and buffers under their own
    names, so that to train the one is to train the other, and follows ``train()`` and ``eval()`` as the model does.
    Tracing itself changes nothing of the model's. Model and graph run once on the example inputs, in eval mode, and
    must agree, unless ``verify`` is off. Raises `TraceError`.
    """
    check_model(model)
    if dynamic not in DYNAMIC:
        raise TraceError(f"dynamic is one of {', '.join(DYNAMIC)}, not {dynamic!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the user's module there
    inputs = pytree.tree_map(_detached, split_inputs(example_inputs))
    check_inputs(model, *inputs)
    register_dataclasses(inputs)
    with _no_collection(), undisturbed(model), quiet():
        if verify:
            return _verified(model, inputs, dynamic)
        return _traced(model, inputs, dynamic, None)


def _verified(model: nn.Module, inputs: Inputs, dynamic: str) -> fx.GraphModule:
    own = own_copy(model)
    try:
        seen = first_call(own, inputs)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(failure(model, inputs, [("the first call", own, error)])) from error
    graph = _traced(model, inputs, dynamic, seen)
    notes = (*seen.notes(), *require_same(graph, model, inputs, seen))
    info(graph).notes = (*info(graph).notes, *notes)
    return graph


def _traced(model: nn.Module, inputs: Inputs, dynamic: str, seen: FirstCall | None) -> fx.GraphModule:
    """By the first front end that can."""
    ready = seen.install(private_copy(model)) if seen is not None and seen.made else model
    problems: list[tuple[str, nn.Module | None, Exception]] = []
    for front_end, prepare in (("torch.export", private_copy), ("torch.fx.symbolic_trace", symbolic_copy)):
        private = None
        try:
            private = prepare(ready)
            with whole_stages(private):
                return _Attempt(model, private, inputs, front_end).graph(dynamic)
        except Exception as error:
            problems.append((front_end, private, error))
    raise TraceError(failure(model, inputs, problems)) from problems[0][2]


def _detached(value: Any) -> Any:
    """A tensor without the caller's history, and outside the caller's inference mode."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode(False):
        return value.clone() if value.is_inference() else value.detach()


@contextmanager
def _no_collection() -> Iterator[None]:
    """torch.export allocates many small objects that stay: looking for garbage among them costs a quarter."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def split_inputs(example_inputs: Any) -> Inputs:
    """The four accepted spellings of example inputs as ``(args, kwargs)``."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, tuple | list):
        return (example_inputs,), {}
    pair = len(example_inputs) == 2 and isinstance(example_inputs[0], tuple | list)
    if pair and isinstance(example_inputs[1], dict) and all(isinstance(k, str) for k in example_inputs[1]):
        return tuple(example_inputs[0]), dict(example_inputs[1])
    return tuple(example_inputs), {}


# ---------------------------------------------------------------- private copies


def private_copy(model: nn.Module) -> nn.Module:
    """The model's module tree anew, holding the same tensors, in eval mode."""
    return anew(model).eval()


def symbolic_copy(model: nn.Module) -> nn.Module:
    private = private_copy(model)
    return fx.GraphModule(private, _LeafTracer().trace(private), type(model).__name__).eval()


class _LeafTracer(fx.Tracer):
    """Symbolic tracing that keeps train-dependent modules whole, which fx would freeze in one mode, and stages."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or is_opaque(m) or isinstance(m, Staged)


# ---------------------------------------------------------------- one front end


class _Attempt:
    """One front end at work on one private copy."""

    def __init__(self, model: nn.Module, private: nn.Module, inputs: Inputs, front_end: str) -> None:
        self.model, self.private, self.inputs, self.front_end = model, private, inputs, front_end
        self.notes: list[Note] = []
        self.leaves = leaf_paths(private)
        self.batch_matters: dict[str, list[str]] = {}

    def graph(self, dynamic: str) -> fx.GraphModule:
        wide = widen_batch(self.inputs)
        in_train = self.behaviour(wide)
        program, how = self.export(dynamic, wide)
        specs, in_spec = input_specs(self.inputs)
        fixed = [repr(s) for s in specs if isinstance(s, bool | int | float | str)]
        if fixed:
            self.note("inputs", f"the graph is for these Python values only: {', '.join(fixed)}")
        found = TraceInfo(specs, in_spec, type(self.model).__name__, self.front_end, how, tuple(self.notes))
        return canonicalise(program, self.private, self.model, found, in_train)

    def note(self, where: str, what: str) -> None:
        self.notes.append(Note(where, what, "info"))

    def behaviour(self, wide: Inputs) -> Behaviour | None:
        """How the model acts in train mode; notes on what the graph will not follow.

        One run in eval mode with a batch of one and one in train mode with the full batch: when they call the
        same functions, neither mode nor batch matters. Only when they do not, a third run says which it is.
        """
        small, in_train = self.alone(), self.in_train(wide)
        if in_train is not None and not differences(small, in_train):
            return in_train
        try:
            in_eval = observe(self.private, *wide, self.leaves)
        except Exception:
            if wide is self.inputs:
                raise
            in_eval, self.batch_matters = small, {"": ["a batch of two fails"]}
        self.batch_matters = self.batch_matters or differences(small, in_eval)
        for path, names in differences(in_eval, in_train or in_eval).items():
            owner = type(self.private.get_submodule(path)).__name__
            self.note(
                path or "model",
                f"{owner} acts differently in train mode ({', '.join(names[:4])}): the graph holds "
                "its eval-mode path; dropout, batch norm and stochastic depth layers do follow train()",
            )
        return in_train

    def alone(self) -> Behaviour:
        """In eval mode and, where the model takes it, for a batch of one: a case apart for torch.export."""
        one: Inputs = pytree.tree_map(lambda t: t[:1] if isinstance(t, torch.Tensor) and t.dim() else t, self.inputs)
        try:
            seen = observe(self.private, *one, self.leaves)
        except Exception:
            seen = observe(self.private, *self.inputs, self.leaves)
        self.leaves -= seen.resized
        return seen

    def in_train(self, wide: Inputs) -> Behaviour | None:
        modes = {module: module.training for module in self.private.modules()}
        problem: Exception | None = None
        try:
            self.private.train()
            for inputs in (wide, self.inputs):  # two of a batch, because a norm may need more than one value
                try:
                    return observe(self.private, *inputs, self.leaves)
                except Exception as error:
                    problem = problem or error
        finally:
            for module, mode in modes.items():
                module.training = mode
        assert problem is not None
        self.note(
            "model",
            f"cannot be run in train mode on these inputs ({reason(problem)}): the graph's train mode "
            "is that of its dropout, batch norm and stochastic depth layers",
        )
        return None

    def export(self, dynamic: str, wide: Inputs) -> tuple[torch.export.ExportedProgram, str]:
        """Export with as many free sizes as were asked for and the model allows; says which it was."""
        problem: Exception | None = None
        why = ""
        for how in _FEWER[dynamic]:
            if how != "none" and self.batch_matters:
                path = next(iter(self.batch_matters)) or "model"
                why = f"{path} does something else for a batch of one than for a batch of two"
                continue
            try:
                program = export_once(self.private, self.inputs if how == "none" else wide, how, self.leaves)
            except Exception as error:
                problem, why = problem or error, why or reason(error)
                continue
            if how == "none" or is_free(program):
                if why and how == "none":
                    self.note("model", f"sizes are fixed to those of the example inputs, batch included: {why}")
                return program, how
            why = why or "its code needs a known batch"
        assert problem is not None
        raise problem


def export_once(private: nn.Module, inputs: Inputs, how: str, leaves: set[str]) -> torch.export.ExportedProgram:
    args, kwargs = inputs
    shapes = None if how == "none" else by_name(private, *pytree.tree_map(lambda leaf: free_sizes(leaf, how), inputs))
    # Gradients on and no fused path of nn.MultiheadAttention: the graph must train wherever the model does.
    with (
        opaque_leaves(private, leaves),
        registered_outputs(private),
        torch.enable_grad(),
        unfused(),
        quiet(),
    ):
        return torch.export.export(private, args, kwargs, dynamic_shapes=shapes, strict=False)


def is_free(program: torch.export.ExportedProgram) -> bool:
    """Every input tensor may have any batch: none was fixed by the model's code, none has a range."""
    names = set(program.graph_signature.user_inputs)
    sizes = []
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.name in names else None
        if isinstance(value, torch.Tensor) and value.dim():
            sizes.append(value.shape[0])
    if not all(isinstance(size, torch.SymInt) for size in sizes):
        return False
    ranges = [program.range_constraints.get(size.node.expr) for size in sizes]
    return all(r is None or (int(r.lower) <= 2 and r.upper > 2**20) for r in ranges)


def by_name(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """torch.export wants free sizes of keyword inputs under the names of forward's parameters."""
    if not kwargs:
        return args
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def widen_batch(inputs: Inputs) -> Inputs:
    """A batch of one would be taken for a constant by torch.export, so show it a batch of two."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    if not tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return inputs
    return pytree.tree_map(lambda t: torch.cat([t, t]) if isinstance(t, torch.Tensor) else t, inputs)


def free_sizes(leaf: Any, how: str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return None
    return dict.fromkeys(range(leaf.dim()) if how == "all" else range(min(leaf.dim(), 1)), Dim.AUTO)


# ---------------------------------------------------------------- dataclasses


def register_dataclasses(value: Any) -> None:
    """Teach pytree the user's dataclasses, which torch.export otherwise refuses as inputs or outputs."""
    for leaf in pytree.tree_leaves(value):
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            continue
        if type(leaf) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(leaf))
        register_dataclasses([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])


@contextmanager
def registered_outputs(model: nn.Module) -> Iterator[None]:
    """Register dataclasses that the private copy's forward returns, before torch.export looks at them."""
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        register_dataclasses(result)
        return result

    watched.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    watched.__name__ = "forward"
    had = "forward" in vars(model)
    model.forward = watched
    try:
        yield
    finally:
        if had:
            model.forward = forward
        else:
            del model.forward
