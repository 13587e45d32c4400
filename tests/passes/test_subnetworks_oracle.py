"""SubNetworks: every cut keeps its promise on random networks, and sabotage turns the oracle red."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from splitfx.analysis import Facts, facts
from splitfx.compiler.pipeline import run_pass
from splitfx.errors import VerificationError
from splitfx.frontend.trace import trace
from splitfx.ir.graph import copy_graph
from splitfx.passes import SubNetworks
from splitfx.subnetworks.entry import entries
from splitfx.subnetworks.model import SubNetworksGraph
from splitfx.subnetworks.oracle import require_models
from splitfx.subnetworks.sites import Sites
from tests import oracle
from tests.strategies import networks
from tests.subnetworks.networks import assert_shared, residual


@settings(max_examples=12)
@given(networks())
def test_random_networks_keep_the_promise_at_every_cut(network: tuple[nn.Module, torch.Tensor]) -> None:
    """Every site of a drawn network: the pipeline's oracle runs, and what runs in place is what is detached."""
    model, x = network
    graph = trace(model, x)
    found = Sites(facts(graph))
    if not found.found:
        return
    split, _ = run_pass(graph, SubNetworks(cuts=tuple(s.enters for s in found.found), statistics="private"))
    assert isinstance(split, SubNetworksGraph)
    assert_shared(split)
    outputs = split.forward_all(x)
    for number in range(len(found.found)):
        assert outputs[number + 1].shape == outputs[0].shape
        oracle.assert_equal(outputs[number + 1], split.detach(number)(x))


def rewritten(**options: Any) -> tuple[fx.GraphModule, SubNetworksGraph]:
    before = trace(residual(), torch.zeros(1, 3, 16, 16))
    after = copy_graph(before)
    SubNetworks(**options).run(after, Facts(after))
    assert isinstance(after, SubNetworksGraph)
    return before, after


def test_the_oracle_accepts_what_is_right() -> None:
    for statistics in ("shared", "private"):
        before, after = rewritten(cuts=("body.2", "body.3"), statistics=statistics)
        assert require_models("subnetworks", before, after) <= 1e-10


def moved_entry(after: SubNetworksGraph) -> None:
    """The second sub-model enters one layer late: behind the first conv of its block."""
    node, _ = entries(after)[1]
    late = next(n for n in after.graph.nodes if str(n.target) == "body.3.main.0")
    operand = node.all_input_nodes[0]
    node.replace_all_uses_with(operand)
    node.args = (late,)
    late.append(node)
    for user in [u for u in late.users if u is not node]:
        user.replace_input_with(late, node)


def other_base(after: SubNetworksGraph) -> None:
    after.get_parameter("fc.weight").data.mul_(1.01)


def own_weights(after: SubNetworksGraph) -> None:
    """What is detached has a copy of a layer instead of the layer."""
    made = after.detach

    def copied(number: int, copy: bool = False) -> fx.GraphModule:
        return made(number, copy=True)

    vars(after)["detach"] = copied


def step_down_of_other_rows(after: SubNetworksGraph) -> None:
    conv = entries(after)[0][1].step_down.get_submodule("conv")
    conv.stride = (conv.stride[0] + 1, conv.stride[1])  # type: ignore[operator, index, assignment]


def skipped_layer(after: SubNetworksGraph) -> None:
    """The sub-models lose an activation that the base model has: their making is at fault, not the graph."""
    made = after.detach

    def without(number: int, copy: bool = False) -> fx.GraphModule:
        found = made(number)
        relu = next(n for n in reversed(found.graph.nodes) if "relu" in str(n.target))
        relu.replace_all_uses_with(relu.all_input_nodes[0])
        found.graph.erase_node(relu)
        found.recompile()
        return found

    vars(after)["detach"] = without


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (moved_entry, "sub1 enters at body.3.main.0, and the image reaches the output around it"),
        (other_base, "broke its promise: outputs differ"),
        (own_weights, "sub0 does not share"),
        (step_down_of_other_rows, "the step-down of sub0 gives .* the cut"),
        (skipped_layer, "sub0 differs from the model's own layers fed by its step-down"),
    ],
)
def test_sabotage_turns_the_oracle_red(fault: Any, why: str) -> None:
    before, after = rewritten(cuts=("body.2", "body.3"))
    fault(after)
    after.graph.lint()
    after.recompile()
    with pytest.raises(VerificationError, match=why):
        require_models("subnetworks", before, after)


def test_sabotaged_statistics_are_seen() -> None:
    """A sub-model that uses the base model's statistics where it has its own."""
    before, after = rewritten(cuts=("body.2",), statistics="private")
    entry = entries(after)[0][1]
    norm = entry.norms["norm0"]
    norm.get_buffer("running_mean").add_(1)
    require_models("subnetworks", before, after)  # its own, and used
    entry.private.clear()
    found = after.detach(0)
    entry.private["body.2.main.1"] = "norm0"
    vars(after)["detach"] = lambda number, copy=False: found
    with pytest.raises(VerificationError, match="sub0 differs"):
        require_models("subnetworks", before, after)
