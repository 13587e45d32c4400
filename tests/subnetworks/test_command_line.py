"""The command line with sub-models: transform, explain, inspect, measure, export as one file and as a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitfx import cli
from splitfx.compiler.plan import Plan

NET = """
from torch import nn

def Net():
    first = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_sub_models_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    words = ["transform", "net.py:Net", "--pass", "subnetworks cuts=1,2 statistics=shared", "--input", "1x1x12x12"]
    assert cli.main([*words, "--out", "split", "--quiet"]) == 0
    assert "sub1 enters here with" in capsys.readouterr().out
    plan = Plan.load("split/plan.toml")
    assert plan.to_toml().splitlines()[-2:] == ["cuts = [1, 2]", 'statistics = "shared"']
    for command in (["explain", "split"], ["measure", "split", "--runs", "1"], ["inspect", "split", "--svg", "a.svg"]):
        assert cli.main([*command, "--quiet"]) == 0
    assert "entry" in Path("a.svg").read_text()
    assert cli.main(["export", "split", "--onnx", "base.onnx", "--quiet"]) == 0
    assert cli.main(["check", "split", "base.onnx", "--runs", "1", "--provider", "cpu", "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["export", "split", "--bundle", "bundle", "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {Path(one).name for one in made["files"]} == {
        "base.onnx", "sub0.onnx", "sub1.onnx", "weights.data", "manifest.json",
    }  # fmt: skip
    assert cli.main(["export", "split", "--bundle", "bundle", "--quiet"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_what_is_refused_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    words = ["transform", "net.py:Net", "--pass", "subnetworks cuts=3", "--input", "1x1x12x12", "--out", "split"]
    assert cli.main([*words, "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "cannot drop 3 convs: the model has 3" in error
    assert not Path("split").exists()
