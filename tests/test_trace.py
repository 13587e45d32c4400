"""A traced graph is the same function: in eval and train mode, for any batch, copied, moved, in any type."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitfx.frontend import raising
from splitfx.frontend.example_inputs import split_inputs
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info, random_inputs
from tests import oracle
from tests.models import ZOO, image, plain
from tests.traced import doubled, every_model, made, odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


@every_model
def test_eval_output_is_equal(name: str) -> None:
    model, inputs, graph = odd(name, double=True)
    oracle.assert_equal_outputs(graph.eval(), model.eval(), inputs)


@every_model
def test_training_step_is_equal(name: str) -> None:
    model, inputs, graph = odd(name, double=True)
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


def trained_as_plain() -> None:
    """The same of a graph that is traced now, by what a test has put wrong."""
    model, inputs = made("plain")
    oracle.assert_equal_training(trace(model, inputs).train(), model.train(), inputs)


@every_model
def test_any_batch(name: str) -> None:
    model, inputs = made(name)
    args, kwargs = split_inputs(inputs)
    one = torch.utils._pytree.tree_map(lambda t: t[:1], (args, kwargs))  # type: ignore[attr-defined]
    graph = trace(model, one)
    assert info(graph).dynamic in ("all", "batch"), info(graph).notes
    for batch in (1, 3):
        more = random_inputs(graph, seed=batch, batch=batch)
        oracle.assert_equal_outputs(graph.eval(), model.eval(), more)


@every_model
def test_sums_after_copy_and_move(name: str) -> None:
    """deepcopy and .to() keep shared modules and tied weights shared."""
    model, inputs, graph = odd(name)
    graph = copy.deepcopy(graph).to(torch.float64)
    assert len(list(graph.parameters())) == len([p for k, p in model.named_parameters() if k in graph.state_dict()])
    oracle.assert_equal_training(graph.train(), model.double().train(), doubled(inputs))


def test_frozen_norm_keeps_its_statistics() -> None:
    model, inputs = made("frozen_norm")
    oracle.assert_equal_training(trace(model, inputs), model, inputs)


def test_traces_under_no_grad_and_still_trains() -> None:
    model, inputs = made("attention")
    with torch.no_grad():
        graph = trace(model, inputs)
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


def test_frozen_parameters_do_not_bake_a_fast_path() -> None:
    model, inputs = made("attention")
    graph = trace(model.requires_grad_(False), inputs)
    assert not any("transformer" in str(n.target) or "native_multi" in str(n.target) for n in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, inputs = plain()
    model = model.to(dtype)
    oracle.assert_equal_outputs(trace(model, inputs.to(dtype)).eval(), model.eval(), inputs.to(dtype))


def test_grad_mode_is_given_back_under_no_grad() -> None:
    model, inputs = made("no_grad_backbone")
    graph = trace(model, inputs)
    with torch.no_grad():
        assert not graph(inputs).requires_grad
        assert not torch.is_grad_enabled()
    assert graph(inputs).requires_grad


class AlwaysFrozen(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


def test_norm_that_never_switches_stays_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), AlwaysFrozen(4)).double()
    graph = trace(model, image().double())
    oracle.assert_equal_training(graph.train(), model.train(), image().double())


def test_free_height_and_width() -> None:
    model, inputs = ZOO["residual"]()
    graph = trace(model, inputs, dynamic="all")
    assert info(graph).dynamic == "all"
    oracle.assert_equal_outputs(graph.eval(), model.eval(), image(3, 3, 20, 28))


def test_frozen_batch_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising.Raiser, "batch_norm", lambda *_: None)
    with pytest.raises(AssertionError, match="output|buffer"):
        trained_as_plain()


def test_frozen_dropout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raising.Raiser, "dropout", lambda *_: None)
    with pytest.raises(AssertionError):
        trained_as_plain()


@pytest.mark.parametrize("wrong", [lambda y: 2 * y, lambda y: y.roll(1, 1), lambda y: y * 1.01])
def test_the_oracle_sees_a_wrong_output(wrong: Any) -> None:
    y = image()
    with pytest.raises(AssertionError, match="off by"):
        oracle.assert_equal(wrong(y), y)
