"""What training gives for plans that change the function: the least change first, until one keeps the accuracy."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import fx

from splitfx.ground.progress import say
from splitfx.planning.choices import Choice
from splitfx.planning.goals import Goals


def with_accuracy(
    graph: fx.GraphModule,
    now: Choice,
    found: list[Choice],
    asked: Goals,
    data: tuple[Any, Any, Any],
    end: float,
) -> tuple[Choice, list[Choice]]:
    """The model as it is and the plans, with accuracies in percent; what could not be trained in time, or did not keep
    the accuracy, misses its goal. ``data``: what to train on, what to measure on, and the recipe."""
    from splitfx.train.finetune import evaluate, finetune

    assert asked.drop is not None
    train, val, recipe = data
    say("measuring the model's accuracy")
    base = evaluate(graph, val).accuracy
    least, done = base - asked.drop, False
    trained: dict[str, Choice] = {}
    for one in sorted((o for o in found if not o.same and o.keeps), key=lambda o: -o.figures.macs):
        if done or time.perf_counter() > end:
            trained[one.name] = replace(one, missed=("was not trained",))
            continue
        assert one.split is not None
        say(f"training {one.name}")
        finetune(one.split, train, val, recipe, teacher=graph)
        accuracy = evaluate(one.split, val).accuracy
        enough = accuracy >= least
        trained[one.name] = replace(one, accuracy=accuracy, missed=() if enough else (f"reaches {accuracy:.2f} %",))
        done = enough
    return replace(now, accuracy=base), [trained.get(one.name, one) for one in found]
