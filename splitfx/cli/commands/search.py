"""``splitfx search``: the trend table; plan, weights and the table as files in ``--out``."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfx.cli.arguments import Parser, count, counts, with_model, with_training
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import MissingExtraError, PlanError, TrainingError

if TYPE_CHECKING:
    from splitfx.train.recipe import Recipe
    from splitfx.train.search.front import SearchFront
    from splitfx.train.search.space import SearchSpace
    from splitfx.train.search.trend import SearchResult

TEXT = "find into how many branches each block can be divided while the accuracy holds"
SPLIT = "split"  # the result, in the folder of a run


def arguments(one: Parser) -> None:
    with_model(one, folder=False)
    with_training(one, needed=False)  # not by --dry-run
    one.add_argument("--factors", type=counts, default=(2, 4, 6, 8), metavar="2,4,6,8", help="to try, rising")
    one.add_argument("--tolerance", type=float, default=0.5, metavar="POINTS", help="of accuracy (default 0.5)")
    one.add_argument("--method", default="greedy", help="greedy, or pareto: accuracy, MACs and peak as a front")
    one.add_argument("--reference", default="original", help="original or block: what the tolerance is from")
    one.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the pass 'group', such as fusion=keep"
    )
    one.add_argument("--study", default="", metavar="URL", help="a database for Optuna (default: a file in --out)")
    one.add_argument("--max-trials", type=count, metavar="N", help="end after so many trials; --resume goes on")
    one.add_argument("--max-seconds", type=float, metavar="S", help="end after so long; --resume goes on")
    one.add_argument(
        "--dry-run", action="store_true", help="list the trials with MACs, parameters and peak; no training"
    )


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import graph_of
    from splitfx.compiler.inline import parse_pass
    from splitfx.train.recipe import Recipe
    from splitfx.train.search.preview import preview_search
    from splitfx.train.search.space import SearchSpace

    recipe = Recipe.from_words(given.recipe, given.set)
    options = parse_pass(" ".join(["group", "factors=1", *given.option])).to_dict()
    options.pop("factors")
    if given.method not in ("greedy", "pareto"):
        raise PlanError(f"method is 'greedy' or 'pareto', not {given.method!r}")
    space = SearchSpace(graph_of(given, progress), factors=given.factors, options=options)
    if given.dry_run:
        found = preview_search(space)
        return printed(given, found.to_json(), str(found))
    if not given.data or not given.out:
        raise TrainingError("a search needs --data and --out; without them, --dry-run lists its trials")
    return _searched(given, space, recipe, progress)


def _searched(given: Namespace, space: SearchSpace, recipe: Recipe, progress: Progress) -> int:
    from splitfx.cli.training import data_for
    from splitfx.train.fit import check
    from splitfx.train.search.front import search_front
    from splitfx.train.search.greedy import search_factors
    from splitfx.train.search.study import SearchStudy
    from splitfx.train.search.tuner import RecipeTuner

    data = data_for(space.dense, given.data, progress)
    check(space.dense, data.train, data.val)
    tuner = RecipeTuner(data.train, data.val, recipe, device=given.device, workers=given.workers)
    common: dict[str, Any] = {
        "study": SearchStudy(Path(given.out), given.resume, given.study),
        "max_trials": given.max_trials,
        "max_seconds": given.max_seconds,
    }
    if given.method == "pareto":
        return _print_front(given, search_front(space, tuner, **common), progress)
    result = search_factors(space, tuner, tolerance=given.tolerance, reference=given.reference, **common)
    return _print_result(given, result, progress)


def _print_front(given: Namespace, front: SearchFront, progress: Progress) -> int:
    folder = Path(given.out)
    _written(front, folder, "front.png", progress)
    told = f"{front}\n\nthe trained splits are in {folder / 'trials'}"
    return printed(given, json.dumps({"out": str(folder), "result": json.loads(front.to_json())}, indent=2), told)


def _print_result(given: Namespace, result: SearchResult, progress: Progress) -> int:
    from splitfx import storage
    from splitfx.train.checkpoint import write_text

    folder = Path(given.out)
    _written(result, folder, "trend.png", progress)
    storage.save(result.split, folder / SPLIT, overwrite=True)
    result.plan.save(folder / "plan.toml", overwrite=True)
    write_text(folder / "trend.txt", f"{result.trend()}\n")
    plain = {"out": str(folder / SPLIT), "result": json.loads(result.to_json())}
    told = f"{result}\n\nsaved to {folder / SPLIT}, the plan to {folder / 'plan.toml'}"
    return printed(given, json.dumps(plain, indent=2), told)


def _written(found: SearchFront | SearchResult, folder: Path, picture: str, progress: Progress) -> None:
    from splitfx.train.checkpoint import write_text

    progress("saving")
    write_text(folder / "result.json", found.to_json())
    try:
        found.plot(folder / picture, overwrite=True)
    except MissingExtraError as error:
        progress.remark(f"no picture of the {Path(picture).stem}: {error}")
