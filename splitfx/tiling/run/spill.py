"""Spilled maps: where rows lie between the phase that makes them and the phases that read them.

``host``: pinned memory beside a GPU. ``disk``: a file without a name in the folder of temporary files (``TMPDIR``),
mapped into memory; its room is taken at once, so that a full disk is an error before a row is lost, and it is gone
with the map, also where the program is killed.

Refuses (`UnsupportedError`): "host" where the stage runs on the CPU; a folder that cannot be written, has no room, or
is itself held in memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod
from pathlib import Path

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
        self.kernel, self.device = kernel, device
        self._file: mmap.mmap | None = None
        shape, dtype = tuple(int(s) for s in like.shape), like.dtype
        if kernel.spilled == "disk":
            self._file = _mapped(prod(shape) * dtype.itemsize)
            self._rows = torch.frombuffer(self._file, dtype=dtype).reshape(shape)
        elif device.type == "cpu":
            raise UnsupportedError(
                "spill='host' moves maps from a GPU to the memory of the host; this stage runs on the CPU: use 'disk'"
            )
        else:
            self._rows = torch.empty(shape, dtype=dtype, pin_memory=True)

    def write(self, piece: torch.Tensor, rows: Interval, columns: Interval) -> None:
        self.kernel.cut(self._rows, rows, columns).copy_(piece, non_blocking=True)
        self._leave_memory()

    def read(self, rows: Interval | None, columns: Interval | None) -> torch.Tensor:
        """A piece, as a tensor of its own on the stage's device."""
        part = self.kernel.cut(self._rows, rows, columns)
        found = torch.empty(part.shape, dtype=part.dtype, device=self.device)
        found.copy_(part, non_blocking=True)
        self._leave_memory()
        return found

    def _leave_memory(self) -> None:
        """Pages that were touched stay in the system's cache of files, which gives way, not in this process."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


def _mapped(size: int) -> mmap.mmap:
    folder = Path(tempfile.gettempdir())
    kind = _kind(folder)
    if kind in IN_MEMORY:
        raise UnsupportedError(f"spill='disk': {folder} is held in memory ({kind}): set TMPDIR to a folder on a disk")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UnsupportedError(
            f"spill='disk' needs {words(size)} for a map in {folder}: {error.strerror}: set TMPDIR to another folder"
        ) from error


def _kind(folder: Path) -> str:
    """The kind of file system that a folder lies on; empty where the system does not say."""
    table = Path("/proc/self/mounts")
    if not table.exists():
        return ""
    mounts = [line.split()[1:3] for line in table.read_text().splitlines()]
    inside = [(len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(inside, default=(0, ""))[1]
