"""Row sources: an image that need not fit into memory, handed out row by row as the model wants it.

Reads: arrays (numpy, memory maps, torch, and those of Zarr or HDF5, of which no more than the rows asked for is read),
files by windows (.npy, PPM and PGM, uncompressed TIFF in strips; BigTIFF too), and any iterable of row strips.
Refuses: compressed pictures (PNG, JPEG, compressed or tiled TIFF), which no part can be read of without decoding the
rest; number types other than 8 and 16 bit unsigned integers and floats.
Promises: only the rows asked for are read, and an image with fewer rows than it promises is an error.

Files are read, never mapped, so that their pages do not count as memory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitfx.errors import PlanError, SplitfxError
from splitfx.ground.digest import digest
from splitfx.ground.table import dims
from splitfx.tiling.stream.image_files import file_rows
from splitfx.tiling.stream.rows import (
    LARGEST,
    LAYOUTS,
    Layout,
    Rectangular,
    Rows,
    _dtype_of,
    layout_of,
    sizes_of,
    tensor_of,
)


class RowSource:
    """An image as rows, a volume as slices, or audio as samples, in the numbers that a model was trained on.

    ``data``: an array [H, W, C], [C, H, W] or [H, W] (numpy, memory map, torch), or with that ``layout`` [C, D, H, W]
    or [C, L]; a path; or an iterable of such strips from first to last, for which ``size`` = (H, W), (D, H, W) or (L,)
    says what is promised. Values are multiplied by ``scale`` (left out:
    8 and 16 bit integers become 0 to 1, floats stay), then ``mean`` is taken away and ``std`` divides, per channel.
    ``layout`` says where the channels are; left out, the axis of at most 4 values is taken.
    """

    def __init__(
        self,
        data: Any,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        scale: float | None = None,
        layout: Layout | None = None,
        size: tuple[int, ...] | None = None,
    ) -> None:
        if layout is not None and layout not in LAYOUTS:
            raise PlanError(f"a layout is one of {', '.join(LAYOUTS)}; got {layout!r}")
        self.raw = _rows(data, layout, size)
        self.mean, self.std, self.scale = mean, std, scale
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != self.raw.channels:
                raise PlanError(f"{self.raw.name}: {name} has {len(values)} values for {self.raw.channels} channels")
        if std is not None and min(std) <= 0:
            raise PlanError(f"{self.raw.name}: every std must be more than 0; got {list(std)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, rows, and the sizes of a row: of an image its columns)."""
        return self.raw.channels, self.raw.height, *self.raw.rest

    def __repr__(self) -> str:
        return f"RowSource({self.raw.name}, {dims(self.shape)} {self.raw.dtype})"

    def read(
        self,
        start: int,
        stop: int,
        columns: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Rows [start, stop) as a batch of one, [1, C, rows, columns, ...], normalised."""
        raw = self.raw.read(start, stop)
        if columns is not None:
            raw = raw[:, :, columns[0] : columns[1]]
        raw = raw.to(device)
        x = torch.empty((1, *raw.shape), dtype=dtype, device=device)
        x[0].copy_(raw)
        if self.scale is not None:
            x.mul_(self.scale)
        elif self.raw.dtype in LARGEST:
            x.div_(LARGEST[self.raw.dtype])  # a product with 1/255 rounds otherwise than torchvision does
        for values, change in ((self.mean, x.sub_), (self.std, x.div_)):
            if values is not None:
                change(torch.tensor(values, dtype=dtype, device=device).reshape(-1, *[1] * (x.dim() - 2)))
        return x

    def fingerprint(self) -> str:
        """A few letters of how it is normalised and of some of its rows: the first, and where any may be read at any
        time one in the middle and the last."""
        rows = (0, self.raw.height // 2, self.raw.height - 1) if self.raw.again else (0,)
        held = {str(row): self.raw.read(row, row + 1) for row in rows}
        scaled = [None if values is None else [float(v) for v in values] for values in (self.mean, self.std)]
        return digest(held, f"{scaled} {self.scale}")

    def lies_in(self, array: Any) -> bool:
        """The numbers are those of this array, or some of them."""
        held: Any = getattr(self.raw, "data", None)
        both: list[Any] = [one.detach().numpy() if _on_cpu(one) else one for one in (held, array)]
        if not all(isinstance(one, np.ndarray) for one in both):
            return held is array
        try:
            return np.shares_memory(*both, max_work=10**6)  # type: ignore[arg-type]  # numpy knows two of its numbers
        except np.exceptions.TooHardError:
            return True

    def whole(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
        """The whole image as one tensor, for a comparison with the model itself."""
        return self.read(0, self.raw.height, None, dtype, device)


def _on_cpu(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.device.type == "cpu" and array.dtype is not torch.bfloat16


def _rows(data: Any, layout: Layout | None, size: tuple[int, ...] | None) -> Rows:
    if isinstance(data, str | os.PathLike):
        if size is not None:
            raise PlanError(f"{data}: size is for strips; a file says its own")
        return file_rows(Path(data), layout)
    if isinstance(data, Rectangular):
        if size is not None:
            raise PlanError("size is for strips; an array has its own")
        return _Array(data, layout)
    if isinstance(data, Iterable):
        return _Strips(data, layout, size)
    raise PlanError(f"an image is an array, a path or an iterable of row strips, not {type(data).__name__}")


# ---------------------------------------------------------------- arrays


class _Array:
    again = True

    def __init__(self, data: Rectangular, layout: Layout | None, name: str = "the image") -> None:
        self.batched = len(data.shape) == (len(layout) if layout is not None else 3) + 1 and data.shape[0] == 1
        self.name, self.dtype = name, _dtype_of(data, name)
        self.layout: Layout | None = layout_of(tuple(data.shape[self.batched :]), layout, name)
        self.data = data
        shape = tuple(int(s) for s in data.shape[self.batched :])
        self.channels, self.height, self.rest = sizes_of(self.layout, shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        first = self.layout is not None and self.layout[0] == "C"
        place = (slice(None), slice(start, stop)) if first else (slice(start, stop),)
        part = self.data[(0, *place) if self.batched else place]
        x = part.detach() if isinstance(part, torch.Tensor) else tensor_of(part)
        if self.layout == "HW":
            return x[None]
        return x.permute(2, 0, 1) if self.layout == "HWC" else x

    def forget(self, before: int) -> None:
        """The array is the caller's."""

    def finish(self) -> None:
        """An array has the rows that its shape says."""


class _Strips:
    """Rows from an iterable, forward only; those that may be read again wait in a buffer."""

    again = False

    def __init__(self, strips: Iterable[Any], layout: Layout | None, size: tuple[int, ...] | None) -> None:
        self.name = "the strips"
        axes = len(layout.replace("C", "")) if layout is not None else 2
        if size is None or len(size) != axes or min(size) < 1:
            wanted = {1: "(samples,)", 2: "(rows, columns)", 3: "(slices, rows, columns)"}[axes]
            raise PlanError(f"strips do not say how many rows will come: give RowSource(strips, size={wanted})")
        self.height, self.rest = size[0], tuple(size[1:])
        self.layout: Layout | None = layout
        self.strips: Iterator[Any] = iter(strips)
        self.buffer: list[torch.Tensor] = []
        self.first = self.there = 0  # rows [first, there) are in the buffer
        opening = self._next()
        if opening is None:
            raise SplitfxError(f"{self.name}: there is none, and {self.height} rows were promised")
        self.channels, self.dtype = opening.channels, opening.dtype
        self._keep(opening)

    def _next(self) -> _Array | None:
        strip = next(self.strips, None)
        if strip is None:
            return None
        name = f"the strip at row {self.there}"
        if not isinstance(strip, np.ndarray | torch.Tensor):
            raise PlanError(f"{name}: is no array but {type(strip).__name__}")
        # The first strip decides it, and the promised width helps: a strip of 3 rows could be read either way.
        self.layout = self.layout or self._by_width(tuple(strip.shape)) or layout_of(tuple(strip.shape), None, name)
        return _Array(strip, self.layout, name)

    def _by_width(self, shape: tuple[int, ...]) -> Layout | None:
        if len(shape) != 3:
            return None
        width = self.rest[0]
        last, first = shape[1] == width and shape[2] <= 4, shape[2] == width and shape[0] <= 4
        return None if last == first else "HWC" if last else "CHW"

    def _keep(self, strip: _Array) -> None:
        if (strip.channels, strip.rest, strip.dtype) != (self.channels, self.rest, self.dtype):
            there, wanted = (dims(rest) if rest else "1" for rest in (strip.rest, self.rest))
            raise PlanError(
                f"{strip.name}: has {strip.channels} channels and {there} columns of {strip.dtype}; "
                f"promised are {self.channels} and {wanted} of {self.dtype}"
            )
        if self.there + strip.height > self.height:
            raise SplitfxError(
                f"{self.name}: more rows came than the {self.height} that were promised; give size=(rows, columns)"
            )
        self.buffer.append(strip.read(0, strip.height).clone())  # the caller may fill the same array again
        self.there += strip.height

    def read(self, start: int, stop: int) -> torch.Tensor:
        assert start >= self.first, f"row {start} has been forgotten"
        while self.there < stop:
            self._more()
        return self._joined().narrow(1, start - self.first, stop - start)

    def _more(self) -> None:
        strip = self._next()
        if strip is None:
            raise SplitfxError(f"{self.name}: ended after {self.there} of {self.height} promised rows")
        self._keep(strip)

    def _joined(self) -> torch.Tensor:
        if len(self.buffer) > 1:
            self.buffer = [torch.cat(self.buffer, 1)]
        return self.buffer[0]

    def forget(self, before: int) -> None:
        before = min(before, self.height)
        while self.there < before:  # rows that nobody reads
            self.buffer, self.first = [], self.there
            self._more()
        if before > self.first:
            self.buffer = [self._joined()[:, before - self.first :].clone()]
            self.first = before

    def finish(self) -> None:
        if self.there < self.height:
            self.read(self.height - 1, self.height)
        if next(self.strips, None) is not None:
            raise SplitfxError(f"{self.name}: more rows came than the {self.height} that were promised")
