"""`plan`: looks over passes and their compositions for what keeps a budget. Facts first, then measurements on this
machine, and training only where an accuracy is asked for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import fx, nn

from splitfx.compiler.pipeline import figures, run_plan
from splitfx.compiler.plan import Plan
from splitfx.errors import PlanError, SplitfxError
from splitfx.frontend.trace import trace
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import dims, number, seconds, size
from splitfx.ir.graph import TensorSpec, info, is_canonical, random_inputs
from splitfx.ir.modes import in_eval
from splitfx.planning.candidates import Candidate, candidates
from splitfx.planning.choices import Choice, Plans
from splitfx.planning.goals import Amount, Goals, goals
from splitfx.runtime.measuring import alternate, measure

RUNS = 7  # timed calls of each plan, in turn with the model


@told
def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    peak: Amount = None,
    latency: Amount = None,
    macs: Amount = None,
    accuracy_drop: float | None = None,
    train: Any = None,
    val: Any = None,
    recipe: Any = "finetune",
    device: str = "cpu",
    max_seconds: float = 300.0,
    progress: Say = True,
) -> Plans:
    """Plans that bring ``model`` below a budget, the best first; ``str()`` is a table.

    ``peak``: the most bytes of live tensors, inputs counted and parameters not, as a number, "64 MiB", "0.5x" or
    "least". ``latency``: the most seconds of a call on ``device``, as a number, "20 ms" or "0.8x". ``macs``: the most
    multiply-accumulates, as a number, "1.5 G" or "0.5x". Several may be given; without any, what can be had is shown.

    Plans that compute the same function come before those that must be trained. Peaks and MACs are counted, times
    measured here, in turn with the model. With ``accuracy_drop`` (in points of top-1 accuracy), ``train`` and ``val``
    (data sets as for `finetune`), what must be trained is trained by ``recipe`` and measured on ``val``, the least
    change first, until one keeps the accuracy. Looking ends after about ``max_seconds``.

    Raises `TraceError`, and `PlanError` for a budget that cannot be read. Where none is kept, ``Plans.best`` raises and
    the table says what comes nearest.
    """
    if accuracy_drop is not None and (train is None or val is None):
        raise PlanError("accuracy_drop needs data to train and to measure on: give train= and val= as well")
    end = time.perf_counter() + max_seconds
    graph: Any = model if is_canonical(model) and example_inputs is None else trace(model, example_inputs)
    with in_eval(graph):
        search = _Search(graph, device, end)
        now = search.now
        asked = goals(
            peak, latency, macs, accuracy_drop, (now.figures.peak_bytes, now.seconds or 0.0, now.figures.macs)
        )
        found = search.choices(asked)
    if accuracy_drop is not None:
        from splitfx.planning.training import with_accuracy

        now, found = with_accuracy(graph, now, found, asked, (train, val, recipe), end)
    kept = sorted(_worth_a_choice(found), key=lambda one: _rank(one, asked))
    inputs = ", ".join(dims(s.shape) for s in info(graph).inputs if isinstance(s, TensorSpec))
    return Plans(info(graph).model_class, inputs, asked, now, tuple(kept), tuple(search.refused), search.complete)


class _Search:
    """One look at all candidates."""

    def __init__(self, graph: fx.GraphModule, device: str, end: float) -> None:
        self.graph, self.device, self.end = graph, device, end
        shapes = [s for s in info(graph).shapes if s is not None]
        self.shape: Any = shapes[0] if len(shapes) == 1 else tuple(shapes)
        say("measuring the model as it is")
        found = measure(graph, random_inputs(graph), device, RUNS)
        self.now = Choice("as it is", "", None, figures(graph), found.seconds, None, True)
        self.refused: list[tuple[str, str]] = []
        self.complete = True

    def choices(self, asked: Goals) -> list[Choice]:
        found: list[Choice] = []
        for one in candidates(self.graph, asked):
            if time.perf_counter() > self.end:
                self.complete = False
                break
            say(f"looking at {one.name}")
            try:
                split = run_plan(self.graph, Plan(one.passes, self.shape), verify=False)
            except SplitfxError as why:
                self.refused.append((one.name, str(why)))
                continue
            if info(split).steps[-1].after == info(split).steps[0].before:
                continue  # nothing to do for it here
            found.append(self._measured(one, split, asked))
        return found

    def _measured(self, one: Candidate, split: fx.GraphModule, asked: Goals) -> Choice:
        counted = info(split).plan
        chosen = Choice(one.name, one.why, counted, figures(split), None, None, one.same, split=split)
        if not missed(chosen, asked) and time.perf_counter() < self.end:
            chosen = self._timed(chosen, split)
        return replace(chosen, missed=missed(chosen, asked))

    def _timed(self, chosen: Choice, split: fx.GraphModule) -> Choice:
        """With its time as a ratio to the model's, in turn with it; seconds are that share of the model's own, so that
        a machine that drifts does not set the rows of a table apart."""
        assert self.now.seconds is not None
        args, kwargs = random_inputs(self.graph)
        with in_eval(split):
            if self.device != "cpu":
                ratio = measure(split, (args, kwargs), self.device, RUNS).seconds / self.now.seconds
            else:
                calls = {"now": lambda: self.graph(*args, **kwargs), "then": lambda: split(*args, **kwargs)}
                times = alternate(calls, RUNS)
                ratio = times["then"] / times["now"]
        return replace(chosen, seconds=ratio * self.now.seconds, time=ratio)


def missed(one: Choice, asked: Goals) -> tuple[str, ...]:
    """The goals that a plan does not keep, with what it takes instead."""
    found = []
    if asked.peak_bytes is not None and one.figures.peak_bytes > asked.peak_bytes:
        found.append(f"takes {size(one.figures.peak_bytes)}")
    if asked.macs is not None and one.figures.macs > asked.macs:
        found.append(f"has {number(one.figures.macs)} MACs")
    if asked.seconds is not None and one.seconds is not None and one.seconds > asked.seconds:
        found.append(f"takes {seconds(one.seconds)}")
    return tuple(found)


def _worth_a_choice(found: list[Choice]) -> list[Choice]:
    """Without those that another beats, or equals, in all that counts: peak, MACs, time, and whether it is the same."""

    def beaten(one: Choice, by: Choice) -> bool:
        a = (by.figures.peak_bytes, by.figures.macs, by.time or 9e9, not by.same)
        b = (one.figures.peak_bytes, one.figures.macs, one.time or 9e9, not one.same)
        return by is not one and by.keeps >= one.keeps and all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [one for one in found if not any(beaten(one, by) for by in found)]


def _rank(one: Choice, asked: Goals) -> tuple[Any, ...]:
    """Those that keep the goals first; then the same function; then what was asked for most; then time."""
    least = one.figures.peak_bytes if asked.least else 0
    over = one.figures.peak_bytes if asked.peak_bytes is not None and not one.keeps else 0
    return (not one.keeps, over, least, not one.same, one.time or 9e9)
