"""Sub-models on the page: where each enters the graph, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from torch import fx

from splitfx.compiler.sketch import Sketch, words
from splitfx.ground.table import number, size
from splitfx.ir.graph import layer
from splitfx.report.explanation import ratio
from splitfx.subnetworks.entry import Entry, entries
from splitfx.subnetworks.model import SubNetworksGraph


def entry_words(graph: fx.GraphModule, nodes: Sequence[Sketch]) -> tuple[Sketch, ...]:
    """The sketch with every entry described, and drawn as one that reads the image too."""
    found = {node.name: entry for node, entry in entries(graph)}
    images = [place for place, one in enumerate(nodes) if one.op == "input"]
    return tuple(
        replace(one, words=_words(found[one.name]), reads=(*one.reads, images[found[one.name].reads]))
        if one.name in found
        else one
        for one in nodes
    )


def _words(entry: Entry) -> str:
    layers = [text for module in entry.step_down.modules() if (text := words(module))]
    return f"sub{entry.number} enters: {', '.join(layers)}"


def models_html(graph: fx.GraphModule) -> Iterator[str]:
    """The section of a graph with sub-models; nothing for others."""
    if not isinstance(graph, SubNetworksGraph):
        return
    where = {f"sub{entry.number}": node for node, entry in entries(graph)}
    base, *_ = found = graph.figures()
    yield "<h2>Models</h2>"
    yield '<p class="soft">Each is a network of its own over the same weights; detach(i) gives sub-model i.</p>'
    rows = []
    for one in found:
        enters = where.get(one.name)
        behind = layer(enters.all_input_nodes[0]) if enters is not None else ""
        cells = (
            (one.macs, number(one.macs), ratio(base.macs, one.macs)),
            (one.params, number(one.params), ratio(base.params, one.params)),
            (one.peak_bytes, size(one.peak_bytes), ratio(base.peak_bytes, one.peak_bytes)),
        )
        told = "".join(
            f'<td class="bars" style="--w:{100 * value / most:.0f}%">{text}</td><td>{escape(change)}</td>'
            for (value, text, change), most in zip(cells, (base.macs, base.params, base.peak_bytes), strict=True)
        )
        rows.append(
            f"<tr><td>{escape(one.name)}</td><td>{escape(f'in place of all up to {behind}' if behind else 'the input')}"
            f"</td>{told}</tr>"
        )
    yield (
        '<div class="wide"><table><thead><tr><th>model</th><th>the image enters</th><th>MACs</th><th></th>'
        f"<th>parameters</th><th></th><th>peak</th><th></th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
