"""Compile time: trace, facts and transform, for every torchvision classification model and for long chains.

The promises: under 10 s for every torchvision classification model at its own input size of 224, and at most
13 times as long for a chain of 3000 layers as for one of 300.

Each model has a process of its own (``python -m benchmarks.compile_time MODEL``), so that none pays for, or is
killed by, the memory of the ones before it. The process first compiles a tiny network, so that importing torch is
not in the figures, then prints its row as one line of JSON; one that dies leaves a row that says so.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.errors import SplitfxError
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds, shorten
from splitfx.passes import Group

NAME = "compile_time"
COLUMNS = (
    ("model", "model", str),
    ("nodes", "nodes", lambda count: "" if count is None else str(count)),
    ("trace_seconds", "trace", lambda given: "" if given is None else seconds(given)),
    ("facts_seconds", "facts", lambda given: "" if given is None else seconds(given)),
    ("transform_seconds", "transform", lambda given: "" if given is None else seconds(given)),
    ("total_seconds", "total", lambda given: "" if given is None else seconds(given)),
    ("cpu_seconds", "processor", lambda given: "" if given is None else seconds(given)),
    ("outcome", "outcome", lambda text: shorten(str(text), 24)),
)
QUICK = ("alexnet", "resnet18", "densenet121", "swin_t")
CHAIN = "chain of {} layers"
PATIENCE = 600  # seconds for one model; the promise is 10


def run(quick: bool) -> list[dict[str, Any]]:
    names = QUICK if quick else torchvision.models.list_models(module=torchvision.models)
    short, long = (30, 300) if quick else (300, 3000)
    rows = [in_its_own_process(name) for name in (*names, CHAIN.format(short), CHAIN.format(long))]
    first, second = rows[-2:]
    if "total_seconds" in first and "total_seconds" in second:
        second["ratio_to_short_chain"] = second["total_seconds"] / first["total_seconds"]
        second["outcome"] += f", {second['ratio_to_short_chain']:.1f} times"
    return rows


def in_its_own_process(name: str) -> dict[str, Any]:
    """The row of one model, said on stderr as soon as it is there."""
    command = [sys.executable, "-m", "benchmarks.compile_time", name]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE, check=False)
        row = row_of(name, done.returncode, done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        row = {"model": name, "outcome": f"stopped after {PATIENCE} s"}
    total = f"{row['total_seconds']:.2f} s, " if "total_seconds" in row else ""
    print(f"{name}: {total}{row['outcome']}", file=sys.stderr, flush=True)
    return row


def row_of(name: str, code: int, out: str, errors: str) -> dict[str, Any]:
    """The row that a process printed last, or one that says how the process ended."""
    lines = out.strip().splitlines()
    if code == 0 and lines:
        return json.loads(lines[-1])
    if code < 0:
        return {"model": name, "outcome": f"killed by signal {-code}"}
    why = errors.strip().splitlines()
    return {"model": name, "outcome": f"failed: {why[-1] if why else f'exit code {code}'}"}


def main(name: str) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timed("warm-up", warm_up(), torch.zeros(1, 8, 16, 16))
        print(json.dumps(timed(name, *known(name))))


def known(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model by its torchvision name, or a chain by its number of layers, with its input."""
    layers = name.removeprefix(CHAIN.partition("{}")[0]).partition(" ")[0]
    if layers.isdigit():
        return chain(int(layers)), torch.zeros(1, 8, 16, 16)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options).eval(), torch.zeros(1, 3, 224, 224)


def chain(layers: int) -> nn.Module:
    """Convs and ReLUs in a row, with a pool in the middle to make two blocks."""
    half = layers // 4
    part = [one for _ in range(half) for one in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    rest = [one for _ in range(half) for one in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*part, nn.MaxPool2d(2), *rest, nn.MaxPool2d(2)).eval()


def warm_up() -> nn.Module:
    """Conv, norm, pool and linear: what the first model of a process would pay for loading."""
    convs = [one for _ in range(3) for one in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(*convs, nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 4))


def timed(name: str, model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Seconds of the three parts by the clock, and of the whole by the processor, which is what a busy machine leaves
    right; and the most memory that the process has held, model included."""
    model.eval()
    before = time.process_time()
    graph, traced = clock(lambda: trace(model, image))
    _, analysed = clock(lambda: all_facts(graph))
    outcome, transformed = clock(lambda: split_every_block(graph))
    return {
        "model": name,
        "nodes": len(graph.graph.nodes),
        "trace_seconds": traced,
        "facts_seconds": analysed,
        "transform_seconds": transformed,
        "total_seconds": traced + analysed + transformed,
        "cpu_seconds": time.process_time() - before,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "outcome": outcome,
    }


def all_facts(graph: fx.GraphModule) -> tuple[Any, ...]:
    known = facts(graph)
    return known.shapes, known.cost, known.memory, known.cuts, known.axes, blocks(known)


def split_every_block(graph: fx.GraphModule) -> str:
    """Split every block in two as a user would: lowerings timed, the oracle run; says why where it cannot be."""
    count = len(blocks(facts(graph)))
    if count == 0:
        return "no blocks"
    plan = splitfx.Plan([Group(factors=(2,) * count)])
    try:
        splitfx.transform(graph, plan)
    except SplitfxError as why:
        return f"refused: {why}"
    return "split"


def clock(function: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main(sys.argv[1])
