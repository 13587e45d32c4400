"""Schedule: the order in which the pieces of a stage are computed, as a list of instructions, and what it holds.

*Push, not pull*: a strip of ``rows`` input rows goes in at every step, and each group of kernels computes what it can
of it. A group fires at every ``every[group]``-th step, so that deep kernels work on pieces large enough to run at full
speed. Within a group, first forward (which rows of the group's results can be made), then backward (which rows of
each kernel these need), so nothing is computed before it is needed. Rows that later pieces read again stay in line
buffers as copies: a line buffer never keeps a large storage alive.

``tiles`` cuts what the stage gives into a grid of R x C pieces. Each piece is a run of its own over the rows and
columns that it needs, with nothing kept from one to the next: the halo between them is computed again. Column bands
are R = 1.

The same list drives the executor, the ONNX export and the prediction of the peak, which is counted while it is made:
every instruction that allocates says how many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from splitfx.tiling.plan.instructions import (
    Finish,
    Free,
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
from splitfx.tiling.plan.scratch import scratch
from splitfx.tiling.plan.stage import Kernel, Kind, Stage


@dataclass(slots=True)
class Chunk:
    """Rows [start, stop) of a value in a register; ``bytes`` is what its storage takes."""

    start: int
    stop: int
    register: int
    bytes: int


@dataclass
class Buffer:
    """What is there of one value: chunks in order; ``done`` rows have been computed."""

    chunks: list[Chunk] = field(default_factory=list)
    done: int = 0
    waits: Buffer | None = None  # of the reader that is furthest behind, as it was when last looked at
    waits_done: int = 0
    needed: int = 0


class Scheduler:
    """Makes the instructions of a stage under a schedule. ``peak`` and ``binding`` (the kernel at which it is reached)
    are known once `instructions` is exhausted; bytes of the stage's sources are counted where ``held`` names them."""

    def __init__(self, stage: Stage, schedule: Schedule, sources_counted: bool = True) -> None:
        self.stage, self.schedule = stage, schedule
        self.live = sum(k.row_bytes * (k.rows if k.dims else 1) for k in stage.sources) if sources_counted else 0
        self.peak, self.binding = self.live, None
        self.firings = 0
        self.fired: dict[Kernel, int] = {}
        self.seconds_terms = [0.0, 0.0, 0.0]  # multiply-accumulates, bytes moved, calls
        self._registers = len(stage.sources)
        self._bytes: dict[int, int] = {}
        self._whole: dict[Kernel, int] = {}  # registers of values without rows
        self._opened: set[int] = set()

    # ------------------------------------------------------------ bytes

    def _allocate(self, size: int, kernel: Kernel) -> int:
        self._registers += 1
        self._bytes[self._registers] = size
        self.live += size
        if self.live > self.peak:
            self.peak, self.binding = self.live, kernel
        return self._registers

    def _touch(self, extra: int, kernel: Kernel) -> None:
        """Bytes that live only inside one instruction."""
        if self.live + extra > self.peak:
            self.peak, self.binding = self.live + extra, kernel

    def _free(self, *registers: int) -> Free:
        for register in registers:
            self.live -= self._bytes.pop(register, 0)
        return Free(registers)

    # ------------------------------------------------------------ tiles and phases

    def instructions(self) -> Iterator[Instruction]:
        for register, kernel in enumerate(self.stage.sources):
            self._whole[kernel] = register
        across, down = self.schedule.tiles[1], self.schedule.tiles[0]
        for r in range(down):
            for c in range(across):
                yield from self._tile(r, c)
        yield from self._finish_phase(self.stage.phases - 1) if (across, down) != (1, 1) else ()

    def _tile(self, r: int, c: int) -> Iterator[Instruction]:
        self.wanted = [
            self._hull(axis, n, i) for axis, (n, i) in enumerate(zip(self.schedule.tiles, (r, c), strict=True))
        ]
        self.buffers = {k: Buffer(done=self._start(k)) for k in self.stage.kernels}
        for kernel in self.stage.sources:
            if kernel.dims is not None:
                self.buffers[kernel].chunks = [Chunk(0, kernel.rows, self._whole[kernel], 0)]
        tiled = self.schedule.tiles != (1, 1)
        for phase in range(self.stage.phases):
            yield from self._phase(phase)
            if not tiled:
                yield from self._finish_phase(phase)

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
        steps = self._steps(sources)
        for step in range(steps):
            released = {k: self._released(k, step + 1, steps) for k in sources}
            for (group, _), kernels in sorted(parts.items()):
                every = self.schedule.every[group] if group < len(self.schedule.every) else 1
                if step == steps - 1 or (step + 1) % every == 0:
                    yield from self._fire_group(kernels, released)

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

    def _fire_group(self, kernels: list[Kernel], released: dict[Kernel, int]) -> Iterator[Instruction]:
        inside = set(kernels)
        ready: dict[Kernel, int] = {}
        for kernel in kernels:  # forward: how far each could go
            limit = self._stop(kernel)
            for operand, edge, _ in kernel.reads:
                there = ready.get(operand)
                if there is None:
                    there = released[operand] if operand in released else self.buffers[operand].done
                    if there >= self._stop(operand):
                        there = operand.rows
                elif there >= self._stop(operand):
                    there = operand.rows
                limit = min(limit, edge.reach(there))
            ready[kernel] = max(limit, self.buffers[kernel].done)
        target = {k: self.buffers[k].done for k in kernels}
        for kernel in reversed(kernels):  # backward: how far each has to go
            if kernel.kind is Kind.REDUCE or kernel.exit >= 0 or any(u not in inside for u, _, _ in kernel.users):
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
            held = (
                self.wanted[1].get(operand, (0, operand.sizes[1]))
                if operand.kind is not Kind.SOURCE
                else (0, operand.sizes[1])
            )
            cols = None if (left, right) == held else (left - held[0], right - held[0])
            if operand.exit >= 0:
                cols = None if (left, right) == (0, operand.sizes[1]) else (left, right)
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
            self._touch(scratch(kernel, rows, columns, None), kernel)
            yield Reduce(kernel, srcs[0])
            self._count(kernel, rows, columns, 0)
        else:
            yield from self._run(kernel, rows, columns, srcs, starts, pads, owned, private)
        if private:
            yield self._free(*private)
        for operand, _, _ in kernel.reads:
            yield from self._trim(operand)

    def _run(
        self, kernel: Kernel, rows: Interval, columns: Interval, srcs: list[int], starts: list[Interval],
        pads: list[tuple[Pads, Pads]], owned: list[int], private: list[int],
    ) -> Iterator[Instruction]:  # fmt: skip
        size = self._size(kernel, rows[1] - rows[0], columns)
        over = next((owned[p] for p in kernel.overwrites if self._bytes.get(owned[p]) == size), -1)
        if over >= 0:
            self._registers += 1
            register = self._registers
            self._bytes[register] = self._bytes.pop(over)
            self._hand_over(kernel, over, private)
        else:
            self._touch(scratch(kernel, rows, columns, pads[0] if pads else None) + size, kernel)
            register = self._allocate(size, kernel)
        yield Run(register, kernel, tuple(srcs), tuple(starts), tuple(pads), rows, columns, over)
        yield from self._give(kernel, rows, columns, register, size)

    def _patched(self, kernel: Kernel, rows: Interval) -> int:
        """The operand that a sum or product of two maps may overwrite where the other lies in several chunks; else -1.
        Joining those first would take the room of a whole piece."""
        node = kernel.node  # addcdiv(x, x, y) reads two maps, but has three operands
        if len(kernel.reads) != 2 or len(node.args) != 2 or not kernel.overwrites or node.kwargs:
            return -1
        for place in kernel.overwrites:
            base, other = kernel.reads[place][0], kernel.reads[1 - place][0]
            if not (kernel.reads[0][1].identity and kernel.reads[1][1].identity) or base.exit >= 0:
                continue
            chunks = [c for c in self.buffers[base].chunks if c.stop > rows[0] and c.start < rows[1]]
            many = sum(c.stop > rows[0] and c.start < rows[1] for c in self.buffers[other].chunks) > 1
            exact = len(chunks) == 1 and (chunks[0].start, chunks[0].stop) == rows and chunks[0].bytes > 0
            same = self.wanted[1].get(base) == self.wanted[1].get(other) == self.wanted[1].get(kernel)
            if many and exact and same and base.row_bytes == kernel.row_bytes and self._needed_from(base) >= rows[1]:
                return place
        return -1

    def _patch(self, kernel: Kernel, rows: Interval, columns: Interval, place: int) -> Iterator[Instruction]:
        base, other = kernel.reads[place][0], kernel.reads[1 - place][0]
        chunk = next(c for c in self.buffers[base].chunks if c.start == rows[0])
        parts, views = [], []
        for held in self.buffers[other].chunks:
            low, high = max(rows[0], held.start), min(rows[1], held.stop)
            if high <= low:
                continue
            local, register = _local(held, (low, high), other), held.register
            if local is not None:
                register = self._allocate(0, kernel)
                views.append(register)
                yield Take(register, held.register, other, local, None, False)
            parts.append((register, low - rows[0], high - low))
        self._registers += 1
        register, size = self._registers, self._bytes.pop(chunk.register)
        self._bytes[register] = size
        self._hand_over(kernel, chunk.register, [])
        yield Patch(register, kernel, chunk.register, place, tuple(parts), rows, columns)
        if views:
            yield self._free(*views)
        yield from self._give(kernel, rows, columns, register, size)
        yield from self._trim(other)

    def _give(
        self, kernel: Kernel, rows: Interval, columns: Interval, register: int, size: int
    ) -> Iterator[Instruction]:
        """A piece is there: to the stage's output, to its readers, or nowhere."""
        self._count(kernel, rows, columns, size)
        if kernel.exit >= 0:
            if kernel.exit not in self._opened:
                self._opened.add(kernel.exit)
                self._bytes[-1 - kernel.exit] = whole = kernel.row_bytes * kernel.rows
                self.live += whole
                self._touch(0, kernel)
                yield Open(kernel.exit, kernel)
            yield Store(kernel.exit, register, kernel, rows, columns)
            yield self._free(register)
            self._keep(kernel, Chunk(rows[0], rows[1], -1 - kernel.exit, 0))
        elif kernel.users:
            self._keep(kernel, Chunk(rows[0], rows[1], register, size))
        else:
            yield self._free(register)

    def _hand_over(self, kernel: Kernel, register: int, private: list[int]) -> None:
        """A register's storage now belongs to the kernel's own value."""
        if register in private:
            private.remove(register)
        for operand, _, _ in kernel.reads:
            chunks = self.buffers[operand].chunks
            chunks[:] = [c for c in chunks if c.register != register]

    def _keep(self, kernel: Kernel, chunk: Chunk) -> None:
        chunks = self.buffers[kernel].chunks
        if chunk.register < 0:  # an output's own memory holds its rows one below the other
            start = min([chunk.start, *(c.start for c in chunks)])
            chunks[:] = [Chunk(start, chunk.stop, chunk.register, 0)]
        else:
            chunks.append(chunk)

    # ------------------------------------------------------------ line buffers

    def _gather(self, kernel: Kernel, operand: Kernel, rows: Interval, columns: Interval | None) -> Iterator[Any]:
        """(register, nobody else needs it, it is its own copy) with rows of ``operand``, joined where apart."""
        chunks = [c for c in self.buffers[operand].chunks if c.stop > rows[0] and c.start < rows[1]]
        if not chunks:  # only padding is read
            chunks = self.buffers[operand].chunks[-1:]
        dense = kernel.dense
        if len(chunks) == 1:
            chunk = chunks[0]
            local = _local(chunk, rows, operand)
            if local is None and columns is None:
                dead = chunk.bytes > 0 and self._needed_from(operand) >= chunk.stop
                return chunk.register, dead, False
            copy = dense
            size = self._piece(operand, rows, columns) if copy else 0
            register = self._allocate(size, kernel)
            yield Take(register, chunk.register, operand, local, columns, copy)
            return register, copy, True
        parts: list[int] = []
        views: list[int] = []
        for chunk in chunks:
            local = _local(chunk, (max(rows[0], chunk.start), min(rows[1], chunk.stop)), operand)
            if local is None and columns is None:
                parts.append(chunk.register)
                continue
            view = self._allocate(0, kernel)
            yield Take(view, chunk.register, operand, local, columns, False)
            parts.append(view)
            views.append(view)
        register = self._allocate(self._piece(operand, rows, columns), kernel)
        yield Join(register, tuple(parts), operand)
        if views:
            yield self._free(*views)
        return register, True, True

    def _trim(self, operand: Kernel) -> Iterator[Instruction]:
        """Let go of rows that nobody reads again; what stays of a chunk is copied: no large storage lives on."""
        if operand.kind is Kind.SOURCE or operand.exit >= 0:
            return
        buffer = self.buffers[operand]
        if not buffer.chunks:
            return
        keep = self._needed_from(operand)
        gone = [c for c in buffer.chunks if c.stop <= keep]
        if gone:
            buffer.chunks = [c for c in buffer.chunks if c.stop > keep]
            yield self._free(*(c.register for c in gone))
        if not buffer.chunks:
            return
        chunk = buffer.chunks[0]
        waste = keep - chunk.start
        if waste * 4 >= chunk.stop - chunk.start and waste > 0:
            size = chunk.bytes // (chunk.stop - chunk.start) * (chunk.stop - keep)
            register = self._allocate(size, operand)
            yield Take(register, chunk.register, operand, (waste, chunk.stop - chunk.start), None, True)
            yield self._free(chunk.register)
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
            if kernel.phase != phase or kernel.kind not in (Kind.REDUCE, Kind.WHOLE):
                continue
            register = self._allocate(kernel.row_bytes, kernel)
            yield Finish(register, kernel)
            self._whole[kernel] = register
            if kernel.exit >= 0 and kernel.exit not in self._opened:
                self._opened.add(kernel.exit)
                yield Store(kernel.exit, register, kernel, (0, 0), (0, 0))
        late = {k for kernel in self.stage.kernels if kernel.phase > phase for k in kernel.takes}
        dead = [
            k for k in self._whole if k.kind is not Kind.SOURCE and k.phase <= phase and k not in late and k.exit < 0
        ]
        if dead:
            yield self._free(*(self._whole.pop(k) for k in dead))

    def whole(self, kernel: Kernel) -> int:
        """The register of a value without rows."""
        return self._whole[kernel]

    # ------------------------------------------------------------ sizes

    def _size(self, kernel: Kernel, rows: int, columns: Interval) -> int:
        size = kernel.row_bytes * rows
        return (
            size if columns[1] - columns[0] == kernel.sizes[1] else size * (columns[1] - columns[0]) // kernel.sizes[1]
        )

    def _piece(self, operand: Kernel, rows: Interval, columns: Interval | None) -> int:
        if columns is None:
            held = self.wanted[1].get(operand, (0, operand.sizes[1]))
            columns = (0, operand.sizes[1]) if operand.kind is Kind.SOURCE or operand.exit >= 0 else held
        return self._size(operand, rows[1] - rows[0], columns)

    def _count(self, kernel: Kernel, rows: Interval, columns: Interval, size: int) -> None:
        """What the planner estimates time from."""
        count, share = rows[1] - rows[0], (columns[1] - columns[0]) / max(1, kernel.sizes[1])
        self.firings += 1
        self.fired[kernel] = self.fired.get(kernel, 0) + 1
        terms = self.seconds_terms
        terms[0] += kernel.macs_per_row * count * share
        terms[1] += size + sum(k.row_bytes * count * share for k, _, _ in kernel.reads)
        terms[2] += 1


def _local(chunk: Chunk, rows: Interval, operand: Kernel) -> Interval | None:
    """Rows of a chunk, from its own first row; None for all of it."""
    base = 0 if chunk.register < 0 or operand.kind is Kind.SOURCE else chunk.start
    whole = (0, operand.rows) if chunk.register < 0 or operand.kind is Kind.SOURCE else (chunk.start, chunk.stop)
    return None if rows == whole else (rows[0] - base, rows[1] - base)
