"""The instructions of one rank: those of a stage for its rows, and between two phases what crosses.

A rank's share is a tile whose halo, where a map is awaited, comes from other ranks in place of being computed. All that
crosses behind a phase, halos and totals of reductions, crosses at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from splitfx.parallel.shard.shares import Crossing, Shares
from splitfx.tiling.plan.buffers import Buffer, Chunk
from splitfx.tiling.plan.emission import complete
from splitfx.tiling.plan.instructions import Instruction, Interval, Join, Schedule, Store
from splitfx.tiling.plan.meter import CostMeter, Spent
from splitfx.tiling.plan.schedule import Scheduler
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows of a value in a register, that go to a rank or come from it."""

    peer: int
    register: int
    kernel: Kernel
    rows: Interval


@dataclass(frozen=True, slots=True)
class Cross:
    """Pieces go to other ranks and come from them, and the totals of reductions are merged with theirs."""

    sent: tuple[Parcel, ...]
    received: tuple[Parcel, ...]
    reduced: tuple[Kernel, ...]


class ShareScheduler(Scheduler):
    """Makes the instructions of one ``rank``. A result is stored as the rows that the rank owns, or whole."""

    def __init__(self, stage: Stage, schedule: Schedule, shares: Shares, rank: int) -> None:
        super().__init__(stage, schedule)
        self.shares, self.rank = shares, rank
        elsewhere = sum(k.bytes - self._rows_bytes(k, shares.own(k, rank)) for k in shares.given)
        self.registers.live -= elsewhere
        self.registers.peak = self.registers.live
        self.registers.mark()

    def instructions(self) -> Iterator[Instruction]:
        self.wanted = [self.shares.computed[self.rank], {}]
        self.buffers = {k: Buffer(done=self._start(k)) for k in self.stage.kernels}
        for kernel, register in self.registers.whole.items():
            if kernel in self.shares.given:
                low, high = self.shares.own(kernel, self.rank)
                self.buffers[kernel] = Buffer([Chunk(low, high, register, 0)] if high > low else [], high)
            elif kernel.dims is not None:
                self.buffers[kernel] = complete(kernel, register)
        for phase in range(-1, self.stage.phases):
            yield from self._phase(phase) if phase >= 0 else ()
            yield from self._exchange(phase)
            self.spent.append(Spent(self.registers.mark(), self.cost))
            self.calls += self.cost.calls
            self.cost = CostMeter()
        for kernel in dict.fromkeys(self.stage.exits):
            low, high = self.shares.own(kernel, self.rank)
            if kernel.kind is Kind.ROWS and high > low and kernel not in self.shares.kept:
                register, _, _ = yield from self._gather(kernel, kernel, (low, high), None)
                yield self._stored(kernel, register, (low, high))

    def _give(
        self, kernel: Kernel, rows: Interval, columns: Interval, register: int, size: int
    ) -> Iterator[Instruction]:
        self.cost.count(kernel, rows, columns, size)
        stays = kernel.exit >= 0 or bool(self.takers.get(kernel))  # nothing may be written over it
        if stays or any(user.phase > kernel.phase or user in self.wanted[0] for user, _, _ in kernel.users):
            self.buffers[kernel].keep(Chunk(rows[0], rows[1], register, 0 if stays else size))
        else:
            yield self.registers.free(register)

    # ------------------------------------------------------------ between two phases

    def _exchange(self, phase: int) -> Iterator[Instruction]:
        """What crosses behind a phase; then reductions and what runs once."""
        behind = [k for k in self.stage.kernels if k.phase == phase]
        values = [k for k in behind if self.shares.crosses(k)]
        crossings = [c for k in values for c in self.shares.crossings(k) if self.rank in (c.sender, c.receiver)]
        reduced = tuple(k for k in behind if k.kind is Kind.REDUCE)
        received: list[Parcel] = []
        if crossings or (reduced and self.shares.division.ranks > 1):
            received = yield from self._cross(crossings, reduced)
        for kernel in values:
            came = [parcel for parcel in received if parcel.kernel is kernel]
            if self.shares.is_whole(kernel):
                yield from self._whole(kernel, came)
            else:
                chunks = [
                    Chunk(one.rows[0], one.rows[1], one.register, self._rows_bytes(kernel, one.rows)) for one in came
                ]
                buffer = self.buffers[kernel]
                buffer.chunks = sorted((*buffer.chunks, *chunks), key=lambda chunk: chunk.start)
                yield from self._trim(kernel)
        yield from self._finish_phase(phase)

    def _cross(self, crossings: list[Crossing], reduced: tuple[Kernel, ...]) -> Iterator[Any]:
        sent: list[Parcel] = []
        received: list[Parcel] = []
        private: list[int] = []
        for one in crossings:
            if one.sender == self.rank:
                register, _, made = yield from self._gather(one.kernel, one.kernel, one.rows, None)
                sent.append(Parcel(one.receiver, register, one.kernel, one.rows))
                private += [register] if made else []
            else:
                register = self.registers.allocate(self._rows_bytes(one.kernel, one.rows), one.kernel)
                received.append(Parcel(one.sender, register, one.kernel, one.rows))
        packed = sum(self._rows_bytes(p.kernel, p.rows) for p in sent) + sum(2 * k.total_bytes for k in reduced)
        if crossings:
            self.registers.touch(packed, crossings[0].kernel)
        yield Cross(tuple(sent), tuple(received), reduced)
        if private:
            yield self.registers.free(*private)
        return received

    def _whole(self, kernel: Kernel, came: list[Parcel]) -> Iterator[Instruction]:
        """All rows of a value, in one register."""
        rows = self.shares.own(kernel, self.rank)
        parts = [(one.rows[0], one.register) for one in came]
        private = [one.register for one in came]
        own = -1
        if rows[1] > rows[0]:
            own, _, made = yield from self._gather(kernel, kernel, rows, None)
            parts.append((rows[0], own))
            private += [own] if made else []
        register = own
        if len(parts) > 1 or own < 0:
            register = self.registers.allocate(kernel.bytes, kernel)
            yield Join(register, tuple(part for _, part in sorted(parts)), kernel)
        held = [c.register for c in self.buffers[kernel].chunks if kernel.kind is not Kind.SOURCE]
        if gone := [r for r in dict.fromkeys((*private, *held)) if r != register]:
            yield self.registers.free(*gone)
        self.buffers[kernel] = complete(kernel, register)
        self.registers.whole[kernel] = register
        yield self._stored(kernel, register, (0, kernel.rows))

    def _stored(self, kernel: Kernel, register: int, rows: Interval) -> Store:
        return Store(kernel.exit, register, register, kernel, rows, (0, kernel.sizes[1]))

    def _rows_bytes(self, kernel: Kernel, rows: Interval) -> int:
        return kernel.row_bytes * (rows[1] - rows[0])
