"""One canonical graph, whatever it came from: traced again, by either front end, as text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.ir.ops import text
from tests import oracle
from tests.models import ZOO
from tests.traced import every_model, made, odd, trace_module

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once

GOLDENS = Path(__file__).with_name("goldens")


def test_graph_module_of_the_user() -> None:
    model, inputs = made("residual")
    graph = trace(torch.fx.symbolic_trace(model), inputs)
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


def test_symbolic_trace_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch.export fails at first, the second front end gives the same canonical graph."""
    model, inputs = made("plain")
    expected = text(trace(model, inputs))

    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no private copy today")

    real = trace_module.private_copy
    monkeypatch.setattr(trace_module, "private_copy", broken)
    monkeypatch.setattr(trace_module, "symbolic_copy", lambda m: torch.fx.symbolic_trace(real(m)).eval())
    graph = trace(model, inputs)
    assert info(graph).front_end == "torch.fx.symbolic_trace"
    assert text(graph) == expected
    oracle.assert_equal_training(graph.train(), model.train(), inputs)


@every_model
def test_retrace_is_equal(name: str) -> None:
    model, inputs, first = odd(name, double=True)
    second = trace(first, inputs)
    assert text(second) == text(first)
    a, b = info(first), info(second)
    for field in (
        "inputs",
        "model_class",
        "front_end",
        "dynamic",
        "notes",
        "train_only",
        "untouched",
        "aliases",
    ):
        assert getattr(a, field) == getattr(b, field), field
    layers = [[n.meta.get("layer") for n in g.graph.nodes if n.op == "call_function"] for g in (first, second)]
    assert layers[0] == layers[1]
    oracle.assert_equal_training(second.train(), model.train(), inputs)


@pytest.mark.parametrize("name", ["residual", "in_place_read_again"])
def test_text_is_golden(name: str) -> None:
    """SPLITFX_GOLDENS=1 writes the files anew; read the difference before committing it."""
    path, now = GOLDENS / f"trace_{name}.txt", text(trace(*ZOO[name]()))
    if os.environ.get("SPLITFX_GOLDENS"):
        path.write_text(now)
    assert path.read_text() == now
