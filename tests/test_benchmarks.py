"""The benchmark runner: what it finds, what it refuses, what a result file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compile_time, results_format, run


def test_every_benchmark_is_found_and_can_be_printed() -> None:
    known = run.discover()
    assert {"dense_vs_split", "compile_time", "memory_prediction"} <= set(known)
    for name, module in known.items():
        assert name == module.NAME
        assert max(map(len, run.render(module, []).splitlines())) <= 100


def test_an_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["compile_tme"]) == 2
    assert "Did you mean 'compile_time'?" in capsys.readouterr().err


def test_models_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["decoders", "--only", "NAFNett"]) == 2
    assert "decoders does not know NAFNett; it has: vae decode, NAFNet" in capsys.readouterr().err
    assert run.main(["decoders", "shard", "--only", "NAFNet"]) == 2
    assert "--only names models of one benchmark" in capsys.readouterr().err
    assert run.main(["compile_time", "--only", "alexnet"]) == 2
    assert "no models that can be chosen" in capsys.readouterr().err
    for cases in ({"a": 1, "b": 2}, (("a", 1), ("b", 2))):
        module = ModuleType("some")
        vars(module)["CASES"] = cases
        run.choose(module, ["b"])
        assert run.models_of(module) == ["b"]


def test_rows_of_other_models_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_format, "RESULTS", tmp_path)
    rows = [{"model": "a", "n": 1}, {"model": "b", "n": 2}, {"model": "b", "n": 3}, {"model": "c", "n": 4}]
    results_format.write(results_format.record("demo", rows))
    found = results_format.kept_beside("demo", [{"model": "b", "n": 5}, {"model": "d", "n": 6}])
    assert [(row["model"], row["n"], "date" in row) for row in found] == [
        ("a", 1, False),
        ("b", 5, True),
        ("c", 4, False),
        ("d", 6, True),
    ]


def test_a_result_file_names_versions_and_no_place(tmp_path: Path) -> None:
    found = results_format.record("demo", [{"model": "a", "seconds": 1.0}])
    results_format.write(found, tmp_path / "demo.json")
    kept = json.loads((tmp_path / "demo.json").read_text())
    assert (kept["format"], kept["name"], kept["rows"]) == (1, "demo", [{"model": "a", "seconds": 1.0}])
    assert "torch" in kept["versions"]
    assert kept["host"]["cpu"]
    assert os.getcwd() not in json.dumps(kept)


def test_the_committed_results_have_the_format() -> None:
    for path in results_format.RESULTS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert kept["format"] == results_format.FORMAT, path.name
        assert kept["rows"], path.name


@pytest.mark.slow
def test_the_gpu_checks_run_dry_on_a_cpu() -> None:
    script = Path(results_format.__file__).parent / "gpu.sh"
    done = subprocess.run(
        [str(script), "--cpu-dry-run"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAILED" not in done.stdout


def test_a_model_that_dies_leaves_a_row_that_says_so() -> None:
    row_of = compile_time.row_of
    assert row_of("big", -9, "", "") == {"model": "big", "outcome": "killed by signal 9"}
    assert row_of("odd", 1, "", "Traceback\nValueError: no") == {"model": "odd", "outcome": "failed: ValueError: no"}
    assert row_of("good", 0, 'a warning\n{"model": "good"}\n', "") == {"model": "good"}
    assert "killed by signal 9" in run.render(compile_time, [row_of("big", -9, "", "")])


@pytest.mark.slow
def test_a_model_is_timed_in_a_process_of_its_own() -> None:
    row = compile_time.in_its_own_process(compile_time.CHAIN.format(12))
    assert row["outcome"] == "split"
    assert row["total_seconds"] == row["trace_seconds"] + row["facts_seconds"] + row["transform_seconds"]
    assert compile_time.in_its_own_process("no_such_model")["outcome"].startswith("failed: ValueError")
