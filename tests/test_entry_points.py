"""An installed package adds a pass and an operator by entry points alone: nothing of splitfx names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "throwaway"
version = "1.0"

[project.entry-points."splitfx.passes"]
name_first = "throwaway:NameFirst"

[project.entry-points."splitfx.ops"]
halve = "throwaway:operators"

[tool.setuptools]
py-modules = ["throwaway"]
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the package, from its sources and without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "throwaway.py").write_text(PACKAGE)
    (source / "pyproject.toml").write_text(PROJECT)
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def used(*folders: Path) -> subprocess.CompletedProcess[str]:
    """`USE` in a fresh interpreter that finds modules in these folders too."""
    root = Path(__file__).resolve().parent.parent
    code = f"import sys; sys.path[:0] = {[str(root), *map(str, folders)]!r}\n{USE}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folders[0])


def test_a_throw_away_package(installed: Path) -> None:
    done = used(installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["is the first", "True"]


def test_sabotage_without_the_metadata_nobody_knows_the_pass(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "throwaway.py").write_text((installed / "throwaway.py").read_text())
    done = used(tmp_path)
    assert done.returncode != 0
    assert "name_first" in done.stderr
