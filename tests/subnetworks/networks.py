"""Networks that have sub-models: the paper's VGG-16 for 32×32, small ones, and trunks that hypothesis draws."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx, nn

import splitfx
from splitfx.passes import SubNetworks
from splitfx.subnetworks.model import SubNetworksGraph
from tests.models import Head, Residual, conv_bn
from tests.traced import made_once

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg(widths: tuple[int, ...] = VGG16, size: int = 32, image: int = 3) -> nn.Module:
    """The paper's network: convs with bias, batch norm and ReLU, a pool at 0, one linear layer."""
    layers: list[nn.Module] = []
    channels = image
    for width in widths:
        if not width:
            layers.append(nn.MaxPool2d(2))
            size //= 2
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 10))


def small(seed: int = 0) -> nn.Module:
    """Four convs, two pools, on 1×16×16."""
    torch.manual_seed(seed)
    return lively(vgg((6, 8, 0, 8, 10, 0), 16, 1))


def residual() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(conv_bn(3, 8), Residual(8, 8), Residual(8, 12, 2), Residual(12, 12))
    return lively(Head(body, 12))


def lively(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales that are not those of a fresh norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """The options of a conv or pool along one axis; a pool's padding is at most half its kernel."""
    kernel = draw(st.integers(1, 7))
    pool = draw(st.booleans())
    padding = draw(st.integers(0, kernel // 2 if pool else 4))
    ceil = pool and draw(st.booleans())
    return {
        "kernel": kernel,
        "stride": draw(st.integers(1, 4)),
        "padding": padding,
        "dilation": draw(st.integers(1, 3)),
        "ceil_mode": ceil,
        "pool": pool,
    }


def layer_of(one: dict[str, Any]) -> nn.Module:
    """The torch layer that says what really happens to a size."""
    if one["pool"]:
        return nn.MaxPool1d(one["kernel"], one["stride"], one["padding"], one["dilation"], ceil_mode=one["ceil_mode"])
    return nn.Conv1d(1, 1, one["kernel"], one["stride"], one["padding"], one["dilation"])


X = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))


@made_once
def small_graph() -> fx.GraphModule:
    return splitfx.trace(small(), X)


def divided(model: nn.Module | None = None, x: torch.Tensor = X, **options: Any) -> SubNetworksGraph:
    step = SubNetworks(**(options or {"cuts": (1, 3)}))
    split = splitfx.transform(small_graph(), step) if model is None else splitfx.transform(model, step, x)
    assert isinstance(split, SubNetworksGraph)
    return split


def assert_shared(split: SubNetworksGraph) -> None:
    own = {id(t) for ts in (split.parameters(), split.buffers()) for t in ts}
    for made in (split.base(), *(split.detach(i) for i in range(len(split.names) - 1))):
        assert {id(p) for p in made.parameters()} <= own
        assert {id(b) for b in made.buffers()} <= own
