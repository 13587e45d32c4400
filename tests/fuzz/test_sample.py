"""Some draws of each kind of fuzzer and law; `make fuzz` runs thousands."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.fuzz import box, home, names


@pytest.mark.parametrize("kind", names())
def test_sample(kind: str, tmp_path: Path) -> None:
    box.prepare(kind)
    draws = getattr(importlib.import_module(home(kind)), "SAMPLE", 60)
    faults = {seed: result.fault for seed in range(draws) if (result := box.run_draw(kind, seed, tmp_path)).fault}
    told = "".join(
        f"\nseed {seed} (python -m tests.fuzz --kind {kind} --seed {seed} --draws 1)\n{fault}"
        for seed, fault in faults.items()
    )
    assert not faults, told
