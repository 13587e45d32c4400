"""Where a sub-model can enter, and every reason why not, in the user's words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import layer
from splitfx.subnetworks.build import axes_of, epilogue
from splitfx.subnetworks.sites import Sites
from tests.models import image
from tests.subnetworks.networks import residual, small, vgg
from tests.traced import odd


def of(model: nn.Module, x: torch.Tensor) -> Sites:
    return Sites(facts(trace(model.eval(), x)))


def names(found: Sites) -> list[str]:
    return [site.enters for site in found.found]


def refused(found: Sites, word: int | str) -> str:
    with pytest.raises(PlanError) as error:
        found.resolve(word)
    text = str(error.value)
    assert text.startswith("pass 'subnetworks'")
    assert "\n" not in text
    return text


def test_a_chain_has_one_site_in_front_of_every_conv_and_linear_layer_on_a_map() -> None:
    found = of(small(), torch.zeros(1, 1, 16, 16))
    assert names(found) == ["3", "7", "10"]
    assert [site.dropped for site in found.found] == [1, 2, 3]
    assert [layer(site.cut) for site in found.found] == ["2", "6", "9"]  # behind ReLU, behind the pool, behind ReLU


def test_by_number_and_by_name_are_the_same_places() -> None:
    found = of(vgg(), torch.zeros(1, 3, 32, 32))
    assert found.resolve(2) == found.resolve("7")
    assert found.resolve(7) == found.resolve("24")
    assert tuple(found.values[found.resolve(2).cut].shape) == (1, 64, 16, 16)
    assert tuple(found.values[found.resolve(7).cut].shape) == (1, 256, 4, 4)


def test_a_residual_network_is_cut_between_blocks_only() -> None:
    found = of(residual(), torch.zeros(1, 3, 16, 16))
    assert names(found) == ["body.1.main.0", "body.2.main.0", "body.3.main.0"]
    assert found.resolve("body.2") == found.resolve("body.2.main.0")
    assert axes_of(found.facts, found, found.resolve("body.3").cut)[1] == "closed"  # both ways through a block agree


def test_inside_a_residual_block() -> None:
    text = refused(of(residual(), torch.zeros(1, 3, 16, 16)), "body.1.main.3")
    assert "2 tensors cross there (body.0.2 [8×16×16], body.1.main.2 [8×16×16])" in text
    assert "can enter at body.1.main.0, body.2.main.0" in text


def test_a_number_that_ends_inside_a_block_says_which_numbers_work() -> None:
    text = refused(of(residual(), torch.zeros(1, 3, 16, 16)), 2)
    assert "behind 2 convs: 2 tensors cross" in text
    assert "numbers that can be dropped: 1, 3, 6" in text


class UNet(nn.Module):
    """One skip across all but the first conv."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
        self.middle, self.up = nn.Conv2d(6, 6, 3, padding=1), nn.ConvTranspose2d(6, 4, 2, 2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.middle(self.down(x)).relu())], 1))


def test_across_a_skip() -> None:
    found = of(UNet(), image(1, 3, 16, 16))
    text = refused(found, "middle")
    assert "2 tensors cross there (first [4×16×16], down [6×8×8])" in text
    assert names(found) == ["down", "last"]


@pytest.mark.parametrize("name", ["fc", "body.9"])
def test_behind_the_head_or_nowhere(name: str) -> None:
    text = refused(of(residual(), torch.zeros(1, 3, 16, 16)), name)
    assert ("lies behind the head" in text) if name == "fc" else ("there is no layer 'body.9'. Did you mean" in text)


def test_too_many_convs_and_none() -> None:
    assert "cannot drop 4 convs: the model has 4" in refused(of(small(), torch.zeros(1, 1, 16, 16)), 4)
    assert "no layer lies in front of it" in refused(of(small(), torch.zeros(1, 1, 16, 16)), "0")


def test_a_cut_larger_than_the_image() -> None:
    class Enlarges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.last = nn.ConvTranspose2d(3, 4, 2, 2), nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.up(x)))

    text = refused(of(Enlarges(), image(1, 3, 9, 9)), "last")
    assert "[4×18×18] is larger than the image 9×9: a step-down convolution cannot enlarge" in text


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("keyword_inputs", "takes 2 tensors"),
        ("tied_weights", "not an image"),
        ("attention", "no convolution"),
        ("concats", "no single tensor"),
    ],
)
def test_models_without_a_site_say_why(model: str, why: str) -> None:
    found = Sites(facts(odd(model)[2]))
    assert found.found == []
    assert why in found.why


def operations(graph: fx.GraphModule, name: str) -> list[str]:
    found = Sites(facts(graph))
    base, chain = epilogue(found.resolve(name).cut)
    return [layer(base), *map(layer, chain)]


def test_the_epilogue_is_that_of_the_cut() -> None:
    chain = trace(vgg(), torch.zeros(1, 3, 32, 32))
    assert operations(chain, "7") == ["3", "4", "5"]  # conv, BN, ReLU; the pool is walked over
    blocks = trace(residual(), torch.zeros(1, 3, 16, 16))
    assert operations(blocks, "body.1")[:3] == ["body.0.0", "body.0.1", "body.0.2"]
    assert len(operations(blocks, "body.2")) == 2  # the sum and the ReLU behind it, without a norm


def test_a_raw_sum_has_none() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.main, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(y + self.main(y))

    graph = trace(Linear(), image())
    assert len(operations(graph, "last")) == 1


def test_the_static_form_where_the_trunk_is_no_chain() -> None:
    class Shrinks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.interpolate(self.first(x), size=(11, 7), mode="nearest"))

    found = of(Shrinks(), image(1, 3, 32, 20))
    ways, form = axes_of(found.facts, found, found.resolve("last").cut)
    assert form == "static"
    assert [way.size(n) for way, n in zip(ways, (32, 20), strict=True)] == [11, 7]


def test_a_pool_in_ceil_mode_that_drops_its_last_window_is_static() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(1, 2, ceil_mode=True), nn.Conv2d(4, 2, 1))
    found = of(model, image(1, 3, 16, 16))
    ways, form = axes_of(found.facts, found, found.resolve("2").cut)
    assert form == "static"
    assert [way.size(16) for way in ways] == [8, 8]
