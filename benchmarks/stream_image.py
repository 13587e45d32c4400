"""Streaming: a 16384 x 16384 image from a memory-mapped file through ResNet-18, rows in, logits or rows of layer4 out.

The promise: less than 400 MB of anonymous process memory above the start, where the model as it is would hold about
36 GB. Every case has a process of its own, whose `RssAnon` is read every 20 ms from the time the model is compiled.

How the large result is known to be right, without 36 GB: the same path equals the model in full at 4096 x 4096; crops
of the streamed layer4 map equal the model on crops of the image whose border is out of reach of its receptive field;
and the logits equal the mean of that map put through the classifier.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import splitfx
from splitfx.analysis.memory import memory
from splitfx.analysis.shapes import shapes
from splitfx.ground.table import seconds, size
from splitfx.ir.graph import TensorSpec
from splitfx.passes import Tile
from splitfx.tiling.stream import stream
from splitfx.tiling.stream.sources import RowSource

NAME = "stream_image"
LARGE, WHOLE, QUICK = 16384, 4096, 1024
ROWS = 16  # input rows of a step
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDE, REACH = 32, 8  # of layer4: image pixels a row, and rows at a border that see past it (433 pixels wide)
LIMIT = 400e6
PATIENCE = 4 * 3600
COLUMNS = (
    ("case", "case", str),
    ("image", "image", str),
    ("anonymous_bytes", "process memory", lambda v: "-" if v is None else size(v)),
    ("eager_bytes", "model as it is", lambda v: "-" if v is None else size(v)),
    ("seconds", "time", lambda v: "-" if v is None else seconds(v)),
    ("error", "error", lambda v: "-" if v is None else f"{v:.0e}"),
    ("compared", "compared with", str),
)
LEFT = (0, 1, 6)


def run(quick: bool) -> list[dict[str, Any]]:
    large, whole = (QUICK, QUICK // 2) if quick else (LARGE, WHOLE)
    with tempfile.TemporaryDirectory() as folder:
        found = [child("whole", whole, folder), child("sink", large, folder), child("logits", large, folder)]
    for row in found:
        if row.get("anonymous_bytes", 0) > LIMIT:
            print(
                f"MISSED: {row['case']} took {size(row['anonymous_bytes'])}, the promise is {size(LIMIT)}", flush=True
            )
    return found


def child(case: str, image: int, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.stream_image", case, str(image), folder]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, timeout=PATIENCE, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        return {"case": case, "image": f"{image}²", "compared": f"failed with code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- in the process of one case


def main(case: str, image: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    until = "layer4.1.relu" if case == "sink" else ""
    split = splitfx.transform(model, Tile(rows=ROWS, until=until), torch.zeros(1, 3, 256, 256))
    source = RowSource(np.load(picture(folder, image), mmap_mode="r", allow_pickle=False), mean=MEAN, std=STD)
    sink = folder / f"layer4_{image}.npy" if case == "sink" else None
    _, held, taken = watched(lambda: results.append(stream(split, source, sink)), results := [])
    row = {"case": case, "image": f"{image}²", "anonymous_bytes": held, "seconds": taken}
    if case == "whole":
        with torch.no_grad():
            wanted, eager, slow = watched(lambda: plain.append(model(source.whole())), plain := [])
        return row | {
            "eager_bytes": eager,
            "eager_seconds": slow,
            "error": apart(results[0], wanted),
            "compared": "the model, in full",
        }
    row["eager_bytes"] = untiled_peak(model, image)
    if case == "sink":
        assert sink is not None
        return row | {"error": crops_apart(model, source, sink, image), "compared": "the model, on crops"}
    with torch.no_grad():
        wanted = model.fc(torch.from_numpy(mean_of(folder / f"layer4_{image}.npy")).float())
    return row | {"error": apart(results[0], wanted), "compared": "classifier of the mean of layer4"}


def watched(call: Callable[[], Any], results: list[Any]) -> tuple[Any, int, float]:
    """(the result, the most anonymous memory above the start, seconds)."""
    start, most, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], anonymous() - start)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    began = time.perf_counter()
    call()
    taken = time.perf_counter() - began
    done.set()
    thread.join()
    return results[0], most[0], taken


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark needs Linux: /proc/self/status has no RssAnon here")


def picture(folder: Path, image: int) -> Path:
    """Smooth structure with noise on it, the same every time, written strip by strip."""
    path = folder / f"picture_{image}.npy"
    if path.exists():
        return path
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (image, image, 3))
    random = np.random.default_rng(0)
    across = np.sin(np.arange(image) / 97.0)[None, :, None]
    for top in range(0, image, 256):
        rows = np.arange(top, min(top + 256, image))
        wave = 90 * across * np.cos(rows / 131.0)[:, None, None] + np.array([100.0, 128.0, 150.0])
        out[rows] = np.clip(wave + random.integers(-60, 60, (len(rows), image, 3)), 0, 255).astype(np.uint8)
    out.flush()
    return path


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def crops_apart(model: Any, source: RowSource, sink: Path, image: int, side: int = 12) -> float:
    """The streamed map against the model on crops of the image; 0 rows at the image's own corner are left out."""
    trunk = torch.nn.Sequential(*list(model.children())[:-2])
    streamed, count, worst = np.load(sink, mmap_mode="r"), image // STRIDE, 0.0
    middle = max(0, count // 2 - side // 2)
    for top, left in {(0, 0), (0, middle), (middle, middle), (count - side, 0), (count - side, count - side)}:
        low = [max(0, at - REACH) for at in (top, left)]
        high = [min(count, at + side + REACH) for at in (top, left)]
        x = source.read(low[0] * STRIDE, high[0] * STRIDE, (low[1] * STRIDE, high[1] * STRIDE))
        with torch.no_grad():
            wanted = trunk(x)[0, :, top - low[0] : top - low[0] + side, left - low[1] : left - low[1] + side]
        found = torch.from_numpy(np.array(streamed[0, :, top : top + side, left : left + side]))
        worst = max(worst, apart(found, wanted))
    return worst


def mean_of(path: Path) -> np.ndarray:
    whole = np.load(path, mmap_mode="r")
    return np.stack([plane.astype(np.float64).mean() for plane in whole[0]])[None]


def untiled_peak(model: Any, image: int) -> int:
    graph = splitfx.trace(model, torch.zeros(1, 3, 256, 256))
    return memory(graph, shapes(graph, (TensorSpec((1, 3, image, image)),))).peak_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
