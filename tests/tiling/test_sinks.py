"""Sinks of a stream: classes instead of logits, pictures, array files of volumes and of audio; and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from torch import fx, nn

import splitfx
from splitfx.errors import PlanError, SplitfxError, UnsupportedError
from splitfx.passes import Tile
from tests.tiling.cases import call
from tests.tiling.test_whole_maps import MIDDLE, Decoder


def split(model: nn.Module, x: torch.Tensor, **options: Any) -> fx.GraphModule:
    return splitfx.transform(model, Tile(**{"rows": 3, **options}), x)


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, fx.GraphModule, torch.Tensor]:
    """It reads whole maps inside, which stay in memory; only what comes out goes to the sink."""
    torch.manual_seed(0)
    model, x = Decoder(MIDDLE["attention"]()).double().eval(), torch.randn(1, 2, 16, 9, dtype=torch.float64)
    return model, split(model, x), x


@pytest.mark.parametrize("end", [".npy", ".tif"])
def test_classes_instead_of_logits(decoder: Any, end: str, tmp_path: Path) -> None:
    model, tiled, x = decoder
    path = splitfx.stream(tiled, x.numpy(), tmp_path / f"labels{end}", reduce="argmax")
    found = np.load(path) if end == ".npy" else tifffile.imread(path)[None, None]
    with torch.no_grad():
        wanted = model(x).argmax(1, keepdim=True)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted.numpy())


def test_a_function_changes_strips(decoder: Any, tmp_path: Path) -> None:
    model, tiled, x = decoder
    rows: list[torch.Tensor] = []
    splitfx.stream(tiled, x.numpy(), lambda row, strip: rows.append(strip), reduce=lambda strip: strip > 0)
    path = splitfx.stream(tiled, x.numpy(), tmp_path / "mask.npy", reduce=lambda strip: strip[:, :1] > 0)
    with torch.no_grad():
        wanted = model(x) > 0
    assert torch.equal(torch.cat(rows, 2), wanted)
    assert np.array_equal(np.load(path), wanted[:, :1].numpy())


def test_a_picture_of_three_channels_in_columns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).eval()
    x = torch.randn(1, 2, 14, 11)
    path = splitfx.stream(split(model, x, grid=(2, 3)), x.numpy(), tmp_path / "picture.tif")
    with torch.no_grad():
        wanted = model(x)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(tifffile.imread(path), wanted, atol=1e-5)


def test_an_image_that_is_read_whole(tmp_path: Path) -> None:
    """Rows of the image from below, and the image itself, by a kernel that reads all of it."""
    torch.manual_seed(0)
    last = lambda: nn.Conv2d(2, 3, 3, padding=1)  # noqa: E731
    model = call(lambda x, last: last(x.flip(2).relu() + x.cumsum(2)[:, :1]), last)()
    model, x = model.double().eval(), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    tiled = split(model, x)
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(splitfx.stream(tiled, x.numpy()), wanted)
    path = splitfx.stream(tiled, x.numpy(), tmp_path / "map.npy")
    np.testing.assert_allclose(np.load(path), wanted.numpy())


@pytest.mark.parametrize("form", ["array", "file", "strips"])
@pytest.mark.parametrize("kind", ["volume", "audio"])
def test_volumes_and_audio(kind: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if kind == "volume":
        model: nn.Module = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 3, padding=1))
        x = torch.randn(1, 2, 13, 6, 5, dtype=torch.float64)
    else:
        model = nn.Sequential(nn.Conv1d(2, 4, 5, 2, 2), nn.ReLU(), nn.ConvTranspose1d(4, 3, 4, 2, 1))
        x = torch.randn(1, 2, 40, dtype=torch.float64)
    model = model.double().eval()
    tiled = split(model, x)
    array = x[0].numpy()
    given: Any = array
    if form == "file":
        np.save(tmp_path / "input.npy", array)
        given = splitfx.RowSource(tmp_path / "input.npy", layout="CDHW" if kind == "volume" else "CL")
    elif form == "strips":
        strips = (array[:, first : first + 3] for first in range(0, array.shape[1], 3))
        given = splitfx.RowSource(strips, layout="CDHW" if kind == "volume" else "CL", size=array.shape[1:])
    path = splitfx.stream(tiled, given, tmp_path / "map.npy")
    with torch.no_grad():
        np.testing.assert_allclose(np.load(path), model(x).numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("sink", "reduce", "error", "words"),
    [
        (None, "argmax", PlanError, "reduce is for what goes to a sink"),
        ("a.npy", "max", PlanError, "reduce is 'argmax' or a function"),
        ("a.npy", lambda strip: strip[:, 7], PlanError, "reduce fails on a row of zeros, 1×3×1×18: IndexError"),
        ("a.npy", lambda strip: strip[..., ::2], PlanError, "reduce has to keep rows and columns"),
        ("a.npy", lambda strip: None, PlanError, "it made NoneType"),
        ("a.npy", lambda strip: strip.to(torch.complex64), UnsupportedError, "a file cannot hold torch.complex64"),
        ("a.tif", lambda strip: strip[:, :2], UnsupportedError, "use reduce='argmax', or a .npy file"),
        ("a.tif", None, UnsupportedError, "1×3×32×18 of float64"),
    ],
)
def test_what_is_refused(decoder: Any, sink: Any, reduce: Any, error: type, words: str, tmp_path: Path) -> None:
    _, tiled, x = decoder
    with pytest.raises(error, match=re.escape(words)):
        splitfx.stream(tiled, x.numpy(), tmp_path / sink if sink else None, reduce=reduce)
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_fails_on_the_way_leaves_nothing(decoder: Any, tmp_path: Path) -> None:
    _, tiled, x = decoder
    calls: list[int] = []

    def failing(strip: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise SplitfxError("the disk of the caller is full")
        return strip

    with pytest.raises(SplitfxError, match="disk of the caller"):
        splitfx.stream(tiled, x.numpy(), tmp_path / "map.npy", reduce=failing)
    assert list(tmp_path.iterdir()) == []


def test_audio_of_another_rank_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU()).eval()
    with pytest.raises(PlanError, match="the model reads"):
        splitfx.stream(split(model, torch.randn(1, 2, 30)), splitfx.RowSource(np.zeros((2, 8, 8), np.float32)))


@pytest.mark.parametrize("grid", [None, (2, 3)])
@pytest.mark.parametrize("batched", [True, False])
def test_from_an_array_of_zarr_into_another(grid: Any, batched: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double().eval()
    x = torch.randn(1, 2, 14, 11, dtype=torch.float64)
    given = x.numpy() if batched else x[0].numpy()
    source = zarr.create_array(tmp_path / "in.zarr", shape=given.shape, chunks=(*given.shape[:-2], 3, 11), dtype="f8")
    source[...] = given
    shape = (1, 3, 14, 11) if batched else (3, 14, 11)
    sink = zarr.create_array(tmp_path / "out.zarr", shape=shape, chunks=(*shape[:-2], 3, 11), dtype="f8")
    tiled = splitfx.transform(model, Tile(grid=grid) if grid else Tile(rows=3), x)
    splitfx.stream(tiled, splitfx.RowSource(source, layout="CHW"), sink)
    with torch.no_grad():
        assert np.allclose(np.asarray(sink).reshape(1, 3, 14, 11), model(x).numpy(), rtol=1e-12)


def test_an_array_that_cannot_hold_the_map_is_left_alone(decoder: Any) -> None:
    _, tiled, x = decoder
    with pytest.raises(PlanError, match="the map is .* and the array that is given for it 1×2"):
        splitfx.stream(tiled, x.numpy(), np.zeros((1, 2)))
    shape = tiled(x).shape
    with pytest.raises(PlanError, match="torch.float64, which an array of float32 cannot hold"):
        splitfx.stream(tiled, x.numpy(), np.zeros(shape, np.float32))
    labels = np.zeros((1, 1, *shape[2:]), np.int64)
    splitfx.stream(tiled, x.numpy(), labels, reduce="argmax")
    assert np.array_equal(labels, tiled(x).argmax(1, keepdim=True).numpy())


def test_the_image_itself_is_no_sink() -> None:
    """Rows that are written are read again: the result was another one."""
    x = torch.randn(1, 2, 14, 11)
    tiled = split(nn.Conv2d(2, 2, 3, padding=1).eval(), x)
    held = torch.zeros(5, 14, 11)
    for source, sink in ((held[:2], held[:2]), (held[:2].numpy(), held[1:3]), (held[:2], held[1:3].numpy())):
        with pytest.raises(PlanError, match="the sink is the image itself"):
            splitfx.stream(tiled, splitfx.RowSource(source, layout="CHW"), sink)
    assert not held.any()
    held[:2] = x[0]
    splitfx.stream(tiled, held[:2], held[2:4])  # beside it is fine
    with torch.no_grad():
        assert torch.allclose(held[2:4], tiled(x)[0])
    with pytest.raises(PlanError, match="an array of torch.bfloat16 cannot hold"):
        splitfx.stream(tiled, held[:2], torch.zeros(2, 14, 11, dtype=torch.bfloat16))


def test_a_map_whose_columns_lie_in_front(tmp_path: Path) -> None:
    model = call(lambda x, conv: conv(x).permute(0, 3, 2, 1), lambda: nn.Conv2d(2, 12, 3))().eval()
    x = torch.randn(1, 2, 14, 11)
    with torch.no_grad():
        wanted = model(x).numpy()
    array = np.zeros(wanted.shape, np.float32)
    splitfx.stream(split(model, x), x.numpy(), array)
    path = splitfx.stream(split(model, x), x.numpy(), tmp_path / "map.npy")
    assert np.allclose(array, wanted, atol=1e-6)
    assert np.allclose(np.load(path), wanted, atol=1e-6)
    with pytest.raises(PlanError, match="permute has its columns elsewhere"):
        splitfx.stream(split(model, x, rows=0, grid=(2, 2)), x.numpy(), array)
