"""The commands that train; each returns what it prints, as JSON and for people."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from splitfx import storage
from splitfx.compiler.inline import parse_pass
from splitfx.errors import MissingExtraError, PlanError, TrainingError
from splitfx.frontend.models import load_model
from splitfx.frontend.trace import trace
from splitfx.ground.progress import Progress
from splitfx.ir.graph import TensorSpec, info
from splitfx.train.checkpoint import write_text
from splitfx.train.data import Data, Shape, load_data
from splitfx.train.finetune import finetune as finetuned
from splitfx.train.fit import check
from splitfx.train.history import Epoch
from splitfx.train.processes import launched
from splitfx.train.recipe import Recipe
from splitfx.train.search.front import SearchFront, search_front
from splitfx.train.search.greedy import search_factors
from splitfx.train.search.preview import preview_search
from splitfx.train.search.space import SearchSpace
from splitfx.train.search.study import SearchStudy
from splitfx.train.search.trend import SearchResult
from splitfx.train.search.tuner import RecipeTuner

SPLIT = "split"  # the result, in the folder of a run


def finetune(given: Namespace, progress: Progress, split: fx.GraphModule) -> tuple[str, str]:
    """``splitfx finetune``: train, and save the split beside the checkpoints. Of several processes the first tells and
    saves; the others give empty texts."""
    first = launched()[0] == 0
    if not first:
        progress.quiet, progress.moving = True, False
    recipe = Recipe.from_words(given.recipe, given.set)
    if given.weights and not given.teacher:
        raise TrainingError("--weights are those of the teacher: give --teacher too")
    data = data_for(split, given.data, progress)
    check(split, data.train, data.val)
    teacher = load_model(given.teacher, given.weights) if given.teacher else None
    if teacher is not None and given.weights is None:
        progress.remark(f"the weights of {given.teacher} are random: a teacher has to be trained; give --weights FILE")
    folder = Path(given.out)
    progress(f"training {recipe.epochs} epochs")
    history = finetuned(
        split,
        data.train,
        data.val,
        recipe,
        teacher=teacher,
        folder=folder,
        resume=given.resume,
        workers=given.workers,
        device=given.device,
        progress=False,
        on_epoch=lambda epoch: progress(_line(epoch, recipe)),
    )
    if not first:
        return "", ""
    progress("saving")
    storage.save(split, folder / SPLIT, overwrite=given.resume)
    plain = {"out": str(folder / SPLIT), "history": json.loads(history.to_json())}
    return json.dumps(plain, indent=2), f"{history}\n\nsaved to {folder / SPLIT}"


def search(given: Namespace, progress: Progress, inputs: tuple[torch.Tensor, ...], model: nn.Module) -> tuple[str, str]:
    """``splitfx search``: the trend table; plan, weights and the table as files in ``--out``."""
    recipe = Recipe.from_words(given.recipe, given.set)
    options = parse_pass(" ".join(["group", "factors=1", *given.option])).to_dict()
    options.pop("factors")
    if given.method not in ("greedy", "pareto"):
        raise PlanError(f"method is 'greedy' or 'pareto', not {given.method!r}")
    space = SearchSpace(trace(model, inputs), factors=given.factors, options=options)
    if given.dry_run:
        found = preview_search(space)
        return found.to_json(), str(found)
    if not given.data or not given.out:
        raise TrainingError("a search needs --data and --out; without them, --dry-run lists its trials")
    data = data_for(space.dense, given.data, progress)
    check(space.dense, data.train, data.val)
    tuner = RecipeTuner(data.train, data.val, recipe, device=given.device, workers=given.workers)
    common: dict[str, Any] = {
        "study": SearchStudy(Path(given.out), given.resume, given.study),
        "max_trials": given.max_trials,
        "max_seconds": given.max_seconds,
        "progress": progress,
    }
    if given.method == "pareto":
        return _front_told(search_front(space, tuner, **common), Path(given.out), progress)
    result = search_factors(space, tuner, tolerance=given.tolerance, reference=given.reference, **common)
    return _result_told(result, Path(given.out), progress)


def _front_told(front: SearchFront, folder: Path, progress: Progress) -> tuple[str, str]:
    _written(front, folder, "front.png", progress)
    told = f"{front}\n\nthe trained splits are in {folder / 'trials'}"
    return json.dumps({"out": str(folder), "result": json.loads(front.to_json())}, indent=2), told


def _result_told(result: SearchResult, folder: Path, progress: Progress) -> tuple[str, str]:
    _written(result, folder, "trend.png", progress)
    storage.save(result.split, folder / SPLIT, overwrite=True)
    result.plan.save(folder / "plan.toml", overwrite=True)
    write_text(folder / "trend.txt", f"{result.trend()}\n")
    plain = {"out": str(folder / SPLIT), "result": json.loads(result.to_json())}
    return json.dumps(plain, indent=2), f"{result}\n\nsaved to {folder / SPLIT}, the plan to {folder / 'plan.toml'}"


def _written(found: SearchFront | SearchResult, folder: Path, picture: str, progress: Progress) -> None:
    progress("saving")
    write_text(folder / "result.json", found.to_json())
    try:
        found.plot(folder / picture, overwrite=True)
    except MissingExtraError as error:
        progress.remark(f"no picture of the {Path(picture).stem}: {error}")


def data_for(split: fx.GraphModule, word: str, progress: Progress) -> Data:
    """The data set in the size that a graph takes. Raises `TrainingError` for a model without one image input."""
    inputs = info(split).inputs
    shape = inputs[0].shape[1:] if len(inputs) == 1 and isinstance(inputs[0], TensorSpec) else ()
    if len(shape) != 3:
        raise TrainingError("the model takes no single image [N, C, H, W]; train it in a loop of your own")
    progress(f"reading {word}")
    image: Shape = (shape[0], shape[1], shape[2])
    return load_data(word, image)


def _line(epoch: Epoch, recipe: Recipe) -> str:
    return f"epoch {epoch.epoch}/{recipe.epochs}: loss {epoch.loss:.3f}, accuracy {epoch.val.accuracy:.2f} %"
