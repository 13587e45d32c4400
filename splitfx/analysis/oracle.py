"""The oracle of each promise, run by the pipeline on every step: exact, in float64, on random inputs.

EQUAL: the rewritten graph computes what the graph before it did. RETRAIN: it computes what the pass's own dense
reference, the removed weights set to zero, computes. Both graphs are interpreted node by node in float64 (weights
are converted as they are used, so no second copy of a large model exists) with the same inputs, in eval mode, at a
reduced image size where the graph allows it, else at the traced one.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from splitfx.errors import VerificationError
from splitfx.ground.difference import relative_error
from splitfx.ground.exclusive import exclusive, reseed, twin
from splitfx.ir.graph import Staged, TensorSpec, attribute, copy_graph, info, layer
from splitfx.ir.layers import Masked
from splitfx.ir.modes import module_has_mode
from splitfx.text import first_line

TOLERANCE = 1e-10  # relative to the largest output; float64 rounding over deep networks stays below 1e-12
ROUNDING = {
    torch.float32: 1e-4,
    torch.bfloat16: 1e-1,
    torch.float16: 1e-2,
}  # of weights, through a deep network
STRIPS = 16  # in which a tiled stage runs at least: a small image must not be a single strip
SMALL = 64  # a square image of this size shows every fault of a rewrite that a larger one does


_LARGE = (nn.Linear, nn.modules.conv._ConvNd)  # one large tensor each, of which no result is a view


class Exact(fx.Interpreter):
    """Interprets a graph in float64 and eval mode without touching it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.graph_module = graph
        self.workspace = torch.empty(0)
        self.other: dict[int, torch.Tensor] = {}  # by the id of a tensor, one to be taken in its place
        self.buffers: dict[str, torch.Tensor] = {}  # copies, which the graph may write to
        self.staged: dict[str, tuple[Staged, dict[int, torch.Tensor]]] = {}  # copies, and their tensors

    @exclusive()
    def outputs(self, inputs: list[Any], other: dict[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """The output tensors on flat inputs; ``other``: tensors to be taken for the graph's own, by their ids."""
        self.other, self.buffers = other or {}, {}
        devices = cuda_devices(self.graph_module)
        with torch.no_grad(), torch.random.fork_rng(devices):
            reseed(0, devices)  # a model that draws in eval mode draws the same
            own = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
            found = self.run(*own, enable_io_processing=False)
        return [v for v in pytree.tree_leaves(found) if isinstance(v, torch.Tensor)]

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.other.get(id(tensor), tensor)

    def lent(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of a weight in float64; large ones take turns in one piece of memory, which is cheaper than new."""
        weight = self.value(weight)
        if not weight.dtype.is_floating_point:
            return weight.detach().clone()
        if weight.numel() < 2**16:
            return weight.detach().to(torch.float64, copy=True)
        if self.workspace.numel() < weight.numel() or self.workspace.device != weight.device:
            self.workspace = torch.empty(weight.numel(), dtype=torch.float64, device=weight.device)
        return self.workspace[: weight.numel()].view(weight.shape).copy_(weight.detach())

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:
            raise Misfit(f"{layer(n)}: {first_line(error)}") from error

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *_wide((args, kwargs)))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = attribute(self.graph_module, str(target))
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
            return _double(self.value(value))
        if str(target) not in self.buffers:
            self.buffers[str(target)] = _double(self.value(value).clone())
        return self.buffers[str(target)]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.graph_module.get_submodule(str(target))
        if isinstance(module, Staged):
            return self.run_stage(str(target), module, args, kwargs)
        masked = module if isinstance(module, Masked) else None
        module = masked.layer if masked is not None else module
        own = module.weight if isinstance(module, _LARGE) else None
        tensors = (*module.named_parameters(), *module.named_buffers())
        if not module._modules:  # the same, without the search
            tensors = (*module._parameters.items(), *module._buffers.items())
        held = {name: self.lent(t) if t is own else _double(self.value(t)) for name, t in tensors if t is not None}
        if masked is not None:
            masked.clear(held["weight"])
        if len(args) == 1 and not kwargs and _depthwise(module):
            return _each_channel(module, args[0], held["weight"], held.get("bias"))
        converted = {id(t): held[name] for name, t in tensors if t is not None}
        return twin(module, lambda tensor: converted[id(tensor)])(*args, **kwargs)

    def run_stage(self, target: str, module: Staged, args: Any, kwargs: Any) -> Any:
        """By a copy that stays: behind the first run, the schedule for this size is made."""
        tensors = [*module.parameters(), *module.buffers()]
        if target in self.staged:
            private, copies = self.staged[target]
            for tensor in tensors:
                copies[id(tensor)].copy_(self.value(tensor))
        else:
            wide = lambda t: torch.float64 if t.dtype.is_floating_point else t.dtype  # noqa: E731
            copies = {id(t): self.value(t).detach().to(wide(t), copy=True) for t in tensors}
            private = copy.deepcopy(module, dict(copies)).eval()
            _widen(private.stage)
            self.staged[target] = private, copies
        with getattr(private, "in_strips", nullcontext)(STRIPS):
            return private(*args, **kwargs)


def _depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d or module.groups != module.in_channels:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _each_channel(module: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A depthwise convolution tap by tap: in float64 torch runs one convolution per channel, thirty times slower."""
    down, across = module.padding
    assert isinstance(down, int)
    assert isinstance(across, int)
    x = torch.nn.functional.pad(x, (across, across, down, down))
    x = x.repeat_interleave(module.out_channels // module.in_channels, 1)
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    rows, columns = (size - span for size, span in zip(x.shape[2:], spans, strict=True))
    if rows < 1 or columns < 1:
        raise RuntimeError(f"the kernel does not fit an input of {tuple(x.shape)}")
    total = (x.new_zeros(1) if bias is None else bias)[:, None, None]
    for i in range(module.kernel_size[0]):
        for j in range(module.kernel_size[1]):
            top, left = i * module.dilation[0], j * module.dilation[1]
            part = x[:, :, top : top + rows : module.stride[0], left : left + columns : module.stride[1]]
            total = torch.addcmul(total, part, weight[:, 0, i, j, None, None])
    return total


class Misfit(Exception):
    """The graph does not run on these sizes."""


def _wide(arguments: Any) -> Any:
    """Casts to a float type, and tensors made in one, are float64 ones here."""
    floats = lambda v: isinstance(v, torch.dtype) and v.is_floating_point  # noqa: E731
    return map_aggregate(arguments, lambda v: torch.float64 if floats(v) else v)


def _widen(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        node.args, node.kwargs = _wide((node.args, node.kwargs))
    graph.recompile()


def _double(value: Any) -> Any:
    floats = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.detach().double() if floats else value


def run_exact(graph: fx.GraphModule, inputs: list[Any]) -> list[torch.Tensor]:
    """The output tensors of a graph in float64, on flat inputs."""
    return Exact(graph).outputs(inputs)


def cuda_devices(graph: nn.Module) -> list[torch.device]:
    """Where a graph or a model draws random numbers besides the CPU."""
    return sorted({p.device for p in graph.parameters() if p.device.type == "cuda"}, key=str)


def random_flat(graph: fx.GraphModule, seed: int, small: bool) -> list[Any]:
    """One random value per placeholder, floats in float64; ``small`` shrinks images."""
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))

    def one(spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        if small:
            spec = TensorSpec(_shrunk(spec.shape), spec.dtype, spec.device, spec.high)
        return spec.random(generator, torch.float64, device)

    return [one(s) for s in info(graph).inputs]


def _shrunk(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 4:
        return shape
    return (*shape[:2], *(s if s <= SMALL else SMALL + s % 2 for s in shape[2:]))


def difference(before: fx.GraphModule, after: fx.GraphModule, seed: int = 0, small: bool = True) -> float:
    """The largest relative difference of two graphs' outputs in float64 on the same random inputs.

    Relative to the largest magnitude of each output. ``small``: on smaller images where the graph allows it. Raises
    `VerificationError` when shapes differ.
    """
    return Pair(before, after).difference(seed, small)


class Pair:
    """Two graphs to be compared in float64, also with other weights than their own."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        self.before, self.after = before, after
        self.forget()

    def forget(self) -> None:
        """Let go of the copies that runs leave for the next."""
        self._runs = Exact(self.before), Exact(self.after)

    def difference(self, seed: int = 0, small: bool = True, other: dict[int, torch.Tensor] | None = None) -> float:
        """See `difference`; ``other``: by the id of a tensor that both graphs hold, the one to be taken for it."""
        worst = 0.0
        for a, b in zip(*self._both(seed, small, other), strict=True):
            if a.shape != b.shape:
                raise VerificationError(f"the rewritten graph returns {tuple(b.shape)}, {tuple(a.shape)} was promised")
            worst = max(worst, relative_error(b, a))
        return worst

    def _both(
        self, seed: int, small: bool, other: dict[int, torch.Tensor] | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        before, after = self._runs
        sizes = [s.shape for s in info(self.before).inputs if isinstance(s, TensorSpec)]
        for shrunk in (True, False) if small and any(_shrunk(s) != s for s in sizes) else (False,):
            inputs = random_flat(self.before, seed, shrunk)
            try:
                first = before.outputs(inputs, other)
            except Misfit as error:
                if shrunk:
                    continue  # sizes are part of this model: use the traced ones
                raise VerificationError(f"the graph before the pass does not run: {error}") from error
            try:
                return first, after.outputs(inputs, other)
            except Misfit as error:
                raise VerificationError(f"the rewritten graph does not run: {error}") from error
        raise AssertionError("unreachable: the traced sizes are always tried")


def require_equal(
    name: str, before: fx.GraphModule, after: fx.GraphModule, limit: float = TOLERANCE, small: bool = True
) -> float:
    """The measured difference (see `difference`); `VerificationError` where it is beyond ``limit``."""
    return within(name, difference(before, after, small=small), limit)


def within(name: str, worst: float, limit: float = TOLERANCE) -> float:
    """``worst``, a measured difference of what pass ``name`` gave; `VerificationError` where it is beyond ``limit``."""
    if not worst <= limit:
        raise VerificationError(
            f"pass '{name}' broke its promise: outputs differ by {worst:.1e} of their largest value "
            f"in float64 (limit {limit:.0e}). This is a fault in the pass; please report it "
            "with the model and the plan"
        )
    return worst


def in_double(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose parameters, buffers, float inputs and casts are float64."""
    copied = copy_graph(graph).double()
    _widen(copied)
    record = info(copied)
    record.inputs = tuple(
        replace(s, dtype=torch.float64) if isinstance(s, TensorSpec) and s.dtype.is_floating_point else s
        for s in record.inputs
    )
    return copied


def rounding(graph: fx.GraphModule) -> float:
    """How far weights that a pass computes may move the outputs by being rounded to the graph's types."""
    return max((ROUNDING[p.dtype] for p in graph.parameters() if p.dtype in ROUNDING), default=TOLERANCE)


def has_constants(graph: fx.GraphModule) -> bool:
    return any(_constant(t) for t in _weights(graph))


def varied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy in which weights that are all alike (fresh norms and biases) have become unlike each other."""
    other = other_weights(graph)
    alike = [t for t in _weights(graph) if id(t) in other]
    copied = copy_graph(graph, share=True, apart=alike)  # the rest may be large, and nobody writes to it
    with torch.no_grad():
        for mine, theirs in zip(_weights(copied), _weights(graph), strict=True):
            if id(theirs) in other:
                mine.copy_(other[id(theirs)])
    return copied


def other_weights(graph: fx.GraphModule) -> dict[int, torch.Tensor]:
    """For each weight that is all alike, by its id, one that is not."""
    generator = torch.Generator().manual_seed(0)
    other = {}
    for tensor in filter(_constant, _weights(graph)):
        value = float(tensor.detach().flatten()[0])
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5  # variances stay positive
        other[id(tensor)] = (noise * value if value else noise - 1).to(tensor)
    return other


def _weights(graph: fx.GraphModule) -> list[torch.Tensor]:
    """Parameters, and the statistics of norms."""
    norms = [m for m in graph.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    return [*graph.parameters(), *(b for m in norms for b in m.buffers(recurse=False))]


def _constant(tensor: torch.Tensor) -> bool:
    if not tensor.dtype.is_floating_point or tensor.numel() < 2 or tensor.device.type == "meta":
        return False
    if tensor.is_contiguous() and not _alike(tensor.flatten()[:8]):
        return False  # most are seen at once, and large
    return _alike(tensor)


def _alike(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def acts_as_in_eval(model: nn.Module) -> bool:
    """No module is in train mode that acts on it."""
    return not any(m.training for m in model.modules() if module_has_mode(m))
