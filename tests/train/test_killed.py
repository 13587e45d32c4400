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

WORKER = [sys.executable, "-m", "tests.train.worker"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder: Path, out: Path) -> None:
    subprocess.run([*WORKER, str(folder), str(out)], check=True, env=ALONE, capture_output=True, timeout=200)


def killed(folder: Path, out: Path, epochs: int, seconds: float) -> None:
    """Start a run and kill it some time after it has finished so many epochs."""
    with subprocess.Popen([*WORKER, str(folder), str(out)], env=ALONE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[-1] == ("start" if epochs == 0 else str(epochs)):
                break
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
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "run", folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def test_killed_once(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    killed(folder, out, 1, 0.05)
    assert (folder / "checkpoint.pt").exists()
    assert not out.exists()
    check(folder, out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(tmp_path: Path, expected: dict[str, torch.Tensor], seed: int) -> None:
    folder, out, draw = tmp_path / "run", tmp_path / "weights.safetensors", random.Random(seed)
    for _ in range(3):
        killed(folder, out, draw.choice((0, 0, 1)), draw.random() * 0.6)
    check(folder, out, expected)


def test_two_processes_train_on_one_batch_together(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Each sample once an epoch over both, one writer, and an accuracy as that of one process."""
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "tests.train.worker", str(folder), str(out)]
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
    alone = tmp_path / "alone.safetensors"
    run(tmp_path / "alone", alone)
    other = json.loads(alone.with_suffix(".json").read_text())
    assert abs(history["accuracy"] - other["accuracy"]) <= 12  # 60 samples: three standard deviations at 90 %
