"""Predicted against measured peak memory: the liveness timeline, and the storage that really lives.

``graph`` is the traced graph, which the prediction is about; ``model`` is the user's own code, whose Python
locals may hold values longer.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torchvision

from splitfx.frontend.trace import trace
from splitfx.ground.table import size
from splitfx.report.measuring import measure
from splitfx.report.profile import profile

NAME = "memory_prediction"
MODELS = (
    "vgg16",
    "resnet18",
    "resnet50",
    "googlenet",
    "densenet121",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
    "vit_b_16",
)
COLUMNS = (
    ("model", "model", str),
    ("predicted_bytes", "predicted", size),
    ("peak_layer", "in", str),
    ("graph_bytes", "graph", size),
    ("error", "error", lambda e: f"{100 * e:+.2f} %"),
    ("model_bytes", "model", size),
    ("process_bytes", "process", size),
)
LEFT = (0, 2)


def run(quick: bool) -> list[dict[str, Any]]:
    return [predicted(name) for name in (MODELS[:3] if quick else MODELS)]


def predicted(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    image = torch.randn(1, 3, 224, 224)
    graph = trace(model, image)
    found, real = profile(graph), measure(graph, image, runs=1)
    return {
        "model": name,
        "predicted_bytes": found.peak_bytes,
        "peak_layer": found.peak_node,
        "graph_bytes": real.peak_bytes,
        "error": found.peak_bytes / real.peak_bytes - 1,
        "model_bytes": measure(model, image, runs=1).peak_bytes,
        "process_bytes": real.process_bytes,
    }
