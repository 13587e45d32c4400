"""Wrong rewrites of Group: the oracle turns red."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import splitfx
from splitfx.carving import narrow
from splitfx.carving.division import Division
from splitfx.errors import VerificationError
from splitfx.ir.ops.families import norms
from splitfx.passes import Group
from tests.models import ZOO
from tests.passes.grouping import chain


def test_sabotage_swapped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = narrow._block
    monkeypatch.setattr(narrow, "_block", lambda w, o, i: right(w, o, (i + w.shape[1] // 2) % w.shape[1]))
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2), lowering="branches"), x)


@pytest.mark.parametrize("shut", [False, True], ids=["fresh norms", "norms that start at zero"])
def test_sabotage_behind_norms_that_hide_it(monkeypatch: pytest.MonkeyPatch, shut: bool) -> None:
    """A norm that scales by zero lets nothing through: the oracle runs on other weights as well."""
    model, x = ZOO["residual"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            nn.init.constant_(module.weight, 0.0 if shut else 1.0)
    right = norms.picked
    monkeypatch.setattr(norms, "picked", lambda tensor, p: right(tensor, (p + 1) % len(tensor)))
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model.eval(), Group(factors=(2, 2), lowering="branches"), x)


def test_sabotage_mask_off_by_one_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Division.clear
    monkeypatch.setattr(Division, "clear", lambda self, weight: weight.copy_(right(self, weight).roll(1, 0)))
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2), lowering="grouped"), x)


def test_sabotage_fusion_off_by_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitfx.passes import group

    right = group.carve

    def wrong(graph: fx.GraphModule, *rest: Any) -> Any:
        notes = right(graph, *rest)
        with torch.no_grad():
            graph.get_submodule("fusion1").weight.mul_(1.01)  # type: ignore[union-attr, operator]
        return notes

    monkeypatch.setattr(group, "carve", wrong)
    model, x = chain()
    with pytest.raises(VerificationError, match="broke its promise"):
        splitfx.transform(model, Group(factors=(2, 2, 2)), x)
