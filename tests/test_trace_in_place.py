"""In-place operations: what they overwrite is read by nobody afterwards, writes through views are marked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitfx.frontend import raising
from splitfx.frontend.trace import private_copy
from splitfx.ir.schema import mutates
from tests.traced import every_model, made, odd

GROUP_BY = "name"  # one worker does all that is asked of a model, so that it is traced once


@every_model
def test_in_place_result_replaces_its_operand(name: str) -> None:
    graph = odd(name, double=True)[2].graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_function" and mutates(node.target) and not node.meta.get("writes_view"):
            operand = node.args[0]
            assert all(order[user] <= order[node] for user in operand.users), f"{operand} is read after {node}"


def test_old_names_of_overwritten_values_are_rewired() -> None:
    """An exported graph may read an overwritten value under its old name; the canonical graph must not."""
    model, inputs = made("in_place_read_again")
    private = private_copy(model)
    exported: Any = torch.export.export(private, (inputs,)).module(check_guards=False)
    for node in exported.graph.nodes:
        if mutates(node.target):
            node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user, node=node: user is not node)
    graph = raising.Raiser(exported, private, model).run()
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    assert [mutates(n.target) for n in nodes] == [True, True, False, False, False, False]
    assert nodes[0].args[0].op == "call_module"
    assert nodes[1].args[0] is nodes[0]
    assert all(nodes[0] not in n.all_input_nodes for n in nodes[2:])
    assert nodes[1] in nodes[2].all_input_nodes


def test_writes_through_views_are_marked() -> None:
    def marked(name: str) -> set[str]:
        return {n.name for n in odd(name, double=True)[2].graph.nodes if n.meta.get("writes_view")}

    assert {"fill_", "mul_", "clamp_"} & marked("in_place_views") >= {"fill_", "clamp_"}
    for name in ("plain", "residual", "stochastic_depth", "in_place_read_again"):
        assert marked(name) == set(), name


def test_lost_rewiring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    test_old_names_of_overwritten_values_are_rewired()
    monkeypatch.setattr(raising.Raiser, "rewire", lambda *_: None)
    with pytest.raises(AssertionError):
        test_old_names_of_overwritten_values_are_rewired()
