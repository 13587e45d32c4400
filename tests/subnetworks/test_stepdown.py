"""The closed form against torch's own layers, for drawn trunks and sizes; the paper's and the known ones by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from splitfx.analysis import facts
from splitfx.errors import UnsupportedError
from splitfx.frontend.trace import trace
from splitfx.subnetworks.build import axes_of
from splitfx.subnetworks.sites import Sites
from splitfx.subnetworks.stepdown import Axis, Map, static
from tests.subnetworks.networks import layer_of, vgg, windows


def real_size(trunk: list[dict[str, Any]], n: int) -> int | None:
    """What torch makes of a size; None where a layer does not take it."""
    x = torch.zeros(1, 1, n)
    try:
        for one in trunk:
            x = layer_of(one)(x)
    except RuntimeError:
        return None
    return x.shape[-1]


def folded(trunk: list[dict[str, Any]]) -> Map:
    found = Map()
    for one in trunk:
        found = found.then(one["kernel"], one["stride"], 2 * one["padding"], one["dilation"], one["ceil_mode"])
    return found


def conv_size(axis: Axis, n: int) -> int:
    conv = nn.Conv1d(1, 1, axis.kernel, axis.stride, axis.padding, device="meta")
    return conv(torch.zeros(1, 1, n, device="meta")).shape[-1]


@settings(max_examples=150)
@given(st.lists(windows(), min_size=1, max_size=5), st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_one_conv_has_the_sizes_of_a_trunk(trunk: list[dict[str, Any]], sizes: list[int]) -> None:
    """Without ceil mode at every size that the trunk takes; with it wherever the map gives the real size."""
    axis, way = folded(trunk).axis(), folded(trunk)
    assert axis.kernel >= axis.stride
    for n in sizes:
        real = real_size(trunk, n)
        if real is None:
            continue
        if any(one["ceil_mode"] for one in trunk) and way(n) != real:
            continue  # a last window that starts in the padding: the pass takes the static form there
        assert way(n) == real
        assert axis.size(n) == real
        assert conv_size(axis, n) == real


def test_ceil_mode_is_seen_where_torch_drops_a_window() -> None:
    """The case that the map does not say: found by comparing sizes, as the pass does."""
    trunk = [{"kernel": 1, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": True, "pool": True}]
    assert folded(trunk)(4) == 3 != real_size(trunk, 4)


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_static_form_fits_its_size_and_sees_every_pixel(n: int, m: int) -> None:
    assume(m <= n)
    axis = static(n, m)
    assert conv_size(axis, n) == m
    assert axis.kernel >= axis.stride
    assert 2 * axis.padding <= axis.kernel
    assert (m - 1) * axis.stride + axis.kernel == n + 2 * axis.padding


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [((32, 17), Axis(2, 2, 1)), ((32, 24), Axis(9, 1, 0)), ((224, 55), Axis(8, 4, 0)), ((7, 1), Axis(7, 7, 0))],
)
def test_known_static_forms(sizes: tuple[int, int], wanted: Axis) -> None:
    assert static(*sizes) == wanted


def test_no_step_down_goes_up() -> None:
    with pytest.raises(UnsupportedError, match="cannot take 16 rows or columns to 17"):
        static(16, 17)


@pytest.mark.parametrize(
    ("way", "wanted"), [(Map(0, 2), Axis(2, 2, 0)), (Map(0, 8), Axis(8, 8, 0)), (Map(3, 4), Axis(5, 4, 2)),
                        (Map(-7, 8), Axis(15, 8, 0))]
)  # fmt: skip
def test_the_closed_forms_of_the_paper_and_of_known_stems(way: Map, wanted: Axis) -> None:
    assert way.axis() == wanted


def sites(model: nn.Module, *sizes: int) -> tuple[Any, Sites]:
    known = facts(trace(model.eval(), torch.zeros(sizes)))
    return known, Sites(known)


def test_the_paper_s_step_downs_come_out_of_the_network() -> None:
    known, found = sites(vgg(), 1, 3, 32, 32)
    for count, kernel in ((2, 2), (7, 8)):
        ways, form = axes_of(known, found, found.resolve(count).cut)
        assert (form, ways) == ("closed", (Axis(kernel, kernel, 0),) * 2)


@pytest.mark.parametrize(("name", "cut", "wanted"), [("resnet18", 1, Axis(5, 4, 2)), ("alexnet", 1, Axis(15, 8, 0))])
def test_known_stems(name: str, cut: int, wanted: Axis) -> None:
    import torchvision

    known, found = sites(getattr(torchvision.models, name)(weights=None), 1, 3, 224, 224)
    assert axes_of(known, found, found.resolve(cut).cut) == ((wanted,) * 2, "closed")


def test_height_and_width_are_two_axes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 5), (1, 2), (1, 0)), nn.MaxPool2d((2, 1)), nn.Conv2d(4, 4, 3))
    known, found = sites(model, 1, 3, 20, 31)
    ways, form = axes_of(known, found, found.resolve(1).cut)
    assert (form, ways) == ("closed", (Axis(2, 2, 0), Axis(5, 2, 0)))


def test_a_map_one_row_off_is_noticed() -> None:
    """Sabotage: the padding forgotten in the closed form gives another size somewhere."""
    wrong = Map(1, 2)  # of a conv 3 s2 p1, as if it had padding 1 at one end only: (0, 2) there
    right = Map().then(3, 2, 2)
    assert right == wrong
    off = Map().then(3, 2, 1)
    assert any(off.axis().size(n) != right(n) for n in range(3, 12))
