"""A sharded model against the model: results, gradients, bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.ground.difference import relative_error
from splitfx.parallel import Shard

EXACT = 1e-12  # of results, relative to the largest
GRADIENTS = 1e-11  # relative to the largest of all gradients


def leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def off(got: Any, wanted: Any) -> float:
    """The largest relative error of any output."""
    pairs = zip(leaves(got), leaves(wanted), strict=True)
    assert [y.shape for y in leaves(got)] == [y.shape for y in leaves(wanted)]
    return max(relative_error(a.detach().double(), b.detach().double()) for a, b in pairs)


def loss_of(output: Any) -> torch.Tensor:
    """A number that every value of every output has a weight of its own in."""
    floats = [y for y in leaves(output) if y.is_floating_point()]
    return sum(
        ((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in floats), torch.zeros(())
    )


def gradients(model: Any, inputs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of the inputs, then of the parameters; those of a model are its ranks' sum."""
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    for p in parameters:
        p.grad = None
    loss_of(model(*(x * 1 for x in given))).backward()
    if isinstance(model, Shard):
        model.reduce_gradients()
    return [t.grad if t.grad is not None else torch.zeros_like(t) for t in (*given, *parameters) if t.requires_grad]


def apart(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    largest = max((float(g.abs().max()) for g in wanted if g.numel()), default=0.0) or 1.0
    return max(
        (float((a - b).abs().max()) / largest for a, b in zip(got, wanted, strict=True) if b.numel()), default=0.0
    )


def checked(shard: Shard, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], train: bool = True) -> dict[str, Any]:
    """How far a shard with gather="all" is from its graph, and the bytes that it sent and was to send."""
    with torch.no_grad():
        before = shard.sent_bytes
        got, sent = shard(*inputs), shard.sent_bytes - before
        plan, wanted = shard.plan(*inputs), graph(*(x.clone() for x in inputs))
    found = {"off": off(got, wanted), "sent": [sent], "predicted": [plan.sent_bytes], "awaited": len(plan.awaited)}
    if not train:
        return found
    whole = copy.deepcopy(graph)
    expected = gradients(whole, inputs, list(whole.parameters()))
    before = shard.sent_bytes
    came = gradients(shard, inputs, shard.parameters())
    plan = shard.plan(
        *(x * 1 if not x.is_floating_point() else x.clone().requires_grad_() for x in inputs), gradients=True
    )
    found["sent"].append(shard.sent_bytes - before)
    found["predicted"].append(plan.sent_bytes + plan.backward_bytes + shard.gradient_bytes())
    return {**found, "apart": apart(came, expected)}


def require(found: dict[str, Any]) -> None:
    assert found["off"] <= EXACT
    assert found.get("apart", 0.0) <= GRADIENTS
    assert found["sent"] == found["predicted"]
