"""Registers: where the values of a stage lie while it runs, the bytes that they take, and the most they ever take.

They are numbered: the stage's sources first, its outputs next, then every piece that is computed on the way, each with
a number of its own. What is counted is storage: a view takes none, and a result that is written over its operand takes
over the operand's.
"""

from __future__ import annotations

from splitfx.tiling.plan.instructions import Free
from splitfx.tiling.plan.stage import Kernel, Stage


class Registers:
    """Gives out registers and counts what they hold: ``live`` bytes now, at most ``peak``, reached at ``binding``.

    ``whole`` are those of values without rows, and of the sources. Bytes of the sources are counted where
    ``sources_counted``; the memory of an output is, from when it is opened until the end.
    """

    def __init__(self, stage: Stage, sources_counted: bool = True) -> None:
        held = sum(k.row_bytes * (k.rows if k.dims else 1) for k in stage.sources) if sources_counted else 0
        self.live = self.peak = held
        self.binding: Kernel | None = None
        self.whole: dict[Kernel, int] = {kernel: place for place, kernel in enumerate(stage.sources)}
        self._first_output = len(stage.sources)
        self._last = self._first_output + len(stage.exits) - 1
        self._bytes: dict[int, int] = {}
        self._claimed: set[int] = set()

    def allocate(self, size: int, kernel: Kernel) -> int:
        """A new register with storage of its own."""
        self._last += 1
        self._bytes[self._last] = size
        self._grow(size, kernel)
        return self._last

    def take_over(self, register: int) -> int:
        """A new register in the storage of another, which is gone."""
        self._last += 1
        self._bytes[self._last] = self._bytes.pop(register)
        return self._last

    def free(self, *registers: int) -> Free:
        for register in registers:
            self.live -= self._bytes.pop(register, 0)
        return Free(registers)

    def touch(self, extra: int, kernel: Kernel) -> None:
        """Bytes that live only inside one instruction."""
        if self.live + extra > self.peak:
            self.peak, self.binding = self.live + extra, kernel

    def bytes_of(self, register: int) -> int | None:
        """The storage that a register owns; None for one that owns none."""
        return self._bytes.get(register)

    # ------------------------------------------------------------ outputs and values without rows

    def output(self, kernel: Kernel) -> int:
        """The register of the memory of an output."""
        return self._first_output + kernel.exit

    def open(self, kernel: Kernel) -> bool:
        """Take the memory of an output, all its rows; False where that has been done."""
        if not self.claim(kernel):
            return False
        whole = kernel.row_bytes * kernel.rows
        self._bytes[self.output(kernel)] = whole
        self._grow(whole, kernel)
        return True

    def claim(self, kernel: Kernel) -> bool:
        """True for the first that asks for an output."""
        first = kernel.exit not in self._claimed
        self._claimed.add(kernel.exit)
        return first

    def _grow(self, size: int, kernel: Kernel) -> None:
        self.live += size
        self.touch(0, kernel)
