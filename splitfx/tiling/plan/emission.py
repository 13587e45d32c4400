"""Emission: the instructions by which one piece of a value is made, from what lies in the line buffers of its operands.

Rows that later pieces read again stay in line buffers as copies: a line buffer never keeps a large storage alive. What
the instructions hold is counted by `registers`, what they cost by `meter`, while they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from splitfx.ir.ops import Spatial
from splitfx.tiling.plan.buffers import Buffer, Chunk
from splitfx.tiling.plan.instructions import (
    Finish,
    Instruction,
    Interval,
    Join,
    Open,
    Pads,
    Patch,
    Reduce,
    Run,
    Schedule,
    Store,
    Take,
)
from splitfx.tiling.plan.meter import CostMeter, Spent, moved, workspace_bytes
from splitfx.tiling.plan.registers import Registers
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind


class Emitter:
    """Makes the instructions of pieces; which pieces, and when, a scheduler says (`splitfx.tiling.plan.schedule`)."""

    def __init__(self, stage: Stage, schedule: Schedule, sources_counted: bool = True, first: int = 0) -> None:
        """``first``: the first row of the stage's results that is made."""
        self.stage, self.schedule, self.first = stage, schedule, first
        self.registers, self.cost = Registers(stage, sources_counted), CostMeter()
        self.spent: list[Spent] = []
        self.calls = 0
        self.buffers: dict[Kernel, Buffer] = {}
        self.wanted: list[dict[Kernel, Interval]] = [{}, {}]  # rows and columns of every kernel in the present tile
        self.totals: dict[Kernel, int] = {}  # what reductions have added up so far, which only they read
        self.takers = {k: set(k.takers) for k in stage.kernels if k.takers}

    def _start(self, kernel: Kernel) -> int:
        return self.wanted[0].get(kernel, (0, 0))[0]

    def _stop(self, kernel: Kernel) -> int:
        return self.wanted[0].get(kernel, (0, 0))[1]

    # ------------------------------------------------------------ one piece

    def _fire(self, kernel: Kernel, stop: int) -> Iterator[Instruction]:
        buffer = self.buffers[kernel]
        rows, columns = (buffer.done, stop), self.wanted[1].get(kernel, (0, kernel.sizes[1]))
        buffer.done = stop
        place = self._patched(kernel, rows)
        if place >= 0:
            yield from self._patch(kernel, rows, columns, place)
            return
        srcs: list[int] = []
        starts: list[Interval] = []
        pads: list[tuple[Pads, Pads]] = []
        owned: list[int] = []  # registers that nobody reads after this firing
        private: list[int] = []
        for operand, h, w in kernel.reads:
            first, last, above, below = h.need(*rows)
            left, right, before, after = w.need(*columns)
            held = self._columns(operand)
            cols = None if (left, right) == held else (left - held[0], right - held[0])
            register, own, made = yield from self._gather(kernel, operand, (first, last), cols)
            srcs.append(register)
            starts.append((first, left))
            pads.append(((above, below), (before, after)))
            if made:
                private.append(register)
            if made and own:
                yield from self._trim(operand)  # the piece is a copy: rows behind it can go before the kernel runs
            owned.append(register if own else -1)
        if kernel.kind is Kind.REDUCE:
            if kernel not in self.totals:
                self.totals[kernel] = self.registers.allocate(kernel.total_bytes, kernel)
            self.registers.touch(workspace_bytes(kernel, rows, columns, None) + kernel.total_bytes, kernel)
            yield Reduce(kernel, tuple(srcs))
            self.cost.count(kernel, rows, columns, 0)
        else:
            yield from self._run(kernel, rows, columns, srcs, starts, pads, owned, private)
        if private:
            yield self.registers.free(*private)
        for operand, _, _ in kernel.reads:
            yield from self._trim(operand)

    def _run(
        self, kernel: Kernel, rows: Interval, columns: Interval, srcs: list[int], starts: list[Interval],
        pads: list[tuple[Pads, Pads]], owned: list[int], private: list[int],
    ) -> Iterator[Instruction]:  # fmt: skip
        size = self._size(kernel, rows[1] - rows[0], columns)
        over = next((owned[p] for p in kernel.overwrites if self.registers.bytes_of(owned[p]) == size), -1)
        if over >= 0:
            register = self.registers.take_over(over)
            self._hand_over(kernel, over, private)
        else:
            self.registers.touch(workspace_bytes(kernel, rows, columns, pads[0] if pads else None) + size, kernel)
            register = self.registers.allocate(size, kernel)
        yield Run(register, kernel, tuple(srcs), tuple(starts), tuple(pads), rows, columns, over)
        yield from self._give(kernel, rows, columns, register, size)

    def _patched(self, kernel: Kernel, rows: Interval) -> int:
        """The operand that a sum or product of two maps may overwrite where the other lies in several chunks; else -1.
        Joining those first would take the room of a whole piece."""
        node = kernel.node  # addcdiv(x, x, y) reads two maps, but has three operands
        two = len(kernel.reads) == len(node.args) == 2 and kernel.spatial is Spatial.POINTWISE
        if not two or not kernel.overwrites or node.kwargs:
            return -1
        for place in kernel.overwrites:
            base, other = kernel.reads[place][0], kernel.reads[1 - place][0]
            if not (kernel.reads[0][1].identity and kernel.reads[1][1].identity) or base.home >= 0:
                continue
            chunks = self.buffers[base].within(rows)
            many = len(self.buffers[other].within(rows)) > 1
            exact = len(chunks) == 1 and (chunks[0].start, chunks[0].stop) == rows and chunks[0].bytes > 0
            same = self.wanted[1].get(base) == self.wanted[1].get(other) == self.wanted[1].get(kernel)
            if many and exact and same and base.row_bytes == kernel.row_bytes and self._needed_from(base) >= rows[1]:
                return place
        return -1

    def _patch(self, kernel: Kernel, rows: Interval, columns: Interval, place: int) -> Iterator[Instruction]:
        base, other = kernel.reads[place][0], kernel.reads[1 - place][0]
        chunk = next(c for c in self.buffers[base].chunks if c.start == rows[0])
        parts, views = [], []
        for held in self.buffers[other].within(rows):
            low, high = max(rows[0], held.start), min(rows[1], held.stop)
            local, register = held.local((low, high), other.rows), held.register
            if local is not None:
                register = self.registers.allocate(0, kernel)
                views.append(register)
                yield Take(register, held.register, other, local, None, False)
            parts.append((register, low - rows[0], high - low))
        register, size = self.registers.take_over(chunk.register), chunk.bytes
        self._hand_over(kernel, chunk.register, [])
        yield Patch(register, kernel, chunk.register, place, tuple(parts), rows, columns)
        if views:
            yield self.registers.free(*views)
        yield from self._give(kernel, rows, columns, register, size)
        yield from self._trim(other)

    def _give(
        self, kernel: Kernel, rows: Interval, columns: Interval, register: int, size: int
    ) -> Iterator[Instruction]:
        """A piece is there: to the memory of its whole value, to its readers, or nowhere."""
        self.cost.count(kernel, rows, columns, size)
        if kernel.home >= 0:
            memory = self.registers.output(kernel)
            if self.registers.open(kernel):
                yield Open(kernel.home, memory, kernel)
            if kernel.spilled:
                self.registers.touch(moved(kernel, rows, size), kernel)
                self.cost.spilled_bytes += size
            yield Store(kernel.home, memory, register, kernel, rows, columns)
            if not kernel.spilled:
                yield self.registers.free(register)
                self.buffers[kernel].keep(Chunk(rows[0], rows[1], memory, 0, whole=True))
                return
        if any(self._reads_now(user, kernel) for user, _, _ in kernel.users):
            self.buffers[kernel].keep(Chunk(rows[0], rows[1], register, size))
        else:
            yield self.registers.free(register)

    def _reads_now(self, user: Kernel, operand: Kernel) -> bool:
        """A reader takes pieces of a value as they are made; what was spilled is read back in later phases."""
        return not operand.spilled or user.phase == operand.phase or self.buffers[operand].complete

    def _hand_over(self, kernel: Kernel, register: int, private: list[int]) -> None:
        """A register's storage now belongs to the kernel's own value."""
        if register in private:
            private.remove(register)
        for operand, _, _ in kernel.reads:
            self.buffers[operand].drop(register)

    # ------------------------------------------------------------ line buffers

    def _gather(self, kernel: Kernel, operand: Kernel, rows: Interval, columns: Interval | None) -> Iterator[Any]:
        """(register, nobody else needs it, it is its own copy) with rows of ``operand``, joined where apart."""
        chunks = self.buffers[operand].within(rows) or self.buffers[operand].chunks[-1:]  # or only padding is read
        dense = kernel.dense
        if len(chunks) == 1:
            chunk = chunks[0]
            local, back = chunk.local(rows, operand.rows), bool(operand.spilled) and chunk.whole
            if local is None and columns is None and not back:
                dead = chunk.bytes > 0 and self._needed_from(operand) >= chunk.stop
                return chunk.register, dead, False
            copy = dense or back
            size = self._piece(operand, rows, columns) if copy else 0
            if back:
                every = self._piece(operand, rows, None)
                self.cost.spilled_bytes += every
                self.registers.touch(every + (size if columns is not None else moved(operand, rows, every)), kernel)
            register = self.registers.allocate(size, kernel)
            yield Take(register, chunk.register, operand, local, columns, copy)
            return register, copy, True
        parts: list[int] = []
        views: list[int] = []
        for chunk in chunks:
            local = chunk.local((max(rows[0], chunk.start), min(rows[1], chunk.stop)), operand.rows)
            if local is None and columns is None:
                parts.append(chunk.register)
                continue
            view = self.registers.allocate(0, kernel)
            yield Take(view, chunk.register, operand, local, columns, False)
            parts.append(view)
            views.append(view)
        register = self.registers.allocate(self._piece(operand, rows, columns), kernel)
        yield Join(register, tuple(parts), operand)
        if views:
            yield self.registers.free(*views)
        return register, True, True

    def _trim(self, operand: Kernel) -> Iterator[Instruction]:
        """Let go of rows that nobody reads again; what stays of a chunk is copied: no large storage lives on."""
        if operand.kind is Kind.SOURCE or operand.exit >= 0 or self.takers.get(operand):
            return
        if operand.kind is Kind.WHOLE and self.schedule.tiles != (1, 1):
            return  # the next tile reads it too
        buffer = self.buffers[operand]
        if not buffer.chunks:
            return
        keep = self._needed_from(operand)
        if gone := buffer.drop_before(keep):
            yield self.registers.free(*gone)
        if not buffer.chunks or buffer.chunks[0].whole:
            return
        chunk = buffer.chunks[0]
        waste = keep - chunk.start
        if waste * 4 >= chunk.stop - chunk.start and waste > 0:
            size = chunk.bytes // (chunk.stop - chunk.start) * (chunk.stop - keep)
            register = self.registers.allocate(size, operand)
            yield Take(register, chunk.register, operand, (waste, chunk.stop - chunk.start), None, True)
            yield self.registers.free(chunk.register)
            buffer.chunks[0] = Chunk(keep, chunk.stop, register, size)

    def _needed_from(self, operand: Kernel) -> int:
        """The first row of a value that some reader has still to read."""
        buffer = self.buffers[operand]
        if buffer.waits is not None and buffer.waits.done == buffer.waits_done:
            return buffer.needed  # readers only advance, so the one furthest behind still is
        first, waits = operand.rows, None
        for user, edge, _ in operand.users:
            if user not in self.wanted[0] or not self._reads_now(user, operand):
                continue
            reader = self.buffers[user]
            if reader.done < self._stop(user) and (row := edge.first(reader.done)) < first:
                first, waits = row, reader
        buffer.waits, buffer.needed = waits, first
        buffer.waits_done = waits.done if waits is not None else 0
        return first

    # ------------------------------------------------------------ whole values

    def _finish(self, kernel: Kernel) -> Iterator[Instruction]:
        """The value of a reduction, or of a kernel that runs once."""
        register = self._view(kernel)
        if register < 0:
            self.registers.touch(kernel.bytes + kernel.temporary_bytes, kernel)
            register = self.registers.allocate(kernel.bytes, kernel)
        yield Finish(register, kernel)
        if kernel in self.totals:
            self.registers.free(self.totals.pop(kernel))
        self.cost.once(kernel)
        self.registers.whole[kernel] = register
        if kernel.dims is not None and kernel.kind is Kind.WHOLE:
            self.buffers[kernel] = complete(kernel, register)
        if kernel.exit >= 0 and self.registers.claim(kernel):
            yield Store(kernel.exit, self.registers.output(kernel), register, kernel, (0, 0), (0, 0))
        elif kernel.exit < 0 and not kernel.takers and not kernel.users:
            yield self.registers.free(self.registers.whole.pop(kernel))

    def _view(self, kernel: Kernel) -> int:
        """A register for a value that lies in the memory of one that it takes; -1 for any other."""
        inside = kernel.lies_in
        if inside is None or kernel.exit >= 0:
            return -1
        return self.registers.share(self._place(inside))

    def _place(self, kernel: Kernel) -> int:
        """The register of a complete value."""
        return self.registers.whole[kernel] if kernel in self.registers.whole else self.registers.output(kernel)

    def _taken(self, kernel: Kernel) -> Iterator[Instruction]:
        """A kernel does not run again: let go of values that it was the last to take whole."""
        for operand in kernel.takes:
            waiting = self.takers[operand]
            waiting.discard(kernel)
            if waiting or operand.kind is Kind.SOURCE or operand.exit >= 0:
                continue
            if operand.dims is not None:
                yield from self._trim(operand)
            elif operand in self.registers.whole:
                yield self.registers.free(self.registers.whole.pop(operand))

    # ------------------------------------------------------------ sizes

    def _size(self, kernel: Kernel, rows: int, columns: Interval) -> int:
        size = kernel.row_bytes * rows
        return (
            size if columns[1] - columns[0] == kernel.sizes[1] else size * (columns[1] - columns[0]) // kernel.sizes[1]
        )

    def _piece(self, operand: Kernel, rows: Interval, columns: Interval | None) -> int:
        return self._size(operand, rows[1] - rows[0], self._columns(operand) if columns is None else columns)

    def _columns(self, operand: Kernel) -> Interval:
        """The columns that are there of a value."""
        every = (0, operand.sizes[1])
        return every if operand.complete or operand.home >= 0 else self.wanted[1].get(operand, every)


def complete(kernel: Kernel, register: int) -> Buffer:
    """A map that is there at once."""
    return Buffer([Chunk(0, kernel.rows, register, 0, whole=True)], kernel.rows)
