"""Operators of another library, registered by one call each: every pass, analysis and export follows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splitfx
from splitfx import Window
from splitfx.analysis import facts
from splitfx.errors import ExportError, SplitfxError
from splitfx.ir.ops import registered
from splitfx.passes import Group, SplitNet, Tile
from splitfx.tiling.run.executor import Tiled
from tests import oracle


@torch.library.custom_op("splitfx_tests::spread", mutates_args=())
def spread(x: torch.Tensor, size: int, stride: int, padding: int) -> torch.Tensor:
    """Largest minus smallest under a window, of each channel."""
    return _spread(x, size, stride, padding)


@spread.register_fake
def _(x: torch.Tensor, size: int, stride: int, padding: int) -> torch.Tensor:
    return F.max_pool2d(x, size, stride).new_empty(
        (*x.shape[:2], *((s + 2 * padding - size) // stride + 1 for s in x.shape[2:]))
    )


def _spread(x: torch.Tensor, size: int, stride: int, padding: int) -> torch.Tensor:
    x = F.pad(x, (padding,) * 4)
    return F.max_pool2d(x, size, stride) + F.max_pool2d(-x, size, stride)


@torch.library.custom_op("splitfx_tests::bend", mutates_args=())
def bend(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A learned curve per channel."""
    return _bend(x, scale, shift)


@bend.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _bend(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * scale[:, None, None]) + shift[:, None, None]


class Bend(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.splitfx_tests.bend(x, self.scale, self.shift)


class Net(nn.Module):
    """Convs, the two operators between them, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 12, 1),
        )
        self.first, self.second, self.fc = Bend(8), Bend(12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.one(self.stem(x)))
        x = torch.ops.splitfx_tests.spread(x, 3, 2, 1)
        x = self.second(self.two(x))
        return self.fc(x.mean((2, 3)))


def register() -> None:
    splitfx.register_op(
        spread,
        rows="window",
        channels="same",
        window=lambda a: Window.of(a["size"], a["stride"], a["padding"]),
        padding="padding",
        per_output=1,
        decomposition=_spread,
    )
    splitfx.register_op(
        torch.ops.splitfx_tests.bend,
        rows="same",
        channels="same",
        per_channel=("scale", "shift"),
        per_output=3,
        decomposition=_bend,
    )


@pytest.fixture
def known() -> Iterator[None]:
    register()
    yield
    for operator in (spread, bend):
        registered.unregister_op(operator)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def image(height: int = 33, width: int = 22) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("known")
class TestRegistered:
    def test_cost_counts_it(self, model: nn.Module) -> None:
        graph = splitfx.trace(model, image())
        found = facts(graph)
        rows = {node.target: row for node, row in found.cost.rows.items()}
        outputs = {node.target: value for node, value in found.shapes.items()}
        assert not found.cost.uncounted
        for operator, per_output in (("spread", 1), ("bend", 3)):
            target = getattr(torch.ops.splitfx_tests, operator).default
            assert rows[target].ops == per_output * outputs[target].numel()

    def test_memory_holds_what_they_return(self, model: nn.Module) -> None:
        plain = splitfx.trace(model, image())
        tiled = splitfx.transform(model, Tile(rows=5), image())
        for graph in (plain, tiled):
            assert facts(graph).memory.peak_bytes == splitfx.measure(graph, image(), runs=1).peak_bytes
        assert facts(tiled).memory.peak_bytes < facts(plain).memory.peak_bytes

    def test_group_takes_their_channels_apart(self, model: nn.Module) -> None:
        split = splitfx.transform(model, Group(factors=(2, 2), lowering="branches"), image())
        bends = [n for n in split.graph.nodes if n.target == torch.ops.splitfx_tests.bend.default]
        assert len(bends) > 2  # once for every branch
        assert all(n.args[1].op == "call_function" for n in bends[:2])  # on its own part of the scales

    def test_splitnet_carries_a_split_through(self, model: nn.Module) -> None:
        step = SplitNet(source="random", levels={"one": 2, "two": 2, "fc": 2}, lowering="branches")
        split = splitfx.transform(model, step, image())
        targets = [n.target for n in split.graph.nodes]
        for operator in ("spread", "bend"):  # once for every group, or more often
            assert targets.count(getattr(torch.ops.splitfx_tests, operator).default) >= 2

    @pytest.mark.parametrize("schedule", [{"rows": 5}, {"grid": (2, 3)}, {"budget": "least"}])
    def test_tile_computes_pieces_of_them(self, model: nn.Module, schedule: dict) -> None:
        model = model.double()
        split = splitfx.transform(model, Tile(**schedule), image().double())
        tiled = {n.target for m in split.modules() if isinstance(m, Tiled) for n in m.stage.graph.nodes}
        assert {torch.ops.splitfx_tests.spread.default, torch.ops.splitfx_tests.bend.default} <= tiled
        for size in ((33, 22), (64, 17)):
            x = image(*size).double()
            assert oracle.difference(split(x), model(x)) == ""

    def test_a_wrong_window_is_seen(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = Window.of
        monkeypatch.setattr(Window, "of", lambda size, stride, padding: honest(size - 1, stride, padding))
        with pytest.raises(SplitfxError):
            splitfx.transform(model, Tile(rows=5), image())

    def test_it_is_exported_and_runs(self, model: nn.Module, tmp_path: Path) -> None:
        levels = {"one": 2, "two": 2, "fc": 2}
        for step in (Group(factors=(2, 2)), Tile(rows=8), SplitNet(source="random", levels=levels)):
            split = splitfx.transform(model, step, image())
            path = splitfx.export_onnx(split, tmp_path / f"{step.name}.onnx")
            assert splitfx.check_onnx(split, path).ok

    def test_a_folder_with_it_is_loaded(self, model: nn.Module, tmp_path: Path) -> None:
        split = splitfx.transform(model, Tile(rows=8), image())
        splitfx.save(split, tmp_path / "saved")
        assert oracle.difference(splitfx.load(tmp_path / "saved")(image()), split(image())) == ""

    def test_registered_twice_is_refused(self) -> None:
        with pytest.raises(SplitfxError, match="known already"):
            register()


def test_a_folder_with_an_operator_that_nobody_registered_is_refused(model: nn.Module, tmp_path: Path) -> None:
    register()
    try:
        splitfx.save(splitfx.transform(model, Tile(rows=8), image()), tmp_path / "saved")
    finally:
        for operator in (spread, bend):
            registered.unregister_op(operator)
    with pytest.raises(ExportError, match="splitfx_tests"):
        splitfx.load(tmp_path / "saved")


def test_without_a_row_passes_stop_there_and_say_so(model: nn.Module) -> None:
    split = splitfx.transform(model, Tile(until="one", rows=8), image())
    notes = " ".join(note.what for note in splitfx.explain(split).steps[-1].notes)
    assert "has no spatial rule" in notes
    assert facts(splitfx.trace(model, image())).cost.uncounted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": "window"}, "belong together"),
        ({"per_channel": ("gamma",)}, "has no argument 'gamma'; it has padding, size, stride, x"),
        ({"padding": "pads"}, "has no argument 'pads'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(options: dict, words: str) -> None:
    with pytest.raises(SplitfxError, match=words):
        splitfx.register_op(spread, **options)


def test_what_is_no_operator_or_overwrites_is_refused() -> None:
    with pytest.raises(SplitfxError, match="is no operator"):
        splitfx.register_op(torch.relu)
    with pytest.raises(SplitfxError, match="overwrites its arguments"):
        splitfx.register_op(torch.ops.aten.sinc_.default)
    with pytest.raises(SplitfxError, match="known already"):
        splitfx.register_op(torch.ops.aten.relu.default)
