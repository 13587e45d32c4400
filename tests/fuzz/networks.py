"""Small networks drawn from one random generator, over all operations of the operation table.

A network is a list of steps, each a layer or an expression that reads one or more of the values so far, so that
residuals, concats, gates and outputs from the middle come by themselves. Its `listing` is what a report of a fault
needs. What a step would make too large, not finite, or cannot compute is drawn again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn

from tests.fuzz.steps import Call, Reads, draw_step

MOST = 20_000  # elements of a value
LARGEST = 1e3  # magnitude of a value
ATTEMPTS = 30  # a step


class Network(nn.Module):
    """Runs its steps in order; the outputs are some of their values."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict()
        self.reads: list[tuple[int, ...]] = []
        self.layers: list[str] = []  # the key of each step: two of one layer are calls of one module
        self.returns: tuple[int, ...] = ()
        self.form = "one"

    def forward(self, *inputs: torch.Tensor) -> Any:
        values = list(inputs)
        for key, reads in zip(self.layers, self.reads, strict=True):
            values.append(self.steps[key](*[values[i] for i in reads]))
        found = [values[i] for i in self.returns]
        if self.form == "one":
            return found[0]
        if self.form == "dict":
            return {f"out{i}": v for i, v in enumerate(found)}
        return tuple(found)

    def listing(self, inputs: tuple[torch.Tensor, ...]) -> str:
        lines = [f"v{i} = input {tuple(t.shape)}" for i, t in enumerate(inputs)]
        for i, (key, reads) in enumerate(zip(self.layers, self.reads, strict=True), len(inputs)):
            lines.append(f"v{i} = {key}({', '.join(f'v{r}' for r in reads)})   # {self.steps[key]!r}")
        return "\n".join([*lines, f"return {self.form} {', '.join(f'v{r}' for r in self.returns)}"])


@dataclass
class Drawn:
    """A network in float64 and eval mode, with inputs that it takes."""

    model: Network
    inputs: tuple[torch.Tensor, ...]

    @property
    def listing(self) -> str:
        return self.model.listing(self.inputs)

    def other_inputs(self, rng: Random, batch: int, by: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Inputs of another batch, and of images that are ``by`` larger."""
        sizes = [(batch, t.shape[1], t.shape[2] + by[0], t.shape[3] + by[1]) for t in self.inputs]
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        return tuple(torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes)


def network(rng: Random, most: int = 8) -> Drawn:
    """A network of 3 to ``most`` steps; one or two images of 7 to 20 pixels, 2 or 3 in a batch."""
    torch.manual_seed(rng.randrange(2**31))
    model, batch = Network(), rng.choice((2, 2, 3))
    sizes = (rng.randint(7, 20), rng.randint(7, 20))
    count = 2 if rng.random() < 0.2 else 1
    inputs = tuple(torch.randn(batch, rng.randint(2, 4), *sizes, dtype=torch.float64) for _ in range(count))
    values = [t.clone() for t in inputs]
    with torch.no_grad():
        wild = rng.random() < 0.45
        for _ in range(rng.randint(3, most)):
            _add_step(model, rng, values, count, wild)
        if rng.random() < 0.5:
            _add(model, rng, values, count, Call("x.flatten(2).mean(2)"), (_last(values, 4),))
            _add(model, rng, values, count, nn.Linear(values[-1].shape[1], rng.randint(4, 6)), (len(values) - 1,))
    _returns(model, rng, values, count)
    return Drawn(model.double().eval(), inputs)


def _last(values: list[torch.Tensor], rank: int) -> int:
    return max(i for i, v in enumerate(values) if v.dim() == rank)


def _add_step(model: Network, rng: Random, values: list[torch.Tensor], inputs: int, wild: bool) -> None:
    for _ in range(ATTEMPTS):
        # Mostly the last value, so that networks are deep; else any, so that they branch.
        i = len(values) - 1 if rng.random() < 0.8 else rng.randrange(len(values))
        if rng.random() < 0.08 and _again(model, rng, values, i):
            return
        made = draw_step(rng, Reads(values, i), model, wild)
        if made is not None and _add(model, rng, values, inputs, *made):
            return


def _add(
    model: Network, rng: Random, values: list[torch.Tensor], inputs: int, layer: nn.Module, reads: tuple[int, ...]
) -> bool:
    """The step, if what it computes is a tensor of ordinary size and values."""
    _norm_statistics(layer, rng)
    owned = {v.untyped_storage().data_ptr() for v in values[:inputs]}
    if _writes(layer) and values[reads[0]].untyped_storage().data_ptr() in owned:
        return False  # the user's own input
    kept = [v.clone() for v in values]
    found = _tried(layer.double().eval(), [values[i] for i in reads])
    if found is None:
        for value, before in zip(values, kept, strict=True):
            if not torch.equal(value, before):
                value.copy_(before)
        return False
    key = f"{type(layer).__name__.lower()}{len(values)}"
    model.steps[key] = layer
    model.layers.append(key)
    model.reads.append(reads)
    values.append(found)
    return True


def _again(model: Network, rng: Random, values: list[torch.Tensor], i: int) -> bool:
    """Call a layer that is there already on another value: a shared module."""
    shared = [k for k in dict.fromkeys(model.layers) if not isinstance(model.steps[k], Call)]
    if not shared:
        return False
    key = rng.choice(shared)
    if len(model.reads[model.layers.index(key)]) != 1 or (found := _tried(model.steps[key], [values[i]])) is None:
        return False
    model.layers.append(key)
    model.reads.append((i,))
    values.append(found)
    return True


def _tried(layer: nn.Module, given: list[torch.Tensor]) -> torch.Tensor | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = layer(*given)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return None
    usual = isinstance(found, torch.Tensor) and 0 < found.numel() <= MOST and found.dtype is torch.float64
    return found if usual and found.dim() >= 2 and bool((found.abs() < LARGEST).all()) else None


def _writes(layer: nn.Module) -> bool:
    return bool(getattr(layer, "inplace", False))


def _norm_statistics(layer: nn.Module, rng: Random) -> None:
    """Statistics and scales that are not 0 and 1."""
    for name, tensor in [*layer.named_buffers(), *layer.named_parameters()]:
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.3)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 and tensor.dtype.is_floating_point:
            tensor.add_(torch.empty_like(tensor).uniform_(-0.3, 0.3))


def _returns(model: Network, rng: Random, values: list[torch.Tensor], inputs: int) -> None:
    made = list(range(inputs, len(values)))
    model.returns = (made[-1],)
    if len(made) > 2 and rng.random() < 0.3:
        model.form = rng.choice(("tuple", "dict"))
        model.returns = (*rng.sample(made[:-1], rng.randint(1, 2)), made[-1])
