"""Networks that no library has: those of the SplitNet paper (Kim et al., ICML 2017), as its tables count them, a causal
decoder of video, a separator of audio, a network like Restormer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


class PreActivated(nn.Module):
    """Wide ResNet's basic block: norm and activation in front of each conv, the shortcut behind the first pair."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outs), nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(ins, outs, 1, stride, bias=False) if (ins, stride) != (outs, 1) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        around = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + around


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images (Zagoruyko and Komodakis, arXiv 1605.07146)."""

    def __init__(self, depth: int = 16, width: int = 8, classes: int = 100) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        stages = [
            nn.Sequential(
                *(
                    PreActivated(widths[s - 1] if i == 0 else widths[s], widths[s], 2 if s > 1 > i else 1)
                    for i in range(blocks)
                )
            )
            for s in (1, 2, 3)
        ]
        self.stage1, self.stage2, self.stage3 = stages
        self.bn, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn(x)), 1).flatten(1))


class PaddedConv(nn.Module):
    """A conv behind TensorFlow's SAME padding, which puts the odd row at the end."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, size: int) -> None:
        super().__init__()
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        self.pad = (total // 2, total - total // 2) * 2
        self.conv = nn.Conv2d(ins, outs, kernel, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(F.pad(x, self.pad)))


class AlexNet(nn.Module):
    """AlexNet as the paper counts it: 96-256-384-384-256 dense convs without bias, 224x224 images, SAME padding."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = PaddedConv(3, 96, 11, 4, 224)
        self.conv2 = PaddedConv(96, 256, 5, 1, 27)
        self.conv3 = PaddedConv(256, 384, 3, 1, 13)
        self.conv4 = PaddedConv(384, 384, 3, 1, 13)
        self.conv5 = PaddedConv(384, 256, 3, 1, 13)
        self.pool = nn.MaxPool2d(3, 2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096, bias=False)
        self.fc7 = nn.Linear(4096, 4096, bias=False)
        self.fc8 = nn.Linear(4096, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        x = self.pool(self.conv5(self.conv4(self.conv3(x)))).flatten(1)
        return self.fc8(F.relu(self.fc7(F.relu(self.fc6(x)))))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.bn2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.shortcut = None
        if ins != outs:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + around)


class ResNet18(nn.Module):
    """ResNet-18 of any width; twice the usual one in the SplitNet paper. ``small``: a stem for 32x32 images, whose pool
    is one of the five places where the map shrinks."""

    def __init__(self, width: int = 128, classes: int = 1000, small: bool = False) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        first = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        pool = nn.MaxPool2d(2) if small else nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), pool)
        stages = [
            nn.Sequential(Residual(ins, outs, 2 if outs > ins else 1), Residual(outs, outs, 1))
            for ins, outs in pairwise(widths)
        ]
        self.conv2, self.conv3, self.conv4, self.conv5 = stages
        self.fc = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv5(self.conv4(self.conv3(self.conv2(self.stem(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def vgg16(part: int = 1) -> nn.Module:
    """VGG-16 for 3x32x32 as in Fuengfusin and Tamukoh: 13 convs with batch norm, one linear layer; ``part``: what
    its widths are divided by."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(channels, width // part, 3, padding=1), nn.BatchNorm2d(width // part), nn.ReLU()]
            channels = width // part
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


class UNet3d(nn.Module):
    """A 3-D U-Net of three levels, two convs with batch norms each, for three classes of voxels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(_pair(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.lift = nn.ModuleList(nn.ConvTranspose3d(w, w // 2, 2, 2) for w in widths[:0:-1])
        self.up = nn.ModuleList(_pair(w, w // 2) for w in widths[:0:-1])
        self.last = nn.Conv3d(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for level in self.down:
            x = level(F.max_pool3d(x, 2) if kept else x)
            kept.append(x)
        for lift, level, skip in zip(self.lift, self.up, kept[-2::-1], strict=True):
            x = level(torch.cat([skip, lift(x)], 1))
        return self.last(x)


def _pair(ins: int, outs: int) -> nn.Sequential:
    layers = [(nn.Conv3d(i, outs, 3, 1, 1, bias=False), nn.BatchNorm3d(outs), nn.ReLU()) for i in (ins, outs)]
    return nn.Sequential(*layers[0], *layers[1])


class CausalConv3d(nn.Module):
    """A conv over time, height and width that looks back in time only, as video decoders do (Wan, CogVideoX)."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(ins, outs, 3, padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 0, 2, 0)))


class CausalBlock(nn.Module):
    """Two causal convs behind norms over channels, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = CausalConv3d(width, width), CausalConv3d(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5))
        return x + self.second(F.silu(F.normalize(y, dim=1) * x.shape[1] ** 0.5))


class CausalDecoder(nn.Module):
    """A decoder of video latents, [N, 8, T, H, W] to [N, 3, T, 8 H, 8 W]: causal in time, norms over channels."""

    def __init__(self, widths: tuple[int, ...] = (64, 48, 32, 16)) -> None:
        super().__init__()
        self.first = CausalConv3d(8, widths[0])
        self.blocks = nn.ModuleList(CausalBlock(width) for width in widths)
        self.turns = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in pairwise(widths))
        self.last = CausalConv3d(widths[-1], 3)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.first(z)
        for place, block in enumerate(self.blocks):
            if place:
                z = F.interpolate(self.turns[place - 1](z), scale_factor=(1.0, 2.0, 2.0))
            z = block(z)
        return self.last(z)


class Separator(nn.Module):
    """A separator of audio, [N, 1, samples]: strided convs down, dilated convs, transposed convs up, with skips."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        sizes = [1] + [width * 2 ** min(i, 2) for i in range(depth)]
        self.down = nn.ModuleList(nn.Conv1d(a, b, 8, 4, 2) for a, b in pairwise(sizes))
        self.middle = nn.ModuleList(nn.Conv1d(sizes[-1], sizes[-1], 3, padding=2**i, dilation=2**i) for i in range(4))
        self.up = nn.ModuleList(nn.ConvTranspose1d(b, a, 8, 4, 2) for a, b in pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.down:
            kept.append(x)
            x = F.gelu(layer(x))
        for layer in self.middle:
            x = x + F.gelu(layer(x))
        for layer, before in zip(reversed(self.up), reversed(kept), strict=True):
            x = layer(x)
            x = F.gelu(x + before) if before.shape[1] > 1 else x
        return x


class ChannelAttention(nn.Module):
    """Restormer's block (Zamir et al., arXiv 2111.09881): attention among channels over all places, a gated conv."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, wide = heads, int(dim * 2.66)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Sequential(nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(3 * dim, 3 * dim, 3, 1, 1, groups=3 * dim))
        self.out, self.scale = nn.Conv2d(dim, dim, 1), nn.Parameter(torch.ones(heads, 1, 1))
        self.wide = nn.Sequential(nn.Conv2d(dim, 2 * wide, 1), nn.Conv2d(2 * wide, 2 * wide, 3, 1, 1, groups=2 * wide))
        self.narrow = nn.Conv2d(wide, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(_normed(self.norm1, x)).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.scale).softmax(-1)
        x = x + self.out((weights @ v).reshape(x.shape))
        gate, y = self.wide(_normed(self.norm2, x)).chunk(2, 1)
        return x + self.narrow(F.gelu(gate) * y)


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Restorer(nn.Module):
    """A network like Restormer: a U of channel attention, at the size of the image and three times at half."""

    def __init__(self, dim: int = 24, blocks: tuple[int, ...] = (1, 2, 2, 2)) -> None:
        super().__init__()
        dims = [dim * 2**i for i in range(4)]
        self.first, self.last = nn.Conv2d(3, dim, 3, 1, 1), nn.Conv2d(dims[0], 3, 3, 1, 1)
        stack = lambda i: nn.Sequential(*(ChannelAttention(dims[i], 2**i) for _ in range(blocks[i])))  # noqa: E731
        self.down, self.up = nn.ModuleList(map(stack, range(4))), nn.ModuleList(map(stack, range(3)))
        self.shrink = nn.ModuleList(
            nn.Sequential(nn.Conv2d(d, d // 2, 3, 1, 1), nn.PixelUnshuffle(2)) for d in dims[:3]
        )
        self.grow = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * d, 4 * d, 3, 1, 1), nn.PixelShuffle(2)) for d in dims[:3])
        self.join = nn.ModuleList(nn.Conv2d(2 * d, d, 1) for d in dims[:3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, kept = self.first(x), []
        for down, halve in zip(self.down, self.shrink, strict=False):
            kept.append(down(y))
            y = halve(kept[-1])
        y = self.down[3](y)
        for i in (2, 1, 0):
            y = self.up[i](self.join[i](torch.cat([self.grow[i](y), kept[i]], 1)))
        return x + self.last(y)
