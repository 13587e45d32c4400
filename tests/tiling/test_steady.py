"""Counting leaves out the steps that repeat, and counts what all of them count."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from splitfx.analysis.regions import Edge
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.kernel import KEEP_ALL, Keeping, Stage
from tests import oracle
from tests.tiling.test_schedule import MODELS
from tests.tiling.trial import tile, traced


class Stretched(nn.Module):
    """No two rows of it lie alike between those that they are made of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, size=(307, 18), mode="bilinear", align_corners=True).relu()


NETWORKS = {
    **MODELS,
    "stretched": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Stretched()),
    "waits": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
    ),
}
SCHEDULES = [Schedule(1), Schedule(2, (1, 2, 4)), Schedule(2, (), (1, 3))]
HEIGHTS = [192, 187]  # one at which everything repeats, and one at which much does not


@cache
def tiled(name: str, height: int) -> tuple[Tiled, torch.Tensor]:
    torch.manual_seed(0)
    graph, inputs = traced(NETWORKS[name](), torch.randn(1, 3, height, 18))
    return tile(graph, Schedule()).tiled, oracle.leaves(inputs)[0]


def stage(name: str, height: int, keeping: Keeping = KEEP_ALL) -> Stage:
    module, x = tiled(name, height)
    return Tiled(module.stage, Schedule(keeping=keeping)).program((x,)).stage


def counts(found: Stage, schedule: Schedule, counting: bool) -> tuple[object, ...]:
    scheduler = Scheduler(found, schedule)
    if counting:
        scheduler.count()
    else:
        for _ in scheduler.instructions():
            pass
    held = scheduler.registers
    spent = [(one.peak, pytest.approx(one.cost.seconds), one.cost.fired) for one in scheduler.spent]
    return held.peak, held.live, held.binding, scheduler.calls, spent


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_out_is_counted(name: str, schedule: Schedule, height: int) -> None:
    found = stage(name, height)
    if schedule.tiles != (1, 1) and not found.divides:
        schedule = Schedule(schedule.rows, schedule.firing_intervals)
    assert counts(found, schedule, True) == counts(found, schedule, False)


@pytest.mark.parametrize("keeping", [Keeping(recompute=0), Keeping(spill=0, to="disk")])
@pytest.mark.parametrize("name", ["gates", "norms"])
def test_with_maps_made_again_or_spilled(name: str, keeping: Keeping) -> None:
    found = stage(name, 192, keeping)
    schedule = Schedule(2, keeping=keeping)
    assert counts(found, schedule, True) == counts(found, schedule, False)


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("pause", [4, 16, 48])
def test_a_phase_that_reads_what_waits_in_taller_pieces(pause: int, height: int) -> None:
    """Where a piece ends, rows of two are joined and what is left of one is copied: no row but that one tells."""
    found = stage("waits", height)
    schedule = Schedule(1, (pause,))
    assert counts(found, schedule, True) == counts(found, schedule, False)


def steps(found: Stage, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often groups of kernels are asked whether they can compute something."""
    fired = []
    real = Scheduler._fire_group
    monkeypatch.setattr(Scheduler, "_fire_group", lambda *given: fired.append(1) or real(*given))
    Scheduler(found, Schedule(1)).count()
    return len(fired)


def test_a_map_of_many_rows_costs_no_more_than_one_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (steps(stage("u-net", height), monkeypatch) for height in (256, 512))
    assert many == few


def test_rows_that_do_not_repeat_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = stage("stretched", 192)
    true = counts(found, Schedule(1), False)
    assert counts(found, Schedule(1), True) == true
    monkeypatch.setattr(Edge, "repeats", lambda *_: True)
    with pytest.raises((AssertionError, IndexError)):
        assert counts(found, Schedule(1), True) == true
