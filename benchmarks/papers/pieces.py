"""Paper C, Zhuang et al.: an image in 2x2 pieces, combined behind a layer: accuracy against memory (Fig. 4)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from benchmarks.papers import common
from benchmarks.papers.common import Job, Row, Rows, percent
from splitfx.ground.table import size as in_bytes
from splitfx.ground.table import table
from splitfx.passes import Tile, TileZeroHalo
from splitfx.report.compare_halo import compare_halo

LAYERS = ("stem.2", "stem.3", "conv2.0", "conv2.1", "conv3.0", "conv3.1", "conv4.1")


class Resized(nn.Module):
    """The network on a smaller image: the paper's method 1."""

    def __init__(self, model: nn.Module, pixels: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.pixels = model, pixels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(F.interpolate(x, self.pixels, mode="bilinear", antialias=True, align_corners=False))


def jobs(size: Row) -> dict[str, Job]:
    whole: dict[str, Job] = {"C4 whole": functools.partial(_whole, size)}
    return whole | {f"C4 {layer}": functools.partial(_combined, layer, size) for layer in LAYERS}


def _whole(size: Row, done: Rows) -> Row:
    return {"accuracy": common.accuracy(common.resnet(size), size)}


def _combined(layer: str, size: Row, done: Rows) -> Row:
    """Pieces with zeros at their edges, the exact `Tile` over the same layers, and a smaller image at the same peak."""
    model = common.resnet(size)
    known = splitfx.trace(model, common.example())
    name = _named(known, layer)
    one = compare_halo(known, common.calibration(8)[:1], (2, 2), [name], progress=False).rows[0]
    zero = splitfx.transform(known, TileZeroHalo(grid=(2, 2), until=name))
    exact = splitfx.transform(known, Tile(until=name, rows=4))
    row: Row = {
        "peak": one.peak_bytes,
        "of": one.unsplit_bytes,
        "accuracy": common.accuracy(zero, size),
        "exact": common.accuracy(exact, size),
        "exact_peak": splitfx.explain(exact).steps[-1].after.peak_bytes,
        "resized": one.resized,
    }
    if one.resized is not None:
        row["resized_accuracy"] = common.accuracy(Resized(model, one.resized), size)
    return row


def _named(graph: Any, layer: str) -> str:
    """The last place of a module of the user's where pieces can be combined."""
    from splitfx.analysis import facts
    from splitfx.tiling.zero import combine_layers

    places = list(combine_layers(graph, facts(graph)))
    return [one for one in places if one == layer or one.startswith(f"{layer}.")][-1]


def report(rows: Rows) -> str:
    whole = rows.get("C4 whole", {}).get("accuracy")
    lines = []
    for layer in LAYERS:
        row = rows.get(f"C4 {layer}", {})
        smaller = row.get("resized")
        lines.append(
            [
                layer,
                f"{row['peak'] / row['of']:.2f}" if row else "-",
                percent(row.get("accuracy")),
                f"{row['exact_peak'] / row['of']:.2f}" if row else "-",
                percent(row.get("exact")),
                f"{smaller[0]}x{smaller[1]}" if smaller else "-",
                percent(row.get("resized_accuracy")),
            ]
        )
    head = ["combined behind", "peak", "accuracy [%]", "exact: peak", "accuracy [%]", "smaller image", "accuracy [%]"]
    of = (
        f", of {in_bytes(next(r['of'] for r in rows.values() if 'of' in r))}"
        if any("of" in r for r in rows.values())
        else ""
    )
    return f"C, Fig. 4: ResNet-18 in 2x2 pieces; whole {percent(whole)} %{of}\n\n" + table(head, lines)
