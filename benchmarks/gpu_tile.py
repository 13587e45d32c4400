"""Tiled schedules on a GPU: what strips of each height cost in time and memory, as they are and as one CUDA graph.

``python -m benchmarks.gpu_tile`` on a machine with a CUDA GPU; ``--dry-run`` runs the same code small on a CPU. For
each network and number type: the folded network whole, the planner's schedule for half the peak, and streams by hand
of some strip heights. Time is the median of runs in turn; *graph* is the same calls captured once and replayed
(`torch.cuda.graph`), which leaves out what launching costs. Writes ``benchmarks/results/gpu_tile.json`` after every
network, so that a run that is cut off keeps what it measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from benchmarks.gpu_common import model_of
from benchmarks.results_format import record, write
from splitfx.compiler.plan import Plan
from splitfx.compiler.transform import transform
from splitfx.errors import SplitfxError
from splitfx.ground.table import seconds, size
from splitfx.ground.turns import alternate
from splitfx.passes import FoldBatchNorm, Tile
from splitfx.report.measuring import measure
from splitfx.report.profile import profile

NETWORKS = ("resnet18", "mobilenet_v2", "resnet50", "vgg16", "efficientnet_b0")
TYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16 channels_last": {"dtype": torch.float16, "memory_format": torch.channels_last},
}
HEIGHTS = (128, 256, 512)
MIB = 2**20


def schedules(folded: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    yield "whole", folded
    yield "half", transform(folded, Plan([Tile()]), verify=False)
    for rows in HEIGHTS:
        yield f"rows {rows}", transform(folded, Plan([Tile(rows=rows)]), verify=False)


def captured(graph: nn.Module, image: torch.Tensor) -> Callable[[], Any]:
    """The call of ``graph`` on ``image`` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            graph(image)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        graph(image)
    return recorded.replay


def rows(name: str, how: str, pixels: int, device: str, runs: int) -> Iterator[dict[str, Any]]:
    options = TYPES[how]
    model = model_of(name).to(device, **options)
    image = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device, **options)
    folded = transform(model, Plan([FoldBatchNorm()]), image, verify=False)
    graphs = dict(schedules(folded))
    with torch.inference_mode():
        times = alternate({what: lambda g=graph: g(image) for what, graph in graphs.items()}, runs, device)
        replays, problems = {}, {}
        for what, graph in graphs.items() if device == "cuda" else ():
            try:
                replays[what] = captured(graph, image)
            except (RuntimeError, SplitfxError) as problem:
                problems[what] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"[:160]
        replayed = alternate(replays, runs, device) if replays else {}
        replays.clear()
    for what, graph in graphs.items():
        peak = measure(graph, image, device, runs=1).peak_bytes if device == "cuda" else None
        yield {
            "network": name, "type": how, "pixels": pixels, "what": what, "seconds": times[what],
            "ratio": times[what] / times["whole"], "graph_seconds": replayed.get(what),
            "graph_ratio": replayed[what] / times["whole"] if what in replayed else None,
            "graph_problem": problems.get(what), "predicted_bytes": profile(graph).peak_bytes, "allocator_bytes": peak,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Tiled schedules on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU; writes nothing")
    parser.add_argument("--seconds", type=float, default=330, help="no further network starts after these")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, pixels, runs = ("cpu", 1024, 1) if options.dry_run else ("cuda", 2048, 10)
    started, found = time.perf_counter(), []
    for how in TYPES if device == "cuda" else ("fp32",):
        for name in NETWORKS if device == "cuda" else NETWORKS[:1]:
            if time.perf_counter() - started > options.seconds:
                print(f"left out after {options.seconds:.0f} s: {name} in {how}", flush=True)
                continue
            for one in rows(name, how, pixels, device, runs):
                found.append(one)
                replay = f"x{one['graph_ratio']:.2f}" if one["graph_ratio"] else one["graph_problem"] or "-"
                peak = size(one["allocator_bytes"]) if one["allocator_bytes"] else "-"
                took = f"{time.perf_counter() - started:4.0f} s  {name:16} {how:18} {one['what']:9}"
                held = f"predicted {size(one['predicted_bytes'])}, held {peak}"
                print(f"{took} {seconds(one['seconds'])} x{one['ratio']:.2f}, graph {replay}, {held}", flush=True)
            if device == "cuda":
                write(record("gpu_tile", found) | {"command": "python -m benchmarks.gpu_tile"})


if __name__ == "__main__":
    main()
