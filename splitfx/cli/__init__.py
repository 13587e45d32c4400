"""The command line: what each command takes, and what its exit code says.

``splitfx --help`` answers at once: torch is imported by `splitfx.cli.commands`, when a command starts.

Output for people, or with ``--json`` one JSON document, goes to stdout; progress and remarks go to stderr.
Exit codes: 0 done; 1 a check failed (`check`, `doctor`, a broken promise of a pass); 2 wrong usage or
input, told in one line without a traceback; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from splitfx.errors import SplitfxError, VerificationError, nearest
from splitfx.text import cut, one_line

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130

MODEL = "torchvision:NAME, timm:NAME, package.module:callable or file.py:callable"
DATA = "digits, planted, cifar10:FOLDER, cifar100:FOLDER or imagefolder:FOLDER"
INPUT = "sizes of an input, batch first, such as 1x3x224x224 or 1x16:int64; once per input"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, with the nearest known word."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"splitfx: error: {one_line(message)} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(one) for one in action.choices]
            what = "command" if action.dest == "command" else str(action.metavar or action.dest)
            self.error(f"there is no {what} '{value}'.{nearest(str(value), known)} Known: {', '.join(known)}")

    def options(self) -> list[str]:
        return [text for action in self._actions for text in action.option_strings]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser, commands = _parser()
    given, unknown = parser.parse_known_args(argv)
    if given.command is None:
        parser.print_help()
        return OK
    if unknown:
        chosen = commands[given.command]
        chosen.error(f"unknown argument '{unknown[0]}'.{nearest(unknown[0], chosen.options())}")
    try:
        from splitfx.cli import commands as run

        return run.run(given)
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


def _told(given: argparse.Namespace, kind: str, message: str, code: int) -> int:
    line = one_line(message)
    print(f"splitfx: error: {line}", file=sys.stderr)
    if given.json:
        print(json.dumps({"error": {"kind": kind, "message": line}}))
    return code


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    import splitfx

    parser = _Parser(
        prog="splitfx",
        description="Split convolutional networks into branches, and prove each rewrite.",
        epilog=f"A model is {MODEL}. Exit codes: 0 done, 1 a check failed, 2 wrong input, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"splitfx {splitfx.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    made: dict[str, _Parser] = {}

    def command(name: str, text: str) -> _Parser:
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        one.add_argument("--json", action="store_true", help="one JSON document on stdout")
        one.add_argument("--quiet", action="store_true", help="no progress and no remarks on stderr")
        one.add_argument("--threads", type=_count, metavar="N", help="CPU threads for torch (default: its own choice)")
        made[name] = one
        return one

    def with_model(one: _Parser, what: str = "model", folder: bool = True) -> None:
        one.add_argument(what, metavar=what.upper(), help=f"{MODEL}{'; or the folder of a saved split' * folder}")
        one.add_argument("--input", action="append", metavar="SIZES", help=INPUT)
        one.add_argument(
            "--weights", metavar="FILE", help="weights of the model, .safetensors or .pt (default: random)"
        )
        one.add_argument("--seed", type=int, default=0, help="of random weights and inputs (default 0)")

    def with_overwrite(one: _Parser) -> None:
        one.add_argument("--overwrite", action="store_true", help="replace what is already there")

    def with_training(one: _Parser, needed: bool = True) -> None:
        one.add_argument("--data", required=needed, metavar="WORD", help=DATA)
        one.add_argument(
            "--out", required=needed, metavar="FOLDER", help="where checkpoints and the result are written"
        )
        one.add_argument("--recipe", default="finetune", metavar="NAME", help="settings by name (default finetune)")
        one.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as epochs=30 or lr=0.1"
        )
        one.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
        one.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data (default 0)")
        one.add_argument("--device", default="auto", help="auto (GPUs, where there are any) or cpu")

    one = command("profile", "count parameters, work and memory of every layer, without running it")
    with_model(one)
    one.add_argument("--html", metavar="FILE", help="write a page with the graph and the memory over time")
    one.add_argument("--plot", metavar="FILE", help="draw memory and cost (png, svg or pdf; needs splitfx[plot])")
    one.add_argument("--all", action="store_true", help="every operation on a line of its own")
    with_overwrite(one)

    one = command("transform", "rewrite a model by a plan and save the result")
    with_model(one, folder=False)
    one.add_argument("--plan", metavar="FILE", help="a plan file (TOML)")
    one.add_argument(
        "--pass",
        dest="passes",
        action="append",
        metavar="'NAME OPTION=VALUE ...'",
        help="a pass, such as 'group factors=8,2,2,4,4 fusion=keep'; once per pass, in order",
    )
    one.add_argument("--out", required=True, metavar="FOLDER", help="where the split is saved")
    one.add_argument("--no-verify", action="store_true", help="do not hold the passes to their promises")
    with_overwrite(one)

    one = command("finetune", "train a saved split on data, so that it gets its accuracy back")
    one.add_argument("split", metavar="FOLDER", help="the folder of a saved split")
    with_training(one)
    one.add_argument("--teacher", metavar="MODEL", help=f"the unsplit model, to learn from: {MODEL}")
    one.add_argument("--weights", metavar="FILE", help="weights of the teacher, .safetensors or .pt")

    one = command("search", "find the largest factor of each block that keeps the accuracy (paper A)")
    with_model(one, folder=False)
    with_training(one, needed=False)  # not by --dry-run
    one.add_argument("--factors", type=_counts, default=(2, 4, 6, 8), metavar="2,4,6,8", help="to try, rising")
    one.add_argument("--tolerance", type=float, default=0.5, metavar="POINTS", help="of accuracy (default 0.5)")
    one.add_argument("--method", default="greedy", help="greedy, or pareto: accuracy, MACs and peak as a front")
    one.add_argument("--reference", default="original", help="original or block: what the tolerance is from")
    one.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the pass 'group', such as fusion=keep"
    )
    one.add_argument("--study", default="", metavar="URL", help="a database for Optuna (default: a file in --out)")
    one.add_argument("--max-trials", type=_count, metavar="N", help="end after so many trials; --resume goes on")
    one.add_argument("--max-seconds", type=float, metavar="S", help="end after so long; --resume goes on")
    one.add_argument(
        "--dry-run", action="store_true", help="list the trials with MACs, parameters and peak; no training"
    )

    one = command("export", "write a saved split as ONNX")
    one.add_argument("split", metavar="FOLDER", help="the folder of a saved split")
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--onnx", metavar="FILE", help="the file to write; with sub-models, of the base model")
    where.add_argument("--bundle", metavar="FOLDER", help="base model and sub-models over one file of weights")
    where.add_argument("--branches", metavar="FOLDER", help="the stem and every branch of a carved SplitNet as files")
    one.add_argument("--opset", type=int, help="ONNX opset, 18 to 25 (default 20)")
    one.add_argument("--fixed-batch", action="store_true", help="keep the traced batch size")
    one.add_argument("--no-verify", action="store_true", help="do not run the file beside the graph before it is kept")
    with_overwrite(one)

    one = command("check", "run an ONNX file under onnxruntime and compare it with the split")
    one.add_argument("split", metavar="FOLDER", help="the folder of the saved split that the file was made from")
    one.add_argument("onnx", metavar="ONNX", help="the ONNX file")
    one.add_argument("--provider", action="append", metavar="NAME", help="cpu, cuda, ...; once per provider")
    one.add_argument("--require", action="append", default=[], metavar="NAME", help="fail where it does not start")
    one.add_argument("--runs", type=_count, default=20, help="timed runs per provider (default 20)")
    one.add_argument("--seconds", type=float, default=600, help="the most for one provider (default 600)")

    one = command("compare", "set a model and its split side by side")
    with_model(one, folder=False)
    one.add_argument("split", metavar="FOLDER", help="the folder of the saved split")

    one = command("measure", "run a model and measure time and memory")
    with_model(one)
    one.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    one.add_argument("--runs", type=_count, default=20, help="timed runs (default 20)")

    one = command("explain", "tell what the passes did to a saved split, and what not, and why")
    one.add_argument("split", metavar="FOLDER", help="the folder of a saved split")

    one = command("inspect", "list the groups of classes of a saved split; write a page about it: graph, notes, layers")
    one.add_argument("split", metavar="FOLDER", help="the folder of a saved split")
    one.add_argument("--html", metavar="FILE", help="the page to write")
    one.add_argument("--svg", metavar="FILE", help="write the drawing of the graph alone")
    with_overwrite(one)

    command("passes", "list the passes with their promises and options")
    command("doctor", "look at this installation and say what does not work, and what to do")
    return parser, made


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(one) for one in text.split(","))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number, not '{cut(text, 40)}'")
    return int(text)
