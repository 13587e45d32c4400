"""Registers: where the values of a stage lie while it runs, the bytes that they take, and the most they ever take.

They are numbered: the stage's sources first, the memories of whole values next (its outputs first among them), then
every piece that is computed on the way, each with a number of its own. What is counted is storage: a view takes none, a
result that is written over its operand takes over the operand's, and what a value that runs once shares with another
lives as long as either.
"""

from __future__ import annotations

from collections import Counter

from splitfx.tiling.plan.instructions import Free
from splitfx.tiling.stage.kernel import Kernel, Stage


class Registers:
    """Gives out registers and counts what they hold: ``live`` bytes now, at most ``peak``, reached at ``binding``.

    ``whole`` are those of values without rows, and of the sources. Bytes of the sources are counted where
    ``sources_counted``; the memory of an output is, from when it is opened until the end.
    """

    def __init__(self, stage: Stage, sources_counted: bool = True) -> None:
        held = sum(k.bytes for k in stage.sources) if sources_counted else 0
        self.live = self.peak = self._since = held
        self.binding: Kernel | None = None
        self.whole: dict[Kernel, int] = {kernel: place for place, kernel in enumerate(stage.sources)}
        self._first_output = len(stage.sources)
        self._last = self._first_output + len(stage.homes) - 1
        self._bytes: dict[int, int] = {}
        self._shared: dict[int, int] = {}  # a register that lies in another's storage -> that other
        self._sharing: Counter[int] = Counter()  # how many do
        self._gone: set[int] = set()  # freed, though others lie in their storage
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

    def share(self, register: int) -> int:
        """A new register in the storage of another, which it keeps alive."""
        self._last += 1
        owner = self._shared.get(register, register)
        self._shared[self._last] = owner
        self._sharing[owner] += 1
        return self._last

    def free(self, *registers: int) -> Free:
        for register in registers:
            self._let_go(register)
        return Free(registers)

    def _let_go(self, register: int) -> None:
        owner = self._shared.pop(register, None)
        if owner is None:
            self._gone.add(register)
            owner = register
        else:
            self._sharing[owner] -= 1
        if not self._sharing[owner] and owner in self._gone:
            self.live -= self._bytes.pop(owner, 0)
            self._gone.discard(owner)

    def touch(self, extra: int, kernel: Kernel) -> None:
        """Bytes that live only inside one instruction."""
        self._since = max(self._since, self.live + extra)
        if self.live + extra > self.peak:
            self.peak, self.binding = self.live + extra, kernel

    def mark(self) -> int:
        """The most bytes since the last mark."""
        most, self._since = self._since, self.live
        return most

    def bytes_of(self, register: int) -> int | None:
        """The storage that a register owns; None for one that owns none."""
        return self._bytes.get(register)

    # ------------------------------------------------------------ outputs and values without rows

    def output(self, kernel: Kernel) -> int:
        """The register of the memory of a value that is whole in one place."""
        return self._first_output + kernel.home

    def open(self, kernel: Kernel) -> bool:
        """Take the memory of such a value, all its rows; False where that has been done."""
        if not self.claim(kernel):
            return False
        size = 0 if kernel.spilled else kernel.bytes
        self._bytes[self.output(kernel)] = size
        self._grow(size, kernel)
        return True

    def claim(self, kernel: Kernel) -> bool:
        """True for the first that asks for its memory."""
        first = kernel.home not in self._claimed
        self._claimed.add(kernel.home)
        return first

    def _grow(self, size: int, kernel: Kernel) -> None:
        self.live += size
        self.touch(0, kernel)
