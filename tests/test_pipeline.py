"""The pipeline: every pass on a private copy, held to its promise, recorded; it looks and does not trust."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.analysis import Facts
from splitfx.compiler.pipeline import plan_since, run_pass, run_plan
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise, not_in_plan
from splitfx.errors import PassError, PlanError, TraceError, UnsupportedError, VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.editing import bypass
from splitfx.ir.graph import copy_graph, info
from splitfx.ir.ops import text
from splitfx.passes import DropIdentity, FoldBatchNorm, Group
from tests import oracle
from tests.models import ZOO
from tests.traced import odd


def graph() -> fx.GraphModule:
    return odd("residual")[2]


@dataclass(frozen=True)
class Acts(Pass):
    """Does what it is told."""

    name: ClassVar[str] = "acts"
    promise: ClassVar[Promise] = Promise.EQUAL

    act: Callable[[fx.GraphModule], Outcome | None] = not_in_plan()

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        return self.act(graph) or Outcome((Note("model", "acted"),))


class Retrains(Acts):
    name: ClassVar[str] = "retrains"
    promise: ClassVar[Promise] = Promise.RETRAIN


def drop_relu(graph: fx.GraphModule) -> None:
    bypass(graph, next(n for n in graph.graph.nodes if "relu" in str(n.target)))


def double_weights(graph: fx.GraphModule) -> None:
    with torch.no_grad():
        graph.get_submodule("fc").weight.mul_(2)  # type: ignore[union-attr, operator]


def test_nothing_done_needs_no_oracle() -> None:
    before = graph()
    after, _ = run_pass(before, Acts(act=lambda g: None))
    record = info(after).steps[-1]
    assert not record.changed
    assert record.difference is None
    assert record.before == record.after
    assert info(before).steps == []


def test_a_broken_promise_is_an_error() -> None:
    before = graph()
    wanted = text(before)
    with pytest.raises(VerificationError, match="pass 'acts' broke its promise"):
        run_pass(before, Acts(act=drop_relu))
    assert text(before) == wanted


def test_a_pass_that_changes_weights_alone_is_seen() -> None:
    """No node is another: only the values differ."""
    with pytest.raises(VerificationError, match="pass 'acts' broke its promise"):
        run_pass(graph(), Acts(act=double_weights))


def test_random_numbers_of_the_user_are_left_alone() -> None:
    before, state = graph(), torch.get_rng_state()
    run_pass(before, Group(factors=(2, 2)))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_verify_it_is_taken_as_it_is() -> None:
    after, _ = run_pass(graph(), Acts(act=drop_relu), verify=False)
    record = info(after).steps[-1]
    assert record.changed
    assert record.difference is None


def test_retrain_without_a_reference_is_an_error() -> None:
    with pytest.raises(PassError, match="promises retrain and changed the graph, but gave no reference"):
        run_pass(graph(), Retrains(act=drop_relu))


def test_retrain_is_held_to_its_reference() -> None:
    def honest(graph: fx.GraphModule) -> Outcome:
        drop_relu(graph)
        graph.recompile()
        return Outcome((), reference=copy_graph(graph))

    def wrong(graph: fx.GraphModule) -> Outcome:
        outcome = honest(graph)
        double_weights(graph)
        return outcome

    run_pass(graph(), Retrains(act=honest))
    with pytest.raises(VerificationError, match="'retrains' broke its promise"):
        run_pass(graph(), Retrains(act=wrong))


def test_an_illegal_graph_does_not_leave() -> None:
    def cut_off(graph: fx.GraphModule) -> None:
        """An in-place node whose operand is read later."""
        node = next(n for n in graph.graph.nodes if "relu_" in str(n.target))
        operand = node.args[0]
        end = list(graph.graph.nodes)[-1]
        with graph.graph.inserting_before(end):
            late = graph.graph.call_function(torch.ops.aten.add.Tensor, (operand, 1))
        end.args = ((end.args[0], late),)

    with pytest.raises(PassError, match="pass 'acts' left an illegal graph: .* reads later"):
        run_pass(graph(), Acts(act=cut_off))


def test_what_is_read_by_nothing_is_dropped() -> None:
    after, _ = run_pass(graph(), FoldBatchNorm())
    assert not any("running_mean" in key for key in after.state_dict())


def test_passes_in_order_and_recorded() -> None:
    model, inputs = ZOO["residual"]()
    plan = Plan([FoldBatchNorm(), DropIdentity(), Group(factors=(2, 3))])
    said: list[str] = []
    split = splitfx.transform(model.eval(), plan, inputs, progress=said.append)
    steps = info(split).steps
    assert [s.name for s in steps] == ["fold_batchnorm", "drop_identity", "group"]
    assert [s for s in said if "check" not in s] == [
        "tracing",
        *(f"pass {i} of 3: {s.name}" for i, s in enumerate(steps, 1)),
    ]
    assert all(s.seconds >= 0 for s in steps)
    for before, after in itertools.pairwise(steps):
        assert after.before == before.after
    assert steps[-1].after.macs < steps[-1].before.macs
    assert steps[-1].difference <= oracle.TOLERANCE[torch.float64]


def test_the_recorded_plan_replays() -> None:
    """What was measured (lowering) is written down: the replay measures nothing and gives the same graph."""
    before = graph()
    split = run_plan(before, Plan([Group(factors=(2, 2))]))
    resolved = info(split).plan.passes[0]
    assert resolved.lowering in (("grouped", "grouped"), ("branches", "branches"), ("grouped", "branches"),
                                ("branches", "grouped"))  # fmt: skip
    again = run_plan(before, Plan.from_toml(info(split).plan.to_toml()))
    assert text(again) == text(split)


def test_a_pass_that_needs_eval() -> None:
    with pytest.raises(UnsupportedError, match="needs the model in eval mode: call model.eval"):
        run_pass(graph().train(), FoldBatchNorm())


def test_unknown_passes_and_plans() -> None:
    model, inputs = ZOO["residual"]()
    with pytest.raises(PlanError, match="Did you mean 'group'"):
        Plan.from_toml('format = 1\n[[pass]]\nname = "grouped"\nfactors = [2]\n')
    with pytest.raises(PlanError, match="no input sizes"):
        splitfx.transform(model, Plan([DropIdentity()]))
    with pytest.raises(PlanError, match="no such plan file"):
        splitfx.transform(model, "no such folder/plan.toml", inputs)
    with pytest.raises(PlanError, match=r"a plan is a splitfx\.Plan.*got 3"):
        splitfx.transform(model, 3, inputs)  # type: ignore[arg-type]


def test_a_transformed_model_is_transformed_again() -> None:
    model, inputs = ZOO["residual"]()
    once = splitfx.transform(model.eval(), FoldBatchNorm(), inputs)
    twice = splitfx.transform(once, Group(factors=(2, 2), lowering="branches"))
    assert [s.name for s in info(twice).steps] == ["fold_batchnorm", "group"]
    assert [s.name for s in info(once).steps] == ["fold_batchnorm"]
    assert [s.name for s in info(twice).plan.passes] == ["fold_batchnorm", "group"]  # type: ignore[union-attr]
    assert info(twice).plan.input_shape == info(once).plan.input_shape  # type: ignore[union-attr]
    replayed = splitfx.transform(model, info(twice).plan, inputs)  # type: ignore[arg-type]
    assert text(replayed) == text(twice)
    assert [s.name for s in plan_since(once, twice).passes] == ["group"]


def test_train_mode_is_kept() -> None:
    model, inputs = ZOO["residual"]()
    split = splitfx.transform(model.train(), Group(factors=(2, 2)), inputs)
    assert all(m.training for m in split.modules() if not list(m.children()))


# ---------------------------------------------------------------- whose memory


def places(graph: fx.GraphModule) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*graph.parameters(), *graph.buffers())}


class Lends(Acts):
    """Says that it writes into no weight."""

    name: ClassVar[str] = "lends"
    writes_weights: ClassVar[bool] = False


@pytest.mark.parametrize(
    "step",
    [
        Group(factors=(2, 2), lowering="branches"),
        Group(factors=(2, 3), lowering="grouped"),
        DropIdentity(),
        FoldBatchNorm(),
        Acts(act=lambda g: None),
        Lends(act=lambda g: None),
    ],
    ids=lambda step: step.name,
)
def test_a_result_has_memory_of_its_own(step: Pass) -> None:
    before = graph()
    state = {key: value.clone() for key, value in before.state_dict().items()}
    after, _ = run_pass(before, step)
    assert not places(before) & places(after)
    for tensor in (*after.parameters(), *after.buffers()):  # no slice that keeps a dense weight alive
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    with torch.no_grad():
        for tensor in after.parameters():
            tensor.add_(1)
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


def test_tied_weights_stay_tied() -> None:
    model, inputs = ZOO["tied_weights"]()
    before = trace(model.eval(), inputs)
    for step in (Acts(act=lambda g: None), Lends(act=lambda g: None)):
        after, _ = run_pass(before, step)
        for key in before.state_dict():
            first = before.state_dict()[key].data_ptr()
            alike = {k for k, v in before.state_dict().items() if v.data_ptr() == first}
            assert {after.state_dict()[k].data_ptr() for k in alike} == {after.state_dict()[key].data_ptr()}


def test_a_pass_that_writes_in_place_does_not_reach_the_model() -> None:
    before = graph()
    wanted = before.get_submodule("fc").weight.clone()  # type: ignore[union-attr, operator]
    run_pass(before, Acts(act=double_weights), verify=False)
    assert torch.equal(before.get_submodule("fc").weight, wanted)  # type: ignore[arg-type]


def test_a_pass_that_writes_against_its_word() -> None:
    with pytest.raises(PassError, match="'lends' has writes_weights = False and wrote into fc.weight of the model"):
        run_pass(graph(), Lends(act=double_weights))


# ---------------------------------------------------------------- other weights than a fresh model's


class Fresh(nn.Module):
    """Two norms that are as they were made, and a factor of one for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.scale = nn.Dropout(), nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.other(self.two(self.norm(self.one(x)).relu()))) * self.scale


def swap_norms(graph: fx.GraphModule) -> None:
    first, second = (n for n in graph.graph.nodes if n.target in ("norm", "other"))
    first.target, second.target = second.target, first.target


def drop_factor_of_one(graph: fx.GraphModule) -> None:
    if bool((graph.get_parameter("scale") == 1).all()):
        bypass(graph, next(n for n in graph.graph.nodes if "mul" in str(n.target)))


@pytest.mark.parametrize("kind", [Acts, Lends])
def test_norms_that_change_places_are_seen_in_a_fresh_model(kind: type[Acts]) -> None:
    before = trace(Fresh().eval(), torch.zeros(2, 3, 9, 7))
    with pytest.raises(VerificationError, match="broke its promise"):
        run_pass(before, kind(act=swap_norms))


@pytest.mark.parametrize("kind", [Acts, Lends])
def test_a_rewrite_that_follows_from_the_weights(kind: type[Acts]) -> None:
    """It holds for these weights only, and is not made where they are others."""
    before = trace(Fresh().eval(), torch.zeros(2, 3, 9, 7))
    after, _ = run_pass(before, kind(act=drop_factor_of_one))
    assert "mul" not in text(after)


@pytest.mark.parametrize(("kind", "runs"), [(Acts, 2), (Lends, 1)])
def test_a_pass_that_only_moves_weights_runs_once(kind: type[Acts], runs: int) -> None:
    before, seen = trace(Fresh().eval(), torch.zeros(2, 3, 9, 7)), []

    def drop(graph: fx.GraphModule) -> None:
        seen.append(graph)
        bypass(graph, next(n for n in graph.graph.nodes if n.target == "drop"))

    run_pass(before, kind(act=drop))
    assert len(seen) == runs


def test_a_model_dies_with_its_last_name() -> None:
    model, inputs = ZOO["residual"]()
    before = trace(model.eval(), inputs)
    after = run_plan(before, Plan([FoldBatchNorm(), Group(factors=(2, 2))]))
    gone = [weakref.ref(one) for one in (model, before, after, next(model.parameters()), next(after.parameters()))]
    del model, before, after
    gc.collect()
    assert [one() for one in gone] == [None] * 5


def test_a_refused_model_dies_as_well() -> None:
    class Refused(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    model = Refused()
    gone = weakref.ref(model)
    with pytest.raises(TraceError):
        trace(model, torch.ones(2, 4))
    del model
    gc.collect()
    assert gone() is None
