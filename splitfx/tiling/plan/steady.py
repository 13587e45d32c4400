"""The steady state of a phase: once every buffer holds what it held a period of steps ago, only further down, all that
comes until the bottom border is known.

Counting a schedule then costs its start, its end and one period, however many rows the maps have. Nothing is estimated:
rows are left out only where every edge between two values repeats over all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, lcm

from splitfx.tiling.plan.emission import Emitter
from splitfx.tiling.stage.kernel import Kernel


@dataclass(frozen=True)
class _State:
    """What is there at a step: ``done`` rows of every kernel, and all that does not move with them."""

    done: dict[Kernel, int]
    held: tuple[object, ...]
    macs: float
    moved_bytes: float
    spilled_bytes: float
    fired: Counter[Kernel]


class Steady:
    """Watches a phase of an emitter; `skipped` says after a step how many steps were left out."""

    def __init__(
        self, emitter: Emitter, inside: Iterable[Kernel], sources: Iterable[Kernel], steps: int, pauses: Iterable[int]
    ) -> None:
        self.emitter, self.inside, self.sources, self.steps = emitter, list(inside), list(sources), steps
        rows, clock = emitter.schedule.rows, emitter.stage.clock
        period = lcm(*pauses)
        for kernel in self.sources:  # as many rows of each go in at every period
            period = lcm(period, clock // gcd(clock, rows * kernel.rows))
        for kernel in self.inside:  # and some rows of each come out
            stride = max(1, round(clock / max(1, kernel.rows)))
            period = lcm(period, stride // gcd(stride, rows))
            if period * 3 > steps:
                break
        # Rows of two pieces are joined, and the rest of one is copied, where it ends and at no other row.
        in_pieces = any(not c.whole for kernel in self.sources for c in emitter.buffers[kernel].chunks)
        self.period, self.before = period, None
        self.over = period * 3 > steps or in_pieces

    def skipped(self, step: int) -> int:
        """Steps that are left out behind this one: the emitter is then where it would be behind them."""
        if self.over or step % self.period:
            return 0
        before, self.before = self.before, self._state()
        if before is None or before.held != self.before.held:
            return 0
        shifts = {k: done - before.done[k] for k, done in self.before.done.items()}
        times = self._times(step, before, shifts)
        if times > 0:
            self.over = True
            self._move(times, shifts, before)
        return max(0, times) * self.period

    def _state(self) -> _State:
        held, cost = self.emitter.registers.live, self.emitter.cost
        done, chunks = {}, []
        for kernel in self.inside:
            buffer = self.emitter.buffers[kernel]
            done[kernel] = buffer.done
            chunks.append(
                tuple((c.whole or c.start - buffer.done, c.stop - buffer.done, c.bytes) for c in buffer.chunks)
            )
        counted = cost.macs, cost.moved_bytes, cost.spilled_bytes
        return _State(done, (held, *chunks), *counted, Counter(cost.fired))

    def _times(self, step: int, before: _State, shifts: dict[Kernel, int]) -> int:
        """How often the last period is repeated, before the end of any value is in sight."""
        emitter, schedule = self.emitter, self.emitter.schedule
        times = (self.steps - step) // self.period - 2
        moving = dict(shifts)
        for kernel in self.sources:
            moving[kernel] = self.period * schedule.rows * kernel.rows // emitter.stage.clock
            if kernel in shifts and shifts[kernel] != moving[kernel]:
                return 0
        for kernel, shift in shifts.items():
            left = emitter._stop(kernel) - before.done[kernel]
            if shift:
                times = min(times, left // shift - 3)
            elif left:
                return 0  # has not begun
        return times if times > 0 and self._regular(times, before, shifts, moving) else 0

    def _regular(self, times: int, before: _State, shifts: dict[Kernel, int], moving: dict[Kernel, int]) -> bool:
        for kernel, shift in shifts.items():
            last = before.done[kernel] + (times + 2) * shift
            for operand, edge, _ in kernel.reads if shift else ():
                if not edge.repeats(before.done[kernel], last, shift, moving.get(operand, 0)):
                    return False
        return True

    def _move(self, times: int, shifts: dict[Kernel, int], before: _State) -> None:
        emitter, cost = self.emitter, self.emitter.cost
        for kernel, shift in shifts.items():
            buffer = emitter.buffers[kernel]
            buffer.done, buffer.waits = buffer.done + times * shift, None
            for chunk in buffer.chunks:
                chunk.start += 0 if chunk.whole else times * shift
                chunk.stop += times * shift
        for kernel in self.sources:
            emitter.buffers[kernel].waits = None
        cost.macs += times * (cost.macs - before.macs)
        cost.moved_bytes += times * (cost.moved_bytes - before.moved_bytes)
        cost.spilled_bytes += times * (cost.spilled_bytes - before.spilled_bytes)
        for kernel, count in (cost.fired - before.fired).items():
            cost.fired[kernel] += times * count
