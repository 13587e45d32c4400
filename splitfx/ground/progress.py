"""Says on stderr what is being done, in calls that may take seconds.

`told` marks such a function; it takes ``progress``: True is a moving line where stderr is a terminal, drawn after the
first second and erased at the end; False is nothing; a function is told every step. Whatever runs within says its steps
with `say`, or, where they come often, with a `Clock`, on the line of the outermost call; outside of one, nobody hears.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Self, TypeVar, cast

from splitfx.text import one_line

WAIT = 1.0  # seconds before a line appears
Say = bool | Callable[[str], None]
Call = TypeVar("Call", bound=Callable[..., Any])
_line: ContextVar[Line | None] = ContextVar("line", default=None)


def say(text: str) -> None:
    """What starts now."""
    line = _line.get()
    if line is not None:
        line(text)


def told(call: Call) -> Call:
    """``call`` with its ``progress``, on the line of the call around it where there is one that nobody turned off."""

    @functools.wraps(call)
    def inner(*args: Any, progress: Say = True, **options: Any) -> Any:
        if progress is True and _line.get() is not None:
            return call(*args, **options)
        with Line(None if progress is True else progress or _nobody):
            return call(*args, **options)

    return cast(Call, inner)


def _nobody(text: str) -> None:
    """Hears nothing."""


def _terminal() -> bool:
    """Of the processes of torchrun, the first one's alone."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


class Line:
    """Where steps are shown until the ``with`` block is left. ``tell`` hears them in place of a moving line, which is
    drawn after ``wait`` seconds."""

    def __init__(self, tell: Callable[[str], None] | None = None, wait: float | None = None) -> None:
        self.tell, self.wait = tell, WAIT if wait is None else wait
        self.moving = tell is None and _terminal()
        self.step = self.text = ""
        self.bar: Any = None
        self.done = threading.Event()
        self.drawer: threading.Thread | None = None
        self.before: list[Token[Line | None]] = []

    def __call__(self, text: str) -> None:
        self.step = text
        self._show(text)
        if self.tell is not None:
            self.tell(text)

    def tick(self, text: str) -> None:
        """How far the step is."""
        self._show(f"{self.step}: {text}" if self.step else text)
        if self.tell is not None:
            self.tell(text)

    def __enter__(self) -> Self:
        self.before.append(_line.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _line.reset(self.before.pop())
        self.done.set()
        if self.drawer is not None:
            self.drawer.join()

    def _show(self, text: str) -> None:
        self.text = one_line(text)
        if self.moving and self.drawer is None:  # a thread: one step may take a minute inside torch
            self.drawer = threading.Thread(target=self._draw, daemon=True)
            self.drawer.start()

    def _draw(self) -> None:
        started = time.time()
        if self.done.wait(self.wait):
            return
        from tqdm import tqdm

        with tqdm(file=sys.stderr, bar_format="{desc} … {elapsed}", leave=False) as self.bar:
            self.bar.start_t = started
            self.bar.set_description_str(self.text)
            while not self.done.wait(0.2):
                self.bar.set_description_str(self.text)


class Clock:
    """Says how much of ``total`` is done and how long the rest will take."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.first, self.done = what, max(1, total), done, done
        self.line = _line.get()
        # A moving line may change often; where every word stays, seldom.
        self.pause = 0.2 if self.line is not None and self.line.moving else 10.0
        self.started = self.last = time.monotonic()

    def tick(self, text: str = "") -> None:
        self.done += 1
        now = time.monotonic()
        if self.line is None or now - self.last < self.pause:
            return
        self.last = now
        left = (now - self.started) * (self.total - self.done) / (self.done - self.first)
        self.line.tick(f"{text or self.what}: {100 * self.done // self.total} % done, {duration(left)} left")


def duration(seconds: float) -> str:
    """0:07, 1:02:33."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
