"""The parser of the command line, and the arguments that several commands take."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from splitfx.errors import nearest
from splitfx.text import cut, one_line

OK, FAILED, WRONG, STOPPED = 0, 1, 2, 130  # exit codes, see `splitfx.cli`
MODEL = (
    "a NAME of torchvision or timm (torchvision:NAME, timm:NAME), package.module:callable, file.py:callable "
    "or the folder of a transformers model"
)
DATA = "digits, fashion-mnist[:FOLDER], cifar10:FOLDER, cifar100:FOLDER or imagefolder:FOLDER"
INPUT = "sizes of an input, batch first, such as 1x3x224x224, 1x16:int64 or mask=1x1x64x64; once per input"

# What other programs call it.
GUESSED_COMMANDS = {
    "bench": "measure",
    "benchmark": "measure",
    "compress": "plan",
    "convert": "export",
    "draw": "inspect",
    "fit": "plan",
    "info": "profile",
    "list": "passes",
    "optimize": "plan",
    "prune": "plan",
    "run": "measure",
    "show": "inspect",
    "split": "transform",
    "summary": "profile",
    "test": "check",
    "tile": "transform",
    "train": "finetune",
    "validate": "check",
    "verify": "check",
    "view": "inspect",
    "visualize": "inspect",
}
GUESSED = {
    "--memory": "--peak",
    "--budget": "--peak",
    "--time": "--latency",
    "--flops": "--macs",
    "--accuracy": "--accuracy-drop",
    "--shape": "--input",
    "--size": "--input",
    "--output": "--out",
    "--epochs": "--set epochs=N",
    "--lr": "--set lr=RATE",
}


class Paragraphs(argparse.HelpFormatter):
    """Names of commands beside what they do, paragraphs kept apart."""

    def add_argument(self, action: argparse.Action) -> None:
        self._indent()  # argparse forgets that commands stand further in, and breaks the line after the longest
        super().add_argument(action)
        self._dedent()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Paragraphs, self)._fill_text(one, width, indent) for one in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """Errors are one line, with the nearest known word."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"splitfx: error: {one_line(message)} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(one) for one in action.choices]
            what = "command" if action.dest == "command" else str(action.metavar or action.dest)
            meant = GUESSED_COMMANDS.get(str(value)) if what == "command" else None
            hint = f" Did you mean '{meant}'?" if meant else nearest(str(value), known)
            self.error(f"there is no {what} '{value}'.{hint} Known: {', '.join(known)}")

    def unknown(self, word: str) -> NoReturn:
        known = [text for action in self._actions for text in action.option_strings]
        if not word.startswith("-") and "--pass" in known:
            self.error(f"unknown argument '{word}'. A pass and its options are one word: --pass 'tile budget=0.5x'")
        word = word.partition("=")[0]
        meant = GUESSED.get(word)
        hint = f" Did you mean '{meant}'?" if meant is not None and meant.split()[0] in known else nearest(word, known)
        self.error(f"unknown argument '{word}'.{hint}")


def with_all(one: Parser) -> None:
    """What every command takes."""
    one.add_argument("--json", action="store_true", help="one JSON document on stdout")
    one.add_argument("--quiet", action="store_true", help="no progress and no remarks on stderr")
    one.add_argument("--threads", type=count, metavar="N", help="CPU threads for torch (default: its own choice)")


def with_model(one: Parser, folder: bool = True) -> None:
    """A model by a word; with ``folder`` a saved split will do too."""
    one.add_argument("model", metavar="MODEL", help=f"{MODEL}{'; or the folder of a saved split' * folder}")
    one.add_argument("--input", action="append", metavar="SIZES", help=INPUT)
    one.add_argument("--weights", metavar="FILE", help="weights of the model, .safetensors or .pt (default: random)")
    one.add_argument("--seed", type=int, default=0, help="of random weights and inputs (default 0)")


def with_split(one: Parser, what: str = "the folder of a saved split") -> None:
    one.add_argument("split", metavar="FOLDER", help=what)


def with_overwrite(one: Parser) -> None:
    one.add_argument("--overwrite", action="store_true", help="replace what is already there")


def with_training(one: Parser, needed: bool = True) -> None:
    one.add_argument("--data", required=needed, metavar="WORD", help=DATA)
    one.add_argument("--out", required=needed, metavar="FOLDER", help="where checkpoints and the result are written")
    one.add_argument("--recipe", default="finetune", metavar="NAME", help="settings by name (default finetune)")
    one.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, such as epochs=30 or lr=0.1"
    )
    one.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    one.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data (default 0)")
    one.add_argument("--device", default="auto", help="auto (GPUs, where there are any) or cpu")


def counts(text: str) -> tuple[int, ...]:
    return tuple(count(one) for one in text.split(","))


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number, not '{cut(text, 40)}'")
    return int(text)
