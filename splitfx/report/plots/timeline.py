"""A profile as a picture: memory over the run of the graph, and what each layer costs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from splitfx.ground.table import number, shorten, size
from splitfx.report.fold import fold
from splitfx.report.plots.picture import picture, plain_axes

if TYPE_CHECKING:
    from splitfx.report.fold import Line
    from splitfx.report.profile import Profile

_INK, _SOFT, _LIVE, _INPUT, _MACS, _PARAMS = "#1f2933", "#9aa5b1", "#3b82c4", "#b6d0ea", "#e07a3f", "#4c9f70"
_BARS = 40


def draw(profile: Profile, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write the picture to ``path``, a png, svg or pdf file; errors as for `picture`."""
    lines = [line for line in fold(profile.rows, _BARS)[0] if line.macs or line.params]
    with picture(path, (12, 4.2 + 0.2 * len(lines)), overwrite) as figure:
        halves: Any = figure.subfigures(2, 1, height_ratios=(3.6, 0.6 + 0.2 * len(lines)))
        top, bottom = halves
        figure.suptitle(
            f"{profile.model} on {', '.join(profile.inputs)}: {number(profile.params)} parameters, "
            f"{number(profile.macs)} MACs, peak {size(profile.peak_bytes)}",
            color=_INK,
            fontsize=13,
        )
        _memory(top.subplots(), profile)
        macs, params = bottom.subplots(1, 2, sharey=True)
        _bars(macs, lines, [line.macs for line in lines], "MACs", _MACS)
        _bars(params, lines, [line.params for line in lines], "parameters", _PARAMS)


def _memory(axes: Any, profile: Profile) -> None:
    live = [row.live_bytes / 2**20 for row in profile.rows]
    inputs = profile.input_bytes / 2**20
    edges = list(range(len(live) + 1))
    axes.stairs(live, edges, fill=True, color=_LIVE, alpha=0.85, label="values")
    axes.stairs([inputs] * len(live), edges, fill=True, color=_INPUT, label="inputs")
    axes.set_xlim(0, len(live))
    axes.set_ylim(0, max(live) * 1.22)
    axes.set_ylabel("alive (MiB)", color=_INK)
    axes.set_xlabel("operations in order of execution", color=_INK)
    at = next(i for i, row in enumerate(profile.rows) if row.live_bytes == profile.peak_bytes)
    right = at > len(live) / 2
    axes.plot([at + 0.5], [live[at]], marker="o", markersize=5, color=_INK)
    axes.annotate(
        f"peak {size(profile.peak_bytes)} at {profile.peak_node}",
        (at + 0.5, live[at]),
        xytext=(-4 if right else -2, 9),
        textcoords="offset points",
        ha="right" if right else "left",
        color=_INK,
        fontsize=10,
        fontweight="bold",
    )
    axes.legend(loc="upper left" if right else "upper right", frameon=False)
    plain_axes(axes)


def _bars(axes: Any, lines: list[Line], values: list[int], title: str, color: str) -> None:
    places = range(len(lines))
    axes.barh(places, values, color=color, height=0.72)
    axes.set_title(title, color=_INK, fontsize=11, loc="left")
    axes.set_yticks(places, [shorten(line.layer, 38) for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(0, (max(values, default=0) or 1) * 1.14)
    axes.xaxis.set_visible(False)
    for place, value in enumerate(values):
        if value:
            axes.text(value, place, f" {number(value)}", va="center", fontsize=7.5, color=_INK)
    plain_axes(axes)
    axes.spines["bottom"].set_visible(False)
