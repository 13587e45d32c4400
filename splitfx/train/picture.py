"""A chart of accuracies as a file. Needs matplotlib, which is imported here only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import MissingExtraError
from splitfx.files import written_whole


@contextmanager
def chart(path: str | os.PathLike[str], overwrite: bool, x_label: str) -> Iterator[Any]:
    """Axes to draw accuracies in percent on; written to ``path`` (png, svg or pdf by its suffix) at the end.

    Raises `MissingExtraError` without matplotlib, `SplitfxError` where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing needs matplotlib: pip install 'splitfx[plot]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set(xlabel=x_label, ylabel="accuracy [%]")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path, overwrite=overwrite) as scratch:
        figure.savefig(scratch, format=Path(path).suffix.lstrip(".") or "png", dpi=150)
