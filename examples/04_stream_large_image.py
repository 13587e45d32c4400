"""An image that does not fit into memory through a network: rows in, logits out; then rows in, rows out.

Here the image is a file of 8-bit pixels in which only the rows at hand are read. A tiled TIFF or a JPEG 2000 file
streams as well: read strips from it with the library of your choice and give them as they come,
``RowSource(strips, size=(rows, columns))``.
"""

from pathlib import Path

import numpy as np
import torch
import torchvision

import splitfx
from splitfx.passes import Tile
from splitfx.tiling.stream import stream
from splitfx.tiling.stream.sources import RowSource

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(path: Path, size: int) -> Path:
    """A large image, written strip by strip."""
    image = np.lib.format.open_memmap(path, "w+", np.uint8, (size, size, 3))
    random = np.random.default_rng(0)
    for top in range(0, size, 256):
        image[top : top + 256] = random.integers(0, 256, image[top : top + 256].shape)
    image.flush()
    return path


def main(out: Path = Path("demo-out"), size: int = 4096) -> tuple[torch.Tensor, Path]:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    source = RowSource(picture(out / "image.npy", size), mean=MEAN, std=STD)
    print(
        f"{source}: {size * size * 3 / 2**20:.0f} MiB on disk, {size * size * 12 / 2**20:.0f} MiB as numbers of a model"
    )

    # Traced at a small size; the schedule says how many rows go in at a time, at any size.
    example = torch.zeros(1, 3, 256, 256)
    logits = stream(splitfx.transform(model, Tile(rows=16), example), source)
    print(f"class {int(logits.argmax())}")

    features = splitfx.transform(model, Tile(rows=16, until="layer4.1.relu"), example)
    path = stream(features, source, out / "layer4.npy", overwrite=True)
    rows = np.load(path, mmap_mode="r")
    print(f"layer4 is in {path}: {rows.shape}")
    with torch.no_grad():
        pooled = model.fc(torch.from_numpy(rows.mean((2, 3), dtype=np.float64)).float())
    print(f"its mean through the classifier is off by {float((pooled - logits).abs().max()):.1e}")
    return logits, path


if __name__ == "__main__":
    main()
