"""One image on two processes (`splitfx.parallel.Shard`) against the same network on one: time, memory, bytes sent.

Two processes are started, one thread each. In every round rank 0 runs the network alone, batch norms folded, as it is
and tiled to half its peak, while rank 1 sleeps in a barrier; then both run their rows. Rounds turn around; medians,
ratios within one run; with the C library's allocator as it comes, and told to keep the pages it has. ``peak`` is the
most bytes of live tensors on a rank, inputs counted and parameters not, operation by operation; on two processes each
holds its rows of the input and of the maps. ``sent`` is what a rank sends in one call, which the plan predicts.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision

import splitfx
from benchmarks.parallel import PATIENCE, clocked, rows_of
from benchmarks.tile import ALLOCATORS
from splitfx.analysis.live import LiveStorage
from splitfx.ground.difference import relative_error
from splitfx.ground.table import seconds, size
from splitfx.parallel import Shard
from splitfx.passes import FoldBatchNorm, Tile

NAME = "shard"
CASES = (("resnet18", 2048), ("resnet50", 2048), ("vgg16", 2048))
QUICK = (("resnet18", 256),)
ROUNDS = 5
COLUMNS = (
    ("model", "model", str),
    ("image", "image", str),
    ("allocator", "allocator", str),
    ("who", "how, processes", str),
    ("seconds", "median", seconds),
    ("speedup", "faster", lambda v: f"×{v:.2f}"),
    ("peak_bytes", "peak", size),
    ("share", "of one", lambda v: f"{v:.2f}"),
    ("sent_bytes", "sent", lambda v: "-" if v is None else size(v)),
    ("off", "off", lambda v: "-" if v is None else f"{v:.0e}"),
)
LEFT = (0, 2, 3)


def run(quick: bool) -> list[dict[str, Any]]:
    found = []
    for allocator in ["stock"] if quick else ALLOCATORS:
        for model, image in QUICK if quick else CASES:
            with tempfile.TemporaryDirectory() as folder:
                settings = {"model": model, "image": image, "rounds": 1 if quick else ROUNDS, "folder": folder}
                rows = rows_of(settings, ALLOCATORS[allocator], "benchmarks.shard")
            found += [{"model": model, "image": f"{image}²", "allocator": allocator, **row} for row in rows]
    return found


# ---------------------------------------------------------------- one rank


def worker(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, settings["image"], settings["image"], generator=torch.Generator().manual_seed(0))
    model = getattr(torchvision.models, settings["model"])().eval()
    dense = splitfx.transform(model, FoldBatchNorm(), x, verify=False)
    tiled = splitfx.transform(dense, Tile(budget="0.5x"), x, verify=False)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    with Shard(dense, timeout=PATIENCE, given="rows") as shard, torch.no_grad():
        part = x.chunk(shard.size, 2)[shard.rank].clone()
        alone = {"eager, 1": lambda: dense(x), "tiled, 1": lambda: tiled(x)}
        times = measured(shard, alone, lambda: shard(part), settings["rounds"])
        rows = table_of(shard, times, {"eager, 1": dense, "tiled, 1": tiled}, x, part)
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        (Path(settings["folder"]) / "rows.json").write_text(json.dumps(rows))


def measured(
    shard: Shard, alone: dict[str, Callable[[], Any]], both: Callable[[], Any], rounds: int
) -> dict[str, float]:
    """Median seconds on rank 0."""
    calls = {**alone, "shard, 2": both}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):  # the first warms up
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            shard.link.barrier()
            if name not in alone or shard.rank == 0:
                taken = clocked(calls[name])
                times[name] += [taken] if turn >= 0 else []
    shard.link.barrier()
    return {name: statistics.median(some) for name, some in times.items() if some}


def table_of(
    shard: Shard, times: dict[str, float], alone: dict[str, Any], x: torch.Tensor, part: torch.Tensor
) -> list[dict[str, Any]]:
    peaks = {name: peak(model, x) for name, model in alone.items()} if shard.rank == 0 else {}
    shard.link.barrier()
    before = shard.sent_bytes
    peaks["shard, 2"] = peak(shard, part)
    sent, predicted = shard.sent_bytes - before, shard.plan(x).sent_bytes
    if sent != predicted:
        raise RuntimeError(f"rank {shard.rank} sent {sent} bytes, {predicted} were predicted")
    output = shard(part)
    if shard.rank:
        return []
    off = relative_error(output, alone["eager, 1"](x))
    return [
        {
            "who": name,
            "seconds": times[name],
            "speedup": times["eager, 1"] / times[name],
            "peak_bytes": peaks[name],
            "share": peaks[name] / peaks["eager, 1"],
            "sent_bytes": sent if name == "shard, 2" else None,
            "off": off if name == "shard, 2" else None,
        }
        for name in times
    ]


def peak(model: Any, x: torch.Tensor) -> int:
    graph = model.network.graph if isinstance(model, Shard) else model
    with LiveStorage(counted=[x], state=[*graph.parameters(), *graph.buffers()]) as watch:
        model(x)
    return watch.peak


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
