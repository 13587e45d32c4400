"""Results in a notebook: what `print` shows, as they stand, in letters of one width."""

from __future__ import annotations

from html import escape

_STYLE = "line-height:1.35;font-size:12.5px;overflow-x:auto;white-space:pre;margin:0"


class Shown:
    """A result whose text is a table: a notebook shows it without a ``print``."""

    def _repr_html_(self) -> str:
        return f'<pre style="{_STYLE}">{escape(str(self))}</pre>'
