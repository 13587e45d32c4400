"""The planner: budgets as words, what it predicts is what is held, the least is least, time is traded for bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ground.amounts import bytes_text, parse_bytes
from splitfx.tiling.plan import planner
from splitfx.tiling.plan.planner import Candidates, Point, Schedule, front
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.stage.kernel import Keeping
from tests.tiling.cases import PHASES
from tests.tiling.test_stage import UNet
from tests.tiling.trial import peaks


def body() -> nn.Module:
    torch.manual_seed(0)
    conv = lambda i, o, s=1: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.ReLU())  # noqa: E731
    layers = [conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32, 2), conv(32, 48)]
    return nn.Sequential(*layers, nn.Conv2d(48, 4, 1))


MODELS: dict[str, Any] = {
    "chain": body,
    "u-net": UNet,
    "gate": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), PHASES["two gates"](), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@cache
def candidates(name: str) -> Candidates:
    graph = trace(MODELS[name]().eval(), torch.randn(1, 3, 96, 80))
    known = facts(graph)
    return Candidates(graph, known, stages(graph, known.regions)[0][0])


def held(name: str, schedule: Schedule) -> int:
    """Bytes that the stage holds under a schedule, followed tensor by tensor."""
    found = candidates(name)
    graph: fx.GraphModule = trace(MODELS[name]().eval(), torch.randn(1, 3, 96, 80))
    nodes = stages(graph, facts(graph).regions)[0][0]
    tiled: Any = graph.get_submodule(str(install(graph, nodes, schedule).target))
    assert len(nodes) == len(found.nodes)
    return peaks(tiled, (torch.randn(1, 3, 96, 80),))[1]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64 MiB", 2**26),
        ("1.5GiB", 3 * 2**29),
        ("100 kb", 100_000),
        ("12 B", 12),
        (" 2 mib ", 2**21),
        ("3 GB", 3 * 10**9),
    ],
)
def test_budgets(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text", ["64", "MiB", "many", "-3 MiB", "0 MiB", "0.1 B", "1e3 MiB", "64 MiBs", "nan MiB", "5 TiBit"]
)
def test_bad_budgets(text: str) -> None:
    with pytest.raises(PlanError, match="budget"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1 B"), (1023, "1023 B"), (1280, "1.25 KiB"), (14 << 20, "14 MiB"), ((14 << 20) + 1, "14680065 B"),
     (3 << 29, "1.5 GiB"), (2_000_000, "2000000 B"), ((1 << 50) + (1 << 28), "1048576.25 GiB")],
)  # fmt: skip
def test_bytes_are_read_as_they_were_written(count: int, text: str) -> None:
    assert bytes_text(count) == text
    assert parse_bytes(text) == count


# ---------------------------------------------------------------- what is planned


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_held(name: str) -> None:
    for point in (planner.least(candidates(name)).point, *candidates(name).curve()[:3]):
        if point.schedule is not None:
            assert abs(held(name, point.schedule) - point.peak_bytes) <= 0.02 * point.peak_bytes + 600


@pytest.mark.parametrize("name", MODELS)
def test_the_least_is_less(name: str) -> None:
    least = planner.least(candidates(name))
    before = candidates(name).untiled()
    given = 3 * 96 * 80 * 4
    assert least.point.peak_bytes - given < (before.peak_bytes - given) / {"chain": 3, "u-net": 2, "gate": 1.4}[name]
    assert least.before == before


def test_budgets_are_kept_and_less_costs_more_time() -> None:
    found, seconds = candidates("chain"), []
    before, least = found.untiled().peak_bytes, planner.least(found).point.peak_bytes
    for share in (0.7, 0.4, 0.2, 0.05):
        budget = int(least + share * (before - least))
        plan = planner.plan(found, budget)
        assert plan.schedule is not None
        assert plan.point.peak_bytes <= budget
        seconds.append(plan.point.seconds)
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", MODELS)
def test_every_budget_from_a_tenth_above_the_least_gets_a_plan(name: str) -> None:
    found = candidates(name)
    least, before = planner.least(found).point.peak_bytes, found.untiled().peak_bytes
    budgets = [int(least * share) for share in (1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)]
    assert budgets[1] < before
    for budget in budgets:
        plan = planner.plan(found, budget)
        assert plan.point.peak_bytes <= budget
        assert (plan.schedule is None) == (before <= budget)


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5 * 2**20 + 1, 2**30 - 1, 2**30, 123_456_789_123])
def test_a_budget_in_words_is_never_below_the_figure(count: int) -> None:
    assert count <= parse_bytes(planner.enough(count)) <= count * 1.01 + 11


def test_a_budget_that_is_kept_already_tiles_nothing() -> None:
    plan = planner.plan(candidates("chain"), 10**9)
    assert plan.schedule is None
    assert "left as it is" in plan.words()


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_that_cannot_be_met_says_what_can(name: str) -> None:
    with pytest.raises(PlanError, match=r"cannot be met: the least is [\d.]+ KiB, reached at \S+"):
        planner.plan(candidates(name), 1000)


def test_half_or_the_least() -> None:
    found = candidates("chain")
    assert planner.half(found, 1000).point == planner.least(found).point
    enough = found.untiled().peak_bytes // 2
    assert planner.half(found, enough).point.peak_bytes <= enough


def test_plans_are_deterministic() -> None:
    candidates.cache_clear()
    first = planner.least(candidates("u-net"))
    candidates.cache_clear()
    assert planner.least(candidates("u-net")) == first


def test_grids() -> None:
    point = planner.least(candidates("chain"), "grid").point
    assert point.schedule is not None
    assert point.schedule.rows == 0
    assert point.peak_bytes < candidates("chain").untiled().peak_bytes


def test_a_grid_over_a_reduction_is_refused() -> None:
    with pytest.raises(PlanError, match="reduction over the map"):
        planner.least(candidates("gate"), "grid")


def test_the_front_holds_what_nothing_beats() -> None:
    points = [Point(b, s, None, "") for b, s in ((5, 1.0), (1, 9.0), (3, 3.0), (3, 4.0), (4, 3.0), (2, 9.0))]
    assert [(p.peak_bytes, p.seconds) for p in front(points)] == [(1, 9.0), (3, 3.0), (5, 1.0)]


def test_wide_images_are_cut_into_bands() -> None:
    """Where one row of everything is too much, column bands go below it."""
    graph = trace(body().eval(), torch.randn(1, 3, 48, 640))
    known = facts(graph)
    found = Candidates(graph, known, stages(graph, known.regions)[0][0])
    strips = min(found.point(Schedule(1, (), t)).peak_bytes for t in ((1, 1),))
    assert found.bands(found.point(Schedule(1))).peak_bytes < strips


class TwoMaps(nn.Module):
    """Two maps of one size wait for a mean: one of them takes far less to make again."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy, self.light = nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.heavy(x), self.light(x)
        mean = (a + b).mean((2, 3), keepdim=True)
        return a * mean, b * mean


def test_what_is_planned_is_what_runs() -> None:
    """Which maps are made again is decided alike by the planner and by the stage that runs."""
    x = torch.randn(1, 3, 96, 80)
    graph = trace(TwoMaps().eval(), x)
    known = facts(graph)
    nodes = stages(graph, known.regions)[0][0]
    keeping = Keeping(recompute=8 * 96 * 80 * 4)  # room for one of them
    planned = Candidates(graph, known, nodes)
    tiled: Any = graph.get_submodule(str(install(graph, nodes, Schedule(4, keeping=keeping)).target))
    ran = tiled.program((x,))
    assert [k.name for k in ran.stage.kernels if k.again] == ["light"]
    assert [(k.name, k.again) for k in planned.stage(keeping).kernels] == [(k.name, k.again) for k in ran.stage.kernels]
    assert ran.peak == planned.point(Schedule(4, keeping=keeping)).peak_bytes - planned.outside
