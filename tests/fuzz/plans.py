"""Passes with drawn options that go with a graph: how many blocks it has decides how many factors are drawn."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from torch import fx

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.analysis.shapes import shape
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError
from splitfx.ir.graph import layer, output_node
from splitfx.ir.ops import Channel, op, op_name
from splitfx.passes import DropIdentity, FoldBatchNorm, Group, SeparablePool, SplitNet, SubNetworks, Tile, TileZeroHalo


def draw_passes(rng: Random, graph: fx.GraphModule) -> list[Callable[[Random, fx.GraphModule], Pass]]:
    """One to three passes in any order; each is drawn for the graph that it will meet."""
    classifier = [len(shape(facts(graph).shapes[n])) for n in output_node(graph).all_input_nodes] == [2]
    makers = [group, group, tile, tile, fold, drop, pools, subnetworks, *[splitnet] * (4 if classifier else 0)]
    return [rng.choice(makers) for _ in range(rng.choice((1, 2, 2, 3)))]


def fold(rng: Random, graph: fx.GraphModule) -> Pass:
    return FoldBatchNorm()


def pools(rng: Random, graph: fx.GraphModule) -> Pass:
    return SeparablePool()


def drop(rng: Random, graph: fx.GraphModule) -> Pass:
    return DropIdentity(eval_only=rng.random() < 0.6)


def group(rng: Random, graph: fx.GraphModule) -> Pass:
    count = max(1, len(blocks(facts(graph))))
    naive = rng.random() < 0.2
    factors = tuple(rng.choice((1, 2, 2, 3)) for _ in range(1 if naive else count))
    return Group(
        factors=factors,
        fusion="none" if naive else rng.choice(("widen", "keep", "none")),
        share=rng.choice((0, 0, 0, 1, 2)),
        gating=rng.choice(("strict", "relaxed")),
        order=rng.choice(("given", "energy")),
        lowering=rng.choice(("branches", "grouped", "branches", "grouped", "auto")),
        exclude=_some_layers(rng, graph, Channel.MIXES) if rng.random() < 0.2 else (),
    )


def tile(rng: Random, graph: fx.GraphModule) -> Pass:
    form = rng.choice(("least", "half", "bytes", "rows", "rows", "grid", "zero"))
    checkpoint = rng.random() < 0.15
    mode: Any = rng.choice(("auto", "auto", "stream", "grid"))
    until = _some_layers(rng, graph)[0] if rng.random() < 0.2 else ""
    if form == "half":
        return Tile(mode=mode, checkpoint=checkpoint, until=until)
    if form in ("least", "bytes"):
        peak = facts(graph).memory.peak_bytes
        budget = "least" if form == "least" else f"{max(1, int(peak * rng.uniform(0.5, 1.2)))} B"
        return Tile(budget=budget, mode=mode, checkpoint=checkpoint, until=until)
    grid = (rng.randint(1, 3), rng.randint(2, 3))
    if form == "zero":
        return TileZeroHalo(grid=grid, until=_some_layers(rng, graph)[0])
    every = tuple(rng.randint(1, 3) for _ in range(rng.randint(0, 3)))
    rows = rng.randint(1, 9) if form == "rows" else rng.choice((0, 0, 3))
    by_hand = {
        "rows": rows,
        "firing_intervals": every,
        "recompute": rng.choice((-1, -1, 0, 5000)),
        "checkpoint": checkpoint,
    }
    return Tile(grid=(1, 1) if form == "rows" else grid, until=until, **by_hand)


def splitnet(rng: Random, graph: fx.GraphModule) -> Pass:
    layers = [layer(e.node) for e in facts(graph).axes.edges]
    what: dict[str, Any] = {"depth": rng.randint(1, 3), "groups": rng.randint(2, 3)}
    if layers and rng.random() < 0.3:
        what = {"levels": {name: rng.choice((2, 2, 4)) for name in rng.sample(layers, min(2, len(layers)))}}
    return SplitNet(
        **what,
        source=rng.choice(("random", "weights", "clustering")),
        seed=rng.randint(0, 3),
        boundary=rng.choice(("grouped", "full")),
        gating=rng.choice(("strict", "relaxed")),
        lowering=rng.choice(("grouped", "padded", "branches", "auto")),
    )


def subnetworks(rng: Random, graph: fx.GraphModule) -> Pass:
    what: dict[str, Any] = rng.choice(
        ({}, {"cuts": (1,)}, {"cuts": (1, 2)}, {"budgets": ("0.7x", "0.4x")}, {"budgets": ("0.6x",), "of": "peak"})
    )
    return SubNetworks(**what, statistics=rng.choice(("shared", "private")), seed=rng.randint(0, 3))


def _some_layers(rng: Random, graph: fx.GraphModule, channel: Channel | None = None) -> tuple[str, ...]:
    names = [layer(n) for n in graph.graph.nodes if op_name(n) and channel in (None, op(n).channel)]
    return tuple(rng.sample(names, min(len(names), rng.randint(1, 2)))) or ("nothing",)


def drawn_for(make: Callable[[Random, fx.GraphModule], Pass], rng: Random, graph: fx.GraphModule) -> Pass | None:
    """The pass, or None where the options that were drawn do not go together."""
    try:
        return make(rng, graph)
    except PlanError:
        return None
