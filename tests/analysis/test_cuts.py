"""Cuts, against their definition: without the node, no path leads from an input to the output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from splitfx.analysis import facts
from splitfx.frontend.trace import trace
from splitfx.ir.graph import layer, output_node
from splitfx.ir.ops import is_size
from tests.models import ZOO
from tests.strategies import networks
from tests.traced import odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


def by_definition(graph: fx.GraphModule) -> list[fx.Node]:
    end = output_node(graph)

    def reaches(without: fx.Node | None) -> bool:
        waiting, seen = [n for n in graph.graph.nodes if n.op == "placeholder" and n is not without], set()
        while waiting:
            node = waiting.pop()
            if node is end:
                return True
            fresh = [r for r in node.users if r is not without and r not in seen and not is_size(r)]
            seen.update(fresh)
            waiting.extend(fresh)
        return False

    if not reaches(None):
        return []
    return [n for n in graph.graph.nodes if n is not end and n.op != "get_attr" and not reaches(n)]


@settings(max_examples=15)
@given(networks())
def test_random_networks(network: tuple[nn.Module, torch.Tensor]) -> None:
    graph = trace(*network)
    assert facts(graph).cuts == by_definition(graph)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_odd_models(name: str) -> None:
    _, _, graph = odd(name)
    assert facts(graph).cuts == by_definition(graph)


def test_a_residual_block_is_crossed() -> None:
    names = [layer(n) for n in facts(odd("residual")[2]).cuts]
    assert "body.0.2" in names
    assert not any("main" in n or "short" in n for n in names)


class TwoIn(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.sin() + y).relu().cos()


def test_two_inputs_have_no_cut_before_they_meet() -> None:
    found = facts(trace(TwoIn(), (torch.zeros(2, 3), torch.zeros(2, 3)))).cuts
    assert [n.name for n in found] == ["add", "relu", "cos"]


def test_two_outputs_have_none_behind_the_last_common_one() -> None:
    assert facts(odd("keyword_inputs")[2]).cuts == []


def test_facts_die_with_their_graph_and_stay_out_of_copies() -> None:
    import copy
    import gc
    import weakref

    from splitfx.analysis import facts

    graph = trace(torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
    known = facts(graph)
    assert facts(graph) is known
    assert facts(copy.deepcopy(graph)) is not known
    gone = weakref.ref(graph)
    del graph, known
    gc.collect()
    assert gone() is None
