"""What the tests of tracing share: every odd tiny model in float64, the notes of its graph."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from splitfx.ir.graph import info
from tests.models import ZOO

# The package's `trace` is the function of that name.
trace_module = importlib.import_module("splitfx.frontend.trace")
every_model = pytest.mark.parametrize("name", sorted(ZOO))


def doubled(value: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def made(name: str) -> tuple[nn.Module, Any]:
    model, inputs = ZOO[name]()
    return model.double(), doubled(inputs)


def notes(graph: Any) -> str:
    return "\n".join(f"{n.where}: {n.what}" for n in info(graph).notes)
