"""Line buffers: which rows of a value are there while a stage is scheduled, and in which registers."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfx.tiling.plan.instructions import Interval


@dataclass(slots=True)
class Chunk:
    """Rows [start, stop) of a value in a register; ``bytes`` is what its storage takes, 0 where it is not its own.

    ``whole``: the register has room for all rows of the value, as that of a source or of an output has; the rows that
    are read are counted from its first, not from ``start``.
    """

    start: int
    stop: int
    register: int
    bytes: int
    whole: bool = False

    def local(self, rows: Interval, most: int) -> Interval | None:
        """Rows as they are counted in the register; None for all of it. ``most``: the rows that the value has."""
        if self.whole:
            return None if rows == (0, most) else rows
        return None if rows == (self.start, self.stop) else (rows[0] - self.start, rows[1] - self.start)


@dataclass
class Buffer:
    """What is there of one value: chunks in order; ``done`` rows have been computed."""

    chunks: list[Chunk] = field(default_factory=list)
    done: int = 0
    waits: Buffer | None = None  # of the reader that is furthest behind, as it was when last looked at
    waits_done: int = 0
    needed: int = 0

    def within(self, rows: Interval) -> list[Chunk]:
        """The chunks that hold some of these rows."""
        return [c for c in self.chunks if c.stop > rows[0] and c.start < rows[1]]

    def keep(self, chunk: Chunk) -> None:
        """A piece more; the memory of an output holds its pieces one below the other, as one."""
        if chunk.whole:
            start = min([chunk.start, *(c.start for c in self.chunks)])
            self.chunks[:] = [Chunk(start, chunk.stop, chunk.register, 0, whole=True)]
        else:
            self.chunks.append(chunk)

    @property
    def complete(self) -> bool:
        """All rows lie in one place."""
        return bool(self.chunks) and self.chunks[0].whole

    def drop(self, register: int) -> None:
        """Its storage belongs to another value now."""
        self.chunks[:] = [c for c in self.chunks if c.register != register]

    def drop_before(self, row: int) -> list[int]:
        """Nobody reads the rows in front of this one again; the registers of the chunks that are gone."""
        gone = [c.register for c in self.chunks if c.stop <= row]
        self.chunks = [c for c in self.chunks if c.stop > row]
        return gone
