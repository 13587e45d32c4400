"""A VAE decoder below a memory budget: attention and group norms inside, the same image, no seams. Seconds.

With diffusers the same is one line: ``vae.decoder = splitfx.transform(vae.decoder, Tile(budget="0.4x"), latents)``,
in place of ``vae.enable_tiling()``, which blends tiles that were decoded apart.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import splitfx
from splitfx.passes import Tile


class Block(nn.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, ins), nn.Conv2d(ins, outs, 3, padding=1)
        self.around = nn.Conv2d(ins, outs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.around(x) + self.conv(F.silu(self.norm(x)))


class Decoder(nn.Module):
    """As in latent diffusion: attention over the latents, then three times up."""

    def __init__(self, widths: tuple[int, ...] = (64, 48, 32, 16)) -> None:
        super().__init__()
        self.first, self.qkv, self.out = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 192, 1), nn.Conv2d(64, 64, 1)
        self.blocks = nn.ModuleList(Block(i, o) for i, o in zip((64, *widths), widths, strict=False))
        self.norm, self.last = nn.GroupNorm(8, widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.first(z)
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        for level, block in enumerate(self.blocks):
            x = block(x if level == 0 else F.interpolate(x, scale_factor=2.0))
        return self.last(F.silu(self.norm(x)))


def main(out: Path = Path("demo-out/decoder"), side: int = 32) -> float:
    """The share of the memory that is left."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    decoder, latents = Decoder().eval(), torch.randn(1, 4, side, side)
    split = splitfx.transform(decoder, Tile(budget="0.4x"), latents)
    print(splitfx.explain(split))
    with torch.inference_mode():
        difference = float((split(latents) - decoder(latents)).abs().max())
    step = splitfx.explain(split).steps[-1]
    print(f"largest difference: {difference:.1e}; peak {step.after.peak_bytes / step.before.peak_bytes:.2f} of it")
    splitfx.inspect_html(split, out / "decoder.html", overwrite=True)
    return step.after.peak_bytes / step.before.peak_bytes


if __name__ == "__main__":
    main()
