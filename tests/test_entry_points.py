"""An installed package adds a pass and an operator by entry points alone: nothing of splitfx names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import splitfx
from splitfx import Facts, Note, Outcome, Pass, Promise


@torch.library.custom_op("throwaway::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@halve.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def operators() -> None:
    splitfx.register_op(halve, rows="same", channels="same", per_output=1, decomposition=lambda x: x / 2)


@dataclass(frozen=True)
class NameFirst(Pass):
    """Notes the first layer."""

    name: ClassVar[str] = "name_first"
    promise: ClassVar[Promise] = Promise.EQUAL

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        first = next(n for n in graph.graph.nodes if n.op == "call_module")
        return Outcome((Note(str(first.target), "is the first", "info"),))
'''
ENTRY_POINTS = """
[splitfx.passes]
name_first = throwaway:NameFirst

[splitfx.ops]
halve = throwaway:operators
"""
USE = """
import torch, splitfx, throwaway
from splitfx.passes import Tile
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1)).eval()
plan = splitfx.Plan.from_toml('format = 1\\n[[pass]]\\nname = "name_first"')
print(splitfx.explain(splitfx.transform(model, plan, torch.zeros(1, 3, 8, 8))).steps[0].notes[0].what)

class Half(torch.nn.Module):
    def forward(self, x):
        return torch.ops.throwaway.halve(x)

split = splitfx.transform(torch.nn.Sequential(*model, Half()).eval(), Tile(rows=2), torch.zeros(1, 3, 8, 8))
(stage,) = [m.stage for m in split.modules() if hasattr(m, "stage")]
print("halve.default" in {str(n.target).partition(".")[2] for n in stage.graph.nodes})
"""


def test_a_throw_away_package(tmp_path: Path) -> None:
    """What an installer leaves: the module, and its metadata beside it."""
    (tmp_path / "throwaway.py").write_text(PACKAGE)
    metadata = tmp_path / "throwaway-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    root = Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]\n{USE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["is the first", "True"]
