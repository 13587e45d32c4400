"""SubNetworks: a base model and sub-models that enter it at cuts (Fuengfusin and Tamukoh, *CNSN*).

A sub-model leaves out everything in front of a cut; a step-down convolution takes the image to the sizes and channels
that the cut has, and all layers behind are those of the base model. The result is the base model; `detach(i)`,
`forward_all(x)` and `select(...)` give the rest (`splitfx.subnetworks.model`).

Refused: cuts inside a residual block or across a skip, behind the head, twice; budgets that no cut meets.
Promise RESHAPE: the base model computes what the model did, each sub-model what the model's own layers make of the
step-down's value, with the model's own tensors.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.cost import cost
from splitfx.analysis.shapes import shapes
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise, not_in_plan
from splitfx.errors import PlanError
from splitfx.ir.editing import free_path, insert_after
from splitfx.ir.graph import Staged, TensorSpec, copy_graph, dress, layer, module_of
from splitfx.ir.layers import FunctionalBatchNorm
from splitfx.ir.ops import bind, op_name
from splitfx.ir.walks import descendants
from splitfx.subnetworks.build import make_entry, words
from splitfx.subnetworks.choose import closest_below, latencies, parse_budget
from splitfx.subnetworks.entry import Entry, entries
from splitfx.subnetworks.model import detached
from splitfx.subnetworks.oracle import require_models
from splitfx.subnetworks.sites import Site, Sites
from splitfx.subnetworks.start import solve_step_downs, take_statistics

_FORM = {"closed": "fits every size", "static": "fits the traced size only", "embedding": "the model's embedding anew"}
DEFAULT = "0.5x"  # where neither cuts nor budgets are given: one sub-model of at most half the work


@dataclass(frozen=True)
class SubNetworks(Pass):
    """Add sub-models that share the base model's weights and enter through a step-down conv (Fuengfusin and Tamukoh).

    ``cuts``: where they enter: a number of convs that are dropped (the paper's 2 and 7), or the first layer that is
    kept (``"layer3"``). ``budgets`` instead: shares of the base model such as ``("0.9x", "0.4x")``; each picks the cut
    closest below. ``of``: what budgets are shares of: ``"macs"``, ``"latency"`` (measured here, at the traced size) or
    ``"peak"``. With neither, one sub-model of at most half the MACs. ``statistics``: batch norms of a sub-model have
    running statistics of their own (``"private"``; a note says where they cannot) or use and move those of the base
    model (``"shared"``, the paper's way, which costs all models accuracy). ``seed``: of the random new weights.
    ``calibration``: example inputs on which step-downs are solved by least squares for what the base model has at the
    cut, and statistics of their own are taken. Raises `PlanError` with the layers that work where a cut or a budget
    does not.
    """

    name: ClassVar[str] = "subnetworks"
    promise: ClassVar[Promise] = Promise.RESHAPE
    writes_weights: ClassVar[bool] = False

    cuts: tuple[int | str, ...] = ()
    budgets: tuple[str, ...] = ()
    of: Literal["macs", "latency", "peak"] = "macs"
    statistics: Literal["private", "shared"] = "private"
    seed: int = 0
    calibration: Any = not_in_plan()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuts and self.budgets:
            raise PlanError("pass 'subnetworks': give cuts or budgets, not both")
        if self.of != "macs" and self.cuts:
            raise PlanError(f"pass 'subnetworks': of={self.of!r} goes with budgets, not with cuts")
        for given, what in ((self.cuts, "cut"), (self.budgets, "budget")):
            twice = [one for i, one in enumerate(given) if one in given[:i]]
            if twice:
                raise PlanError(f"pass 'subnetworks': {what} {twice[0]!r} is given twice")
        for budget in self.budgets:
            parse_budget(budget)
        for cut in self.cuts:
            if isinstance(cut, int) and cut < 1:
                raise PlanError(f"pass 'subnetworks': a number is that of the convs dropped, 1 or more; got {cut}")

    def held(self, before: fx.GraphModule, after: fx.GraphModule) -> float:
        """Every model against the model's own layers, fed by its step-down (`splitfx.subnetworks.oracle`)."""
        return require_models(self.name, before, after)

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        sites = Sites(facts)
        if sites.why and not self.cuts and not self.budgets:
            return Outcome((Note("model", f"no sub-model: {sites.why}", "declined"),))
        first = len(entries(graph))
        chosen = self.chosen(graph, facts, sites)
        self.once(chosen)
        before = copy_graph(graph, share=True)
        made = [make_entry(facts, sites, site, first + i, self.seed) for i, site in enumerate(chosen)]
        notes = []
        if self.statistics == "private":
            for site, entry in zip(chosen, made, strict=True):
                notes += keep_statistics(graph, site.cut, entry)
        base = facts.cost.macs
        for site, entry in zip(chosen, made, strict=True):
            share = cost_of(facts, site.cut, entry) / base if base else 1.0
            what = f"sub{entry.number} enters here with {share:.2f}x of the MACs: {words(entry, site.cut)}"
            notes.append(Note(site.enters, f"{what} ({_FORM[entry.form]})"))
        solved = self.calibration is not None
        if solved:
            twins = {n.name: n for n in before.graph.nodes}
            at = [(twins[site.cut.name], entry) for site, entry in zip(chosen, made, strict=True)]
            notes += solve_step_downs(before, at, self.calibration)
        for site, entry in zip(chosen, made, strict=True):
            insert_after(graph, site.cut, free_path(graph, f"sub{entry.number}"), entry)
        dress(graph)
        if solved:
            graph.recompile()
            for entry in made:
                take_statistics(graph, entry.number, self.calibration)
        resolved = replace(self, cuts=tuple(s.enters for s in chosen), budgets=(), of="macs", calibration=None)
        by_name = self.cuts and all(isinstance(c, int) or c == s.enters for c, s in zip(self.cuts, chosen, strict=True))
        return Outcome(tuple(notes), before, None if by_name and not solved else resolved)

    # ------------------------------------------------------------ which cuts

    def chosen(self, graph: fx.GraphModule, facts: Facts, sites: Sites) -> list[Site]:
        if self.cuts:
            return [sites.resolve(word) for word in self.cuts]
        if sites.why:
            raise PlanError(f"pass 'subnetworks': no cut meets {self.budgets[0]} of the {self.of}: {sites.why}")
        base, costs = self.costs(graph, facts, sites.found, sites)
        names = [site.enters for site in sites.found]
        if not self.budgets and min(costs) > parse_budget(DEFAULT) * base:
            return [sites.found[costs.index(min(costs))]]  # the smallest there is
        picked = [closest_below(one, costs, base, names, self.of) for one in self.budgets or (DEFAULT,)]
        for i, one in enumerate(picked):
            if one in picked[:i]:
                other = self.budgets[picked.index(one)]
                raise PlanError(
                    f"pass 'subnetworks': budgets {other} and {self.budgets[i]} both pick the cut at {names[one]!r}; "
                    "give one of them"
                )
        return [sites.found[one] for one in picked]

    def costs(self, graph: fx.GraphModule, facts: Facts, found: list[Site], sites: Sites) -> tuple[float, list[float]]:
        """What the base model and a sub-model at each site cost."""
        if self.of == "macs":
            made = [make_entry(facts, sites, site, 0, self.seed) for site in found]
            return facts.cost.macs, [float(cost_of(facts, s.cut, e)) for s, e in zip(found, made, strict=True)]
        trials = [trial(graph, facts, sites, site) for site in found]
        if self.of == "latency":
            base, *costs = latencies([copy_graph(graph, share=True), *trials])
            return base, costs
        return facts.memory.peak_bytes, [float(Facts(one).memory.peak_bytes) for one in trials]

    def once(self, chosen: list[Site]) -> None:
        for i, site in enumerate(chosen):
            earlier = [other.cut for other in chosen[:i]]
            if site.cut in earlier:
                both = (self.cuts[earlier.index(site.cut)], self.cuts[i])
                raise PlanError(
                    f"pass 'subnetworks': cuts {both[0]!r} and {both[1]!r} are the same: both lie at the output of "
                    f"{layer(site.cut)}"
                )


def trial(graph: fx.GraphModule, facts: Facts, sites: Sites, site: Site) -> fx.GraphModule:
    """A sub-model at a site, for measuring."""
    work = copy_graph(graph, share=True)
    cut = next(n for n in work.graph.nodes if n.name == site.cut.name)
    number = len(entries(graph))
    insert_after(work, cut, free_path(work, f"sub{number}"), make_entry(facts, sites, site, number, 0))
    work.recompile()
    return detached(work, number)


def cost_of(known: Facts, cut: fx.Node, entry: Entry) -> int:
    """MACs of what lies behind a cut, and of the step-down."""
    behind = _behind(known.graph, cut)
    image = [n for n in known.graph.graph.nodes if n.op == "placeholder"][entry.reads]
    value = known.shapes[image]
    spec = TensorSpec(tuple(value.shape), value.dtype, str(value.device))
    own = cost(entry.step_down, shapes(entry.step_down, (spec,)))
    return sum(known.cost.rows[n].macs for n in behind) + own.macs


def _behind(graph: fx.GraphModule, cut: fx.Node) -> list[fx.Node]:
    found = set(descendants([cut])) - {cut}
    return [n for n in graph.graph.nodes if n in found]


def keep_statistics(graph: fx.GraphModule, cut: fx.Node, entry: Entry) -> list[Note]:
    """Give a sub-model running statistics of its own for every norm behind its cut; a note for each that keeps those of
    the base model, since no module of the graph's own holds them."""
    notes = []
    for node in _behind(graph, cut):
        norm = module_of(node)
        if norm is not None and _tracks(norm):
            if str(node.target) not in entry.private:
                shared = {id(p): p for p in norm.parameters()}
                entry.keep_private(str(node.target), copy.deepcopy(norm, shared))
        elif _reads_statistics(node):
            what = f"sub{entry.number} shares these running statistics with the base model: only those that a norm"
            notes.append(Note(layer(node), f"{what} of torch.nn holds can be private", "declined"))
        elif isinstance(norm, Staged) and any(_tracks(one) for one in norm.modules()):
            what = f"sub{entry.number} shares the running statistics in this stage with the base model: run"
            notes.append(Note(layer(node), f"{what} 'subnetworks' before the pass that made it", "declined"))
    return notes


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None


def _reads_statistics(node: fx.Node) -> bool:
    """A norm as a function, with the running mean among its operands."""
    if op_name(node) not in ("batch_norm", "instance_norm"):
        return False
    if isinstance(module_of(node), FunctionalBatchNorm):
        return len(node.args) > 3 and node.args[3] is not None
    return node.op == "call_function" and bind(node).get("running_mean") is not None
