"""``splitfx passes``."""

from __future__ import annotations

import json
from argparse import Namespace

from splitfx.cli.arguments import Parser
from splitfx.cli.output import printed
from splitfx.ground.progress import Progress

TEXT = "list the passes with their promises and options"


def arguments(one: Parser) -> None:
    """Takes no more than every command."""


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.compiler import registry
    from splitfx.report.passes import passes_text

    known = registry.all()
    plain = [{"name": name, "promise": cls.promise.value, **cls.schema()} for name, cls in known.items()]
    return printed(given, json.dumps(plain, indent=2), passes_text(known))
