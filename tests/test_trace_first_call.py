"""What a model makes when it first runs is made on a copy; what its calls leave behind is left as the user has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from splitfx.errors import TraceError
from splitfx.frontend.first_call import first_call, own_copy
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from tests import oracle
from tests.models import image
from tests.traced import notes


class Table(nn.Module):
    """Makes a table when it first runs, as an attribute, in a dict, or as a buffer, and counts its calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind, self.times, self.tables = nn.Conv2d(3, 4, 1), kind, 0, {}
        self.table: Any = None
        if kind == "buffer":
            del self.table
            self.register_buffer("table", None, persistent=False)
        if kind == "filled":
            del self.table
            self.register_buffer("table", torch.zeros(16))
        self.ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.times += 1
        values = lambda: torch.from_numpy(torch.linspace(0, 1, int(y.shape[-1])).numpy()).to(y.dtype)  # noqa: E731
        if self.kind == "dict":
            if "width" not in self.tables:
                self.tables["width"] = values()
            return y + self.tables["width"]
        if not self.ready:
            if self.kind == "filled":
                self.table.copy_(values())
            else:
                self.table = values()
            self.ready = True
        return y + self.table


@pytest.mark.parametrize("kind", ["attribute", "dict", "buffer", "filled"])
def test_what_the_first_call_makes(kind: str) -> None:
    model = Table(kind)
    graph = trace(model, image())
    assert (model.times, model.ready, model.tables) == (0, False, {})
    assert model.table is None or float(model.table.abs().sum()) == 0
    assert "made in the first call" in notes(graph)
    oracle.assert_equal_outputs(graph, model, image(3, 3, 16, 16))
    assert info(graph).dynamic in ("all", "batch")


class Hooking(nn.Module):
    """Puts hooks on its layers when it first runs, and lists them; the hooks double what the layers return."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind, self.ready = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), kind, False
        self.handles: list[Any] = []
        self.listed: list[nn.Module] = []

    def doubled(self, _layer: nn.Module, _given: Any, result: torch.Tensor) -> torch.Tensor:
        return result + self.first.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain = lambda _layer, _given, result: 2 * result  # noqa: E731
        hook = {"method": self.doubled, "partial": partial(plain)}.get(self.kind, plain)
        if not (self.handles if self.kind == "handle" else self.ready):
            self.handles = [layer.register_forward_hook(hook) for layer in (self.first, self.second)]
            if self.kind != "handle":
                self.handles = []
            self.ready = True
            self.listed = [self.first, self.second]
        for layer in self.listed:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["function", "method", "partial", "handle"])
def test_hooks_and_lists_of_layers_made_in_the_first_call(kind: str) -> None:
    model = Hooking(kind).eval()
    graph = trace(model, image())
    assert not model.ready
    assert not model.first._forward_hooks
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    assert "hooks" not in notes(graph)
    oracle.assert_equal_outputs(graph, model, image(3, 3, 16, 16))
    oracle.assert_equal_outputs(trace(model, image()), model, image(3, 3, 16, 16))  # hooked by now


def test_hooks_that_every_call_puts_and_takes_are_left() -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for table in (self.conv._forward_hooks, self.conv._forward_hooks_with_kwargs):
                table.clear()
            self.conv.register_forward_hook(lambda *given: torch.mul(given[-1], 2))
            return self.conv(x)

    model = Passing()
    assert first_call(own_copy(model), ((image(),), {})).made == {}
    oracle.assert_equal_outputs(trace(model, image()), model, image())


def test_what_calls_change_is_left() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.times = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.times += 1
            self.seen = [x.sum()]
            return x * self.times

    model = Keeping()
    found = first_call(own_copy(model), ((image(),), {}))
    assert found.made == {}
    assert (model.times, model.seen) == (0, [])


class Grows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "conv"):
            self.conv = nn.Conv2d(3, 4, 1)
        return self.conv(x)


def test_weights_made_in_the_first_call_are_refused() -> None:
    model = Grows()
    with pytest.raises(TraceError, match=r"layers or parameters in its first call \(conv"):
        trace(model, image())
    assert not list(model.children())
    model(image())
    trace(model, image())
    with pytest.raises(TraceError, match=r"0 \(LazyConv2d\) has no weights before its first call"):
        trace(nn.Sequential(nn.LazyConv2d(4, 1)), image())


def test_torchscript_is_named() -> None:
    with pytest.raises(TraceError, match=r"0 \(Conv2d\) is TorchScript, made by torch.jit.script"):
        trace(nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), image())
    with pytest.raises(TraceError, match=r"the model \(Conv2d\) is TorchScript, made by torch.jit.trace"):
        trace(torch.jit.trace(nn.Conv2d(3, 4, 1), image()), image())  # type: ignore[arg-type]


def test_old_weight_norm() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU()).eval()
    model(image())
    oracle.assert_equal_outputs(trace(model, image()), model, image())
