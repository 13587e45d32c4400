"""Costs against hand counts, published tables and a second opinion from torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from splitfx.analysis import facts
from splitfx.analysis.cost import Cost, kernels
from splitfx.frontend.trace import trace


def cost_of(model: nn.Module, *inputs: torch.Tensor) -> Cost:
    return facts(trace(model.eval(), inputs)).cost


class Call(nn.Module):
    """A module around a function of its inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: torch.Tensor) -> Any:
        return self.function(*values)


def test_a_small_net_counted_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),  # 8·10·10 outputs, 2·3·3 MACs each, bias
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),  # reads 8·10·10
        nn.Conv2d(8, 6, 1, bias=False),  # 6·5·5 outputs, 8 MACs each
        nn.Flatten(),
        nn.Linear(150, 7),
    )
    found = cost_of(net, torch.zeros(3, 4, 10, 10))
    conv, pointwise, linear = 800 * 18, 150 * 8, 7 * 150
    assert found.macs == 3 * (conv + pointwise + linear)
    assert found.ops == found.macs + 3 * (800 * (1 + 2 + 1) + 800 + 7)
    assert found.flops == 2 * found.macs
    assert found.params == (8 * 2 * 9 + 8) + 16 + 48 + (1050 + 7)
    assert not found.uncounted


def test_a_transposed_convolution_counts_from_its_input() -> None:
    found = cost_of(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, bias=False), torch.zeros(1, 6, 5, 5))
    assert found.macs == 6 * 25 * (2 * 9)


def test_a_convolution_whose_weight_is_computed() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    found = cost_of(Standardised(3, 5, 3), torch.zeros(1, 3, 6, 6))
    assert found.macs == 5 * 16 * 27
    assert found.params == 5 * 27 + 5 == sum(row.params for row in found.rows.values())


def test_attention_and_matrix_products() -> None:
    query, keys = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)
    attention = Call(lambda q, k: F.scaled_dot_product_attention(q, k, k))
    assert cost_of(attention, query, keys).macs == 2 * 3 * 5 * 7 * (8 + 8)
    assert cost_of(Call(lambda q, k: q @ k.transpose(2, 3)), query, keys).macs == 2 * 3 * 5 * 7 * 8
    einsum = Call(lambda q, k: torch.einsum("abid,abjd->abij", q, k))
    assert cost_of(einsum, query, keys).macs == 6 * 5 * 7 * 8


def test_a_shared_module_works_twice_and_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(self.one(x))

    found = cost_of(Twice(), torch.zeros(2, 6))
    assert found.macs == 2 * 2 * 36
    assert found.params == 42
    assert sorted(row.params for row in found.rows.values())[-2:] == [0, 42]


def test_what_cannot_be_counted_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x) + torch.einsum("ij,jk,kl->il", x, x, x)

    found = cost_of(Odd(), torch.zeros(4, 4))
    whys = {one.op: one.why for one in found.uncounted}
    assert "no row" in whys["special_bessel_j0"]
    if "einsum" in whys:  # torch may take a product of three apart before we see it
        assert "two operands" in whys["einsum"]


def test_vgg16_has_the_kernels_of_table_2() -> None:
    graph = trace(torchvision.models.vgg16(weights=None).eval(), torch.zeros(1, 3, 224, 224))
    assert kernels(graph) == 1_634_496
    assert kernels(graph, without=("features.0",)) == 1_634_496 - 3 * 64
    assert kernels(graph, kernel=(1, 1)) == 0
    assert facts(graph).cost.macs == 15_470_264_320
    assert facts(graph).cost.params == 138_357_544


def test_both_counts_of_the_sub_network_paper() -> None:
    """Table 1's base model: VGG-16 with batch norm and one classifier layer, on 32×32 (semantics B)."""
    features = torchvision.models.vgg16_bn(weights=None).features
    found = cost_of(nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10)), torch.zeros(1, 3, 32, 32))
    assert f"{found.ops / 1e9:.6f}" == "0.314433"
    assert f"{found.macs / 1e9:.6f}" == "0.313202"


def small_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 1], [2, 3], [4, 4], num_classes=5)


@pytest.mark.parametrize("make", [torchvision.models.shufflenet_v2_x0_5, small_swin])
def test_torch_counts_the_same_work(make: Any) -> None:
    model = make().eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert cost_of(model, image).flops == counter.get_total_flops()
