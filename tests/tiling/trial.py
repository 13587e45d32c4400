"""A model tiled by hand, and how far it is from the untiled one: what all tests of tiling share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.live import LiveStorage
from splitfx.frontend.trace import trace
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph
from splitfx.ir.ops import is_size, op_name
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.stage.kernel import Keeping
from tests import oracle

STRICT = oracle.STRICT
STREAMS = [
    Schedule(1),
    Schedule(2),
    Schedule(3, (2, 1, 3)),
    Schedule(5, (1, 2)),
    Schedule(100),
    Schedule(2, (1, 1, 4, 1, 2), keeping=Keeping(recompute=0.0)),
]
GRIDS = [
    Schedule(0, (), (2, 2)),
    Schedule(0, (), (1, 3)),
    Schedule(0, (), (3, 1)),
    Schedule(2, (), (1, 2)),
    Schedule(1, (2,), (2, 3)),
]


@dataclass
class Trial:
    """A traced model with its first stage tiled."""

    graph: fx.GraphModule
    split: fx.GraphModule
    tiled: Tiled
    inside: list[str]  # operations of the stage
    outside: list[str]

    @property
    def phases(self) -> int:
        return next(iter(self.tiled._programs.values())).stage.phases


def operations(nodes: Iterable[fx.Node]) -> list[str]:
    return [op_name(n) for n in nodes if n.op in ("call_module", "call_function") and not is_size(n)]


def tile(graph: fx.GraphModule, schedule: Schedule) -> Trial:
    split = copy_graph(graph)
    found, _ = stages(split, facts(split).regions)
    assert found, "no stage"
    nodes = set(found[0])
    outside = operations(n for n in split.graph.nodes if n not in nodes)
    inside = operations(found[0])
    call = install(split, found[0], schedule)
    tidy(split)
    tiled = split.get_submodule(str(call.target))
    assert isinstance(tiled, Tiled)
    return Trial(graph, split, tiled, inside, outside)


def traced(model: nn.Module, inputs: Any) -> tuple[fx.GraphModule, Any]:
    """The model's graph and its inputs, in float64."""
    from tests.passes.test_contract import Doubler

    model = model.double().eval()
    inputs = oracle.run(Doubler(), inputs)
    return trace(model, inputs), inputs


def error(got: Any, expected: Any) -> float:
    """The largest difference of any tensor, relative to the largest value of it."""
    ours, theirs = oracle.leaves(got), oracle.leaves(expected)
    assert len(ours) == len(theirs)
    tensors = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(b, torch.Tensor)]
    return max((oracle.error(a, b) for a, b in tensors), default=0.0)


def assert_equal(split: nn.Module, model: nn.Module, inputs: Any, grad: bool = False) -> None:
    with torch.set_grad_enabled(grad):
        off = error(oracle.run(split, inputs), oracle.run(model, inputs))
    assert off <= STRICT, f"off by {off:.1e}"


def peaks(tiled: Tiled, inputs: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    """(predicted, measured) bytes of a stage, inputs counted and parameters not."""
    state = [*tiled.parameters(), *tiled.buffers()]
    with torch.no_grad():
        tiled(*inputs)  # what is made once, such as tables, is there
        with LiveStorage(counted=inputs, state=state) as watch:
            tiled(*inputs)
            measured = watch.peak
    return tiled.program(inputs).peak, measured
