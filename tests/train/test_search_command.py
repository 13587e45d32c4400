"""``splitfx search``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import splitfx
from splitfx.cli import main

MODEL = f"{Path(__file__).with_name('networks.py')}:of_digits"
SHAPE = ["--input", "1x1x12x12", "--data", "digits", "--factors", "2,4"]


def test_searches_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["search", MODEL, *SHAPE, "--out", str(out), "--set", "epochs=1", "--tolerance", "100"]
    assert main([*command, "--max-trials", "1"]) == 0
    text = capsys.readouterr()
    assert "stopped at a limit" in text.out
    assert "factors 2, 1: accuracy" in text.err
    assert main([*command, "--resume", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"]["selected"] == [4, 4]
    split = splitfx.load(told["out"])
    assert splitfx.profile(split).macs == told["result"]["after"]["macs"]
    assert splitfx.Plan.load(out / "plan.toml").passes[0].factors == (4, 4)  # type: ignore[attr-defined]
    assert "block 2" in (out / "trend.txt").read_text()
    assert (out / "trend.png").exists()


def test_a_front_is_searched_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["search", MODEL, *SHAPE, "--out", str(out), "--set", "epochs=1", "--method", "pareto"]
    assert main(command) == 2
    assert "give max_trials or max_seconds" in capsys.readouterr().err
    assert main([*command, "--max-trials", "2", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["result"]["tried"]) == 2
    assert json.loads((out / "result.json").read_text()) == told["result"]
    assert sorted(p.name for p in out.iterdir()) == ["front.png", "locks", "result.json", "study.journal", "trials"]
    for one in told["result"]["tried"]:
        split = splitfx.load(out / "trials" / "-".join(map(str, one["factors"])) / "split")
        assert splitfx.profile(split).macs == one["figures"]["macs"]


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    few = ["search", MODEL, "--input", "1x1x12x12", "--factors", "2,4"]
    assert main([*few, "--dry-run", "--option", "order=energy"]) == 0
    text = capsys.readouterr().out
    assert "kept weight" in text
    assert "at most 4 trials" in text
    assert main([*few, "--out", str(out)]) == 2
    assert "a search needs --data and --out" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--factors", "4,2"], "in rising order"),
        (["--factors", "2,x"], "a positive whole number, not 'x'"),
        (["--option", "fusoin=keep"], "Did you mean 'fusion'"),
        (["--reference", "first"], "'original' or 'block'"),
        (["--method", "random"], "'greedy' or 'pareto'"),
        (["--input", "1x1x12x12"], "too many positional arguments"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["search", MODEL, *SHAPE, "--out", str(tmp_path / "run"), *words])
    except SystemExit as end:  # argparse's own way out
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
