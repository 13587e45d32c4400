"""The contract suite: every registered pass on every odd tiny model keeps the common laws.

A new pass gets these by existing. One that needs options says in `OPTIONS` which ones to try for a graph.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis import facts
from splitfx.analysis.blocks import blocks
from splitfx.compiler import registry
from splitfx.compiler.pipeline import Step, run_pass
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass, Promise
from splitfx.errors import PlanError, UnsupportedError
from splitfx.frontend.trace import trace
from splitfx.ir.editing import tidy
from splitfx.ir.graph import copy_graph, info
from splitfx.ir.ops import text
from splitfx.passes import DropIdentity, Group, SplitNet, SubNetworks, Tile, TileZeroHalo
from splitfx.splitnet.structure import Structure
from splitfx.tiling.zero import combine_layers
from tests import oracle
from tests.models import ZOO
from tests.sampled import sampled
from tests.traced import odd


def groups(graph: fx.GraphModule) -> list[Pass]:
    count = max(1, len(blocks(facts(graph))))
    return [
        Group(factors=(2,) * count, costly="split", lowering="branches"),
        Group(factors=(3,) * count, fusion="none", lowering="grouped", order="energy", gating="relaxed"),
    ]


def splitnets(graph: fx.GraphModule) -> list[Pass]:
    """Two splits of the last layers, for the classifiers that have a layer to split."""
    depth = max(1, len(facts(graph).axes.edges) - 1)
    try:
        Structure(facts(graph), depth=depth, groups=2)
    except UnsupportedError:
        return []
    return [
        SplitNet(depth=depth, groups=2, source="random", lowering="branches"),
        SplitNet(depth=depth, groups=2, source="weights", lowering="grouped", boundary="full", gating="relaxed"),
    ]


def zero_halos(graph: fx.GraphModule) -> list[Pass]:
    """The last layer at which two bands of the image can be put together, for the models that have one."""
    for until in reversed(combine_layers(graph, facts(graph))):
        step = TileZeroHalo(grid=(2, 1), until=until)
        try:
            run_pass(graph, step, verify=False)
        except (PlanError, UnsupportedError):  # sizes that the bands do not add up to
            continue
        return [step]
    return []


OPTIONS: dict[str, Callable[[fx.GraphModule], list[Pass]]] = {
    "group": groups,
    "drop_identity": lambda graph: [DropIdentity(), DropIdentity(eval_only=True)],
    "splitnet": splitnets,
    "subnetworks": lambda graph: [SubNetworks(), SubNetworks(statistics="private")],
    "tile": lambda graph: [Tile(rows=4, firing_intervals=(1, 2)), Tile(budget="least")],
    "tile_zero_halo": zero_halos,
}
NAMES = sorted(registry.all())
EXPORTED = ("plain", "residual", "squeeze_excite", "depthwise", "channel_shuffle")  # an export takes seconds
GROUP_BY = "model"  # one worker does all that is asked of a model, so that it is traced once
each = pytest.mark.parametrize(("name", "model"), [(n, m) for n in NAMES for m in sorted(ZOO)])


class Source:
    """One model, its graph, and how both were before any pass saw them."""

    def __init__(self, model: str, double: bool = False) -> None:
        self.model, self.inputs, self.graph = odd(model, double)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.modes = [m.training for m in self.model.modules()]
        self.before = text(self.graph)


source = lru_cache(maxsize=None)(Source)


class Case:
    """One model and what a pass, with each of its option sets, made of it."""

    def __init__(self, name: str, model: str) -> None:
        self.source = source(model)
        self.graph, self.inputs = self.source.graph, self.source.inputs
        make = OPTIONS.get(name, lambda graph: [registry.get(name)()])
        self.passes = make(self.graph)
        self.results = [run_pass(self.graph, step) for step in self.passes]

    @property
    def splits(self) -> list[fx.GraphModule]:
        return [split for split, _ in self.results]


case = lru_cache(maxsize=None)(Case)


def unnamed(form: str) -> str:
    """The text form with nodes named by their order, without the values that they read, which move freely."""
    numbers: dict[str, str] = {}
    lines = "\n".join(line for line in form.splitlines() if not re.match(r"%\w+ = (parameter|buffer)\(", line))
    return re.sub(r"%\w+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), lines)


def last_step(split: fx.GraphModule) -> Step:
    return info(split).steps[-1]


@each
def test_the_input_is_untouched(name: str, model: str) -> None:
    made, given = case(name, model), source(model)
    for key, value in given.model.state_dict().items():
        assert torch.equal(value, given.state[key]), f"{key} was changed"
    assert [m.training for m in given.model.modules()] == given.modes
    assert text(given.graph) == given.before
    owned = {id(p) for p in given.model.parameters()}
    for split in made.splits:
        assert not owned & {id(p) for p in split.parameters()}, "the result holds the model's own parameters"


@each
def test_the_promise_is_kept(name: str, model: str) -> None:
    """Checked here by plain calls in float64, apart from the interpreter that the pipeline uses."""
    exact = source(model, double=True)
    graph = exact.graph
    for step in case(name, model).passes:
        work = copy_graph(graph)
        outcome = step.run(work, facts(work))
        tidy(work)
        if text(work) == text(graph):
            continue
        wanted = graph if step.promise is Promise.EQUAL else outcome.reference
        assert wanted is not None, "changed the graph and gave no reference"
        wanted.recompile()
        oracle.assert_equal_outputs(work, wanted, exact.inputs)


class Doubler(nn.Module):
    """Example inputs in float64, in the ``((args), {kwargs})`` spelling."""

    def forward(self, *args: object, **kwargs: object) -> object:
        double = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        return pytree.tree_map(double, (args, kwargs))


@each
def test_the_plan_round_trips(name: str, model: str) -> None:
    for step, (_, resolved) in zip(case(name, model).passes, case(name, model).results, strict=True):
        plan = Plan([step, resolved])
        assert Plan.from_toml(plan.to_toml()) == plan


@each
def test_a_resolved_plan_gives_the_same_graph(name: str, model: str) -> None:
    made = case(name, model)
    for split, resolved in made.results:
        again, _ = run_pass(made.graph, resolved, verify=False)
        assert text(again) == text(split)
        oracle.assert_equal(dict(again.state_dict()), dict(split.state_dict()))


@pytest.mark.parametrize(("name", "model"), sampled([(n, m) for n in NAMES for m in sorted(ZOO)], 5))
def test_the_result_traces_to_itself(name: str, model: str) -> None:
    made = case(name, model)
    for split in made.splits:
        if not last_step(split).changed:
            continue  # it is the model's graph, of which tests/test_trace_canonical.py asks it
        again = trace(split, made.inputs)
        assert sorted(again.state_dict()) == sorted(split.state_dict())
        assert unnamed(text(again)) == unnamed(text(split))
        oracle.assert_equal_outputs(again, split, made.inputs)


@each
def test_state_and_copies(name: str, model: str) -> None:
    made = case(name, model)
    for split in made.splits:
        other = copy.deepcopy(split)
        assert text(other) == text(split)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        missing, unexpected = other.load_state_dict(split.state_dict())
        assert not missing
        assert not unexpected
        oracle.assert_equal_outputs(other, split, made.inputs)


@each
def test_it_trains(name: str, model: str) -> None:
    made = case(name, model)
    for split in made.splits:
        work = copy.deepcopy(split).train(not registry.get(name).needs_eval)
        results = [t for t in oracle.leaves(oracle.run(work, made.inputs)) if isinstance(t, torch.Tensor)]
        total = torch.stack([t.float().square().mean() for t in results if t.requires_grad]).sum()
        total.backward()
        for path, parameter in work.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), path
        reached = [p for p in work.parameters() if p.grad is not None]
        wanted = [p for p in made.source.model.parameters() if p.requires_grad]
        assert len(reached) > 0 or not wanted


@each
def test_notes_say_where_and_why(name: str, model: str) -> None:
    made = case(name, model)
    for split in made.splits:
        record = last_step(split)
        assert record.notes, "a pass that did nothing says so"
        assert record.changed or any(n.kind != "did" for n in record.notes)
        for note in record.notes:
            assert note.where
            assert len(note.what) > 5
            assert "\n" not in note.what
        assert record.difference is None or record.difference <= oracle.TOLERANCE[torch.float64]


@pytest.mark.parametrize(("name", "model"), sampled([(n, m) for n in NAMES for m in EXPORTED], 3))
def test_it_exports(name: str, model: str, tmp_path: Path) -> None:
    made = case(name, model)
    changed = [s for s in made.splits if last_step(s).changed]
    if not changed:  # then there is nothing new to export
        assert all(text(s) == made.source.before for s in made.splits)
        return
    onnxruntime = pytest.importorskip("onnxruntime")
    from splitfx import export_onnx

    split = changed[0]
    path = export_onnx(split, tmp_path / "split.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [t for t in oracle.leaves(made.inputs) if isinstance(t, torch.Tensor)]
    feed = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), given, strict=True)}
    with torch.no_grad():
        wanted = oracle.leaves(oracle.run(split, made.inputs))
    found = [torch.from_numpy(v) for v in session.run(None, feed)]
    oracle.assert_equal(found, wanted)
