"""`splitfx.plan`: budgets in every form, plans that hold when they are run, refusals in the user's words."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import splitfx
from splitfx import Plan, PlanError, Recipe, TrainingError, cli
from splitfx.compiler.pipeline import Figures, figures, run_plan
from splitfx.ir.graph import info
from splitfx.passes import Group, Tile
from splitfx.planning import training
from splitfx.planning.candidates import _least_change, candidates
from splitfx.planning.choices import Choice, Plans
from splitfx.planning.goals import Goals, goals
from splitfx.planning.plan import _worth_a_choice, missed
from splitfx.train.search.study import SearchStudy
from tests import readers
from tests.oracle import assert_equal
from tests.tiling.test_spill import image
from tests.tiling.test_spill import model as waiting
from tests.tiling.trial import STRICT, error
from tests.traced import made_once
from tests.train.networks import data
from tests.train.networks import network as classifier

plans = importlib.import_module("splitfx.planning.plan")  # the package's `plan` is the function
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
        ({"peak": "50%"}, Goals(peak_bytes=50 << 20)),
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


def test_single_blocks_are_split_less_where_the_work_allows_it() -> None:
    """What is chosen keeps the budget, and no block of it can be halved: every combination is counted for it."""
    graph = splitfx.trace(network(), SHAPE)
    macs: dict[tuple[int, ...], int] = {
        factors: figures(run_plan(graph, Plan([Group(factors=factors)]), verify=False)).macs
        for factors in itertools.product((1, 2, 4, 8), repeat=2)
    }
    for budget in {*macs.values()} - {macs[1, 1]}:
        chosen = _least_change(graph, budget)
        assert chosen is not None
        assert macs[chosen] <= budget
        for place in (0, 1):
            less = tuple(factor // 2 if i == place else factor for i, factor in enumerate(chosen))
            assert 0 in less or macs[less] > budget
    assert _least_change(graph, min(macs.values()) - 1) is None
    found = [one.name for one in candidates(graph, Goals(macs=macs[2, 2] + 1))]
    assert not any("fold" in name or "tile" in name for name in found)  # these leave the work as it is


def test_a_pass_that_changes_no_figure_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plans, "_worth_a_choice", lambda found: found
    )  # which of them is faster is the machine's to say
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    found = splitfx.plan(model, (1, 3, 32, 32), latency="0.99x")
    one = next(choice for choice in found.choices if choice.name == "separable pools")
    assert (one.same, one.figures) == (True, found.now.figures)
    assert one.time is not None
    small = [one.name for one in candidates(splitfx.trace(model, (1, 3, 32, 32)), Goals(peak_bytes=1000))]
    assert "separable pools" not in small  # they save no memory


def test_a_budget_that_cannot_be_kept_names_what_comes_nearest() -> None:
    found = splitfx.plan(network(), SHAPE, peak="10 KiB")
    with pytest.raises(PlanError, match=r"no plan was found for a peak of at most 10\.00 KiB.*the least is"):
        _ = found.best
    assert "cannot be had" in str(found)


@pytest.mark.parametrize(
    ("given", "message"), [({"peak": "half"}, "such as '64 MiB'"), ({"device": "gpu"}, "there is no device 'gpu'")]
)
def test_what_cannot_be_read_is_told_before_the_work(given: dict[str, Any], message: str) -> None:
    said: list[str] = []
    with pytest.raises(splitfx.SplitfxError, match=message):
        splitfx.plan(network(), SHAPE, **given, progress=said.append)
    assert not said


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


def test_where_no_strips_are_low_enough_maps_go_to_the_disk() -> None:
    assert "spill" not in str(halved())  # not weighed where strips alone will do
    found = splitfx.plan(waiting(), image(), peak=70_000)
    assert [f"{name}, spill to disk" for name, _ in found.refused] == [found.best.name]
    (tile,) = found.plan.passes
    assert isinstance(tile, Tile)
    assert tile.spill == "disk"
    x = torch.randn_like(image())
    split = splitfx.transform(waiting(), found.plan, x)
    assert error(split(x), waiting()(x)) <= STRICT
    assert splitfx.measure(split, x, runs=1).peak_bytes <= 70_000


# ---------------------------------------------------------------- going on


def test_a_look_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = lambda resume, **more: splitfx.plan(  # noqa: E731
        network(), SHAPE, peak="0.5x", study=SearchStudy(tmp_path, resume), progress=said.append, **more
    )
    said: list[str] = []
    first = ask(False, max_seconds=0)
    assert not first.complete
    whole = ask(True)
    assert any(one.startswith("timing") for one in said)
    said.clear()
    monkeypatch.setattr(plans, "candidates", lambda *given: list(candidates(*given)))
    again = ask(True)
    assert not any(one.startswith(("timing", "measuring")) for one in said)
    assert str(again) == str(whole)
    assert again.plan == whole.plan
    with pytest.raises(TrainingError, match="is not empty"):
        ask(False)
    with pytest.raises(PlanError, match="holds another look: budgets is "):
        splitfx.plan(network(), SHAPE, peak="0.4x", study=SearchStudy(tmp_path, resume=True))
    (tmp_path / "looked.json").write_text('{"about": 3}')
    with pytest.raises(PlanError, match=r"looked\.json is damaged: see about: "):
        ask(True)


# ---------------------------------------------------------------- with data


def test_layers_are_solved_and_that_is_enough(tmp_path: Path) -> None:
    ask = lambda: splitfx.plan(  # noqa: E731
        classifier(), (1, 1, 12, 12), macs="0.8x", accuracy_drop=60.0, train=sets.train, val=sets.val,
        study=SearchStudy(tmp_path, resume=True),
    )  # fmt: skip
    sets = data()
    found = ask()
    best = found.best
    assert best.learned == "solved"
    assert best.split is not None
    assert splitfx.evaluate(best.split, sets.val).accuracy == best.accuracy
    assert best.accuracy >= found.now.accuracy - 60  # type: ignore[operator]
    others = [one for one in found.choices if not one.same and one is not best]
    assert all(one.missed == ("was not trained",) for one in others)
    assert "solved; those weights" in found.to_toml()
    again = ask()
    assert again.best.split is not None
    assert splitfx.evaluate(again.best.split, sets.val).accuracy == best.accuracy
    assert str(again) == str(found)


def test_what_is_not_enough_is_trained_as_long_as_there_is_time() -> None:
    sets, graph = data(), splitfx.trace(classifier(), (1, 1, 12, 12))
    recipe = Recipe(epochs=2, lr=0.05)
    call = lambda end: training._found(  # noqa: E731
        graph, Plan([Group(factors=2)]), "g", 101.0, (sets.train, sets.val, recipe), end
    )
    before = graph.state_dict()["0.weight"].clone()
    split, learned = call(time.perf_counter() + 600)
    assert learned.how == "trained"
    assert splitfx.evaluate(split, sets.val).accuracy == learned.accuracy
    assert torch.equal(before, graph.state_dict()["0.weight"])
    assert call(0.0)[1].how == "solved"


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (9, "solved"),
        (12, "trained, 64 samples in the time that there was"),
        (18, "trained, 240 samples in the time that there was"),
        (60, "trained"),
    ],
)
def test_training_is_as_long_as_there_is_time(end: float, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second: 32 samples take one, a measurement of the accuracy two."""
    seconds = iter(range(1, 100))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    sets, graph = data(), splitfx.trace(classifier(), (1, 1, 12, 12))
    assert len(sets.train) == 240  # type: ignore[arg-type]
    recipe = Recipe(epochs=2, batch_size=4, lr=0.001)
    split, learned = training._found(graph, Plan([Group(factors=2)]), "g", 101.0, (sets.train, sets.val, recipe), end)
    assert learned.how == how
    assert dataclasses.replace(choice("g", 1, 1, 1.0, same=False), learned=how).function == how.partition(",")[0]
    assert splitfx.evaluate(split, sets.val).accuracy == learned.accuracy


def test_passes_that_keep_the_function_come_after_the_training() -> None:
    sets = data()
    found = splitfx.plan(
        classifier(), (1, 1, 12, 12), peak="0.9x", macs="0.8x", accuracy_drop=99.0, train=sets.train, val=sets.val
    )
    tiled = next(one for one in found.choices if one.accuracy is not None and one.name.endswith("tile"))
    assert tiled.split is not None
    assert info(tiled.split).plan == tiled.plan
    assert splitfx.evaluate(tiled.split, sets.val).accuracy == tiled.accuracy
    assert splitfx.profile(tiled.split).peak_bytes == tiled.figures.peak_bytes


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
    one = dataclasses.replace(choice("fold", 5 << 20, 10**9, 1.03), why="w", spread=0.04)
    text = str(Plans("Net", "1×3×8×8", Goals(), now, (one, dataclasses.replace(one, time=0.83))))
    assert max(map(len, text.splitlines())) <= 100
    assert "1 s no difference" in text
    assert "x0.83 ± 0.04" in text
    assert "x1.03" not in text
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


def test_the_command_saves_what_was_trained_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readers.file(str(tmp_path / "mynet.py"))
    saved, study = str(tmp_path / "saved"), str(tmp_path / "study")
    words = ["plan", f"{tmp_path / 'mynet.py'}:Gray", "--weights", str(tmp_path / "mynet.pt"), "--input", "1x1x16x16"]
    words += ["--macs", "0.7x", "--accuracy-drop", "90", "--data", "digits", "--study", study, "--quiet"]
    assert cli.main([*words, "--save", saved]) == 0
    assert "saved the model by that plan" in capsys.readouterr().out
    assert splitfx.load(saved)(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    assert cli.main(words) == 2
    assert "is not empty; go on with the search in it" in capsys.readouterr().err
    assert cli.main([*words, "--save", saved, "--resume"]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "--json"]) == 0
    assert any(one["learned"] == "solved" for one in json.loads(capsys.readouterr().out)["choices"])
