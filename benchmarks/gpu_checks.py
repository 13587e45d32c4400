"""Checks that need a GPU: parity, memory, latency, onnxruntime, branches, sub-models and training on CUDA;
`benchmarks/gpu.sh` runs them.

Each check yields rows with ``ok`` (None where the figure is only reported). Traced and split graphs on the
GPU must equal the CPU in float64; what lives on the GPU must be what the timeline predicts. After the time
limit no further figure starts, and the table says so. Writes ``benchmarks/results/gpu.json``; a dry run
writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from benchmarks.gpu_common import DRY, GPU, PARITY, Row, Setting, model_of, row
from benchmarks.gpu_splits import branches, sub_models, training
from benchmarks.results_format import record, write
from splitfx.analysis.live import LiveStorage
from splitfx.compiler.plan import Plan
from splitfx.compiler.transform import transform
from splitfx.errors import MissingExtraError
from splitfx.export.onnx import export_onnx
from splitfx.export.runtime import check_onnx
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds, size, table, wrap
from splitfx.ground.turns import alternate
from splitfx.passes import FoldBatchNorm, Group, Tile
from splitfx.report.measuring import measure
from splitfx.report.profile import profile

FACTORS = {"vgg16": (8, 2, 2, 4, 4), "resnet18": (8, 4, 2, 2, 2)}
MEMORY = 0.02  # of the predicted peak
HEAD = ("check", "model", "what", "figure", "against", "verdict")


def split_of(
    name: str,
    setting: Setting,
    lowering: str = "grouped",
    model: nn.Module | None = None,
    image: torch.Tensor | None = None,
) -> fx.GraphModule:
    plan = Plan([Group(factors=FACTORS[name], lowering=lowering)])  # type: ignore[arg-type]
    model = model_of(name).to(setting.device) if model is None else model
    return transform(model, plan, setting.image() if image is None else image, verify=False)


def graphs(setting: Setting) -> Iterator[tuple[str, str, fx.GraphModule]]:
    """Name, what, and graph on the device: every model traced, and split where there are factors for it."""
    for name in setting.models:
        yield name, "traced", trace(model_of(name).to(setting.device), setting.image())
        if name in FACTORS:
            yield name, "split", split_of(name, setting)


def parity(setting: Setting) -> Iterator[Row]:
    """The graph on the device in float32 against the same made on the CPU, in float64 with its weights."""
    image = setting.image()
    for name, what, graph in graphs(setting):
        exact, double = model_of(name).double(), image.cpu().double()
        if what == "split":
            exact = split_of(name, setting, model=exact, image=double)
        exact.load_state_dict(graph.state_dict())
        with torch.inference_mode():
            got, want = graph(image).cpu().double(), exact(double)
        error = float((got - want).abs().max() / want.abs().max())
        yield row("parity", name, what, f"{error:.1e}", f"at most {PARITY:.0e}", error <= PARITY, value=error)


def memory(setting: Setting) -> Iterator[Row]:
    """Live storage and the allocator's peak on the device against the predicted timeline."""
    image = setting.image()
    for name, what, graph in graphs(setting):
        predicted = profile(graph).peak_bytes
        with torch.no_grad(), LiveStorage([image], [*graph.parameters(), *graph.buffers()]) as live:
            graph(image)
        off = live.peak / predicted - 1
        against = f"predicted {size(predicted)}"
        yield row(
            "live memory",
            name,
            what,
            size(live.peak),
            against,
            abs(off) <= MEMORY,
            value=live.peak,
            predicted=predicted,
        )
        if setting.device == "cuda":
            peak = measure(graph, image, "cuda", runs=1).peak_bytes
            yield row("allocator peak", name, what, size(peak), against, None, value=peak, predicted=predicted)


def latency(setting: Setting) -> Iterator[Row]:
    """Dense against split, both lowerings, in float32, float16 and channels last; medians of runs in turn."""
    for name in (one for one in FACTORS if one in setting.models):
        for how, options in formats(setting).items():
            for batch in setting.batches:
                yield from latency_of(name, how, options, batch, setting)


def formats(setting: Setting) -> dict[str, dict[str, Any]]:
    last = {"memory_format": torch.channels_last}
    half = {"dtype": torch.float16}
    plain: dict[str, dict[str, Any]] = {"fp32 nchw": {}, "fp32 nhwc": last}
    return plain if setting.device == "cpu" else {**plain, "fp16 nchw": half, "fp16 nhwc": {**half, **last}}


def latency_of(name: str, how: str, options: dict[str, Any], batch: int, setting: Setting) -> Iterator[Row]:
    image = setting.image(batch, **options)
    model = model_of(name).to(setting.device, **options)
    runs: dict[str, fx.GraphModule] = {"dense": trace(model, image)}
    for lowering in ("grouped", "branches"):
        runs[lowering] = split_of(name, setting, lowering, model, image)
    work = profile(runs["dense"]).macs / profile(runs["grouped"]).macs
    calls: dict[str, Callable[[], Any]] = {key: (lambda graph=graph: graph(image)) for key, graph in runs.items()}
    found = alternate(calls, setting.runs, setting.device)
    for key, time_taken in found.items():
        kept = found["dense"] / time_taken / work
        against = "" if key == "dense" else f"×{found['dense'] / time_taken:.2f}, kept {kept:.2f}"
        yield row(
            "latency",
            name,
            f"{key} {how} batch {batch}",
            seconds(time_taken),
            against,
            None,
            value=time_taken,
            macs_ratio=None if key == "dense" else work,
        )


def onnxruntime(setting: Setting) -> Iterator[Row]:
    """Dense and split files on CUDA, where onnxruntime has it, and on the CPU."""
    image = setting.image().cpu()
    for name in (one for one in FACTORS if one in setting.models):
        dense = trace(model_of(name), image)
        split = split_of(name, setting, model=model_of(name), image=image)
        for what, graph in (("dense", dense), ("split", split)):
            with tempfile.TemporaryDirectory() as folder:
                report = check_onnx(graph, export_onnx(graph, Path(folder) / "model.onnx"), runs=setting.runs)
            for one in report.rows:
                unavailable = one.verdict.startswith("unavailable")
                fell = f", {len(one.fallback)} nodes fell back" if one.fallback else ""
                took = "-" if one.median_ms is None else f"{one.median_ms:.2f} ms"
                yield row(
                    "onnxruntime",
                    name,
                    f"{what} on {one.provider}",
                    took,
                    one.verdict + fell,
                    None if unavailable else one.ok,
                    value=one.median_ms,
                    max_rel=one.max_rel,
                    peak_bytes=one.peak_bytes,
                )


def tiling(setting: Setting) -> Iterator[Row]:
    """Tiled to half the peak: parity, live memory, allocator peak and latency beside the folded network."""
    pixels = setting.tiled
    image = replace(setting, pixels=pixels).image()
    for name in setting.tiled_models:
        folded = transform(trace(model_of(name).to(setting.device), image), Plan([FoldBatchNorm()]), verify=False)
        split = transform(folded, Plan([Tile()]), verify=False)
        what, predicted = f"tiled at {pixels}", profile(split).peak_bytes
        with torch.inference_mode():
            got, want = split(image).double(), folded(image).double()
        error = float((got - want).abs().max() / want.abs().max())
        yield row("tiled parity", name, what, f"{error:.1e}", f"at most {PARITY:.0e}", error <= PARITY, value=error)
        whole = profile(folded).peak_bytes
        against = f"predicted {size(predicted)}, whole {size(whole)}"
        if setting.device == "cuda":
            for label, graph in (("whole", folded), (what, split)):
                peak = measure(graph, image, "cuda", runs=1).peak_bytes
                yield row(
                    "tiled allocator peak", name, label, size(peak), against, None, value=peak, predicted=predicted
                )
        found = alternate({"whole": lambda g=folded: g(image), "tiled": lambda g=split: g(image)}, 5, setting.device)
        ratio = f"x{found['tiled'] / found['whole']:.2f}"
        yield row("tiled latency", name, what, seconds(found["tiled"]), ratio, None, value=found["tiled"], **found)
        with tempfile.TemporaryDirectory() as folder:
            report = check_onnx(split, export_onnx(split, Path(folder) / "model.onnx"), runs=5)
        for one in report.rows:
            ok = None if one.verdict.startswith("unavailable") else one.ok
            took = "-" if one.median_ms is None else f"{one.median_ms:.2f} ms"
            yield row(
                "tiled onnxruntime", name, f"{what} on {one.provider}", took, one.verdict, ok, value=one.median_ms
            )


CHECKS: tuple[Callable[[Setting], Iterator[Row]], ...] = (
    parity,
    memory,
    onnxruntime,
    branches,
    sub_models,
    training,
    tiling,
    latency,
)


def run(setting: Setting, budget: float) -> list[Row]:
    """All rows; a check that raises is a failed row, one over the budget stops with a row that says so."""
    started, rows = time.perf_counter(), []
    for check in CHECKS:
        name = check.__name__
        try:
            for one in check(setting):
                rows.append(one)
                print(f"{time.perf_counter() - started:5.0f} s  {line(one)}", flush=True)
                if time.perf_counter() - started > budget:
                    rows.append(row(name, "", "stopped", "-", f"over the limit of {budget:.0f} s", None))
                    break
        except MissingExtraError as missing:
            rows.append(row(name, "", "left out", "-", str(missing), None))
        except Exception as problem:  # one broken check must not hide the others
            traceback.print_exc()
            rows.append(row(name, "", "failed", "-", f"{type(problem).__name__}: {problem}"[:200], False))
    return rows


def line(one: Row) -> str:
    return f"{one['check']}: {one['model']} {one['what']}: {one['figure']} ({one['against']}) {verdict(one)}"


def verdict(one: Row) -> str:
    return {True: "ok", False: "FAILED", None: "-"}[one["ok"]]


def main() -> int:
    parser = argparse.ArgumentParser("benchmarks/gpu.sh", description="All GPU checks of splitfx.")
    parser.add_argument("--cpu-dry-run", action="store_true", help="the same code at small sizes on the CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further figure starts")
    options = parser.parse_args()
    dry = options.cpu_dry_run or not torch.cuda.is_available()
    if dry and not options.cpu_dry_run:
        print("there is no CUDA GPU here: doing what a CPU can, at small sizes; nothing is written")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = run(DRY if dry else GPU, options.budget)
    print("\n" + table(HEAD, [(*(one[key] for key in HEAD[:-1]), verdict(one)) for one in rows], left=(0, 1, 2, 4)))
    failed = [one for one in rows if one["ok"] is False]
    for one in failed:
        print(wrap("FAILED " + line(one)))
    if not dry:
        print(f"written: {write(record('gpu', rows) | {'command': 'benchmarks/gpu.sh'})}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
