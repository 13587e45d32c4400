"""``splitfx finetune``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import splitfx
from splitfx.cli import main
from splitfx.train.data import load_data
from splitfx.train.finetune import evaluate
from tests.train.networks import of_digits, split_network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return splitfx.save(split_network(), tmp_path / "split")


def test_trains_saves_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, out = splitfx.save(split_network(of_digits()), tmp_path / "split"), tmp_path / "run"
    command = ["finetune", str(saved), "--data", "digits", "--out", str(out), "--set", "epochs=2", "--set", "lr=0.1"]
    assert main(command) == 0
    text = capsys.readouterr()
    assert "epoch 2/2: loss" in text.err
    assert "val accuracy" in text.out
    assert main(command) == 2
    assert "is not empty; go on with the run in it" in capsys.readouterr().err
    assert main([*command, "--resume", "--json", "--quiet"]) == 0
    text = capsys.readouterr()
    told = json.loads(text.out)
    assert not text.err
    loaded = splitfx.load(told["out"])
    assert evaluate(loaded, load_data("digits", (1, 12, 12)).val).accuracy == told["history"]["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "digits"], "has 10 classes, the model's head gives 6"),
        (["--data", "digit"], "Did you mean 'digits'"),
        (["--data", "digits", "--recipe", "grouped-cifar"], "Did you mean 'grouped-cifar10'"),
        (["--data", "digits", "--set", "epoch=3"], "Did you mean 'epochs'"),
        (["--data", "digits", "--weights", "x.pt"], "give --teacher too"),
        (["--data", "cifar10:/no/where"], "there is no folder"),
    ],
)
def test_refusals(
    saved: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(saved), *words, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
