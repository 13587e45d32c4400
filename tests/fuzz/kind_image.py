"""Images, for rows and decoded whole: .npy, PPM, TIFF, PNG, JPEG, BMP, EPS under any name, with bytes changed."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from splitfx.tiling.stream.sources import RowSource
from splitfx.train.data import _image

SUFFIXES = ("npy", "png", "tif", "ppm", "jpg", "bmp", "eps")
LARGE = (0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
SAMPLE = 60


@functools.cache
def seeds() -> dict[str, bytes]:
    """A good file of each kind."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    found = {}
    for name, form in (
        ("png", "PNG"),
        ("tif", "TIFF"),
        ("ppm", "PPM"),
        ("jpg", "JPEG"),
        ("bmp", "BMP"),
        ("eps", "EPS"),
    ):
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, form)
        found[name] = held.getvalue()
    held = io.BytesIO()
    np.save(held, pixels)
    return {**found, "npy": held.getvalue()}


def prepare() -> None:
    seeds()


def draw(seed: int, folder: Path) -> str:
    random = Random(seed)
    data = bytearray(seeds()[random.choice(SUFFIXES)])
    for _ in range(random.randint(0, 5)):
        at = random.randrange(min(len(data), 200) if random.random() < 0.8 else len(data))
        how = random.randrange(4)
        if how == 0:
            data[at] = random.randrange(256)
        elif how == 1:
            number = random.choice(LARGE)
            data[at : at + 4] = number.to_bytes(8, random.choice(("little", "big")))[: random.choice((2, 4, 8))]
        elif how == 2:
            data = data[: max(at, 1)]
        else:
            data[at:at] = random.choice((b"9" * 12, b"(", b"-", b"\0" * 4, b"True, ", b"'|O'", b"II*\0"))
    path = folder / f"a.{random.choice(SUFFIXES)}"
    path.write_bytes(bytes(data))
    if random.random() < 0.5:
        assert _image(str(path)).mode == "RGB"
        return "decoded"
    source = RowSource(path, layout=random.choice((None, "HWC", "CHW", "HW")))
    assert source.read(0, 1).shape[2] == 1
    return "rows"
