"""Every spatial rule: a piece is what the whole would be there, and holds the bytes that were predicted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.regions import Edge
from splitfx.ir.ops.families import pooling, resizing
from splitfx.tiling.plan.candidates import Candidates
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run import reductions
from splitfx.tiling.run.execution import Execution
from splitfx.tiling.stage.extract import stages
from tests import oracle
from tests.sampled import sampled
from tests.tiling import cases
from tests.tiling.cases import PHASES, RULES, SPLIT
from tests.tiling.trial import GRIDS, STREAMS, STRICT, assert_equal, error, peaks, tile, traced

QUICK = [STREAMS[1], STREAMS[2], GRIDS[0], GRIDS[3]]
X_TALL = (torch.arange(3 * 701 * 11) * 2.0).sin().view(1, 3, 701, 11)  # rows that differ much
EVERYTHING = {**RULES, **PHASES, **SPLIT}


@cache
def case(name: str) -> tuple[fx.GraphModule, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, cases.C, 3, padding=1), EVERYTHING[name]())
    for path, buffer in model.named_buffers():
        if path.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif path.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return traced(model, torch.randn(2, 3, 19, 17))


def schedules(name: str) -> list[Schedule]:
    """A few for every rule; the others change from rule to rule."""
    if name in RULES:
        return [*QUICK, [*STREAMS, *GRIDS][sum(map(ord, name)) % 11]]
    return [STREAMS[1], STREAMS[2], STREAMS[5]]


def divides(graph: fx.GraphModule) -> bool:
    """Tiles of a grid can be computed one by one."""
    known = facts(graph)
    return Candidates(graph, known, stages(graph, known.regions)[0][0]).stage().divides


@pytest.mark.parametrize("name", sampled(EVERYTHING, 3))
def test_pieces_are_exact(name: str) -> None:
    graph, inputs = case(name)
    for schedule in schedules(name):
        trial = tile(graph, schedule if divides(graph) else replace(schedule, rows=schedule.rows or 3, tiles=(1, 1)))
        assert_equal(trial.split, graph, inputs)
    assert (trial.outside == []) == (name not in CUT), f"outside: {trial.outside}"
    if name in PHASES:
        assert "conv2d" in trial.inside


# What reads whole maps; the others in `SPLIT` turned out to need no cut.
UNCUT = """concat of images, max over channels, transposed map, sizes, norm over channels, groups as images, types,
    area, circular, circular pad, normalize, response norm, sum of all, mean over H, mean over W, softmax over W, flip,
    roll, concat of rows, variance, batch statistics, rows sliced, matmul, group norm channels last, linear over W"""
CUT = set(SPLIT) - {*map(str.strip, UNCUT.split(",")), "power pool", "in place, swapped"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_schedule(name: str) -> None:
    graph, inputs = case(name)
    for schedule in [*STREAMS, *(GRIDS if divides(graph) else [])]:
        assert_equal(tile(graph, schedule).split, graph, inputs)


@pytest.mark.parametrize("name", sampled(EVERYTHING, 3))
def test_predicted_bytes_are_held(name: str) -> None:
    """In float32, to the byte but for tables of indices and numbers per channel."""
    graph, inputs = case(name)
    given = tuple(t.float() for t in oracle.leaves(inputs))
    if name == "position":
        return  # the stage reads a table beside the image
    for schedule in [s for s in schedules(name)[:3] if s.tiles == (1, 1) or divides(graph)]:
        predicted, measured = peaks(tile(graph, schedule).tiled.float(), given)
        assert abs(predicted - measured) <= 0.02 * measured + 400, f"{schedule}: {predicted} predicted, {measured} held"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("options", [{"size": (1501, 7)}, {"scale_factor": 1.7}, {"size": (401, 40)}], ids=str)
def test_resizes_round_as_torch_does(mode: str, options: dict[str, Any]) -> None:
    """Far down a map, positions in float32 are off by much more than values are: the model's own are off as well."""
    torch.manual_seed(0)
    graph, inputs = traced(nn.Sequential(nn.Conv2d(3, 4, 1), cases.resize(mode=mode, **options)()), X_TALL)
    split, given = tile(graph, STREAMS[1]).split, [t.float() for t in oracle.leaves(inputs)]
    with torch.no_grad():
        exact = oracle.run(graph, inputs)
        model, found = graph.float()(*given), split.float()(*given)
    assert error(found, model) < 0.1 * error(model.double(), exact)


@pytest.mark.parametrize(
    "name", sampled([n for n in EVERYTHING if not n.startswith("in place")], 3)
)  # which has no gradient, tiled or not
def test_with_gradients(name: str) -> None:
    """Where gradients are wanted nothing may be overwritten, and other code runs; the gradients are the same."""
    graph, inputs = case(name)
    trial = tile(graph, QUICK[0] if name not in RULES or not divides(graph) else QUICK[len(name) % 4])
    assert_equal(trial.split, graph, inputs, grad=True)
    assert_gradients(trial.split, graph, inputs)


def assert_gradients(split: nn.Module, model: nn.Module, inputs: Any) -> None:
    found, wanted = gradients(split, inputs), gradients(model, inputs)
    assert found.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())  # in front of a norm some are zero
    for key, grad in wanted.items():
        assert float((found[key] - grad).abs().max()) <= STRICT * largest, key


def gradients(module: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    x = oracle.leaves(inputs)[0].clone().requires_grad_()
    module.zero_grad()
    total = sum(
        (t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in oracle.leaves(module(x))
    )
    total.backward()  # type: ignore[union-attr]
    named = {path.replace("tiled.stage.", ""): p.grad for path, p in module.named_parameters()}
    return {path: grad for path, grad in {**named, "input": x.grad}.items() if grad is not None}


# ---------------------------------------------------------------- the tests notice


def off(name: str, schedule: Schedule) -> float:
    """How far a case is from the untiled one; infinite where it breaks."""
    graph, inputs = case(name)
    try:
        with torch.no_grad():
            return error(oracle.run(tile(graph, schedule).split, inputs), oracle.run(graph, inputs))
    except (RuntimeError, IndexError, ValueError):
        return float("inf")


def shorten_halos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row that a window reads is replaced by padding."""
    honest = Edge.need

    def short(self: Edge, start: int, stop: int) -> tuple[int, int, int, int]:
        first, last, above, below = honest(self, start, stop)
        return (first, last - 1, above, below + 1) if last - first > 2 else (first, last, above, below)

    monkeypatch.setattr(Edge, "need", short)


def test_sabotage_a_halo_one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert off("conv 3x3", STREAMS[1]) <= STRICT
    shorten_halos(monkeypatch)
    assert off("conv 3x3", STREAMS[1]) > 1e-3
    assert off("conv 3x3", GRIDS[0]) > 1e-3


def test_sabotage_padding_inside_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A halo of zeros, as in approximate tiling."""
    honest = Execution.compute

    def zeroed(self: Execution, one: Any) -> None:
        for register, (first, _) in zip(one.srcs, one.starts, strict=True):
            if first > 0 and self.registers[register].shape[2] > 1:
                self.registers[register] = self.registers[register].clone()
                self.registers[register][:, :, 0] = 0
        honest(self, one)

    monkeypatch.setattr(Execution, "compute", zeroed)
    assert off("conv 3x3", STREAMS[1]) > 1e-3


@pytest.mark.parametrize(("name", "size"), [("avg pool without padding", 9), ("avg pool ceil stride 3", 4)])
def test_sabotage_a_wrong_divisor(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window divided by the size of the kernel."""
    assert off(name, STREAMS[1]) <= STRICT
    monkeypatch.setattr(pooling, "_pads_itself", lambda *_: False)
    assert off(name, STREAMS[1]) <= STRICT, "the other way to the same numbers"
    honest = torch.Tensor.div_
    monkeypatch.setattr(torch.Tensor, "div_", lambda self, by: honest(self, torch.full_like(by, size)))
    assert off(name, STREAMS[1]) > 1e-3


def test_sabotage_rows_let_go_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line buffers that forget the first row that is read again."""
    honest = Edge.first
    monkeypatch.setattr(Edge, "first", lambda self, row: min(self.size, honest(self, row) + 1))
    assert off("conv 3x3", STREAMS[0]) > 1e-3


def test_sabotage_a_resize_that_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinates from the size of the piece."""
    honest = resizing.weighted_taps

    def anew(node: fx.Node, axis: int, count: int, size: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        rows, weights = honest(node, axis, count, size, dtype)
        return rows, weights if axis else np.roll(weights, 1, 1)

    monkeypatch.setattr(resizing, "weighted_taps", anew)
    assert off("bilinear up", STREAMS[1]) > 1e-3


def test_sabotage_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics without what the tiles differ by."""
    honest = reductions._Moments.joined

    def careless(self: Any, a: Any, b: Any, count: int) -> Any:
        return honest(self, a, b, count)[0], a[1] + b[1]

    assert off("instance norm", STREAMS[1]) <= STRICT
    monkeypatch.setattr(reductions._Moments, "joined", careless)
    assert off("instance norm", STREAMS[1]) > 1e-3
