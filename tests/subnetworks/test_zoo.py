"""Every cut of torchvision's classifiers at three sizes of the image; a sample of it by default."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from splitfx.frontend.trace import trace
from tests.models import ZOO
from tests.subnetworks import sweep
from tests.subnetworks.networks import residual
from tests.traced import odd

GROUP_BY = "model"  # one worker does all that is asked of a model, so that it is traced once

NAMES = torchvision.models.list_models(module=torchvision.models)
# model -> cuts at 224 by form
SAMPLE = {"squeezenet1_1": {"closed": 17}, "resnet18": {"closed": 8}}


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_sample(name: str) -> None:
    for size in sweep.sizes_of(name):
        found = sweep.sweep(name, size)
        assert found.wrong == ()
        assert found.cuts == sum(SAMPLE[name].values())
        assert found.forms == SAMPLE[name]


@pytest.mark.parametrize("model", sorted(ZOO))
def test_the_odd_models(model: str) -> None:
    found = sweep.swept(odd(model)[2])
    assert found.wrong == ()
    assert found.cuts > 0 or found.why


def test_a_step_down_of_another_size_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the stride of every step-down one larger."""
    make = sweep.make_entry

    def wrong(*args: object, **kwargs: object) -> nn.Module:
        entry = make(*args, **kwargs)  # type: ignore[arg-type]
        conv = entry.step_down.get_submodule("conv")
        conv.stride = tuple(s + 1 for s in conv.stride)  # type: ignore[union-attr, assignment]
        return entry

    monkeypatch.setattr(sweep, "make_entry", wrong)
    found = sweep.swept(trace(residual(), torch.zeros(1, 3, 16, 16)))
    assert found.wrong
    assert any(layer_name in found.wrong[0] for layer_name in ("body.", "fc"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_every_cut_of_every_classifier(name: str) -> None:
    found = [sweep.sweep(name, size) for size in sweep.sizes_of(name)]
    assert [one.wrong for one in found] == [()] * len(found)
    assert all(one.cuts or one.why for one in found)
    assert found[0].cuts > 0
