"""Shares: which rows of every value of a stage each rank computes, and which rows it gets from other ranks.

Every map is divided alike, in rows [rows * cuts[r] / cuts[-1], rows * cuts[r + 1] / cuts[-1]) for rank r, so maps of
one height lie on the same ranks; a low map may leave a rank without rows. Beyond its own rows a rank computes those
that its next layers read (the halo), back to a map that is *awaited*: of that one each rank computes its own rows
alone, and what others read of it crosses. A value that is taken whole (keys of an attention) crosses whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx

from splitfx.errors import UnsupportedError
from splitfx.tiling.plan.instructions import Interval
from splitfx.tiling.stage.kernel import Kernel, Stage
from splitfx.tiling.stage.roles import Kind

FINE = 2**20  # parts in which shares by weights are counted


@dataclass(frozen=True)
class Division:
    """Where maps are cut: ``cuts`` rise from 0 to what stands for all rows."""

    cuts: tuple[int, ...]

    @staticmethod
    def of(ranks: int, weights: Sequence[float] = ()) -> Division:
        """Equal shares, or shares in the ratio of ``weights``. Raises `UnsupportedError`."""
        if not weights:
            return Division(tuple(range(ranks + 1)))
        if len(weights) != ranks or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise UnsupportedError(
                f"weights are {ranks} numbers of at least 0, one for each rank; got {tuple(weights)}"
            )
        return Division((0, *(round(FINE * s / sum(weights)) for s in accumulate(weights))))

    @staticmethod
    def given(rows: Sequence[int]) -> Division:
        """Of a map of which every rank has been given so many rows."""
        return Division((0, *accumulate(rows)))

    def own(self, rows: int, rank: int) -> Interval:
        """The rows of a map of this height that a rank owns; none where both are equal."""
        return rows * self.cuts[rank] // self.cuts[-1], rows * self.cuts[rank + 1] // self.cuts[-1]

    @property
    def ranks(self) -> int:
        return len(self.cuts) - 1


@dataclass(frozen=True)
class Crossing:
    """Rows of a value that go from one rank to another."""

    kernel: Kernel
    sender: int
    receiver: int
    rows: Interval


class Shares:
    """What all ranks do with a stage. ``computed[rank]``: rows of each kernel that a rank computes (of what is given:
    reads); ``read[rank]``: of the values that cross, the rows that its kernels read.

    ``given``: sources of which each rank holds a piece only, and how they are divided. ``kept``: results that all
    ranks get whole. ``awaited``: the nodes that the stage was compiled with.
    """

    def __init__(
        self,
        stage: Stage,
        division: Division,
        given: Mapping[Kernel, Division],
        kept: Collection[Kernel],
        awaited: Collection[fx.Node],
    ) -> None:
        self.stage, self.division, self.given, self.awaited = stage, division, given, awaited
        self.kept = frozenset(kept)
        self.computed: list[dict[Kernel, Interval]] = []
        self.read: list[dict[Kernel, Interval]] = []
        for rank in range(division.ranks):
            self.computed.append({})
            self.read.append({})
            self._walk(rank)

    def own(self, kernel: Kernel, rank: int) -> Interval:
        return self.given.get(kernel, self.division).own(kernel.rows, rank)

    def is_whole(self, kernel: Kernel) -> bool:
        """All rows of it come together on every rank."""
        lies_apart = (kernel.kind is Kind.ROWS and kernel.dims is not None) or kernel in self.given
        return lies_apart and (kernel in self.kept or bool(kernel.takers))

    def crosses(self, kernel: Kernel) -> bool:
        """Its rows lie on different ranks when it is done, and others read them."""
        waits = kernel.kind is Kind.ROWS and kernel.node in self.awaited
        return waits or kernel in self.given or self.is_whole(kernel)

    def crossings(self, kernel: Kernel) -> Iterator[Crossing]:
        """By sender, then by receiver."""
        for sender in range(self.division.ranks):
            low, high = self.own(kernel, sender)
            for receiver in range(self.division.ranks):
                first, last = self.read[receiver].get(kernel, (0, 0))
                first, last = max(first, low), min(last, high)
                if receiver != sender and last > first:
                    yield Crossing(kernel, sender, receiver, (first, last))

    def _walk(self, rank: int) -> None:
        computed, read = self.computed[rank], self.read[rank]
        for kernel in reversed(self.stage.kernels):
            if kernel.exit >= 0 or kernel.kind is Kind.REDUCE or self.crosses(kernel):
                widen(computed, kernel, self.own(kernel, rank))
            if self.is_whole(kernel):
                read[kernel] = (0, kernel.rows)
            if kernel not in computed or kernel.kind not in (Kind.ROWS, Kind.REDUCE):
                continue
            for operand, edge, _ in kernel.reads:
                first, last, _, _ = edge.need(*computed[kernel])
                apart = operand in self.given or (self.crosses(operand) and kernel.phase > operand.phase)
                widen(read if apart else computed, operand, (first, max(first + 1, last)))


def widen(known: dict[Kernel, Interval], kernel: Kernel, rows: Interval) -> None:
    if rows[1] > rows[0]:
        low, high = known.get(kernel, rows)
        known[kernel] = min(low, rows[0]), max(high, rows[1])
