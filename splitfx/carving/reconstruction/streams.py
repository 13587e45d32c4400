"""Narrow maps that only linear layers write and read, such as the residual stream of inverted residuals.

Nothing between writing and reading looks at single channels, so the split's need not be the dense model's: branch g of
``r`` channels may hold any ``r`` linear combinations of all dense channels. Each branch gets those that its own layers
weigh most, and what is read undivided behind them (a fusion) has its say; the writing layers are solved for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx, nn

from splitfx.carving.division import Divisions
from splitfx.carving.reconstruction.units import Unit, is_sum
from splitfx.ir.graph import module_of

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Stream:
    """``values``: all maps with these channels, sums included; ``writers``: units; ``readers``: divided layers, all
    with the same input channels per branch; ``joint``: layers and fusions that read every branch."""

    values: frozenset[fx.Node]
    writers: tuple[Unit, ...]
    readers: tuple[fx.Node, ...]
    joint: tuple[fx.Node, ...]

    def read(self) -> list[fx.Node]:
        """The maps that layers read."""
        return list(dict.fromkeys(n.all_input_nodes[0] for n in (*self.readers, *self.joint)))


def streams(units: Iterable[Unit], divisions: Divisions, fusions: Collection[fx.Node]) -> list[Stream]:
    """The streams of a split graph whose solvable units are given."""
    layers = [u for u in units if u.node is not None and u.node not in fusions and _plain(u.node)]
    by_end, by_node = {u.end: u for u in layers}, {u.node: u for u in layers}
    found, seen = list[Stream](), set[fx.Node]()
    for unit in layers:
        if unit.end in seen:
            continue
        values = _connected(unit.end)
        seen.update(values)
        made = _stream(values, by_end, by_node, divisions, fusions)
        if made is not None:
            found.append(made)
    return found


def _plain(node: fx.Node) -> bool:
    module = module_of(node)
    return type(module) in CONVS and getattr(module, "groups", 1) == 1


def _connected(start: fx.Node) -> dict[fx.Node, None]:
    """The maps that sums tie to one: operands of the same sums, and the sums."""
    found, left = {start: None}, [start]
    while left:
        node = left.pop()
        sums = [n for n in (node, *node.users) if is_sum(n)]
        for other in (o for s in sums for o in (s, *s.all_input_nodes)):
            if other not in found:
                found[other] = None
                left.append(other)
    return found


def _stream(
    values: Collection[fx.Node],
    by_end: Mapping[fx.Node, Unit],
    by_node: Mapping[fx.Node | None, Unit],
    divisions: Divisions,
    fusions: Collection[fx.Node],
) -> Stream | None:
    if not all(n in by_end or is_sum(n) for n in values):
        return None
    outside = list(dict.fromkeys(r for n in values for r in n.users if r not in values))
    if not all(r in fusions or r in by_node for r in outside):
        return None
    writers = tuple(by_end[n] for n in values if n in by_end)
    readers = tuple(r for r in outside if r not in fusions and r in divisions)
    held = [divisions[w.node].outs for w in writers if w.node is not None and w.node in divisions]
    held += [divisions[r].ins for r in readers]
    sizes = {len(module_of(w.node).weight) for w in writers if w.node is not None}  # type: ignore[union-attr, arg-type]
    if not readers or len(sizes) > 1 or not all(_alike(held[-1], one) for one in held):
        return None
    return Stream(frozenset(values), writers, readers, tuple(r for r in outside if r not in readers))


def _alike(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    """The same channels in the same branches, in whichever order."""
    return len(a) == len(b) and all(np.array_equal(np.sort(x), np.sort(y)) for x, y in zip(a, b, strict=True))
