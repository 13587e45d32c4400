"""Dense against split networks: MACs, parameters, peak memory and CPU latency, eager and onnxruntime.

``kept`` is the share of the saved work that becomes time: (dense latency / split latency) / (dense MACs /
split MACs). *Pools* is eager with `SeparablePool` in both: what no split makes smaller is then nearly gone. All of them
run in turn in one process, so a drift of the machine meets all; latencies are medians.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import fx, nn

import splitfx
from splitfx.export.onnx import export_onnx
from splitfx.export.sessions import CPU, open_session, session_options
from splitfx.frontend.trace import trace
from splitfx.ground.table import number, seconds, size
from splitfx.ground.turns import alternate
from splitfx.passes import Group, SeparablePool
from splitfx.report.measuring import measure
from splitfx.report.profile import profile

NAME = "dense_vs_split"
SHAPE = (1, 3, 224, 224)
CASES = (("vgg16", (8, 2, 2, 4, 4)), ("resnet18", (8, 4, 2, 2, 2)))


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COLUMNS = (
    ("model", "model", str),
    ("macs", "MACs", number),
    ("params", "params", number),
    ("predicted_peak_bytes", "peak", size),
    ("measured_peak_bytes", "measured", size),
    ("eager_seconds", "eager", seconds),
    ("eager_kept", "kept", _ratio),
    ("pools_seconds", "pools", seconds),
    ("pools_kept", "kept", _ratio),
    ("channels_last_seconds", "NHWC", seconds),
    ("channels_last_kept", "kept", _ratio),
    ("onnx_seconds", "onnxruntime", seconds),
    ("onnx_kept", "kept", _ratio),
)


def run(quick: bool) -> list[dict[str, Any]]:
    return [row for model, factors in CASES for row in compared(model, factors, runs=5 if quick else 30)]


def compared(name: str, factors: tuple[int, ...], runs: int) -> list[dict[str, Any]]:
    """Two rows: the model as it is, and split by ``factors``."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    image = torch.randn(SHAPE)
    dense = trace(model, image)
    plan = splitfx.Plan([Group(factors=factors)], input_shape=SHAPE)
    split = splitfx.transform(model, plan, verify=False)
    graphs = {"dense": dense, "split": split}
    pools = {f"{key}, pools": splitfx.transform(graph, SeparablePool(), verify=False) for key, graph in graphs.items()}
    eager = alternate({key: caller(graph, image) for key, graph in (graphs | pools).items()}, runs)
    onnx = alternate_onnx(graphs, image, runs)
    last = alternate_channels_last(model, plan, image, runs)
    found = {key: figures(graph, image) for key, graph in graphs.items()}
    work = found["dense"]["macs"] / found["split"]["macs"]
    label = {"dense": name, "split": f"{name} {','.join(map(str, factors))}"}
    rows = [
        {
            "model": label[key],
            "factors": list(factors) if key == "split" else None,
            **found[key],
            "eager_seconds": eager[key],
            "pools_seconds": eager[f"{key}, pools"],
            "channels_last_seconds": last[key],
            "onnx_seconds": onnx[key],
        }
        for key in graphs
    ]
    rows[1] |= {
        "macs_ratio": work,
        "eager_kept": eager["dense"] / eager["split"] / work,
        "pools_kept": eager["dense, pools"] / eager["split, pools"] / work,
        "channels_last_kept": last["dense"] / last["split"] / work,
        "onnx_kept": onnx["dense"] / onnx["split"] / work,
    }
    return rows


def caller(graph: fx.GraphModule, image: torch.Tensor) -> Callable[[], Any]:
    return lambda: graph(image)


def alternate_channels_last(model: nn.Module, plan: splitfx.Plan, image: torch.Tensor, runs: int) -> dict[str, float]:
    """Both in the channels_last memory format, for which the split is lowered anew."""
    layout: Any = {"memory_format": torch.channels_last}
    model, image = copy.deepcopy(model).to(**layout), image.to(**layout)
    graphs = {"dense": trace(model, image), "split": splitfx.transform(model, plan, verify=False)}
    return alternate({key: caller(graph, image) for key, graph in graphs.items()}, runs)


def alternate_onnx(graphs: dict[str, fx.GraphModule], image: torch.Tensor, runs: int) -> dict[str, float]:
    threads, feed = torch.get_num_threads(), image.numpy()
    with tempfile.TemporaryDirectory() as folder:

        def session(key: str) -> Callable[[], Any]:
            path = export_onnx(graphs[key], Path(folder) / f"{key}.onnx")
            opened = open_session(path, CPU, session_options(threads))
            inputs = {opened.get_inputs()[0].name: feed}
            return lambda: opened.run(None, inputs)

        return alternate({key: session(key) for key in graphs}, runs)


def figures(graph: fx.GraphModule, image: torch.Tensor) -> dict[str, Any]:
    found, real = profile(graph), measure(graph, image, runs=1)
    return {
        "macs": found.macs,
        "params": found.params,
        "predicted_peak_bytes": found.peak_bytes,
        "peak_layer": found.peak_node,
        "measured_peak_bytes": real.peak_bytes,
        "process_peak_bytes": real.process_bytes,
    }
