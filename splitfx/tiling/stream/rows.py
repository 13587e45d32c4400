"""Rows: what an array, a file and a series of strips have in common, and the number types and layouts of images."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from splitfx.errors import PlanError, UnsupportedError
from splitfx.ground.table import dims

Layout = Literal["HWC", "CHW", "HW", "CDHW", "CL"]
LAYOUTS: tuple[Layout, ...] = ("HWC", "CHW", "HW", "CDHW", "CL")
LARGEST = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}  # what white is; floats are taken as they are
FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64))


class Rows(Protocol):
    """Where raw rows come from: ``height`` of them; ``rest`` are the sizes of a row, of an image one, its width.
    ``again``: any rows may be read at any time, not only forward."""

    channels: int
    height: int
    dtype: np.dtype[Any]
    again: bool
    name: str

    @property
    def rest(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as [channels, rows, *rest], in a memory of their own or not."""
        ...

    def forget(self, before: int) -> None:
        """Rows in front of this one are not read again."""
        ...

    def finish(self) -> None:
        """All rows have been read; raises where there are more than promised."""
        ...


@runtime_checkable
class Rectangular(Protocol):
    """An array of some library, in memory or not: numpy's, one of Zarr, of HDF5."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, place: Any, /) -> Any: ...


def tensor_of(part: Any) -> torch.Tensor:
    """A copy: the array may be read-only, in another byte order, or lie in a file."""
    wide = part.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(part, dtype=np.dtype(np.int32) if wide == np.uint16 else wide))


def _dtype_of(data: Rectangular, name: str) -> np.dtype[Any]:
    dtype = data.dtype
    if isinstance(dtype, torch.dtype):
        known = {torch.uint8: np.uint8, torch.float16: np.float16, torch.bfloat16: np.float32}
        known |= {torch.float32: np.float32, torch.float64: np.float64}
        return checked(np.dtype(known[dtype]) if dtype in known else dtype, name)
    return checked(dtype, name)


def checked(dtype: Any, name: str) -> np.dtype[Any]:
    plain = dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype
    if plain not in LARGEST and plain not in FLOATS:
        raise UnsupportedError(f"{name}: its numbers are {dtype}; convert them to uint8, uint16 or a float type first")
    return plain


def layout_of(shape: tuple[int, ...], given: Layout | None, name: str) -> Layout:
    """Where H, W and C are; raises `PlanError` where the shape leaves it open."""
    if given is not None:
        if len(given) != len(shape):
            raise PlanError(f"{name}: layout {given} does not fit its shape {dims(shape)}")
        return given
    if len(shape) == 2:
        return "HW"
    if len(shape) != 3:
        raise PlanError(f"{name}: its shape {dims(shape)} is no image; give [H, W, C], [C, H, W] or [H, W]")
    last, first = shape[2] <= 4 < shape[0], shape[0] <= 4 < shape[2]
    if last == first:
        raise PlanError(f"{name}: shape {dims(shape)} does not say where the channels are; give layout='HWC' or 'CHW'")
    return "HWC" if last else "CHW"


def sizes_of(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """(channels, rows, sizes of a row) of an array."""
    by_axis = dict(zip(layout, shape, strict=True))
    channels = by_axis.pop("C", 1)
    rows, *rest = by_axis.values()
    return channels, rows, tuple(rest)


# ---------------------------------------------------------------- strips as they come
