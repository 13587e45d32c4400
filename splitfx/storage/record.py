"""The record of what the compiler did, beside a saved split: ``explanation.json``, with a sketch of the graph before.

A graph that is read back from a folder would not know how it was made; with this file `explain` and the
pages tell it. The graph runs without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from msgspec import Struct
from torch import fx

from splitfx.compiler.pipeline import Step
from splitfx.compiler.sketch import Sketch
from splitfx.errors import ExportError
from splitfx.ground.files import written_whole
from splitfx.ground.files.typed import read_typed
from splitfx.ir.graph import info
from splitfx.report.explain import explain
from splitfx.report.explanation import PROMISES
from splitfx.text import shown

NAME = "explanation.json"


def write_record(split: fx.GraphModule, folder: Path) -> None:
    """Write what `explain` tells of ``split`` into its folder. Raises `ExportError`."""
    with written_whole(folder / NAME, overwrite=True, error=ExportError) as draft:
        told = {**asdict(explain(split)), "origin": [asdict(one) for one in info(split).origin]}
        draft.write_text(json.dumps(told, default=str), encoding="utf-8")


def read_record(split: fx.GraphModule, folder: Path) -> None:
    """Give ``split`` the steps that made it, where the folder tells them. Raises `ExportError` for a
    damaged file."""
    path = folder / NAME
    if info(split).steps or not path.exists():
        return
    advice = "; delete it to go on without the record"
    record = read_typed(path, _Record, ExportError, "it is no record", advice)
    info(split).steps, info(split).origin = record.steps, tuple(record.origin)


class _Record(Struct):
    steps: list[Step]
    origin: list[Sketch] = []

    def __post_init__(self) -> None:
        if any(not 0 <= read < place for place, one in enumerate(self.origin) for read in one.reads):
            raise ValueError("an operation reads one that does not stand before it")
        for one in self.steps:
            if one.promise not in PROMISES:
                raise ValueError(f"there is no promise {shown(one.promise)}")
