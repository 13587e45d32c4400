"""Group against the paper: the numbers of Table 2, branch and fusion widths, blocks set to zero by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.frontend.trace import trace
from splitfx.passes import Group
from tests import oracle
from tests.passes.grouping import grouped, notes


def vgg16(size: int = 32) -> tuple[Any, torch.Tensor]:
    import torchvision

    model: Any = torchvision.models.vgg16(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # the table counts convolutions
    return model.eval(), torch.randn(1, 3, size, size)


@pytest.fixture(scope="module")
def vgg() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(*vgg16())


def kernels(split: fx.GraphModule) -> int:
    """3x3 kernels: pairs of an input and an output channel; 1x1 fusion convs are not counted."""
    convs = [m for m in split.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return sum(m.in_channels * m.out_channels // m.groups for m in convs)


@pytest.mark.parametrize("lowering", ["grouped", "branches"])
@pytest.mark.parametrize(
    ("options", "thousands"),
    [
        ({"factors": (1, 1, 1, 1, 1)}, 1634.496),
        ({"factors": (4,), "fusion": "none"}, 408.768),
        ({"factors": (4,), "fusion": "none", "share": 3}, 430.272),
        ({"factors": (8, 2, 2, 4, 4)}, 508.608),
        ({"factors": (8, 2, 2, 2, 4)}, 705.216),
    ],
)
def test_table_2(vgg: fx.GraphModule, options: dict[str, Any], thousands: float, lowering: Any) -> None:
    split, _ = grouped(vgg, Group(**options, lowering=lowering))
    assert kernels(split) == thousands * 1000


def test_six_branches_of_unequal_width(vgg: fx.GraphModule) -> None:
    split, outcome = grouped(vgg, Group(factors=(6,) * 5))
    widths = [split.get_submodule(f"features.2.branch{g}").out_channels for g in range(6)]
    assert widths == [11, 11, 11, 11, 10, 10]
    assert any("unequal width" in n for n in notes(outcome, "did"))


def test_vgg_fusions_widen(vgg: fx.GraphModule) -> None:
    split, _ = grouped(vgg, Group(factors=(8, 2, 2, 4, 4), lowering="branches"))
    state = split.state_dict()
    shapes = [tuple(state[f"fusion{i}.weight"].shape[:2]) for i in range(1, 6)]
    assert shapes == [(128, 64), (256, 128), (512, 256), (512, 512), (512, 512)]
    for i in range(1, 6):
        fusion = split.get_submodule(f"fusion{i}")
        assert isinstance(fusion, nn.Conv2d)
        assert fusion.bias is not None


def test_vgg_independently_masked() -> None:
    """Blocks set to zero by hand, from the paper's rule alone, on the user's own model."""
    torch.manual_seed(0)
    model, x = vgg16()
    model, x = model.double(), x.double()
    factors = (8, 2, 2, 6, 4)
    split = splitfx.transform(model, Group(factors=factors, fusion="keep", lowering="branches"), x, verify=False)
    stage = 0
    with torch.no_grad():
        for layer in model.features:
            if isinstance(layer, nn.MaxPool2d):
                stage += 1
                continue
            if not isinstance(layer, nn.Conv2d) or layer.in_channels == 3:
                continue
            mask = torch.zeros(layer.weight.shape[:2], dtype=torch.float64)
            parts = [np.array_split(np.arange(n), factors[stage]) for n in (layer.out_channels, layer.in_channels)]
            for outs, ins in zip(*parts, strict=True):
                mask[np.ix_(outs, ins)] = 1
            layer.weight.mul_(mask[:, :, None, None])
    oracle.assert_equal_outputs(split, model, x)


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(8, 2, 2, 4, 4), (6, 6, 6, 6, 6)])
def test_vgg_pipeline_oracle(vgg: fx.GraphModule, factors: tuple[int, ...]) -> None:
    run_pass(vgg, Group(factors=factors))
