"""A search before it starts: its trials with their figures, without training."""

from __future__ import annotations

import json
from dataclasses import dataclass

from splitfx.compiler.plan import Plan
from splitfx.compiler.transform import transform
from splitfx.ground.notebook import Shown
from splitfx.ground.table import number, size, table
from splitfx.train.search.inherit import kept_weight
from splitfx.train.search.space import SearchSpace, changed, figures
from splitfx.train.search.trend import Figures


@dataclass(frozen=True)
class SearchPreview(Shown):
    """What a search may try: per block and factor that divides it (the others 1) the figures, and the share of the
    convs' weight energy that is kept. ``most`` is the largest number of trials."""

    rows: tuple[tuple[int, str, int, Figures, float], ...]
    before: Figures
    most: int

    def to_json(self) -> str:
        rows = [
            {"block": b, "layers": n, "factor": f, **vars(figures), "kept_weight": kept}
            for b, n, f, figures, kept in self.rows
        ]
        return json.dumps({"trials": rows, "before": vars(self.before), "most": self.most}, indent=2)

    def __str__(self) -> str:
        head = ["", "layers", "factor", "MACs", "parameters", "peak", "kept weight"]
        lines: list[list[object]] = [["original", "", 1, *_words(self.before), "100.0 %"]]
        lines += [[f"block {b}", n, f, *_words(one), f"{kept:.1%}"] for b, n, f, one, kept in self.rows]
        rest = f"at most {self.most} trials; each block ends at its first factor that costs too much accuracy"
        return f"{table(head, lines, left=(0, 1))}\n\n{rest}"


def preview_search(space: SearchSpace) -> SearchPreview:
    """The trials of a search with their figures; nothing is trained."""
    names = space.names()
    rows = []
    for index, (name, able) in enumerate(zip(names, space.choices(), strict=True)):
        for factor in able:
            split = transform(space.dense, Plan([space.step(changed((1,) * len(names), index, factor))]), verify=False)
            rows.append((index + 1, name, factor, figures(split), kept_weight(space.dense, split)))
    return SearchPreview(tuple(rows), figures(space.dense), len(rows))


def _words(one: Figures) -> list[str]:
    return [number(one.macs), number(one.params), size(one.peak_bytes)]
