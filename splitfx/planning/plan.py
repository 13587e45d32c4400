"""`plan`: looks over passes and their compositions for what keeps a budget. Facts first, then measurements on this
machine, and training only where an accuracy is asked for."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis.fingerprint import fingerprint
from splitfx.compiler.pipeline import figures, plan_since, run_plan
from splitfx.compiler.plan import Plan
from splitfx.errors import PlanError, SplitfxError
from splitfx.frontend.trace import trace
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import dims, number, seconds, size
from splitfx.ground.turns import MOST_SECONDS, device_of, ratios
from splitfx.ir.graph import TensorSpec, info, is_canonical, random_inputs
from splitfx.ir.modes import in_eval
from splitfx.planning.candidates import Candidate, candidates
from splitfx.planning.choices import Choice, Plans
from splitfx.planning.goals import Amount, Goals, goals
from splitfx.planning.study import Notebook, Row
from splitfx.planning.training import with_accuracy
from splitfx.report.measuring import measure, placed
from splitfx.train.search.study import TEMPORARY, SearchStudy

CALLS = 7  # of the model alone, for the amount that shares are of


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
    study: SearchStudy = TEMPORARY,
    progress: Say = True,
) -> Plans:
    """Plans that bring ``model`` below a budget, the best first; ``str()`` is a table.

    ``peak``: the most bytes of live tensors, inputs counted and parameters not, as a number, "64 MiB", "0.5x" or
    "least". ``latency``: the most seconds of a call on ``device``, as a number, "20 ms" or "0.8x". ``macs``: the most
    multiply-accumulates, as a number, "1.5 G" or "0.5x". Several may be given; without any, what can be had is shown.

    Plans that compute the same function come before those that must be trained. Peaks and MACs are counted, times
    measured here, in turn with the model. With ``accuracy_drop`` (in points of top-1 accuracy), ``train`` and ``val``
    (data sets as for `finetune`), what changes the function is solved on inputs of ``train``, where that is not enough
    trained by ``recipe``, and measured on ``val``, the least change first, until one keeps the accuracy. Looking ends
    after about ``max_seconds``; with a ``study`` that holds an earlier look, it goes on with what that found.

    Raises `TraceError`, and `PlanError` for a budget that cannot be read. Where none is kept, ``Plans.best`` raises and
    the table says what comes nearest.
    """
    if accuracy_drop is not None and (train is None or val is None):
        raise PlanError("accuracy_drop needs data to train and to measure on: give train= and val= as well")
    goals(peak, latency, macs, accuracy_drop, (1 << 60, 1.0, 1 << 60))  # what cannot be read is told before the work
    place = device_of(device)
    end = time.perf_counter() + max_seconds
    graph: Any = model if is_canonical(model) and example_inputs is None else trace(model, example_inputs)
    inputs = ", ".join(dims(s.shape) for s in info(graph).inputs if isinstance(s, TensorSpec))
    budgets = {"peak": peak, "latency": latency, "macs": macs, "accuracy_drop": accuracy_drop}
    data = "" if train is None else f"{len(train)} and {len(val)} samples, {recipe}"
    about = {"inputs": inputs, "device": device, "budgets": str(budgets), "data": data}
    about["weights"] = fingerprint(graph)
    with ExitStack() as held:
        folder = held.enter_context(study.opened()) if study.folder is not None else None
        book = Notebook(folder, about)
        with in_eval(graph):
            search = _Search(graph, place, end, book)
            now = search.now.figures
            asked = goals(peak, latency, macs, accuracy_drop, (now.peak_bytes, search.now.seconds or 0.0, now.macs))
            found, as_it_is = search.choices(asked), search.now
        if accuracy_drop is not None:
            as_it_is, found = with_accuracy(graph, as_it_is, found, asked, (train, val, recipe), end, book)
    kept = sorted(_worth_a_choice(found), key=lambda one: _rank(one, asked))
    return Plans(info(graph).model_class, inputs, asked, as_it_is, tuple(kept), tuple(search.refused), search.complete)


class _Search:
    """One look at all candidates."""

    def __init__(self, graph: fx.GraphModule, device: torch.device, end: float, book: Notebook) -> None:
        self.graph, self.device, self.end, self.book = graph, device, end, book
        shapes = [s for s in info(graph).shapes if s is not None]
        self.shape: Any = shapes[0] if len(shapes) == 1 else tuple(shapes)
        if book.known.seconds is None:
            say("measuring the model as it is")
            book.known.seconds = measure(graph, random_inputs(graph), device, CALLS).seconds
            book.write()
        self.now = Choice("as it is", "", None, figures(graph), book.known.seconds, None, True)
        self.refused: list[tuple[str, str]] = []
        self.complete = True

    def choices(self, asked: Goals) -> list[Choice]:
        found: dict[str, Choice] = {}
        for one in candidates(self.graph, asked):
            plain = found.get(one.instead)
            if plain is not None and plain.keeps and not asked.least:
                continue
            if time.perf_counter() > self.end:
                self.complete = False
                break
            row, split = self._looked(one)
            if row.refused:
                self.refused.append((one.name, row.refused))
            elif split is not None:
                made = plan_since(self.graph, split)
                choice = Choice(one.name, one.why, made, figures(split), None, None, one.same, split=split)
                if plain is None or choice.figures.peak_bytes < plain.figures.peak_bytes:
                    found[one.name] = replace(choice, missed=missed(choice, asked))
        self._time([one for one in found.values() if one.keeps])
        return [self._timed(one, asked) for one in found.values()]

    def _looked(self, one: Candidate) -> tuple[Row, fx.GraphModule | None]:
        """What became of a candidate, now or in an earlier look; no graph where there is nothing for it to do."""
        say(f"looking at {one.name}")
        known = self.book.known.rows.get(one.name)
        if known is not None:
            again = run_plan(self.graph, Plan.from_toml(known.plan), verify=False) if known.plan else None
            return known, again
        try:
            split = run_plan(self.graph, Plan(one.passes, self.shape), verify=False)
        except SplitfxError as why:
            return self.book.row(one.name, Row(refused=str(why))), None
        if not any(step.changed for step in info(split).steps[len(info(self.graph).steps) :]):
            return self.book.row(one.name, Row()), None
        return self.book.row(one.name, Row(plan_since(self.graph, split).to_toml())), split

    def _time(self, kept: list[Choice]) -> None:
        """Time what was not timed before, all in turn with the model."""
        rows = self.book.known.rows
        new = {one.name: one.split for one in kept if rows[one.name].time is None and one.split is not None}
        left = self.end - time.perf_counter()
        if not new or left < 0:
            return
        say(f"timing {', '.join(new)}")
        place = self.device
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(place), random_inputs(self.graph))
        with ExitStack() as modes:
            here = {name: placed(split, place) for name, split in {"": self.graph, **new}.items()}
            for one in here.values():
                modes.enter_context(in_eval(one))
            calls = {name: partial(one, *args, **kwargs) for name, one in here.items()}
            found = ratios(calls.pop(""), calls, place, min(MOST_SECONDS, left / 2 / len(new)))  # the rest is to train
        for name, known in found.items():
            rows[name].time, rows[name].spread = known.middle, known.spread
        self.book.write()

    def _timed(self, one: Choice, asked: Goals) -> Choice:
        row = self.book.known.rows[one.name]
        if row.time is None:
            return one
        assert self.now.seconds is not None
        timed = replace(one, seconds=row.time * self.now.seconds, time=row.time, spread=row.spread)
        return replace(timed, missed=missed(timed, asked))


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
