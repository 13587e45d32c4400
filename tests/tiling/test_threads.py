"""One tiled model in many threads, in every mode that belongs to a thread, and in forked processes."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.passes import Group, Tile
from splitfx.tiling.run.executor import Tiled
from tests import oracle

THREADS = 8


def network(width: int = 8) -> nn.Module:
    """Every sort of kernel that keeps something: tables of a resize, statistics of a norm, divisors of a pool."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.GroupNorm(2, width),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.Conv2d(width, width, 3, stride=2),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.Conv2d(width, 4, 3, padding=1),
    ).eval()


@cache
def pair() -> tuple[nn.Module, fx.GraphModule]:
    """The model, and the model tiled: to be copied, so that nothing has been planned yet."""
    model = network()
    return model, splitfx.transform(model, Tile(budget="260 KiB"), torch.randn(1, 3, 32, 32))


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that all begin at the same time, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def checked(split: nn.Module, model: nn.Module, x: torch.Tensor, mode: Any = torch.no_grad) -> None:
    with mode():
        got, wanted = split(x), model(x)
    assert type(got) is torch.Tensor
    oracle.assert_equal(got.detach(), wanted.detach())


# ---------------------------------------------------------------- threads


@pytest.mark.filterwarnings("ignore:the tiled stage was planned within")
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_eight_threads_at_new_sizes_and_at_equal_ones(mode: Any) -> None:
    model, tiled = pair()
    split = copy.deepcopy(tiled)
    for around in range(2):
        sizes = [(16 + 2 * i, 18 + 2 * around) for i in range(THREADS // 2)] * 2
        together([lambda hw=hw: checked(split, model, image(*hw), mode) for hw in sizes])
    checked(split, model, image(16, 18))
    checked(split, model, image(32, 32))


def test_nothing_is_put_into_the_layers_while_others_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, memory and the oracle work on twins: weights, modes and hooks of the user's layers stay what they are."""
    model = network()
    graph = splitfx.trace(model, image(32, 32))
    graph.train()
    told: list[str] = []
    for layer in graph.children():
        layer.register_forward_hook(lambda layer, given, found: told.append(type(layer).__name__))
    mine = {id(p) for p in graph.parameters()}
    seen = 0
    called = nn.Module.__call__

    def watching(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        assert {id(p) for p in graph.parameters()} == mine
        assert all(m.training for m in graph.modules())
        return called(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", watching)
    from splitfx.analysis.oracle import run_exact

    run_exact(graph, [image(32, 32).double()])
    assert facts(graph).memory.peak_bytes > 0
    assert seen > 10
    assert told == []


def test_facts_profiles_and_transforms_in_many_threads_while_the_graph_runs() -> None:
    model = network()
    x = image(32, 32)
    graph = splitfx.trace(model, x)
    stop = threading.Event()

    def keep_calling() -> None:
        while not stop.is_set():
            checked(graph, model, x)

    def twice(call: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [call(), call()]

    caller = ThreadPoolExecutor(1).submit(keep_calling)
    try:
        found = together(
            [
                *[twice(lambda: facts(graph).memory.peak_bytes)] * 2,
                *[twice(lambda: splitfx.profile(graph).peak_bytes)] * 2,
                *[lambda: splitfx.profile(model, x).peak_bytes],
                *[lambda: [splitfx.transform(graph, Tile(rows=8))]] * 2,
                lambda: [splitfx.transform(graph, Group(factors=(1, 2)))],
            ]
        )
    finally:
        stop.set()
    caller.result()
    numbers = {n for one in found[:4] for n in one} | {found[4]}
    assert numbers == {facts(graph).memory.peak_bytes}
    for split in (found[5][0], found[6][0]):
        checked(split, model, x)


def test_gradients_of_threads_add_up() -> None:
    """Backward passes of a checkpointed stage in several threads at once, as in Hogwild."""
    model = network()
    split = splitfx.transform(model, Tile(rows=8, checkpoint=True), image(32, 32))
    images = [image(16 + 2 * (i % 2), 20) for i in range(THREADS)]
    together([lambda x=x: split(x).square().sum().backward() for x in images])
    for x in images:
        model(x).square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    found = {name.removeprefix("tiled.stage."): p.grad for name, p in split.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        oracle.assert_equal(found[name], grad)


def test_a_copy_and_a_folder_of_a_model_that_is_running(tmp_path: Path) -> None:
    model, tiled = pair()
    split, stop = copy.deepcopy(tiled), threading.Event()

    def keep_planning(column: int) -> None:
        height = 16
        while not stop.is_set() and height < 400:
            checked(split, model, image(height, 18 + column))
            height += 2

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(keep_planning, 2 * i) for i in range(2)]
        try:
            for number in range(5):
                checked(copy.deepcopy(split), model, image(20, 20))
                splitfx.save(split, tmp_path / str(number))
        finally:
            stop.set()
        for one in running:
            one.result()
    checked(splitfx.load(tmp_path / "4"), model, image(20, 20))


FORK = """
import os, sys, threading
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.tiling.test_threads import checked, image, pair
model, split = pair()
checked(split, model, image(20, 20))
stop = threading.Event()
def plan(height):
    while not stop.is_set():
        checked(split, model, image(height, 18))
        height += 2
threads = [threading.Thread(target=plan, args=(n,)) for n in (22, 23)]
for one in threads: one.start()
wrong = 0
for number in range(6):
    child = os.fork()
    if not child:
        try:
            checked(split, model, image(20, 20))
            checked(split, model, image(40 + number, 24))
        except BaseException as error:
            print("child", type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    wrong += os.waitpid(child, 0)[1] != 0
stop.set()
for one in threads: one.join()
print("wrong", wrong)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_fork_while_the_parent_plans() -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-W", "ignore", "-c", FORK.format(root=root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root)
    assert done.stdout.split()[-2:] == ["wrong", "0"], done.stdout + done.stderr[-2000:]


# ---------------------------------------------------------------- modes that belong to a thread


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_is_made_in_a_mode_serves_outside_of_it(mode: Any) -> None:
    """Graphs, plans, tables and weights made in inference mode train; under autocast nothing is traced in bfloat16."""
    model = network()
    with mode():
        split = splitfx.transform(model, Tile(rows=8), image(32, 32))
        split(image(20, 20))
    assert not any(p.is_inference() for p in split.parameters())
    x = image(20, 20).requires_grad_()
    checked(split, model, x, torch.enable_grad)
    split(x).square().sum().backward()
    assert all(p.grad is not None for p in split.parameters())


def bodies() -> Iterator[tuple[str, nn.Module]]:
    torch.manual_seed(0)
    yield "conv, group norm", nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    yield "instance norm, transposed", nn.Sequential(nn.InstanceNorm2d(8), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1))
    yield "resize", nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    yield "resize at the end", nn.Upsample(scale_factor=1.5, mode="bicubic")
    yield "pools", nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Softmax(1))
    yield "adaptive pool", nn.Sequential(nn.AdaptiveAvgPool2d((5, 7)), nn.Conv2d(8, 4, 1))
    yield "pad, shuffle", nn.Sequential(nn.ReflectionPad2d(1), nn.PixelShuffle(2), nn.PReLU())
    yield "classifier", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    yield "gate", Gate(8)


class Gate(nn.Module):
    """A residual of one type and a map of another: what may be overwritten differs under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float() * 2
        y = self.conv(x)
        return x + y * self.down(y.mean((2, 3), keepdim=True)).sigmoid()


BODIES = dict(bodies())


@pytest.mark.parametrize("name", BODIES)
def test_autocast_gives_the_types_of_the_model(name: str) -> None:
    x = image(24, 22)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), BODIES[name]).eval()
    split = splitfx.transform(model, Tile(rows=4), x)
    graph = splitfx.trace(model, x)
    grid = splitfx.transform(model, Tile(grid=(2, 2)), x) if name in ("pools", "pad, shuffle") else split
    assert any(isinstance(m, Tiled) for m in split.modules())
    for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
        for enabled in (True, False, True):
            with context, torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", torch.bfloat16, enabled):
                wanted = model(x)
                for one in (split, graph, grid):
                    got = one(x)
                    assert got.dtype == wanted.dtype
                    near(got, wanted, torch.bfloat16 if enabled else torch.float32)


def near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Alike as far as numbers of this type can be: results may be wider than what they were computed from."""
    assert oracle.error(got.detach(), wanted.detach()) <= oracle.TOLERANCE[dtype]


def test_autocast_of_a_checkpointed_stage_and_of_branches() -> None:
    model, x = network(), image(32, 32)
    checkpointed = splitfx.transform(model, Tile(rows=8, checkpoint=True), x)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = checkpointed(x), model(x)
    assert got.dtype == wanted.dtype
    near(got, wanted, torch.bfloat16)
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in checkpointed.parameters())
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).eval()
    for lowering in ("grouped", "branches"):
        group = splitfx.transform(plain, Group(factors=(2,), lowering=lowering), x)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert group(x).dtype == plain(x).dtype
