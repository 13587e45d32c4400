"""The approximate split: what it computes, where it refuses, what it costs, and its pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import splitfx
from splitfx.analysis import facts
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Promise
from splitfx.errors import PlanError, SplitfxError, UnsupportedError, VerificationError
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph
from splitfx.passes import Tile, TileZeroHalo
from splitfx.report.compare_halo import compare_halo, halo_table
from splitfx.report.plots.trade_offs import plot_halo, plot_pareto
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.planner import Point
from splitfx.tiling.stage.extract import stages
from splitfx.tiling.zero import ZeroHalo, combine_layers, install_zero
from tests import oracle
from tests.oracle import STRICT


class Small(nn.Module):
    """Three convs, two strides, a pooled classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.third, self.fc = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def image(height: int = 32, width: int = 24) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def split_at(
    model: nn.Module, last: str, grid: tuple[int, int], x: torch.Tensor
) -> tuple[ZeroHalo, torch.fx.GraphModule]:
    graph = copy_graph(splitfx.trace(model, x))
    nodes = stages(graph, facts(graph).regions)[0][0]
    stop = next(i for i, n in enumerate(nodes) if n.name == last)
    call = install_zero(graph, nodes[: stop + 1], grid)
    tidy(graph)
    found = graph.get_submodule(str(call.target))
    assert isinstance(found, ZeroHalo)
    return found, graph


@pytest.mark.parametrize("grad", [False, True])
def test_every_tile_is_an_image_of_its_own(model: nn.Module, grad: bool) -> None:
    x = image()
    split, _ = split_at(model, "relu_1", (2, 3), x)
    with torch.set_grad_enabled(grad):
        (found,) = split(x)
        for r in range(2):
            for c in range(3):
                tile = x[:, :, 16 * r : 16 * r + 16, 8 * c : 8 * c + 8]
                wanted = torch.relu(model.second(torch.relu(model.first(tile))))  # type: ignore[operator]
                oracle.assert_equal(found[:, :, 8 * r : 8 * r + 8, 4 * c : 4 * c + 4], wanted)


def test_the_rest_runs_whole_and_the_output_is_another_one(model: nn.Module) -> None:
    x = image()
    _, graph = split_at(model, "relu_1", (2, 2), x)
    with torch.no_grad():
        off = (graph(x) - model(x)).abs().max()
        _, whole = split_at(model, "relu_1", (1, 1), x)
        oracle.assert_equal(whole(x), model(x))
    assert 1e-4 < off < 1


def test_inner_edges_are_wrong_and_the_middle_of_tiles_is_right(model: nn.Module) -> None:
    x = image()
    split, _ = split_at(model, "relu", (2, 2), x)
    with torch.no_grad():
        off = (split(x)[0] - torch.relu(model.first(x))).abs().amax((0, 1))  # type: ignore[operator]
    assert off[15:17].max() > 1e-3
    assert off[:15, :11].max() < 1e-6


@pytest.mark.parametrize(
    ("grid", "size", "words"),
    [
        ((3, 2), (32, 24), "32×24 pixels are not divided by 3 x 2 tiles"),
        ((2, 5), (32, 24), "32×24 pixels are not divided by 2 x 5 tiles"),
        ((2, 2), (30, 24), "layer second: tiles give 8×6 each, and 2 x 2 of them are not the map's 15×12"),
    ],
)
def test_sizes_that_the_grid_or_a_stride_does_not_divide_are_refused(
    model: nn.Module, grid: tuple[int, int], size: tuple[int, int], words: str
) -> None:
    split, _ = split_at(model, "relu_1", grid, image(*size))
    with pytest.raises(PlanError, match=re.escape(words)):
        split(image(*size))


def test_a_grid_of_nothing_and_a_combine_layer_without_a_map_are_refused(model: nn.Module) -> None:
    split, _ = split_at(model, "relu_1", (1, 1), image())
    with pytest.raises(PlanError, match="both at least 1"):
        ZeroHalo(split.stage, (0, 2))
    pooled, _ = split_at(model, "mean", (2, 2), image())
    with pytest.raises(PlanError, match="gives no map"):
        pooled(image())


def test_the_comparison_has_a_row_for_every_combine_layer(model: nn.Module) -> None:
    x = image()
    rows = compare_halo(model, x).rows
    assert [r.layer for r in rows] == ["relu", "relu_1", "relu_2"]
    differences = [r.difference for r in rows]
    assert differences == sorted(differences)
    assert differences[0] > 1e-3
    for row in rows:
        assert row.exact_difference is not None
        assert row.exact_difference < 1e-5
        assert row.peak_bytes < row.unsplit_bytes
        assert row.resized is not None
        assert row.resized_bytes is not None
        assert row.resized_difference is not None
        assert row.resized_bytes <= row.peak_bytes
        assert row.resized_difference > 1e-3
    with torch.no_grad():
        _, graph = split_at(model, "relu_1", (2, 2), x)
        wanted = (graph(x) - model(x)).norm() / model(x).norm()
    assert differences[1] == pytest.approx(float(wanted), rel=1e-4)
    assert "relu_2" in halo_table(rows)


def test_the_predicted_peak_is_the_measured_one(model: nn.Module) -> None:
    from splitfx.analysis.live import LiveStorage

    x = image(64, 64)
    (row,) = compare_halo(model, x, layers=["relu_1"]).rows
    _, graph = split_at(model, "relu_1", (2, 2), x)
    graph(x)
    with torch.no_grad(), LiveStorage([x], [*graph.parameters()]) as live:
        graph(x)
        measured = live.peak
    assert row.peak_bytes == measured


def test_layers_that_cannot_be_combined_are_left_out_or_refused(model: nn.Module) -> None:
    x = image(30, 24)
    assert [r.layer for r in compare_halo(model, x).rows] == ["relu"]
    with pytest.raises(PlanError, match="layer second"):
        compare_halo(model, x, layers=["relu_1"])
    with pytest.raises(PlanError, match="Did you mean 'relu_1'"):
        compare_halo(model, x, layers=["relu_11"])
    with pytest.raises(PlanError, match="nowhere"):
        compare_halo(model, image(31, 23))


def test_a_model_of_one_size_has_no_smaller_image() -> None:
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 3)).eval()
    (row,) = compare_halo(flat, image(8, 8)).rows
    assert row.resized is None
    assert row.resized_difference is None


def test_bad_grids_and_layers(model: nn.Module) -> None:
    for grid in ((0, 2), (2,), (2, -1), (1.5, 2)):
        with pytest.raises(PlanError, match="a grid is rows and columns"):
            compare_halo(model, image(), grid=grid)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"write layers=\['relu'\]"):
        compare_halo(model, image(), layers="relu")
    with pytest.raises(UnsupportedError, match="one input"):
        compare_halo(nn.Linear(4, 3), torch.ones(2, 4))


def test_the_comparison_as_data(model: nn.Module) -> None:
    found = splitfx.compare_halo(model, image())
    assert [r["layer"] for r in json.loads(found.to_json())] == [r.layer for r in found.rows]
    assert str(found) == halo_table(found.rows)


def test_models_with_several_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    with pytest.raises(UnsupportedError, match="one input"):
        compare_halo(Two().eval(), (image(), image()))


# ---------------------------------------------------------------- as a pass


def test_the_pass_makes_the_split_of_a_row_and_claims_nothing_of_the_model(model: nn.Module) -> None:
    x = image()
    row = splitfx.compare_halo(model, x).rows[1]
    step = TileZeroHalo(grid=(2, 2), until=row.layer)
    split = splitfx.transform(model, step, x)
    record = splitfx.explain(split).steps[-1]
    assert record.promise == "approximate"
    assert record.difference is not None
    assert record.difference <= STRICT
    assert record.after.peak_bytes == row.peak_bytes
    assert record.after.macs == record.before.macs
    words = " ".join(str(splitfx.explain(split)).split())
    assert "not checked against the model" in words
    assert "compare_halo" in words
    assert "the same function. Verified" not in words
    with torch.no_grad():
        off = (split(x) - model(x)).norm() / model(x).norm()
    assert float(off) == pytest.approx(row.difference, rel=1e-4)
    assert Plan.from_toml(Plan([step]).to_toml()) == Plan([step])
    assert TileZeroHalo.promise is Promise.APPROXIMATE
    assert Tile.promise is Promise.EQUAL


def test_the_pass_reads_more_than_one_image_and_parameters() -> None:
    """Two inputs, a shuffle of channels, a gate that each tile computes of itself."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            both = self.a(x) + self.b(y)
            both = both.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
            gate = both.mean((2, 3), keepdim=True).sigmoid()
            return self.c(both * gate * self.scale).relu_().flatten(1).cumsum(1)

    torch.manual_seed(0)
    x, y = image(16, 12), torch.randn(2, 2, 32, 24)
    with pytest.raises(PlanError, match="tiles cannot be combined behind 'nothing'.*compare_halo"):
        splitfx.transform(Two().eval(), TileZeroHalo(grid=(2, 3), until="nothing"), (x, y))
    graph = splitfx.trace(Two().eval(), (x, y))
    last = [*combine_layers(graph, facts(graph))][-1]
    split = splitfx.transform(graph, TileZeroHalo(grid=(2, 3), until=last))
    difference = splitfx.explain(split).steps[-1].difference
    assert difference is not None
    assert difference <= STRICT
    again = splitfx.trace(split, (x, y))
    oracle.assert_equal(again(x, y), split(x, y))


def test_a_map_inside_is_read_behind_the_tiles_too() -> None:
    """By a branch whose result nobody wants, which still writes into a map of its own."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.branch = nn.Conv2d(4, 4, 3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.first(x)
            self.branch(wide).add_(1)
            return self.second(wide)

    torch.manual_seed(0)
    model, x = Unused().eval(), image(16, 24)
    split = splitfx.transform(model, Plan([TileZeroHalo(grid=(2, 3), until="second")]), x)
    wanted = torch.cat([torch.cat([model(tile) for tile in row.chunk(3, 3)], 3) for row in x.chunk(2, 2)], 2)
    assert oracle.difference(split(x), wanted) == ""


def test_writes_through_views_come_along() -> None:
    """Nobody reads what they return, but what they write into is read by the second layer."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.first(x)
            wide[:, 0].fill_(0.5)
            wide[:, 1:3] *= 2
            return self.second(wide).relu()

    torch.manual_seed(0)
    model, x = Writes().eval(), image(16, 24)
    split = splitfx.transform(model, TileZeroHalo(grid=(2, 3), until="relu"), x)
    wanted = torch.cat([torch.cat([model(tile) for tile in row.chunk(3, 3)], 3) for row in x.chunk(2, 2)], 2)
    assert oracle.difference(split(x), wanted) == ""


def test_the_oracle_of_the_pass_notices_a_wrong_tile(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ZeroHalo._crop

    def shifted(self: ZeroHalo, x: torch.Tensor, r: int, c: int) -> torch.Tensor:
        return honest(self, x.roll(1, 3) if c and x.shape[1] == 3 else x, r, c)

    monkeypatch.setattr(ZeroHalo, "_crop", shifted)
    with pytest.raises(VerificationError):
        splitfx.transform(model, TileZeroHalo(grid=(2, 2), until="relu"), image())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs option 'grid'"),
        ({"grid": (2, 2)}, "needs option 'until'"),
        ({"until": "relu"}, "needs option 'grid'"),
        ({"grid": (1, 1), "until": "relu"}, "grid is rows and columns of 2 to"),
        ({"grid": (0, 2), "until": "relu"}, "grid is rows and columns of 2 to"),
        ({"grid": (-2, -2), "until": "relu"}, "grid is rows and columns of 2 to"),
        ({"grid": (10**9, 10**9), "until": "relu"}, "grid is rows and columns of 2 to"),
        ({"grid": (2, 2), "until": "relu", "rows": 3}, "has no option 'rows'"),
        ({"grid": (2, 2), "until": "relu", "budget": "1 MiB"}, "has no option 'budget'"),
        ({"grid": (2, 2), "until": "relu", "checkpoint": True}, "has no option 'checkpoint'"),
    ],
)
def test_bad_options_of_the_pass(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        TileZeroHalo.from_dict(options)


def test_the_exact_pass_has_no_halo_to_choose() -> None:
    with pytest.raises(PlanError, match="pass 'tile' has no option 'halo'"):
        Tile.from_dict({"halo": "zero", "grid": [2, 2], "until": "relu"})


def test_a_size_that_the_model_holds_fast_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Unflatten(3, (4, 6)), nn.Flatten(3, 4), nn.ReLU()).eval()
    with pytest.raises(SplitfxError, match="the input sizes do not fit"):
        splitfx.transform(model, TileZeroHalo(grid=(2, 2), until="3"), image())


def test_the_pass_refuses_what_it_cannot_split(model: nn.Module) -> None:
    with pytest.raises(PlanError, match="Did you mean 'relu_1'"):
        splitfx.transform(model, TileZeroHalo(grid=(2, 2), until="relu_11"), image())
    with pytest.raises(PlanError, match="not divided by 3 x 2 tiles"):
        splitfx.transform(model, TileZeroHalo(grid=(3, 2), until="relu"), image())
    with pytest.raises(PlanError, match="layer second"):
        splitfx.transform(model, TileZeroHalo(grid=(2, 2), until="relu_1"), image(30, 24))


# ---------------------------------------------------------------- pictures


def texts(path: Path) -> set[str]:
    return {e.text or "" for e in ElementTree.parse(path).iter() if e.tag.endswith("text")}


def points_of(path: Path, series: str) -> list[tuple[float, float]]:
    """Where the marks of a series stand, in the file's units: y grows downwards."""
    group = next(e for e in ElementTree.parse(path).iter() if e.get("id") == series)
    return [(float(e.attrib["x"]), float(e.attrib["y"])) for e in group.iter() if e.tag.endswith("use")]


def test_the_picture_of_a_comparison(model: nn.Module, tmp_path: Path) -> None:
    splitfx.compare_halo(model, image()).plot(tmp_path / "halo.svg")
    found = texts(tmp_path / "halo.svg")
    assert {"relu", "relu_1", "relu_2", "peak memory saved (%)", "a smaller image"} <= found
    with pytest.raises(SplitfxError, match="already exists"):
        splitfx.compare_halo(model, image(), layers=["relu"]).plot(tmp_path / "halo.svg")
    with pytest.raises(PlanError, match="no rows"):
        plot_halo([], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_picture_of_schedules_marks_the_untiled_one_and_joins_the_best(tmp_path: Path) -> None:
    points = [
        Point(64 << 20, 0.9, None, "a<b>"),
        Point(8 << 20, 2.0, Schedule(4), "conv"),
        Point(16 << 20, 1.0, Schedule(16), "conv"),
        Point(20 << 20, 1.5, Schedule(0, (), (2, 2)), "a<b>"),
    ]
    path = tmp_path / "pareto.svg"
    plot_pareto(points, path)
    assert [len(points_of(path, s)) for s in ("best schedules", "other schedules", "untiled")] == [2, 1, 1]
    assert {"untiled", "strips of 4 rows", "strips of 16 rows"} <= texts(path)
    with pytest.raises(PlanError, match="no points"):
        plot_pareto([], tmp_path / "none.svg")


def test_points_lie_where_their_values_say(tmp_path: Path) -> None:
    """Twice the bytes are as far to the right everywhere, and less time is lower."""
    points = [Point(n << 20, 8.0 / n, Schedule(n), "") for n in (2, 4, 8)]
    plot_pareto(points, tmp_path / "p.svg")
    (x1, y1), (x2, y2), (x3, y3) = points_of(tmp_path / "p.svg", "best schedules")
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert x1 < x2
    assert y1 < y2 < y3


@pytest.mark.parametrize(("end", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_what_its_name_says(end: str, start: bytes, tmp_path: Path) -> None:
    plot_pareto([Point(1 << 20, 1.0, Schedule(4), "conv")], tmp_path / f"p.{end}")
    assert (tmp_path / f"p.{end}").read_bytes().startswith(start)


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitfxError, match=r"p\.bmp: a picture is a png, svg or pdf file"):
        plot_pareto([Point(1 << 20, 1.0, Schedule(4), "conv")], tmp_path / "p.bmp")
    assert not list(tmp_path.iterdir())
