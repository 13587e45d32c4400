"""Measured latency of sub-models beside their MACs: eager and onnxruntime, all models of a network in turn.

The small VGG of `subnetworks`, the paper's VGG-16 for 32×32 with its two sub-models, and ResNet-18 at 224×224 with one
in front of each later stage; one image, one thread, medians.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import splitfx
from benchmarks import fusion_training
from benchmarks.networks import vgg16
from splitfx.ground.table import number, seconds, size
from splitfx.passes import SubNetworks

NAME = "subnetworks_latency"
RUNS = 60
COLUMNS = (
    ("network", "network", str),
    ("model", "model", str),
    ("macs", "MACs", number),
    ("share", "of the base", lambda v: f"{v:.2f}"),
    ("peak_bytes", "peak", size),
    ("seconds", "eager", seconds),
    ("onnx_seconds", "onnxruntime", seconds),
)
LEFT = (0, 1)


def run(quick: bool) -> list[dict[str, Any]]:
    return [row for name in (list(NETWORKS)[:1] if quick else NETWORKS) for row in rows_of(name, 5 if quick else RUNS)]


def rows_of(name: str, runs: int) -> list[dict[str, Any]]:
    make, sizes, cuts = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.zeros(1, *sizes)
    split: Any = splitfx.transform(make().eval(), SubNetworks(cuts=cuts), x, verify=False)
    figures = split.figures(runs)
    with tempfile.TemporaryDirectory() as folder:
        bundle = splitfx.Bundle(splitfx.export_bundle(split, Path(folder) / "bundle", runs=2))
        bundle.warm_up(x, runs=min(runs, 50))
        measured = bundle.medians()
    print(f"  {name} is done", flush=True)
    return [
        {
            "network": name,
            "model": m.name,
            "macs": m.macs,
            "ops": m.ops,
            "share": m.macs / figures[0].macs,
            "peak_bytes": m.peak_bytes,
            "seconds": m.seconds,
            "onnx_seconds": measured[m.name],
        }
        for m in figures
    ]


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], tuple[int | str, ...]]] = {
    "small VGG, 16×16": (lambda: fusion_training.network(0), (1, 16, 16), (2, 4)),
    "VGG-16, 32×32": (vgg16, (3, 32, 32), (2, 7)),
    "ResNet-18, 224×224": (resnet18, (3, 224, 224), ("layer2", "layer3", "layer4")),
}
