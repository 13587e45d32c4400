"""Runs that are killed with SIGKILL, or trained by two processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import worker

WORKER = [sys.executable, "-m", "tests.train.worker"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, out: Path, what: str = "finetune") -> None:
    """A whole run, or what is left of one, in this process: another start of Python and torch takes longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        {"finetune": worker.finetuned, "search": worker.searched}[what](str(folder), str(out))
    finally:
        torch.set_num_threads(threads)


def killed(folder: Path, out: Path, lines: int, seconds: float, what: str = "finetune") -> None:
    """Start a run and kill it some time after so many lines: the first when it starts, then one for each epoch."""
    command = [*WORKER, what, str(folder), str(out)]
    with subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in zip(range(lines), process.stdout, strict=False):
            pass
        time.sleep(seconds)
        process.kill()


def check(folder: Path, out: Path, expected: dict[str, torch.Tensor]) -> None:
    run(folder, out)
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    left = [p.name for p in folder.iterdir() if p.name != "tensorboard"]
    assert sorted(left) == ["checkpoint.pt", "metrics.csv"]
    assert (folder / "metrics.csv").read_text().count("\n") == 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a run that nothing ends early; its history lies beside them."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "run", folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, torch.Tensor]:
    return load_file(whole)


def test_killed_once(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    killed(folder, out, 2, 0.05)
    assert (folder / "checkpoint.pt").exists()
    assert not out.exists()
    check(folder, out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(tmp_path: Path, expected: dict[str, torch.Tensor], seed: int) -> None:
    folder, out, draw = tmp_path / "run", tmp_path / "weights.safetensors", random.Random(seed)
    for _ in range(3):
        killed(folder, out, draw.choice((1, 1, 2)), draw.random() * 0.6)
    check(folder, out, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_is_killed_at_random_moments(tmp_path: Path, searched: tuple[Path, str], seed: int) -> None:
    """Goes on to the same plan and the same weights."""
    folder, out, draw = tmp_path / "run", tmp_path / "weights.safetensors", random.Random(seed)
    for _ in range(3):
        killed(folder, out, draw.randint(1, 5), draw.random() * 1.5, "search")
    run(folder, out, "search")
    weights, told = searched
    expected, found = load_file(weights), load_file(out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert out.with_suffix(".json").read_text() == told
    assert not list(folder.glob("trials/*/run"))
    assert not [p for p in folder.rglob(".*") if p.is_dir()]  # nothing half-written


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("searched")
    run(folder / "run", folder / "weights.safetensors", "search")
    return folder / "weights.safetensors", (folder / "weights.json").read_text()


@pytest.mark.slow
def test_two_processes_run_the_command(tmp_path: Path) -> None:
    """One of them tells and saves."""
    import splitfx
    from splitfx.train.data import load_data
    from tests.train.networks import of_digits, split_network

    split, out = splitfx.save(split_network(of_digits()), tmp_path / "split"), tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["finetune", str(split), "--data", "digits", "--out", str(out), "--set", "epochs=1", "--json"]
    command = [*launch, "-m", "splitfx", *words]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["history"]["epochs"][0]["samples"] == len(load_data("digits").train)  # type: ignore[arg-type]
    assert done.stderr.count("splitfx: epoch 1/1") == 1
    assert sorted(p.name for p in out.iterdir() if p.name != "tensorboard") == ["checkpoint.pt", "metrics.csv", "split"]


def test_two_processes_train_on_one_batch_together(tmp_path: Path, whole: Path) -> None:
    """Each sample once an epoch over both, one writer, and an accuracy as that of one process."""
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.train.worker", "finetune", str(folder), str(out)]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = [list(map(int, out.with_suffix(f".drawn{r}").read_text().split())) for r in (0, 1)]
    first = 2  # both look at the first two samples
    times = [0] * 240
    for mine in drawn:
        for index in mine[first:]:
            times[index] += 1
    assert times == [4] * 240
    history = json.loads(out.with_suffix(".json").read_text())
    assert [one["samples"] for one in history["epochs"]] == [240] * 4
    assert (folder / "metrics.csv").read_text().count("\n") == 6
    other = json.loads(whole.with_suffix(".json").read_text())
    assert abs(history["accuracy"] - other["accuracy"]) <= 12  # 60 samples: three standard deviations at 90 %
