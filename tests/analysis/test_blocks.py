"""Where blocks end: at pools, and at the value that feeds both paths of a strided stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitfx.analysis import facts
from splitfx.analysis.blocks import Block, blocks
from splitfx.frontend.trace import trace
from splitfx.ir.graph import layer
from splitfx.ir.ops import op_name
from tests.models import ZOO, Head, conv_bn, image
from tests.traced import odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


def blocks_of(model: nn.Module, x: torch.Tensor) -> list[Block]:
    return blocks(facts(trace(model.eval(), x)))


def ends(found: list[Block]) -> list[str]:
    return [layer(b.end) if b.end is not None else "" for b in found]


def real(name: str) -> list[Block]:
    import torchvision

    return blocks_of(torchvision.models.get_model(name), torch.zeros(1, 3, 64, 64))


def test_vgg_has_five_blocks_that_end_at_its_pools() -> None:
    import torchvision

    found = blocks_of(torchvision.models.vgg11().features, torch.zeros(1, 3, 64, 64))
    assert [layer(b.edges[-1].node) for b in found] == ["0", "3", "8", "13", "18"]
    assert all(b.end is not None and "max_pool2d" in str(b.end.target) for b in found)
    assert [len(b.edges) for b in found] == [1, 1, 2, 2, 2]


def test_resnet_has_a_stem_and_four_stages() -> None:
    found = real("resnet18")
    assert [len(b.edges) for b in found] == [1, 4, 5, 5, 5]
    assert ends(found)[1:4] == ["layer1.1.relu", "layer2.1.relu", "layer3.1.relu"]
    assert str(found[2]) == "layer2.0.conv1 to layer2.1.conv2"


def test_an_inverted_residual_ends_at_its_narrow_value() -> None:
    """Not behind the widening 1x1 that only the strided depthwise conv reads."""
    found = real("mobilenet_v2")
    for block in found[1:]:
        assert not layer(block.edges[0].node).endswith("conv.1.0"), str(block)


def test_a_pad_in_front_of_the_strided_conv_changes_no_end() -> None:
    """TensorFlow's padding stands alone between the widening and the strided depthwise conv."""

    def network(padded: bool) -> nn.Module:
        pad = [nn.ZeroPad2d((0, 1, 0, 1))] if padded else []
        deep = nn.Conv2d(24, 24, 3, stride=2, padding=0 if padded else 1, groups=24)
        layers = [conv_bn(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 24, 1), nn.ReLU(), *pad, deep, nn.Conv2d(24, 12, 1)]
        return Head(nn.Sequential(*layers), 12)

    plain, padded = (blocks_of(network(p), image()) for p in (False, True))
    assert ends(padded) == ends(plain)
    assert ends(padded)[0] == "body.1"


@pytest.mark.parametrize("name", sorted(ZOO))
def test_blocks_hold_every_conv_once(name: str) -> None:
    known = facts(odd(name)[2])
    found = blocks(known)
    inside = [e.node for b in found for e in b.edges]
    assert inside == [e.node for e in known.axes.edges if op_name(e.node).startswith("conv")]
    assert [b.index for b in found] == list(range(1, len(found) + 1))
    assert all(b.end is None or b.end in known.cuts for b in found)


def test_the_end_feeds_both_paths() -> None:
    model, inputs = ZOO["residual"]()
    first = blocks_of(model, inputs)[0]
    assert first.end is not None
    assert {layer(n) for n in first.end.users} == {"body.2.main.0", "body.2.short"}


def test_a_pool_inside_a_residual_is_no_end() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.up, self.conv = nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(self.conv(self.pool(x)))

    found = blocks_of(Head(nn.Sequential(conv_bn(3, 8), Inner()), 8), image())
    assert len(found) == 1


def test_pools_in_a_row_are_one_end() -> None:
    layers = [conv_bn(3, 8), nn.MaxPool2d(2), nn.AvgPool2d(2), conv_bn(8, 8)]
    found = blocks_of(Head(nn.Sequential(*layers), 8), image())
    assert len(found) == 2


def test_no_convs_no_blocks() -> None:
    assert blocks_of(nn.Linear(3, 2), torch.zeros(1, 3)) == []


def test_a_conv_without_padding_ends_no_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    found = blocks_of(model, torch.zeros(1, 3, 16, 16))
    assert [len(b.edges) for b in found] == [2, 1]
    assert found[1].end is None
