"""The command line: what each command takes, and what its exit code says.

Each command is a file in `splitfx.cli.commands`. ``splitfx --help`` answers at once: torch is imported by what a
command runs, when it starts.

Output for people, or with ``--json`` one JSON document, goes to stdout; progress and remarks go to stderr.
Exit codes: 0 done; 1 a check failed (`check`, `doctor`, a broken promise of a pass); 2 wrong usage or
input, told in one line without a traceback; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitfx.cli.arguments import FAILED, MODEL, OK, STOPPED, WRONG, Paragraphs, Parser, with_all
from splitfx.cli.commands import COMMANDS
from splitfx.cli.progress import Progress
from splitfx.errors import SplitfxError, VerificationError
from splitfx.text import one_line

_OPTION = re.compile(r"[a-z_]+=")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser, commands = _parser()
    given, unknown = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    given.parsers = parser, commands  # for `completion`
    if given.command is None:
        parser.print_help()
        return OK
    if unknown:
        commands[given.command].unknown(unknown[0])
    try:
        return _run(given)
    except SplitfxError as error:
        return _told(given, type(error).__name__, str(error), FAILED if isinstance(error, VerificationError) else WRONG)
    except KeyboardInterrupt:
        print("splitfx: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # `splitfx ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _told(given, type(error).__name__, f"{place}{error.strerror or error}", WRONG)


def _joined(words: Sequence[str]) -> list[str]:
    """The options of a pass joined to it: ``--pass tile budget=0.5x`` is ``--pass 'tile budget=0.5x'``."""
    found: list[str] = []
    of_pass = False
    for word in words:
        if of_pass and _OPTION.match(word):
            found[-1] += f" {word}"
            continue
        found.append(word)
        of_pass = found[-2:-1] == ["--pass"] or word.startswith("--pass=")
    return found


def _told(given: argparse.Namespace, kind: str, message: str, code: int) -> int:
    line = one_line(message)
    print(f"splitfx: error: {line}", file=sys.stderr)
    if given.json:
        print(json.dumps({"error": {"kind": kind, "message": line}}))
    return code


def _run(given: argparse.Namespace) -> int:
    if given.threads is not None:
        import torch

        torch.set_num_threads(given.threads)
    with Progress(given.quiet) as progress, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _only_ours(progress)
        return COMMANDS[given.command].run(given, progress)


def _parser() -> tuple[Parser, dict[str, Parser]]:
    import splitfx

    parser = Parser(
        prog="splitfx",
        description="Take networks apart so that they fit, cost less or run in pieces; every rewrite is checked.",
        epilog="Begin with: splitfx plan torchvision:resnet18 --input 1x3x224x224 --peak 0.5x\n\n"
        f"A model is {MODEL}. Exit codes: 0 done, 1 a check failed, 2 wrong input, 130 stopped.",
        formatter_class=Paragraphs,
    )
    parser.add_argument("--version", action="version", version=f"splitfx {splitfx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    made: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        text = command.TEXT
        made[name] = one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        with_all(one)
        command.arguments(one)
    return parser, made


def _only_ours(progress: Progress) -> Any:
    """Warnings of splitfx become remarks; those of the packages below say nothing that a user could act
    on."""
    home = str(Path(__file__).parent)

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if filename.startswith(home) and category is UserWarning:
            progress.remark(str(message))

    return show
