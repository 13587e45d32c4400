"""`diff`: the first layer that differs is named, rounding is not, and layers that one model has alone are listed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import splitfx
from splitfx import cli
from splitfx.passes import FoldBatchNorm, Tile

SHAPE = (1, 3, 16, 16)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    ).eval()


def test_the_first_layer_that_differs_is_named() -> None:
    other = copy.deepcopy(network())
    with torch.no_grad():
        other[3].weight[0] += 0.5  # type: ignore[index]
    found = splitfx.diff(network(), other, SHAPE)
    assert found.first == "3"
    assert [one.relative == 0 for one in found.layers] == [True, True, True, False, False]
    assert "the first layer whose output differs is 3" in str(found)


def test_equal_models_are_told_so() -> None:
    found = splitfx.diff(network(), network(), SHAPE)
    assert (found.first, found.only_first, found.only_second) == ("", (), ())
    assert "all 5 layers" in str(found)


def test_a_folded_norm_is_in_the_first_only() -> None:
    split = splitfx.transform(network(), FoldBatchNorm(), SHAPE)
    found = splitfx.diff(network(), split)
    assert found.only_first == ("1",)
    assert found.first in ("", "0")  # the conv took the norm in, so its own output may differ
    assert {one.layer: one for one in found.layers}["4"].relative == pytest.approx(0, abs=1e-5)


def test_what_has_another_shape_differs() -> None:
    other = network()
    other[3] = nn.Conv2d(8, 4, 3, padding=1)
    found = splitfx.diff(network(), other.eval(), SHAPE)
    assert found.first == "3"
    assert "another shape" in str(found)


def test_two_models_that_know_no_sizes() -> None:
    with pytest.raises(splitfx.UnsupportedError, match="give its example_inputs"):
        splitfx.diff(network(), network())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("a", FoldBatchNorm()), ("b", [FoldBatchNorm(), Tile(rows=4)])):
        splitfx.save(splitfx.transform(network(), steps, SHAPE), tmp_path / name)
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["before"]["params"] == told["after"]["params"] > 0
    assert [one["layer"] for one in told["layers"]] == ["4"]  # the others run inside the stage
    assert told["first"] == ""
