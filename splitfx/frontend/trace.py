"""`trace`: any model and example inputs in, the canonical graph out.

Front ends are tried in order: ``torch.export`` on the model, then ``torch.fx.symbolic_trace`` followed by
``torch.export`` of what it found. Both end in one canonical graph (`splitfx.frontend.canonical`), so no later code
knows which one worked. The model is never changed: a private copy of its module tree, which shares the
parameters, is put in eval mode and traced. What it makes in its first call is made before
(`splitfx.frontend.first_call`), and the graph is held to what that call returned (`splitfx.frontend.oracle`). What
cannot be traced is a `TraceError` (`splitfx.frontend.failures`).

Promises: where the trace is not the whole truth (a part of the model that acts differently in train mode, a
size that is fixed, a Python value that is baked in), `TraceInfo.notes` says so.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.errors import TraceError, UnsupportedError
from splitfx.frontend.behaviour import Behaviour, differences, observe, quiet
from splitfx.frontend.canonical import canonicalise, input_specs, opaque_leaves, whole_stages
from splitfx.frontend.example_inputs import Inputs, by_name, free_sizes, larger, split_inputs, widen_batch
from splitfx.frontend.failures import check_inputs, check_model, failure, reason
from splitfx.frontend.first_call import FirstCall, first_call, own_copy, run, undisturbed, unfused
from splitfx.frontend.oracle import cut_down, require_same, shapes_of
from splitfx.frontend.size_rules import Heard, SizeOfOne, TooLong, listening, sizes_of, where_fixed
from splitfx.ground.exclusive import exclusive
from splitfx.ground.progress import Say, say, told
from splitfx.ir.copies import anew
from splitfx.ir.graph import Staged, TensorSpec, TraceInfo, info
from splitfx.ir.modes import is_opaque, kept_modes, leaf_paths
from splitfx.ir.notes import Note
from splitfx.ir.sizes import Sizes

DYNAMIC = ("all", "batch", "none")
_FEWER = {"all": ("all", "sizes", "batch", "none"), "batch": ("batch", "none"), "none": ("none",)}


@told
@exclusive()
def trace(
    model: nn.Module, example_inputs: Any, *, dynamic: str = "all", verify: bool = True, progress: Say = True
) -> fx.GraphModule:
    """Trace ``model`` to its canonical graph.

    ``example_inputs`` is a tensor, a tuple of positional inputs, a dict of keyword inputs, or
    ``((positional, ...), {keyword: ...})``; numpy arrays or shapes, as in ``(1, 3, 224, 224)``, may stand for tensors.
    The graph is traced for their shapes. ``dynamic`` says which
    sizes may differ later, where the model allows it: ``"all"``, ``"batch"`` (dim 0 of every tensor only) or
    ``"none"``. What the model allowed is in ``TraceInfo.sizes``; a call at any other size is an `UnsupportedError`.

    The result is a ``torch.fx.GraphModule`` that holds the model's own parameters and buffers under their own
    names, so that to train the one is to train the other, and follows ``train()`` and ``eval()`` as the model does.
    Tracing itself changes nothing of the model's. Model and graph run once on the example inputs, in eval mode, and
    must agree, unless ``verify`` is off; of inputs of more than a million numbers the first rows and columns will do
    where the graph is right for that size too. Raises `TraceError`.
    """
    check_model(model)
    if dynamic not in DYNAMIC:
        raise TraceError(f"dynamic is one of {', '.join(DYNAMIC)}, not {dynamic!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the user's module there
    inputs = pytree.tree_map(_detached, split_inputs(example_inputs, model))
    check_inputs(model, *inputs)
    register_dataclasses(inputs)
    say("tracing")
    with _no_collection(), undisturbed(model), quiet():
        if verify:
            return _verified(model, inputs, dynamic)
        return _traced(model, inputs, dynamic, None)


def _verified(model: nn.Module, inputs: Inputs, dynamic: str) -> fx.GraphModule:
    graph: fx.GraphModule | None = None
    small = cut_down(inputs)
    seen = _first_call_on_a_part(model, small) if small is not None else None
    if small is not None and seen is not None:
        graph = _traced(model, inputs, dynamic, seen)
        if not info(graph).sizes.broken(info(graph).shapes, shapes_of(small)):
            return _held_to(graph, model, small, seen)
    seen = _first_call(model, inputs)
    if graph is None or seen.made:
        graph = _traced(model, inputs, dynamic, seen)
    return _held_to(graph, model, inputs, seen)


def _first_call(model: nn.Module, inputs: Inputs) -> FirstCall:
    own = own_copy(model)
    try:
        return first_call(own, inputs)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(failure(model, inputs, [("the first call", own, error)], runs=False)) from error


def _first_call_on_a_part(model: nn.Module, small: Inputs) -> FirstCall | None:
    """The first call on the first rows and columns of large inputs; None where it does not say what a call on all of
    them does: the model refuses that size, or keeps something, which may follow from the size."""
    try:
        seen = first_call(own_copy(model), small)
    except TraceError:
        raise
    except Exception:  # the call on all of the inputs decides, and says what is wrong
        return None
    return None if seen.keeps else seen


def _held_to(graph: fx.GraphModule, model: nn.Module, inputs: Inputs, seen: FirstCall) -> fx.GraphModule:
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
    raise TraceError(failure(model, inputs, problems, runs=_runs(ready, inputs))) from problems[0][2]


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    try:
        run(own_copy(model), inputs)
    except Exception:
        return False
    return True


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
        self.reads_sizes = True

    def graph(self, dynamic: str) -> fx.GraphModule:
        wide = widen_batch(self.inputs)
        in_train = self.behaviour(wide)
        specs, in_spec = input_specs(self.inputs)
        program, sizes = self.export(dynamic, wide, specs)
        fixed = [repr(s) for s in specs if isinstance(s, bool | int | float | str)]
        if fixed:
            self.note("inputs", f"the graph is for these Python values only: {', '.join(fixed)}")
        found = TraceInfo(specs, in_spec, type(self.model).__name__, self.front_end, tuple(self.notes), sizes=sizes)
        return canonicalise(program, self.private, self.model, found, in_train)

    def note(self, where: str, what: str) -> None:
        self.notes.append(Note(where, what, "info"))

    def behaviour(self, wide: Inputs) -> Behaviour | None:
        """How the model acts in train mode; notes on what the graph will not follow.

        One run in eval mode with a batch of one and one in train mode with the full batch: when they call the
        same functions, neither mode nor batch matters. Only when they do not, a third run says which it is.
        """
        small, in_train = self.alone(), self.in_train(wide)
        self.reads_sizes = small.reads_sizes
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
        problem: Exception | None = None
        with kept_modes(self.private):
            self.private.train()
            for inputs in (wide, self.inputs):  # two of a batch, because a norm may need more than one value
                try:
                    return observe(self.private, *inputs, self.leaves)
                except Exception as error:
                    problem = problem or error
        assert problem is not None
        self.note(
            "model",
            f"cannot be run in train mode on these inputs ({reason(problem)}): the graph's train mode "
            "is that of its dropout, batch norm and stochastic depth layers",
        )
        return None

    def export(self, dynamic: str, wide: Inputs, specs: tuple[Any, ...]) -> tuple[torch.export.ExportedProgram, Sizes]:
        """Export with as many free sizes as were asked for and the model allows; says which those are."""
        problem: Exception | None = None
        why = ""
        for how in _FEWER[dynamic]:
            batch = how in ("all", "batch")
            if batch and self.batch_matters:
                path = next(iter(self.batch_matters)) or "model"
                why = f"{path} does something else for a batch of one than for a batch of two"
                continue
            if how == "sizes" and isinstance(problem, TooLong):
                continue
            try:
                program, sizes, heard = self.export_once(how, wide if batch else self.inputs, specs)
            except Exception as error:
                problem, why = problem or error, why or reason(error)
                continue
            if batch and not _takes_batches(sizes, specs):
                why = why or "its code needs a known batch"
                continue
            if why and not batch:
                self.note("model", f"sizes are fixed to those of the example inputs, batch included: {why}")
            elif why and how != dynamic:
                self.note("model", f"all sizes but the batch are fixed to those of the example inputs: {why}")
            self.note_fixed(program, sizes, specs, heard)
            return program, sizes
        assert problem is not None
        raise problem

    def export_once(
        self, how: str, inputs: Inputs, specs: tuple[Any, ...]
    ) -> tuple[torch.export.ExportedProgram, Sizes, Heard]:
        """Where free sizes make a size of one inside, torch.export is shown larger inputs, if the graph is then right
        for the example inputs too; if not, that this size is one becomes a rule."""
        for times in (1, 2, 4, 8):
            try:
                return self.export_at(how, larger(inputs, times), specs, ones=False)
            except SizeOfOne:
                continue
            except Exception:
                if times == 1:
                    raise
                break  # a model for inputs of this size only
        return self.export_at(how, inputs, specs, ones=True)

    def export_at(
        self, how: str, inputs: Inputs, specs: tuple[Any, ...], ones: bool
    ) -> tuple[torch.export.ExportedProgram, Sizes, Heard]:
        places = [i for i, spec in enumerate(specs) if isinstance(spec, TensorSpec)]
        blind = how in ("all", "sizes") and not self.reads_sizes
        dims = {"all": "batch", "sizes": "none"}[how] if blind else how
        with listening(self.private, ones) as heard:
            program = export_program(self.private, inputs, dims, self.leaves)
        sizes = sizes_of(program, heard, places, len(specs))
        if blind:
            batch = how == "sizes"  # nothing reads a size: whatever is written into the graph is no size
            sizes = replace(sizes, fixed=tuple((0,) if batch and i in places else () for i in range(len(specs))))
        shapes = [spec.shape if isinstance(spec, TensorSpec) else None for spec in specs]
        broken = sizes.broken(shapes, shapes)
        if broken:
            raise UnsupportedError(f"{broken}, which the example inputs do not fit")
        return program, sizes, heard

    def note_fixed(
        self, program: torch.export.ExportedProgram, sizes: Sizes, specs: tuple[Any, ...], heard: Heard
    ) -> None:
        """Name what fixed the height, the width or the depth of an input that could otherwise vary."""
        tensors = [i for i, spec in enumerate(specs) if isinstance(spec, TensorSpec)]
        for number, place in enumerate(tensors):
            shape = specs[place].shape
            for dim in range(2, len(shape)) if len(shape) > 3 else ():
                where = "" if sizes.free(place, dim) else where_fixed(heard, program, number, dim)
                if where:
                    self.note("inputs", f"size {dim} of input {place} is fixed to {shape[dim]}: {where} needs it")


def export_program(private: nn.Module, inputs: Inputs, how: str, leaves: set[str]) -> torch.export.ExportedProgram:
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


def _takes_batches(sizes: Sizes, specs: tuple[Any, ...]) -> bool:
    """Every input tensor may have any batch, if all have the same."""
    shapes = [spec.shape if isinstance(spec, TensorSpec) else None for spec in specs]
    if any(shape and not sizes.free(place, 0) for place, shape in enumerate(shapes)):
        return False
    other = [[(n, *shape[1:]) if shape else shape for shape in shapes] for n in (2, 3, 5)]
    return not any(sizes.broken(shapes, given) for given in other)


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

    watched.__signature__ = inspect.signature(forward)
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
