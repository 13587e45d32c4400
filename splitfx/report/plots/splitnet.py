"""SplitNet in pictures: weights before and after sorting by group, classes by group, the penalties over training.

Each is a file, png, svg or pdf by its suffix. Needs matplotlib, which is imported here only; without it
`MissingExtraError` says which extra to install. Raises `SplitfxError` where the file exists or cannot be written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx

from splitfx.errors import PlanError
from splitfx.ground.table import shorten
from splitfx.report.plots.picture import PALETTE, picture, plain_axes
from splitfx.report.plots.splitnet_classes import Agreement, Classes, agreement, grouped_classes
from splitfx.report.plots.splitnet_matrices import Matrix, matrices, reduced
from splitfx.splitnet.assignment import OPTIONS, Assignment, structure
from splitfx.splitnet.learn import Groups
from splitfx.splitnet.sources import Taxonomy
from splitfx.splitnet.structure import Structure

SHOWN, PIXELS = 6, 320  # layers, and rows and columns of a matrix, that are drawn
BAND = 50  # classes beside each other; more are drawn below
INCH = 0.2  # of a class


def plot_weights(
    graph: fx.GraphModule | Structure,
    assignment: Mapping[str, Sequence[int]],
    path: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """The weights of split layers in the user's order, and beside it sorted by group, with the groups' borders.

    ``graph``: the dense graph from `trace` (its weights are drawn), or a `Structure` of it, as it must be given for an
    assignment that is a plain dict. ``layers``: by name, else some of the split layers from first to last.
    """
    if isinstance(graph, Structure):
        found = graph
    elif isinstance(assignment, Assignment):
        found = structure(graph, **{o: assignment.options[o] for o in OPTIONS[:-1] if o in assignment.options})
    else:
        raise PlanError("the assignment does not say what is split: give splitfx.splitnet.structure(graph, levels)")
    drawn = matrices(found, assignment, layers)
    if layers is None and len(drawn) > SHOWN:
        drawn = [drawn[i] for i in np.linspace(0, len(drawn) - 1, SHOWN).round().astype(int)]
    if not drawn:
        raise PlanError("no layers to draw: give the names of split layers, or None for some of them")
    pairs = min(2, len(drawn))
    rows = -(-len(drawn) // pairs)
    with picture(path, (5.8 * pairs, 3.2 * rows + 0.4), overwrite) as figure:
        figure.suptitle("Weights before and after sorting by group", color=PALETTE["ink"], fontsize=13)
        cells = np.ravel(figure.subfigures(rows, pairs, squeeze=False))
        for cell, matrix in zip(cells, drawn, strict=False):
            _pair(cell, matrix)


def _pair(cell: Any, matrix: Matrix) -> None:
    inputs, outputs = matrix.rms.shape[1], matrix.rms.shape[0]
    told = f"{matrix.level} groups hold {matrix.kept:.1%} of the weight energy"
    cell.suptitle(f"{shorten(matrix.layer, 34)}: {told}", color=PALETTE["ink"], fontsize=9.5)
    before, after = cell.subplots(1, 2)
    top = float(np.quantile(reduced(matrix.rms, PIXELS), 0.995)) or 1.0
    for axes, shown, name in ((before, matrix.rms, "in your order"), (after, matrix.sorted, "by group")):
        axes.imshow(
            reduced(shown, PIXELS),
            cmap=_shades(),
            vmin=0,
            vmax=top,
            extent=(0, inputs, outputs, 0),
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_xlabel(f"{inputs} inputs, {name}", color=PALETTE["soft"], fontsize=8.5)
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_color(PALETTE["line"])
    before.set_ylabel(f"{outputs} outputs", color=PALETTE["soft"], fontsize=8.5)
    for top_row, bottom, left, right in matrix.blocks:
        line = {"fill": False, "edgecolor": PALETTE["orange"], "linewidth": 1.2, "clip_on": False, "zorder": 3}
        after.add_patch(_rectangle((left, top_row), right - left, bottom - top_row, line))


def plot_classes(
    assignment: Mapping[str, Sequence[int]] | fx.GraphModule,
    path: str | os.PathLike[str],
    taxonomy: Taxonomy | None = None,
    *,
    classes: Sequence[str] = (),
    layer: str = "",
    overwrite: bool = False,
) -> None:
    """Which classes are in which group, by name; with a taxonomy (nested tables of class names, or a file), the
    super-classes in colours, their shares in each group and the adjusted Rand index.

    ``assignment``: or a model that SplitNet carved. ``classes``: names in the order of the logits, where the assignment
    has none; ``layer``: the layer of the logits, where as many channels as classes are found elsewhere too.
    """
    known = grouped_classes(assignment, classes, layer)
    found = agreement(known, taxonomy) if taxonomy is not None else None
    bands = class_bands(known, found)
    longest = max(map(len, known.names)) * 0.075 + 0.1  # inches, written upright
    heights = [len({int(known.groups[c]) for c in band}) * INCH + min(longest, 2.6) for band in bands]
    shares = 0.0 if found is None else len(found.parts) * INCH + 1.0
    width = max(len(bands[0]) * INCH + 2.2, 6.5)
    with picture(path, (width, sum(heights) + shares + 0.7 + 0.15 * len(bands)), overwrite) as figure:
        title = f"{len(known.names)} classes in {known.level} groups"
        if found is not None:
            title += f"\nadjusted Rand index against the taxonomy's {len(found.parts)} super-classes: {found.index:.2f}"
        figure.suptitle(title, color=PALETTE["ink"], fontsize=12)
        parts = figure.subfigures(
            len(bands) + (found is not None), 1, height_ratios=[*heights, *([shares] if shares else [])], squeeze=False
        )
        for part, band in zip(parts[:, 0], bands, strict=False):
            _band(part.subplots(), known, found, band, len(bands[0]))
        if found is not None:
            _shares(parts[-1, 0].subplots(), found, known.level)


def class_bands(known: Classes, found: Agreement | None = None) -> list[list[int]]:
    """The classes by group, then by super-class, in runs that fit beside each other."""
    part = found.part if found is not None else np.zeros(len(known.groups), dtype=int)
    order = np.lexsort((part, known.groups)).tolist()
    count = -(-len(order) // BAND)
    return [run.tolist() for run in np.array_split(order, count)]


def _band(axes: Any, known: Classes, found: Agreement | None, band: list[int], width: int) -> None:
    groups = sorted({int(known.groups[c]) for c in band})
    for column, one in enumerate(band):
        colour = PALETTE["blue"] if found is None else _colour(int(found.part[one]))
        face = {"facecolor": colour, "edgecolor": PALETTE["card"], "linewidth": 1}
        axes.add_patch(_rectangle((column, groups.index(int(known.groups[one]))), 1, 1, face))
    for line in range(len(groups) + 1):
        axes.axhline(line, xmax=len(band) / width, color=PALETTE["line"], linewidth=0.8, zorder=0)
    for column in range(len(band) + 1):
        axes.plot((column, column), (0, len(groups)), color=PALETTE["line"], linewidth=0.5, zorder=0)
    axes.set(xlim=(0, width), ylim=(len(groups), 0))
    names = [shorten(known.names[c], 34) for c in band]
    axes.set_xticks(np.arange(len(band)) + 0.5, names, rotation=90, fontsize=8, color=PALETTE["ink"])
    counts = [len(known.members(g)) for g in groups]
    sizes = [f"group {g + 1}, {n} class{'es' * (n != 1)}" for g, n in zip(groups, counts, strict=True)]
    axes.set_yticks(np.arange(len(groups)) + 0.5, sizes, fontsize=8.5, color=PALETTE["ink"])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _shares(axes: Any, found: Agreement, level: int) -> None:
    axes.imshow(found.shares, cmap=_shades(), vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(found.shares):
        if share:
            ink = PALETTE["card"] if share > 0.6 else PALETTE["ink"]
            axes.text(column, row, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(level), [f"group {g + 1}" for g in range(level)], fontsize=8.5, color=PALETTE["ink"])
    axes.set_yticks(range(len(found.parts)), [shorten(p, 34) for p in found.parts], fontsize=8.5, color=PALETTE["ink"])
    strip = 0.02 * level  # its colour above, before each row
    for row in range(len(found.parts)):
        face = {"facecolor": _colour(row), "edgecolor": PALETTE["card"], "linewidth": 1}
        axes.add_patch(_rectangle((-0.5 - strip, row - 0.5), strip, 1, face))
    axes.set_xlim(-0.5 - strip, level - 0.5)
    axes.set_title("share of each super-class in each group", fontsize=9.5, color=PALETTE["soft"], loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_color(PALETTE["line"])


def plot_curves(
    groups: Groups | Mapping[str, Sequence[float]], path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """The three penalties, without their factors, over the steps of learning. ``groups``: from `attach`, or what their
    `curves` gave."""
    curves = groups.curves() if isinstance(groups, Groups) else groups
    if not curves or not all(len(values) for values in curves.values()):
        raise PlanError("no steps to draw: the penalties are recorded while the groups are learned")
    with picture(path, (7.5, 4), overwrite) as figure:
        axes = figure.subplots()
        axes.axhline(1, color=PALETTE["line"], linewidth=1, zorder=0)
        for (name, values), colour in zip(curves.items(), ("blue", "orange", "green"), strict=False):
            steps = range(1, len(values) + 1)
            mark = "o" if len(values) == 1 else ""
            axes.plot(
                steps,
                values,
                color=PALETTE[colour],
                linewidth=1.6,
                marker=mark,
                label=f"{name}, at last {values[-1]:.3g}",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=PALETTE["soft"])
        axes.set_ylabel("penalty; 1 where all groups are alike", color=PALETTE["soft"])
        axes.set_title("Learning the groups", color=PALETTE["ink"], fontsize=12, loc="left")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        plain_axes(axes)


# ---------------------------------------------------------------- what they share


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("weights", [PALETTE["card"], PALETTE["blue"]])


def _rectangle(corner: tuple[float, float], width: float, height: float, look: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **look)


def _colour(number: int) -> Any:
    """A colour per super-class: twenty that can be told apart, then again from the first."""
    from matplotlib import colormaps

    shades = colormaps["tab20"].colors  # type: ignore[attr-defined]
    return shades[(2 * number if number % 20 < 10 else 2 * number - 19) % 20]
