"""What a command prints: one JSON document, or text for people."""

from __future__ import annotations

import sys
from argparse import Namespace

from splitfx.cli.arguments import OK
from splitfx.text import printable


def printed(given: Namespace, machine: str, people: str) -> int:
    """Print what was asked for; the exit code of a command that is done."""
    print(machine if given.json else printable(people))
    sys.stdout.flush()
    return OK
