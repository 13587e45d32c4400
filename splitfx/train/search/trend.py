"""What a search found: the trend table of MalekHosseini et al. (its Table 1), the plan, the split."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from splitfx.compiler.plan import Plan
from splitfx.ground.notebook import Shown
from splitfx.ground.table import number, size, table
from splitfx.report.plots.picture import chart


@dataclass(frozen=True)
class Figures:
    """What a graph costs: multiply-accumulates, parameters, peak bytes."""

    macs: int
    params: int
    peak_bytes: int


@dataclass(frozen=True)
class Line:
    """One block of the search: the accuracy of each factor that was tried, 1 being what the block before it selected;
    ``selected`` is None while the block is not decided; ``untrained``: factors whose split was solved alone."""

    block: int
    name: str
    accuracy: dict[int, float]
    selected: int | None
    untrained: tuple[int, ...] = ()


@dataclass(frozen=True)
class SearchResult(Shown):
    """A search: its lines, the plan they give and the trained split; ``finished`` is False where a limit ended it."""

    factors: tuple[int, ...]
    lines: tuple[Line, ...]
    plan: Plan
    split: fx.GraphModule = field(compare=False)
    original: float
    accuracy: float
    before: Figures
    after: Figures
    tolerance: float
    reference: str
    finished: bool

    @property
    def selected(self) -> tuple[int, ...]:
        """The factor of each block that was looked at, 1 where none was accepted or the search ended in it."""
        return tuple(line.selected or 1 for line in self.lines)

    def trend(self) -> str:
        """Accuracy in percent, blocks as rows and factors as columns; what was selected, and what was not trained, is
        marked."""
        rows = []
        for line in self.lines:
            cells = [
                f"{'~' if f in line.untrained else ''}{line.accuracy[f]:.2f}{'*' if line.selected == f else ' '}"
                if f in line.accuracy
                else None
                for f in (1, *self.factors)
            ]
            rows.append([f"block {line.block}", line.name, *cells])
        return table(["", "layers", *(f"{f} " for f in (1, *self.factors))], rows, left=(0, 1))

    def to_json(self) -> str:
        plain: dict[str, Any] = {
            "factors": self.factors,
            "selected": self.selected,
            "original": self.original,
            "accuracy": self.accuracy,
            "tolerance": self.tolerance,
            "reference": self.reference,
            "finished": self.finished,
            "plan": self.plan.to_toml(),
            "before": vars(self.before),
            "after": vars(self.after),
            "lines": [{**vars(line), "accuracy": {str(f): a for f, a in line.accuracy.items()}} for line in self.lines],
        }
        return json.dumps(plain, indent=2)

    def __str__(self) -> str:
        head = ["", "accuracy", "MACs", "parameters", "peak"]
        rows = [
            [name, f"{accuracy:.2f} %", number(one.macs), number(one.params), size(one.peak_bytes)]
            for name, accuracy, one in (
                ("original", self.original, self.before),
                (f"factors {', '.join(map(str, self.selected))}", self.accuracy, self.after),
            )
        ]
        rule = (
            f"at most {self.tolerance:g} points below the {'original' if self.reference == 'original' else 'block'}'s"
        )
        untrained = any(line.untrained for line in self.lines)
        solved = "\n~ solved on the calibration, not trained" if untrained else ""
        state = "" if self.finished else "\nstopped at a limit: give resume=True to go on"
        return f"{self.trend()}\n* selected: {rule} accuracy{solved}\n\n{table(head, rows)}{state}"

    def plot(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Accuracy over the factor, one line per block. Raises `MissingExtraError` without matplotlib."""
        with chart(path, overwrite, "factor (branches of the block)") as axes:
            for line in self.lines:
                tried = sorted(line.accuracy)
                later = (line.block - 1) / len(self.lines)  # thinner, so that what lies beneath shows
                width: dict[str, Any] = {"lw": 4 - 2.5 * later, "ms": 9 - 4 * later, "marker": "o"}
                drawn = axes.plot(tried, [line.accuracy[f] for f in tried], label=f"block {line.block}", **width)
                if line.selected:
                    color, ring = drawn[0].get_color(), 17 - 5 * later
                    axes.plot([line.selected], [line.accuracy[line.selected]], "o", ms=ring, mfc="none", color=color)
            axes.plot([], [], "o", ms=12, mfc="none", color="0.4", label="selected")
            if self.reference == "original":  # a bound that moves from block to block is no line
                bound = self.original - self.tolerance
                axes.axhline(bound, color="0.5", ls="--", lw=1, label="original − tolerance")
            axes.set(xticks=(1, *self.factors))
