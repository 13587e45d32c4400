"""A kind that does all that a draw must not do; what it does is its seed's turn."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from splitfx.errors import PlanError
from tests.fuzz import marker

TURNS = (
    "equal",
    "refused",
    "signal",
    "hang",
    "traceback",
    "outside",
    "moved",
    "native",
    "code",
    "lines",
    "escape",
    "no word",
)


class Unclean(PlanError):
    """Says what `PlanError` would have cleaned."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.args = (message,)


def draw(seed: int, folder: Path) -> str:
    turn = TURNS[seed]
    (folder / "mine").write_text("allowed")
    if turn == "refused":
        raise PlanError("the plan is empty.")
    if turn == "signal":
        os.kill(os.getpid(), signal.SIGSEGV)
    if turn == "hang":
        time.sleep(600)
    if turn == "traceback":
        {}["key"]
    if turn == "outside":
        (folder.parent.parent / "elsewhere").write_text("not allowed")
    if turn == "moved":
        os.replace(folder / "mine", folder.parent.parent / "elsewhere")
    if turn == "native":
        os.close(os.dup(0))
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.unlink("canary", dir_fd=descriptor)
        os.close(descriptor)
    if turn == "code":
        marker(folder).touch()
    if turn == "lines":
        raise Unclean("the plan\nis empty.")
    if turn == "escape":
        raise Unclean("the plan \x1b[2J is empty.")
    return "" if turn == "no word" else "equal"
