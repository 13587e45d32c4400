"""The record beside a saved split, edited: one line that names the place, and what was written is read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx.errors import ExportError
from splitfx.storage.record import NAME, read_record

FIGURES = {"params": 1, "macs": 2, "peak_bytes": 3, "peak_layer": "conv"}
STEP = {
    "name": "group", "options": {"factors": [2]}, "promise": "retrain", "changed": True, "seconds": 0.5,
    "notes": [{"where": "conv", "what": "split", "kind": "did"}], "difference": None,
    "before": FIGURES, "after": FIGURES,
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> torch.fx.GraphModule:
    return splitfx.trace(nn.Linear(2, 2).eval(), torch.ones(1, 2))


def read(graph: torch.fx.GraphModule, folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    given = json.loads(json.dumps({"model": "M", "front_end": "x", "notes": [], "steps": [STEP]}))
    change(given)
    (folder / NAME).write_text(json.dumps(given))
    splitfx.ir.graph.info(graph).steps = []
    read_record(graph, folder)
    return str(splitfx.explain(graph))


def test_what_was_written_is_told(graph: torch.fx.GraphModule, tmp_path: Path) -> None:
    assert "group(factors=[2])" in read(graph, tmp_path, lambda given: None)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no steps": (lambda g: g.pop("steps"), "`steps`"),
    "a promise": (lambda g: g["steps"][0].update(promise="x"), "no promise 'x'"),
    "figures": (lambda g: g["steps"][0].update(before=None), r"steps\[0\].before"),
    "a huge figure": (lambda g: g["steps"][0]["before"].update(macs=10**4000), "more than 64 bits"),
    "a kind": (lambda g: g["steps"][0]["notes"][0].update(kind="x"), r"steps\[0\].notes\[0\].kind"),
    "options": (lambda g: g["steps"][0].update(options=[]), r"steps\[0\].options"),
    "depth": (lambda g: g["steps"][0].update(options={"x": json.loads("[" * 500 + "]" * 500)}), "levels deep"),
    "seconds": (lambda g: g["steps"][0].update(seconds=float("inf")), "not finite"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_record_is_refused_in_one_line(name: str, graph: torch.fx.GraphModule, tmp_path: Path) -> None:
    change, why = CHANGES[name]
    with pytest.raises(ExportError, match=f"is damaged: .*{why}.*delete it to go on") as caught:
        read(graph, tmp_path, change)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
