"""Schedule: the order in which the pieces of a stage are computed, as a list of instructions, and what it holds.

*Push, not pull*: a strip of ``rows`` input rows goes in at every step, and each group of kernels computes what it can
of it. A group fires at every ``every[group]``-th step, so that deep kernels work on pieces large enough to run at full
speed. Within a group, first forward (which rows of the group's results can be made), then backward (which rows of
each kernel these need), so nothing is computed before it is needed. Rows that later pieces read again stay in line
buffers as copies: a line buffer never keeps a large storage alive.

``tiles`` cuts what the stage gives into a grid of R x C pieces. Each piece is a run of its own over the rows and
columns that it needs, with nothing kept from one to the next: the halo between them is computed again. Column bands
are R = 1.

The same list drives the executor, the ONNX export and the prediction of the peak. What it holds is counted by
`registers`, what it costs by `meter`, while it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from splitfx.tiling.plan.meter import CostMeter, scratch
from splitfx.tiling.plan.registers import Registers
from splitfx.tiling.plan.stage import Kernel, Kind, Stage


@dataclass(frozen=True)
class Spent:
    """What one phase holds at most, in bytes, and what it costs."""

    peak: int
    cost: CostMeter


class Scheduler:
    """Makes the instructions of a stage under a schedule. What its ``registers`` hold at most, what each phase has
    ``spent`` and the ``calls`` of kernels are known once `instructions` is exhausted."""

    def __init__(self, stage: Stage, schedule: Schedule, sources_counted: bool = True) -> None:
        self.stage, self.schedule = stage, schedule
        self.registers, self.cost = Registers(stage, sources_counted), CostMeter()
        self.spent: list[Spent] = []
        self.calls = 0
        self.buffers: dict[Kernel, Buffer] = {}
        self.totals: dict[Kernel, int] = {}  # what reductions have added up so far, which only they read
        self.takers = {k: set(k.takers) for k in stage.kernels if k.takers}

    # ------------------------------------------------------------ tiles and phases

    def instructions(self) -> Iterator[Instruction]:
        across, down = self.schedule.tiles[1], self.schedule.tiles[0]
        yield from self._finish_phase(-1)
        for r in range(down):
            for c in range(across):
                yield from self._tile(r, c)
        yield from self._finish_phase(self.stage.phases - 1) if (across, down) != (1, 1) else ()

    def _tile(self, r: int, c: int) -> Iterator[Instruction]:
        self.wanted = [
            self._hull(axis, n, i) for axis, (n, i) in enumerate(zip(self.schedule.tiles, (r, c), strict=True))
        ]
        self.buffers = {k: Buffer(done=self._start(k)) for k in self.stage.kernels}
        for kernel, register in self.registers.whole.items():
            if kernel.dims is not None:
                self.buffers[kernel] = _complete(kernel, register)
        tiled = self.schedule.tiles != (1, 1)
        for phase in range(self.stage.phases):
            yield from self._phase(phase)
            if not tiled:
                yield from self._finish_phase(phase)
            self.spent.append(Spent(self.registers.mark(), self.cost))
            self.calls += self.cost.calls
            self.cost = CostMeter()

    def _hull(self, axis: int, parts: int, part: int) -> dict[Kernel, Interval]:
        """Rows (or columns) of every kernel that this tile of the stage's results needs."""
        found: dict[Kernel, Interval] = {}

        def want(kernel: Kernel, low: int, high: int) -> None:
            if high > low:
                known = found.get(kernel, (low, high))
                found[kernel] = (min(low, known[0]), max(high, known[1]))

        for kernel in reversed(self.stage.kernels):
            size = kernel.sizes[axis]
            if kernel.exit >= 0 or kernel.kind is Kind.REDUCE:
                want(kernel, size * part // parts, size * (part + 1) // parts)
            if kernel.home >= 0 and kernel.exit < 0:
                want(kernel, 0, size)
            if kernel in found and kernel.kind in (Kind.ROWS, Kind.REDUCE):
                low, high = found[kernel]
                for operand, *edges in kernel.reads:
                    first, last, _, _ = edges[axis].need(low, high)
                    want(operand, first, max(last, first))
        return found

    def _start(self, kernel: Kernel) -> int:
        return self.wanted[0].get(kernel, (0, 0))[0]

    def _stop(self, kernel: Kernel) -> int:
        return self.wanted[0].get(kernel, (0, 0))[1]

    def _phase(self, phase: int) -> Iterator[Instruction]:
        parts: dict[tuple[int, int], list[Kernel]] = {}
        for kernel in self.stage.kernels:
            if kernel.phase == phase and kernel.kind in (Kind.ROWS, Kind.REDUCE) and kernel in self.wanted[0]:
                parts.setdefault((kernel.group, kernel.part), []).append(kernel)
        if not parts:
            return
        inside = {k for kernels in parts.values() for k in kernels}
        sources = {k for kernel in inside for k, _, _ in kernel.reads if k not in inside}
        sources |= {k for k in inside if not k.reads}  # made of whole values, at the pace of the others
        steps, every = self._steps(sources), self.schedule.every
        order = [(every[g] if g < len(every) else 1, kernels) for (g, _), kernels in sorted(parts.items())]
        ends = [k for k in inside if _ends(k, inside)]
        step, longest = 0, max(pause for pause, _ in order)
        while step < steps or any(self.buffers[k].done < self._stop(k) for k in ends):
            step += 1
            assert step < 4 * (steps + longest) + 8 * self.stage.clock, "every few steps compute rows of some kernel"
            due = [(pause, kernels) for pause, kernels in order if steps == 1 or step % pause == 0]
            released = {k: self._released(k, step, steps) for k in sources} if due else {}
            for pause, kernels in due:
                yield from self._fire_group(kernels, released, pause if steps > 1 else 0)

    def _most(self, kernel: Kernel, pause: int) -> int:
        """The row up to which a kernel may be computed at once: as fast as strips come in, also when the last of them
        are there and much of what is behind them is not."""
        if not pause:
            return self._stop(kernel)
        pace = -(-pause * self.schedule.rows * kernel.rows // self.stage.clock)
        return min(self._stop(kernel), self.buffers[kernel].done + max(1, pace))

    def _steps(self, sources: set[Kernel]) -> int:
        if not self.schedule.rows:
            return 1
        clock = self.stage.clock
        long = max(((self._stop(k) - self._start(k)) * clock / max(1, k.rows) for k in sources), default=1)
        return max(1, -(-int(long) // self.schedule.rows))

    def _released(self, kernel: Kernel, step: int, steps: int) -> int:
        """How far a value that is complete may be read at a step."""
        start, stop = self._start(kernel), self._stop(kernel)
        if step >= steps:
            return stop
        return start + min(stop - start, -(-step * self.schedule.rows * kernel.rows // self.stage.clock))

    # ------------------------------------------------------------ one firing of a group

    def _fire_group(self, kernels: list[Kernel], released: dict[Kernel, int], pause: int) -> Iterator[Instruction]:
        inside = set(kernels)
        ready: dict[Kernel, int] = {}
        for kernel in kernels:  # forward: how far each could go
            limit = released.get(kernel, self._stop(kernel))
            if _ends(kernel, inside):
                limit = min(limit, self._most(kernel, pause))
            for operand, edge, _ in kernel.reads:
                there = ready.get(operand)
                if there is None:
                    grows = operand not in released or (bool(operand.takes) and operand.kind is Kind.ROWS)
                    there = self.buffers[operand].done if grows else released[operand]
                    if there >= self._stop(operand):
                        there = operand.rows
                elif there >= self._stop(operand):
                    there = operand.rows
                limit = min(limit, edge.reach(there))
            ready[kernel] = max(limit, self.buffers[kernel].done)
        target = {k: self.buffers[k].done for k in kernels}
        for kernel in reversed(kernels):  # backward: how far each has to go
            if _ends(kernel, inside):
                target[kernel] = max(target[kernel], ready[kernel])
            if target[kernel] > self.buffers[kernel].done:
                for operand, edge, _ in kernel.reads:
                    if operand in inside:
                        _, last, _, _ = edge.need(self.buffers[kernel].done, target[kernel])
                        target[operand] = max(target[operand], last)
        for kernel in kernels:
            if target[kernel] > self.buffers[kernel].done:
                yield from self._fire(kernel, target[kernel])

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
            self.registers.touch(scratch(kernel, rows, columns, None) + kernel.total_bytes, kernel)
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
            self.registers.touch(scratch(kernel, rows, columns, pads[0] if pads else None) + size, kernel)
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
            yield Store(kernel.home, memory, register, kernel, rows, columns)
            yield self.registers.free(register)
            self.buffers[kernel].keep(Chunk(rows[0], rows[1], memory, 0, whole=True))
        elif kernel.users:
            self.buffers[kernel].keep(Chunk(rows[0], rows[1], register, size))
        else:
            yield self.registers.free(register)

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
            local = chunk.local(rows, operand.rows)
            if local is None and columns is None:
                dead = chunk.bytes > 0 and self._needed_from(operand) >= chunk.stop
                return chunk.register, dead, False
            copy = dense
            size = self._piece(operand, rows, columns) if copy else 0
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
            if user not in self.wanted[0]:
                continue
            reader = self.buffers[user]
            if reader.done < self._stop(user) and (row := edge.first(reader.done)) < first:
                first, waits = row, reader
        buffer.waits, buffer.needed = waits, first
        buffer.waits_done = waits.done if waits is not None else 0
        return first

    # ------------------------------------------------------------ ends of phases

    def _finish_phase(self, phase: int) -> Iterator[Instruction]:
        for kernel in self.stage.kernels:
            if kernel.phase != phase or kernel.kind is Kind.SOURCE:
                continue
            if kernel.kind is not Kind.ROWS:
                yield from self._finish(kernel)
            yield from self._taken(kernel)

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
            self.buffers[kernel] = _complete(kernel, register)
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


def _ends(kernel: Kernel, inside: set[Kernel]) -> bool:
    """Something beyond these kernels waits for its rows."""
    return kernel.kind is Kind.REDUCE or kernel.home >= 0 or any(u not in inside for u, _, _ in kernel.users)


def _complete(kernel: Kernel, register: int) -> Buffer:
    """A map that is there at once."""
    return Buffer([Chunk(0, kernel.rows, register, 0, whole=True)], kernel.rows)
