"""``splitfx compare``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import Parser, with_model
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "set a model and its split side by side"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("split", metavar="FOLDER", help="the folder of the saved split")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import inputs_of, is_split, model_of, saved
    from splitfx.errors import UnsupportedError
    from splitfx.ir.graph import random_inputs
    from splitfx.report.explain import compare

    if is_split(given.model) and ":" in given.split:
        raise UnsupportedError(f"the model comes first: splitfx compare {given.split} {given.model}")
    split = saved(given.split, progress)
    model = model_of(given, progress)
    inputs = inputs_of(given, model) or random_inputs(split, given.seed)
    progress("comparing")
    found = compare(model, split, inputs)
    return printed(given, found.to_json(), str(found))
