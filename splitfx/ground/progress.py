"""Says on stderr what is being done: a moving line on a terminal, plain lines elsewhere, nothing when
quiet."""

from __future__ import annotations

import sys
import threading
from typing import Any

from splitfx.text import one_line


class Progress:
    """Call it with what starts now; leave the ``with`` block when all is done. stdout is never touched."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.moving = not quiet and sys.stderr.isatty()
        self.bar: Any = None
        self.done = threading.Event()
        self.clock: threading.Thread | None = None

    def __call__(self, text: str) -> None:
        if self.moving:
            self._line().set_description_str(one_line(text))
        elif not self.quiet:
            print(f"splitfx: {one_line(text)}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.clear()
        print(f"splitfx: {one_line(text)}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        if self.clock is not None:
            self.clock.join()
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> Any:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(file=sys.stderr, bar_format="{desc} … {elapsed}", leave=False)
            # One step may take a minute inside torch; the clock must move meanwhile.
            self.clock = threading.Thread(target=self._tick, daemon=True)
            self.clock.start()
        return self.bar

    def _tick(self) -> None:
        while not self.done.wait(0.5):
            self.bar.refresh()
