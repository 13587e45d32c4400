"""Results: frozen data that `print` shows as a table, a notebook too, and that machines read as JSON."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from typing import Any, cast

_STYLE = "line-height:1.35;font-size:12.5px;overflow-x:auto;white-space:pre;margin:0"


class Shown:
    """A result, a dataclass, whose text is a table: a notebook shows it without a ``print``."""

    def _repr_html_(self) -> str:
        return f'<pre style="{_STYLE}">{escape(str(self))}</pre>'

    def to_dict(self) -> dict[str, Any]:
        """Its fields, and those of what they hold, by name; sizes in bytes, times in seconds."""
        return dataclasses.asdict(cast(Any, self))

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, default=str)
