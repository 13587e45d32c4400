"""What sub-models reach, and what they cost the base model: Fashion-MNIST, a small VGG, three seeds.

A VGG (16-16-32-32-64-64) is trained on 10,000 images for 3 epochs: alone, each sub-model's layers alone (behind 2 and 4
convs), and all together by the multi-model loss, with the choices there are for the statistics of batch norms and with
the base model as teacher. Then sub-models of a network that was trained already: with step-downs as they are drawn and
solved on 512 images, before training and after one epoch. Each row is stored as it is finished.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import splitfx
from benchmarks import fashion
from splitfx import MultiModelLoss, Recipe
from splitfx.ground.table import number, table
from splitfx.passes import SubNetworks
from splitfx.train.finetune import evaluate

NAME = "subnetworks"
WIDTHS, CUTS = (16, 32, 64), (2, 4)
SEEDS, EPOCHS, IMAGES, CALIBRATION = 3, 3, 10_000, 512
MODELS = ("base", "sub0", "sub1")


def base_only(split: Any, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The multi-model loss where only the base model moves the statistics: sub-models are normalised by them as they
    are, in training too."""
    outputs = [split(inputs)]
    norms = [m for path, m in split.named_modules() if isinstance(m, nn.BatchNorm2d) and not path.startswith("sub")]
    for norm in norms:
        norm.training = False
    outputs += [split.forward_one(i, inputs) for i in range(len(CUTS))]
    for norm in norms:
        norm.training = split.training
    return {name: F.cross_entropy(one, targets) for name, one in zip(split.names, outputs, strict=True)}


# setting: the statistics of a sub-model's norms, and the loss
TOGETHER: dict[str, tuple[str, Callable[..., Any]]] = {
    "shared, the paper's": ("shared", MultiModelLoss(distillation=0.0)),
    "of the base only": ("shared", base_only),
    "private": ("private", MultiModelLoss(distillation=0.0)),
    "private, half taught": ("private", MultiModelLoss(distillation=0.5)),
}
STARTS = {"as drawn": False, "solved": True}


def settings(quick: bool) -> dict[str, Any]:
    sizes = {"images": 256, "epochs": 1, "seeds": 1} if quick else {"images": IMAGES, "epochs": EPOCHS, "seeds": SEEDS}
    return {**sizes, "widths": list(WIDTHS), "cuts": list(CUTS)}


def jobs(size: dict[str, Any]) -> dict[str, Callable[[Any], dict[str, Any]]]:
    """What is measured, by name: each gives one row."""
    found: dict[str, Callable[[Any], dict[str, Any]]] = {}
    for seed in range(size["seeds"]):
        for make, names in ((_alone, ("alone",)), (_together, tuple(TOGETHER)), (_started, tuple(STARTS))):
            for name in names:
                found[f"{name}, seed {seed}"] = functools.partial(make, name, seed, size)
    return found


def report(rows: list[dict[str, Any]]) -> str:
    """Accuracies by setting, mean and standard deviation over the seeds."""
    macs = next((row["macs"] for row in rows), {})
    headings = ["", *(f"{m}, {number(macs[m])} MACs" if m in macs else m for m in MODELS), "seeds"]
    lines = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        mine = [row["accuracy"] for row in rows if row["setting"] == name]
        lines.append([name, *(spread([one[m] for one in mine if m in one]) for m in MODELS), str(len(mine))])
    return table(headings, lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f} %" if values else "-"


def divided(model: nn.Module, kept: str, seed: int, images: torch.Tensor | None = None) -> Any:
    step = SubNetworks(cuts=CUTS, statistics=kept, seed=seed, calibration=images)  # type: ignore[arg-type]
    return splitfx.transform(model.eval(), step, torch.zeros(1, 1, 28, 28))


def _alone(name: str, seed: int, size: dict[str, Any], done: Any) -> dict[str, Any]:
    """Each model's layers in a network of its own."""
    split, found = divided(fashion.network(seed, WIDTHS), "private", seed), {}
    for model, graph in zip(MODELS, (split.base(True), *(split.detach(i, True) for i in (0, 1))), strict=True):
        _trained(graph, seed, size, size["epochs"])
        found[model] = _accuracy(graph, size)
    return _row(name, seed, split, found)


def _together(name: str, seed: int, size: dict[str, Any], done: Any) -> dict[str, Any]:
    kept, loss = TOGETHER[name]
    split = divided(fashion.network(seed, WIDTHS), kept, seed)
    _trained(split, seed, size, size["epochs"], loss)
    return _row(name, seed, split, _accuracies(split, size))


def _started(name: str, seed: int, size: dict[str, Any], done: Any) -> dict[str, Any]:
    """Sub-models of a trained network: as they are, and after one epoch of all together."""
    model = _base(seed, size)
    split = divided(model, "private", seed, fashion.calibration(CALIBRATION) if STARTS[name] else None)
    before = _accuracies(split, size)
    _trained(split, seed, size, 1, MultiModelLoss())
    return _row(name, seed, split, before) | {"after_1": _accuracies(split, size)}


def _base(seed: int, size: dict[str, Any]) -> nn.Module:
    """The network trained alone; kept in the folder for temporary files."""
    kept = Path(tempfile.gettempdir()) / "splitfx_benchmarks" / f"subnetworks_{seed}_{size['images']}.safetensors"
    model = fashion.network(seed, WIDTHS).eval()
    if kept.is_file():
        model.load_state_dict(load_file(kept))
        return model
    _trained(model, seed, size, size["epochs"])
    kept.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, kept)
    return model


def _trained(model: nn.Module, seed: int, size: dict[str, Any], epochs: int, loss: Any = None) -> None:
    sets = fashion.data(size["images"])
    recipe = Recipe(
        epochs=epochs, batch_size=64, lr=0.05, warmup_epochs=int(epochs > 1), seed=seed, keep="last", distillation=0.0
    )
    splitfx.finetune(model, sets.train, Subset(sets.val, range(256)), recipe, loss=loss, progress=False)


def _accuracies(split: Any, size: dict[str, Any]) -> dict[str, float]:
    graphs = (split.base(), *(split.detach(i) for i in range(len(CUTS))))
    return {model: _accuracy(graph, size) for model, graph in zip(MODELS, graphs, strict=True)}


def _accuracy(graph: nn.Module, size: dict[str, Any]) -> float:
    held = fashion.data(size["images"]).val
    return evaluate(graph, held if size["images"] == IMAGES else Subset(held, range(256)), progress=False).accuracy


def _row(name: str, seed: int, split: Any, found: dict[str, float]) -> dict[str, Any]:
    return {"setting": name, "seed": seed, "accuracy": found, "macs": {m.name: m.macs for m in split.figures()}}
