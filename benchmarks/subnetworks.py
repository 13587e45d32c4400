"""What sub-models reach, and what they cost the base model: accuracy of each on digits, over five seeds.

A small VGG on scikit-learn's digits, trained alone and with two sub-models (behind 2 and 4 convs) by the multi-model
loss: with the base model's running statistics (the paper's), with statistics of their own, and with the base model as
their teacher besides. Five seeds, each with a network and a shuffle of its own; mean and standard deviation of the last
epoch, on images that nothing was chosen by.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

import splitfx
from benchmarks.fusion_training import network
from splitfx import MultiModelLoss, Recipe
from splitfx.ground.table import number
from splitfx.passes import SubNetworks
from splitfx.train.data import load_data
from splitfx.train.finetune import evaluate

NAME = "subnetworks"
SHAPE = (1, 16, 16)
CUTS = (2, 4)
SEEDS = 5
EPOCHS = 8
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "shared": ("shared", {}),
    "own": ("private", {}),
    "own, taught": ("private", {"distillation": 0.5, "temperature": 2.0}),
}
COLUMNS = (
    ("model", "model", str),
    ("macs", "MACs", number),
    ("alone", "alone", lambda v: _words(v)),
    *((name, name, lambda v: _words(v)) for name in SETTINGS),
)


def run(quick: bool) -> list[dict[str, Any]]:
    seeds, epochs = (1, 1) if quick else (SEEDS, EPOCHS)
    digits = load_data("digits", SHAPE)
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        recipe = Recipe(epochs=epochs, lr=0.01, seed=seed, keep="last")
        alone = network(seed).eval()
        splitfx.finetune(alone, digits.train, digits.val, recipe, progress=False)
        found.setdefault(("base", "alone"), []).append(evaluate(alone, digits.val).accuracy)
        for name, (kept, options) in SETTINGS.items():
            split = divided(network(seed), kept, seed)
            loss = MultiModelLoss(**options)
            splitfx.finetune(split, digits.train, digits.val, recipe, loss=loss, progress=False)
            for model, graph in zip(split.names, [split.base(), split.detach(0), split.detach(1)], strict=True):
                found.setdefault((model, name), []).append(evaluate(graph, digits.val).accuracy)
        print(f"  seed {seed} is done", flush=True)
    rows = []
    for one in divided(network(0), "shared", 0).figures():
        scores = {
            setting: {"mean": statistics.mean(values), "sd": statistics.pstdev(values), "all": values}
            for (model, setting), values in found.items()
            if model == one.name
        }
        about = {"model": one.name, "macs": one.macs, "params": one.params}
        rows.append({**about, **scores, "seeds": seeds, "epochs": epochs, "cuts": list(CUTS)})
    return rows


def divided(model: nn.Module, kept: str, seed: int) -> Any:
    step = SubNetworks(cuts=CUTS, statistics=kept, seed=seed)  # type: ignore[arg-type]
    return splitfx.transform(model.eval(), step, torch.zeros(1, *SHAPE))


def draw(path: str = "docs/subnetworks.svg") -> None:
    """The README's picture from the kept results of this benchmark and of `subnetworks_latency`."""
    from benchmarks.run import load
    from splitfx.report.plots.picture import chart

    times = {
        r["model"]: 1e6 * r["onnx_seconds"] for r in load("subnetworks_latency")["rows"] if "small" in r["network"]
    }
    rows = load(NAME)["rows"]
    with chart(path, True, "one image under onnxruntime, one thread [µs]") as axes:
        for setting in ("alone", *SETTINGS):
            known = [row for row in rows if setting in row]
            x, y = [times[row["model"]] for row in known], [row[setting]["mean"] for row in known]
            spread = [row[setting]["sd"] for row in known]
            axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=setting)
        for row in rows:
            axes.annotate(row["model"], (times[row["model"]], 99.75), ha="center")


def _words(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['mean']:.2f} ± {value['sd']:.2f} %"
