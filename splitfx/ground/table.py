"""The one table renderer: plain text as wide as the terminal, right-aligned figures, figures with units.

Texts are on the left and figures on the right of their column. A table that is too wide gives up room in its
text columns, the last one first; long names lose their middle and keep both ends, since layer paths differ at
the end.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from splitfx.text import printable

WIDTH = 100  # where there is no terminal: files, pipes, notebooks
NARROWEST, WIDEST = 60, 160
GAP = "  "
_SHORT, _SHORTEST = 14, 8  # text columns are cut to the first, and only then to the second


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,), width: int | None = None
) -> str:
    """Lines of ``rows`` under ``head``; columns whose index is in ``left`` are texts, the others figures.

    ``None`` prints as ``-``. No line is longer than ``width`` characters, `columns` of them where it is left out.
    """
    width = width or columns()
    cells = [[_text(one) for one in head], *([_text(one) for one in row] for row in rows)]
    widths = _fit([max(len(line[c]) for line in cells) for c in range(len(head))], left, width)
    lines = [_line(line, widths, left) for line in cells]
    lines.insert(1, GAP.join("-" * w for w in widths))
    return "\n".join(shorten(line.rstrip(), width, middle=False) for line in lines)


def columns() -> int:
    """How wide texts for people are: as the terminal that they go to, within reason; 100 where they go elsewhere."""
    if not sys.stdout.isatty():
        return WIDTH
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDTH, 24)).columns))


def shorten(text: str, width: int, middle: bool = True) -> str:
    """``text`` in ``width`` characters: its middle, or its end, gives way to an ellipsis."""
    if len(text) <= width:
        return text
    if not middle or width < 5:
        return text[: width - 1] + "…"
    tail = (width - 1 + 1) // 2
    return text[: width - 1 - tail] + "…" + text[-tail:]


def wrap(text: str, indent: str = "  ", width: int | None = None) -> str:
    """A sentence as lines of at most ``width`` characters, all but the first indented."""
    import textwrap

    return textwrap.fill(
        printable(text), width or columns(), subsequent_indent=indent, break_long_words=True, break_on_hyphens=False
    )


def size(count: float | None) -> str:
    """Bytes as B, KiB, MiB or GiB: ``6.70 MiB``."""
    if count is None:
        return "-"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def number(count: float | None) -> str:
    """A count with a decimal prefix: ``15.47 G``, ``1.23 k``; small ones as they are, 0 as ``-``."""
    if not count:
        return "-"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f}" if float(count).is_integer() else f"{count:.2f}"


def seconds(value: float | None) -> str:
    """A time as s, ms or µs: ``12.3 ms``."""
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"
    return f"{value / 1e-6:.3g} µs"


def dims(shape: Sequence[int]) -> str:
    """A shape as people say it: ``1×64×112×112``."""
    return "×".join(map(str, shape)) or "-"


def _text(value: object) -> str:
    return "-" if value is None else printable(str(value).replace("\n", " "))


def _fit(widths: list[int], left: Sequence[int], width: int) -> list[int]:
    over = sum(widths) + len(GAP) * (len(widths) - 1) - width
    for shortest in (_SHORT, _SHORTEST):
        for column in sorted(left, reverse=True):
            cut = max(0, min(over, widths[column] - shortest))
            widths[column] -= cut
            over -= cut
    return widths


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    fitted = [shorten(text, width) for text, width in zip(cells, widths, strict=True)]
    return GAP.join(
        text.ljust(w) if c in left else text.rjust(w) for c, (text, w) in enumerate(zip(fitted, widths, strict=True))
    )
