"""`place`: which rank runs which groups of a carved model, and who runs the stem.

The paper's two ways: the stem is *duplicated* on every rank, so that only logits cross, or has a rank of its *own*,
which sends its result to the ranks of the branches. For one call at a time duplicating is never slower; for a stream
of batches a stem of its own works on the next batch while the branches work on this one. ``"auto"`` compares the
estimates: multiply-accumulates of the slowest rank, and bytes that cross at `MACS_PER_BYTE`.

Groups are spread so that the rank with the most multiply-accumulates has as few as possible, shared trunks counted on
every rank that needs them. Refused (`UnsupportedError`): more ranks than groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from splitfx.errors import UnsupportedError
from splitfx.ground.notebook import Shown
from splitfx.ground.table import number, size, table
from splitfx.splitnet.tree import STEM, Tree

MACS_PER_BYTE = 40.0  # what a process computes in the time in which one byte crosses: 40 GMAC/s and 1 GB/s
Stem = Literal["auto", "duplicate", "own"]


@dataclass(frozen=True)
class Placement(Shown):
    """``groups[rank]``: what a rank runs; none where it only runs the stem. ``macs[rank]``: of one call, at the traced
    sizes. ``cost``: the estimate by which placements are compared, in multiply-accumulates per batch."""

    stem: Literal["duplicate", "own"]
    groups: tuple[tuple[int, ...], ...]
    macs: tuple[int, ...]
    bytes: int
    cost: float

    def __str__(self) -> str:
        held = [", ".join(map(str, own)) or "the stem only" for own in self.groups]
        rows = [(r, text, number(m)) for r, (text, m) in enumerate(zip(held, self.macs, strict=True))]
        how = "on every rank" if self.stem == "duplicate" else "on rank 0"
        return table(("rank", "groups", "MACs"), rows, left=(1,)) + f"\nstem {how}; {size(self.bytes)} cross per call"


def place(tree: Tree, ranks: int, stem: Stem = "auto", pipelined: bool = False) -> Placement:
    """Spread the groups of ``tree`` over ``ranks`` processes.

    ``pipelined``: batches come one after the other, so that ranks work on different ones; otherwise the time of one
    call counts. Raises `UnsupportedError`.
    """
    if stem not in ("auto", "duplicate", "own"):
        raise UnsupportedError(f"stem is 'auto', 'duplicate' or 'own', not {stem!r}")
    has_stem = any(p.name == STEM for p in tree.parts)
    own_possible = has_stem and 2 <= ranks <= tree.groups + 1
    if ranks < 1 or (ranks > tree.groups and not (own_possible and stem in ("own", "auto"))):
        raise UnsupportedError(
            f"{ranks} processes for {tree.groups} groups: start 1 to {tree.groups}, or {tree.groups + 1} with a stem "
            "of its own"
        )
    if stem == "own" and (ranks < 2 or not has_stem):
        why = "needs at least 2 processes" if has_stem else "needs a stem: this model's groups share no layer"
        raise UnsupportedError(f"a stem on a rank of its own {why}")
    placements = []
    if stem in ("auto", "duplicate") and ranks <= tree.groups:
        placements.append(_duplicated(tree, ranks))
    if stem in ("auto", "own") and own_possible:
        placements.append(_own(tree, ranks, pipelined))
    return min(placements, key=lambda one: one.cost)


def _duplicated(tree: Tree, ranks: int) -> Placement:
    groups = spread(tree.groups, ranks, lambda own: _macs(tree, own, stem=True))
    macs = tuple(_macs(tree, own, stem=True) for own in groups)
    crossing = _logits(tree, [g for own in groups[1:] for g in own])
    return Placement("duplicate", groups, macs, crossing, max(macs) + MACS_PER_BYTE * crossing)


def _own(tree: Tree, ranks: int, pipelined: bool) -> Placement:
    groups = spread(tree.groups, ranks - 1, lambda own: _macs(tree, own, stem=False))
    macs = tuple(_macs(tree, own, stem=False) for own in groups)
    first = sum(p.macs for p in tree.parts if p.name == STEM)
    sent = sum(p.bytes for p in tree.parts if p.name == STEM) * len(groups)
    crossing = sent + _logits(tree, range(tree.groups))
    busy = first + MACS_PER_BYTE * crossing  # rank 0 sends and receives all of it
    cost = max(busy, max(macs)) if pipelined else busy + max(macs)
    return Placement("own", ((), *groups), (first, *macs), crossing, cost)


def _macs(tree: Tree, own: tuple[int, ...], stem: bool) -> int:
    return sum(p.macs for p in tree.parts if set(p.groups) & set(own) and (stem or p.name != STEM))


def _logits(tree: Tree, groups: range | list[int]) -> int:
    sizes = {name: part.bytes for part in tree.parts for name in part.outputs if name in tree.pieces}
    return sum(sizes[tree.pieces[g]] for g in groups)


def spread(count: int, ranks: int, cost: Callable[[tuple[int, ...]], int]) -> tuple[tuple[int, ...], ...]:
    """``count`` groups on ``ranks`` ranks, none without any: the better of neighbours together, which share trunks
    (exact), and the largest first, each to the rank on which it costs least."""
    candidates = (_neighbours(count, ranks, cost), _largest_first(count, ranks, cost))
    return min(candidates, key=lambda found: max(map(cost, found)))


def _neighbours(count: int, ranks: int, cost: Callable[[tuple[int, ...]], int]) -> tuple[tuple[int, ...], ...]:
    best: dict[tuple[int, int], tuple[int, tuple[tuple[int, ...], ...]]] = {(0, 0): (0, ())}
    runs = {(a, b): cost(tuple(range(a, b))) for a in range(count) for b in range(a + 1, count + 1)}
    for used in range(1, ranks + 1):
        for end in range(used, count + 1):
            options = [
                (max(best[used - 1, start][0], runs[start, end]), (*best[used - 1, start][1], tuple(range(start, end))))
                for start in range(used - 1, end)
                if (used - 1, start) in best
            ]
            best[used, end] = min(options)
    return best[ranks, count][1]


def _largest_first(count: int, ranks: int, cost: Callable[[tuple[int, ...]], int]) -> tuple[tuple[int, ...], ...]:
    held: list[tuple[int, ...]] = [()] * ranks
    order = sorted(range(count), key=lambda g: -cost((g,)))
    for place, g in enumerate(order):
        empty = [r for r in range(ranks) if not held[r]]
        free = empty if len(empty) >= count - place else range(ranks)
        least = min(free, key=lambda r: cost(tuple(sorted((*held[r], g)))))
        held[least] = tuple(sorted((*held[least], g)))
    return tuple(sorted(held))
