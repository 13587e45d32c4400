"""A graph at other sizes than the traced one: equal to the model, or refused in one line that names the sizes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx.errors import UnsupportedError
from splitfx.ir.sizes import Sizes
from splitfx.passes import FoldBatchNorm, Tile
from tests import oracle


class Net(nn.Module):
    """A convolution and what is done around it."""

    def __init__(self, does: Callable[[nn.Module, torch.Tensor], Any], stride: int = 1) -> None:
        super().__init__()
        self.conv, self.does = nn.Sequential(nn.Conv2d(3, 3, 3, stride, 1), nn.BatchNorm2d(3)), does
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(self.conv, x)


def _padded(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m(F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)))[..., : x.shape[2], : x.shape[3]]


def _windows(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m(x)
    return y.view(*y.shape[:2], y.shape[2] // 8, 8, y.shape[3] // 8, 8).sum((3, 5))


FREE = {
    "resize to the input": lambda: Net(lambda m, x: F.interpolate(m(x), size=x.shape[-2:], mode="bilinear"), 4),
    "pad and crop": lambda: Net(_padded),
    "adaptive along one axis": lambda: Net(lambda m, x: F.adaptive_avg_pool2d(m(x), (None, 1))),
    "scale factor": lambda: Net(
        lambda m, x: F.interpolate(m(x), scale_factor=1.5, mode="bilinear", recompute_scale_factor=True)
    ),
    "skip": lambda: Net(lambda m, x: torch.cat([x, F.interpolate(m(x), size=x.shape[-2:])], 1), 2),
    "reads nothing": lambda: Net(lambda m, x: m(x).relu()),
}
MADE: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "trace": splitfx.trace,
    "rows": lambda net, x: splitfx.transform(net, Tile(rows=16), x),
    "folded": lambda net, x: splitfx.transform(net, FoldBatchNorm(), x),
}


def image(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64)


def stored(graph: nn.Module, folder: Path) -> nn.Module:
    splitfx.save(graph, folder)  # type: ignore[arg-type]
    return splitfx.load(folder)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", FREE)
def test_equal_at_other_sizes(name: str, made: str, tmp_path: Path) -> None:
    net = FREE[name]()
    graph = MADE[made](net, image(1, 3, 64, 64))
    for one in (graph, stored(graph, tmp_path / "kept")):
        for batch, height, width in ((1, 48, 80), (2, 49, 75), (3, 66, 59)):
            x = image(batch, 3, height, width)
            with torch.no_grad():
                assert not oracle.difference(one(x), net(x))


REFUSED = {
    "branch": (lambda: Net(lambda m, x: m(x) * 2 if x.shape[2] > 60 else m(x)), "x0[2] > 60"),
    "loop": (lambda: Net(lambda m, x: sum(m(x)[:, :, i] for i in range(x.shape[2]))), "fixed to 64"),
    "parts": (lambda: Net(lambda m, x: sum(part.sum(2) for part in m(x).split(16, 2))), "a split"),
    "windows": (lambda: Net(_windows), "sizes do not fit"),
}


def pickled(graph: nn.Module) -> nn.Module:
    held = io.BytesIO()
    torch.save(graph, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_where_the_model_does_something_else(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    net = make()
    graph = splitfx.trace(net, image(1, 3, 64, 64))
    for one in (graph, copy.copy(graph), copy.deepcopy(graph), pickled(graph), stored(graph, tmp_path / "kept")):
        assert not oracle.difference(one(image(2, 3, 64, 64)), net(image(2, 3, 64, 64)))
        with pytest.raises(UnsupportedError) as error:
            one(image(2, 3, 49, 75))
        assert "1x3x64x64" in str(error.value)
        assert "2x3x49x75" in str(error.value)
        assert why in str(error.value)
        assert "\n" not in str(error.value)


class Counting(nn.Module):
    """Records the rows that it was really called with, in a list that all its copies share."""

    rows: list[int] = []  # noqa: RUF012

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 4, 3, 2, 1), None
        self.table = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and not torch.compiler.is_compiling():
            self.rows.append(x.shape[2])
        if self.table and self.kept is None:
            self.kept = x.new_ones(1, 4, -(-x.shape[2] // 2), 1)
        y = self.conv(x).relu()
        return y * self.kept if self.table else y


def called_with(made: Callable[[], Any]) -> set[int]:
    Counting.rows.clear()
    made()
    return set(Counting.rows)


def test_large_inputs_are_run_in_part_only() -> None:
    assert called_with(lambda: splitfx.trace(Counting(), torch.randn(1, 3, 640, 640))) == {64}
    assert called_with(lambda: splitfx.trace(Counting(), torch.randn(1, 3, 641, 640))) == {65}
    assert called_with(lambda: splitfx.transform(Counting(), Tile(rows=16), torch.randn(1, 3, 640, 640))) == {64}
    assert called_with(lambda: splitfx.trace(Counting(), torch.randn(1, 3, 100, 64))) == {100}


def test_large_inputs_are_run_whole_where_the_size_decides() -> None:
    assert 640 in called_with(lambda: splitfx.trace(Counting(table=True), torch.randn(1, 3, 640, 640)))
    fixed = lambda: splitfx.trace(Counting(), torch.randn(1, 3, 640, 640), dynamic="batch")  # noqa: E731
    assert 640 in called_with(fixed)


@pytest.mark.parametrize("name", ["resize to the input", "pad and crop", "scale factor"])
def test_a_file_holds_the_traced_size_and_any_batch(name: str, tmp_path: Path) -> None:
    graph = splitfx.trace(FREE[name]().float(), image(1, 3, 33, 41).float())
    path = splitfx.export_onnx(graph, tmp_path / "m.onnx")
    (given,) = onnx.load(path).graph.input
    sizes = [one.dim_value or one.dim_param for one in given.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 33, 41]


def test_sabotage_without_the_check_another_result_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = REFUSED["branch"][0]()
    graph = splitfx.trace(net, image(1, 3, 64, 64))
    monkeypatch.setattr(Sizes, "broken", lambda *_: "")
    assert oracle.difference(graph(image(2, 3, 49, 75)), net(image(2, 3, 49, 75)))


def test_fewer_sizes_are_free_on_request() -> None:
    net = FREE["reads nothing"]()
    with pytest.raises(UnsupportedError, match="size 2 of input 0 is fixed to 64"):
        splitfx.trace(net, image(1, 3, 64, 64), dynamic="batch")(image(2, 3, 49, 75))
    with pytest.raises(UnsupportedError, match="size 0 of input 0 is fixed to 1"):
        splitfx.trace(net, image(1, 3, 64, 64), dynamic="none")(image(2, 3, 64, 64))


class ShrunkToOne(nn.Module):
    """The deepest map of an 8x8 image is one pixel, and its size is read again behind a resize to that size."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3))
        self.head = nn.Linear(3, 2) if fixed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.down:
            y = layer(y)
        if self.head is not None:
            return self.head(y.flatten(1))
        small = F.interpolate(x, size=y.shape[-2:])
        other = F.interpolate(x.flip(3), size=small.shape[-2:])
        both = torch.cat([small, other], 1) + y.repeat(1, 2, 1, 1)
        b, c, h, w = both.shape
        return both.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def test_a_map_of_one_pixel_is_no_constant() -> None:
    net = ShrunkToOne().double().eval()
    graph = splitfx.trace(net, image(1, 3, 8, 8))
    for size in ((2, 3, 8, 8), (3, 3, 21, 35), (1, 3, 9, 4)):
        assert not oracle.difference(graph(image(*size)), net(image(*size)))


def test_a_map_that_must_be_one_pixel_is_a_rule() -> None:
    net = ShrunkToOne(fixed=True).double().eval()
    graph = splitfx.trace(net, image(1, 3, 8, 8))
    for size in ((2, 3, 8, 8), (3, 3, 5, 6)):
        assert not oracle.difference(graph(image(*size)), net(image(*size)))
    with pytest.raises(UnsupportedError, match="1x3x8x8 and got 2x3x9x8: "):
        graph(image(2, 3, 9, 8))


def test_sabotage_a_size_of_one_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfx.frontend import size_rules

    monkeypatch.setattr(size_rules, "_says_one", lambda *_: False)
    net = ShrunkToOne().double().eval()
    graph = splitfx.trace(net, image(1, 3, 8, 8))
    with pytest.raises(UnsupportedError):
        graph(image(3, 3, 21, 35))
