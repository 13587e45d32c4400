"""Small networks of the kinds that are worth dividing, whose maps become lower than there are ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def block(i: int, o: int, axes: int, norm: type[nn.Module]) -> nn.Sequential:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    return nn.Sequential(conv(i, o, 3, padding=1), norm(o), nn.ReLU(inplace=True), conv(o, o, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Of images or volumes."""

    def __init__(self, axes: int = 2, width: int = 4, depth: int = 3) -> None:
        super().__init__()
        norm = {2: nn.BatchNorm2d, 3: nn.InstanceNorm3d}[axes]
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[axes]
        widths = [width << d for d in range(depth + 1)]
        self.down = nn.ModuleList(block(i, o, axes, norm) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(up(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.join = nn.ModuleList(block(2 * w, w, axes, norm) for w in reversed(widths[:-1]))
        self.out = {2: nn.Conv2d, 3: nn.Conv3d}[axes](width, 2, 1)
        self.pool = {2: F.max_pool2d, 3: F.max_pool3d}[axes]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        for layer in self.down[:-1]:
            kept.append(layer(x))
            x = self.pool(kept[-1], 2)
        x = self.down[-1](x)
        for up, join in zip(self.up, self.join, strict=True):
            skip = kept.pop()
            x = join(torch.cat([F.interpolate(up(x), size=skip.shape[2:], mode="nearest"), skip], 1))
        return self.out(x)


class Residual(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.before, self.first = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1)
        self.between, self.second = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.silu(self.before(x)))
        return self.short(x) + self.second(F.silu(self.between(y)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + y.transpose(1, 2).reshape(x.shape)


class Decoder(nn.Module):
    """As that of a latent diffusion model: group norms, attention in the middle, nearest rows."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inside, self.first, self.attention = (
            nn.Conv2d(4, width, 3, padding=1),
            Residual(width, width),
            Attention(width),
        )
        self.blocks = nn.ModuleList([Residual(width, width), Residual(width, width // 2)])
        self.ups = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width // 2, width // 2, 3, padding=1)]
        )
        self.norm, self.out = nn.GroupNorm(2, width // 2), nn.Conv2d(width // 2, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.attention(self.first(self.inside(z)))
        for layer, up in zip(self.blocks, self.ups, strict=True):
            x = up(F.interpolate(layer(x), scale_factor=2.0, mode="nearest"))
        return self.out(F.silu(self.norm(x)))


class Classifier(nn.Module):
    """Gates, a pool over the map, and a head that no stage holds; its map is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = block(3, 6, 2, nn.BatchNorm2d), nn.Conv2d(6, 6, 3, 2, 1)
        self.squeeze, self.excite, self.head = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        for _ in range(4):  # the same layer again and again: few rows are left
            x = self.deep(x).relu()
        y = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1)).log_softmax(1), y


class Pair(nn.Module):
    """Two inputs of different heights, and one that is no map; tied convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(self.norm(self.conv(x)))
        y = F.interpolate(self.conv(y), size=x.shape[2:], mode="bilinear")
        return {"sum": (x + y) * scale[:, :, None, None], "small": self.conv(y)[:, :, ::3]}


class Sequence(nn.Module):
    """Places of a sequence: convolutions, and a softmax along all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.score = (
            nn.Conv1d(3, 6, 5, 2, 2),
            nn.Conv1d(6, 6, 3, padding=1),
            nn.Conv1d(6, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu()).relu()
        return y * self.score(y).softmax(2)
