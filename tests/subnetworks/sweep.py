"""Every cut of a model at one size: the sub-model runs, and every layer behind the cut gives what it gives in the base.

Sizes are propagated on fake tensors, so the largest models take no memory; `splitfx.subnetworks` says where cuts lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from splitfx.analysis import Facts, facts
from splitfx.analysis.shapes import shape
from splitfx.errors import UnsupportedError
from splitfx.frontend.trace import trace
from splitfx.ir.editing import insert_after
from splitfx.ir.graph import copy_graph, output_node
from splitfx.ir.ops import op_name
from splitfx.subnetworks.build import make_entry
from splitfx.subnetworks.model import detached
from splitfx.subnetworks.sites import Sites
from tests.zoo.models import create

SIZES = (224, 227, 256)  # one that a stem divides, an odd one, one that windows divide
FIXED = ("vit_", "maxvit")  # made for 224×224: other sizes are no input of theirs


@dataclass(frozen=True)
class Swept:
    """How many cuts a model has at a size, how many of each form, what was wrong, and why there are none."""

    cuts: int
    forms: dict[str, int]
    wrong: tuple[str, ...]
    why: str


def sizes_of(name: str) -> tuple[int, ...]:
    return (224,) if name.startswith(FIXED) else SIZES


def sweep(name: str, size: int) -> Swept:
    """Trace a torchvision classifier and try every cut."""
    model = create(f"torchvision:{name}").eval()
    return swept(trace(model, torch.zeros(1, 3, size, size)))


def swept(graph: fx.GraphModule) -> Swept:
    known = facts(graph)
    sites = Sites(known)
    forms: dict[str, int] = {}
    wrong: list[str] = []
    work = copy_graph(graph, share=True)
    cuts = {n.name: n for n in work.graph.nodes}
    entries = [make_entry(known, sites, site, number, 0) for number, site in enumerate(sites.found)]
    for site, entry in zip(sites.found, entries, strict=True):
        insert_after(work, cuts[site.cut.name], f"sub{entry.number}", entry)
    work.recompile()
    for site, entry in zip(sites.found, entries, strict=True):
        if sites.resolve(site.enters) != site:
            wrong.append(f"{site.enters} is found again elsewhere")
        forms[entry.form] = forms.get(entry.form, 0) + 1
        wrong += compared(known, detached(work, entry.number), site.enters)
    return Swept(len(sites.found), forms, tuple(wrong), sites.why)


def compared(known: Facts, made: fx.GraphModule, enters: str) -> list[str]:
    """Layers of a sub-model whose results have other sizes than in the base model; all of its own nodes run."""
    try:
        own = results(facts(made))
    except UnsupportedError as error:
        return [f"{enters}: does not run: {error}"]
    base = results(known)
    behind = {path: sizes for path, sizes in own.items() if not path.startswith("step_down")}
    return [f"{enters}: {p} gives {sizes}" for p, sizes in behind.items() if base[p][-len(sizes) :] != sizes]


def results(known: Facts) -> dict[str, list[tuple[int, ...]]]:
    """The sizes that every layer gives, call by call, and the output's."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for node in known.graph.graph.nodes:
        if node.op == "call_module" and op_name(node) != "entry":
            found.setdefault(str(node.target), []).append(shape(known.shapes[node]))
    end = output_node(known.graph)
    return {**found, "output": [shape(known.shapes[n]) for n in end.all_input_nodes]}
