"""Compile time: trace, facts and transform, for every torchvision classification model and for long chains.

The promises: under 10 s for every torchvision classification model at its own input size of 224, and at most
13 times as long for a chain of 3000 layers as for one of 300.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import fx, nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.errors import SplitfxError
from splitfx.passes import Group
from splitfx.report.table import seconds, shorten
from splitfx.tracing import trace

NAME = "compile_time"
COLUMNS = (
    ("model", "model", str),
    ("nodes", "nodes", str),
    ("trace_seconds", "trace", seconds),
    ("facts_seconds", "facts", seconds),
    ("transform_seconds", "transform", seconds),
    ("total_seconds", "total", seconds),
    ("outcome", "outcome", lambda text: shorten(str(text), 24)),
)
QUICK = ("alexnet", "resnet18", "densenet121", "swin_t")


def run(quick: bool) -> list[dict[str, Any]]:
    names = QUICK if quick else torchvision.models.list_models(module=torchvision.models)
    rows = [timed(name, *torchvision_model(name)) for name in names]
    short, long = (30, 300) if quick else (300, 3000)
    chains = [timed(f"chain of {layers} layers", chain(layers), torch.zeros(1, 8, 16, 16)) for layers in (short, long)]
    chains[1]["ratio_to_short_chain"] = chains[1]["total_seconds"] / chains[0]["total_seconds"]
    chains[1]["outcome"] += f", {chains[1]['ratio_to_short_chain']:.1f} times"
    return rows + chains


def torchvision_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    return model, torch.zeros(1, 3, 224, 224)


def chain(layers: int) -> nn.Module:
    """Convs and ReLUs in a row, with a pool in the middle to make two blocks."""
    half = layers // 4
    part = [one for _ in range(half) for one in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    rest = [one for _ in range(half) for one in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*part, nn.MaxPool2d(2), *rest, nn.MaxPool2d(2)).eval()


def timed(name: str, model: nn.Module, image: torch.Tensor) -> dict[str, Any]:
    """Seconds of the three parts."""
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
