"""`search_factors`: per block the largest factor that keeps the accuracy (MalekHosseini et al., Fig. 4).

Blocks are taken in order. For each, the factors are tried in rising order, each from the weights that the blocks before
have ended with; the first that costs more accuracy than the tolerance ends the block, and the last that did not is
fixed. The factors of one block do not depend on each other, so several workers may try them at once: what is selected
is a function of what the trials give alone. A trial is a folder and a line in an Optuna study (`trials`); a search that
is killed goes on with ``resume``.

With inputs to calibrate on, a split is solved on them first (`Group`'s ``calibration``) and scored as it is. That alone
accepts a factor, or rejects one that is far off; what is a little below the bound is trained, from what was solved.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from splitfx.errors import PlanError
from splitfx.ground.progress import Say, say, told
from splitfx.ir.graph import copy_graph
from splitfx.train.search.space import SearchSpace, changed, figures, key_of
from splitfx.train.search.study import TEMPORARY, SearchStudy
from splitfx.train.search.trend import Line, SearchResult
from splitfx.train.search.trials import Found, Trials
from splitfx.train.search.tuner import Tuner
from splitfx.train.search.worker import POLL_SECONDS, Limit, Worker, about

ORIGINAL = "original"
SOLVED = "solved"  # ends the name of a trial that was not trained
DIGITS = 6  # of an accuracy in percent: 93.57 - 93.06 is 0.51
Reference = Literal["original", "block"]


@told
def search_factors(
    space: SearchSpace,
    tuner: Tuner,
    *,
    tolerance: float = 0.5,
    reference: Reference = "original",
    calibration: Any = None,
    near: float = 3.0,
    study: SearchStudy = TEMPORARY,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    verify: bool = True,
    progress: Say = True,
) -> SearchResult:
    """The greedy search of MalekHosseini et al. (Fig. 4) for the factor of each block.

    A factor is accepted while the accuracy is at most ``tolerance`` points below the ``reference``: that of the
    "original" model, or of what the "block" started from. ``study`` says where the trials are kept, ``max_trials`` and
    ``max_seconds`` end this call early: what it gives is then not ``finished``. ``verify``: hold every split to the
    promise of its pass.

    ``calibration``: example inputs, a few hundred without labels, on which each split of the original model is solved
    and scored first. It is trained only where that leaves it below what is accepted, by at most ``near`` points.

    Raises `PlanError` for settings that make no sense, `TrainingError` for a folder of another search, what ``tuner``
    and `transform` raise, `MissingExtraError` without Optuna.
    """
    if reference not in ("original", "block"):
        raise PlanError(f"reference is 'original' or 'block', not {reference!r}")
    if not tolerance >= 0:
        raise PlanError(f"the tolerance is in points of accuracy, 0 or more; got {tolerance}")
    if not near >= 0:
        raise PlanError(f"near is in points of accuracy, 0 or more; got {near}")
    made_for, limit = about("greedy", space, tuner, calibration), Limit(max_trials, max_seconds)
    with study.opened() as folder:
        trials = Trials(folder, made_for, [(1, *space.factors)] * len(space.names()), url=study.database)
        return _Greedy(space, tuner, trials, limit, verify, calibration, near).run(tolerance, reference)


@dataclass
class _Block:
    """What is known of a block's factors: ``found`` up to the first that is not decided, ``missing`` the trials that
    would decide the others, in order."""

    found: dict[int, Found] = field(default_factory=dict)
    selected: int = 1
    missing: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


class _Greedy(Worker):
    """One worker of the search."""

    def __init__(
        self,
        space: SearchSpace,
        tuner: Tuner,
        trials: Trials,
        limit: Limit,
        verify: bool,
        calibration: Any,
        near: float,
    ) -> None:
        super().__init__(space, tuner, trials, limit, verify)
        self.calibration, self.near = calibration, near
        self.read: tuple[str, fx.GraphModule] | None = None

    def run(self, tolerance: float, reference: Reference) -> SearchResult:
        names = self.space.names()
        original = self.original(len(names))
        accepted: tuple[int, ...] = (1,) * len(names)
        best, lines, finished = Found(ORIGINAL, (original,), 0.0), list[Line](), True
        for index, name in enumerate(names):
            bound = (original if reference == "original" else best.accuracy) - tolerance
            block, whole = self.block(index, accepted, best, bound)
            tried = {1: best.accuracy, **{factor: one.accuracy for factor, one in block.found.items()}}
            untrained = tuple(factor for factor, one in block.found.items() if one.key.endswith(SOLVED))
            lines.append(Line(index + 1, name, tried, block.selected if whole else None, untrained))
            if not whole:
                finished = False
                break
            if block.selected > 1:
                accepted, best = changed(accepted, index, block.selected), block.found[block.selected]
        split = self.held(best)
        if split is None:
            split = copy_graph(self.space.dense)
        return SearchResult(
            self.space.factors, tuple(lines), self.space.plan(accepted), split, original, best.accuracy,
            figures(self.space.dense), figures(split), tolerance, reference, finished,
        )  # fmt: skip

    def original(self, count: int) -> float:
        """The accuracy of the model as it is; scored once for all workers."""
        with self.trials.locked(ORIGINAL):
            known = self.trials.all().get(ORIGINAL)
            if known is not None:
                return known.accuracy
            say("scoring the original model")
            work = copy_graph(self.space.dense)
            started = time.perf_counter()
            accuracy = self.tuner.score(work)
            self.trials.finish(ORIGINAL, (1,) * count, work, [accuracy], time.perf_counter() - started)
        return accuracy

    def block(self, index: int, accepted: tuple[int, ...], best: Found, bound: float) -> tuple[_Block, bool]:
        """What each factor gave, and which is selected; False where a limit was reached first."""
        plans = {factor: changed(accepted, index, factor) for factor in self.space.dividing(index, accepted)}
        while True:
            block = self.state(plans, bound)
            if not block.missing:
                return block, True
            if self.limit.reached:
                return block, False
            if not self.one(block.missing, best):
                time.sleep(POLL_SECONDS)  # others are at what is left of this block

    def state(self, plans: Mapping[int, tuple[int, ...]], bound: float) -> _Block:
        """A block as the trials so far have it: a function of them alone."""
        known, block = self.trials.all(), _Block()
        for factor, plan in plans.items():
            decided = self.deciding(key_of(plan), known, bound)
            if isinstance(decided, str):
                block.missing.append((decided, plan))
            elif not block.missing:
                block.found[factor] = decided
                if _below(decided, bound):
                    break
                block.selected = factor
        return block

    def deciding(self, key: str, known: Mapping[str, Found], bound: float) -> Found | str:
        """The trial that says whether a plan is accepted; its name where it is not done yet."""
        if self.calibration is not None:
            solved = known.get(f"{key}-{SOLVED}")
            if solved is None:
                return f"{key}-{SOLVED}"
            if not _below(solved, bound) or _below(solved, bound - self.near):
                return solved
        return known.get(key, key)

    def one(self, missing: list[tuple[str, tuple[int, ...]]], best: Found) -> bool:
        """Do the first of a block's trials that nobody else is at; False where there is none."""
        for key, plan in missing:
            with self.trials.claimed(key) as mine:
                if not mine:
                    continue
                if key.endswith(SOLVED):
                    self.solve(key, plan, self.calibration)
                elif self.calibration is not None:
                    self.tune(key, plan, self.trials.split(f"{key}-{SOLVED}"), time.perf_counter())
                else:
                    self.trial(plan, self.held(best))
                return True
        return False

    def held(self, best: Found) -> fx.GraphModule | None:
        """The split of the trial that was accepted last, which all trials of a block begin with; None for the model as
        it is."""
        if best.key == ORIGINAL:
            return None
        if self.read is None or self.read[0] != best.key:
            self.read = best.key, self.trials.split(best.key)
        return self.read[1]


def _below(found: Found, bound: float) -> bool:
    return round(found.accuracy, DIGITS) < round(bound, DIGITS)
