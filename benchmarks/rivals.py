"""Tiling against the best that a user would run instead: eager, `torch.compile`, onnxruntime, OpenVINO, on one thread.

Classifiers at 2048 x 2048. The rivals run the whole network: eager as it is and in channels-last memory, compiled by
Inductor with frozen weights, exported to ONNX with batch norms folded. *Tiled* is the planner's schedule for `tile`'s
budget, in both memory formats, and the exported loop under onnxruntime. Every figure is of a process of its own, and
the ways take turns. ``seconds`` are of the processor, the least of a process's later calls, medians over the rounds;
``peak`` is how far anonymous memory rises in calls behind the first: above what a runtime held before the first call,
whose arena keeps what it took, and above what PyTorch holds between calls, when free pages are given back. PyTorch runs
with the allocator as it is and with one that keeps its pages. ``x`` are ratios to the fastest rival.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

import splitfx
from benchmarks import tile, tile_onnx
from splitfx.ground.table import seconds, size
from splitfx.passes import FoldBatchNorm, Tile

NAME = "rivals"
CASES = tuple(case[:3] for case in tile.CASES if case[1] == 2048)
QUICK = (("resnet18", 256, "4 MiB"),)
PYTORCH = ("eager", "eager, channels-last", "compiled", "tiled", "tiled, channels-last")
FILES = ("onnxruntime", "openvino", "tiled, onnxruntime")
KEPT = ", pages kept"
RIVALS = ("eager", "compiled", "onnxruntime", "openvino")  # how their names begin
COLUMNS = (
    ("model", "model", str),
    ("how", "how", str),
    ("seconds", "CPU time", seconds),
    ("time_ratio", "x time", lambda v: f"{v:.2f}"),
    ("peak_bytes", "peak", lambda v: "-" if v is None else size(v)),
    ("peak_ratio", "x peak", lambda v: "-" if v is None else f"{v:.2f}"),
    ("version", "version", str),
)
LEFT = (0, 1, 6)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, image, budget in QUICK if quick else CASES:
        rows += measured(name, image, budget, rounds=1 if quick else 2)
        print(f"  {name} is done", flush=True)
    return rows


def measured(name: str, image: int, budget: str, rounds: int) -> list[dict[str, Any]]:
    files = [way for way in FILES if way != "openvino" or importlib.util.find_spec("openvino")]
    ways = [*PYTORCH, *(way + KEPT for way in PYTORCH), *files]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="splitfx-bench-") as folder:
        tile_onnx.written(name, image, Path(folder))
        for turn in range(rounds):
            for way in ways if turn % 2 else ways[::-1]:
                found[way].append(child(way, name, image, budget, folder))
    rows = [
        {"model": name, "how": way, **{key: statistics.median(one[key] for one in got) for key in got[0]}}
        for way, got in found.items()
    ]
    best = min((row for row in rows if row["how"].startswith(RIVALS)), key=lambda row: row["seconds"])
    for row in rows:
        row["time_ratio"] = row["seconds"] / best["seconds"]
        row["peak_ratio"] = row["peak_bytes"] / best["peak_bytes"]
        package = "openvino" if "openvino" in row["how"] else "onnxruntime-gpu" if "onnx" in row["how"] else "torch"
        row["version"] = f"{package} {importlib.metadata.version(package)}"
    return rows


def child(way: str, *case: Any) -> dict[str, float]:
    allocator = tile.ALLOCATORS["page-keeping" if way.endswith(KEPT) else "stock"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rivals", way.removesuffix(KEPT), *map(str, case)]
    environment = {**os.environ, **allocator}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=tile.PATIENCE, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- in the process of one way


def alone(way: str, name: str, image: int, budget: str, folder: str, runs: int = 3) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(1, 3, image, image)
    in_file = way in FILES
    if in_file:
        path = Path(folder, "tiled.onnx" if way.startswith("tiled") else "untiled.onnx")
        call = tile_onnx.opened(path, "openvino" if way == "openvino" else "onnxruntime, recommended", x.numpy())
    else:
        call = of_pytorch(way, name, budget, x)
    before = held()
    call()
    before = before if in_file else held()  # a compiler leaves more behind than a call takes
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, tile_onnx.anonymous() - before)
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    times = []
    for _ in range(runs):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    done.set()
    watching.join()
    return {"seconds": min(times), "peak_bytes": most}


def held() -> int:
    """Bytes of anonymous memory when what is free is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return tile_onnx.anonymous()


def of_pytorch(way: str, name: str, budget: str, x: torch.Tensor) -> Callable[[], Any]:
    model: Any = torchvision.models.get_model(name, weights=None).eval()
    if way.startswith("tiled"):
        model = splitfx.transform(model, [FoldBatchNorm(), Tile(budget=budget)], x, verify=False)
    if way.endswith("channels-last"):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if way == "compiled":
        from torch._inductor import config

        config.freezing = True
        model = torch.compile(model)

    def call() -> Any:
        with torch.no_grad():
            return model(x)

    return call


if __name__ == "__main__":
    print(json.dumps(alone(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])))
