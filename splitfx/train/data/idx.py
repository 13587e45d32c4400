"""The idx files of MNIST and its like, plain or gzipped: a header of big-endian numbers, then one byte per value.

torchvision's reader takes whatever length a file has, and unpacks a gzipped one whole before it looks at it. This one
reads no more than the header says, and refuses (`TrainingError`) a header that is none, a file that is cut off and one
that goes on.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from splitfx.errors import TrainingError
from splitfx.ground import limits

BYTES = 8  # the code of unsigned bytes in an idx header


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The array of ``dims`` dimensions in a file, uint8. Raises `TrainingError`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            sizes = _sizes(path, head, dims)
            body = file.read(math.prod(sizes) + 1)  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error) as error:
        raise TrainingError(f"{path} cannot be read, it is damaged or cut off: {error}") from None
    if len(body) != math.prod(sizes):
        more = "more than" if len(body) > math.prod(sizes) else f"{len(body)} of"
        raise TrainingError(f"{path} has {more} the {math.prod(sizes)} bytes that its header says: damaged or cut off")
    return np.frombuffer(body, np.uint8).reshape(sizes).copy()


def _sizes(path: Path, head: bytes, dims: int) -> tuple[int, ...]:
    if len(head) < 4 + 4 * dims or head[:4] != bytes((0, 0, BYTES, dims)):
        raise TrainingError(
            f"{path} is no idx file of {dims} dimensions: it starts with {head[:4].hex(' ') or 'nothing'}"
        )
    sizes = tuple(int.from_bytes(head[at : at + 4]) for at in range(4, len(head), 4))
    limits.check_shape(sizes, TrainingError, f"{path}: the array")
    limits.check_memory(math.prod(sizes), TrainingError, f"{path}: the array")
    return sizes
