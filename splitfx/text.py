"""Text that comes from elsewhere (files, models, the user's values), made safe and short enough to be shown.

Promises: what leaves this module holds no control character but line breaks, so no terminal obeys it; `shown` and
`one_line` are of bounded length, and neither reads all of a value that is larger than that.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

VALUE = 120  # characters of one value in a message
LINE = 300  # characters of another's message within ours
MESSAGE = 1500  # characters of a message

# C0 and C1 without line breaks, DEL, what turns the direction of writing, line separators, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""``text`` with each control character but tabs and line breaks written out, as ``\x1b``."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, most: int = MESSAGE) -> str:
    """``text`` in one printable line of at most ``most`` characters: its middle gives way to an ellipsis."""
    if len(text) > 8 * most:  # the rest would be thrown away after it was worked through
        text = cut(text, 8 * most)
    return cut(printable(" ".join(text.split())), most)


def cut(text: str, most: int = VALUE) -> str:
    """``text`` in ``most`` characters: its middle gives way to an ellipsis, both ends stay."""
    if len(text) <= most:
        return text
    tail = most // 2
    return f"{text[: most - tail - 1]}…{text[len(text) - tail :]}"


class _Short(reprlib.Repr):
    """Values as Python writes them, without the middle of what is long; written in time that does not grow with it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, VALUE, VALUE
        self.maxlist = self.maxtuple = self.maxdict = 8

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 256 else f"an integer of {x.bit_length()} bits"  # Python prints none so long

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Mapping):
            return self.repr_dict(dict(x), level)
        return super().repr_instance(x, level)


def shown(value: Any, most: int = VALUE) -> str:
    """A value as Python writes it, in one printable line of at most ``most`` characters."""
    return one_line(_Short().repr(value), most)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, as `one_line`; its kind where it says nothing."""
    text = str(error).strip()
    return one_line(text.splitlines()[0], LINE) if text else type(error).__name__
