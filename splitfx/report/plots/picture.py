"""A picture, or a chart of accuracies, as a file: png, svg or pdf, as the name's end says.

Needs matplotlib, which is imported here only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitfx.errors import MissingExtraError, SplitfxError
from splitfx.ground.files import check_target, written_whole
from splitfx.report.html.style import COLOURS

PALETTE = dict(re.findall(r"--(\w+):\s*(#\w+)", COLOURS.partition("@media")[0]))  # the light one: pictures are printed
_LOOK: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Segoe UI", "Roboto", "DejaVu Sans"],
    "svg.hashsalt": "splitfx",
    "svg.fonttype": "none",  # text stays text, which can be searched
}


@contextmanager
def picture(path: str | os.PathLike[str], size: tuple[float, float], overwrite: bool) -> Iterator[Any]:
    """A figure of ``size`` inches to draw on, written to ``path`` at the end.

    Raises `MissingExtraError` without matplotlib, `SplitfxError` where the name's end is none of png, svg and pdf, and
    where the file exists or cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing needs matplotlib: pip install 'splitfx[plot]'") from error
    check_target(path, overwrite=overwrite, error=SplitfxError)
    form = Path(path).suffix.lstrip(".").lower()
    if form not in ("png", "svg", "pdf"):
        raise SplitfxError(f"{path}: a picture is a png, svg or pdf file by its suffix")
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=size, dpi=140, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with written_whole(path, overwrite=overwrite) as draft:
            figure.savefig(draft, format=form)


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


def plain_axes(axes: Any) -> None:
    """Axes with a soft frame at the left and the bottom only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALETTE["soft"])
    axes.tick_params(colors=PALETTE["ink"], length=0)
