"""``splitfx finetune``: train, and save the split beside the checkpoints.

Of several processes (torchrun) the first tells and saves; the others say nothing.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from splitfx.cli.arguments import MODEL, OK, Parser, with_split, with_training
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

    from splitfx.train.history import Epoch
    from splitfx.train.recipe import Recipe

TEXT = "train a saved split on data, so that it gets its accuracy back"
SPLIT = "split"  # the result, in the folder of a run


def arguments(one: Parser) -> None:
    with_split(one)
    with_training(one)
    one.add_argument("--teacher", metavar="MODEL", help=f"the unsplit model, to learn from: {MODEL}")
    one.add_argument("--weights", metavar="FILE", help="weights of the teacher, .safetensors or .pt")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx import storage
    from splitfx.cli.loading import saved
    from splitfx.cli.training import data_for
    from splitfx.train.finetune import finetune
    from splitfx.train.fit import check
    from splitfx.train.processes import launched
    from splitfx.train.recipe import Recipe

    split = saved(given.split, progress)
    first = launched()[0] == 0
    progress.quiet = progress.quiet or not first
    recipe = Recipe.from_words(given.recipe, given.set)
    if given.weights and not given.teacher:
        raise TrainingError("--weights are those of the teacher: give --teacher too")
    data = data_for(split, given.data, progress)
    check(split, data.train, data.val)
    teacher = _teacher(given, progress)
    folder = Path(given.out)
    progress(f"training {recipe.epochs} epochs")
    history = finetune(
        split, data.train, data.val, recipe, teacher=teacher, folder=folder, resume=given.resume,
        workers=given.workers, device=given.device,
        on_epoch=lambda epoch: progress(_line(epoch, recipe)),
    )  # fmt: skip
    if not first:
        return OK
    progress("saving")
    storage.save(split, folder / SPLIT, overwrite=given.resume)
    plain = {"out": str(folder / SPLIT), "history": json.loads(history.to_json())}
    return printed(given, json.dumps(plain, indent=2), f"{history}\n\nsaved to {folder / SPLIT}")


def _teacher(given: Namespace, progress: Progress) -> nn.Module | None:
    from splitfx.frontend.models import load_model

    if not given.teacher:
        return None
    teacher = load_model(given.teacher, given.weights)
    if given.weights is None:
        progress.remark(f"the weights of {given.teacher} are random: a teacher has to be trained; give --weights FILE")
    return teacher


def _line(epoch: Epoch, recipe: Recipe) -> str:
    return f"epoch {epoch.epoch}/{recipe.epochs}: loss {epoch.loss:.3f}, accuracy {epoch.val.accuracy:.2f} %"
