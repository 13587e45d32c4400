"""The record of what the compiler did, beside a saved split: ``explanation.json``.

A graph that is read back from a folder would not know how it was made; with this file `explain` and the
pages tell it. The graph runs without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import fx

from splitfx.api import explain
from splitfx.errors import ExportError
from splitfx.files import written_whole
from splitfx.graph import info
from splitfx.notes import Note
from splitfx.pipeline import Figures, Step

NAME = "explanation.json"


def write_record(split: fx.GraphModule, folder: Path) -> None:
    """Write what `explain` tells of ``split`` into its folder. Raises `ExportError`."""
    with written_whole(folder / NAME, overwrite=True, error=ExportError) as scratch:
        scratch.write_text(explain(split).to_json(), encoding="utf-8")


def read_record(split: fx.GraphModule, folder: Path) -> None:
    """Give ``split`` the steps that made it, where the folder tells them. Raises `ExportError` for a
    damaged file."""
    path = folder / NAME
    if info(split).steps or not path.exists():
        return
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        steps = [_step(one) for one in given["steps"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path} is damaged ({error}); delete it to go on without the record") from error
    info(split).steps = steps


def _step(given: dict[str, Any]) -> Step:
    notes = tuple(Note(**one) for one in given["notes"])
    sizes = {key: Figures(**given[key]) for key in ("before", "after")}
    return Step(**{**given, "notes": notes, **sizes})
