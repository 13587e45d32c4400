"""What tests of traced models share: every odd tiny model in float64, its graph, made once, and notes of a graph."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from splitfx.ir.graph import info
from tests.models import ZOO

# The package's `trace` is the function of that name.
trace_module = importlib.import_module("splitfx.frontend.trace")
Made = TypeVar("Made")
every_model = pytest.mark.parametrize("name", sorted(ZOO))


def doubled(value: Any) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, value)


def made(name: str) -> tuple[nn.Module, Any]:
    model, inputs = ZOO[name]()
    return model.double(), doubled(inputs)


def notes(graph: Any) -> str:
    return "\n".join(f"{n.where}: {n.what}" for n in info(graph).notes)


def made_once(make: Callable[..., Made]) -> Callable[..., Made]:
    """``make``, run once in a process for the same arguments, from seed 0; every call gives a private copy of what it
    made. Tracing takes most of the seconds of a small test, and a test of what comes after it needs no new one."""

    @functools.cache
    def first(*args: Any, **options: Any) -> Made:
        with torch.random.fork_rng(devices=[]):  # what a test draws is the same in its first call and later
            torch.default_generator.manual_seed(0)
            return make(*args, **options)

    return functools.wraps(make)(lambda *args, **options: copy.deepcopy(first(*args, **options)))


@made_once
def odd(name: str, double: bool = False) -> tuple[nn.Module, Any, Any]:
    """An odd tiny model in eval mode, its inputs and its graph, which holds its parameters."""
    model, inputs = made(name) if double else ZOO[name]()
    return model, inputs, trace_module.trace(model.eval(), inputs)
