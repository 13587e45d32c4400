"""``splitfx plan``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from splitfx.cli.arguments import DATA, Parser, with_model, with_overwrite
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import PlanError

TEXT = "look for plans that bring a model below a budget of memory, time or work; write the best one"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("--peak", metavar="SIZE", help="the most bytes, such as 64MiB, 0.5x or least")
    one.add_argument("--latency", metavar="TIME", help="the most time of a call, such as 20ms or 0.8x")
    one.add_argument("--macs", metavar="COUNT", help="the most multiply-accumulates, such as 1.5G or 0.5x")
    one.add_argument("--accuracy-drop", type=float, metavar="POINTS", help="of accuracy that may be lost; needs --data")
    one.add_argument("--data", metavar="WORD", help=f"to train on and to measure accuracy: {DATA}")
    one.add_argument("--recipe", default="finetune", metavar="NAME", help="settings of the training by name")
    one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as epochs=3")
    one.add_argument("--device", default="cpu", help="where times are measured, cpu or cuda (default cpu)")
    one.add_argument("--seconds", type=float, default=300, metavar="S", help="look for about so long (default 300)")
    one.add_argument("--out", metavar="FILE", help="write the best plan here, with comments that say why")
    one.add_argument("--save", metavar="FOLDER", help="save the model by the best plan here, with what was trained")
    one.add_argument("--study", metavar="FOLDER", help="keep here what was looked at and trained; --resume goes on")
    one.add_argument("--resume", action="store_true", help="go on with the look in --study, or begin it")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx import storage
    from splitfx.cli.loading import free_file, graph_of
    from splitfx.planning.plan import plan
    from splitfx.train.search.study import SearchStudy

    if (given.accuracy_drop is None) != (given.data is None):
        raise PlanError("--accuracy-drop and --data go together")
    if given.out:
        free_file(given.out, given.overwrite)
    if given.save:
        storage.KIND.check_target(given.save, overwrite=given.overwrite, advice="add --overwrite")
    study = SearchStudy(given.study, given.resume)
    graph = graph_of(given, progress)
    found = plan(
        graph,
        peak=_number(given.peak),
        latency=_number(given.latency),
        macs=_number(given.macs),
        device=given.device,
        max_seconds=given.seconds,
        study=study,
        **_training(given, graph, progress),
    )
    text = str(found)
    if given.out:
        found.save(Path(given.out), overwrite=given.overwrite)
        text += f"\n\nwrote the plan marked * to {given.out}; "
        text += f"splitfx transform {given.model} --plan {given.out} --out split/"
    if given.save:
        split = found.best.split
        assert split is not None
        storage.save(split, given.save, overwrite=given.overwrite)
        text += f"\n\nsaved the model by that plan to {given.save}"
    return printed(given, found.to_json(), text)


def _number(text: str | None) -> str | float | None:
    """A number without a unit is bytes, seconds or a count."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _training(given: Namespace, graph: Any, progress: Progress) -> dict[str, Any]:
    if given.data is None:
        return {}
    from splitfx.cli.training import data_for
    from splitfx.train.recipe import Recipe

    data = data_for(graph, given.data, progress)
    recipe = Recipe.from_words(given.recipe, given.set)
    return {"accuracy_drop": given.accuracy_drop, "train": data.train, "val": data.val, "recipe": recipe}
