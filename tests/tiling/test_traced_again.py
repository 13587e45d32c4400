"""A tiled graph is traced again, alone or as a part of a larger model: every stage stays one module."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.frontend import canonical
from splitfx.frontend import trace as trace_module
from splitfx.frontend.trace import trace
from splitfx.ir.graph import info
from splitfx.ir.ops import op_name
from splitfx.passes import Tile
from splitfx.tiling.run.executor import Tiled
from tests import oracle
from tests.models import Residual, conv_bn, image
from tests.traced import made_once


class Tail(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).flatten(2).cumsum(2)[:, :, -1])


@made_once
def tiled_body() -> tuple[fx.GraphModule, torch.Tensor]:
    x = image(2, 3, 20, 16).double()
    body = nn.Sequential(conv_bn(3, 8), Residual(8, 8)).double().eval()
    return splitfx.transform(body, Tile(rows=3), x), x


def stages_of(graph: fx.GraphModule) -> list[Tiled]:
    found = [graph.get_submodule(str(n.target)) for n in graph.graph.nodes if op_name(n) == "tiled"]
    return [m for m in found if isinstance(m, Tiled)]


def test_inside_a_larger_model() -> None:
    body, x = tiled_body()
    model = Tail(body).double().eval()
    graph = trace(model, x)
    (stage,) = stages_of(graph)
    assert stage.schedule == stages_of(body)[0].schedule
    assert [op_name(n) for n in graph.graph.nodes if n.op == "call_module"] == ["tiled", "linear"]
    for batch in (1, 2, 5):
        oracle.assert_equal_outputs(graph, model, image(batch, 3, 20, 16).double())


def test_the_parameters_are_the_users_own_and_the_module_is_not() -> None:
    body, x = tiled_body()
    model = Tail(body).double().eval()
    graph = trace(model, x)
    assert {k: id(p) for k, p in graph.named_parameters()} == {k: id(p) for k, p in model.named_parameters()}
    assert stages_of(graph)[0] is not stages_of(body)[0]
    oracle.assert_equal_training(graph, model, x)


def test_modes_follow_the_model() -> None:
    body, x = tiled_body()
    body.train()
    (stage,) = stages_of(trace(body, x))
    assert all(m.training for m in stage.modules())
    assert all(m.training for m in stages_of(body)[0].modules())


@pytest.mark.parametrize("front_end", ["torch.export", "torch.fx.symbolic_trace"])
def test_both_front_ends(front_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, x = tiled_body()
    model = fx.GraphModule(*(lambda m: (m, trace_module._LeafTracer().trace(m)))(Tail(body).double().eval()))
    real, failed = trace_module.private_copy, []

    def broken(model: nn.Module) -> nn.Module:
        if not failed and front_end != "torch.export":
            failed.append(True)
            raise RuntimeError("not today")
        return real(model)

    monkeypatch.setattr(trace_module, "private_copy", broken)
    graph = trace(model, x)
    assert info(graph).front_end == front_end
    assert len(stages_of(graph)) == 1
    oracle.assert_equal_outputs(graph, model, x)


def test_called_twice_it_is_one_module() -> None:
    body, x = tiled_body()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.body(x) + self.body(y).tanh()

    model = Twice().eval()
    graph = trace(model, (x, x.flip(3)))
    first, second = stages_of(graph)
    assert first is second
    oracle.assert_equal_outputs(graph, model, (x, x.flip(3)))


def test_a_part_of_a_model_that_cannot_be_traced_leaves_no_trace() -> None:
    body, x = tiled_body()

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return y if y.sum().item() > 0 else -y

    with pytest.raises(splitfx.TraceError):
        trace(Breaks().eval(), x)
    assert canonical._STAGES == {}
    assert "forward" not in vars(stages_of(body)[0])
    body(x)


def test_a_tiled_graph_is_not_tiled_twice() -> None:
    """What a stage gives is complete at once, and so is all behind it: said, and left as it is."""
    body, x = tiled_body()
    model = nn.Sequential(body, nn.Conv2d(8, 4, 3), nn.ReLU()).double().eval()
    split = splitfx.transform(model, Tile(rows=2), x)
    assert [s.schedule.rows for s in stages_of(split)] == [3]
    assert any("nothing to tile" in n.what for n in splitfx.explain(split).steps[-1].notes)
    oracle.assert_equal_outputs(split, model, x)
