"""``splitfx inspect``."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from splitfx.cli.arguments import Parser, with_model, with_overwrite
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import SplitfxError

TEXT = "write a page about a model or a saved split: its graph before and after, memory, layers, notes"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("--html", metavar="FILE", help="the page to write")
    one.add_argument("--svg", metavar="FILE", help="write the drawing of the graph alone")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import free_file, graph_of
    from splitfx.report.html import inspect_html, inspect_svg
    from splitfx.report.plots.splitnet_classes import carved_classes, classes_text

    asked = {kind: path for kind, path in (("html", given.html), ("svg", given.svg)) if path}
    for path in asked.values():
        free_file(path, given.overwrite)
    if given.svg and Path(given.svg).suffix.lower() != ".svg":
        raise SplitfxError(f"--svg {given.svg}: the drawing is an SVG file, so its name ends in .svg")
    split = graph_of(given, progress)
    classes = carved_classes(split)
    if not asked and classes is None:
        raise SplitfxError(
            "nothing to write: give --html FILE for the page, --svg FILE for the drawing alone; "
            "`splitfx explain` and `splitfx profile` tell it in words"
        )
    if asked:
        progress("drawing")
    for kind, path in asked.items():
        (inspect_html if kind == "html" else inspect_svg)(split, path, overwrite=given.overwrite)
    made: dict[str, object] = dict(asked)
    people = [classes_text(classes)] if classes else []
    if classes:
        made["groups"] = [classes.members(g) for g in range(classes.level)]
    if asked:
        people.append(f"wrote {' and '.join(asked.values())}")
    return printed(given, json.dumps(made), "\n\n".join(people))
