"""No two modules of a result, nor of a result and the user's model, share anything that can be changed but tensors.

A hook that is set on one layer must not fire for another: a counter of operations would count twice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.ir.ops import channels
from splitfx.passes import Group
from tests.models import conv_bn, image
from tests.passes.test_contract import NAMES, ZOO, case

GROUP_BY = "model"  # one worker does all that is asked of a model, so that it is traced once


def changeable(value: Any) -> Iterator[Any]:
    """The dicts, lists and sets within an attribute; modules have their own turn."""
    if isinstance(value, dict | list | set):
        yield value
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        for one in inner:
            yield from changeable(one)


def shared(*models: nn.Module) -> list[str]:
    """Attributes that two modules have in common, with both paths."""
    found, owner = [], dict[int, tuple[nn.Module, str]]()
    for i, model in enumerate(models):
        for path, module in model.named_modules(prefix=str(i)):
            for name, value in vars(module).items():
                for one in changeable(value):
                    first, where = owner.setdefault(id(one), (module, f"{path}.{name}"))
                    found += [f"{path}.{name} is {where}"] if first is not module else []
    return found


@pytest.mark.parametrize(("name", "model"), [(n, m) for n in NAMES for m in sorted(ZOO)])
def test_results_share_nothing(name: str, model: str) -> None:
    made = case(name, model)
    for split in made.splits:
        assert not shared(made.source.model, made.graph, split)


def branches() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(conv_bn(3, 8), conv_bn(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    return model, splitfx.transform(model, Group(factors=(2,), fusion="none", lowering="branches"), image())


def test_a_hook_fires_for_its_own_branch() -> None:
    _, split = branches()
    count: list[str] = []
    convs = {path: m for path, m in split.named_modules() if isinstance(m, nn.Conv2d)}
    for path, module in convs.items():
        module.register_forward_hook(lambda *_, path=path: count.append(path))
    split(image())
    assert sorted(count) == sorted(convs)


def test_a_shared_table_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensors_apart(module: nn.Module) -> nn.Module:
        made = copy.copy(module)
        vars(made).update({name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")})
        return made

    assert not shared(*branches())
    monkeypatch.setattr(channels, "unhooked", tensors_apart)
    assert any("_forward_hooks" in one for one in shared(*branches()))


class Drop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 if self.training else x


def twice(_module: nn.Module, _given: Any, result: Any) -> Any:
    return result * 2


def test_what_a_hook_computes_is_traced_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Drop(), nn.Conv2d(8, 8, 3)).double().eval()
    for module in model[1:]:
        module.register_forward_hook(twice)
    x = image().double()
    graph = splitfx.trace(model, x)
    assert torch.allclose(graph(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(m._forward_hooks for m in graph.modules())
