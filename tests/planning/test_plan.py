"""`splitfx.plan`: budgets in every form, plans that hold when they are run, refusals in the user's words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx import Plan, PlanError, cli
from splitfx.compiler.pipeline import Figures
from splitfx.planning.choices import Choice, Plans
from splitfx.planning.goals import Goals, goals
from splitfx.planning.plan import _worth_a_choice, missed
from tests.oracle import assert_equal
from tests.traced import made_once

SHAPE = (1, 3, 64, 64)
NOW = (100 << 20, 0.02, 10**9)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


@made_once
def halved() -> Plans:
    return splitfx.plan(network(), SHAPE, peak="0.5x")


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"peak": "64 MiB"}, Goals(peak_bytes=64 << 20)),
        ({"peak": 1 << 20}, Goals(peak_bytes=1 << 20)),
        ({"peak": "0.5x"}, Goals(peak_bytes=50 << 20)),
        ({"peak": "0.5 ×"}, Goals(peak_bytes=50 << 20)),
        ({"peak": "least"}, Goals(least=True)),
        ({"latency": "0.5x"}, Goals(seconds=0.01)),
        ({"latency": "15 ms"}, Goals(seconds=0.015)),
        ({"latency": 0.5}, Goals(seconds=0.5)),
        ({"macs": "0.25x"}, Goals(macs=250_000_000)),
        ({"macs": "1.5 G"}, Goals(macs=1_500_000_000)),
        ({"macs": 10**6}, Goals(macs=10**6)),
    ],
)
def test_budgets_in_every_form(given: dict[str, Any], found: Goals) -> None:
    asked = {"peak": None, "latency": None, "macs": None, **given}
    assert goals(asked["peak"], asked["latency"], asked["macs"], None, NOW) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peak": "64"}, "such as '64 MiB'"),
        ({"peak": "-1x"}, "such as '64 MiB'"),
        ({"peak": 0}, "peak is more than nothing"),
        ({"peak": True}, "peak is more than nothing"),
        ({"latency": "fast"}, "a time such as '20 ms'"),
        ({"latency": "0x"}, "latency is more than nothing"),
        ({"macs": "many"}, r"a count such as '1\.5 G'"),
        ({"macs": float("nan")}, "macs is more than nothing"),
    ],
)
def test_what_is_no_budget(given: dict[str, Any], message: str) -> None:
    asked = {"peak": None, "latency": None, "macs": None, **given}
    with pytest.raises(PlanError, match=message):
        goals(asked["peak"], asked["latency"], asked["macs"], None, NOW)


# ---------------------------------------------------------------- what is found


def test_half_the_peak_holds_when_the_plan_is_run(tmp_path: Path) -> None:
    found = halved()
    best, now = found.best, found.now.figures.peak_bytes
    assert best.figures.peak_bytes <= now // 2
    assert best.same
    found.save(tmp_path / "plan.toml")
    split = splitfx.transform(network(), tmp_path / "plan.toml")
    x = torch.randn(SHAPE)
    assert_equal(split(x), network()(x))
    assert splitfx.measure(split, x, runs=1).peak_bytes == pytest.approx(best.figures.peak_bytes, rel=0.02)
    text = (tmp_path / "plan.toml").read_text()
    assert text.startswith("# Sequential on 1×3×64×64: a peak of at most ")
    assert Plan.from_toml(text) == found.plan


def test_half_the_work_needs_training_and_says_so() -> None:
    found = splitfx.plan(network(), SHAPE, macs="0.7x")
    assert not found.best.same
    assert found.best.figures.macs <= 0.7 * found.now.figures.macs
    assert "to be trained" in str(found)
    assert "# has fewer connections than the model: train it" in found.to_toml()


def test_a_budget_that_cannot_be_kept_names_what_comes_nearest() -> None:
    found = splitfx.plan(network(), SHAPE, peak="10 KiB")
    with pytest.raises(PlanError, match=r"no plan was found for a peak of at most 10\.00 KiB.*the least is"):
        _ = found.best
    assert "cannot be had" in str(found)


def test_accuracy_needs_data() -> None:
    with pytest.raises(PlanError, match="give train= and val="):
        splitfx.plan(network(), SHAPE, macs="0.5x", accuracy_drop=0.5)


def test_time_runs_out() -> None:
    found = splitfx.plan(network(), SHAPE, peak="0.5x", max_seconds=0)
    assert not found.complete
    assert "the time ran out" in str(found)


def test_the_model_is_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    splitfx.plan(model, SHAPE, peak="0.5x")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- the table


def choice(name: str, peak: int, macs: int, time: float, same: bool = True) -> Choice:
    return Choice(name, "why", None, Figures(1, macs, peak, "conv"), time, time, same)


def test_beaten_plans_are_left_out() -> None:
    good, slow, small = choice("good", 5, 5, 1.0), choice("slow", 5, 5, 2.0), choice("small", 1, 5, 3.0)
    assert _worth_a_choice([slow, good, small]) == [good, small]
    trained = choice("trained", 5, 4, 1.0, same=False)
    assert _worth_a_choice([good, trained]) == [good, trained]  # fewer MACs, but another function


def test_what_is_missed_is_said_with_its_figure() -> None:
    asked = Goals(peak_bytes=4 << 20, seconds=0.5, macs=10**9)
    assert missed(choice("a", 5 << 20, 2 * 10**9, 1.0), asked) == ("takes 5.00 MiB", "has 2.00 G MACs", "takes 1 s")
    assert missed(choice("a", 4 << 20, 10**9, 0.5), asked) == ()


def test_the_table_fits_and_tells_noise() -> None:
    now = choice("as it is", 10 << 20, 10**9, 1.0)
    one = dataclasses.replace(choice("fold", 5 << 20, 10**9, 1.01), why="w")
    text = str(Plans("Net", "1×3×8×8", Goals(), now, (one,)))
    assert max(map(len, text.splitlines())) <= 100
    assert "the same" in text
    assert "x1.01" not in text
    assert "÷2.00" in text


def test_the_command_writes_a_plan_that_transform_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    c = lambda i, o: nn.Conv2d(i, o, 3, padding=1)\n"
        "    return nn.Sequential(c(3, 16), nn.BatchNorm2d(16), nn.ReLU(), c(16, 16), nn.ReLU(), c(16, 4))\n"
    )
    word, out = f"{tmp_path / 'net.py'}:net", tmp_path / "plan.toml"
    assert (
        cli.main(["plan", word, "--input", "1x3x64x64", "--peak", "0.6x", "--out", str(out), "--json", "--quiet"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert any(not one["missed"] for one in told["choices"])
    assert cli.main(["transform", word, "--plan", str(out), "--out", str(tmp_path / "split"), "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main(["plan", word, "--input", "1x3x64x64", "--data", "digits", "--quiet"]) == 2
    assert "--accuracy-drop and --data go together" in capsys.readouterr().err
