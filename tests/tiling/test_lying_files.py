"""Image files that lie or are none: one line, at once, nothing allocated, nothing run."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from splitfx.errors import SplitfxError, TrainingError
from splitfx.ground import limits
from splitfx.tiling.stream.sources import RowSource
from splitfx.train.data import _image


def npy(path: Path, shape: str, descr: str = "'|u1'", fortran: bool = False, body: bytes = b"\0" * 64) -> Path:
    head = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head.encode() + body)
    return path


LIES: dict[str, dict[str, Any]] = {
    "larger than the file": {"shape": "(1000000, 1000000, 3)"},
    "many channels": {"shape": "(1000000000000, 1, 1)"},
    "many channels of nothing": {"shape": "(1000000000000, 0, 5)"},
    "negative": {"shape": "(-4, 4, 3)"},
    "negative twice": {"shape": "(-4, -4, 3)"},
    "nothing": {"shape": "(0, 4, 3)"},
    "true": {"shape": "(True, 4, 3)"},
    "digits": {"shape": f"({'9' * 4500}, 4, 3)"},
    "a long integer": {"shape": f"({'9' * 900}, 4, 3)"},
    "objects": {"shape": "(4, 4, 3)", "descr": "'|O'"},
    "columns": {"shape": "(4, 4, 3)", "fortran": True},
    "records": {"shape": "(4, 4, 3)", "descr": "[('a', '<f4')]"},
    "subarrays": {"shape": "(4, 4, 3)", "descr": "('<f4', (100000, 100000))"},
    "wide texts": {"shape": "(4, 4, 3)", "descr": "'<U1000000000'"},
    "no type": {"shape": "(4, 4, 3)", "descr": "[[]]"},
    "a call": {"shape": "(4, 4, 3)", "descr": "__import__('os')"},
    "no shape": {"shape": "'abc'"},
    "deep": {"shape": "(" * 300 + ")" * 300},
}


@pytest.mark.parametrize("layout", [None, "HWC", "CHW"])
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, layout: Any, tmp_path: Path):
    path = npy(tmp_path / "a.npy", **LIES[lie])
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(SplitfxError) as caught:
        RowSource(path, layout=layout)
    assert time.process_time() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 64 * 1024  # KiB
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_sabotage_a_header_that_tells_the_truth_is_read(tmp_path: Path):
    source = RowSource(npy(tmp_path / "a.npy", "(4, 5, 3)"), scale=1.0, layout="HWC")
    assert torch.equal(source.whole(), torch.zeros(1, 3, 4, 5))


def test_a_file_that_is_gone_when_it_is_read(tmp_path: Path):
    path = npy(tmp_path / "a.npy", "(4, 5, 3)")
    source = RowSource(path, layout="HWC")
    path.unlink()
    with pytest.raises(SplitfxError, match="cannot be read: No such file"):
        source.read(0, 2)


def tag(number: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", number, kind, count, value)


@pytest.mark.parametrize(
    "tags",
    [
        [tag(256, 4, 1, 0xFFFFFFFF), tag(257, 4, 1, 0xFFFFFFFF)],
        [tag(256, 4, 0, 0)],
        [tag(273, 1, 0xFFFFFFFF, 8)],
        [tag(256, 3, 1, 4), tag(257, 3, 1, 4), tag(277, 3, 1, 65535), tag(284, 3, 1, 2)],
        [tag(258, 3, 9, 0xFFFFFFF0)],
        [tag(65000, 4, 0xFFFFFFF0, 8)],
    ],
)
def test_tiff_tags_that_lie(tags: list[bytes], tmp_path: Path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + b"\0" * 64)
    with pytest.raises(SplitfxError):
        RowSource(path)


# ---------------------------------------------------------------- decoded whole, for training


def test_only_decoders_of_plain_pictures_are_asked(tmp_path: Path):
    """EPS would be drawn by a program that is started for it, whatever the file's name."""
    mark = tmp_path / "ran"
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({mark}) (w) file closefile\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_text(eps)
    with pytest.raises(TrainingError, match="cannot be read as an image") as caught:
        _image(str(tmp_path / "a.png"))
    assert not mark.exists()
    assert "Ghostscript" not in str(caught.value)
    for suffix in ("pdf", "ico", "gif", "tga"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"b.{suffix}")
        (tmp_path / f"b.{suffix}").rename(tmp_path / "b.png")
        with pytest.raises(TrainingError, match="cannot be read as an image"):
            _image(str(tmp_path / "b.png"))


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (12_000, 12_000)])
def test_bombs_are_not_decoded(size: tuple[int, int], tmp_path: Path):
    Image.new("L", (8, 8)).save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[18:26] = struct.pack("<ii", *size)
    (tmp_path / "a.png").write_bytes(data)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TrainingError) as caught:
        _image(str(tmp_path / "a.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 64 * 1024
    assert "\n" not in str(caught.value)


def test_more_pixels_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(limits, "PIXELS", 399)
    with pytest.raises(TrainingError, match="has 20 x 20 pixels; an image has at most 399"):
        _image(str(tmp_path / "a.png"))


def test_deep_pictures_are_not_cut_off_at_white(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match="more than 8 bits"):
        _image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "CMYK"])
def test_palettes_and_other_modes_become_colours(mode: str, tmp_path: Path):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.new("RGB", (9, 8), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    found = _image(str(tmp_path / f"a.{suffix}"))
    assert (found.mode, found.size, found.getpixel((4, 4))) == ("RGB", (9, 8), (255, 255, 255))


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "bmp", "webp", "ppm"])
def test_damaged_pictures_are_one_line(suffix: str, tmp_path: Path):
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((16, 16), 50).convert("RGB").save(path)
    good = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good[: random.integers(1, len(good) + 1)])
        for _ in range(4):
            data[random.integers(0, len(data))] = random.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(TrainingError):  # any other error is a fault
            assert _image(str(path)).mode == "RGB"
