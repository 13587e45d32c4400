"""`search_factors`: per block the largest factor that keeps the accuracy (MalekHosseini et al., Fig. 4).

Blocks are taken in order. For each, the factors are tried in rising order, each from the weights that the blocks before
have ended with; the first that costs more accuracy than the tolerance ends the block, and the last that did not is
fixed. The factors of one block do not depend on each other, so several workers may try them at once: what is selected
is a function of what the trials give alone. A trial is a folder and a line in an Optuna study (`trials`); a search that
is killed goes on with ``resume``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from splitfx import registry
from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.api import transform
from splitfx.errors import PlanError, TrainingError
from splitfx.graph import copy_graph, is_canonical
from splitfx.plan import Plan
from splitfx.protocol import Pass
from splitfx.report.table import number, size, table
from splitfx.tracing import trace
from splitfx.train import checkpoint
from splitfx.train.batches import sized
from splitfx.train.finetune import Data, finetune
from splitfx.train.finetune import evaluate as scored
from splitfx.train.inherit import extended, kept_weight
from splitfx.train.recipe import Recipe
from splitfx.train.trend import Figures, Line, SearchResult
from splitfx.train.trials import RUN, Trials

FACTORS = (2, 4, 6, 8)
ORIGINAL = "original"
DIGITS = 6  # of an accuracy in percent: 93.57 - 93.06 is 0.51
POLL_SECONDS = 0.5
Evaluate = Callable[[fx.GraphModule], float]


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
    folder: str | Path | None = None,
    resume: bool = False,
    study: str = "",
    max_trials: int | None = None,
    max_seconds: float | None = None,
    device: str = "auto",
    workers: int = 0,
    verify: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """The greedy search of paper A (Fig. 4) for the factor of each block.

    Either ``evaluate(split)`` gives an accuracy in percent and ``tune(split)`` trains in place (none: no training), or
    ``train`` and ``val`` are data sets and `finetune` does both by ``recipe``, with ``model`` as teacher. A factor is
    accepted while the accuracy is at most ``tolerance`` points below the ``reference``: that of the "original" model,
    or of what the "block" started from. ``options``: those of `Group`, such as {"fusion": "keep"}.

    ``folder`` holds the trials, for ``resume`` and for several workers: start the same call in several processes, with
    ``resume``, and they share the work. ``study``: the URL of a database of Optuna's for what is otherwise
    ``study.journal``. ``max_trials`` and ``max_seconds`` end a search early; what it gives is then not ``finished``.

    Never changes ``model``. Raises `PlanError` for a model without blocks and for factors that make no sense,
    `TrainingError` for a folder of another search, what `finetune` and `transform` raise, `MissingExtraError`.
    """
    tuner = _Tuner(model, evaluate, tune, train, val, recipe, device, workers)
    chosen = _factors(factors)
    if reference not in ("original", "block"):
        raise PlanError(f"reference is 'original' or 'block', not {reference!r}")
    if not tolerance >= 0:
        raise PlanError(f"the tolerance is in points of accuracy, 0 or more; got {tolerance}")
    dense = _dense(model, example_inputs)
    space = Space(dense, dict(options or {}), chosen)
    about = {"method": "greedy", **space.about(), **tuner.about()}
    with _folder(folder, resume) as place:
        trials = Trials(place, about, url=study)
        limit = _Limit(max_trials, max_seconds)
        search = _Greedy(space, tuner, trials, limit, tolerance, reference, verify, progress)
        return search.run()


@dataclass(frozen=True)
class Space:
    """What is searched: a graph, the options of Group, and the factors."""

    dense: fx.GraphModule
    options: dict[str, Any]
    factors: tuple[int, ...]

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
        from splitfx.graph import TensorSpec, info

        shapes = [one.shape for one in info(self.dense).inputs if isinstance(one, TensorSpec)]
        return Plan([self.step(factors)], shapes[0] if len(shapes) == 1 else tuple(shapes))

    def about(self) -> dict[str, Any]:
        """What a study of this space is for, as plain data; weights by a digest."""
        digest = hashlib.sha256()
        state = self.dense.state_dict()
        for key in sorted(state):
            digest.update(key.encode() + state[key].detach().cpu().contiguous().numpy().tobytes())
        shapes = {key: list(t.shape) for key, t in state.items()}
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in self.options.items()}
        return {"model": shapes, "weights": digest.hexdigest()[:16], "options": options}


class _Tuner:
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
        found = dataclasses.asdict(checkpoint.About.of(self.recipe, nn.Module(), **samples))
        return {"recipe": found["recipe"], "data": found["data"]}

    def score(self, split: fx.GraphModule) -> float:
        if self.evaluate is not None:
            return _percent(self.evaluate(split))
        assert self.val is not None
        return scored(split, self.val, device=self.device, workers=self.workers).accuracy

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


class _Limit:
    """How much this call may do."""

    def __init__(self, trials: int | None, seconds: float | None) -> None:
        self.trials, self.end = trials, None if seconds is None else time.monotonic() + seconds
        self.done = 0

    @property
    def reached(self) -> bool:
        return (self.trials is not None and self.done >= self.trials) or (
            self.end is not None and time.monotonic() >= self.end
        )


class _Greedy:
    """One worker of a search."""

    def __init__(
        self,
        space: Space,
        tuner: _Tuner,
        trials: Trials,
        limit: _Limit,
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
                accepted, accuracy = _with(accepted, index, selected), found[selected]
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
            params = {f"block{i + 1}": 1 for i in range(count)}
            self.trials.finish(ORIGINAL, params, work, [accuracy], time.perf_counter() - started)
        return accuracy

    def block(self, index: int, accepted: tuple[int, ...], bound: float) -> tuple[dict[int, float], int | None]:
        """What each factor gave, and which is selected: None where a limit was reached first."""
        while True:
            known = self.trials.all()
            found: dict[int, float] = {}
            selected = 1
            for factor in self.space.factors:
                trial = known.get(key_of(_with(accepted, index, factor)))
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
            if not self.one(index, accepted, known):
                time.sleep(POLL_SECONDS)  # others are at what is left of this block

    def one(self, index: int, accepted: tuple[int, ...], known: dict[str, Any]) -> bool:
        """Try the smallest factor of a block that nobody else is at; False where there is none."""
        for factor in self.space.factors:
            trial = _with(accepted, index, factor)
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
        params = {f"block{i + 1}": f for i, f in enumerate(factors)}
        self.trials.finish(key, params, split, [accuracy], time.perf_counter() - started)
        self.limit.done += 1
        self.progress(f"factors {', '.join(map(str, factors))}: accuracy {accuracy:.2f} %")

    def held(self, factors: tuple[int, ...]) -> fx.GraphModule | None:
        """The trained split of an accepted plan; None for the model as it is."""
        return self.trials.split(key_of(factors)) if max(factors) > 1 else None


# ---------------------------------------------------------------- without training


@dataclass(frozen=True)
class Preview:
    """What a search may try: per block and factor (the others 1) the figures, and the share of the convs' squared
    weight that is kept. ``most`` is the largest number of trials."""

    rows: tuple[tuple[int, str, int, Figures, float], ...]
    before: Figures
    most: int

    def to_json(self) -> str:
        import json

        rows = [
            {"block": b, "layers": n, "factor": f, **vars(figures), "kept_weight": kept}
            for b, n, f, figures, kept in self.rows
        ]
        return json.dumps({"trials": rows, "before": vars(self.before), "most": self.most}, indent=2)

    def __str__(self) -> str:
        head = ["", "layers", "factor", "MACs", "parameters", "peak", "kept weight"]
        lines: list[list[object]] = [["original", "", 1, *_words(self.before), "100.0 %"]]
        lines += [[f"block {b}", n, f, *_words(one), f"{kept:.1%}"] for b, n, f, one, kept in self.rows]
        rest = f"at most {self.most} trials; each block ends at its first factor that costs too much accuracy"
        return f"{table(head, lines, left=(0, 1))}\n\n{rest}"


def preview(
    model: nn.Module,
    example_inputs: Any = None,
    factors: Sequence[int] = FACTORS,
    options: dict[str, Any] | None = None,
) -> Preview:
    """The trials of a search with their figures, without training. Raises as `search_factors`."""
    space = Space(_dense(model, example_inputs), dict(options or {}), _factors(factors))
    rows = []
    names = space.names()
    for index, name in enumerate(names):
        for factor in space.factors:
            split = transform(space.dense, Plan([space.step(_with((1,) * len(names), index, factor))]), verify=False)
            rows.append((index + 1, name, factor, figures(split), kept_weight(space.dense, split)))
    return Preview(tuple(rows), figures(space.dense), len(names) * len(space.factors))


def figures(graph: fx.GraphModule) -> Figures:
    known = facts(graph)
    return Figures(known.cost.macs, known.cost.params, known.memory.peak_bytes)


def key_of(factors: Sequence[int]) -> str:
    """A trial's name: its factors, "4-2-1"."""
    return "-".join(map(str, factors))


def _words(one: Figures) -> list[str]:
    return [number(one.macs), number(one.params), size(one.peak_bytes)]


def _with(factors: tuple[int, ...], index: int, factor: int) -> tuple[int, ...]:
    return (*factors[:index], factor, *factors[index + 1 :])


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


def _percent(value: Any) -> float:
    found = float(value)
    if not 0 <= found <= 100:
        raise TrainingError(f"evaluate gave {value!r}: an accuracy is in percent, from 0 to 100")
    return found


@contextmanager
def _folder(folder: str | Path | None, resume: bool) -> Iterator[Path]:
    with ExitStack() as stack:
        if folder is None:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory()))
            return
        place = Path(folder)
        if place.exists() and not place.is_dir():
            raise TrainingError(f"{place} is a file; a search is written into a folder")
        if not resume and place.is_dir() and any(place.iterdir()):
            raise TrainingError(
                f"{place} is not empty; go on with the search in it (resume=True, --resume) or choose another"
            )
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{place}: cannot be made: {error.strerror or error}") from error
        yield place
