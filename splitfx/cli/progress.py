"""What a command says on stderr: a moving line on a terminal, plain lines elsewhere, nothing when quiet; and remarks,
lines that stay. stdout is never touched."""

from __future__ import annotations

import sys

from splitfx.ground.progress import Line
from splitfx.text import one_line


class Progress(Line):
    """Call it with what starts now."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(wait=0.0)
        self.quiet = quiet
        self.moving = self.moving and not quiet

    def __call__(self, text: str) -> None:
        super().__call__(text)
        if not self.moving and not self.quiet:
            print(f"splitfx: {one_line(text)}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.clear()
        print(f"splitfx: {one_line(text)}", file=sys.stderr, flush=True)
