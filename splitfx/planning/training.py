"""What data give for plans that change the function: the least change first, until one keeps the accuracy.

The layers that lost connections are solved on inputs, which often is enough; else the split is trained, with the model
as its teacher. Passes that keep the function, such as `Tile`, come after that.
"""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils.data import Subset

from splitfx.compiler.pipeline import plan_since, run_plan
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Promise
from splitfx.errors import SplitfxError
from splitfx.ground.progress import say
from splitfx.ground.table import number
from splitfx.planning.choices import Choice
from splitfx.planning.goals import Goals
from splitfx.planning.study import Learned, Notebook

INPUTS = 512  # of the training data, on which layers are solved
TRIED = 8  # batches that say how long training takes


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
        learned[one.name] = replace(
            one, plan=plan_since(graph, split), accuracy=came.accuracy, learned=came.how, missed=missed, split=split
        )
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
    return split, learned


def _found(
    graph: fx.GraphModule, plan: Plan, name: str, enough: float, data: tuple[Any, Any, Any], end: float
) -> tuple[fx.GraphModule, Learned]:
    from splitfx.train.finetune import evaluate

    train, val, _ = data
    say(f"{name}: solving its layers on inputs")
    images = torch.stack([train[int(i)][0] for i in torch.linspace(0, len(train) - 1, min(INPUTS, len(train)))])
    how = "solved"
    try:
        steps = [replace(step, order="solved", calibration=images) for step in plan.passes]  # type: ignore[call-arg]
        split = run_plan(graph, Plan(steps, plan.input_shape))
    except SplitfxError as why:
        split, how = run_plan(graph, plan), f"not solved ({why})"
    begun = time.perf_counter()
    accuracy = evaluate(split, val).accuracy
    if accuracy < enough and time.perf_counter() < end:
        say(f"training {name}")
        took = time.perf_counter() - begun
        accuracy, trained = _trained(split, graph, accuracy, data, end, took)
        how = trained or how
    return split, Learned(accuracy, how)


def _trained(
    split: fx.GraphModule,
    graph: fx.GraphModule,
    accuracy: float,
    data: tuple[Any, Any, Any],
    end: float,
    scoring: float,
) -> tuple[float, str]:
    """Train as much as there is time for, so that the learning rate comes to its end; "" where there is none.

    ``scoring``: seconds of one measurement of accuracy, of which there is one more than there are epochs.
    """
    from splitfx.train.finetune import finetune
    from splitfx.train.history import Epoch
    from splitfx.train.recipe import Recipe

    class Late(Exception):
        """The time is over: it was guessed too short."""

    done: list[Epoch] = []

    def in_time(epoch: Epoch) -> None:
        done.append(epoch)
        if len(done) < epochs and time.perf_counter() > end:
            raise Late

    train, val, recipe = data
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    few = Subset(train, order[: TRIED * recipe.batch_size])
    begun = time.perf_counter()
    finetune(copy.deepcopy(split), few, few, replace(recipe, epochs=1), teacher=graph)
    sample = (time.perf_counter() - begun) / len(few)
    left = end - time.perf_counter() - scoring
    epochs = min(recipe.epochs, int(left / (len(train) * sample + scoring)))
    samples = len(train) if epochs else int((left - scoring) / sample)
    if not epochs and samples <= len(few):
        return accuracy, ""
    part = train if epochs else Subset(train, order[:samples])
    try:
        finetune(split, part, val, replace(recipe, epochs=max(1, epochs)), teacher=graph, on_epoch=in_time)
    except Late:
        return done[-1].val.accuracy, "trained, until the time was over"
    whole = epochs == recipe.epochs
    how = "trained" if whole else f"trained, {number(max(1, epochs) * samples)} samples in the time that there was"
    return max([accuracy, *(one.val.accuracy for one in done)]) if recipe.keep == "best" else done[-1].val.accuracy, how
