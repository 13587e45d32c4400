"""Tiling in ONNX files: peak memory and time of classifiers at 1024 x 1024 under onnxruntime on the CPU.

The untiled and the tiled file of each model, batch norms folded in both, with the options that splitfx recommends
(``session_options()``) and with onnxruntime's own. ``peak`` is what `check_onnx` shows: how far the first run in a
fresh process rises above the loaded model; of three processes the most, the least is kept too. Times come from one in
which all four sessions run in turn, forwards and backwards; ``x`` is the median of the ratios to the untiled file with
the recommended options, run by run, so that what else the machine does meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision

import splitfx
from splitfx.errors import ExportError
from splitfx.export import sessions
from splitfx.export.onnx import export_onnx
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds, shorten, size
from splitfx.passes import FoldBatchNorm, Tile

NAME = "tile_onnx"
CASES = (("resnet18", 1024), ("mobilenet_v2", 1024))
QUICK = (("resnet18", 256),)
PROBES = 3  # fresh processes; what the arena holds varies by how its blocks fall
COLUMNS = (
    ("model", "model", str),
    ("image", "image", str),
    ("file", "file", str),
    ("options", "options", str),
    ("peak_bytes", "peak", size),
    ("peak_ratio", "x", lambda v: f"{v:.2f}"),
    ("seconds", "median", seconds),
    ("time_ratio", "x", lambda v: f"{v:.2f}"),
    ("error", "error", lambda v: f"{v:.0e}"),
    ("form", "form", lambda text: shorten(text.removeprefix("tiled: ").partition(",")[0], 40)),
)
LEFT = (0, 2, 3, 9)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, image in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="splitfx-bench-") as folder:
            rows += measured(name, image, Path(folder), runs=5 if quick else 31)
        print(f"  {name} is done", flush=True)
    return rows


def measured(name: str, image: int, folder: Path, runs: int) -> list[dict[str, Any]]:
    """The rows of one model, the untiled file with the recommended options first."""
    x = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(1))
    numpy.savez(folder / "inputs.npz", x=x.numpy())
    files = written(name, x, folder)
    threads, rows, calls = torch.get_num_threads(), [], []
    for kind, path in files.items():
        for default in (False, True):
            options = sessions.session_options(threads)
            if default:
                options = sessions.runtime().SessionOptions()
                options.intra_op_num_threads, options.log_severity_level = threads, 3
            session = sessions.open_session(path, sessions.CPU, options)
            peaks = sorted(peak(path, folder, threads, default) for _ in range(PROBES))
            rows.append(
                {
                    "model": name,
                    "image": f"{image}²",
                    "file": kind,
                    "options": "default" if default else "recommended",
                    "peak_bytes": peaks[-1],
                    "least_peak_bytes": peaks[0],
                    "form": "; ".join(sessions.tiles(session)) or "as it is",
                }
            )
            calls.append(lambda session=session: session.run(None, {"x": x.numpy()})[0])
    found = [call() for call in calls]
    for row, y in zip(rows, found, strict=True):
        row["error"] = float(abs(y - found[0]).max() / abs(found[0]).max())
        row["peak_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    times = in_turn(calls, runs)
    for row, taken in zip(rows, times, strict=True):
        row["seconds"] = statistics.median(taken)
        row["time_ratio"] = statistics.median(a / b for a, b in zip(taken, times[0], strict=True))
    return rows


def written(name: str, x: torch.Tensor, folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    graph = trace(torchvision.models.get_model(name, weights=None).eval(), x)
    graph = splitfx.transform(graph, splitfx.Plan([FoldBatchNorm()]), verify=False)
    split = splitfx.transform(graph, splitfx.Plan([Tile(rows=32)]), verify=False)
    both = {"untiled": graph, "tiled": split}
    return {kind: export_onnx(one, folder / f"{kind}.onnx", dynamic_batch=False) for kind, one in both.items()}


def peak(path: Path, folder: Path, threads: int, default: bool) -> int:
    stored = str(folder / "inputs.npz")
    request = {"provider": sessions.CPU, "model": str(path), "inputs": stored, "keywords": ["x"], "threads": threads}
    found = sessions.probe({**request, "default_options": default})
    if "peak_bytes" not in found:
        raise ExportError(f"no peak memory: {found.get('peak_why') or found.get('why')}.")
    return found["peak_bytes"]


def in_turn(calls: list[Any], runs: int) -> list[list[float]]:
    """Seconds of each call; every second round goes backwards, so that none always follows the same one."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(runs + 2):  # two rounds to warm up
        order = range(len(calls)) if number % 2 else reversed(range(len(calls)))
        for at in order:
            begin = time.perf_counter()
            calls[at]()
            if number > 1:
                times[at].append(time.perf_counter() - begin)
    return times
