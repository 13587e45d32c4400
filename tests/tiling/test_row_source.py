"""Images read row by row: what is read, how it is normalised, what is refused, and streaming it through a network."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import splitfx
from splitfx.errors import PlanError, SplitfxError, UnsupportedError
from splitfx.passes import Tile
from splitfx.tiling.stream import stream
from splitfx.tiling.stream.sources import RowSource
from tests import oracle
from tests.oracle import STRICT, error

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int = 37, width: int = 29, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def wanted(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("layout", ["HWC", "CHW", "batch", "torch", "strided"])
def test_arrays_in_every_layout(layout: str) -> None:
    image = picture()
    given: Any = {
        "HWC": image,
        "CHW": np.ascontiguousarray(image.transpose(2, 0, 1)),
        "batch": image.transpose(2, 0, 1)[None],
        "torch": torch.from_numpy(image),
        "strided": np.repeat(image, 2, 0)[::2],
    }[layout]
    source = RowSource(given)
    assert source.shape == (3, 37, 29)
    assert torch.equal(source.whole(), wanted(image))
    assert torch.equal(source.read(5, 9, (3, 11)), wanted(image)[:, :, 5:9, 3:11])


def test_numbers_become_what_the_model_was_trained_on() -> None:
    image = picture()
    x = RowSource(image, mean=MEAN, std=STD).whole()
    torch.testing.assert_close(x, torchvision.transforms.functional.normalize(wanted(image), MEAN, STD))  # type: ignore[arg-type]
    assert torch.equal(RowSource(image, scale=1.0).whole(), wanted(image) * 255)
    floats = image.astype(np.float32)
    assert torch.equal(RowSource(floats).whole(), torch.from_numpy(floats).permute(2, 0, 1)[None])
    sixteen = image.astype(np.uint16) * 257
    torch.testing.assert_close(RowSource(sixteen).whole(), wanted(image))
    grey = RowSource(image[:, :, 0])
    assert torch.equal(grey.whole(torch.float64), torch.from_numpy(image[:, :, 0])[None, None].double() / 255)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (picture(8, 8, 8), {}, "does not say where the channels are; give layout="),
        (picture(), {"layout": "WHC"}, "a layout is one of"),
        (picture()[:, :, 0], {"layout": "HWC"}, "layout HWC does not fit its shape 37×29"),
        (picture(), {"mean": (0.5,)}, "mean has 1 values for 3 channels"),
        (picture(), {"std": (0.5, 0, 1)}, "every std must be more than 0"),
        (picture(), {"size": (37, 29)}, "size is for strips"),
        (iter([picture()]), {}, "give RowSource(strips, size=(rows, columns))"),
        (7, {}, "an image is an array, a path or an iterable of row strips, not int"),
        (np.zeros((2, 2, 2, 2, 2)), {}, "is no image"),
    ],
)
def test_what_cannot_be_an_image_is_refused(data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        RowSource(data, **options)


def test_number_types_without_a_white_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="its numbers are int64; convert them"):
        RowSource(picture().astype(np.int64))


# ---------------------------------------------------------------- files


def tiff(
    path: Path, image: np.ndarray, order: str = "<", planar: bool = False, per: int = 5, big: bool = False
) -> None:
    """An uncompressed TIFF in strips, the last strip first in the file."""
    height, width, channels = image.shape
    planes = [image[:, :, i : i + 1] for i in range(channels)] if planar else [image]
    kind = np.dtype(order + image.dtype.str[1:])
    strips = [plane[top : top + per].astype(kind).tobytes() for plane in planes for top in range(0, height, per)]
    head = 16 if big else 8
    body, offsets = b"", [0] * len(strips)
    for i in reversed(range(len(strips))):
        offsets[i] = head + len(body)
        body += strips[i]
    format_ = {"u": 1, "f": 3}[image.dtype.kind]
    bits = image.dtype.itemsize * 8
    tags = [
        (256, [width]), (257, [height]), (258, [bits] * channels), (259, [1]), (262, [2 if channels == 3 else 1]),
        (273, offsets), (277, [channels]), (278, [per]), (284, [2 if planar else 1]), (339, [format_] * channels),
    ]  # fmt: skip
    word, size = ("Q", 20) if big else ("I", 12)
    where = head + len(body)
    after = where + (8 if big else 2) + size * len(tags) + struct.calcsize(word)
    entries, extra = b"", b""
    for tag, values in tags:
        data = struct.pack(f"{order}{len(values)}I", *values)
        room = struct.calcsize(word)
        if len(data) > room:
            entry = struct.pack(order + word, after + len(extra))
            extra += data
        else:
            entry = data.ljust(room, b"\0")
        entries += struct.pack(order + "HH" + word, tag, 4, len(values)) + entry
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(order + "HHHQ", 43, 8, 0, where) if big else struct.pack(order + "HI", 42, where)
    count = struct.pack(order + ("Q" if big else "H"), len(tags))
    path.write_bytes(mark + start + body + count + entries + bytes(struct.calcsize(word)) + extra)


def test_npy_files_in_both_layouts_are_read_and_not_mapped(tmp_path: Path) -> None:
    image = picture()
    np.save(tmp_path / "a.npy", image)
    np.save(tmp_path / "b.npy", np.ascontiguousarray(image.transpose(2, 0, 1)[None]))
    np.save(tmp_path / "c.npy", image.astype(">f4"))
    for name in ("a", "b"):
        source = RowSource(tmp_path / f"{name}.npy")
        assert torch.equal(source.whole(), wanted(image))
        assert torch.equal(source.read(30, 37), wanted(image)[:, :, 30:])
    assert torch.equal(RowSource(tmp_path / "c.npy", scale=1 / 256).whole(), wanted(image) * 255 / 256)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert torch.equal(RowSource(mapped).whole(), wanted(image))


def test_ppm_and_pgm_files_as_pillow_writes_them(tmp_path: Path) -> None:
    image = picture()
    Image.fromarray(image).save(tmp_path / "a.ppm")
    Image.fromarray(image[:, :, 0]).save(tmp_path / "a.pgm")
    assert torch.equal(RowSource(tmp_path / "a.ppm").whole(), wanted(image))
    assert torch.equal(RowSource(tmp_path / "a.pgm").whole(), wanted(image)[:, :1])
    head, body = b"P6\n# a comment\n29 # another\n37\n255\n", image.tobytes()
    (tmp_path / "b.ppm").write_bytes(head + body)
    assert torch.equal(RowSource(tmp_path / "b.ppm").read(3, 8), wanted(image)[:, :, 3:8])


def test_tiff_files_as_pillow_writes_them(tmp_path: Path) -> None:
    image = picture()
    Image.fromarray(image).save(tmp_path / "a.tif")
    assert torch.equal(RowSource(tmp_path / "a.tif").whole(), wanted(image))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_tiff_of_every_kind(order: str, planar: bool, big: bool, dtype: str, tmp_path: Path) -> None:
    image = picture().astype(dtype)
    tiff(tmp_path / "a.tif", image, order, planar, big=big)
    source = RowSource(tmp_path / "a.tif", scale=1.0)
    assert torch.equal(source.whole(), wanted(picture()) * 255)
    assert torch.equal(source.read(4, 16), (wanted(picture()) * 255)[:, :, 4:16])  # over the ends of strips


def test_every_tiff_of_the_tests_is_one_for_pillow_too(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", picture())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.tif")), picture())


def test_files_that_are_cut_short_are_refused_at_once(tmp_path: Path) -> None:
    image = picture()
    np.save(tmp_path / "a.npy", image)
    Image.fromarray(image).save(tmp_path / "a.ppm")
    tiff(tmp_path / "a.tif", image)
    for name in ("a.npy", "a.ppm"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-100])
        with pytest.raises(SplitfxError, match="is cut short: 100 bytes of its 37 rows are missing"):
            RowSource(tmp_path / name)
    data = (tmp_path / "a.tif").read_bytes()
    for length in range(0, len(data) - 1, 7):
        (tmp_path / "a.tif").write_bytes(data[:length])
        with pytest.raises(SplitfxError):
            RowSource(tmp_path / "a.tif")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", picture())
    source = RowSource(tmp_path / "a.npy")
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-500])
    assert source.read(0, 5).shape == (1, 3, 5, 29)
    with pytest.raises(SplitfxError, match="promised rows"):
        source.read(30, 37)


def test_pictures_that_must_be_decoded_are_refused_with_a_way_out(tmp_path: Path) -> None:
    for suffix, options in (("png", {}), ("jpg", {}), ("tif", {"compression": "tiff_deflate"})):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture()).save(path, **options)
        with pytest.raises(UnsupportedError, match=r"RowSource\(strips, size=\(rows, columns\)\)"):
            RowSource(path)
    with pytest.raises(SplitfxError, match="cannot be read: No such file"):
        RowSource(tmp_path / "none.npy")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, "x"], [None, 2]], dtype=object), allow_pickle=True)
    with pytest.raises(UnsupportedError, match="its numbers are object"):
        RowSource(tmp_path / "a.npy")


def test_damaged_headers_never_pass_as_images(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", picture(8, 6), per=4)
    np.save(tmp_path / "a.npy", picture(8, 6))
    random = np.random.default_rng(0)
    for name in ("a.tif", "a.npy"):
        good = (tmp_path / name).read_bytes()
        for _ in range(600):
            bad = bytearray(good)
            for place in random.integers(0, len(bad), 3):
                bad[place] = random.integers(0, 256)
            (tmp_path / name).write_bytes(bytes(bad))
            try:
                source = RowSource(tmp_path / name)
            except SplitfxError:
                continue
            if np.prod(source.shape) < 1e6:
                source.whole()


# ---------------------------------------------------------------- strips


def strips(image: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    room = np.empty_like(image[:rows])
    for top in range(0, len(image), rows):
        part = room[: len(image) - top]
        part[:] = image[top : top + rows]  # the same memory again, as readers do
        yield part


@pytest.mark.parametrize("rows", [1, 2, 5, 37])
def test_strips_are_read_forward_and_forgotten(rows: int) -> None:
    image = picture()
    source = RowSource(strips(image, rows), size=(37, 29))
    raw: Any = source.raw
    for start in range(0, 37, 4):
        stop = min(37, start + 6)
        assert torch.equal(source.read(start, stop), wanted(image)[:, :, start:stop])
        raw.forget(start + 4)
        assert sum(t.shape[1] for t in raw.buffer) <= 2 + rows
    raw.finish()


@pytest.mark.parametrize(
    ("given", "size", "words"),
    [
        ([], (8, 6), "there is none, and 8 rows were promised"),
        ([picture(3, 6), picture(2, 6)], (8, 6), "ended after 5 of 8 promised rows"),
        ([picture(3, 6), picture(2, 7)], (8, 6), "the strip at row 3: has 3 channels and 7 columns"),
        ([picture(3, 6), picture(2, 6, 4)], (8, 6), "has 4 channels"),
        ([picture(3, 6), picture(2, 6).astype(np.float32)], (8, 6), "promised are 3 and 6 of uint8"),
        ([picture(3, 6), picture(6, 6)], (8, 6), "more rows came than the 8"),
        ([picture(8, 6), picture(1, 6)], (8, 6), "more rows came than the 8"),
        ([picture(3, 6), "row"], (8, 6), "is no array but str"),
    ],
)
def test_strips_that_break_their_promise_are_refused(given: list[Any], size: tuple[int, int], words: str) -> None:
    def read() -> None:
        source = RowSource(given, size=size)
        source.whole()
        source.raw.finish()

    with pytest.raises(SplitfxError, match=re.escape(words)):
        read()


# ---------------------------------------------------------------- streaming


class Net(nn.Module):
    """A trunk with a residual, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 7, 2, 3), nn.BatchNorm2d(6)
        self.block, self.down, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = F.relu(self.down(F.relu(self.block(x) + x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)).softmax(1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return (x * self.b(F.adaptive_avg_pool2d(x, 1)).sigmoid()).mean((2, 3))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def tiled(model: nn.Module, tile: Tile, size: int = 64) -> torch.fx.GraphModule:
    return splitfx.transform(model, tile, torch.zeros(1, 3, size, size))


def assert_streams(split: torch.fx.GraphModule, model: nn.Module, source: RowSource, image: np.ndarray) -> None:
    with torch.no_grad():
        oracle.assert_equal(stream(split, source), model(wanted(image)))


@pytest.mark.parametrize(
    "tile", [Tile(rows=4), Tile(rows=1), Tile(rows=16), Tile(rows=500), Tile(grid=(2, 3))], ids=repr
)
def test_streaming_is_the_model_at_any_size(net: nn.Module, tile: Tile) -> None:
    split = tiled(net, tile)
    for height, width in ((64, 64), (131, 77), (40, 190)):
        image = picture(height, width)
        assert_streams(split, net, RowSource(image), image)


@pytest.mark.parametrize("rows", [1, 3, 131])
def test_strips_stream_too_and_only_a_window_is_kept(net: nn.Module, rows: int) -> None:
    image, split = picture(131, 77), tiled(net, Tile(rows=4))
    source = RowSource(strips(image, rows), size=(131, 77))
    raw: Any = source.raw
    longest, forget = [0], raw.forget

    def watched(before: int) -> None:
        longest[0] = max(longest[0], sum(t.shape[1] for t in raw.buffer))
        forget(before)

    raw.forget = watched
    assert_streams(split, net, source, image)
    assert longest[0] <= 4 + 7 + rows


def test_a_file_streams_through_a_model_in_float64(net: nn.Module, tmp_path: Path) -> None:
    image, split = picture(75, 66), tiled(net, Tile(rows=4)).double()
    np.save(tmp_path / "a.npy", image)
    with torch.no_grad():
        x = RowSource(image, mean=MEAN, std=STD).whole(torch.float64)
        found = stream(split, RowSource(tmp_path / "a.npy", mean=MEAN, std=STD))
        assert error(found, net.double()(x)) <= STRICT


def test_a_reduction_that_is_applied_again_reads_the_image_twice() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    image, split = picture(50, 41), tiled(model, Tile(rows=4, recompute=0))
    assert_streams(split, model, RowSource(image), image)
    with pytest.raises(PlanError, match="reads the image more than once"):
        stream(split, RowSource(strips(image, 5), size=(50, 41)))


def test_columns_need_a_source_that_can_be_read_again(net: nn.Module) -> None:
    image, split = picture(80, 77), tiled(net, Tile(rows=4, grid=(1, 3)))
    assert_streams(split, net, RowSource(image), image)
    with pytest.raises(PlanError, match="reads the image more than once"):
        stream(split, RowSource(strips(image, 5), size=(80, 77)))


def test_memory_grows_with_the_width_and_not_with_the_height(net: nn.Module) -> None:
    from splitfx.analysis.live import LiveStorage

    split = tiled(net, Tile(rows=4, firing_intervals=(1, 1, 1)))
    peaks = {}
    for height, width in ((128, 64), (512, 64), (128, 256)):
        source = RowSource(picture(height, width))
        stream(split, source)
        with LiveStorage(state=[*split.parameters(), *split.buffers()]) as live:
            stream(split, source)
            peaks[height, width] = live.peak
    assert peaks[512, 64] < 1.1 * peaks[128, 64]
    assert peaks[128, 256] > 2 * peaks[128, 64]
    assert peaks[512, 64] < 0.25 * 512 * 64 * 3 * 4  # far below the image itself


# ---------------------------------------------------------------- sinks


def trunk(net: Any, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(F.relu(net.norm(net.stem(x))), 3, 2, 1)
    return F.relu(net.block(x) + x)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (2, 3)])
def test_rows_of_a_map_go_to_a_file(net: nn.Module, grid: tuple[int, int], tmp_path: Path) -> None:
    split, image = tiled(net, Tile(rows=4, grid=grid, until="relu_1")), picture(131, 77)
    found = stream(split, RowSource(image), tmp_path / "map.npy")
    assert found == tmp_path / "map.npy"
    with torch.no_grad():
        oracle.assert_equal(torch.from_numpy(np.load(found)), trunk(net, wanted(image)))
    assert [p.name for p in tmp_path.iterdir()] == ["map.npy"]
    with pytest.raises(SplitfxError, match="already exists"):
        stream(split, RowSource(image), tmp_path / "map.npy")
    stream(split, RowSource(picture(64, 64)), tmp_path / "map.npy", overwrite=True)
    assert np.load(found).shape == (1, 6, 16, 16)


def test_rows_of_a_map_go_to_a_function_in_order(net: nn.Module) -> None:
    split, image = tiled(net, Tile(rows=4, until="relu_1")), picture(131, 77)
    rows: list[tuple[int, torch.Tensor]] = []
    assert stream(split, RowSource(image), lambda row, piece: rows.append((row, piece))) is None
    assert len(rows) > 5
    starts = np.cumsum([0, *(p.shape[2] for _, p in rows)])
    assert [row for row, _ in rows] == starts[:-1].tolist()
    with torch.no_grad():
        oracle.assert_equal(torch.cat([p for _, p in rows], 2), trunk(net, wanted(image)))


def test_a_streamed_map_equals_the_model_on_crops_out_of_reach_of_their_borders(net: nn.Module, tmp_path: Path) -> None:
    split, image = tiled(net, Tile(rows=4, until="relu_1")), picture(400, 333)
    stream(split, RowSource(image), tmp_path / "map.npy")
    whole = torch.from_numpy(np.load(tmp_path / "map.npy", mmap_mode="r")[:, :, 40:52, 20:36].copy())
    reach = 4  # rows of the map: the trunk sees 7 + 2·2 + 4·2 = 19 pixels
    with torch.no_grad():
        crop = wanted(image)[:, :, 4 * (40 - reach) : 4 * (52 + reach), 4 * (20 - reach) : 4 * (36 + reach)]
        oracle.assert_equal(whole, trunk(net, crop)[:, :, reach:-reach, reach:-reach])


def test_an_output_that_was_not_finished_is_not_there(net: nn.Module, tmp_path: Path) -> None:
    split, image = tiled(net, Tile(rows=4, until="relu_1")), picture(131, 77)
    with pytest.raises(SplitfxError, match="ended after 90 of 131 promised rows"):
        stream(split, RowSource(strips(image[:90], 9), size=(131, 77)), tmp_path / "map.npy")
    with pytest.raises(SplitfxError, match="more rows came"):
        stream(split, RowSource(strips(image, 1), size=(100, 77)), tmp_path / "map.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tile", "sink", "words"),
    [
        (Tile(rows=4), "a.npy", "choose where it ends, as in Tile(until='layer4')"),
        (
            Tile(rows=4, until="relu_1"),
            "a.png",
            "a sink is a path ending in .npy or .tif or .tiff, an array, or a function",
        ),
        (Tile(rows=4, until="relu_1"), 5, "a sink is a path ending in .npy or .tif or .tiff, an array, or a function"),
        (Tile(rows=4, grid=(1, 2), until="relu_1"), print, "a function takes full rows"),
    ],
)
def test_sinks_that_cannot_be_are_refused(net: nn.Module, tile: Tile, sink: Any, words: str, tmp_path: Path) -> None:
    given = tmp_path / sink if isinstance(sink, str) else sink
    with pytest.raises(PlanError, match=re.escape(words)):
        stream(tiled(net, tile), RowSource(picture(64, 64)), given)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- refusals


def test_graphs_that_cannot_be_streamed_say_why(net: nn.Module) -> None:
    image = RowSource(picture(64, 64))
    with pytest.raises(PlanError, match="transform the model with Tile first"):
        stream(splitfx.trace(net, torch.zeros(1, 3, 64, 64)), image)
    with pytest.raises(PlanError, match="has 1 channels"):
        stream(tiled(net, Tile(rows=4)), RowSource(picture(64, 64, 1)))

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu().cumsum(2) + x

    with pytest.raises(PlanError, match="reads the whole image too, outside the tiled stage"):
        stream(tiled(Skip().eval(), Tile(rows=4)), image)
    split = tiled(net, Tile(rows=4))
    split.train()
    with pytest.raises(UnsupportedError, match=r"norm is in train mode.*model.eval\(\)"):
        stream(split, image)


def test_progress_says_how_far_and_how_long(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfx.ground import progress as module

    ticks = iter(range(0, 10**6, 3))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    said: list[str] = []
    stream(tiled(net, Tile(rows=4)), RowSource(picture(64, 64)), progress=said.append)
    assert re.fullmatch(r"streaming: \d+ % done, \d+:\d\d left", said[0])
    assert said[-1].endswith("0:00 left") or "100 %" in said[-1] or "9" in said[-1]


@pytest.mark.slow
def test_resnet18_streams_to_its_logits_and_to_a_map(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    image = picture(1024, 768)
    np.save(tmp_path / "image.npy", image)
    source = RowSource(np.load(tmp_path / "image.npy", mmap_mode="r", allow_pickle=False), mean=MEAN, std=STD)
    with torch.no_grad():
        logits = stream(tiled(model, Tile(rows=16), 128), source)
        oracle.assert_equal(logits, model(source.whole()))
        stream(tiled(model, Tile(rows=16, until="layer4.1.relu"), 128), source, tmp_path / "map.npy")
        deep = nn.Sequential(*list(model.children())[:-2])(source.whole())
        oracle.assert_equal(torch.from_numpy(np.load(tmp_path / "map.npy")), deep)


def test_the_example_streams_to_logits_and_to_a_file(tmp_path: Path) -> None:
    import importlib.util

    script = Path(__file__).parents[2] / "examples" / "04_stream_large_image.py"
    spec = importlib.util.spec_from_file_location("stream_large_image", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logits, path = module.main(tmp_path, 300)
    assert logits.shape == (1, 1000)
    assert np.load(path, mmap_mode="r").shape == (1, 512, 10, 10)
