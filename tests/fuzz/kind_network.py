"""Small networks over all operations × plans of all passes in any order × other sizes, held to the laws of `laws`."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import splitfx
from splitfx.compiler.protocol import Pass, Promise
from splitfx.errors import SplitfxError, TraceError, UnsupportedError
from splitfx.ir.graph import info
from tests.fuzz import laws, plans
from tests.fuzz.networks import Drawn, network

SAVED, EXPORTED, THREADED, AGAIN, TRAINED = 0.3, 0.06, 0.25, 0.3, 0.15  # shares of the draws


def prepare() -> None:
    """torch makes a cache folder of its own when it first traces."""
    splitfx.trace(torch.nn.Conv2d(2, 2, 1), torch.zeros(1, 2, 3, 3))


def draw(seed: int, folder: Path) -> str:
    rng = Random(seed)
    trial = Trial(rng, network(rng), folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial.run()
    except Exception as error:
        raise laws.Broken(f"{error}\n{trial.report()}") from error


class Trial:
    """One network, traced once, and what the passes make of it."""

    def __init__(self, rng: Random, drawn: Drawn, folder: Path) -> None:
        self.rng, self.drawn, self.folder = rng, drawn, folder
        self.model: Any = drawn.model
        self.applied: list[Pass] = []
        self.at = "trace"

    def report(self) -> str:
        steps = "\n".join(map(repr, self.applied)) or "no pass"
        return f"in: {self.at}\n{steps}\n{self.drawn.listing}"

    def run(self) -> str:
        inputs = self.drawn.inputs
        before = laws.Snapshot(self.model)
        wanted = laws.called(self.model, inputs)
        try:
            graph = splitfx.trace(self.model, inputs)
        except TraceError as error:
            laws.fair(error)
            return "untraced"
        laws.require_same(laws.called(graph, inputs), wanted, "traced")
        others = [self.drawn.other_inputs(self.rng, n, by) for n, by in ((1, (0, 0)), (4, (0, 0)), (2, (3, 5)))]
        self.at = "traced, at another size"
        for other in others:
            laws.at_another_size(self.model, graph, other, equal=True)
        split, word = self.passes(graph, inputs, others)
        before.require_same()
        if word in ("equal", "split"):
            self.further(graph, split, others)
        before.require_same()
        return word

    def passes(self, graph: fx.GraphModule, inputs: laws.Inputs, others: list[laws.Inputs]) -> tuple[Any, str]:
        """Pass after pass, each on what the last one made; what is refused is left out."""
        split, word, refused = graph, "unchanged", False
        for make in plans.draw_passes(self.rng, graph):
            step = plans.drawn_for(make, self.rng, split)
            if step is None:
                continue
            self.at = f"{step!r} after"
            before = laws.called(split, inputs)
            try:
                after = splitfx.transform(split, step)
            except SplitfxError as error:
                laws.fair(error)
                refused = True
                continue
            record = info(after).steps[-1]
            laws.notes_name_declined_sites(record, split, after)
            found = laws.called(after, inputs)
            exact = step.promise in (Promise.EQUAL, Promise.RESHAPE)
            if exact:
                laws.require_same(found, before, "the promise")
            elif laws.shapes(found) != laws.shapes(before):
                raise laws.Broken(f"shapes {laws.shapes(found)} instead of {laws.shapes(before)}")
            assert info(after).plan is not None
            self.applied.append(info(after).plan.passes[-1])
            split = after
            if record.changed:
                word = "equal" if exact and word != "split" else "split"
        self.at = "all passes, at another size"
        for other in others if word != "unchanged" else ():
            laws.at_another_size(self.model, split, other, equal=word == "equal")
        return split, "refused" if refused and word == "unchanged" else word

    def further(self, graph: fx.GraphModule, split: fx.GraphModule, others: list[laws.Inputs]) -> None:
        plan, inputs = splitfx.Plan(self.applied), self.drawn.inputs
        self.at = "the plan's text"
        laws.plan_round_trips(plan)
        self.at = "nothing is shared"
        laws.nothing_shared(split, self.model)
        if self.rng.random() < AGAIN:
            self.at = "a second transform"
            laws.transforms_the_same(graph, plan)
        if self.rng.random() < SAVED:
            self.at = "save and load"
            whole = splitfx.transform(self.model, plan, inputs, verify=False)
            self.refusable(laws.saves_and_loads, whole, self.model, inputs, self.folder)
        if self.rng.random() < THREADED:
            self.at = "threads"
            sizes = [inputs, *[o for o in others if self.takes(split, o)]]
            laws.runs_in_threads(split, sizes)
        if self.rng.random() < EXPORTED:
            self.at = "export"
            single = [t.float() for t in inputs]
            self.export(plan, tuple(single))

    def takes(self, split: fx.GraphModule, inputs: laws.Inputs) -> bool:
        try:
            laws.called(split, inputs)
        except Exception:
            return False
        return True

    def refusable(self, law: Any, *given: Any) -> None:
        try:
            law(*given)
        except SplitfxError as error:
            laws.fair(error)

    def export(self, plan: splitfx.Plan, inputs: laws.Inputs) -> None:
        """In float32, for networks in which its rounding stays what it is."""
        single = copy.deepcopy(self.model).float()
        try:
            found = laws.called(single, inputs)
        except RuntimeError:
            return  # it makes float64 values of its own
        wanted = laws.called(self.model, tuple(t.double() for t in inputs))
        rounded = pytree.tree_map(lambda t: t.float().double(), wanted)
        if pytree.tree_any(lambda t: t.dtype is not torch.float32, found):
            return
        doubled = pytree.tree_map(lambda t: t.double(), found)
        if max(map(laws.oracle.error, laws.oracle.leaves(doubled), laws.oracle.leaves(rounded))) > 1e-5:
            return
        try:
            split = splitfx.transform(single, plan, inputs, verify=False)
        except (UnsupportedError, TraceError):
            return
        self.refusable(laws.exports, split, inputs, self.folder)
