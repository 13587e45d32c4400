"""One thread, one seed and a registry that each test may add to."""

from __future__ import annotations

import functools
import gc
import importlib
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share two cores

import pytest
import torch
from hypothesis import settings

from splitfx.compiler import registry
from splitfx.frontend.trace import trace

LONG = 200  # tests, of which many trace

# The machine is shared: a slow example is no failure, and a failure must come back on the next run.
settings.register_profile("splitfx", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("splitfx")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a traced or exported model run in one worker: those of a file, or, where files say
    ``GROUP_BY = "model"``, those of one value of that parameter, in all such files.

    Groups of few tests come first: a test that stands nearly alone is a long one, such as a training in processes of
    its own, and the many short ones level out what two workers have left to do.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        by = getattr(getattr(item, "module", None), "GROUP_BY", None)
        values = getattr(item, "callspec", None)
        value = values.params.get(by, "") if values is not None and by else ""
        group = f"model:{value}" if value else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
        groups.setdefault(group, []).append(item)
    run = lambda group: sum(item.get_closest_marker("slow") is None for item in group)  # noqa: E731
    items[:] = [item for group in sorted(groups.values(), key=run) for item in group]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What torch and the test files have made by now stays to the end: no collection of garbage looks at it again,
    and there are many, because each training asks for some. In a long run that holds for what tracing loads too."""
    if len(session.items) > LONG:
        trace(torch.nn.Identity(), torch.zeros(1))
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is alive at the end is said to be a leak


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
