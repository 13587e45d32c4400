"""Sinks: where the rows of a streamed map go, in what form, without the map ever being whole in memory.

Array files (.npy), pictures (.tif, of one, three or four channels), arrays (of Zarr, HDF5) and functions of the
caller's. What is written may be reduced first, strip by strip: the class of every place instead of its logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import CodeType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from splitfx.analysis.fingerprint import fingerprint
from splitfx.analysis.regions import MAPS
from splitfx.errors import PlanError, UnsupportedError
from splitfx.ground.digest import digest
from splitfx.ground.files import written_whole
from splitfx.ground.table import dims
from splitfx.ir.graph import layer
from splitfx.tiling.run.execution import Program
from splitfx.tiling.stage.kernel import Kernel
from splitfx.tiling.stream.resume import Part, Told, going_on
from splitfx.tiling.stream.rows import Rectangular
from splitfx.tiling.stream.sources import RowSource


@runtime_checkable
class Settable(Rectangular, Protocol):
    """An array that strips are written to, of numpy, Zarr, HDF5."""

    def __setitem__(self, place: Any, strip: Any, /) -> None: ...


Sink = str | os.PathLike[str] | Settable | Callable[[int, torch.Tensor], object]
Reduce = Literal["argmax"] | Callable[[torch.Tensor], torch.Tensor]

_NUMBERS: dict[torch.dtype, Any] = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
}
_PICTURES = (np.uint8, np.float32, np.int16, np.int32)  # number types of TIFF files that viewers know


class Writer(Protocol):
    """Takes strips from top to bottom; of a stage that runs in ``columns``, one column of strips after the other, else
    full rows (None). The first ``begun`` rows are there from a run before."""

    begun: int

    def write(self, rows: tuple[int, int], columns: tuple[int, int] | None, piece: torch.Tensor) -> None: ...


@contextmanager
def opened(
    sink: Sink | None, reduce: Reduce | None, program: Program, source: RowSource, overwrite: bool, resume: bool = False
) -> Iterator[Writer | None]:
    """What takes the rows of the one map that a stage gives of ``source``; None without a sink.

    Raises `PlanError` where the stage gives something else, or the sink is none; `UnsupportedError` for numbers that
    its file cannot hold.
    """
    if resume and not isinstance(sink, str | os.PathLike):
        raise PlanError("resume is for files, of which it can be seen how many rows are there: give a path as the sink")
    if sink is None:
        if reduce is not None:
            raise PlanError("reduce is for what goes to a sink: give sink='labels.npy', or a function")
        yield None
        return
    kernel = _the_map(program)
    change = _change(reduce)
    if isinstance(sink, Settable):
        yield _into_array(sink, program, kernel, change, source)
        return
    if callable(sink):
        if program.schedule.tiles[1] > 1:
            raise PlanError("a function takes full rows, and this stage runs in columns: give a path as the sink")
        yield _Handed(sink, change)
        return
    if not isinstance(sink, str | os.PathLike) or Path(sink).suffix not in _FILES:
        ends = " or ".join(_FILES)
        raise PlanError(f"a sink is a path ending in {ends}, an array, or a function of (row, tensor); got {sink!r}")
    shape, dtype = _form(program, kernel, change)
    if dtype not in _NUMBERS:
        raise UnsupportedError(f"a file cannot hold {dtype}: convert the model to float32, or give a function")
    made, numbers = _FILES[Path(sink).suffix], np.dtype(_NUMBERS[dtype])
    if resume:
        with going_on(sink, _told(program, source, shape, dtype, reduce), overwrite) as part:
            yield made(part.file, shape, numbers, kernel, change, part)
        return
    with written_whole(sink, overwrite=overwrite) as draft, draft.open("w+b", buffering=0) as file:
        yield made(file, shape, numbers, kernel, change)


def _told(
    program: Program, image: RowSource, shape: tuple[int, ...], dtype: torch.dtype, reduce: Reduce | None
) -> Told:
    """What the rows of a file are of."""
    if program.schedule.tiles != (1, 1):
        raise PlanError("resume needs full rows, and this stage runs in tiles: plan it with Tile(mode='stream')")
    stage, (source, *_) = program.stage, program.stage.sources
    return Told(
        model=fingerprint(stage.graph),
        image=tuple(int(s) for s in stage.values[source.node].shape),
        source=image.fingerprint(),
        map=shape,
        dtype=str(dtype),
        reduce=_named(reduce),
    )


def _named(reduce: Reduce | None) -> str:
    """A reduction by its name, and a function by its code as well: two lambdas have one name."""
    if reduce is None or isinstance(reduce, str):
        return reduce or "none"
    name, code = getattr(reduce, "__qualname__", type(reduce).__name__), getattr(reduce, "__code__", None)
    if code is None:
        return name
    numbers = [one for one in code.co_consts if not isinstance(one, CodeType)]
    return f"{name} {digest({}, repr((code.co_code, code.co_names, numbers)))}"


def _the_map(program: Program) -> Kernel:
    exits = program.stage.exits
    maps = len(exits) == 1 and exits[0].dims is not None and exits[0].dims[0] == 2
    if not maps:
        given = ", ".join(layer(k.node) for k in exits)
        raise PlanError(
            f"a sink takes one map, and the tiled stage gives {given}: choose where it ends, as in Tile(until='layer4')"
        )
    if program.schedule.tiles[1] > 1 and exits[0].dims != MAPS.get(len(program.stage.values[exits[0].node].shape)):
        raise PlanError(f"{layer(exits[0].node)} has its columns elsewhere than behind its rows: use rows=, not grid=")
    if exits[0].users or exits[0].takers:
        raise PlanError(f"{layer(exits[0].node)} is read again inside the stage, so a sink cannot take it away")
    return exits[0]


def _change(reduce: Reduce | None) -> Callable[[torch.Tensor], torch.Tensor]:
    if reduce is None:
        return lambda strip: strip
    if reduce == "argmax":
        return _largest
    if not callable(reduce):
        raise PlanError(f"reduce is 'argmax' or a function of a tensor [1, C, rows, ...]; got {reduce!r}")
    return reduce


def _largest(strip: torch.Tensor) -> torch.Tensor:
    """The channel with the largest value, [1, 1, rows, ...], in the smallest type that holds its number."""
    count = strip.shape[1]
    dtype = torch.uint8 if count <= 2**8 else torch.int16 if count <= 2**15 else torch.int32
    return strip.argmax(1, keepdim=True).to(dtype)


def _form(
    program: Program, kernel: Kernel, change: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[int, ...], torch.dtype]:
    """Sizes and type of what is written, found on a row of zeros."""
    value = program.stage.values[kernel.node]
    shape = tuple(int(s) for s in value.shape)
    row = torch.zeros((*shape[:2], kernel.unit, *shape[3:]), dtype=value.dtype)
    try:
        found = change(row)
    except Exception as error:  # the caller's own function: whatever it raises is said in one line
        raise PlanError(
            f"reduce fails on a row of zeros, {dims(row.shape)}: {type(error).__name__}: {error}"
        ) from error
    kept = isinstance(found, torch.Tensor) and found.dim() == row.dim() and found.shape[2:] == row.shape[2:]
    if not kept or found.shape[0] != 1:
        got = dims(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise PlanError(f"reduce has to keep rows and columns: of {dims(row.shape)} it made {got}")
    return (1, int(found.shape[1]), *shape[2:]), found.dtype


@dataclass
class _Handed:
    """Rows for a function of the caller's."""

    function: Callable[[int, torch.Tensor], object]
    change: Callable[[torch.Tensor], torch.Tensor]
    begun: int = 0

    def write(self, rows: tuple[int, int], columns: tuple[int, int] | None, piece: torch.Tensor) -> None:
        found = self.change(piece)
        self.function(rows[0], found.clone() if found is piece else found)  # the memory of the piece is used again


def _into_array(
    array: Settable, program: Program, kernel: Kernel, change: Callable[[torch.Tensor], torch.Tensor], source: RowSource
) -> _Array:
    """Raises `PlanError` for an array that cannot hold the map."""
    shape, dtype = _form(program, kernel, change)
    if tuple(array.shape) not in (shape, shape[1:]):
        raise PlanError(f"the map is {dims(shape)}, and the array that is given for it {dims(array.shape)}")
    held = _NUMBERS.get(array.dtype) if isinstance(array.dtype, torch.dtype) else np.dtype(array.dtype)
    if dtype not in _NUMBERS or held is None or not np.can_cast(_NUMBERS[dtype], held):
        raise PlanError(f"the map's numbers are {dtype}, which an array of {array.dtype} cannot hold")
    if source.lies_in(array):
        raise PlanError("the sink is the image itself, whose rows are read again after they were written: give another")
    return _Array(array, len(array.shape) == len(shape), kernel.unit, change)


@dataclass
class _Array:
    """Rows into an array of the caller's, as they come."""

    array: Any
    batched: bool
    unit: int
    change: Callable[[torch.Tensor], torch.Tensor]
    begun: int = 0

    def write(self, rows: tuple[int, int], columns: tuple[int, int] | None, piece: torch.Tensor) -> None:
        found = self.change(piece)[0].cpu()
        place = (slice(None), slice(rows[0] * self.unit, rows[1] * self.unit))
        if columns is not None:
            place += (slice(*columns),)
        strip: Any = found if isinstance(self.array, torch.Tensor) else found.numpy()
        self.array[(0, *place) if self.batched else place] = strip


class _File:
    """Rows into a file that is written and not mapped, so that its pages do not count as memory of the process.

    A map [1, C, R, *rest] of which ``columns`` are cut along the first axis of the rest.
    """

    def __init__(
        self, file: Any, shape: tuple[int, ...], dtype: np.dtype[Any], kernel: Kernel,
        change: Callable[[torch.Tensor], torch.Tensor], part: Part | None = None,
    ) -> None:  # fmt: skip
        self.part, self.begun = part, part.rows if part is not None else 0
        self.file, self.shape, self.dtype, self.change = file, shape, dtype, change
        self.unit = kernel.unit  # places of the third axis that are one row
        self.offset = self.head()
        size = self.offset + prod(shape) * dtype.itemsize
        if part is not None and self.begun and os.fstat(file.fileno()).st_size != size:
            raise PlanError(f"{part.record.stem} was cut off: remove it and {part.record.name}")
        file.truncate(size)

    def head(self) -> int:
        """Write what stands in front of the numbers; gives where they begin."""
        raise NotImplementedError

    def write(self, rows: tuple[int, int], columns: tuple[int, int] | None, piece: torch.Tensor) -> None:
        found = self.change(piece)[0].cpu().contiguous().numpy().astype(self.dtype, copy=False)
        self.put(rows[0] * self.unit, columns[0] if columns is not None else 0, columns is None, found)
        if self.part is not None:
            self.part.reached(rows[1])

    def put(self, row: int, column: int, full: bool, found: np.ndarray) -> None:
        raise NotImplementedError

    def at(self, place: int, data: np.ndarray) -> None:
        self.file.seek(self.offset + place * self.dtype.itemsize)
        left = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        while left:  # one call of the system may take less than given
            left = left[self.file.write(left) :]


class _Npy(_File):
    """An array file of the map's shape."""

    def head(self) -> int:
        described = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": described, "fortran_order": False, "shape": self.shape}
        )
        return self.file.tell()

    def put(self, row: int, column: int, full: bool, found: np.ndarray) -> None:
        across, deep = prod(self.shape[3:]), prod(self.shape[4:])
        for channel, plane in enumerate(found):
            for first, block in [(row, plane)] if full else enumerate(plane, row):
                self.at((channel * self.shape[2] + first) * across + column * deep, block)


class _Tiff(_File):
    """An uncompressed picture, [H, W, C]: the numbers of a place lie behind one another."""

    def head(self) -> int:
        pictures = len(self.shape) == 4 and self.shape[1] in (1, 3, 4) and self.dtype in map(np.dtype, _PICTURES)
        if not pictures:
            raise UnsupportedError(
                f"a .tif picture has 1, 3 or 4 channels of 8, 16 or 32 bit; this map is {dims(self.shape)} of "
                f"{self.dtype}: use reduce='argmax', or a .npy file"
            )
        try:
            import tifffile
        except ImportError as error:
            raise UnsupportedError("a .tif sink needs tifffile: pip install 'splitfx[tiff]'") from error
        _, channels, height, width = self.shape
        shape = (height, width, channels) if channels > 1 else (height, width)
        kind = "rgb" if channels > 1 and self.dtype == np.uint8 else "minisblack"
        planes = "contig" if channels > 1 else None
        placed = tifffile.imwrite(
            self.file,
            shape=shape,
            dtype=self.dtype,
            photometric=kind,
            metadata=None,
            returnoffset=True,
            planarconfig=planes,
        )
        assert placed is not None
        return placed[0]

    def put(self, row: int, column: int, full: bool, found: np.ndarray) -> None:
        channels, width = self.shape[1], self.shape[3]
        pixels = found.transpose(1, 2, 0)
        for first, block in [(row, pixels)] if full else enumerate(pixels, row):
            self.at((first * width + column) * channels, block)


_FILES: dict[str, type[_File]] = {".npy": _Npy, ".tif": _Tiff, ".tiff": _Tiff}
