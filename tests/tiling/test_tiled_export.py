"""A tiled graph as an ONNX file: the same outputs, less memory, and nothing in it that only copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import ExportError
from splitfx.export import sessions, tiles
from splitfx.export.onnx import LAYER, export_onnx
from splitfx.export.runtime import check_onnx
from splitfx.ir.graph import by_path, copy_graph
from splitfx.passes import FoldBatchNorm, Tile
from splitfx.tiling.run.executor import Tiled
from tests import oracle
from tests.models import Residual, conv_bn
from tests.traced import made_once

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Residuals(nn.Module):
    """A wide stem, so that its map is what strips save, and residual sums at a quarter of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = conv_bn(3, 32), nn.Sequential(nn.Conv2d(32, 8, 1), nn.MaxPool2d(3, 2, 1))
        self.one, self.two, self.down = Residual(8, 8), Residual(8, 8), Residual(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.down(self.two(self.one(self.pool(self.stem(x))))).mean((2, 3)))


class Gated(nn.Module):
    """A gate over the whole map right behind the first layer: nothing to cut into strips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return self.last(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


def folded(model: nn.Module, size: tuple[int, int]) -> fx.GraphModule:
    return run_pass(splitfx.trace(model.eval(), torch.randn(1, 3, *size)), FoldBatchNorm())[0]


@made_once
def folded_once(model: type[nn.Module], size: tuple[int, int]) -> fx.GraphModule:
    return folded(model(), size)


def tiled(
    model: nn.Module | type[nn.Module], size: tuple[int, int], **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The untiled graph and the tiled one, of a model or of one of the classes above."""
    graph = folded(model, size) if isinstance(model, nn.Module) else folded_once(model, size)
    return graph, run_pass(graph, Tile(**options or {"rows": 16}))[0]


# ---------------------------------------------------------------- files


def record(path: Path) -> tuple[list[Any], list[str]]:
    """Nodes, and how often each operation is there."""
    nodes = list(onnx.load(path).graph.node)
    return nodes, [n.op_type for n in nodes]


@pytest.mark.filterwarnings("ignore:.*fixed batch size")
@pytest.mark.parametrize(
    "options", [{"rows": 16, "firing_intervals": (1, 2)}, {"rows": 24, "recompute": 0}, {"budget": "least"}], ids=str
)
def test_a_file_of_steps(tmp_path: Path, options: dict[str, Any]) -> None:
    split = tiled(Gated, (48, 40), **options)[1]
    path = export_onnx(split, tmp_path / "m.onnx")
    report = check_onnx(split, path, providers=["cpu"], runs=1)
    assert report.ok
    assert "steps" in report.rows[0].tiles[0]
    layers = {p.value for n in record(path)[0] for p in n.metadata_props if p.key == LAYER}
    assert {"stem", "gate", "last"} <= layers


@pytest.mark.filterwarnings("ignore:.*fixed batch size")
def test_no_node_of_a_file_does_nothing(tmp_path: Path) -> None:
    for model, size in ((Gated, (48, 40)), (Residuals, (192, 64))):
        path = export_onnx(tiled(model, size, rows=16)[1], tmp_path / "m.onnx", overwrite=True)
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        known = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.input)}
        for node in graph.node:
            assert node.op_type != "Identity"
            assert node.op_type != "Slice" or known[node.input[0]] != known[node.output[0]]
            assert node.op_type != "Concat" or len(node.input) > 1


def test_a_grid_and_an_output_that_is_read_again(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return y, self.b(y.relu())

    for options in ({"grid": (2, 2)}, {"rows": 6}):
        split = tiled(Both(), (15, 11), **options)[1]
        with pytest.warns(UserWarning, match="fixed batch size"):
            path = export_onnx(split, tmp_path / "m.onnx", overwrite=True)
        assert check_onnx(split, path, providers=["cpu"], runs=1).ok


def test_the_batch_is_fixed_and_says_so(tmp_path: Path) -> None:
    split = tiled(Gated, (48, 40), rows=32)[1]
    with pytest.raises(ExportError, match="batch cannot be dynamic: its tiled stage is written out"):
        export_onnx(split, tmp_path / "m.onnx", dynamic_batch=True)
    with pytest.warns(UserWarning, match="fixed batch size: its tiled stage is written out"):
        export_onnx(split, tmp_path / "m.onnx")
    export_onnx(split, tmp_path / "m.onnx", dynamic_batch=False, overwrite=True)
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 48, 40]


def test_too_many_steps_are_made_fewer_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = tiled(Gated, (48, 40), rows=2)[1]
    monkeypatch.setattr(tiles, "LIMIT", 60)
    path = export_onnx(split, tmp_path / "m.onnx", dynamic_batch=False)
    report = check_onnx(split, path, providers=["cpu"], runs=1)
    assert report.ok
    assert "rows at a time instead of 2 rows, which would be more than 60" in report.rows[0].tiles[0]
    monkeypatch.setattr(tiles, "LIMIT", 3)
    with pytest.raises(ExportError, match="tiled has more than 3 steps under every schedule"):
        export_onnx(split, tmp_path / "other.onnx", dynamic_batch=False)
    assert not (tmp_path / "other.onnx").exists()


def test_the_split_is_not_changed(tmp_path: Path) -> None:
    split = tiled(Residuals, (64, 32))[1]
    stage = next(m for m in split.modules() if isinstance(m, Tiled))
    metas = [dict(n.meta) for n in stage.stage.graph.nodes]
    known = dict(stage._programs)
    state = {key: value.clone() for key, value in split.state_dict().items()}
    export_onnx(split, tmp_path / "m.onnx", dynamic_batch=False)
    assert next(m for m in split.modules() if isinstance(m, Tiled)) is stage
    assert [dict(n.meta) for n in stage.stage.graph.nodes] == metas
    assert stage._programs == known
    assert all(torch.equal(value, state[key]) for key, value in split.state_dict().items())


def test_a_saved_and_loaded_graph_exports(tmp_path: Path) -> None:
    loaded = splitfx.load(splitfx.save(tiled(Residuals, (192, 64))[1], tmp_path / "split"))
    path = export_onnx(loaded, tmp_path / "m.onnx", dynamic_batch=False)
    assert check_onnx(loaded, path, providers=["cpu"], runs=1).ok


# ---------------------------------------------------------------- memory


def test_a_file_takes_half_the_memory(tmp_path: Path) -> None:
    """In fresh processes: the tiled file below half of the untiled one with either options."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    model.append(nn.MaxPool2d(8)).append(nn.Conv2d(32, 8, 1))
    graph, split = tiled(model, (1024, 256), rows=128)
    plain = export_onnx(graph, tmp_path / "plain.onnx", dynamic_batch=False)
    path = export_onnx(split, tmp_path / "m.onnx", dynamic_batch=False)
    report = check_onnx(split, path, providers=["cpu"], runs=1)
    row = report.rows[0]
    untiled = check_onnx(graph, plain, providers=["cpu"], runs=1).rows[0]
    assert untiled.default_peak_bytes is None
    assert not untiled.tiles
    if row.peak_bytes is None or untiled.peak_bytes is None:
        pytest.skip(row.peak_why or untiled.peak_why)
    assert row.default_peak_bytes is not None
    assert row.peak_bytes < untiled.peak_bytes / 2
    assert row.default_peak_bytes < untiled.peak_bytes / 2
    assert f"default options {row.default_peak_bytes / 2**20:.2f} MiB; see session_options()" in str(report)


def test_a_foreign_record_in_a_file_is_no_matter() -> None:
    class Meta:
        def __init__(self, text: str) -> None:
            self.custom_metadata_map = {"splitfx": text}

    class Session:
        def __init__(self, text: str) -> None:
            self.text = text

        def get_modelmeta(self) -> Meta:
            return Meta(self.text)

    for text in ("not JSON", "[]", '{"tiles": 3}', "{}"):
        assert sessions.tiles(Session(text)) == ()
    assert sessions.tiles(Session('{"tiles": ["tiled: 2 strips"]}')) == ("tiled: 2 strips",)


def test_a_copy_with_shared_tensors_is_what_is_written_out() -> None:
    split = tiled(Residuals, (192, 64))[1]
    copied = copy_graph(split, share=True).eval()
    said = tiles.write_out(copied, LAYER)
    assert len(said) == 1
    assert not tiles.is_tiled(copied)
    assert tiles.is_tiled(split)
    assert sorted(by_path(copied)) == sorted(by_path(split))
    x = torch.randn(1, 3, 192, 64)
    with torch.no_grad():
        oracle.assert_equal(copied(x), split(x))
