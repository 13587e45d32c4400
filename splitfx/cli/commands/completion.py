"""``splitfx completion``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import OK, Parser
from splitfx.cli.progress import Progress
from splitfx.errors import MissingExtraError

TEXT = "print a script by which a shell completes commands, options and files"
SHELLS = ("bash", "fish", "zsh")  # shtab knows tcsh too, but no options there


def arguments(one: Parser) -> None:
    one.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join((", ".join(SHELLS[:-1]), SHELLS[-1])))


def run(given: Namespace, progress: Progress) -> int:
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("shtab is not installed: pip install 'splitfx[completion]'") from error
    from splitfx.compiler import registry

    kinds = {"FILE": shtab.FILE, "ONNX": shtab.FILE, "MODEL": shtab.FILE, "SECOND": shtab.FILE, "FOLDER": shtab.DIR}
    parser, commands = given.parsers
    for action in (action for one in commands.values() for action in one._actions):
        if action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined, index]
        if action.dest == "name":
            action.choices = list(registry.all())
    print(shtab.complete(parser, given.shell))
    return OK
