"""Networks that are no classifiers below a budget: VAE decoders, segmentation, restoration, volumes, audio.

As `benchmarks.tile` does it: a process of its own for each network and allocator, the model as it is and tiled in turn,
medians, live tensor storage with the input counted. diffusers' own tiling, which blends tiles, runs beside the decoder
that it is made for. Needs ``pip install 'splitfx[benchmarks]'``; a network whose library is missing says so in its row.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import splitfx
from benchmarks import tile
from benchmarks.networks import CausalDecoder, Restorer, Separator
from splitfx.errors import SplitfxError
from splitfx.passes import FoldBatchNorm, Tile

NAME = "decoders"
# name -> (input shape, shares of the peak as it is that are asked for besides the least)
CASES: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "vae decode": ((1, 4, 64, 64), (0.45, 0.25)),
    "NAFNet": ((1, 3, 512, 512), (0.5, 0.25)),
    "r3d_18": ((1, 3, 32, 112, 112), (0.5, 0.3)),
    "smp Unet": ((1, 3, 1536, 1536), (0.3, 0.18)),
    "smp UnetPlusPlus": ((1, 3, 1536, 1536), (0.3, 0.18)),
    "smp FPN": ((1, 3, 1536, 1536), (0.3, 0.18)),
    "smp DeepLabV3Plus": ((1, 3, 1536, 1536), (0.3, 0.18)),
    "SegFormer-B0": ((1, 3, 1024, 1024), (0.5,)),
    "like Restormer": ((1, 3, 512, 512), (0.5,)),
    "SwinIR": ((1, 3, 256, 256), (0.5,)),
    "swin_t": ((1, 3, 896, 896), (0.5,)),
    "maxvit_t": ((1, 3, 896, 896), (0.5,)),
    "YOLO11n": ((1, 3, 1280, 1280), (0.5,)),
    "MONAI UNet": ((1, 1, 128, 128, 128), (0.6, 0.4)),
    "MONAI DynUNet": ((1, 1, 128, 128, 128), (0.6, 0.4)),
    "vae encode": ((1, 3, 768, 768), (0.35, 0.15)),
    "separator, 10 s": ((1, 1, 163_840), ()),
    "separator, 60 s": ((1, 1, 983_040), ()),
    "causal decoder, 16 frames": ((1, 8, 16, 16, 16), ()),
    "causal decoder, 64 frames": ((1, 8, 64, 16, 16), ()),
}
WITH_DISK = ("vae decode", "NAFNet", "MONAI UNet")  # maps that wait may go to the disk as well
QUICK = {"separator, 10 s": ((1, 1, 4_096), ()), "causal decoder, 16 frames": ((1, 8, 8, 4, 4), ())}
COLUMNS = (
    *(one for one in tile.COLUMNS if one[0] in ("model", "how", "peak_bytes")),
    ("share", "of it", lambda v: "-" if v is None else f"{v:.2f}"),
    *(one for one in tile.COLUMNS if one[0] in ("predicted_bytes", "ratio_stock", "ratio_page-keeping", "error")),
    ("planning", "planned", lambda v: "-" if v is None else f"{v:.0f} s"),
)
LEFT = (0, 1)


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (shape, shares) in (QUICK if quick else CASES).items():
        case = (name, json.dumps([shape, shares]))
        found = {a: tile.child(case, a, runs=1 if quick else 2, module=__name__) for a in tile.ALLOCATORS}
        rows += tile.merged(name, "x".join(map(str, shape[2:])), found)
        print(*map(json.dumps, rows[-len(found["stock"]) :]), sep="\n", flush=True)
    return rows


# ---------------------------------------------------------------- in the process of one network


class Decode(nn.Module):
    """The decoder of a VAE as a module of its own."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z, return_dict=False)[0]


class Encode(Decode):
    """Its encoder: the moments of the latents."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.encoder(z)


class First(nn.Module):
    """A network whose first result is asked for."""

    def __init__(self, model: nn.Module, of: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.of = model, of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of(self.model(x))


def network(name: str) -> nn.Module:
    """A network with random weights. Raises `ImportError` where its library is not installed."""
    return _made(name).eval()


def _made(name: str) -> nn.Module:
    family, _, kind = name.partition(" ")
    if family == "vae":
        from diffusers import AutoencoderKL  # pyright: ignore[reportMissingImports]

        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(64, 128, 256, 256), layers_per_block=2, latent_channels=4, sample_size=256,
        )  # fmt: skip
        return Decode(vae) if kind == "decode" else Encode(vae)
    if family == "smp":
        import segmentation_models_pytorch as smp  # pyright: ignore[reportMissingImports]

        return getattr(smp, kind)("resnet34", encoder_weights=None, classes=4)
    if family == "MONAI":
        from monai.networks import nets  # pyright: ignore[reportMissingImports]

        if kind == "UNet":
            return nets.UNet(3, 1, 2, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
        return nets.DynUNet(3, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2])
    return _restoring(name) or _plain(name)


def _restoring(name: str) -> nn.Module | None:
    if name == "SwinIR":
        from spandrel.architectures.SwinIR import SwinIR  # pyright: ignore[reportMissingImports]

        return SwinIR(
            upscale=2, img_size=64, window_size=8, depths=[6] * 4, embed_dim=60, num_heads=[6] * 4, mlp_ratio=2,
            upsampler="pixelshuffledirect",
        )  # fmt: skip
    if name == "NAFNet":
        from spandrel.architectures.NAFNet import NAFNet  # pyright: ignore[reportMissingImports]

        return NAFNet(width=32, middle_blk_num=1, enc_blk_nums=[1, 1, 1, 4], dec_blk_nums=[1, 1, 1, 1])
    return None


def _plain(name: str) -> nn.Module:
    if name.startswith("causal"):
        return CausalDecoder()
    if name == "like Restormer":
        return Restorer()
    if name.startswith("separator"):
        return Separator()
    if name == "SegFormer-B0":
        from transformers import (  # pyright: ignore[reportMissingImports]
            SegformerConfig,
            SegformerForSemanticSegmentation,
        )

        return First(
            SegformerForSemanticSegmentation(SegformerConfig(id2label=dict(enumerate("abcdefghij")))),
            lambda found: found.logits,
        )
    if name == "YOLO11n":
        from ultralytics import YOLO  # pyright: ignore[reportMissingImports]

        model: Any = YOLO("yolo11n.yaml").model
        return First(model, lambda found: found[0] if isinstance(found, tuple) else found)
    import torchvision

    if name == "maxvit_t":  # its tables are for one size of the image
        return torchvision.models.maxvit.MaxVit(
            input_size=(896, 896), stem_channels=64, block_channels=[64, 128, 256, 512], block_layers=[2, 2, 5, 2],
            head_dim=32, stochastic_depth_prob=0.2, partition_size=7,
        )  # fmt: skip
    return torchvision.models.get_model(name, weights=None)


def measured(name: str, shape: tuple[int, ...], shares: tuple[float, ...], runs: int) -> list[dict[str, Any]]:
    """Rows of one network: as it is, tiled at each share of its peak and at the least, and a peer if there is one."""
    torch.manual_seed(0)
    try:
        model = network(name)
    except ImportError as why:
        return [{"how": f"not run: {why}"}]
    x = torch.randn(shape)
    graph = splitfx.transform(splitfx.trace(model, x), FoldBatchNorm(), verify=False)
    with torch.no_grad():
        peak = tile.watched(lambda: model(x), model, x)[1]
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: model(x)}
    rows: dict[str, dict[str, Any]] = {"eager": {"how": "eager"}}
    asked = {f"tiled, {share:.2f}": Tile(budget=int(peak * share)) for share in shares}
    asked["tiled, least"] = Tile(budget="least")
    if name in WITH_DISK:
        asked["disk, 0.12"] = Tile(budget=int(peak * 0.12), spill="disk")
        asked["disk, least"] = Tile(budget="least", spill="disk")
    for how, plan in asked.items():
        start = time.perf_counter()
        try:
            split = splitfx.transform(graph, plan, verify=False)
        except SplitfxError as why:
            rows[how] = {"how": how, "refused": str(why)}
            continue
        step = splitfx.explain(split).steps[-1]
        rows[how] = {"how": how, "planning": time.perf_counter() - start, "predicted_bytes": step.after.peak_bytes}
        calls[how] = lambda split=split: split(x)
    if name == "vae decode":
        rows["diffusers tiling"] = {"how": "diffusers tiling"}
        calls["diffusers tiling"] = lambda: _blended(model, x)
    found = tile.finished(rows, calls, model, x, runs)
    for row in found:
        row["share"] = row["peak_bytes"] / rows["eager"]["peak_bytes"] if "peak_bytes" in row else None
    return found


def _blended(model: Any, x: torch.Tensor) -> torch.Tensor:
    """diffusers' tiles of half the latents, blended where they overlap."""
    model.vae.enable_tiling()
    try:
        return model(x)
    finally:
        model.vae.disable_tiling()


if __name__ == "__main__":
    network_name, asked, count = sys.argv[1:]
    sizes, parts = json.loads(asked)
    print(json.dumps(measured(network_name, tuple(sizes), tuple(parts), int(count))))
