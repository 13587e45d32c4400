"""What the file computes is what the graph computes, for every operation and option that a translation may get wrong;
and a wrong translation leaves no file."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx.errors import ExportError
from splitfx.export import agreement, rewrites
from splitfx.export.onnx import export_onnx
from splitfx.frontend.trace import trace
from splitfx.passes import Tile
from tests import oracle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
aten = torch.ops.aten
X = torch.randn(2, 6, 13, 17, generator=torch.Generator().manual_seed(0))


class Fn(nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


class Each(nn.Module):
    """Every module on the input, each an output of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(one(x) for one in self.each)


def resized(mode: str, **options: Any) -> nn.Module:
    return Fn(lambda x: F.interpolate(x, mode=mode, **options))


def padded(*sides: int, mode: str = "constant", value: float | None = None) -> nn.Module:
    return Fn(lambda x: F.pad(x, sides, mode, value))


WINDOWS: list[tuple[Any, Any, Any]] = [(3, 1, 1), ((2, 3), (2, 1), (1, 0)), (2, 2, 0), ((3, 4), (2, 3), (1, 2))]
FLAGS = (False, True)
POOLS = [
    nn.AvgPool2d(*w, ceil_mode=ceil, count_include_pad=counts, divisor_override=divisor)
    for w, ceil, counts, divisor in itertools.product(WINDOWS, FLAGS, FLAGS, (None, 5))
] + [nn.MaxPool2d(*w, ceil_mode=ceil) for w, ceil in itertools.product(WINDOWS, FLAGS)]
POOLS.append(nn.MaxPool2d(3, 2, 1, dilation=2))
ADAPTIVE = [nn.AdaptiveAvgPool2d((5, 7)), nn.AdaptiveAvgPool2d((20, 1)), nn.AdaptiveAvgPool2d(1)]
SCALES: list[dict[str, Any]] = [{"scale_factor": 2}, {"scale_factor": 1.7}, {"size": (29, 11)}, {"scale_factor": 0.45}]
RESIZES = [
    *(resized(mode, **kw) for mode, kw in itertools.product(("nearest", "nearest-exact"), SCALES)),
    *(
        resized(mode, align_corners=corners, **kw)
        for mode, corners, kw in itertools.product(("bilinear", "bicubic"), FLAGS, SCALES)
    ),
]
PADS = [padded(-1, 2, 0, -3, value=1.5), padded(1, 2, 3, 4, mode="reflect"), padded(-1, 2, 0, 3, mode="replicate")]
CONVS = [
    nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3),
    nn.Conv2d(6, 4, (4, 2), padding="same", dilation=(1, 2)),
    nn.ConvTranspose2d(6, 6, 3, (2, 3), 1, output_padding=(1, 2), groups=3),
    nn.ConvTranspose2d(6, 4, 3, 2, dilation=2),
]
SMOOTH = [
    resized(mode, align_corners=corners, antialias=True, **kw)
    for mode, corners, kw in itertools.product(("bilinear", "bicubic"), FLAGS, SCALES)
]
PLAIN = [
    nn.AdaptiveMaxPool2d((5, 7)),
    nn.AdaptiveMaxPool2d((20, 1)),
    resized("area", size=(5, 7)),
    padded(1, 2, 3, 4, mode="circular"),
    nn.Conv2d(6, 6, 3, padding=(1, 2), stride=2, padding_mode="circular"),
    nn.GLU(1),
    nn.RReLU(),
    Fn(lambda x: x.roll((2, -20), (2, 3))),
    Fn(lambda x: torch.div(x * 5, 0.7, rounding_mode="trunc")),
    Fn(lambda x: x % -0.7),
    Fn(lambda x: (x * 10).long() // -3),
    Fn(lambda x: torch.var(x, (2, 3), correction=2)),
    Fn(lambda x: F.adaptive_max_pool2d(x, (3, 4), return_indices=True)[1]),
]


def ported(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Exports, which checks the file; raises what the check raises."""
    torch.manual_seed(0)
    export_onnx(trace(model.eval(), x), path)


@pytest.mark.parametrize("family", [POOLS + ADAPTIVE, RESIZES, PADS + CONVS + PLAIN], ids=["pools", "resizes", "rest"])
def test_every_operation_and_option(family: list[nn.Module], tmp_path: Path) -> None:
    ported(Each(family), X, tmp_path / "m.onnx")


def test_resizes_with_antialiasing(tmp_path: Path) -> None:
    old = torch.__version__.startswith("2.11.")
    with pytest.raises(ExportError, match="newer torch") if old else contextlib.nullcontext():
        ported(Each(SMOOTH), X, tmp_path / "m.onnx")


def test_one_axis_and_three(tmp_path: Path) -> None:
    line: list[nn.Module] = [
        nn.AvgPool1d(4, 3, 2, ceil_mode=a, count_include_pad=b) for a, b in itertools.product(FLAGS, FLAGS)
    ]
    line += [nn.AdaptiveMaxPool1d(5), nn.AdaptiveAvgPool1d(7), resized("nearest-exact", scale_factor=1.7)]
    line += [resized("linear", scale_factor=0.45, align_corners=c) for c in FLAGS]
    ported(Each(line), torch.randn(2, 6, 23), tmp_path / "line.onnx")
    solid: list[nn.Module] = [nn.AvgPool3d(3, 2, 1, a, b, c) for a, b, c in itertools.product(FLAGS, FLAGS, (None, 3))]
    solid += [nn.AdaptiveMaxPool3d((2, 3, 4)), nn.AdaptiveAvgPool3d((2, 3, 4)), nn.MaxPool3d(3, 2, 1, ceil_mode=True)]
    ported(Each(solid), torch.randn(1, 4, 5, 7, 6), tmp_path / "solid.onnx")


class Between(nn.Module):
    """Every module between two convolutions, each an output of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.LazyConv2d(4, 3, padding=1)
        self.each = nn.ModuleList(nn.Sequential(one, nn.LazyConv2d(4, 3, padding=1)) for one in modules)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.first(x)
        return tuple(one(x) for one in (*self.each, self.last))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_tiled_pools(every: int, tmp_path: Path) -> None:
    """Of every fifth, each option has each value."""
    torch.manual_seed(0)
    model, x = Between(POOLS[::every]).eval(), torch.randn(1, 3, 37, 29)
    model(x)
    export_onnx(splitfx.transform(model, Tile(rows=9), x), tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore")
def test_tiled_resizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Between(RESIZES[1:8:2] + RESIZES[9:12:2]).eval(), torch.randn(1, 3, 24, 9)
    model(x)
    export_onnx(splitfx.transform(model, Tile(rows=12), x), tmp_path / "m.onnx")


def test_rewrites_are_exact() -> None:
    """In float64, which onnxruntime has no kernels to check in."""
    for target, axes in ((aten.adaptive_max_pool2d.default, 2), (aten.adaptive_max_pool3d.default, 3)):
        x = torch.randn(2, 3, *(11, 7, 5)[:axes], dtype=torch.float64)
        want, place = target(x, [4, 3, 5][:axes])
        found, at = rewrites.TABLE[target](x, [4, 3, 5][:axes])
        oracle.assert_equal(found, want)
        assert torch.equal(at, place)
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64)
    for window, ceil in itertools.product(((3, 2, 1), (2, 3, 1), ((4, 3), (3, 5), (2, 0))), FLAGS):
        options = (*((one,) * 2 if isinstance(one, int) else one for one in window), ceil, False, 7)
        oracle.assert_equal(rewrites.TABLE[aten.avg_pool2d.default](x, *options), aten.avg_pool2d(x, *options))


# ---------------------------------------------------------------- refusals


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReflectionPad2d(1), nn.AvgPool2d(3, 1, 1, divisor_override=5), nn.ReLU()
    )


WRONG: dict[str, tuple[Any, Callable[..., Any], str]] = {
    "a dropped border": (aten.pad.default, lambda x, sides, *mode: aten.constant_pad_nd(x, sides), "1"),
    "a wrong divisor": (aten.avg_pool2d.default, lambda x, k, s, p, *more: aten.avg_pool2d(x, k, s, p), "2"),
    "a doubled output": (aten.relu.default, lambda x: aten.clamp_min(x, 0) * 2, "3"),
}


@pytest.mark.parametrize("what", WRONG)
def test_sabotage_a_wrong_translation_leaves_no_file(what: str, tmp_path: Path, monkeypatch) -> None:
    target, wrong, layer = WRONG[what]
    once = lambda *args: NotImplemented if args[6:] == () and target is aten.avg_pool2d.default else wrong(*args)  # noqa: E731
    monkeypatch.setitem(rewrites.TABLE, target, once)
    graph = trace(net(), torch.randn(1, 3, 8, 8))
    with pytest.raises(ExportError, match=f"output is off by .* of its largest value .*, first in {layer};") as caught:
        export_onnx(graph, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ExportError, match="was not written"):
        export_onnx(graph, tmp_path / "m.onnx", overwrite=True)
    assert [one.read_text() for one in tmp_path.iterdir()] == ["mine"]
    export_onnx(graph, tmp_path / "m.onnx", overwrite=True, verify=False)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))


def test_sabotage_in_the_file_alone_is_named(tmp_path: Path, monkeypatch) -> None:
    """A weight that changes behind the exported program: external data, another batch, a layer found in the file."""
    from splitfx.export import onnx as writing

    finish = writing._finish

    def changed(program: Any, *rest: Any) -> None:
        finish(program, *rest)
        value = program.model.graph.initializers["2.weight"]
        value.const_value = type(value.const_value)(value.const_value.raw * 1.01, name="2.weight")

    monkeypatch.setattr(writing, "_finish", changed)
    model = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32), nn.Sigmoid())
    with pytest.raises(ExportError, match="output is off by .*, first in 2;"):
        export_onnx(trace(model, torch.randn(1, 32)), tmp_path / "m.onnx", external_data=True)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_checked_says_why(tmp_path: Path) -> None:
    """No kernel; an output that rounding decides, and one that is drawn."""
    double = trace(nn.Sequential(nn.ConvTranspose2d(3, 4, 3)).double(), torch.randn(1, 3, 8, 8).double())
    unsteady = trace(nn.Sequential(nn.Linear(512, 64), Fn(lambda x: torch.floor(x * 1e7) % 2)), torch.randn(4, 512))
    drawn = trace(Fn(lambda x: x + torch.rand_like(x)), torch.randn(1, 8))
    for graph, why in ((double, "cannot be checked: .*ConvTranspose"), (unsteady, "rounding"), (drawn, "draws")):
        with pytest.raises(ExportError, match=f"{why}.*verify=False") as caught:
            export_onnx(graph, tmp_path / "m.onnx")
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_large_values_and_tiny_differences_pass(tmp_path: Path) -> None:
    """Random weights make huge outputs: what counts is the largest value."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 100
    ported(model, torch.randn(1, 64), tmp_path / "m.onnx")


def test_a_batch_of_pairs_is_tried_with_pairs(tmp_path: Path) -> None:
    ported(Fn(lambda x: x.view(-1, 2, 8).sum(1)), torch.randn(4, 8), tmp_path / "m.onnx")


def test_integers_differ_by_their_share() -> None:
    want = torch.arange(100)
    got = want.clone()
    got[7] = 8
    assert agreement._off(got, want) == pytest.approx(0.01)
    assert agreement.fault("y", got, want)[1]
    assert agreement.fault("y", want + 2**60, want + 2**60 + 1)[1], "float64 cannot tell these apart"
