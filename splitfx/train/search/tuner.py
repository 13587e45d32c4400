"""How a search trains a split and finds its accuracy: by `finetune` and a recipe, or by functions of the user's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import fx, nn

from splitfx.errors import PlanError, TrainingError
from splitfx.train import checkpoint
from splitfx.train.data.batches import sized
from splitfx.train.finetune import evaluate as scored
from splitfx.train.finetune import finetune
from splitfx.train.fit import Data
from splitfx.train.recipe import Recipe


class Tuner(ABC):
    """Trains the splits of a search and says how accurate they are, in percent.

    ``seed``: of what the search itself draws. A class of one's own defines the three methods.
    """

    seed: int = 0

    @abstractmethod
    def score(self, split: fx.GraphModule) -> float:
        """The accuracy of a split as it is."""

    @abstractmethod
    def tuned(self, split: fx.GraphModule, teacher: nn.Module, folder: Path) -> float:
        """Train a split in place; the accuracy it ends with. What a killed run goes on from belongs in ``folder``."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the accuracies depend on, as plain data: trials that were made with other data are not used."""


class FunctionTuner(Tuner):
    """``evaluate(split)`` gives an accuracy in percent, ``tune(split)`` trains in place; without it nothing is trained.

    Raises `TrainingError` for an accuracy that is none.
    """

    def __init__(
        self, evaluate: Callable[[fx.GraphModule], float], tune: Callable[[fx.GraphModule], Any] | None = None
    ) -> None:
        if not callable(evaluate):
            raise PlanError("give evaluate, a function that returns the accuracy of a split in percent")
        self.evaluate, self.tune = evaluate, tune

    def score(self, split: fx.GraphModule) -> float:
        return _percent(self.evaluate(split))

    def tuned(self, split: fx.GraphModule, teacher: nn.Module, folder: Path) -> float:
        if self.tune is not None:
            self.tune(split)
        return self.score(split)

    def about(self) -> dict[str, Any]:
        return {"tuned by": "functions of the user's"}


class RecipeTuner(Tuner):
    """`finetune` trains on ``train`` by ``recipe``, a `Recipe` or the name of one, with the unsplit model as teacher;
    ``val`` says how accurate a split is. ``device`` and ``workers`` are those of `finetune`, which says what it raises.
    """

    def __init__(
        self, train: Data, val: Data, recipe: Recipe | str = "finetune", *, device: str = "auto", workers: int = 0
    ) -> None:
        self.train, self.val = train, val
        self.recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
        self.device, self.workers, self.seed = device, workers, self.recipe.seed

    def score(self, split: fx.GraphModule) -> float:
        more: Any = {"device": self.device, "workers": self.workers, "mixed_precision": self.recipe.mixed_precision}
        return scored(split, self.val, batch_size=self.recipe.batch_size, **more).accuracy

    def tuned(self, split: fx.GraphModule, teacher: nn.Module, folder: Path) -> float:
        history = finetune(
            split, self.train, self.val, self.recipe, teacher=teacher, folder=folder, resume=True,
            device=self.device, workers=self.workers,
        )  # fmt: skip
        return history.accuracy if self.recipe.keep == "best" else history.epochs[-1].val.accuracy

    def about(self) -> dict[str, Any]:
        samples = {"train": sized(self.train), "val": sized(self.val)}
        return {"recipe": checkpoint.plain(self.recipe), "data": samples}


def _percent(value: Any) -> float:
    found = float(value)
    if not 0 <= found <= 100:
        raise TrainingError(f"evaluate gave {value!r}: an accuracy is in percent, from 0 to 100")
    return found
