"""Tables 2 to 4 of the SplitNet paper from real modules, carved with equal random groups.

Parameters are weights of convolutions and linear layers, without norms (WRN counts the classifier's bias too); FLOPs
are 2 x MACs, for the split AlexNets with one more per output element of the convolutions and linear layers (as the
paper counts them there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

import splitfx
from benchmarks.networks import AlexNet, ResNet18, WideResNet
from splitfx.analysis import facts
from splitfx.analysis.shapes import shape
from splitfx.passes import SplitNet

NAME = "splitnet_tables"
COLUMNS = (
    ("network", "network", str),
    ("row", "row", str),
    ("params", "parameters", lambda v: f"{v / 1e6:.3f} M"),
    ("less_params", "fewer", lambda v: "-" if v is None else f"{v:.3f} %"),
    ("paper_params", "paper", str),
    ("flops", "FLOPs", lambda v: f"{v / 1e9:.4f} G"),
    ("less_flops", "fewer", lambda v: "-" if v is None else f"{v:.3f} %"),
    ("paper_flops", "paper", str),
)
LEFT = (0, 1)

Rows = dict[str, tuple[dict[str, int], str, str]]
# What the paper prints: parameters in millions and the reduction; FLOPs in 10^9 and the reduction.
TABLES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, Rows]] = {
    "WRN-16-8": (
        WideResNet,
        (1, 3, 32, 32),
        "full",
        {
            "FC split": ({"fc": 4}, "11.0, 0.35 %", "3.10, 0.0 %"),
            "shallow": ({"stage3.*": 2, "fc": 5}, "7.42, 32.54 %", "2.64, 14.63 %"),
            "deep": ({"stage[23].*": 2, "fc": 2}, "5.90, 46.39 %", "2.11, 31.97 %"),
            "hierarchical": ({"stage2.*": 2, "stage3.*": 4, "fc": 4}, "4.12, 62.58 %", "1.88, 39.29 %"),
        },
    ),
    "AlexNet": (
        AlexNet,
        (1, 3, 224, 224),
        "grouped",
        {
            "1-1-3": ({"fc8": 3}, "59.64, 4.38 %", "2.273, 0.21 %"),
            "1-2-5": ({"fc7": 2, "fc8": 5}, "50.69, 18.72 %", "2.256, 1.00 %"),
            "2-4-8": ({"fc6": 2, "fc7": 4, "fc8": 8}, "27.34, 56.17 %", "2.209, 3.05 %"),
            "2x5": ({"conv[45].*": 2, "fc?": 2}, "31.96, 48.76 %", "1.847, 18.95 %"),
        },
    ),
    "ResNet-18x2": (
        ResNet18,
        (1, 3, 224, 224),
        "grouped",
        {
            "1-1-3": ({"fc": 3}, "44.99, 1.49 %", "14.04, 0.01 %"),
            "1-2-2": ({"conv5.*": 2, "fc": 2}, "28.39, 37.84 %", "12.39, 11.72 %"),
            "2-2-2": ({"conv[45].*": 2, "fc": 2}, "24.21, 47.00 %", "10.75, 23.42 %"),
        },
    ),
}


def run(quick: bool) -> list[dict[str, Any]]:
    names = ["WRN-16-8"] if quick else list(TABLES)
    return [row for name in names for row in table_of(name)]


def table_of(name: str) -> list[dict[str, Any]]:
    """The baseline's row and one per split of a network."""
    make, sizes, boundary, rows = TABLES[name]
    torch.manual_seed(0)
    example = torch.zeros(sizes)
    graph = splitfx.trace(make().eval(), example)
    params, flops = figures(graph, bias=False)
    none = dict.fromkeys(("less_params", "less_flops"))
    found = [{"network": name, "row": "baseline", "params": params, "flops": flops, **none}]
    for row, (levels, *_) in rows.items():
        step = SplitNet(levels=levels, boundary=boundary, source="random", lowering="grouped")  # type: ignore[arg-type]
        fewer, less = figures(splitfx.transform(graph, step, example), bias=name == "AlexNet")
        reduced = {"less_params": 100 * (1 - fewer / params), "less_flops": 100 * (1 - less / flops)}
        found.append({"network": name, "row": row, "params": fewer, "flops": less, **reduced})
    printed = {"baseline": ("", ""), **{row: (p, f) for row, (_, p, f) in rows.items()}}
    return [r | dict(zip(("paper_params", "paper_flops"), printed[str(r["row"])], strict=True)) for r in found]


def figures(graph: fx.GraphModule, bias: bool) -> tuple[int, int]:
    """Parameters of the convolutions and linear layers, and FLOPs."""
    layers = [m for m in graph.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    params = sum(p.numel() for m in layers for p in m.parameters())
    known = facts(graph)
    elements = sum(torch.Size(shape(known.shapes[e.node])).numel() for e in known.axes.edges) if bias else 0
    return params, 2 * splitfx.profile(
        graph, torch.zeros(shape(known.shapes[next(iter(graph.graph.nodes))]))
    ).macs + elements
