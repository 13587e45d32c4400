"""Facts are of the nodes that stand in a graph now, and are kept as long as those do."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from splitfx.analysis import Facts, facts
from splitfx.frontend.trace import trace


def graph() -> fx.GraphModule:
    return trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8))


def replaced(graph: fx.GraphModule) -> fx.Node:
    """Another node in the place of the first layer's call, with its name."""
    old = next(n for n in graph.graph.nodes if n.op == "call_module")
    name = old.name
    with graph.graph.inserting_before(old):
        new = graph.graph.node_copy(old)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.graph.erase_node(old)
    new.name = name
    return new


def test_kept_while_nothing_changes() -> None:
    one = graph()
    assert facts(one) is facts(one)


def test_another_node_of_the_same_name_is_another() -> None:
    one = graph()
    assert facts(one).shapes
    new = replaced(one)
    assert new in facts(one).shapes


def test_sabotage_by_name_alone_a_stale_fact_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "still_hold", lambda self, now: self.version == now)
    one = graph()
    assert facts(one).shapes
    assert replaced(one) not in facts(one).shapes
