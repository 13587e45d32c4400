"""A file of a stream that goes on where it was stopped, by an error, a kill or a machine that went down.

While rows come, they lie in ``NAME.part``, and ``NAME.part.json`` says how many are there and what they are of. The
rest is made as a tile of its own over the rows that are missing: nothing but the file is kept from the run before.

Refuses: a part of another model, image or reduction; one that another process writes to. Promises: ``NAME`` is there
only when it is whole, and no row counts as there before it lies on the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from splitfx.errors import PlanError, SplitfxError
from splitfx.ground.files import check_target, refusals
from splitfx.ground.files.drafts import locked
from splitfx.ground.files.renames import put
from splitfx.ground.files.typed import Count, Text, read_typed
from splitfx.ground.table import dims

PAUSE = 1.0  # seconds between two notes of how many rows are there


class Told(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What rows are of: the ``model`` by the digest of its stage, the sizes of the ``image`` and of the ``map``, its
    number type, the reduction by its name and code, and the ``source`` by some of its rows and how they are scaled."""

    model: Text
    image: tuple[Count, ...]
    source: Text
    map: tuple[Count, ...]
    dtype: Text
    reduce: Text


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rows: Count
    told: Told


@dataclass
class Part:
    """An open ``.part`` file, in which ``rows`` rows are there from the run before."""

    file: Any
    record: Path
    told: Told
    rows: int = 0
    last: float = 0.0

    def reached(self, rows: int) -> None:
        """So many rows have been written: note it now and then."""
        self.rows = rows
        if time.monotonic() - self.last >= PAUSE:
            self.note()

    def note(self) -> None:
        os.fsync(self.file.fileno())  # rows first, then that they are there
        draft = self.record.with_name(f"{self.record.name}.new")
        draft.write_bytes(msgspec.json.encode(_Record(rows=self.rows, told=self.told)))
        os.replace(draft, self.record)
        self.last = time.monotonic()


@contextmanager
def going_on(path: str | os.PathLike[str], told: Told, overwrite: bool) -> Iterator[Part]:
    """The part of ``path``, new or as it was left. It gets the name when the block ends without an error, and is kept
    with one. Raises `PlanError` for a part of something else, `SplitfxError` for what the system refuses."""
    target = check_target(path, overwrite=overwrite, error=SplitfxError)
    part = target.with_name(f"{target.name}.part")
    record = part.with_name(f"{part.name}.json")
    with refusals(target, SplitfxError), os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0) as file:
        if not locked(file.fileno()):
            raise PlanError(f"{part} is being written by another process: wait for it, or choose another name")
        rows = _there(part, record, told)
        open_part = Part(file, record, told, rows)
        try:
            yield open_part
        except BaseException:
            open_part.note()
            raise
        if overwrite and target.exists():
            os.replace(part, target)
        else:
            put(part, target)
        record.unlink(missing_ok=True)


def _there(part: Path, record: Path, told: Told) -> int:
    """Rows that are there of what is asked for."""
    if not record.exists():
        if part.stat().st_size:
            raise PlanError(f"{part} is no part of a stream, or its {record.name} is gone: move it away first")
        return 0
    found = read_typed(record, _Record, PlanError, "it says how far the stream came", f"; remove it and {part.name}")
    for name, wanted in msgspec.structs.asdict(told).items():
        there = getattr(found.told, name)
        if there != wanted:
            is_, asked = (dims(one) if isinstance(one, tuple) else one for one in (there, wanted))
            raise PlanError(
                f"{part} holds {found.rows} rows of another stream: its {name} is {is_}, and {asked} is asked for; "
                f"remove {part.name} and {record.name}, or choose another name"
            )
    if found.rows > told.map[2] or not part.stat().st_size:
        raise PlanError(f"{record} says {found.rows} rows are there, which cannot be: remove it and {part.name}")
    return found.rows
