"""Tiling in ONNX files: peak memory and time of classifiers at 2048 x 2048 under onnxruntime and OpenVINO on the CPU.

The untiled and the tiled file of each model, batch norms folded in both, on one thread. Every figure is of a process of
its own, and the two files take turns: ``peak`` is how far anonymous memory rises above the loaded model and its input
in the first run, ``later`` in all of them (arenas keep what they took); ``seconds`` are of the processor, the least of
a process's later runs. Medians over the rounds; ``x`` are ratios to the untiled file on the same runtime. ``export`` is
the processor time of writing the tiled file. OpenVINO is left out where it does not import.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

import splitfx
from splitfx.export import sessions
from splitfx.export.onnx import export_onnx
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds, shorten, size
from splitfx.passes import FoldBatchNorm, Tile

NAME = "tile_onnx"
CASES = (("resnet18", 2048), ("resnet50", 2048), ("mobilenet_v2", 2048), ("vgg16", 2048), ("efficientnet_b0", 2048))
QUICK = (("resnet18", 256),)
ENGINES = ("onnxruntime", "onnxruntime, recommended", "openvino")
PATIENCE = 1800  # seconds for one process
COLUMNS = (
    ("model", "model", str),
    ("image", "image", str),
    ("engine", "runtime", str),
    ("file", "file", str),
    ("peak_bytes", "peak", size),
    ("later_bytes", "later", size),
    ("seconds", "time", seconds),
    ("peak_ratio", "x peak", lambda v: f"{v:.2f}"),
    ("time_ratio", "x time", lambda v: f"{v:.2f}"),
    ("export_seconds", "export", lambda v: "-" if v is None else seconds(v)),
    ("form", "form", lambda text: shorten(text.removeprefix("tiled: "), 40)),
)
LEFT = (0, 2, 3, 10)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, image in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="splitfx-bench-") as folder:
            rows += measured(name, image, Path(folder), rounds=1 if quick else 3)
        print(f"  {name} is done", flush=True)
    return rows


def measured(name: str, image: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    files, export = written(name, image, folder)
    rows = []
    for engine in ENGINES[: 3 if importlib.util.find_spec("openvino") else 2]:
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in files}
        for turn in range(rounds):
            for kind in list(files) if turn % 2 else reversed(list(files)):
                found[kind].append(child(files[kind], engine, image))
        for kind, path in files.items():
            row = {key: statistics.median(one[key] for one in found[kind]) for key in found[kind][0]}
            session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
            row |= {"model": name, "image": f"{image}²", "engine": engine, "file": kind}
            row |= {"export_seconds": export if kind == "tiled" else None}
            rows.append(row | {"form": "; ".join(sessions.tiles(session)) or "as it is"})
        for row in rows[-2:]:
            row["peak_ratio"] = row["peak_bytes"] / rows[-2]["peak_bytes"]
            row["time_ratio"] = row["seconds"] / rows[-2]["seconds"]
    return rows


def written(name: str, image: int, folder: Path) -> tuple[dict[str, Path], float]:
    """Both files, the untiled one first, and seconds of the processor for writing the tiled one."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, image, image)
    graph = trace(torchvision.models.get_model(name, weights=None).eval(), x)
    graph = splitfx.transform(graph, splitfx.Plan([FoldBatchNorm()]), verify=False)
    split = splitfx.transform(graph, splitfx.Plan([Tile(rows=32)]), verify=False)
    plain = export_onnx(graph, folder / "untiled.onnx", dynamic_batch=False, verify=False)
    begin = time.process_time()
    tiled = export_onnx(split, folder / "tiled.onnx", verify=False)
    return {"untiled": plain, "tiled": tiled}, time.process_time() - begin


def child(path: Path, engine: str, image: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tile_onnx", str(path), engine, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- in the process of one file


def alone(path: Path, engine: str, image: int, runs: int = 4) -> dict[str, float]:
    x = numpy.random.RandomState(1).randn(1, 3, image, image).astype(numpy.float32)
    call = opened(path, engine, x)
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous() - before)
            time.sleep(0.002)

    watching = threading.Thread(target=watch)
    watching.start()
    times, peaks = [], []
    for _ in range(runs):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
        peaks.append(most)
    done.set()
    watching.join()
    return {"peak_bytes": peaks[0], "later_bytes": peaks[-1], "seconds": min(times[1:])}


def opened(path: Path, engine: str, x: numpy.ndarray) -> Callable[[], Any]:
    if engine == "openvino":
        import openvino  # pyright: ignore[reportMissingImports]

        options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        request = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
        return lambda: request.infer([x], share_inputs=True)
    options = sessions.session_options(1)
    if engine == "onnxruntime":
        options = sessions.runtime().SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = sessions.open_session(path, sessions.CPU, options)
    return lambda: session.run(None, {"x": x})


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    print(json.dumps(alone(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
