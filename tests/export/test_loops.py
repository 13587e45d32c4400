"""Tiled stages as loops in ONNX files: any height and batch, every border, what no loop holds, and sabotage."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import ExportError
from splitfx.export import loops, sessions
from splitfx.export.loops import body, flow
from splitfx.export.onnx import LAYER, export_onnx
from splitfx.passes import FoldBatchNorm, Tile
from tests import oracle
from tests.models import Residual, conv_bn
from tests.traced import made_once

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WIDTH = 24
HEIGHTS = ((1, 48), (2, 49), (1, 65), (3, 33), (1, 17), (1, 8), (2, 5), (1, 160))


class Pools(nn.Module):
    """Strides, dilation, a pool that rounds up, an average over its padding, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.wide, self.far = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.mean, self.last = nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(16, 4, (5, 1), padding=(2, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x).relu())
        return self.last(self.mean(torch.cat([self.wide(x), self.far(x).sigmoid()], 1)))


class Residuals(nn.Module):
    """Residual sums, one around a stride, and a mean into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 16), nn.Sequential(nn.Conv2d(16, 8, 1), nn.MaxPool2d(3, 2, 1))
        self.one, self.two, self.down = Residual(8, 8), Residual(8, 8), Residual(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.down(self.two(self.one(self.pool(self.stem(x))))).mean((2, 3)))


class Gate(nn.Module):
    """An inverted residual with a gate over the whole map: two loops."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand, self.deep = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.gate, self.project = nn.Conv2d(wide, wide, 1), nn.Conv2d(wide, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.deep(F.silu(self.expand(x))))
        return x + self.project(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(3, 4, 3, 2, 1), Gate(4), Gate(4), nn.Conv2d(4, 7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.stem(x)))).relu().mean((2, 3))


class Outputs(nn.Module):
    """Maps of two heights and extremes, all of them given; one of the maps is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.c = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = self.a(x).relu()
        z = self.b(y)
        return y, self.c(z), z.amax((2, 3))


class Skips(nn.Module):
    """A U-Net of one level: a skip waits for what is below it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        return self.last(torch.cat([y, self.up(self.c(self.b(y).relu()).relu())], 1))


class Larger(nn.Module):
    """Rows are repeated, then seen by a window."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.interpolate(self.a(x), scale_factor=2))


class Chain(nn.Module):
    """More windows of one height than a group takes, and every second row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=d, dilation=d) for d in (1, 2, 1, 1, 3, 1, 1, 2))
        self.every_second = nn.Conv2d(4, 4, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x).relu()
        return self.every_second(x).mean((2, 3))


MODELS = (Pools, Residuals, Gates, Outputs, Skips, Larger, Chain)


@made_once
def tiled(model: type[nn.Module], double: bool = False) -> fx.GraphModule:
    made = model().eval()
    for one in made.modules():
        if isinstance(one, nn.Conv2d):
            nn.init.kaiming_normal_(one.weight)  # else a deep map is nearly constant, and any row is as good as another
        if isinstance(one, nn.BatchNorm2d):
            one.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    made = made.double() if double else made
    graph = splitfx.trace(made, torch.randn(1, 3, 48, WIDTH, dtype=torch.float64 if double else torch.float32))
    return run_pass(run_pass(graph, FoldBatchNorm())[0], Tile(rows=8))[0]


@pytest.fixture(params=[1, 6000], ids=["low", "tall"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest strips that there are, and ones of some rows in which later groups wait for several."""
    monkeypatch.setattr(loops, "WORTH", 100.0)
    monkeypatch.setattr(loops, "PIECE", request.param)


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "WORTH", 100.0)
    monkeypatch.setattr(loops, "PIECE", 1)


def leaves(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


@pytest.mark.parametrize("model", MODELS)
def test_one_file_runs_at_every_height_and_batch(model: type[nn.Module], piece: None, tmp_path: Path) -> None:
    split = tiled(model)
    path = export_onnx(split, tmp_path / "m.onnx")
    session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
    assert "loop" in sessions.tiles(session)[0]
    assert session.get_inputs()[0].shape == ["batch", 3, "height", WIDTH]
    for batch, height in HEIGHTS:
        if model is Skips and height % 2:
            continue
        x = torch.randn(batch, 3, height, WIDTH)
        with torch.no_grad():
            wanted = leaves(split(x))
        found = session.run(None, {"x": x.numpy()})
        for got, want in zip(found, wanted, strict=True):
            assert got.shape == tuple(want.shape), (batch, height)
            assert oracle.error(torch.as_tensor(got), want) < 1e-5, (batch, height)


class Whole(nn.Module):
    """Convolutions, a pool and their mean: one loop, of which nothing is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 7, 2, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(self.a(x).relu(), 3, 2, 1)
        return self.c(y + self.b(y).relu()).mean((2, 3))


def in_openvino(path: Path, x: torch.Tensor, fixed: bool) -> list[torch.Tensor]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    if fixed:
        model.reshape({0: list(x.shape)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([x.numpy()])
    return [torch.as_tensor(found[place].copy()) for place in range(len(compiled.outputs))]


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "fixed"])
def test_openvino_runs_a_loop_with_free_and_with_fixed_sizes(fixed: bool, low: None, tmp_path: Path) -> None:
    """With a fixed height it takes the height of a loop's first state for that of all, unless that hangs on values."""
    split = tiled(Whole)
    path = export_onnx(split, tmp_path / "m.onnx")
    assert not [n.name for n in onnx.load(str(path)).graph.node if "Sequence" in n.op_type]
    for batch, height in ((2, 64), (1, 26)):
        x = torch.randn(batch, 3, height, WIDTH)
        with torch.no_grad():
            assert oracle.error(in_openvino(path, x, fixed)[0], split(x)) < 1e-5, (batch, height)


@pytest.mark.parametrize("model", [Pools, Gates, Outputs, Skips])
def test_openvino_runs_the_steps(model: type[nn.Module], tmp_path: Path) -> None:
    """What a loop collects comes out wrong there (2026.4): the steps do not."""
    split = tiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fixed batch was asked for
        path = export_onnx(split, tmp_path / "m.onnx", loops=False)
    session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
    assert "steps" in sessions.tiles(session)[0]
    x = torch.randn(1, 3, 48, WIDTH)
    with torch.no_grad():
        wanted = leaves(split(x))
    for got, want in zip(in_openvino(path, x, fixed=False), wanted, strict=True):
        assert oracle.error(got, want) < 1e-5


def test_steps_have_no_free_batch(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="on request"):
        export_onnx(tiled(Whole), tmp_path / "m.onnx", loops=False, dynamic_batch=True)


@pytest.mark.parametrize("model", [Pools, Residuals, Gates, Skips])
def test_float64_is_exact(model: type[nn.Module], low: None, tmp_path: Path) -> None:
    """onnxruntime has no convolution in double; onnx's reference has."""
    from onnx.reference import ReferenceEvaluator

    split = tiled(model, double=True)
    path = export_onnx(split, tmp_path / "m.onnx", verify=False)
    for batch, height in ((1, 20), (2, 14)):
        x = torch.randn(batch, 3, height, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            wanted = leaves(split(x))
        for got, want in zip(ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()}), wanted, strict=True):
            assert oracle.error(torch.as_tensor(got), want) <= 1e-12


# ---------------------------------------------------------------- sabotage


def test_sabotage_a_bottom_border_one_row_short(low: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = flow._window

    def short(node: Any) -> Any:
        rule = window(node)
        return rule if isinstance(rule, str) or not rule.after else replace(rule, after=rule.after - 1)

    monkeypatch.setattr(flow, "_window", short)
    with pytest.raises(ExportError, match="was not written"):
        export_onnx(tiled(Residuals), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_sabotage_a_bottom_border_that_is_not_padding(
    low: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler = body.Loop.filler
    monkeypatch.setattr(body.Loop, "filler", lambda self, value, rows, fill=0.0: filler(self, value, rows, fill + 1))
    with pytest.raises(ExportError, match="onnxruntime does not compute what the graph does"):
        export_onnx(tiled(Outputs), tmp_path / "m.onnx")


def test_sabotage_a_state_one_row_off(low: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = flow._placed

    def late(rule: Any, read: Any) -> Any:
        found = placed(rule, read)
        return replace(found, lag=found.lag + (rule.kind == "window"))

    monkeypatch.setattr(flow, "_placed", late)
    with pytest.raises(ExportError, match="was not written"):
        export_onnx(tiled(Chain), tmp_path / "m.onnx")


# ---------------------------------------------------------------- files


def test_a_file_is_of_one_body_with_the_layers_names(low: None, tmp_path: Path) -> None:
    path = export_onnx(tiled(Residuals), tmp_path / "m.onnx")
    graph = onnx.load(path).graph
    assert [n.op_type for n in graph.node].count("Loop") == 1
    assert "Conv" not in [n.op_type for n in graph.node]

    def within(part: Any) -> list[Any]:
        inner = [within(a.g) for n in part.node for a in n.attribute if a.HasField("g")]
        return [*part.node, *(n for some in inner for n in some)]

    convs = [n for n in within(graph) if n.op_type == "Conv"]
    layers = [p.value for n in convs for p in n.metadata_props if p.key == LAYER]
    assert len(layers) == len(set(layers)) == 9
    assert "stem.0" in layers


def test_the_sizes_are_fixed_on_request(low: None, tmp_path: Path) -> None:
    path = export_onnx(tiled(Residuals), tmp_path / "m.onnx", dynamic_batch=False)
    session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
    assert session.get_inputs()[0].shape == [1, 3, 48, WIDTH]
    assert "loop" in sessions.tiles(session)[0]


def test_a_height_that_a_layer_fixes_is_fixed(low: None, tmp_path: Path) -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.adaptive_avg_pool2d(self.pool(self.b(self.a(x).relu())), (6, 6)).flatten(1)

    split = run_pass(splitfx.trace(Cells().eval(), torch.randn(1, 3, 48, WIDTH)), Tile(rows=8))[0]
    path = export_onnx(split, tmp_path / "m.onnx")
    session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
    assert session.get_inputs()[0].shape == ["batch", 3, 48, WIDTH]


@pytest.mark.parametrize(
    "what", [lambda y, x: y[:, :, : x.shape[2] // 4 * 2], lambda y, x: F.pad(y, (0, 0, 0, x.shape[2] % 2))]
)
def test_a_height_that_a_layer_computes_with_is_fixed(what: Any, low: None, tmp_path: Path) -> None:
    """Cut and padded to whole blocks: nothing of it is in a file of 40 rows, nor in one of 80."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return what(F.avg_pool2d(self.b(self.a(x).relu()), 2), x)

    split = run_pass(splitfx.trace(Blocks().eval(), torch.randn(1, 3, 40, WIDTH)), Tile(rows=8))[0]
    session = sessions.open_session(export_onnx(split, tmp_path / "m.onnx"), sessions.CPU, sessions.session_options(1))
    assert session.get_inputs()[0].shape == ["batch", 3, 40, WIDTH]
    assert "loop" in sessions.tiles(session)[0]


def test_what_no_loop_holds_says_why(tmp_path: Path) -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.pad(self.a(x), (1, 1, 1, 1), mode="reflect")).relu()

    split = run_pass(splitfx.trace(Flipped().eval(), torch.randn(1, 3, 24, WIDTH)), Tile(rows=8))[0]
    with pytest.warns(UserWarning, match="fixed batch size: its tiled stage is written out .* no loop holds it: "):
        path = export_onnx(split, tmp_path / "m.onnx")
    session = sessions.open_session(path, sessions.CPU, sessions.session_options(1))
    assert "steps" in sessions.tiles(session)[0]
    assert "no loop: " in sessions.tiles(session)[0]
