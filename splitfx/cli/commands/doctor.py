"""``splitfx doctor``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import FAILED, OK, Parser
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "look at this installation and say what does not work, and what to do"


def arguments(one: Parser) -> None:
    """Takes no more than every command."""


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.doctor import diagnose

    progress("starting each provider once")
    found = diagnose()
    printed(given, found.to_json(), str(found))
    return OK if found.ok else FAILED
