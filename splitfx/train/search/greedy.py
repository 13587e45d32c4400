"""`search_factors`: per block the largest factor that keeps the accuracy (MalekHosseini et al., Fig. 4).

Blocks are taken in order. For each, the factors are tried in rising order, each from the weights that the blocks before
have ended with; the first that costs more accuracy than the tolerance ends the block, and the last that did not is
fixed. The factors of one block do not depend on each other, so several workers may try them at once: what is selected
is a function of what the trials give alone. A trial is a folder and a line in an Optuna study (`trials`); a search that
is killed goes on with ``resume``.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from torch import fx

from splitfx.errors import PlanError
from splitfx.ground.progress import Say, say, told
from splitfx.ir.graph import copy_graph
from splitfx.train.search.space import SearchSpace, changed, figures, key_of
from splitfx.train.search.study import TEMPORARY, SearchStudy
from splitfx.train.search.trend import Line, SearchResult
from splitfx.train.search.trials import Trials
from splitfx.train.search.tuner import Tuner
from splitfx.train.search.worker import POLL_SECONDS, Limit, Worker, about

ORIGINAL = "original"
DIGITS = 6  # of an accuracy in percent: 93.57 - 93.06 is 0.51
Reference = Literal["original", "block"]


@told
def search_factors(
    space: SearchSpace,
    tuner: Tuner,
    *,
    tolerance: float = 0.5,
    reference: Reference = "original",
    study: SearchStudy = TEMPORARY,
    max_trials: int | None = None,
    max_seconds: float | None = None,
    verify: bool = True,
    progress: Say = True,
) -> SearchResult:
    """The greedy search of paper A (Fig. 4) for the factor of each block.

    A factor is accepted while the accuracy is at most ``tolerance`` points below the ``reference``: that of the
    "original" model, or of what the "block" started from. ``study`` says where the trials are kept, ``max_trials`` and
    ``max_seconds`` end this call early: what it gives is then not ``finished``. ``verify``: hold every split to the
    promise of its pass.

    Raises `PlanError` for settings that make no sense, `TrainingError` for a folder of another search, what ``tuner``
    and `transform` raise, `MissingExtraError` without Optuna.
    """
    if reference not in ("original", "block"):
        raise PlanError(f"reference is 'original' or 'block', not {reference!r}")
    if not tolerance >= 0:
        raise PlanError(f"the tolerance is in points of accuracy, 0 or more; got {tolerance}")
    made_for, limit = about("greedy", space, tuner), Limit(max_trials, max_seconds)
    with study.opened() as folder:
        trials = Trials(folder, made_for, [(1, *space.factors)] * len(space.names()), url=study.database)
        return _Greedy(space, tuner, trials, limit, verify).run(tolerance, reference)


class _Greedy(Worker):
    """One worker of the search."""

    def run(self, tolerance: float, reference: Reference) -> SearchResult:
        names = self.space.names()
        original = self.original(len(names))
        accepted: tuple[int, ...] = (1,) * len(names)
        accuracy, lines, finished = original, list[Line](), True
        for index, name in enumerate(names):
            started = accuracy
            bound = (original if reference == "original" else started) - tolerance
            found, selected = self.block(index, accepted, bound)
            lines.append(Line(index + 1, name, {1: started, **found}, selected))
            if selected is None:
                finished = False
                break
            if selected > 1:
                accepted, accuracy = changed(accepted, index, selected), found[selected]
        split = self.held(accepted)
        if split is None:
            split = copy_graph(self.space.dense)
        return SearchResult(
            self.space.factors, tuple(lines), self.space.plan(accepted), split, original, accuracy,
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

    def block(self, index: int, accepted: tuple[int, ...], bound: float) -> tuple[dict[int, float], int | None]:
        """What each factor gave, and which is selected: None where a limit was reached first."""
        factors = self.space.dividing(index, accepted)
        while True:
            known = self.trials.all()
            found: dict[int, float] = {}
            selected = 1
            for factor in factors:
                trial = known.get(key_of(changed(accepted, index, factor)))
                if trial is None:
                    break
                found[factor] = trial.accuracy
                if round(trial.accuracy, DIGITS) < round(bound, DIGITS):
                    return found, selected
                selected = factor
            else:
                return found, selected
            if self.limit.reached:
                return found, None
            if not self.one([changed(accepted, index, f) for f in factors], accepted, known):
                time.sleep(POLL_SECONDS)  # others are at what is left of this block

    def one(self, trials: list[tuple[int, ...]], accepted: tuple[int, ...], known: dict[str, Any]) -> bool:
        """Do the first of a block's trials that nobody else is at; False where there is none."""
        for trial in trials:
            if key_of(trial) in known:
                continue
            with self.trials.claimed(key_of(trial)) as mine:
                if mine:
                    self.trial(trial, self.held(accepted))
                    return True
        return False

    def held(self, factors: tuple[int, ...]) -> fx.GraphModule | None:
        """The trained split of an accepted plan; None for the model as it is."""
        return self.trials.split(key_of(factors)) if max(factors) > 1 else None
