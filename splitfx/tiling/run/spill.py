"""Spilled maps: where rows lie between the phase that makes them and the phases that read them.

``host``: pinned memory beside a GPU. ``disk``: a file without a name in the folder of temporary files (``TMPDIR``). Its
room is taken at once, so that a full disk is an error before a row is lost, and it is gone with the map, also where the
program is killed. It is read and written, not mapped: pages that a process has mapped count as its memory.

Rows lie one behind the other, whatever the layout of the map, so each piece is one stretch of the file.

Refuses (`UnsupportedError`): "host" where the stage runs on the CPU; a folder that cannot be written, has no room, or
is itself held in memory.
"""

from __future__ import annotations

import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch

from splitfx.errors import UnsupportedError
from splitfx.ground.table import size as words
from splitfx.tiling.plan.instructions import Interval
from splitfx.tiling.stage.kernel import Kernel

IN_MEMORY = ("tmpfs", "ramfs")


class Spilled:
    """The rows of one map outside the memory of its device."""

    def __init__(self, kernel: Kernel, like: torch.Tensor, device: torch.device) -> None:
        """``like``: a tensor of the map's shape and type, without storage."""
        assert kernel.dims is not None
        self.kernel, self.axis, self.dtype, self.device = kernel, kernel.dims[0], like.dtype, device
        sizes = [int(s) for s in like.shape]
        self.row = [kernel.unit, *sizes[: self.axis], *sizes[self.axis + 1 :]]
        if kernel.spilled == "disk":
            self._file = _file(kernel.bytes)
        elif device.type == "cpu":
            raise UnsupportedError(
                "spill='host' moves maps from a GPU to the memory of the host; this stage runs on the CPU: use 'disk'"
            )
        else:
            self._rows = torch.empty([kernel.rows * prod(self.row)], dtype=self.dtype, pin_memory=True)

    def write(self, piece: torch.Tensor, rows: Interval) -> None:
        given = piece.movedim(self.axis, 0).to(self.dtype).contiguous().flatten()
        if self.kernel.spilled == "host":
            self._rows[slice(*self._stretch(rows))].copy_(given, non_blocking=True)
            return
        try:
            self._file.seek(rows[0] * self.kernel.row_bytes)
            self._file.write(_raw(given.cpu()))
        except OSError as error:
            raise UnsupportedError(_no_room(self.kernel.bytes, error)) from error

    def read(self, rows: Interval | None, columns: Interval | None) -> torch.Tensor:
        """A piece, as a tensor of its own on the stage's device."""
        rows = rows or (0, self.kernel.rows)
        if self.kernel.spilled == "host":
            found = self._rows[slice(*self._stretch(rows))].to(self.device, non_blocking=True)
        else:
            found = torch.empty([(rows[1] - rows[0]) * prod(self.row)], dtype=self.dtype)
            self._file.seek(rows[0] * self.kernel.row_bytes)
            if self._file.readinto(_raw(found)) != found.nbytes:
                raise UnsupportedError("spill='disk': the file of a map that waits was cut while it was in use")
            found = found.to(self.device)
        shape = [(rows[1] - rows[0]) * self.row[0], *self.row[1:]]
        piece = found.view(shape).movedim(0, self.axis)
        return (piece if columns is None else self.kernel.cut(piece, None, columns)).contiguous()

    def _stretch(self, rows: Interval) -> Interval:
        return rows[0] * prod(self.row), rows[1] * prod(self.row)


def _raw(numbers: torch.Tensor) -> Any:
    """The bytes of numbers that lie one behind the other, as a buffer."""
    return numbers.view(torch.uint8).numpy().data


def _file(size: int) -> Any:
    folder = Path(tempfile.gettempdir())
    kind = _kind(folder)
    if kind in IN_MEMORY:
        raise UnsupportedError(f"spill='disk': {folder} is held in memory ({kind}): set TMPDIR to a folder on a disk")
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as the map
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UnsupportedError(_no_room(size, error)) from error
    return file


def _no_room(size: int, error: OSError) -> str:
    folder = tempfile.gettempdir()
    return f"spill='disk' needs {words(size)} for a map in {folder}: {error.strerror}: set TMPDIR to another folder"


def _kind(folder: Path) -> str:
    """The kind of file system that a folder lies on; empty where the system does not say."""
    table = Path("/proc/self/mounts")
    if not table.exists():
        return ""
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    inside = [(len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(inside, default=(0, ""))[1]
