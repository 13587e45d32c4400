"""Step-downs solved on images: exact where they can be, the base's weights behind them, statistics of what is read."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import PlanError
from splitfx.passes import SubNetworks
from splitfx.subnetworks.entry import entries
from splitfx.subnetworks.model import SubNetworksGraph
from tests import oracle
from tests.subnetworks.networks import residual, small

IMAGES = torch.randn(70, 1, 13, 11, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class Rows(nn.Module):
    """A map with its channels last, as in Swin."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body, self.mix, self.conv = nn.Sequential(*body), nn.Linear(6, 5), nn.Conv2d(5, 10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.mix(self.body(x).permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)).mean((2, 3))


def behind(*trunk: nn.Module) -> nn.Module:
    """Layers that a step-down can be, and a network behind them."""
    torch.manual_seed(0)
    rest = (nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = nn.Sequential(*trunk, *rest).double()
    for norm in (m for m in model if isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.weight is not None):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.2)
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    model.train()(IMAGES + 0.3)  # statistics near those of the images, not equal
    return model.eval()


def solved(model: nn.Module, images: torch.Tensor = IMAGES, **options: Any) -> SubNetworksGraph:
    step = SubNetworks(**{"cuts": (1,), "statistics": "shared", "calibration": images, **options})
    split = splitfx.transform(model, step, images[:2])
    assert isinstance(split, SubNetworksGraph)
    return split


def conv() -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(1, 6, 2, stride=2)


TRUNKS = {
    "norm and rectifier": lambda: (conv(), nn.BatchNorm2d(6), nn.ReLU()),
    "a norm without weights": lambda: (conv(), nn.BatchNorm2d(6, affine=False), nn.Hardswish()),
    "no norm": lambda: (conv(), nn.LeakyReLU(0.1)),
    "learned activation": lambda: (conv(), nn.BatchNorm2d(6), nn.PReLU(6, init=0.6)),
    "norm of groups": lambda: (conv(), nn.GroupNorm(2, 6), nn.SiLU()),
    "norm behind the activation": lambda: (conv(), nn.ReLU(), nn.BatchNorm2d(6)),
    "activation alone behind": lambda: (conv(), nn.BatchNorm2d(6)),
    "pool on the way": lambda: (nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.SiLU()),
}


@torch.no_grad()
@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_step_down_that_can_be_the_trunk_becomes_it(trunk: str) -> None:
    """On images that it was not solved on, of another size."""
    model = behind(*TRUNKS[trunk]())
    split = solved(model)
    other = torch.randn(5, 1, 15, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted = model(other)
    start = splitfx.transform(model, SubNetworks(cuts=(1,), statistics="shared"), IMAGES[:2])
    assert isinstance(start, SubNetworksGraph)
    off = float((start.detach(0)(other) - wanted).abs().max() / wanted.abs().max())
    left = float((split.detach(0)(other) - wanted).abs().max() / wanted.abs().max())
    assert off > 1e-2  # as it was drawn
    assert left < 1e-4, f"relative error {left:.1e}"  # the least pull of the ridge is 1e-6


@torch.no_grad()
def test_a_map_with_channels_last() -> None:
    torch.manual_seed(0)
    model = Rows(conv()).double().eval()
    images = IMAGES[:, :, :12, :10]  # a step-down in static form for odd sizes is another one
    split = solved(model, images, cuts=("mix",))
    wanted = model(images)
    assert float((split.detach(0)(images) - wanted).abs().max() / wanted.abs().max()) < 1e-4


def read(sizes: dict[str, int], path: str, module: nn.Module, args: Any, output: Any) -> None:
    sizes[path] = args[0][:, 0].numel()


def test_statistics_of_their_own_are_those_of_what_is_read() -> None:
    """The same as one forward pass in train mode over all images takes."""
    images = torch.randn(70, 1, 16, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    split = solved(small().double(), images, cuts=(1, 2), statistics="private")
    for number in (0, 1):
        sub = split.detach(number)
        found = {k: v.clone() for k, v in sub.state_dict().items() if "running" in k}
        again = copy.deepcopy(sub).train()
        sizes: dict[str, int] = {}
        for path, norm in again.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
                norm.register_forward_hook(partial(read, sizes, path))
        again(images)
        assert len(sizes) == 4 - number  # of the step-down too
        for path, size in sizes.items():
            oracle.assert_equal(found[f"{path}.running_mean"], again.get_buffer(f"{path}.running_mean"))
            biased = again.get_buffer(f"{path}.running_var") * (size - 1) / size
            oracle.assert_equal(found[f"{path}.running_var"], biased)
    base = small().double()
    oracle.assert_equal(split(images), base(images))  # nothing of the base model was touched


def test_modes_stay_and_notes_say_the_error() -> None:
    model = behind(*TRUNKS["norm and rectifier"]()).train()
    split = solved(model, statistics="private")
    assert all(m.training for m in split.modules())
    assert [p.requires_grad for _, e in entries(split) for p in e.parameters()] == [True] * 6
    notes = [n.what for n in splitfx.explain(split).steps[0].notes if n.where == "sub0"]
    assert notes == ["step-down solved on the calibration; relative error at 2 0.000"]


def test_a_trunk_that_a_step_down_cannot_be_is_met_as_far_as_it_goes() -> None:
    """Residual stages: a rectified sum, behind strides; nearer than the mean of the values, as the note says."""
    images = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    split = solved(residual(), images, cuts=("body.2", "body.3"), statistics="private")
    errors = [float(n.what.split()[-1]) for n in splitfx.explain(split).steps[0].notes if "relative error" in n.what]
    assert len(errors) == 2
    assert all(0.05 < e < 1 for e in errors)


def test_the_plan_holds_the_cuts_and_no_images(tmp_path: Any) -> None:
    split = solved(behind(*TRUNKS["norm and rectifier"]()))
    splitfx.save(split, tmp_path / "split")
    again: Any = splitfx.load(tmp_path / "split")
    oracle.assert_equal(again.detach(0)(IMAGES), split.detach(0)(IMAGES))
    assert "calibration" not in (tmp_path / "split" / "plan.toml").read_text()


@pytest.mark.parametrize(
    ("images", "why"),
    [
        (IMAGES[:1], "calibration is a single input; give several"),
        (IMAGES.repeat(1, 3, 1, 1), "do not fit the model"),
        (IMAGES * 60 + 100, "of another range than the model was trained on"),
        (IMAGES / 0, "values that are not finite"),
    ],
)
def test_images_that_do_not_fit(images: torch.Tensor, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        splitfx.transform(
            behind(*TRUNKS["norm and rectifier"]()), SubNetworks(cuts=(1,), calibration=images), IMAGES[:2]
        )
