"""`search_factors`: per block the largest factor that keeps the accuracy (MalekHosseini et al., Fig. 4).

Blocks are taken in order. For each, the factors are tried in rising order, each from the weights that the blocks before
have ended with; the first that costs more accuracy than the tolerance ends the block, and the last that did not is
fixed. The factors of one block do not depend on each other, so several workers may try them at once: what is selected
is a function of what the trials give alone. A trial is a folder and a line in an Optuna study (`trials`); a search that
is killed goes on with ``resume``.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from splitfx.errors import PlanError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import copy_graph, is_canonical
from splitfx.train import checkpoint
from splitfx.train.fit import Data
from splitfx.train.processes import launched
from splitfx.train.recipe import Recipe
from splitfx.train.search.front import DIRECTIONS, Pareto
from splitfx.train.search.inherit import extended
from splitfx.train.search.preview import preview
from splitfx.train.search.space import POLL_SECONDS, Evaluate, Limit, Space, Tuner, changed, figures, key_of
from splitfx.train.search.trend import Line, SearchResult
from splitfx.train.search.trials import RUN, Trials

FACTORS = (2, 4, 6, 8)
ORIGINAL = "original"
DIGITS = 6  # of an accuracy in percent: 93.57 - 93.06 is 0.51


def search_factors(
    model: nn.Module,
    evaluate: Evaluate | None = None,
    *,
    tune: Callable[[fx.GraphModule], Any] | None = None,
    train: Data | None = None,
    val: Data | None = None,
    recipe: Recipe | str = "finetune",
    example_inputs: Any = None,
    factors: Sequence[int] = FACTORS,
    tolerance: float = 0.5,
    reference: Literal["original", "block"] = "original",
    options: dict[str, Any] | None = None,
    method: Literal["greedy", "pareto"] = "greedy",
    dry_run: bool = False,
    folder: str | Path | None = None,
    resume: bool = False,
    study: str = "",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    device: str = "auto",
    workers: int = 0,
    verify: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Any:
    """The greedy search of paper A (Fig. 4) for the factor of each block.

    Either ``evaluate(split)`` gives an accuracy in percent and ``tune(split)`` trains in place (none: no training), or
    ``train`` and ``val`` are data sets and `finetune` does both by ``recipe``, with ``model`` as teacher. A factor is
    accepted while the accuracy is at most ``tolerance`` points below the ``reference``: that of the "original" model,
    or of what the "block" started from. ``options``: those of `Group`, such as {"fusion": "keep"}.

    ``method="pareto"`` looks for plans between which accuracy, multiply-accumulates and peak are a choice, by Optuna's
    multi-objective sampler (tolerance and reference do not matter then): give max_trials or max_seconds, and get a
    `SearchFront`. ``dry_run`` trains nothing and gives a `Preview` of the trials.

    ``folder`` holds the trials, for ``resume`` and for several workers: start the same call in several processes, with
    ``resume``, and they share the work. ``study``: the URL of a database of Optuna's for what is otherwise
    ``study.journal``. ``max_trials`` and ``max_seconds`` end a search early; what it gives is then not ``finished``.

    Never changes ``model``. Raises `PlanError` for a model without blocks and for factors that make no sense,
    `TrainingError` for a folder of another search, what `finetune` and `transform` raise, `MissingExtraError`.
    """
    if reference not in ("original", "block"):
        raise PlanError(f"reference is 'original' or 'block', not {reference!r}")
    if method not in ("greedy", "pareto"):
        raise PlanError(f"method is 'greedy' or 'pareto', not {method!r}")
    if not tolerance >= 0:
        raise PlanError(f"the tolerance is in points of accuracy, 0 or more; got {tolerance}")
    if method == "pareto" and max_trials is None and max_seconds is None:
        raise PlanError("a front has no end of its own: give max_trials or max_seconds")
    chosen = _factors(factors)
    if dry_run:
        return preview(Space(_dense(model, example_inputs), dict(options or {}), chosen))
    if folder is None and (resume or study):
        raise PlanError("a search that goes on, or whose study is in a database, needs a folder: it holds the weights")
    if launched()[1] > 1:
        raise PlanError(
            "a search is not run by torchrun: start it several times on one folder with resume=True (--resume), each "
            "with a GPU of its own (CUDA_VISIBLE_DEVICES), and they share the trials"
        )
    tuner = Tuner(model, evaluate, tune, train, val, recipe, device, workers)
    space = Space(_dense(model, example_inputs), dict(options or {}), chosen)
    about = {"method": method, **space.about(), **tuner.about()}
    limit = Limit(max_trials, max_seconds)
    with ExitStack() as held:
        place = _folder(folder, resume, held)
        if method == "pareto":
            choices = [(1, *able) for able in space.choices()]
            trials = Trials(place, about, choices, DIRECTIONS, study, seed=tuner.recipe.seed)
            front = Pareto(space, tuner, trials, limit, verify, progress).run()
            weakref.finalize(front, held.pop_all().close)  # it reads its splits when they are asked for
            return front
        trials = Trials(place, about, [(1, *chosen)] * len(space.names()), url=study)
        return _Greedy(space, tuner, trials, limit, tolerance, reference, verify, progress).run()


class _Greedy:
    """One worker of a search."""

    def __init__(
        self,
        space: Space,
        tuner: Tuner,
        trials: Trials,
        limit: Limit,
        tolerance: float,
        reference: str,
        verify: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.space, self.tuner, self.trials, self.limit = space, tuner, trials, limit
        self.tolerance, self.reference, self.verify, self.progress = tolerance, reference, verify, progress

    def run(self) -> SearchResult:
        names = self.space.names()
        original = self.original(len(names))
        accepted: tuple[int, ...] = (1,) * len(names)
        accuracy, lines, finished = original, list[Line](), True
        for index, name in enumerate(names):
            started = accuracy
            bound = (original if self.reference == "original" else started) - self.tolerance
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
            figures(self.space.dense), figures(split), self.tolerance, self.reference, finished,
        )  # fmt: skip

    def original(self, count: int) -> float:
        """The accuracy of the model as it is; scored once for all workers."""
        with self.trials.locked(ORIGINAL):
            known = self.trials.all().get(ORIGINAL)
            if known is not None:
                return known.accuracy
            self.progress("scoring the original model")
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
                    self.trial(trial, accepted)
                    return True
        return False

    def trial(self, factors: tuple[int, ...], accepted: tuple[int, ...]) -> None:
        key, started = key_of(factors), time.perf_counter()
        self.progress(f"factors {', '.join(map(str, factors))}: training")
        split = extended(self.space.dense, self.held(accepted), self.space.step(factors), self.verify)
        accuracy = self.tuner.tuned(split, self.trials.place(key) / RUN)
        self.trials.finish(key, factors, split, [accuracy], time.perf_counter() - started)
        self.limit.done += 1
        self.progress(f"factors {', '.join(map(str, factors))}: accuracy {accuracy:.2f} %")

    def held(self, factors: tuple[int, ...]) -> fx.GraphModule | None:
        """The trained split of an accepted plan; None for the model as it is."""
        return self.trials.split(key_of(factors)) if max(factors) > 1 else None


def _dense(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    if is_canonical(model) and example_inputs is None:
        assert isinstance(model, fx.GraphModule)
        return copy_graph(model)
    if example_inputs is None:
        raise PlanError("no input sizes: give example_inputs")
    return trace(model, example_inputs)


def _factors(factors: Sequence[int]) -> tuple[int, ...]:
    found = tuple(factors)
    if not found or any(type(f) is not int or f < 2 for f in found) or list(found) != sorted(set(found)):
        raise PlanError(f"factors are whole numbers from 2 on in rising order, such as (2, 4, 6, 8); got {factors!r}")
    return found


def _folder(folder: str | Path | None, resume: bool, held: ExitStack) -> Path:
    """Where the trials are; without a folder, somewhere while the result is ``held``."""
    if folder is None:
        return Path(held.enter_context(tempfile.TemporaryDirectory(prefix="splitfx-")))
    checkpoint.open_folder(Path(folder), resume, "search")
    return Path(folder)
