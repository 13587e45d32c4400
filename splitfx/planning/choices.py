"""What `splitfx.plan` found: plans with their figures, a table of them, and the best one as a file that says why."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx

from splitfx.compiler.pipeline import Figures
from splitfx.compiler.plan import Plan
from splitfx.errors import PlanError
from splitfx.ground.files import written_whole
from splitfx.ground.notebook import Shown
from splitfx.ground.table import number, seconds, size, table, wrap
from splitfx.ground.turns import Ratio
from splitfx.planning.goals import Goals
from splitfx.report.explanation import ratio

_NOTHING = (
    "no plan was found: nothing that was tried changes this model. transform with one of `splitfx passes` says why, "
    "layer by layer"
)


@dataclass(frozen=True)
class Choice:
    """One plan. ``figures`` are counted; ``seconds`` is a median measured here, None where that was not done.

    ``time``: as a ratio to the model as it is, measured in turn with it, ± ``spread``. ``same``: the same function;
    else it must be trained; ``accuracy`` in percent is what data gave, None where that was not done, and ``learned``
    how: "solved" or "trained", and how far. ``missed``: the goals that it does not keep, in words; empty where it keeps
    them all. ``split``: its graph, with those weights.
    """

    name: str
    why: str
    plan: Plan | None
    figures: Figures
    seconds: float | None
    time: float | None
    same: bool
    accuracy: float | None = None
    learned: str = ""
    missed: tuple[str, ...] = ()
    split: fx.GraphModule | None = field(default=None, repr=False, compare=False)
    spread: float = 0.0

    @property
    def keeps(self) -> bool:
        return not self.missed

    @property
    def function(self) -> str:
        """What became of the model's function, in words."""
        if self.same:
            return "the same"
        return self.learned.partition(",")[0].partition(" (")[0] or "to be trained"


@dataclass(frozen=True)
class Plans(Shown):
    """The model as it is, plans worth a choice, the best first, and what was tried and could not be had.

    ``best``: the first that keeps every goal. ``complete`` is False where the time ran out before all was looked at.
    """

    model: str
    inputs: str
    goals: Goals
    now: Choice
    choices: tuple[Choice, ...]
    refused: tuple[tuple[str, str], ...] = ()
    complete: bool = True

    @property
    def best(self) -> Choice:
        """Raises `PlanError`, with what misses least, where no plan keeps every goal."""
        found = next((one for one in self.choices if one.keeps), None)
        if found is None:
            nearest = (
                f"; the nearest is {self.choices[0].name}: {', '.join(self.choices[0].missed)}" if self.choices else ""
            )
            why = f"; {self.refused[0][0]}: {self.refused[0][1]}" if self.refused else ""
            raise PlanError(f"no plan was found for {self.goals.words}{nearest}{why}")
        return found

    @property
    def plan(self) -> Plan:
        """The plan of ``best``; raises as it does."""
        found = self.best.plan
        assert found is not None
        return found

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the best plan as a file for `transform`, with comments that say why. Raises `PlanError`."""
        text = self.to_toml()
        with written_whole(path, overwrite=overwrite, error=PlanError) as draft:
            draft.write_text(text, encoding="utf-8", newline="\n")

    def to_toml(self) -> str:
        best, now = self.best, self.now
        lines = [
            f"{self.model} on {self.inputs}: {self.goals.words}",
            f"{best.name}: {best.why}",
            f"peak {size(now.figures.peak_bytes)} -> {size(best.figures.peak_bytes)}",
            f"MACs {number(now.figures.macs)} -> {number(best.figures.macs)}",
        ]
        if now.seconds is not None and best.seconds is not None:
            lines.append(f"time {seconds(now.seconds)} -> {seconds(best.seconds)}, measured where this was written")
        if best.function == "to be trained":
            lines.append("has fewer connections than the model: train it (splitfx finetune) before you use it")
        if best.learned:
            lines.append(f"accuracy {now.accuracy:.2f} % -> {best.accuracy:.2f} %, {best.learned}; those weights")
            lines.append(
                "are in its split (--save FOLDER); transform with this file gives the model's own, to be trained"
            )
        others = [one for one in self.choices if one.keeps and one is not best]
        lines += [f"also keeps the budget: {one.name}, {_time(one)}" for one in others]
        comments = "".join(f"# {' '.join(line.split())}\n" for line in lines)
        return comments + self.plan.to_toml()

    def to_json(self) -> str:
        return json.dumps(
            {
                "model": self.model,
                "inputs": self.inputs,
                "goals": asdict(self.goals),
                "now": _plain(self.now),
                "choices": [_plain(one) for one in self.choices],
                "refused": [{"plan": name, "why": why} for name, why in self.refused],
                "complete": self.complete,
            },
            indent=2,
        )

    def __str__(self) -> str:
        trained = any(one.accuracy is not None for one in (self.now, *self.choices))
        head = ["", "plan", "peak", "MACs", "time", *(["accuracy"] if trained else []), "keeps", "function"]
        rows = [self._row("", self.now, trained)]
        first = next((one for one in self.choices if one.keeps), None)
        rows += [self._row("*" if one is first else "", one, trained) for one in self.choices]
        lines = [
            wrap(f"{self.model} on {self.inputs}: {self.goals.words}"),
            "",
            table(head, rows, left=(0, 1, len(head) - 1)),
        ]
        lines += ["", *(wrap(f"{one.name}: {one.why}{'; ' * bool(one.learned)}{one.learned}") for one in self.choices)]
        lines += [wrap(f"{name} cannot be had: {why}") for name, why in self.refused]
        if first is None:
            lines.append(wrap("no plan keeps it" if self.choices or self.refused else _NOTHING))
        lines += [] if self.complete else ["the time ran out before every plan was looked at: give more seconds"]
        return "\n".join(lines)

    def _row(self, mark: str, one: Choice, trained: bool) -> list[str | None]:
        now = self.now.figures
        figures = one.figures
        keeps = "" if one is self.now else "yes" if one.keeps else "no"
        accuracy = None if one.accuracy is None else f"{one.accuracy:.2f} %"
        return [
            mark,
            one.name,
            f"{size(figures.peak_bytes)}{_change(now.peak_bytes, figures.peak_bytes)}",
            f"{number(figures.macs)}{_change(now.macs, figures.macs)}",
            _time(one),
            *([accuracy] if trained else []),
            keeps,
            "" if one is self.now else one.function,
        ]


def _change(before: int, after: int) -> str:
    return "" if before == after else f" {ratio(before, after)}"


def _time(one: Choice) -> str:
    if one.seconds is None:
        return "not measured"
    if one.time is None:
        return seconds(one.seconds)
    return f"{seconds(one.seconds)} {Ratio(one.time, one.spread)}"


def _plain(one: Choice) -> dict[str, Any]:
    return {
        "name": one.name,
        "why": one.why,
        "plan": None if one.plan is None else one.plan.to_toml(),
        "figures": asdict(one.figures),
        "seconds": one.seconds,
        "time": one.time,
        "time_spread": one.spread,
        "same_function": one.same,
        "accuracy": one.accuracy,
        "learned": one.learned,
        "missed": list(one.missed),
    }
