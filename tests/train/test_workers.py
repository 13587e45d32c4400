"""Several workers of one search as processes of their own, its study in a file or in a database, and what is torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import splitfx
from splitfx.cli import main
from splitfx.errors import PlanError, TrainingError
from splitfx.train.search.front import search_front
from splitfx.train.search.greedy import search_factors
from splitfx.train.search.space import FACTORS, SearchSpace
from splitfx.train.search.study import SearchStudy
from splitfx.train.search.trials import JOURNAL
from splitfx.train.search.tuner import FunctionTuner
from tests.train.test_search import Paper, X, five_blocks

MODEL = f"{Path(__file__).with_name('networks.py')}:of_digits"
SEARCH = ["search", MODEL, "--input", "1x1x12x12", "--data", "digits", "--factors", "2,4", "--tolerance", "30"]
SEARCH += ["--set", "epochs=1", "--set", "lr=0.1", "--resume", "--out"]


def paper(
    folder: Path | None,
    *,
    given: Paper | None = None,
    model: torch.nn.Module | None = None,
    factors: tuple[int, ...] = FACTORS,
    options: dict[str, Any] | None = None,
    resume: bool = False,
    database: str = "",
    **more: Any,
) -> Any:
    space = SearchSpace(model or five_blocks(), X, factors=factors, options=options)
    study = SearchStudy(folder, resume, database)
    return search_factors(space, FunctionTuner(given or Paper()), tolerance=0.51, study=study, verify=False, **more)


def test_two_processes_at_once_find_what_one_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    command = [sys.executable, "-m", "splitfx", *SEARCH, str(together)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    told = [one.communicate(timeout=200) for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*SEARCH, str(alone)]) == 0
    torch.set_num_threads(threads)
    capsys.readouterr()
    tables = [out.partition("saved to")[0] for out, _ in told]
    assert tables[0] == tables[1]
    for name in ("result.json", "plan.toml", "trend.txt"):
        assert (together / name).read_text() == (alone / name).read_text()
    mine, theirs = (load_file(place / "split" / "weights.safetensors") for place in (together, alone))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    # Nothing is tried twice: each trial is begun once over both, and is one line of the study.
    begun = [line for _, errors in told for line in errors.splitlines() if line.endswith("training")]
    assert len(begun) == len(set(begun)) >= 4
    lines = [json.loads(line) for line in (together / JOURNAL).read_text().splitlines()]
    keys = [line["user_attrs"]["key"] for line in lines if "key" in line.get("user_attrs", {})]
    assert len(keys) == len(set(keys)) == len(begun) + 1
    # Nothing is half-written.
    assert not list(together.glob("trials/*/run"))
    assert not [one for one in together.rglob(".*") if one.name != ".gitignore"]
    for key in keys:
        place = together / "trials" / key / "split"
        assert splitfx.load(place)(torch.zeros(2, 1, 12, 12)).shape == (2, 10) if place.exists() else key == "original"


def test_a_study_in_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    found = paper(tmp_path / "run", database=url, max_trials=6)
    assert found.selected == (8, 1)
    assert not (tmp_path / "run" / JOURNAL).exists()
    rest = Paper()
    done = paper(tmp_path / "run", database=url, resume=True, given=rest)
    assert done.selected[:4] == (8, 4, 2, 2)
    assert len(rest.calls) == 16 - 7
    told = rf"study in {url} was made for something else: "
    with pytest.raises(TrainingError, match=told + r"model: 0.bias is .8. there, .12. here; choose another database"):
        paper(tmp_path / "run", database=url, resume=True, model=five_blocks(12))
    with pytest.raises(TrainingError, match=told + "options: fusion is None there, keep here"):
        paper(tmp_path / "run", database=url, resume=True, options={"fusion": "keep"})
    with pytest.raises(TrainingError, match=told + r"factors is .2, 4, 6, 8. there, .2, 4. here"):
        paper(tmp_path / "run", database=url, resume=True, factors=(2, 4))
    with pytest.raises(TrainingError, match=told + "method is greedy there, pareto here"):
        search_front(
            SearchSpace(five_blocks(), X), FunctionTuner(Paper()), max_trials=1,
            study=SearchStudy(tmp_path / "run", resume=True, database=url),
        )  # fmt: skip
    with pytest.raises(TrainingError, match="split is missing, though the study in .* give the folder"):
        paper(tmp_path / "other", database=url, resume=True)
    with pytest.raises(PlanError, match="needs a folder: it holds the weights"):
        paper(None, database=url)


def test_a_database_that_cannot_be_opened_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the study in nosuch://host/db cannot be opened") as caught:
        paper(tmp_path / "run", database="nosuch://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_search_is_not_run_by_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="start it several times on one folder"):
        paper(tmp_path / "run")


@pytest.mark.timeout(120)
def test_what_a_writer_of_the_study_was_cut_off_in_is_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a line at the end, and a lock of Optuna's own that nobody holds any more, in a folder that is relative."""
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    paper(folder, max_trials=6)
    journal = folder / JOURNAL
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    (folder / f"{JOURNAL}.lock").symlink_to(journal)  # as JournalFileSymlinkLock would leave it
    rest = Paper()
    assert paper(folder, resume=True, given=rest).selected[:4] == (8, 4, 2, 2)
    assert len(rest.calls) == 16 - 7
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    again = Paper()
    paper(folder, resume=True, given=again)
    assert not again.calls
