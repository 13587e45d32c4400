"""What data give for plans that change the function: the least change first, until one keeps the accuracy.

The layers that lost connections are solved on inputs, which often is enough; else the split is trained, with the model
as its teacher. Passes that keep the function, such as `Tile`, come after that.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from splitfx.compiler.pipeline import run_plan
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Promise
from splitfx.errors import SplitfxError
from splitfx.ground.progress import say
from splitfx.ir.graph import info
from splitfx.planning.choices import Choice
from splitfx.planning.goals import Goals
from splitfx.planning.study import Learned, Notebook

INPUTS = 512  # of the training data, on which layers are solved


def with_accuracy(
    graph: fx.GraphModule,
    now: Choice,
    found: list[Choice],
    asked: Goals,
    data: tuple[Any, Any, Any],
    end: float,
    book: Notebook,
) -> tuple[Choice, list[Choice]]:
    """The model as it is and the plans, with accuracies in percent; what could not be trained in time, or did not keep
    the accuracy, misses its goal. ``data``: what to train on, what to measure on, and the recipe."""
    from splitfx.train.finetune import evaluate

    assert asked.drop is not None
    if book.known.accuracy is None:
        say("measuring the model's accuracy")
        book.known.accuracy = evaluate(graph, data[1]).accuracy
        book.write()
    base, done = book.known.accuracy, False
    learned: dict[str, Choice] = {}
    for one in sorted((o for o in found if not o.same and o.keeps), key=lambda o: -o.figures.macs):
        if done or time.perf_counter() > end:
            learned[one.name] = replace(one, missed=("was not trained",))
            continue
        split, came = _learned(graph, one, base - asked.drop, data, end, book)
        done = came.accuracy >= base - asked.drop
        missed = () if done else (f"reaches {came.accuracy:.2f} %",)
        learned[one.name] = replace(one, accuracy=came.accuracy, learned=came.how, missed=missed, split=split)
    return replace(now, accuracy=base), [learned.get(one.name, one) for one in found]


def _learned(
    graph: fx.GraphModule, one: Choice, enough: float, data: tuple[Any, Any, Any], end: float, book: Notebook
) -> tuple[fx.GraphModule, Learned]:
    """The split of a plan with weights from data."""
    assert one.plan is not None
    passes = one.plan.passes
    cut = 1 + max(place for place, step in enumerate(passes) if step.promise is Promise.RETRAIN)
    first, rest = Plan(passes[:cut], one.plan.input_shape), passes[cut:]
    digest = hashlib.sha256(first.to_toml().encode()).hexdigest()[:16]
    known = book.kept(digest)
    if known is None:
        known = _found(graph, first, one.name, enough, data, end)
        book.keep(digest, *known)
    split, learned = known
    if rest:
        split = run_plan(split, Plan(rest))
        info(split).plan = one.plan
    return split, learned


def _found(
    graph: fx.GraphModule, plan: Plan, name: str, enough: float, data: tuple[Any, Any, Any], end: float
) -> tuple[fx.GraphModule, Learned]:
    from splitfx.train.finetune import evaluate, finetune
    from splitfx.train.history import Epoch

    class Late(Exception):
        """The time is over."""

    def in_time(epoch: Epoch) -> None:
        if time.perf_counter() > end:
            raise Late

    train, val, recipe = data
    say(f"{name}: solving its layers on inputs")
    images = torch.stack([train[int(i)][0] for i in torch.linspace(0, len(train) - 1, min(INPUTS, len(train)))])
    how = "solved"
    try:
        split = run_plan(graph, Plan([replace(step, calibration=images) for step in plan.passes], plan.input_shape))
    except SplitfxError as why:
        split, how = run_plan(graph, plan), f"not solved ({why})"
    accuracy = evaluate(split, val).accuracy
    if accuracy < enough and time.perf_counter() < end:
        say(f"training {name}")
        how = "trained"
        try:
            finetune(split, train, val, recipe, teacher=graph, on_epoch=in_time)
        except Late:
            how = "trained, until the time was over"
        accuracy = evaluate(split, val).accuracy
    return split, Learned(accuracy, how)
