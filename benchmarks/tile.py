"""Tiling: peak memory and time of whole classifiers at 2048 x 2048, found by the planner for a budget, against eager.

Every model runs in a process of its own, once with the allocator as it is and once with one that keeps its pages
(``MALLOC_MMAP_MAX_=0``): much of what tiling gains in time with the first is that eager's large tensors are mapped
anew at every call. Eager, folded and tiled networks run in turn; times are medians and ratios to eager. ``peak`` is
the most bytes of live tensor storage, the input counted and parameters not, followed operation by operation.

``lightstream`` (PyPI) runs beside it where it imports; where it does not, its row says why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import splitfx
from splitfx.analysis.live import LiveStorage
from splitfx.errors import SplitfxError
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds, shorten, size
from splitfx.ground.turns import timed
from splitfx.ir.graph import info
from splitfx.passes import FoldBatchNorm, Tile

NAME = "tile"
# (model, image size, budget for no loss of time, budget for the least memory)
CASES = (
    ("resnet18", 2048, "66 MiB", "58 MiB"),
    ("resnet50", 2048, "90 MiB", "67 MiB"),
    ("mobilenet_v2", 2048, "82 MiB", "62 MiB"),
    ("vgg16", 2048, "88 MiB", "76 MiB"),
    ("efficientnet_b0", 2048, "247 MiB", "135 MiB"),
    ("efficientnet_b7", 600, "40 MiB", "32 MiB"),
)
QUICK = (("resnet18", 512, "8 MiB", "6 MiB"),)
ALLOCATORS = {"stock": {}, "page-keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368"}}
PEER_TILE = 1024  # of lightstream: at 512 the halos of a ResNet leave 80 rows of a tile, and a run takes minutes
RUNS = {"vgg16": 2}  # of each way, 3 for the others: one takes half a minute
PATIENCE = 3600  # seconds for one model under one allocator
COLUMNS = (
    ("model", "model", str),
    ("image", "image", str),
    ("how", "how", lambda text: shorten(str(text), 22)),
    ("peak_bytes", "peak", lambda v: "-" if v is None else size(v)),
    ("predicted_bytes", "predicted", lambda v: "-" if v is None else size(v)),
    ("seconds_stock", "stock", lambda v: "-" if v is None else seconds(v)),
    ("ratio_stock", "x", lambda v: "-" if v is None else f"{v:.2f}"),
    ("ratio_page-keeping", "x kept pages", lambda v: "-" if v is None else f"{v:.2f}"),
    ("error", "error", lambda v: "-" if v is None else f"{v:.0e}"),
)
LEFT = (0, 2)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for case in QUICK if quick else CASES:
        found = {name: child(case, name, runs=2 if quick else RUNS.get(case[0], 3)) for name in ALLOCATORS}
        rows += merged(case[0], f"{case[1]}²", found)
        print(f"  {case[0]} is done", flush=True)
    return rows


def merged(model: str, image: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each way to run a model, with the times of both allocators."""
    rows = []
    for row in found["stock"]:
        kept = {k: v for k, v in row.items() if k not in ("seconds", "ratio")}
        out = {"model": model, "image": image, **kept}
        for name, others in found.items():
            same = next((o for o in others if o["how"] == row["how"]), {})
            out |= {f"{key}_{name}": same.get(key) for key in ("seconds", "ratio")}
        rows.append(out)
    return rows


def child(case: Sequence[Any], allocator: str, runs: int, module: str = "benchmarks.tile") -> list[dict[str, Any]]:
    """The rows that a benchmark prints for one case, run as a program of its own under an allocator."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, case), str(runs)]
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **ALLOCATORS[allocator], "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return [{"how": f"failed: {why[:200]}"}]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---------------------------------------------------------------- in the process of one model


def measured(name: str, image: int, fast: str, least: str, runs: int) -> list[dict[str, Any]]:
    """Rows of one model: eager, batch norms folded, tiled within each budget, and lightstream."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, image, image)
    graph = trace(model, x)
    folded = splitfx.transform(graph, splitfx.Plan([FoldBatchNorm()]), verify=False)
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(x), "folded": lambda: folded(x)}
    rows: dict[str, dict[str, Any]] = {how: {"how": how} for how in calls}
    for budget in (fast, least):
        how = f"tiled, {budget}"
        try:
            split = splitfx.transform(folded, splitfx.Plan([Tile(budget=budget)]), verify=False)
        except SplitfxError as why:
            rows[how] = {"how": how, "refused": str(why)}
            continue
        known = info(split)
        rows[how] = {
            "how": how,
            "predicted_bytes": known.steps[-1].after.peak_bytes,
            "plan": repr(known.plan.passes[-1]),
        }
        calls[how] = lambda split=split: split(x)
    peer = lightstream(name, model, x)
    rows["lightstream"] = {"how": "lightstream", **({"refused": peer} if isinstance(peer, str) else {})}
    if not isinstance(peer, str):
        calls["lightstream"] = peer
    return finished(rows, calls, model, x, runs)


def finished(
    rows: dict[str, dict[str, Any]], calls: dict[str, Callable[[], Any]], model: nn.Module, x: torch.Tensor, runs: int
) -> list[dict[str, Any]]:
    with torch.no_grad():
        wanted = model(x)
        for how, call in calls.items():
            found, rows[how]["peak_bytes"] = watched(call, model, x)
            rows[how]["error"] = float((found - wanted).abs().max() / wanted.abs().max())
    times = timed(calls, runs, torch.device("cpu"), warm_up=0)  # each has run once already
    for how, taken in times.items():
        taken = sorted(taken)
        rows[how]["seconds"] = taken[len(taken) // 2]
    for row in rows.values():
        row["ratio"] = row["seconds"] / rows["eager"]["seconds"] if "seconds" in row else None
    return list(rows.values())


def watched(call: Callable[[], Any], model: nn.Module, x: torch.Tensor) -> tuple[Any, int]:
    """What a call gives, and its bytes of live storage; weights that no call makes never count, whoever holds them."""
    with LiveStorage([x], [*model.parameters(), *model.buffers()]) as live:
        found = call()
    return found, live.peak


def lightstream(name: str, model: nn.Module, x: torch.Tensor) -> Callable[[], Any] | str:
    """The trunk of a network streamed by the lightstream package; why not, where it cannot."""
    try:
        from lightstream.core.scnn.scnn import StreamingCNN  # pyright: ignore[reportMissingImports]
    except ImportError as why:
        return f"does not import here: {why}"
    if name != "resnet18":
        return "not run: it is set beside one network only"
    trunk, head = _trunk(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream = StreamingCNN(trunk, (1, 3, PEER_TILE, PEER_TILE), copy_to_gpu=False)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as why:
        return f"refuses this network: {str(why).splitlines()[0][:120] if str(why) else type(why).__name__}"
    return lambda: head(stream(x))


def _trunk(model: Any) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    layers = (model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4)
    return nn.Sequential(*layers), lambda y: model.fc(torch.flatten(model.avgpool(y), 1))


if __name__ == "__main__":
    model_name, image_size, *budgets, count = sys.argv[1:]
    print(json.dumps(measured(model_name, int(image_size), budgets[0], budgets[1], int(count))))
