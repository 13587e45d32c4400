"""Out of memory: ask for a plan below a budget, run it, and look at what was done.

A small U-Net on a large image; half the memory, the same output, no training.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import splitfx


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 64)
        self.merge2, self.merge1, self.head = block(96, 32), block(48, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        y = self.merge2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.head(self.merge1(torch.cat([F.interpolate(y, scale_factor=2.0), a], 1)))


def main(out: Path = Path("demo-out"), size: int = 512) -> splitfx.Plans:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = UNet().eval()
    found = splitfx.plan(model, (1, 3, size, size), peak="0.5x")
    print(found)
    found.save(out / "unet.toml", overwrite=True)  # with comments that say why
    small = splitfx.transform(model, out / "unet.toml")
    print(f"\n{splitfx.compare(model, small)}")
    print(f"\nlook at {splitfx.inspect_html(small, out / 'unet.html', overwrite=True)}")
    return found


if __name__ == "__main__":
    main()
