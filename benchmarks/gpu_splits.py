"""GPU checks of carved networks, of sub-models and of training: see `benchmarks.gpu_checks`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_common import PARITY, Row, Setting, model_of, row
from benchmarks.networks import WideResNet
from splitfx.compiler.transform import transform
from splitfx.errors import ExportError, UnsupportedError
from splitfx.export.bundles.submodels import export_bundle
from splitfx.export.bundles.submodels_runner import Bundle
from splitfx.frontend.trace import trace
from splitfx.ground.table import seconds
from splitfx.ground.turns import alternate
from splitfx.parallel import Streams
from splitfx.passes import SplitNet, SubNetworks
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.train.data import load_data
from splitfx.train.finetune import finetune
from splitfx.train.recipe import Recipe

LEVELS = {"stage[23].*": 2, "fc": 2}


def branches(setting: Setting) -> Iterator[Row]:
    """A deep split of WRN-16-8: parity with the masked network in float64, and branches on streams of their own."""
    torch.manual_seed(0)
    size, batch = ((16, 8), 100) if setting.device == "cuda" else ((10, 2), 4)
    name, model = f"WRN-{size[0]}-{size[1]}", WideResNet(*size, 100).eval()
    image = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense = trace(model, image)
    made = {
        how: transform(dense, SplitNet(levels=LEVELS, boundary="full", source="random", lowering=how))  # held to masks
        for how in ("grouped", "branches")
    }
    x = image.to(setting.device)
    exact = copy.deepcopy(made["branches"]).double()
    with torch.inference_mode():
        want = exact(image.double())
    here: dict[str, Any] = {"unsplit": dense, **made}
    here = {how: copy.deepcopy(one).to(setting.device).eval() for how, one in here.items()}
    try:
        here["streams"] = Streams(here["branches"])
    except UnsupportedError as reason:
        yield row("branches", name, "streams", "-", str(reason)[:80], None)
    with torch.inference_mode():
        for how in (one for one in here if one != "unsplit"):
            yield _parity("branches", name, how, here[how](x), want)
    found = alternate({how: lambda run=run: run(x) for how, run in here.items()}, setting.runs, setting.device)
    for how, took in found.items():
        ratio = f"x{found['unsplit'] / took:.2f} of unsplit"
        yield row("branches", name, f"{how}, batch {batch}", seconds(took), ratio, None, value=took)


def sub_models(setting: Setting) -> Iterator[Row]:
    """A model with sub-models moves to the device as one, and its bundle runs there."""
    name = "resnet18"
    split = transform(model_of(name), SubNetworks(budgets=("0.8x", "0.4x"), statistics="private"), _cpu(setting))
    assert isinstance(split, SubNetworksGraph)
    exact = copy.deepcopy(split).double()
    with torch.inference_mode():
        wanted = exact.forward_all(_cpu(setting).double())
    moved = copy.deepcopy(split).to(setting.device)
    shared = {id(p) for p in moved.parameters()}
    with torch.inference_mode():
        found = moved.forward_all(setting.image())
        for one, got, want in zip(moved.names, found, wanted, strict=True):
            yield _parity("sub-models", name, one, got, want)
    for number, one in enumerate(moved.names[1:]):
        detached = moved.detach(number)
        own = all(id(p) in shared and p.device.type == setting.device for p in detached.parameters())
        yield row(
            "sub-models", name, f"{one} detached", "shares" if own else "has copies", "weights on the device", own
        )
    with tempfile.TemporaryDirectory() as place:
        folder = export_bundle(split, Path(place) / "bundle", runs=1)
        for provider in dict.fromkeys((setting.device, "cpu")):
            yield from _bundle(name, folder, provider, split, _cpu(setting))


def _bundle(name: str, folder: Path, provider: str, split: SubNetworksGraph, image: torch.Tensor) -> Iterator[Row]:
    try:
        bundle = Bundle(folder, provider)
        took = bundle.warm_up(image, runs=5)
    except ExportError as reason:
        yield row("bundle", name, provider, "-", str(reason)[:80], None)
        return
    with torch.inference_mode():
        want = split.double().forward_all(image.double())[0]
    split.float()
    answer = bundle.run(image)
    yield _parity("bundle", name, f"{answer.model} on {provider}", answer.outputs[0], want, 1e-4)
    for one, value in took.items():
        yield row("bundle", name, f"{one} on {provider}", seconds(value), "one image", None, value=value)


def training(setting: Setting) -> Iterator[Row]:
    """Two epochs on digits in every precision of the device."""
    device = "auto" if setting.device == "cuda" else "cpu"
    data = load_data("digits", (3, 16, 16))
    for precision in ("no", "bf16", "fp16") if setting.device == "cuda" else ("no", "bf16"):
        torch.manual_seed(0)
        graph = trace(WideResNet(10, 1, 10), torch.zeros(1, 3, 16, 16))
        recipe = Recipe(epochs=2, lr=0.05, mixed_precision=precision)  # type: ignore[arg-type]
        history = finetune(graph, data.train, data.val, recipe, device=device, progress=False)
        best = max(one.val.accuracy for one in history.epochs)
        finite = all(bool(torch.isfinite(p).all()) for p in graph.parameters())
        yield row("training", "WRN-10-1", precision, f"{best:.1f} %", "above 50 %", finite and best > 50, value=best)


def _cpu(setting: Setting) -> torch.Tensor:
    return setting.image().cpu()


def _parity(check: str, name: str, what: str, got: torch.Tensor, want: torch.Tensor, allowed: float = PARITY) -> Row:
    error = float((got.cpu().double() - want).abs().max() / want.abs().max())
    return row(check, name, what, f"{error:.1e}", f"at most {allowed:.0e}", error <= allowed, value=error)
