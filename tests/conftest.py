"""One thread, one seed and a registry that each test may add to."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share two cores

import pytest
import torch
from hypothesis import settings

from splitfx.compiler import registry

# The machine is shared: a slow example is no failure, and a failure must come back on the next run.
settings.register_profile("splitfx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("splitfx")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a traced or exported model run in one worker: those of a file, or, where the file says
    ``GROUP_BY = "model"``, those of one value of that parameter."""
    for item in items:
        by = getattr(getattr(item, "module", None), "GROUP_BY", None)
        values = getattr(item, "callspec", None)
        value = values.params.get(by, "") if values is not None and by else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}:{value}"))


def _kept_between_exports() -> None:
    """torch reads the source of 500 translations anew for each ONNX file, and all its operators for each graph: half of
    the seconds of a small export. Neither changes within a run, so a process of the suite does it once."""
    translations: Any = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    translations.from_torchlib = staticmethod(functools.cache(translations.from_torchlib))
    operators: Any = importlib.import_module("torch._export.utils")
    operators._materialize_cpp_cia_ops = functools.cache(operators._materialize_cpp_cia_ops)


_kept_between_exports()


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed writes its stack down for devices that are not there


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry with no pass in it; what a test registers is gone afterwards."""
    known: dict = {}
    monkeypatch.setattr(registry, "_known", known)
    monkeypatch.setattr(registry, "_discover", lambda: None)
    return known
