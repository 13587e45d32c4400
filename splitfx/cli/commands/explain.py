"""``splitfx explain``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import Parser, with_split
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "tell what the passes did to a saved split, and what not, and why"


def arguments(one: Parser) -> None:
    with_split(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import saved
    from splitfx.report.explain import explain

    found = explain(saved(given.split, progress))
    return printed(given, found.to_json(), str(found))
