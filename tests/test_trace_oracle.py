"""The graph is held to what the model computes: a wrong canonical form is seen, and the first wrong layer is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from splitfx.errors import TraceError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from tests.models import image
from tests.traced import trace_module


class Less(nn.Module):
    """A layer whose arguments must not be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) - x


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), Less(), nn.Conv2d(4, 4, 1), nn.Tanh())


def drop_sigmoid(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if "sigmoid" in n.name)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def swap_less(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if "sub" in n.name)
    node.args = tuple(reversed(node.args))


def double_second(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if n.target == "3")
    with graph.inserting_after(node):
        twice = graph.call_function(torch.mul, (node, 2))
    twice.meta = {"layer": "3"}
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)


def other_size(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if "tanh" in n.name)
    with graph.inserting_after(node):
        flat = graph.call_function(torch.flatten, (node, 1))
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)


def failing(graph: fx.Graph) -> None:
    node = next(n for n in graph.nodes if "tanh" in n.name)
    with graph.inserting_before(node):
        node.args = (graph.call_function(torch.reshape, (node.args[0], (7,))),)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (drop_sigmoid, r"off by .* first layer that differs is 1 \(Sigmoid\)"),
        (swap_less, r"off by .* first layer that differs is 2 \(Less\)"),
        (double_second, r"off by .* first layer that differs is 3 \(Conv2d\)"),
        (other_size, r"output 0 is .* of \(2, 1024\) instead of .* of \(2, 4, 16, 16\)"),
        (failing, "does not run on the example inputs .* It fails in reshape"),
    ],
)
def test_sabotage(wrong: Callable[[fx.Graph], None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = trace_module.canonicalise

    def sabotaged(*given: Any) -> fx.GraphModule:
        graph = real(*given)
        wrong(graph.graph)
        graph.recompile()
        return graph

    monkeypatch.setattr(trace_module, "canonicalise", sabotaged)
    with pytest.raises(TraceError, match=said):
        trace(network(), image())
    trace(network(), image(), verify=False)


class Cheat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y * 2 if torch.compiler.is_exporting() else y


def test_a_model_that_acts_otherwise_while_it_is_traced() -> None:
    with pytest.raises(TraceError, match="off by .* first layer that differs is the model's own forward"):
        trace(Cheat(), image())


class Counting(nn.Module):
    """Keeps an average and counts, in buffers and in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.times = nn.Conv2d(3, 4, 1), None, 0
        self.mean: torch.Tensor
        self.calls: torch.Tensor
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.calls += 1
        self.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return y + self.mean.view(1, -1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_that_move_do_not_move(dtype: torch.dtype) -> None:
    from splitfx import transform
    from splitfx.passes import Group

    counting = Counting()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), counting).to(dtype)
    inputs = image().to(dtype)
    graph = trace(model, inputs)
    assert graph.get_buffer("1.mean") is counting.mean
    split = transform(graph, Group(factors=(1,), fusion="none"))
    assert (int(counting.calls), float(counting.mean.abs().sum())) == (0, 0)
    split(inputs)
    assert int(counting.calls) == 0
    graph(inputs)
    assert int(counting.calls) == 1


def test_a_lost_write_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trace_module.canonicalise

    def without(*given: Any) -> fx.GraphModule:
        graph = real(*given)
        for node in [n for n in graph.graph.nodes if n.op == "get_attr" and "calls" in str(n.target)]:
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.graph.erase_node(user)
        graph.recompile()
        return graph

    monkeypatch.setattr(trace_module, "canonicalise", without)
    with pytest.raises(TraceError, match="buffer calls is '?off|buffer calls"):
        trace(Counting(), image())


class Drawing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() + torch.rand_like(x)


def test_random_numbers_are_the_same_and_given_back() -> None:
    state = torch.random.get_rng_state()
    trace(Drawing(), image().zero_())
    torch.random.set_rng_state(state)
    first = torch.rand(3)
    torch.random.set_rng_state(state)
    trace(Drawing(), torch.zeros(2, 3, 4, 4))
    assert torch.equal(torch.rand(3), first)


class Overwriting(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": x.mul_(2).relu(), "none": None, "word": "w", "n": 3}


def test_inputs_that_are_overwritten_and_outputs_that_are_no_tensors() -> None:
    inputs = image()
    before = inputs.clone()
    graph = trace(Overwriting(), inputs)
    assert torch.equal(inputs, before)
    assert graph(inputs)["word"] == "w"
    assert torch.equal(inputs, before * 2)


def test_under_autocast_and_inference_mode() -> None:
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        graph = trace(model, image())
    assert graph(image()).dtype is torch.float32
    with torch.inference_mode():
        graph = trace(model, image())
    assert graph(image()).requires_grad


def test_half_and_complex_agree() -> None:
    trace(network().to(torch.bfloat16), image().to(torch.bfloat16).requires_grad_())
    assert info(trace(nn.Sequential(nn.Linear(4, 4)).to(torch.complex64), torch.randn(2, 4, dtype=torch.complex64)))
