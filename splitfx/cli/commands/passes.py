"""``splitfx passes``."""

from __future__ import annotations

import json
from argparse import Namespace

from splitfx.cli.arguments import Parser
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "list the passes with their promises and options, or describe one"


def arguments(one: Parser) -> None:
    one.add_argument("name", nargs="?", metavar="NAME", help="a pass: every option with what it does")


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.compiler import registry
    from splitfx.report.passes import pass_text, passes_text

    known = registry.all() if given.name is None else {given.name: registry.get(given.name)}
    plain = [{"name": name, "promise": cls.promise.value, **cls.schema()} for name, cls in known.items()]
    return printed(
        given,
        json.dumps(plain, indent=2),
        passes_text(known) if given.name is None else pass_text(given.name, known[given.name]),
    )
