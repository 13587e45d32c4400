"""The other search: not one plan within a tolerance, but the plans between which accuracy and cost are a choice.

Optuna's multi-objective sampler (a tree-structured Parzen estimator) proposes the factors of all blocks at once; each
trial is tuned from the unsplit model's weights, and has an accuracy, multiply-accumulates and a peak. The first
proposals are not drawn: they follow the weight energy that a split keeps, from the unsplit model on, always the step
that saves most work for the weight it loses.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import fx

from splitfx.errors import PlanError
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, told
from splitfx.ground.table import number, size, table
from splitfx.report.plots.picture import chart
from splitfx.train.search.preview import preview_search
from splitfx.train.search.space import SearchSpace, figures, key_of
from splitfx.train.search.study import TEMPORARY, SearchStudy
from splitfx.train.search.trend import Figures
from splitfx.train.search.trials import Found, Trials
from splitfx.train.search.tuner import Tuner
from splitfx.train.search.worker import POLL_SECONDS, Limit, Worker, about

ASKED = 10  # proposals of the sampler's that are known already before another plan is drawn
DRAWN = 100_000  # plans among which that one is
DIRECTIONS = ("maximize", "minimize", "minimize")  # accuracy, MACs, peak


@dataclass(frozen=True)
class Candidate:
    """One plan of a front: its factors, its accuracy in percent and what it costs."""

    factors: tuple[int, ...]
    accuracy: float
    figures: Figures

    def beats(self, other: Candidate) -> bool:
        """At least as good in everything, and better in something."""
        mine = (self.accuracy, -self.figures.macs, -self.figures.peak_bytes)
        theirs = (other.accuracy, -other.figures.macs, -other.figures.peak_bytes)
        return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class SearchFront(Shown):
    """What `search_front` found: all it tried, and the plans that no other beats."""

    tried: tuple[Candidate, ...]
    best: tuple[Candidate, ...]
    splits: Callable[[tuple[int, ...]], fx.GraphModule]

    def split(self, factors: Sequence[int]) -> fx.GraphModule:
        """The tuned split of a plan that was tried. Raises `PlanError`."""
        if tuple(factors) not in {one.factors for one in self.tried}:
            raise PlanError(f"factors {tuple(factors)} were not tried")
        return self.splits(tuple(factors))

    def to_json(self) -> str:
        plain = lambda ones: [{**vars(one), "figures": vars(one.figures)} for one in ones]  # noqa: E731
        return json.dumps({"best": plain(self.best), "tried": plain(self.tried)}, indent=2)

    def __str__(self) -> str:
        rows = [
            [", ".join(map(str, one.factors)), f"{one.accuracy:.2f} %", number(one.figures.macs),
             number(one.figures.params), size(one.figures.peak_bytes)]
            for one in self.best
        ]  # fmt: skip
        head = ["factors", "accuracy", "MACs", "parameters", "peak"]
        return (
            f"{table(head, rows)}\n\n{len(self.best)} of {len(self.tried)} plans that were tried; no other beats these"
        )

    def plot(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Accuracy over MACs, the front as a line. Raises `MissingExtraError` without matplotlib."""
        giga = lambda ones: [one.figures.macs / 1e9 for one in ones]  # noqa: E731
        with chart(path, overwrite, "multiply-accumulates [G]") as axes:
            axes.plot(giga(self.tried), [one.accuracy for one in self.tried], "o", color="0.7", label="tried")
            front = sorted(self.best, key=lambda one: one.figures.macs)
            axes.plot(giga(front), [one.accuracy for one in front], "o-", label="no other is better")
            for one in front:
                place = (one.figures.macs / 1e9, one.accuracy)
                axes.annotate(key_of(one.factors), place, (4, -11), textcoords="offset points", fontsize=8)


@told
def search_front(
    space: SearchSpace,
    tuner: Tuner,
    *,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    study: SearchStudy = TEMPORARY,
    verify: bool = True,
    progress: Say = True,
) -> SearchFront:
    """The plans between which accuracy, multiply-accumulates and peak are a choice, by Optuna's multi-objective
    sampler.

    ``max_trials`` or ``max_seconds`` say when to stop, for a front has no end of its own; ``study`` where the trials
    are kept. ``verify``: hold every split to the promise of its pass. Raises what `search_factors` raises.
    """
    if max_trials is None and max_seconds is None:
        raise PlanError("a front has no end of its own: give max_trials or max_seconds")
    made_for, limit = about("pareto", space, tuner), Limit(max_trials, max_seconds)
    with ExitStack() as held:
        folder = held.enter_context(study.opened())
        choices = [(1, *able) for able in space.choices()]
        trials = Trials(folder, made_for, choices, DIRECTIONS, study.database, seed=tuner.seed)
        front = _Front(space, tuner, trials, limit, verify).run()
        weakref.finalize(front, held.pop_all().close)  # it reads its splits when they are asked for
        return front


class _Front(Worker):
    """One worker of such a search."""

    def run(self) -> SearchFront:
        first = self.ranked()
        self.unreal: set[tuple[int, ...]] = set()  # plans that are another one, see `SearchSpace.real`
        while not self.limit.reached:
            factors = self.proposed(first)
            if factors is None:
                break  # there is nothing left to try
            if not self.claimed(factors):
                time.sleep(POLL_SECONDS)  # another worker is at it
        tried = [self.candidate(found) for found in self.trials.all().values()]
        best = [one for one in tried if not any(other.beats(one) for other in tried)]
        order = lambda one: (one.figures.macs, one.factors)  # noqa: E731
        return SearchFront(
            tuple(sorted(tried, key=order)), tuple(sorted(best, key=order)), lambda f: self.trials.split(key_of(f))
        )

    def proposed(self, first: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """A plan that is not known yet; None where all are."""
        done = self.trials.all()
        while first:
            if key_of(factors := self.space.real(first.pop(0))) not in done:
                return factors
        for _ in range(ASKED):
            asked = self.trials.study.ask(self.trials.distributions())
            self.trials.study.tell(asked, state=_failed())  # what is found is a line of its own: see `Trials.finish`
            if key_of(factors := self.space.real(tuple(asked.params.values()))) not in done:
                return factors
        rest = [
            plan
            for plan in itertools.islice(itertools.product(*self.trials.choices), DRAWN)
            if key_of(plan) not in done and plan not in self.unreal
        ]
        random.Random(len(done)).shuffle(rest)
        for plan in rest:
            if key_of(factors := self.space.real(plan)) not in done:
                return factors
            self.unreal.add(plan)
        return None

    def claimed(self, factors: tuple[int, ...]) -> bool:
        """Do the trial of a plan; False where it is known, or another worker is at it."""
        with self.trials.claimed(key_of(factors)) as mine:
            if mine:
                self.trial(factors, costs=True)
            return mine

    def candidate(self, found: Found) -> Candidate:
        factors = tuple(map(int, found.key.split("-")))
        return Candidate(factors, found.accuracy, figures(self.trials.split(found.key)))

    def ranked(self) -> list[tuple[int, ...]]:
        """Plans from the unsplit model on, each one step further: the one that saves most work for the weight lost."""
        rows = {(block, factor): (one.macs, kept) for block, _, factor, one, kept in preview_search(self.space).rows}
        whole = figures(self.space.dense).macs
        at = lambda block, factor: rows[block, factor] if factor > 1 else (whole, 1.0)  # noqa: E731
        found = [(1,) * len(self.space.names())]
        while True:
            steps = []
            for index, factor in enumerate(found[-1]):
                choices = self.trials.choices[index]
                if factor == choices[-1]:
                    continue
                further = choices[choices.index(factor) + 1]
                (work, kept), (less, left) = at(index + 1, factor), at(index + 1, further)
                steps.append(((work - less) / max(kept - left, 1e-12), index, further))
            if not steps:
                return found
            _, index, further = max(steps)
            found.append((*found[-1][:index], further, *found[-1][index + 1 :]))


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL
