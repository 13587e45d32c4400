"""``splitfx profile``."""

from __future__ import annotations

from argparse import Namespace

from splitfx.cli.arguments import Parser, count, with_model, with_overwrite
from splitfx.cli.output import printed
from splitfx.cli.progress import Progress

TEXT = "count parameters, work and memory of every layer, without running it"


def arguments(one: Parser) -> None:
    with_model(one)
    one.add_argument("--html", metavar="FILE", help="write a page with the graph and the memory over time")
    one.add_argument("--plot", metavar="FILE", help="draw memory and cost (png, svg or pdf; needs splitfx[plot])")
    one.add_argument("--trace", metavar="FILE", help="write the memory over time as a trace for ui.perfetto.dev")
    one.add_argument("--all", action="store_true", help="every operation on a line of its own")
    one.add_argument("--depth", type=count, metavar="N", help="a line per module, N levels deep")
    with_overwrite(one)


def run(given: Namespace, progress: Progress) -> int:
    from splitfx.cli.loading import free_file, graph_of
    from splitfx.report.html import inspect_html
    from splitfx.report.profile import ROWS
    from splitfx.report.profile import profile as profiled

    for path in filter(None, (given.html, given.plot, given.trace)):
        free_file(path, given.overwrite)
    graph = graph_of(given, progress)
    progress("counting")
    found = profiled(graph)
    if given.html:
        progress("drawing")
        inspect_html(graph, given.html, overwrite=given.overwrite)
    if given.plot:
        progress("drawing")
        found.plot(given.plot, overwrite=given.overwrite)
    if given.trace:
        found.save_trace(given.trace, overwrite=given.overwrite)
    return printed(given, found.to_json(), found.table(None if given.all else ROWS, given.depth))
