"""One process that works at a search: what both kinds of search do alike."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.compiler.plan import Plan
from splitfx.compiler.transform import transform
from splitfx.errors import PlanError
from splitfx.ground.digest import digest
from splitfx.ground.progress import say
from splitfx.train.search.inherit import extended
from splitfx.train.search.space import SearchSpace, figures, key_of
from splitfx.train.search.trials import RUN, Trials
from splitfx.train.search.tuner import Tuner

POLL_SECONDS = 0.5  # between looks at what other workers do


def about(method: str, space: SearchSpace, tuner: Tuner, calibration: Any = None) -> dict[str, Any]:
    """What the trials of a search depend on, as plain data. Raises `PlanError` for what is no space or no tuner."""
    if not isinstance(space, SearchSpace):
        raise PlanError("a search looks through a space: give SearchSpace(model, example_inputs)")
    if not isinstance(tuner, Tuner):
        raise PlanError("a search trains by a tuner: give RecipeTuner(train, val) or FunctionTuner(evaluate)")
    inputs = {str(i): one for i, one in enumerate(pytree.tree_leaves(calibration)) if isinstance(one, torch.Tensor)}
    seen = None if calibration is None else digest(inputs)
    return {"method": method, **space.about(), **tuner.about(), "calibration": seen}


class Limit:
    """How much this call may do."""

    def __init__(self, trials: int | None, seconds: float | None) -> None:
        self.trials, self.end = trials, None if seconds is None else time.monotonic() + seconds
        self.done = 0

    @property
    def reached(self) -> bool:
        return (self.trials is not None and self.done >= self.trials) or (
            self.end is not None and time.monotonic() >= self.end
        )


class Worker:
    """One worker of a search: it claims trials, trains them and writes them down."""

    def __init__(
        self,
        space: SearchSpace,
        tuner: Tuner,
        trials: Trials,
        limit: Limit,
        verify: bool,
    ) -> None:
        self.space, self.tuner, self.trials, self.limit = space, tuner, trials, limit
        self.verify = verify

    def trial(self, factors: tuple[int, ...], trained: fx.GraphModule | None = None, costs: bool = False) -> None:
        """Train and score the split by ``factors``, from the weights of ``trained`` where there are some, and write it
        down with its accuracy and, where ``costs``, its multiply-accumulates and peak."""
        key, started = key_of(factors), time.perf_counter()
        told = f"factors {', '.join(map(str, factors))}"
        say(f"{told}: training")
        split = extended(self.space.dense, trained, self.space.step(factors), self.verify)
        self.tune(key, factors, split, started, costs)

    def tune(
        self, key: str, factors: tuple[int, ...], split: fx.GraphModule, started: float, costs: bool = False
    ) -> None:
        """Train and score a split of the trial ``key``, and write it down."""
        if max(factors) == 1:
            accuracy = self.tuner.score(split)
        else:
            accuracy = self.tuner.tuned(split, self.space.model, self.trials.place(key) / RUN)
        cost = figures(split)
        values = [accuracy, *([float(cost.macs), float(cost.peak_bytes)] if costs else [])]
        self.written(key, factors, split, values, started)

    def solve(self, key: str, factors: tuple[int, ...], calibration: Any) -> None:
        """Score the split by ``factors``, solved on inputs without labels, and write it down as the trial ``key``."""
        started = time.perf_counter()
        step = dataclasses.replace(self.space.step(factors), calibration=calibration)  # type: ignore[call-arg]
        split = transform(self.space.dense, Plan([step]), verify=self.verify)
        self.written(key, factors, split, [self.tuner.score(split)], started)

    def written(
        self, key: str, factors: tuple[int, ...], split: fx.GraphModule, values: list[float], started: float
    ) -> None:
        self.trials.finish(key, factors, split, values, time.perf_counter() - started)
        self.limit.done += 1
        say(f"factors {', '.join(map(str, factors))}: accuracy {values[0]:.2f} %")
