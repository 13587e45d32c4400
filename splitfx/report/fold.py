"""Rows of a profile as few lines: for the table, which has to fit a screen, and for the bars of the picture.

Nothing is dropped: a line that stands for several operations sums up their parameters and MACs, shows the
most that is alive in it, and a sentence says what was folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitfx.report.profile import Row

_MOST = "alive is the most in a line"


@dataclass(frozen=True)
class Line:
    """One row, or neighbours; ``shown`` is the row whose result stands for the line's."""

    layer: str
    op: str
    rows: tuple[Row, ...]
    shown: Row

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shown.shape

    @property
    def params(self) -> int:
        return sum(row.params for row in self.rows)

    @property
    def macs(self) -> int:
        return sum(row.macs for row in self.rows)

    @property
    def bytes(self) -> int:
        return self.shown.bytes

    @property
    def live_bytes(self) -> int:
        return max(row.live_bytes for row in self.rows)


def fold(rows: Sequence[Row], limit: int | None) -> tuple[list[Line], str]:
    """Rows as at most ``limit`` lines where the layers' paths allow it, and a sentence on what was folded.

    First every row; else rows without parameters and MACs join the layer before them; else all rows of a
    module become one line, at the greatest depth of the module tree that is short enough.
    """
    every = [Line(row.layer, row.op, (row,), row) for row in rows]
    if limit is None or len(every) <= limit:
        return every, ""
    weighted = _join(rows, [row.layer if _weighted(row) else None for row in rows])
    if len(weighted) <= limit:
        folded = len(rows) - len(weighted)
        return weighted, f"{folded} operations without weights are folded into the layer before them; {_MOST}"
    depths = range(max(row.layer.count(".") for row in rows), 0, -1)
    groups = [_join(rows, [_module(row, depth) for row in rows], by_name=True) for depth in depths]
    shown = next((lines for lines in groups if len(lines) <= limit), None)
    if shown is not None:
        return shown, f"{len(rows)} operations are folded into {len(shown)} lines, by module; {_MOST}"
    shortest = min([weighted, *groups], key=len)
    head, tail = shortest[: limit - 1], shortest[limit - 1 :]
    left = tuple(row for line in tail for row in line.rows)
    rest = Line(f"{len(tail)} more lines", f"{len(left)} ops", left, left[-1])
    return [*head, rest], f"the last line sums up {len(tail)} lines; table(rows=None) shows every operation"


def by_depth(rows: Sequence[Row], depth: int) -> tuple[list[Line], str]:
    """A line for every module at ``depth`` levels of the module tree, from 1; and what was folded."""
    lines = _join(rows, [_module(row, depth) for row in rows], by_name=True)
    return lines, f"{len(rows)} operations are folded into {len(lines)} lines, by module; {_MOST}"


def _module(row: Row, depth: int) -> str:
    return ".".join(row.layer.split(".")[:depth])


def _weighted(row: Row) -> bool:
    return row.macs > 0 or row.params > 0 or row.op == "input"


def _join(rows: Sequence[Row], names: Sequence[str | None], by_name: bool = False) -> list[Line]:
    """Neighbouring rows with one name, or with none of their own, on one line."""
    parts: list[tuple[str, list[Row]]] = []
    for row, name in zip(rows, names, strict=True):
        if parts and (name is None or (by_name and parts[-1][0] == name)):
            parts[-1][1].append(row)
        else:
            parts.append((row.layer if name is None else name, [row]))
    whole = [len(same) > 1 and by_name for _, same in parts]
    return [
        Line(name, f"{len(same)} ops" if module else same[0].op, tuple(same), same[-1 if module else 0])
        for (name, same), module in zip(parts, whole, strict=True)
    ]
