"""Image files that rows can be read of: .npy, PPM and PGM, uncompressed TIFF and BigTIFF in strips.

A file is known by its first bytes, not by its name. Only headers are read before the first row; every number in them
is checked against the length of the file, and nothing is unpickled.
"""

from __future__ import annotations

import math
import struct
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from splitfx.errors import SplitfxError, UnsupportedError
from splitfx.ground import limits
from splitfx.text import first_line, shown
from splitfx.tiling.stream.rows import Layout, Rows, checked, layout_of, sizes_of, tensor_of


@dataclass
class _File:
    """Rows of a file: every plane lies in blocks of ``per`` rows, at the given offsets. ``samples`` values a pixel."""

    path: Path
    planes: list[list[int]]
    per: int
    stored: np.dtype[Any]
    height: int
    width: int
    samples: int
    axes: tuple[int, ...] | None = None  # what a row is made of, where it is no line of pixels
    again: bool = True

    @property
    def rest(self) -> tuple[int, ...]:
        """The sizes of a row."""
        return (self.width,) if self.axes is None else self.axes

    def __post_init__(self) -> None:
        self.name = str(self.path)
        self.dtype = checked(self.stored, self.name)
        self.channels = len(self.planes) * self.samples
        self.row_bytes = self.width * self.samples * self.stored.itemsize
        if min(self.height, self.width, self.channels, self.per) < 1:
            raise SplitfxError(f"{self.name}: has no rows or columns")
        last = [(self.height - 1) // self.per, (self.height - 1) % self.per + 1]
        if any(len(blocks) <= last[0] for blocks in self.planes):
            raise SplitfxError(f"{self.name}: promises {self.height} rows and says only where some of them are")
        ends = [
            offset + self.row_bytes * (last[1] if i == last[0] else self.per)
            for blocks in self.planes
            for i, offset in enumerate(blocks[: last[0] + 1])
        ]
        missing = max(ends) - self.path.stat().st_size
        if missing > 0:
            raise SplitfxError(f"{self.name}: is cut short: {missing} bytes of its {self.height} rows are missing")

    def read(self, start: int, stop: int) -> torch.Tensor:
        try:
            with self.path.open("rb", buffering=0) as file:
                planes = [tensor_of(self._plane(file, blocks, start, stop)) for blocks in self.planes]
        except OSError as error:  # it was there when its header was read
            raise SplitfxError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        joined = torch.stack([x[:, :, 0] for x in planes]) if len(planes) > 1 else planes[0].permute(2, 0, 1)
        return joined.reshape(len(joined), stop - start, *self.rest)

    def _plane(self, file: Any, blocks: list[int], start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.width, self.samples), self.stored)
        row = start
        while row < stop:
            block, inside = divmod(row, self.per)
            count = min(self.per - inside, stop - row)
            file.seek(blocks[block] + inside * self.row_bytes)
            self._fill(file, out[row - start : row - start + count].data.cast("B"), row)
            row += count
        return out

    def _fill(self, file: Any, room: memoryview, row: int) -> None:
        while room:  # one call of the system may give less than asked
            count = file.readinto(room)
            if not count:
                raise SplitfxError(f"{self.name}: ended at row {row} of {self.height} promised rows")
            room = room[count:]

    def forget(self, before: int) -> None:
        """Nothing is kept."""

    def finish(self) -> None:
        """The header says how many rows there are."""


def file_rows(path: Path, layout: Layout | None) -> Rows:
    """The rows of a file, which is known by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(0)
            if head.startswith(b"\x93NUMPY"):
                return _npy(path, file, layout)
            if head[:2] in (b"P5", b"P6"):
                return _pnm(path, file)
            if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return _Tiff(path, file).rows()
    except OSError as error:
        raise SplitfxError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SplitfxError:
        raise
    except (ValueError, TypeError, LookupError, SyntaxError, tokenize.TokenError, struct.error, OverflowError) as error:
        # numpy reads its header as Python text, and fails in the ways of a parser
        raise SplitfxError(f"{path}: is damaged: {first_line(error)}") from error
    raise UnsupportedError(
        f"{path}: cannot be read row by row; .npy, PPM, PGM and uncompressed TIFF files in strips can. Convert it, "
        "or give the rows as strips: RowSource(strips, size=(rows, columns))"
    )


def _npy(path: Path, file: Any, layout: Layout | None) -> Rows:
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in header:
        raise UnsupportedError(f"{path}: is a .npy file of version {version}, which holds no plain numbers")
    shape, fortran, dtype = header[version](file)
    if fortran:
        raise UnsupportedError(f"{path}: lies column by column; save np.ascontiguousarray(array) instead")
    one = len(shape) == (len(layout) if layout is not None else 3) + 1 and shape[0] == 1  # a batch of one
    shape, offset = tuple(shape[1:] if one else shape), file.tell()
    found = layout_of(shape, layout, str(path))
    channels, height, rest = sizes_of(found, shape)
    _check_length(path, shape, checked(dtype, str(path)).itemsize, offset, height)
    if found[0] == "C":
        width = math.prod(rest)
        planes = [[offset + i * height * width * dtype.itemsize] for i in range(channels)]
        return _File(path, planes, height, dtype, height, width, 1, rest)
    return _File(path, [[offset]], shape[0], dtype, shape[0], shape[1], channels, rest)


def _check_length(path: Path, shape: tuple[int, ...], itemsize: int, offset: int, height: int) -> None:
    """A header may promise anything: nothing is made by its numbers that the file is too short for."""
    if any(isinstance(size, bool) or size < 1 for size in shape):
        raise SplitfxError(f"{path}: has no rows or columns")
    missing = math.prod(shape) * itemsize + offset - path.stat().st_size
    if missing > 0:
        raise SplitfxError(f"{path}: is cut short: {shown(missing)} bytes of its {shown(height)} rows are missing")


def _pnm(path: Path, file: Any) -> Rows:
    """PPM and PGM: three numbers as text, then rows."""
    kind, words = file.read(2), list[bytes]()
    word, byte = b"", file.read(1)
    while len(words) < 3:
        if byte == b"#":
            file.readline(4096)
        elif byte.isdigit():
            word += byte
        elif byte.isspace() or not byte:
            words += [word] if word else []
            word = b""
        if not byte or len(word) > 12 or not (byte.isdigit() or byte.isspace() or byte == b"#"):
            raise SplitfxError(f"{path}: its header is no PPM header")
        if len(words) < 3:
            byte = file.read(1)
    width, height, most = map(int, words)
    if most not in (255, 65535):
        raise UnsupportedError(f"{path}: white is {most}; convert it to 8 or 16 bits")
    dtype = np.dtype(np.uint8) if most == 255 else np.dtype(">u2")
    return _File(path, [[file.tell()]], max(1, height), dtype, height, width, 3 if kind == b"P6" else 1)


class _Tiff:
    """The first picture of a TIFF or BigTIFF file, uncompressed and in strips."""

    WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS = 256, 257, 258, 259, 262, 273
    SAMPLES, PER_STRIP, PLANAR, PREDICTOR, TILE_WIDTH, FORMAT = 277, 278, 284, 317, 322, 339
    READ = (256, 257, 258, 259, 262, 273, 277, 278, 284, 317, 322, 339)  # the tags above; no other is looked at
    SIZES: ClassVar[dict[int, str]] = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file, self.length = path, file, path.stat().st_size
        head = file.read(16)
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = 43 in head[2:4]
        where = struct.unpack_from(self.order + ("Q" if self.big else "I"), head, 8 if self.big else 4)[0]
        self.tags = self._directory(where)

    def _directory(self, where: int) -> dict[int, tuple[int, ...]]:
        self.file.seek(where)
        count = self._unpack("Q" if self.big else "H", self.file.read(8 if self.big else 2))[0]
        size = 20 if self.big else 12
        if count > 4096:
            raise SplitfxError(f"{self.path}: is damaged: {count} tags")
        entries = self.file.read(count * size)
        found = {}
        for i in range(count):
            tag, kind = self._unpack("HH", entries[i * size : i * size + 4])
            if kind in self.SIZES and tag in self.READ:
                found[tag] = self._values(kind, entries[i * size + 4 : (i + 1) * size])
        return found

    def _values(self, kind: int, entry: bytes) -> tuple[int, ...]:
        word = "Q" if self.big else "I"
        width = struct.calcsize(word)
        number = self._unpack(word, entry[:width])[0]
        size = number * struct.calcsize(self.SIZES[kind])
        if not 0 < number <= limits.TABLE or size > self.length:
            raise SplitfxError(f"{self.path}: is damaged: a tag has {number} numbers")
        data = entry[width : width + size]
        if size > width:
            self.file.seek(self._unpack(word, entry[width:])[0])
            data = self.file.read(size)
        return self._unpack(f"{number}{self.SIZES[kind]}", data)

    def _unpack(self, form: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(self.order + form, data)

    def rows(self) -> Rows:
        one = lambda tag, default: self.tags.get(tag, (default,))[0]  # noqa: E731
        samples, planar = one(self.SAMPLES, 1), one(self.PLANAR, 1) == 2
        why = [
            words
            for wrong, words in (
                (one(self.COMPRESSION, 1) != 1, "is compressed"),
                (self.TILE_WIDTH in self.tags, "lies in tiles"),
                (one(self.PREDICTOR, 1) != 1, "stores differences of pixels"),
                (one(self.PHOTOMETRIC, 1) not in (1, 2), "is neither black and white nor RGB"),
                (len(set(self.tags.get(self.BITS, (1,)))) != 1, "has channels of several number types"),
            )
            if wrong
        ]
        if why:
            raise UnsupportedError(
                f"{self.path}: {why[0]} and cannot be read row by row; save it as uncompressed TIFF in strips, "
                "or give the rows as strips: RowSource(strips, size=(rows, columns))"
            )
        height, width = one(self.HEIGHT, 0), one(self.WIDTH, 0)
        per = max(1, min(one(self.PER_STRIP, height), height))
        offsets, count = list(self.tags.get(self.OFFSETS, ())), -(-height // per)
        planes = [offsets[i * count : (i + 1) * count] for i in range(samples)] if planar else [offsets]
        return _File(self.path, planes, per, self._dtype(), height, width, 1 if planar else samples)

    def _dtype(self) -> np.dtype[Any]:
        bits, form = self.tags.get(self.BITS, (1,))[0], self.tags.get(self.FORMAT, (1,))[0]
        known = {(8, 1): "u1", (16, 1): "u2", (16, 3): "f2", (32, 3): "f4", (64, 3): "f8"}
        if (bits, form) not in known:
            raise UnsupportedError(f"{self.path}: its numbers have {bits} bits; convert them to 8 or 16 bits or floats")
        return np.dtype(self.order + known[bits, form])
