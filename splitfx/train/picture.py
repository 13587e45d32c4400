"""A chart of accuracies as a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from splitfx.report.plots.picture import picture, plain_axes


@contextmanager
def chart(path: str | os.PathLike[str], overwrite: bool, x_label: str) -> Iterator[Any]:
    """Axes to draw accuracies in percent on; written to ``path`` (png, svg or pdf by its suffix) at the end.

    Raises `MissingExtraError` without matplotlib, `SplitfxError` where the file cannot be written.
    """
    with picture(path, (7, 4), overwrite) as figure:
        axes = figure.subplots()
        yield axes
        axes.set(xlabel=x_label, ylabel="accuracy [%]")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        plain_axes(axes)
