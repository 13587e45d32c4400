"""The benchmark runner: what it finds, what it refuses, what a result file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import compile_time, papers, results_format, run
from benchmarks.papers import common
from tests.train.test_data import fashion


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


def resumable(calls: list[str], broken: str = "") -> ModuleType:
    """A benchmark of three jobs, the last of which needs the first; one of them fails."""

    def make(name: str, rows: dict[str, dict[str, int]]) -> dict[str, int]:
        calls.append(name)
        if name == broken:
            raise KeyboardInterrupt
        return {"n": rows["a"]["n"] + 1 if name == "c" else 1}

    module: Any = ModuleType("some")
    module.NAME = "some"
    module.settings = lambda quick: {"images": 4}
    module.jobs = lambda size: {name: partial(make, name) for name in "abc"}
    module.report = lambda rows: " ".join(f"{row['job']}={row['n']}" for row in rows)
    return module


def test_a_benchmark_of_many_jobs_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_format, "RESULTS", tmp_path)
    calls: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run.resumed(resumable(calls, broken="b"), quick=False)
    assert [row["job"] for row in results_format.stored("some")] == ["a"]
    rows = run.resumed(resumable(calls), quick=False)
    assert calls == ["a", "b", "b", "c"]
    assert rows == results_format.stored("some")
    assert run.render(resumable(calls), rows) == "a=1 b=1 c=2"
    run.resumed(resumable(calls), quick=True)
    assert calls[4:] == ["a", "b", "c"]  # nothing is taken over, and nothing stored
    run.resumed(resumable(calls), quick=False, changes={"images": 5})
    assert calls[7:] == ["a", "b", "c"]
    assert {row["settings"]["images"] for row in results_format.stored("some")} == {5}


def test_settings_are_set_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["papers", "--set", "image=5"]) == 2
    assert "there is no setting 'image' here; settings: images, " in capsys.readouterr().err
    assert run.main(["papers", "--set", "images=0"]) == 2
    assert "--set images=0: give a number, 1 or more" in capsys.readouterr().err
    assert run.main(["tile", "--set", "images=5"]) == 2
    assert "settings: none" in capsys.readouterr().err


TINY = ("A2 original", "A2 proposed I", "B1 baseline", "C4 whole", "C4 conv2.1", "D1 FC split, semantic")


@pytest.mark.parametrize("jobs", [TINY, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_papers_tables_run_resume_and_print(
    jobs: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images of noise, so without the data set."""
    fashion(tmp_path, 120)
    monkeypatch.setenv("SPLITFX_FASHION_MNIST", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(results_format, "RESULTS", tmp_path / "results")
    tiny = papers.settings(True)
    monkeypatch.setattr(papers, "settings", lambda quick: tiny)
    known = papers.jobs(tiny)
    chosen = jobs or tuple(known)
    monkeypatch.setattr(papers, "jobs", lambda size: {name: known[name] for name in chosen})
    for cached in (common.data, common.calibration):
        cached.cache_clear()
    rows = run.resumed(papers, quick=False)
    assert [row["job"] for row in rows] == list(chosen)
    monkeypatch.setattr(papers, "jobs", lambda size: dict.fromkeys(chosen))  # nothing is made again
    assert run.resumed(papers, quick=False) == rows
    text = run.render(papers, rows)
    assert max(map(len, text.splitlines())) <= 100
    (proposed,) = [line for line in text.splitlines() if line.startswith("proposed I ")]
    assert proposed.split()[3:] == ["91.51", "508.6", "k", "508", "k"]
    assert "What cannot be compared" in text


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
