"""Lists of instructions: what is read is there, what is there is let go, nothing is computed twice without need."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from splitfx.tiling.plan.instructions import Finish, Free, Join, Open, Patch, Reduce, Run, Schedule, Store, Take
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.kernel import Stage
from splitfx.tiling.stage.roles import Kind
from tests import oracle
from tests.tiling.cases import PHASES, RULES, Call
from tests.tiling.test_stage import UNet
from tests.tiling.trial import GRIDS, STREAMS, peaks, tile, traced

MODELS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 5, 3, 2)),
    "u-net": UNet,
    "gates": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), PHASES["two gates"]()),
    "norms": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), PHASES["norms"]()),
    "branches": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), RULES["many users"]()),
    "up": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), RULES["bicubic x1.7"]()),
    "all padding": lambda: nn.Sequential(nn.Conv2d(3, 6, 2, padding=4, stride=3), nn.Conv2d(6, 4, 3, padding=1)),
}
ALL = [(m, s) for m in MODELS for s in [*STREAMS, *([] if m in ("gates", "norms") else GRIDS)]]


@cache
def tiled(name: str) -> tuple[Tiled, torch.Tensor]:
    torch.manual_seed(0)
    graph, inputs = traced(MODELS[name](), torch.randn(2, 3, 23, 18))
    return tile(graph, Schedule()).tiled, oracle.leaves(inputs)[0]


def stage(name: str, schedule: Schedule) -> Stage:
    module, x = tiled(name)
    return Tiled(module.stage, schedule).program((x,)).stage


def reads(one: object) -> tuple[int, ...]:
    if isinstance(one, Reduce):
        return one.srcs
    if isinstance(one, Take | Store):
        return (one.src,)
    if isinstance(one, Join | Run):
        return one.srcs
    return (one.over, *(register for register, _, _ in one.parts)) if isinstance(one, Patch) else ()


@pytest.mark.parametrize(("name", "schedule"), ALL)
def test_registers_are_there_when_read_and_all_let_go(name: str, schedule: Schedule) -> None:
    found = stage(name, schedule)
    counted = Scheduler(found, schedule)
    at_first = counted.registers.live
    there = set(range(len(found.sources)))
    lasting: set[int] = set()
    for one in counted.instructions():
        assert all(r in there or r in lasting for r in reads(one)), one
        if isinstance(one, Run | Patch) and one.over >= 0:
            there.discard(one.over)
        if isinstance(one, Take | Join | Run | Patch | Finish):
            assert one.dst not in there
            there.add(one.dst)
        if isinstance(one, Open):
            assert one.memory not in there
            lasting.add(one.memory)
        if isinstance(one, Free):
            assert set(one.registers) <= there, one
            there -= set(one.registers)
    whole = {k for k in found.exits if k.dims is None}
    maps = {k for k in found.exits if k.dims is not None}
    assert len(there) == len(found.sources) + len(whole), "something is kept for nobody"
    assert counted.registers.live == at_first + sum(k.row_bytes * (k.rows if k in maps else 1) for k in whole | maps)
    assert counted.registers.peak >= counted.registers.live


@pytest.mark.parametrize(("name", "schedule"), [(m, s) for m, s in ALL if s.tiles == (1, 1)])
def test_a_stream_computes_every_row_once(name: str, schedule: Schedule) -> None:
    found = stage(name, schedule)
    done: Counter[object] = Counter()
    for one in Scheduler(found, schedule).instructions():
        if isinstance(one, Run | Patch):
            assert one.rows[0] == done[one.kernel], "rows come in order"
            assert one.rows[1] > one.rows[0]
            done[one.kernel] = one.rows[1]
    for kernel in found.kernels:
        if kernel.kind is Kind.ROWS and (kernel.exit >= 0 or kernel.users):
            assert done[kernel] <= kernel.rows
            assert kernel.exit < 0 or done[kernel] == kernel.rows


@pytest.mark.parametrize(("name", "schedule"), [(m, s) for m, s in ALL if s.tiles != (1, 1)])
def test_tiles_cover_what_the_stage_gives(name: str, schedule: Schedule) -> None:
    found = stage(name, schedule)
    cover = {k: torch.zeros(k.sizes, dtype=torch.int64) for k in found.exits}
    for one in Scheduler(found, schedule).instructions():
        if isinstance(one, Store):
            cover[one.kernel][slice(*one.rows), slice(*one.columns)] += 1
    for kernel, count in cover.items():
        assert count.min() == 1
        assert count.max() == 1 or kernel.users


def test_line_buffers_hold_few_rows() -> None:
    """Ten 3x3 convolutions, one row at a time: two rows of each are kept, however tall the image is."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(10)), nn.Conv2d(4, 1, 1, stride=8))
    held = []
    for height in (64, 256):
        graph, inputs = traced(body, torch.randn(1, 4, height, 32))
        x = oracle.leaves(inputs)[0]
        predicted, measured = peaks(tile(graph, Schedule(1)).tiled, (x,))
        assert predicted == measured
        held.append(predicted - x.numel() * 8 - (height // 8) * 4 * 8)
    assert held[0] == held[1]
    assert held[0] <= 10 * 4 * 4 * 32 * 8


def test_steps_between_firings_make_larger_pieces() -> None:
    found = stage("plain", Schedule(1))
    for every in (1, 2, 4):
        runs = [
            one for one in Scheduler(found, Schedule(1, (every,) * found.groups)).instructions() if isinstance(one, Run)
        ]
        first = [one for one in runs if one.kernel is runs[0].kernel]
        assert len(first) <= -(-23 // every)


def test_a_skip_is_kept_until_it_is_read() -> None:
    """A residual around a deep path holds the rows that the path is behind by, no more."""

    def forward(x: torch.Tensor, a: nn.Module, *path: nn.Module) -> torch.Tensor:
        x = y = a(x)
        for layer in path:
            y = layer(y).relu()
        return F.avg_pool2d(x + y, 8)

    held = []
    for depth in (1, 4):
        layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth)]
        graph, inputs = traced(Call(forward, nn.Conv2d(3, 4, 1), *layers), torch.randn(1, 3, 200, 16))
        predicted, measured = peaks(tile(graph, Schedule(1)).tiled, (oracle.leaves(inputs)[0],))
        assert predicted == measured
        held.append(predicted)
    row = 4 * 16 * 8
    assert held[1] - held[0] <= 3 * 4 * row


def test_grids_keep_nothing_from_tile_to_tile() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(4))
    graph, inputs = traced(body, torch.randn(1, 3, 64, 64))
    x = oracle.leaves(inputs)[0]
    whole, quarters = (peaks(tile(graph, Schedule(0, (), t)).tiled, (x,)) for t in ((1, 1), (2, 2)))
    assert whole[0] == whole[1]
    assert quarters[0] == quarters[1]
    fixed = (x.numel() + 8 * 16 * 16) * 8  # the image and what the stage gives
    assert quarters[0] - fixed < 0.5 * (whole[0] - fixed)
