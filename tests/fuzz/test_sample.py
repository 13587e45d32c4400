"""Some draws of each kind of fuzzer and law; `make fuzz` runs thousands."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.fuzz import box, home, names

FEW = {"network": 20}  # a draw takes a second: the rest of its sample is in `make slow`


@pytest.mark.parametrize("kind", names())
def test_sample(kind: str, tmp_path: Path) -> None:
    held(kind, range(FEW.get(kind, draws(kind))), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FEW)
def test_the_rest_of_a_sample(kind: str, tmp_path: Path) -> None:
    held(kind, range(FEW[kind], draws(kind)), tmp_path)


def draws(kind: str) -> int:
    return getattr(importlib.import_module(home(kind)), "SAMPLE", 60)


def held(kind: str, seeds: range, tmp_path: Path) -> None:
    box.prepare(kind)
    faults = {seed: result.fault for seed in seeds if (result := box.run_draw(kind, seed, tmp_path)).fault}
    told = "".join(
        f"\nseed {seed} (python -m tests.fuzz --kind {kind} --seed {seed} --draws 1)\n{fault}"
        for seed, fault in faults.items()
    )
    assert not faults, told
