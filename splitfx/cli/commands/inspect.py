"""``splitfx inspect``."""

from __future__ import annotations

import json
from argparse import Namespace

from splitfx.cli.arguments import Parser, with_overwrite, with_split
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress
from splitfx.errors import SplitfxError

TEXT = "list the groups of classes of a saved split; write a page about it: graph, notes, layers"


def arguments(one: Parser) -> None:
    with_split(one)
    one.add_argument("--html", metavar="FILE", help="the page to write")
    one.add_argument("--svg", metavar="FILE", help="write the drawing of the graph alone")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import free_file, saved
    from splitfx.report.html import inspect_html, inspect_svg
    from splitfx.report.plots.splitnet_classes import carved_classes, classes_text

    asked = {kind: path for kind, path in (("html", given.html), ("svg", given.svg)) if path}
    for path in asked.values():
        free_file(path, given.overwrite)
    split = saved(given.split, progress)
    classes = carved_classes(split)
    if not asked and classes is None:
        raise SplitfxError("nothing to write: give --html FILE, --svg FILE or both; its classes are not in groups")
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
