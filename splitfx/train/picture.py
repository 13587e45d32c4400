"""A chart of accuracies as a file. Needs matplotlib, which is imported here only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import MissingExtraError, SplitfxError
from splitfx.files import written_whole


@contextmanager
def chart(path: str | os.PathLike[str], overwrite: bool, x_label: str) -> Iterator[Any]:
    """Axes to draw accuracies in percent on; written to ``path`` (png, svg or pdf by its suffix) at the end.

    Raises `MissingExtraError` without matplotlib, `SplitfxError` where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing needs matplotlib: pip install 'splitfx[plot]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    form = Path(path).suffix.lstrip(".").lower()
    if form not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise SplitfxError(f"{path}: a picture is a png, svg or pdf file by its suffix")
    axes = figure.subplots()
    yield axes
    axes.set(xlabel=x_label, ylabel="accuracy [%]")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path, overwrite=overwrite) as scratch:
        figure.savefig(scratch, format=form, dpi=150)
