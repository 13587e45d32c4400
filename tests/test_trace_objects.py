"""A traced graph holds the user's own objects under the user's names, and the model stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitfx.frontend.example_inputs import split_inputs
from splitfx.frontend.trace import private_copy, trace
from tests import oracle
from tests.models import ZOO, plain
from tests.sampled import sampled
from tests.traced import every_model, made, odd, trace_module

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


@every_model
def test_parameters_are_the_users_own(name: str) -> None:
    model, _, graph = odd(name, double=True)
    holds_the_own(model, graph)


def holds_the_own(model: nn.Module, graph: nn.Module) -> None:
    assert set(graph.state_dict()) == set(model.state_dict())
    ours = dict(graph.named_parameters(remove_duplicate=False))
    for key, parameter in model.named_parameters(remove_duplicate=False):
        assert ours[key] is parameter
    for key, buffer in model.named_buffers(remove_duplicate=False):
        assert dict(graph.named_buffers(remove_duplicate=False))[key] is buffer


@every_model
def test_original_checkpoint_loads(name: str) -> None:
    model, inputs, graph = odd(name, double=True)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    graph.load_state_dict(model.state_dict())
    oracle.assert_equal_outputs(graph.eval(), model.eval(), inputs)


@pytest.mark.parametrize("name", sampled(sorted(ZOO), 3))
def test_modes_are_copied_layer_by_layer(name: str) -> None:
    model, graph = traced(name)
    flags = {path: m.training for path, m in model.named_modules()}
    assert graph.training == model.training
    for path, module in graph.named_modules():
        assert module.training == flags.get(path, module.training), path


@pytest.mark.parametrize(("name", "training"), sampled([(n, t) for n in sorted(ZOO) for t in (True, False)], 3))
def test_model_is_untouched(name: str, training: bool) -> None:
    model, inputs = made(name)
    model.train(training)
    calls: list[str] = []
    hooks = [m.register_forward_hook(lambda *_: calls.append("run")) for m in model.children()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    values = copy.deepcopy(model.state_dict())
    given = copy.deepcopy(split_inputs(inputs))
    trace(model, inputs)
    assert snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key]), key
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    oracle.assert_equal(split_inputs(inputs), given)
    assert len(hooks) == len(model._modules) or name == "shared_module"


def traced(name: str) -> tuple[nn.Module, nn.Module]:
    model, inputs = made(name)
    return model, trace(model, inputs)


def snapshot(model: nn.Module) -> Any:
    """Everything of a model that tracing could change, by identity."""

    def one(module: nn.Module) -> Any:
        held = {k: (id(v), getattr(v, "_version", 0)) for k, v in vars(module).items() if not isinstance(v, dict)}
        inner = {k: {n: id(v) for n, v in d.items()} for k, d in vars(module).items() if isinstance(d, dict)}
        return held, inner

    return {path: one(module) for path, module in model.named_modules()}


def test_compiled_model_keeps_its_names() -> None:
    model, inputs = plain()
    assert set(trace(torch.compile(model), inputs).state_dict()) == set(model.state_dict())  # type: ignore[arg-type]


def test_copied_parameters_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "private_copy", lambda m: copy.deepcopy(m).eval())
    with pytest.raises(AssertionError):
        holds_the_own(*traced("plain"))


def test_untied_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def untied(model: nn.Module) -> nn.Module:
        private = private_copy(model)
        private.same.weight = nn.Parameter(private.same.weight.detach().clone())  # type: ignore[union-attr]
        return private

    monkeypatch.setattr(trace_module, "private_copy", untied)
    with pytest.raises(AssertionError):
        holds_the_own(*traced("tied_weights"))


class Listed(nn.Module):
    """Reaches its own weights through a list, a closure, or a function's defaults."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.randn(4, 1, 1))
        if way == "list":
            held = [self.conv.weight, self.conv.bias, self.shift]
            self.program = [held]
            self.call = lambda x, h: self.norm(F.conv2d(x, h[0], h[1])) + h[2]
        elif way == "closure":
            self.program = [lambda x: self.norm(self.conv(x)) + self.shift]
        else:
            self.program = [lambda x, of=self: of.norm(of.conv(x)) + of.shift]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.program[0]
        return self.call(x, first) if isinstance(first, list) else first(x)


@pytest.mark.parametrize("way", ["list", "closure", "default"])
def test_weights_found_by_other_ways_than_their_paths(way: str) -> None:
    model, x = Listed(way), torch.randn(2, 3, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    graph = trace(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "a norm was trained"
    assert {key: id(p) for key, p in graph.named_parameters()} == {key: id(p) for key, p in model.named_parameters()}
    assert dict(graph.named_buffers())["shift"] is model.shift
    oracle.assert_equal_outputs(graph.eval(), model.eval(), x)


def test_a_copy_kept_without_gradients_stays_a_constant() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.kept = [self.fc.weight.detach()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.kept[0], self.fc.bias)

    assert [key for key, _ in trace(Frozen(), torch.randn(2, 4)).named_parameters()] == ["fc.bias"]
