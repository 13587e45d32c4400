"""Schedule: the order in which the pieces of a stage are computed, as a list of instructions, and what it holds.

*Push, not pull*: a strip of ``rows`` input rows goes in at every step, and each group of kernels computes what it can
of it. A group fires at every ``firing_intervals[group]``-th step, so that deep kernels work on pieces large enough to
run at full speed. Within a group, first forward (which rows of the group's results can be made), then backward (which
rows of each kernel these need), so nothing is computed before it is needed. Rows that later pieces read again stay in
line buffers as copies: a line buffer never keeps a large storage alive.

``tiles`` cuts what the stage gives into a grid of R x C pieces. Each piece is a run of its own over the rows and
columns that it needs, with nothing kept from one to the next: the halo between them is computed again. Column bands
are R = 1.

The same list drives the executor, the ONNX export and the prediction of the peak. What it holds is counted by
`registers`, what it costs by `meter`, while it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from splitfx.tiling.plan.buffers import Buffer
from splitfx.tiling.plan.emission import Emitter, complete
from splitfx.tiling.plan.instructions import Instruction, Interval, widen
from splitfx.tiling.plan.meter import CostMeter, Spent
from splitfx.tiling.plan.steady import Steady
from splitfx.tiling.stage.kernel import Kernel
from splitfx.tiling.stage.roles import Kind


@dataclass(frozen=True, slots=True)
class _Part:
    """Kernels that fire together, every ``pause`` steps."""

    pause: int
    kernels: list[Kernel]
    inside: set[Kernel]
    ends: set[Kernel]  # those for whose rows something beyond them waits


class Scheduler(Emitter):
    """Makes the instructions of a stage under a schedule. What its ``registers`` hold at most, what each phase has
    ``spent`` and the ``calls`` of kernels are known once `instructions` is exhausted, or behind `count`."""

    counting = False  # instructions that repeat may be left out

    def count(self) -> Scheduler:
        """Itself, with all that the instructions take counted and none of them kept."""
        self.counting = True
        for _ in self.instructions():
            pass
        return self

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
                self.buffers[kernel] = complete(kernel, register)
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

        for kernel in reversed(self.stage.kernels):
            size = kernel.sizes[axis]
            if kernel.exit >= 0 or kernel.kind is Kind.REDUCE:
                start = self.first if axis == 0 and kernel.kind is Kind.ROWS else 0
                widen(found, kernel, max(size * part // parts, start), size * (part + 1) // parts)
            if kernel.home >= 0 and kernel.exit < 0:
                widen(found, kernel, 0, size)
            if axis == 1 and kernel in found and (kernel.node in self.stage.regions.across or _whole_rows(kernel)):
                widen(found, kernel, 0, size)  # its rows are computed in full
            if kernel in found and kernel.kind in (Kind.ROWS, Kind.REDUCE):
                low, high = found[kernel]
                for operand, *edges in kernel.reads:
                    first, last, _, _ = edges[axis].need(low, high)
                    widen(found, operand, first, max(last, first))
        return found

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
        steps, intervals = self._steps(sources), self.schedule.firing_intervals
        order = [_part(intervals[g] if g < len(intervals) else 1, members) for (g, _), members in sorted(parts.items())]
        ends = [k for k in inside if _ends(k, inside)]
        step, longest = 0, max(part.pause for part in order)
        steady = Steady(self, inside, sources, steps, [part.pause for part in order]) if self.counting else None
        while step < steps or any(self.buffers[k].done < self._stop(k) for k in ends):
            step += 1
            assert step < 4 * (steps + longest) + 8 * self.stage.clock, "every few steps compute rows of some kernel"
            due = [part for part in order if steps == 1 or step % part.pause == 0]
            released = {k: self._released(k, step, steps) for k in sources} if due else {}
            for part in due:
                yield from self._fire_group(part, released, part.pause if steps > 1 else 0)
            step += steady.skipped(step) if steady is not None else 0

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

    def _fire_group(self, part: _Part, released: dict[Kernel, int], pause: int) -> Iterator[Instruction]:
        ready = self._ready(part, released, pause)
        if all(ready[kernel] <= self.buffers[kernel].done for kernel in part.ends):
            return
        target = self._targets(part, ready)
        for kernel in part.kernels:
            if target[kernel] > self.buffers[kernel].done:
                yield from self._fire(kernel, target[kernel])

    def _ready(self, part: _Part, released: dict[Kernel, int], pause: int) -> dict[Kernel, int]:
        """Forward: how far each could go."""
        buffers, wanted = self.buffers, self.wanted[0]
        ready: dict[Kernel, int] = {}
        for kernel in part.kernels:
            limit = released[kernel] if kernel in released else wanted[kernel][1]
            if kernel in part.ends:
                limit = min(limit, self._most(kernel, pause))
            for operand, edge, _ in kernel.reads:
                there = ready.get(operand)
                if there is None:
                    grows = operand not in released or (bool(operand.takes) and operand.kind is Kind.ROWS)
                    there = buffers[operand].done if grows else released[operand]
                limit = min(limit, edge.reach(operand.rows if there >= self._stop(operand) else there))
            ready[kernel] = max(limit, buffers[kernel].done)
        return ready

    def _targets(self, part: _Part, ready: dict[Kernel, int]) -> dict[Kernel, int]:
        """Backward: how far each has to go."""
        buffers = self.buffers
        target = {k: buffers[k].done for k in part.kernels}
        for kernel in reversed(part.kernels):
            if kernel in part.ends:
                target[kernel] = max(target[kernel], ready[kernel])
            if target[kernel] > buffers[kernel].done:
                for operand, edge, _ in kernel.reads:
                    if operand in part.inside:
                        _, last, _, _ = edge.need(buffers[kernel].done, target[kernel])
                        target[operand] = max(target[operand], last)
        return target

    # ------------------------------------------------------------ ends of phases

    def _finish_phase(self, phase: int) -> Iterator[Instruction]:
        for kernel in self.stage.kernels:
            if kernel.phase != phase or kernel.kind is Kind.SOURCE:
                continue
            if kernel.spilled:  # read back from now on
                if chunks := self.buffers[kernel].chunks:
                    yield self.registers.free(*(chunk.register for chunk in chunks))
                self.buffers[kernel] = complete(kernel, self.registers.output(kernel))
            if kernel.kind is not Kind.ROWS:
                yield from self._finish(kernel)
            yield from self._taken(kernel)


def _whole_rows(kernel: Kernel) -> bool:
    """Rows and columns lie in one axis, of its own or of what it reads: columns that nobody needs come too."""
    return kernel.joined or any(operand.joined for operand, _, _ in kernel.reads)


def _part(pause: int, kernels: list[Kernel]) -> _Part:
    inside = set(kernels)
    return _Part(pause, kernels, inside, {k for k in kernels if _ends(k, inside)})


def _ends(kernel: Kernel, inside: set[Kernel]) -> bool:
    """Something beyond these kernels waits for its rows."""
    return kernel.kind is Kind.REDUCE or kernel.home >= 0 or any(u not in inside for u, _, _ in kernel.users)
