"""What splitfx takes at most: of text files, names, lists, sizes. Everything above it is refused before it is worked
through or allocated.

The limits lie far above what any network needs; they are there so that a wrong or hostile file costs a moment and one
line, not a machine. Each is checked where the value comes in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence

from splitfx.errors import SplitfxError
from splitfx.text import shown

PLAN_BYTES = 2 * 2**20  # of a plan or a taxonomy: read by a parser that takes about a second for so much
JSON_BYTES = 512 * 2**20  # of the description of a saved graph
NESTING = 32  # tables within tables
PASSES = 1000  # of a plan
FILE_NAME = 255  # bytes of the name of a file, on every file system in use
NAME = 4096  # characters of a text in a plan, such as a layer's path
WORD = 2**15  # characters of a pass on the command line
ITEMS = 2**20  # entries of a list in a plan
DIMS = 64  # dimensions of a tensor, as in torch
ELEMENTS = 2**36  # numbers in an input: 256 GiB in float32
BUDGET_BYTES = 2**60  # of a budget
TILES = 2**20  # of a grid
PIXELS = 2**27  # of an image that is decoded whole
TABLE = 2**22  # numbers in a table of an image file

_TOML = re.compile(  # texts and comments whole, closed or not, so that every character is read once
    r'"""(?:\\.|[^\\])*?(?:"""|\\?\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?|#[^\n]*|[][{}.=,\n]',
    re.S,
)


def check_nesting(text: str, error: type[SplitfxError], what: str) -> None:
    """Raise ``error`` where brackets, braces or dotted keys of a TOML text nest deeper than parsers are quick for."""
    depth = dots = 0
    for token in _TOML.finditer(text):
        letter = token[0]
        if letter in "[{":
            depth, dots = depth + 1, 0
        elif letter in "]}":
            depth, dots = depth - 1, 0
        elif letter in "=,\n":
            dots = 0
        dots += letter == "."
        if max(depth, dots) > NESTING:
            line = text.count("\n", 0, token.start()) + 1
            raise error(f"{what} nests more than {NESTING} levels deep in line {line}.")


def check_shape(shape: Sequence[int], error: type[SplitfxError], what: str) -> None:
    """Raise ``error`` for sizes of a tensor that no machine holds."""
    if len(shape) > DIMS:
        raise error(f"{what} has {len(shape)} sizes; a tensor has at most {DIMS}.")
    if math.prod(shape) > ELEMENTS:
        raise error(f"{what} {shown(tuple(shape))} is more than {ELEMENTS} numbers; give sizes that fit into memory.")


def check_memory(count: int, error: type[SplitfxError], what: str) -> None:
    """Raise ``error`` where ``count`` bytes are more than the memory of this machine, as far as it tells."""
    room = _memory()
    if room is not None and count > room:
        gib = 2**30
        raise error(f"{what} takes {count / gib:.1f} GiB; this machine has {room / gib:.1f} GiB of memory.")


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None
