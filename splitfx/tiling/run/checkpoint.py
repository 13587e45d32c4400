"""Checkpoint: a tiled stage trained with less memory, its activations computed again in the backward pass.

The stage is divided at cuts into *segments*. Forward, every segment runs row by row without a graph for autograd and
only the maps between segments are kept. Backward, the last segment first, each is computed again in bands of rows with
their halo, one band at a time, and the gradients of its parameters and its input are added up. `segments` decides where
to divide and how many bands fit within a quarter more work.

A segment that cannot be run in bands, because what it reduces over H and W is applied to the map again (the gate of a
squeeze-and-excitation, a group norm) or is a maximum, is computed again as a whole; `describe` names those.

Promises: the gradients of the untiled stage, up to the order in which numbers are added. Once differentiable.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from splitfx.analysis.regions import reduced_dims
from splitfx.analysis.shapes import shapes
from splitfx.ground.exclusive import Autocast, autocasts, exclusive, twin
from splitfx.ir.graph import TensorSpec, attribute, output_node, set_path
from splitfx.tiling.plan.instructions import Finish, Reduce, Schedule, Store, Take
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.plan.segments import Plan, divided, is_mean, overwrites
from splitfx.tiling.run.execution import Execution, Program
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.extract import stage_graph
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind

if TYPE_CHECKING:
    from splitfx.tiling.run.executor import Tiled

PIECE = 2**20  # bytes of the largest piece of a step of the forward pass, about


def checkpointed(tiled: Tiled, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What ``tiled`` gives, with a backward pass that computes the stage again band by band."""
    chain = _chain(tiled, inputs)
    values = dict(zip(chain.inputs, inputs, strict=True))
    for segment in chain.segments:
        results = segment(tiled.stage, [values[n] for n in segment.sources])
        values |= zip(segment.exits, results, strict=True)
    return [values[n] for n in chain.outputs]


def describe(tiled: Tiled, inputs: Sequence[torch.Tensor]) -> list[str]:
    """One line for each segment: its layers, and in how many bands it is computed again, or why as a whole."""
    return [segment.plan.words() for segment in _chain(tiled, inputs).segments]


# ---------------------------------------------------------------- the chain of segments


@dataclass
class _Chain:
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    segments: list[Segment]


# Beside the modules and not on them: what is here is made anew for a copy.
_KNOWN: weakref.WeakKeyDictionary[Tiled, dict[Any, _Chain]] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_KNOWN.clear)  # a segment may have been locked by a thread of the parent


def _chain(tiled: Tiled, inputs: Sequence[torch.Tensor]) -> _Chain:
    sizes = tuple((tuple(int(s) for s in t.shape), t.dtype, t.device) for t in inputs)
    cast = autocasts()
    with exclusive():
        known = _KNOWN.setdefault(tiled, {})
        if (cast, sizes) not in known:
            if len(known) > 8:
                known.pop(next(iter(known)))
            specs = tuple(TensorSpec(s, d, str(v)) for s, d, v in sizes)
            known[cast, sizes] = _made(tiled.stage, specs, cast)
        return known[cast, sizes]


def _made(graph: fx.GraphModule, specs: tuple[TensorSpec, ...], cast: Autocast) -> _Chain:
    values = shapes(graph, specs, cast)
    plans = divided(graph, compile_stage(graph, values, autocast=cast))
    segments = [Segment.of(graph, values, plan, cast) for plan in plans]
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    return _Chain(inputs, list(output_node(graph).all_input_nodes), segments)


@dataclass(eq=False)
class Segment:
    """A part of a stage between two cuts; ``sources`` and ``exits`` are nodes of the stage's graph.

    ``graph`` has modules of its own around the stage's tensors: the backward pass puts saved ones in their place, under
    ``lock``, and other threads run the stage meanwhile.
    """

    graph: fx.GraphModule
    plan: Plan
    sources: list[fx.Node]
    exits: list[fx.Node]
    stage: Stage
    program: Program
    parameters: list[str]  # paths in the stage
    buffers: list[str]
    lock: Any = field(default_factory=threading.Lock)

    @staticmethod
    def of(graph: fx.GraphModule, values: dict[fx.Node, Any], plan: Plan, cast: Autocast) -> Segment:
        small, sources, exits, copied = stage_graph(graph, plan.nodes)
        for target in {str(n.target) for n in small.graph.nodes if n.op == "call_module"}:
            set_path(small, target, twin(small.get_submodule(target), lambda tensor: tensor))
        stage = compile_stage(small, {new: values[old] for old, new in copied.items()}, autocast=cast)
        program = Program(stage, _schedule(stage))
        parameters = [name for name, _ in small.named_parameters(remove_duplicate=False)]
        buffers = [name for name, _ in small.named_buffers(remove_duplicate=False)]
        return Segment(small, plan, sources, exits, stage, program, parameters, buffers)

    def _refresh(self, owner: nn.Module) -> None:
        """A tensor of the stage is another object once the model was moved, converted or loaded."""
        for path in (*self.parameters, *self.buffers):
            parent, _, name = path.rpartition(".")
            module = self.graph.get_submodule(parent)
            (module._parameters if name in module._parameters else module._buffers)[name] = attribute(owner, path)

    def __call__(self, owner: nn.Module, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with self.lock:
            self._refresh(owner)
        tensors = {name: attribute(owner, name) for name in self.parameters}
        once = {id(p): name for name, p in reversed(tensors.items()) if p.requires_grad}  # tied ones count once
        trained = [name for name in tensors if name in once.values()]
        return _Recomputed.apply(self, tuple(trained), len(inputs), *inputs, *(tensors[n] for n in trained))


def _schedule(stage: Stage) -> Schedule:
    """Strips of the forward pass: every piece is as large as a kernel needs to run at full speed, about."""
    rows = [k.row_bytes * k.rows for k in stage.kernels if k.kind is Kind.ROWS]
    heaviest = max(rows, default=0) / max(1, stage.clock)
    return Schedule(max(1, min(stage.clock, round(PIECE / max(1.0, heaviest)))))


# ---------------------------------------------------------------- forward and backward


class _Forward(Execution):
    """Keeps what reductions give: small, and all that the backward pass of the layers behind them needs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, functional=False)
        self.reduced: dict[Kernel, torch.Tensor] = {}

    def finish(self, one: Finish) -> None:
        super().finish(one)
        if one.kernel.kind is Kind.REDUCE:
            self.reduced[one.kernel] = self.registers[one.dst]


class _Recomputed(torch.autograd.Function):
    """A segment: run without a graph, computed again with one. Parameters are inputs, so that autograd sees them."""

    @staticmethod
    def forward(ctx: Any, segment: Segment, names: tuple[str, ...], count: int, *tensors: torch.Tensor) -> Any:
        execution = _Forward(segment.program)
        outputs = execution.run(tensors[:count])
        ctx.segment, ctx.names, ctx.count = segment, names, count
        ctx.kernels = tuple(execution.reduced)
        ctx.cast = _autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors, *execution.reduced.values())
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        end = ctx.count + len(ctx.names)
        wanted = ctx.needs_input_grad[3:]
        inputs = [_leaf(t, need) for t, need in zip(saved[: ctx.count], wanted, strict=False)]
        weights = [_leaf(t, need) for t, need in zip(saved[ctx.count : end], wanted[ctx.count :], strict=True)]
        reduced = dict(zip(ctx.kernels, saved[end:], strict=True))
        named = {f"stage.{name}": w for name, w in zip(ctx.names, weights, strict=True)}
        work = _Backward(ctx.segment, inputs, weights, reduced, grads)
        with ctx.segment.lock, torch.enable_grad(), ctx.cast():
            torch.func.functional_call(_Holder(ctx.segment.graph), named, (work.run,))
        return None, None, None, *(leaf.grad for leaf in inputs), *(leaf.grad for leaf in weights)


class _Holder(nn.Module):
    """Lets `functional_call` put the saved parameters in place, whatever the model holds by now."""

    def __init__(self, stage: fx.GraphModule) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, call: Callable[[], None]) -> None:
        call()


def _leaf(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.detach().requires_grad_(wanted)


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """The backward pass computes in the number types of the forward pass."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


@dataclass
class _Backward:
    """The backward pass of one segment; leaves ``grad`` on ``inputs`` and ``weights``."""

    segment: Segment
    inputs: list[torch.Tensor]
    weights: list[torch.Tensor]
    reduced: dict[Kernel, torch.Tensor]
    grads: Sequence[torch.Tensor]

    def run(self) -> None:
        if self.segment.plan.bands == 1:
            self._whole()
            return
        reduced = self._behind_reductions()
        scheduler = _Bands(self.segment.stage, self.segment.plan.bands)
        for band in range(self.segment.plan.bands):
            execution = _Band(self, scheduler, band, reduced)
            execution.run_band()
            _push(execution.outputs, execution.grads, [*execution.leaves, *self.weights, *self.inputs])
            execution.add_crops()

    def _whole(self) -> None:
        places = [n for n in self.segment.graph.graph.nodes if n.op == "placeholder"]
        # A layer that overwrites its input must not overwrite what was saved.
        given = [
            leaf.clone() if any(overwrites(user, node) for user in node.users) else leaf
            for node, leaf in zip(places, self.inputs, strict=True)
        ]
        _push(self.segment.graph(*given), self.grads, [*self.inputs, *self.weights])

    def _behind_reductions(self) -> dict[Kernel, torch.Tensor]:
        """Run what follows the reductions (a classifier), and return the gradients of what they gave."""
        leaves = {kernel: _leaf(value, value.is_floating_point()) for kernel, value in self.reduced.items()}
        values: dict[Kernel, torch.Tensor] = {
            **leaves,
            **dict(zip(self.segment.stage.sources, self.inputs, strict=True)),
        }
        execution = Execution(self.segment.program, functional=True)
        for place, kernel in enumerate([k for k in self.segment.stage.kernels if k in values or k.kind is Kind.WHOLE]):
            execution.wholes[kernel] = place
            if kernel in values:
                execution.registers[place] = values[kernel]
            else:
                execution.finish(Finish(place, kernel))
        small = [(i, k) for i, k in enumerate(self.segment.stage.exits) if k.kind in (Kind.REDUCE, Kind.WHOLE)]
        outputs = [execution.registers[execution.wholes[k]] for _, k in small]
        _push(outputs, [self.grads[i] for i, _ in small], [*leaves.values(), *self.weights, *self.inputs])
        return {kernel: leaf.grad for kernel, leaf in leaves.items() if leaf.grad is not None}


def _push(outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> None:
    """Add the gradients of outputs to the leaves' ``grad``; outputs that depend on none of them are left out."""
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if pairs and asked:
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs], inputs=asked)


class _Bands(Scheduler):
    """The instructions of one band of rows after another."""

    def __init__(self, stage: Stage, count: int) -> None:
        super().__init__(stage, Schedule(0, (), (count, 1)), sources_counted=False)

    def band(self, number: int) -> Any:
        return self._tile(number, 0)


class _Band(Execution):
    """One band computed with a graph for autograd. Pieces of inputs are leaves of their own: the gradient of a slice of
    the whole input would be as large as the input."""

    def __init__(self, work: _Backward, scheduler: _Bands, number: int, reduced: dict[Kernel, torch.Tensor]) -> None:
        super().__init__(work.segment.program, functional=True)
        self.work, self.scheduler, self.number, self.reduced = work, scheduler, number, reduced
        self.outputs: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.crops: list[tuple[torch.Tensor, torch.Tensor]] = []  # a leaf and the input of which it is a piece
        self.leaves: list[torch.Tensor] = []
        self.starts: dict[int, int] = {}

    def run_band(self) -> None:
        for place, (kernel, leaf) in enumerate(zip(self.stage.sources, self.work.inputs, strict=True)):
            self.registers[place] = leaf
            self.wholes[kernel] = place
        for instruction in self.scheduler.band(self.number):
            self.act(instruction)
        self.registers.clear()
        self.pieces.clear()

    def take(self, one: Take) -> None:
        if (
            one.src in self.starts and one.rows is not None
        ):  # an output that is read again: this band holds its own rows of it
            first = self.starts[one.src]
            one = Take(one.dst, one.src, one.kernel, (one.rows[0] - first, one.rows[1] - first), one.columns, False)
        super().take(one)
        if one.src < len(self.work.inputs):
            self.registers[one.dst] = self._crop(self.registers[one.dst], one)

    def _crop(self, view: torch.Tensor, one: Take) -> torch.Tensor:
        source = self.work.inputs[one.src]
        if not source.requires_grad:
            return view
        leaf = _leaf(view, True)
        self.leaves.append(leaf)
        self.crops.append((leaf, _part(_grad_of(source), one)))
        return leaf

    def add_crops(self) -> None:
        for leaf, place in self.crops:
            if leaf.grad is not None:
                place.add_(leaf.grad)

    def store(self, one: Store) -> None:
        piece, kernel = self.registers[one.src], one.kernel
        assert kernel.dims is not None
        self.registers[one.memory], self.starts[one.memory] = piece, one.rows[0]
        count = self.work.segment.plan.bands
        first, last = (kernel.rows * part // count for part in (self.number, self.number + 1))
        if last > first:  # rows beyond belong to the next band, which computes them too
            self.outputs.append(kernel.cut(piece, (first - one.rows[0], last - one.rows[0])))
            self.grads.append(kernel.cut(self.work.grads[kernel.exit], (first, last)))

    def reduce(self, one: Reduce) -> None:
        if one.kernel not in self.reduced:
            return
        x, source = self.registers[one.srcs[0]], one.kernel.reads[0][0]
        assert source.dims is not None
        part = x.sum(reduced_dims(source.dims, x.dim()))
        grad = self.reduced[one.kernel].reshape(part.shape).to(part.dtype)
        self.outputs.append(part)
        self.grads.append(grad / prod((*source.sizes, *source.rest)) if is_mean(one.kernel) else grad)


def _grad_of(source: torch.Tensor) -> torch.Tensor:
    if source.grad is None:
        source.grad = torch.zeros_like(source)
    return source.grad


def _part(whole: torch.Tensor, one: Take) -> torch.Tensor:
    return one.kernel.cut(whole, one.rows, one.columns)
