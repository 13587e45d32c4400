"""``splitfx diff``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import MODEL, Parser, with_model
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "set two models side by side, layer by layer, with the first layer that differs"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("second", metavar="SECOND", help=f"{MODEL}; or the folder of a saved split")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import inputs_of, model_of
    from splitfx.report.diff import diff

    second = Namespace(**{**vars(given), "model": given.second})
    before, after = model_of(given, progress), model_of(second, progress)
    progress("comparing")
    found = diff(before, after, inputs_of(given, before))
    return printed(given, found.to_json(), str(found))
