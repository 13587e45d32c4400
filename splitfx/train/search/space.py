"""What a search of factors works on: a graph with its options, who tunes and scores a split, how much may be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.compiler import registry
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError, TrainingError
from splitfx.ir.graph import TensorSpec, copy_graph, info
from splitfx.train import checkpoint
from splitfx.train.batches import sized
from splitfx.train.finetune import evaluate as scored
from splitfx.train.finetune import finetune
from splitfx.train.fit import Data
from splitfx.train.recipe import Recipe
from splitfx.train.search.trend import Figures

POLL_SECONDS = 0.5  # between looks at what other workers do
Evaluate = Callable[[fx.GraphModule], float]


@dataclass(frozen=True)
class Space:
    """What is searched: a graph, the options of Group, and the factors."""

    dense: fx.GraphModule
    options: dict[str, Any]
    factors: tuple[int, ...]
    known: dict[tuple[int, ...], set[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.names():
            raise PlanError("the model has no convolution: there are no blocks whose factor could be searched")
        if "factors" in self.options:
            raise PlanError("options are those of Group without factors: the search finds them")
        self.options.setdefault("lowering", "branches")
        if self.options.get("fusion", "widen") == "none" or self.options["lowering"] == "auto":
            raise PlanError("a search needs a fusion behind each block, and a lowering that does not depend on timing")
        self.step((1,) * len(self.names()))

    def names(self) -> list[str]:
        return [str(block) for block in blocks(facts(self.dense))]

    def step(self, factors: Sequence[int]) -> Pass:
        return registry.get("group").from_dict({**self.options, "factors": tuple(factors)})

    def plan(self, factors: Sequence[int]) -> Plan:
        shapes = [one.shape for one in info(self.dense).inputs if isinstance(one, TensorSpec)]
        return Plan([self.step(factors)], shapes[0] if len(shapes) == 1 else tuple(shapes))

    def divided(self, factors: Sequence[int]) -> set[int]:
        """The blocks that a plan divides, by the notes of the pass; a factor above a block's channels leaves it whole,
        and so does any where its only layer reads what nothing divides."""
        key, names = tuple(factors), self.names()
        if key not in self.known:
            work = copy_graph(self.dense)
            made = self.step(key).run(work, facts(work))  # by itself: of the pipeline's care only the notes matter
            found = {one.where for one in made.notes if one.kind == "did"}
            self.known[key] = {index for index, name in enumerate(names) if name in found}
        return self.known[key]

    def dividing(self, index: int, others: tuple[int, ...]) -> tuple[int, ...]:
        """The factors that divide a block beside those of the other blocks."""
        return tuple(f for f in self.factors if index in self.divided(changed(others, index, f)))

    def choices(self) -> list[tuple[int, ...]]:
        """For each block, the factors that divide it when the others are whole, or when they are divided."""
        count = len(self.names())
        found = []
        for index in range(count):
            able = {f for others in (1, self.factors[0]) for f in self.dividing(index, (others,) * count)}
            found.append(tuple(sorted(able)))
        return found

    def real(self, factors: tuple[int, ...]) -> tuple[int, ...]:
        """The same plan with factor 1 for each block that it leaves whole."""
        while True:
            divided = self.divided(factors)
            found = tuple(factor if index in divided else 1 for index, factor in enumerate(factors))
            if found == factors:
                return found
            factors = found

    def about(self) -> dict[str, Any]:
        """What a study of this space is for, as plain data; weights by a digest."""
        state = self.dense.state_dict()
        shapes = {key: list(t.shape) for key, t in state.items()}
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in self.options.items()}
        return {
            "model": shapes, "weights": checkpoint.digest(state), "options": options, "factors": list(self.factors),
        }  # fmt: skip


class Tuner:
    """Trains and scores a split: by the user's functions, or by `finetune`."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluate | None,
        tune: Callable[[fx.GraphModule], Any] | None,
        train: Data | None,
        val: Data | None,
        recipe: Recipe | str,
        device: str,
        workers: int,
    ) -> None:
        data = train is not None and val is not None
        if (evaluate is None) == (not data):
            raise PlanError("give evaluate, a function that returns an accuracy in percent, or train and val: not both")
        if tune is not None and data:
            raise PlanError("tune belongs to evaluate; train and val are trained on by finetune")
        self.model, self.evaluate, self.tune, self.train, self.val = model, evaluate, tune, train, val
        self.recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
        self.device, self.workers = device, workers

    def about(self) -> dict[str, Any]:
        if self.evaluate is not None:
            return {"tuned by": "functions of the user's"}
        assert self.train is not None
        assert self.val is not None
        samples = {"train": sized(self.train), "val": sized(self.val)}
        return {"recipe": checkpoint.plain(self.recipe), "data": samples}

    def score(self, split: fx.GraphModule) -> float:
        if self.evaluate is not None:
            return _percent(self.evaluate(split))
        assert self.val is not None
        more: Any = {"device": self.device, "workers": self.workers, "mixed_precision": self.recipe.mixed_precision}
        return scored(split, self.val, batch_size=self.recipe.batch_size, **more).accuracy

    def tuned(self, split: fx.GraphModule, folder: Path) -> float:
        """Train in place; the accuracy it ends with."""
        if self.evaluate is not None:
            if self.tune is not None:
                self.tune(split)
            return self.score(split)
        assert self.train is not None
        assert self.val is not None
        history = finetune(
            split, self.train, self.val, self.recipe, teacher=self.model, folder=folder, resume=True,
            device=self.device, workers=self.workers, progress=False,
        )  # fmt: skip
        return history.accuracy if self.recipe.keep == "best" else history.epochs[-1].val.accuracy


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


def figures(graph: fx.GraphModule) -> Figures:
    known = facts(graph)
    return Figures(known.cost.macs, known.cost.params, known.memory.peak_bytes)


def key_of(factors: Sequence[int]) -> str:
    """A trial's name: its factors, "4-2-1"."""
    return "-".join(map(str, factors))


def changed(factors: tuple[int, ...], index: int, factor: int) -> tuple[int, ...]:
    return (*factors[:index], factor, *factors[index + 1 :])


def _percent(value: Any) -> float:
    found = float(value)
    if not 0 <= found <= 100:
        raise TrainingError(f"evaluate gave {value!r}: an accuracy is in percent, from 0 to 100")
    return found
