"""The budget holds at other sizes: a stage is planned again when it is called with one, once, and stays equal."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.compiler.pipeline import run_pass
from splitfx.frontend.trace import trace
from splitfx.ir.graph import module_of
from splitfx.ir.ops import op_name
from splitfx.passes import Tile
from splitfx.storage import stored
from splitfx.tiling.plan import replan
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run import executor
from splitfx.tiling.run.executor import Tiled
from tests import oracle
from tests.models import Residual, conv_bn, image
from tests.tiling.test_stage import UNet
from tests.tiling.trial import peaks

BUDGET = 400_000


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv_bn(3, 16), Residual(16, 16), Residual(16, 24, 2), nn.Conv2d(24, 4, 1)).eval()


def planned(budget: str, size: tuple[int, int] = (64, 48), **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    graph = trace(body(), image(1, 3, *size))
    return run_pass(graph, Tile(budget=budget, **options))[0], graph


def stage(split: fx.GraphModule) -> Tiled:
    found = [module_of(n) for n in split.graph.nodes if op_name(n) == "tiled"]
    assert len(found) == 1
    assert isinstance(found[0], Tiled)
    return found[0]


@pytest.mark.parametrize("shape", [(1, 3, 128, 96), (2, 3, 64, 48), (1, 3, 33, 127), (3, 3, 40, 30), (1, 3, 9, 7)])
def test_the_budget_holds_at_another_size(shape: tuple[int, ...]) -> None:
    split, graph = planned(f"{BUDGET} B")
    x = image(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predicted, measured = peaks(stage(split), (x,))
    assert predicted <= BUDGET
    assert measured <= BUDGET * 1.02
    with torch.no_grad():
        oracle.assert_equal(split(x), graph(x))


def test_what_only_keeps_its_rows_would_be_over_it() -> None:
    """The sizes of these tests are ones at which the planned schedule itself does not do."""
    split, _ = planned(f"{BUDGET} B")
    assert stage(split).program((image(1, 3, 128, 96),), replan=False).peak > BUDGET


def test_the_traced_size_runs_as_it_was_planned() -> None:
    split, _ = planned(f"{BUDGET} B")
    assert stage(split).program((image(1, 3, 64, 48),)).schedule == stage(split).schedule
    assert stage(split)._schedules == {}


def test_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    split, _ = planned(f"{BUDGET} B")
    asked: list[Any] = []
    honest = replan.replanned

    def counted(graph: fx.GraphModule, specs: Any, goal: Any) -> Schedule:
        asked.append(specs)
        return honest(graph, specs, goal)

    monkeypatch.setattr(executor, "replanned", counted)
    for _ in range(2):
        for size in range(40, 60, 2):  # more sizes than programs are kept
            split(image(1, 3, size, 48))
    assert len(asked) == 10


def test_double_precision_is_another_size() -> None:
    split, graph = planned(f"{BUDGET} B")
    x = image(1, 3, 64, 48).double()
    assert stage(split.double()).program((x,)).peak <= BUDGET
    with torch.no_grad():
        oracle.assert_equal(split(x), graph.double()(x))


def test_a_large_budget_runs_a_small_image_at_once() -> None:
    split, _ = planned(f"{BUDGET} B")
    assert stage(split).program((image(1, 3, 16, 16),)).schedule == Schedule()


def test_beyond_the_budget_it_runs_as_small_as_it_can_and_says_so() -> None:
    split, graph = planned(f"{BUDGET} B")
    x = image(1, 3, 256, 256)
    with pytest.warns(UserWarning, match=r"planned within 400000 B; with inputs of 1x3x256x256 it takes .* the least"):
        found = split(x)
    with torch.no_grad():
        oracle.assert_equal(found, graph(x))
    fresh = trace(body(), x)
    least, _ = run_pass(fresh, Tile(budget="least"))
    assert stage(split).program((x,)).peak == stage(least).program((x,)).peak
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split(x)  # said once


@pytest.mark.parametrize("budget", ["", "least"])
def test_half_and_least_are_those_of_the_size(budget: str) -> None:
    split, graph = planned(budget)
    x = image(1, 3, 160, 128)
    fresh = trace(body(), x)
    there, _ = run_pass(fresh, Tile(budget=budget))
    peak = stage(split).program((x,)).peak
    assert peak <= stage(there).program((x,)).peak * 1.01
    assert peak <= facts(fresh).memory.peak_bytes / 2
    with torch.no_grad():
        oracle.assert_equal(split(x), graph(x))


def test_by_hand_stays_by_hand() -> None:
    split, _ = run_pass(trace(body(), image(1, 3, 64, 48)), Tile(rows=3))
    assert stage(split).program((image(1, 3, 200, 48),)).schedule == stage(split).schedule


def test_a_model_of_two_inputs_and_values_beside_the_stage() -> None:
    """What waits beside the stage is counted against the budget, at the new size too."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = UNet(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(x).flatten(2).cumsum(2).sum() + self.other(y).sum()

    torch.manual_seed(0)
    small = (image(1, 3, 32, 32), torch.randn(500, 4))
    graph = trace(Beside().eval(), small)
    split, _ = run_pass(graph, Tile(budget="least"))
    goal = stage(split).goal
    assert goal is not None
    assert goal.outside >= 500 * 4 * 4
    large = (image(1, 3, 64, 64), torch.randn(500, 4))
    with torch.no_grad():
        oracle.assert_equal(split(*large), graph(*large))


def test_copies_plans_and_stored_programs_keep_the_budget(tmp_path: Path) -> None:
    graph = trace(body(), image(1, 3, 64, 48))
    split, resolved = run_pass(graph, Tile(budget=f"{BUDGET} B"))
    x = image(1, 3, 96, 80)
    wanted = stage(split).program((x,)).schedule
    again, _ = run_pass(graph, resolved)
    plan = splitfx.Plan([Tile(budget=f"{BUDGET} B")], input_shape=(1, 3, 64, 48))
    splitfx.save(splitfx.transform(body(), plan), tmp_path / "split")
    loaded = splitfx.load(tmp_path / "split")
    for other in (again, copy.deepcopy(split), trace(split, image(1, 3, 64, 48)), loaded):
        assert isinstance(other, fx.GraphModule)
        assert stage(other).goal == stage(split).goal
        assert stage(other).program((x,)).schedule == wanted


GOAL = {"budget": "1 MiB", "mode": "auto", "sizes": ((4, 1, 3, 8, 8),), "outside": 0}


@pytest.mark.parametrize(
    "change",
    [{"budget": "many"}, {"budget": 3}, {"mode": "fast"}, {"sizes": 3}, {"sizes": ((True,),)}, {"outside": -1}],
)
def test_a_stored_budget_that_is_none_is_refused(change: dict[str, Any]) -> None:
    assert replan.Goal(**structs.asdict(stored.convert(GOAL, stored.Goal))) == replan.Goal(**GOAL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(change))):
        stored.convert({**GOAL, **change}, stored.Goal)
    with pytest.raises(ValueError, match="unknown field `run`"):
        stored.convert({**GOAL, "run": "os.system"}, stored.Goal)
