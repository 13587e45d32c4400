"""The carved tree on processes and streams: who runs what, equal outputs, ranks that die, hang or differ."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import splitfx
from splitfx.errors import UnsupportedError
from splitfx.parallel import ParallelError, Ranks, Streams, place, placement
from splitfx.parallel import __main__ as command
from splitfx.parallel.placement import spread
from splitfx.splitnet.tree import STEM, Tree
from tests.splitnet.carved import EXACT, FLAT, NESTED, Chain, carved, image, off, wide

TIMEOUT = 3.0


@pytest.fixture(scope="module")
def nested() -> fx.GraphModule:
    return carved(wide(), NESTED, ragged=True)


# ---------------------------------------------------------------- placement


def test_groups_are_placed_by_what_they_cost_with_their_trunks(nested: fx.GraphModule) -> None:
    tree = Tree(nested)
    cost = lambda own: sum(p.macs for p in tree.parts if set(p.groups) & set(own))  # noqa: E731
    found = place(tree, 2, stem="duplicate")
    ways = [
        tuple(tuple(g for g in range(4) if way[g] == r) for r in (0, 1)) for way in itertools.product((0, 1), repeat=4)
    ]
    assert found.macs == tuple(map(cost, found.groups))
    assert max(found.macs) == min(max(map(cost, way)) for way in ways if all(way))
    assert found.bytes == sum(len(tree.classes[g]) for g in found.groups[1]) * 2 * 8  # batch 2, float64
    assert "stem on every rank" in str(found)
    equal = spread(4, 2, lambda own: len(own) + 2 * len({g // 2 for g in own}))  # two trunks, each worth two branches
    assert equal == ((0, 1), (2, 3))
    assert [len(own) for own in place(tree, 4).groups] == [1] * 4
    assert place(tree, 1).groups == ((0, 1, 2, 3),)


@pytest.mark.parametrize("work", [(5, 1, 1, 1), (3, 3, 2, 2, 2), (7, 1, 6, 2, 5, 3), (4, 4, 4)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_are_spread_as_evenly_as_can_be(work: tuple[int, ...], ranks: int) -> None:
    """Against all ways, without trunks: at most a third above the best, which is the bound of largest-first."""
    cost = lambda own: sum(work[g] for g in own)  # noqa: E731
    found = spread(len(work), ranks, cost)
    assert sorted(g for own in found for g in own) == list(range(len(work)))
    assert len(found) == ranks
    assert all(found)
    ways = (w for w in itertools.product(range(ranks), repeat=len(work)) if len(set(w)) == ranks)
    best = min(max(sum(c for c, r in zip(work, way, strict=True) if r == one) for one in range(ranks)) for way in ways)
    assert max(map(cost, found)) <= best * 4 / 3


def test_the_estimate_chooses_between_the_two_ways(nested: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(nested)
    assert place(tree, 3).stem == "duplicate"  # one call at a time: another rank only adds a transfer
    monkeypatch.setattr(placement, "MACS_PER_BYTE", 0.0)
    apart = place(tree, 3, pipelined=True)
    assert apart.stem == "own"  # sending costs nothing, and the stem is most of the work
    assert apart.groups[0] == ()
    stem = next(p for p in tree.parts if p.name == STEM)
    assert apart.macs[0] == stem.macs == apart.cost
    monkeypatch.setattr(placement, "MACS_PER_BYTE", 1e6)
    assert place(tree, 3, pipelined=True).stem == "duplicate"


def test_refused_placements(nested: fx.GraphModule) -> None:
    tree = Tree(nested)
    assert place(tree, 5, stem="own").groups[0] == ()
    for ranks, stem in ((5, "duplicate"), (6, "auto"), (6, "own"), (0, "auto")):
        with pytest.raises(UnsupportedError, match=f"{ranks} processes for 4 groups: start 1 to 4, or 5"):
            place(tree, ranks, stem=stem)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="at least 2 processes"):
        place(tree, 1, stem="own")
    with pytest.raises(UnsupportedError, match="not 'both'"):
        place(tree, 2, stem="both")  # type: ignore[arg-type]


# ---------------------------------------------------------------- ranks


def started(size: int, job: Callable[[int], Any], folder: Path, patience: float = 60.0) -> list[Any]:
    """What ``job(rank)`` returns on ``size`` forked ranks as torchrun would number them; None where one died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        (folder / f"{rank}.json").write_text(json.dumps(job(rank)))
        os._exit(0)

    context = multiprocessing.get_context("fork")  # the carved model is there already
    ranks = [context.Process(target=main, args=(r,)) for r in range(size)]
    for one in ranks:
        one.start()
    end = time.monotonic() + patience
    for one in ranks:
        one.join(max(end - time.monotonic(), 0.1))
    alive = [r for r, one in enumerate(ranks) if one.is_alive()]
    for one in ranks:
        if one.is_alive():
            one.kill()
            one.join()
    files = [folder / f"{r}.json" for r in range(size)]
    found = [json.loads(f.read_text()) if f.exists() and f.read_text() else None for f in files]
    return [*found, alive]


def test_two_ranks_give_what_the_model_gives(nested: fx.GraphModule, tmp_path: Path) -> None:
    batches = [image(), image(5), -image()]
    wanted = [nested(x).detach() for x in batches]

    def job(rank: int) -> Any:
        with Ranks(nested, timeout=30, gather="first") as first:
            one = [first(x) for x in batches[:2]]
            many = list(first.stream(batches))
            wrong = first.exchange([p.roll(1, 1) for p in first.pieces(batches[0])])  # sabotage: rolled classes
            held = first.placement.groups
        if rank:
            return {"none": all(o is None for o in (*one, *many, wrong)), "groups": held}
        return {
            "off": max(off(o, w) for o, w in zip(one + many, wanted[:2] + wanted, strict=True)),
            "wrong": off(wrong, wanted[0]),
        }

    first, second, alive = started(2, job, tmp_path)
    assert not alive
    assert first["off"] <= EXACT
    assert first["wrong"] > 1e-3
    assert second["none"]
    assert sorted(g for own in second["groups"] for g in own) == [0, 1, 2, 3]


def test_a_stem_of_its_own_and_everyone_gathers(nested: fx.GraphModule, tmp_path: Path) -> None:
    batches = [image(), image(5), -image(), image(1)]
    wanted = [nested(x).detach() for x in batches]

    def job(rank: int) -> Any:
        with Ranks(nested, stem="own", timeout=30, gather="all", pipelined=True) as ranks:
            given = [ranks(batches[0]), *ranks.stream((x,) for x in batches)]
            own = [n for n, _ in ranks.part.graph.named_parameters()]
            return {"off": max(off(o, w) for o, w in zip(given, wanted[:1] + wanted, strict=True)), "own": own}

    *found, alive = started(3, job, tmp_path)
    assert not alive
    assert max(one["off"] for one in found) <= EXACT
    held = [set(one["own"]) for one in found]
    assert not held[0] & (held[1] | held[2])  # the stem's weights are nobody else's


def test_a_rank_that_dies_is_an_error_on_the_other(nested: fx.GraphModule, tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        ranks = Ranks(nested, gather="all", timeout=TIMEOUT, verify=False)
        ranks(image())
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return errors(lambda: ranks(image()), times=2)

    first, second, alive = started(2, job, tmp_path, 40)
    assert not alive
    assert second is None
    assert "rank 1 died or did not answer within 3 s" in first["said"][0]
    assert "this job is over: rank 1 died" in first["said"][1]
    assert first["seconds"] < TIMEOUT + 20  # the bound is the timeout; the rest is for a loaded machine


def test_a_rank_that_hangs_is_an_error_on_the_other(nested: fx.GraphModule, tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        ranks = Ranks(nested, timeout=TIMEOUT, verify=False)
        ranks(image())
        while rank and not (tmp_path / "0.json").exists():
            time.sleep(0.05)
        return errors(lambda: ranks(image())) if rank == 0 else None

    first, _, alive = started(2, job, tmp_path)
    assert not alive
    assert "rank 1 died or did not answer within 3 s" in first["said"][0]
    assert TIMEOUT * 0.9 < first["seconds"] < TIMEOUT + 20


def test_ranks_that_hold_different_models(nested: fx.GraphModule, tmp_path: Path) -> None:
    def job(rank: int) -> Any:
        if rank:
            with torch.no_grad():
                next(nested.parameters())[0, 0, 0, 0] += 1e-9
        return errors(lambda: Ranks(nested, timeout=30, verify=False))

    *found, alive = started(2, job, tmp_path)
    assert not alive
    assert all("rank 1 holds another model than rank 0" in one["said"][0] for one in found)


def errors(call: Callable[[], Any], times: int = 1) -> dict[str, Any]:
    """What ParallelErrors say, and how long the first took."""
    said, began = [], time.monotonic()
    taken = None
    for _ in range(times):
        try:
            call()
            said.append("no error")
        except ParallelError as error:
            said.append(str(error))
        taken = taken or time.monotonic() - began
    return {"said": said, "seconds": taken}


def test_refused_ranks(nested: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UnsupportedError, match="start it with torchrun --nproc-per-node N"):
        Ranks(nested, verify=False)
    with pytest.raises(UnsupportedError, match="'first' or 'all', not 'last'"):
        Ranks(nested, gather="last")  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UnsupportedError, match="timeout is more than 0 seconds"):
        Ranks(nested, timeout=0, verify=False)
    with pytest.raises(UnsupportedError, match="'cpu' or 'cuda', not 'tpu'"):
        Ranks(nested, device="tpu", verify=False)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no CUDA device here.*device='cpu'"):
            Ranks(nested, device="cuda", verify=False)
    nested.train()
    try:
        with pytest.raises(UnsupportedError, match="call split.eval\\(\\) first"):
            Ranks(nested)
    finally:
        nested.eval()


# ---------------------------------------------------------------- the command line


class Named(Chain):
    """Returns its logits in a container."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x)}


def measured(split: fx.GraphModule, folder: Path) -> list[str]:
    """What the command says of a saved split on one rank: its errors."""
    splitfx.save(split, folder / "split")

    def job(rank: int) -> Any:
        options = argparse.Namespace(folder=str(folder / "split"), batch=None, runs=1, stem="auto", device="cpu")
        options.timeout, options.compile, options.shard = 30.0, False, False
        return errors(lambda: command._run(options))["said"]

    said, alive = started(1, job, folder)
    assert not alive
    return said


def test_the_command_takes_logits_in_a_container(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert measured(carved(Named().eval(), {"stage[23]": 2, "fc": 2}), tmp_path) == ["no error"]


def test_the_command_refuses_what_is_not_a_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    split = carved(Chain().eval(), {"stage[23]": 2, "fc": 2})
    with torch.no_grad():
        split.get_submodule("stem").weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    assert "off by nan of its largest value" in measured(split, tmp_path)[0]


def test_how_far_the_command_finds_outputs_off() -> None:
    ones = torch.ones(3)
    assert command._off(ones * 1.5, ones) == 0.5
    assert command._off(ones * 0, ones * 0) == 0
    assert not command._off(ones / 0, ones / 0) <= command.PARITY
    assert not command._off(ones, ones * 0) <= command.PARITY


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun(tmp_path: Path, ranks: int) -> None:
    splitfx.save(carved(wide(), FLAT), tmp_path / "split")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        *run,
        "-m",
        "splitfx.parallel",
        str(tmp_path / "split"),
        "--batch",
        "4",
        "--runs",
        "2",
        "--stem",
        "duplicate",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if ranks == 2:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "2 ranks" in done.stdout
    else:
        assert done.returncode != 0
        assert "3 processes for 2 groups" in done.stderr


# ---------------------------------------------------------------- streams


def test_streams_are_refused_on_a_cpu(nested: fx.GraphModule) -> None:
    with pytest.raises(UnsupportedError, match="streams run on one GPU; this model is on cpu.*or use Ranks"):
        Streams(nested)


class Lane:
    """A stand-in for a CUDA stream that notes what it waits for."""

    def __init__(self, name: str, log: list[tuple[str, ...]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Lane) -> None:
        self.log.append(("wait", self.name, other.name))


def test_streams_wait_for_what_they_read(nested: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with stand-ins for streams: the same order of waiting and running as on a GPU."""
    log: list[tuple[str, ...]] = []
    home = Lane("home", log)
    tree = Tree(nested)
    streams = Streams.__new__(Streams)
    streams.device, streams.tree = torch.device("cpu"), tree
    streams.lanes = [Lane(f"lane {g}", log) for g in range(tree.groups)]  # type: ignore[misc]
    now = [home]

    @contextmanager
    def on(lane: Lane) -> Iterator[None]:
        now.append(lane)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, lane: log.append(("record", lane.name)))
    for part in tree.parts:
        part.graph.register_forward_pre_hook(lambda m, a, name=part.name: log.append(("run", now[-1].name, str(name))))
    assert off(streams(image()), nested(image())) <= EXACT
    runs = [(lane, name) for what, lane, *name in log if what == "run" for name in name]
    assert runs == [
        ("home", STEM),
        ("lane 0", "trunk 0, 1"),
        ("lane 2", "trunk 2, 3"),
        *((f"lane {g}", f"branch {g}") for g in range(4)),
        ("home", "merge"),
    ]
    place = {entry: i for i, entry in enumerate(log)}
    for lane, other, before in (
        ("lane 0", "home", "trunk 0, 1"),
        ("lane 1", "lane 0", "branch 1"),
        ("lane 3", "lane 2", "branch 3"),
    ):
        assert place["wait", lane, other] < place["run", lane, before]
    assert {e for e in log if e[:2] == ("wait", "home")} == {("wait", "home", f"lane {g}") for g in range(4)}
    assert ("record", "lane 1") in place
