"""Tiling: the predicted peak against what a process really grows by, one fresh process for each network.

Half of what each network takes is the budget. *Growth* is the resident memory that one run adds, at its highest
(VmHWM after a reset, less VmRSS before), the input not among it, after one run that makes what is made once. Two
allocators: *mapped*, in which every tensor of 64 KiB or more is mapped by itself and given back when it dies
(``MALLOC_MMAP_THRESHOLD_``), so that pages held are bytes alive; and the stock one of the C library, which after the
first large tensors keeps all below 32 MiB on its heap and holds more than is alive. What kernels allocate for
themselves counts in the growth and in no tensor.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision

import splitfx
from splitfx.analysis.live import LiveStorage
from splitfx.errors import UnsupportedError
from splitfx.ground.table import size
from splitfx.ir.graph import info
from splitfx.passes import Tile

NAME = "tile_growth"
# (network, image size, allocator)
CASES = (
    ("resnet18", 2048, "mapped"),
    ("resnet50", 2048, "mapped"),
    ("mobilenet_v2", 2048, "mapped"),
    ("vgg16", 1024, "mapped"),
    ("efficientnet_b0", 2048, "mapped"),
    ("densenet121", 2048, "mapped"),
    ("squeezenet1_1", 2048, "mapped"),
    ("shufflenet_v2_x1_0", 2048, "mapped"),
    ("regnet_y_400mf", 2048, "mapped"),
    ("googlenet", 2048, "mapped"),
    ("resnet18", 1024, "mapped"),
    ("resnet18", 1024, "stock"),
    ("resnet18", 2048, "stock"),
)
ALLOCATORS = {"mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "stock": {}}
PATIENCE = 1200  # seconds for one network under one allocator
COLUMNS = (
    ("model", "model", str),
    ("allocator", "allocator", str),
    ("image", "image", str),
    ("predicted_bytes", "predicted", lambda v: "-" if v is None else size(v)),
    ("live_bytes", "live tensors", lambda v: "-" if v is None else size(v)),
    ("live_error", "off", lambda e: "-" if e is None else f"{100 * e:+.1f} %"),
    ("growth_bytes", "growth", lambda v: "-" if v is None else size(v)),
    ("growth_error", "off", lambda e: "-" if e is None else f"{100 * e:+.1f} %"),
)
LEFT = (0, 1, 2)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, image, allocator in (("squeezenet1_1", 512, "mapped"),) if quick else CASES:
        rows.append(child(name, allocator, image))
        print(f"  {name}, {allocator}: {rows[-1].get('growth_error', rows[-1].get('failed'))}", flush=True)
    return rows


def child(name: str, allocator: str, image: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.tile_growth", name, str(image)]
    environment = {**os.environ, **ALLOCATORS[allocator], "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    row = {"model": name, "allocator": allocator, "image": f"{image}²"}
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return {**row, "failed": why[:200]}
    return {**row, **json.loads(done.stdout.strip().splitlines()[-1])}


# ---------------------------------------------------------------- in the process of one network


def measured(name: str, image: int) -> dict[str, Any]:
    """Bytes without the input: predicted, of live tensors, and by which the process grew."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    x = torch.randn(1, 3, image, image)
    split = splitfx.transform(model, Tile(), x, verify=False)
    predicted = info(split).steps[-1].after.peak_bytes - x.nbytes
    with torch.inference_mode():
        split(x)
        with LiveStorage([x], [*split.parameters(), *split.buffers()]) as live:
            split(x)
        grown = growth(lambda: split(x))
    alive = live.peak - x.nbytes
    return {
        "predicted_bytes": predicted,
        "live_bytes": alive,
        "live_error": predicted / alive - 1,
        "growth_bytes": grown,
        "growth_error": predicted / grown - 1,
    }


def growth(call: Any) -> int:
    """Resident bytes that a call adds, at its highest. Raises `UnsupportedError` where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UnsupportedError("the growth of a process is read from /proc, which only Linux has")

    def field(word: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(word))
        return int(line.split()[1]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are free but kept would hide what the call needs
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return field("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]))))
