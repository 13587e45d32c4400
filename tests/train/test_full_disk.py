"""A disk that is full for real: the operating system refuses to let a file grow, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import worker

resource = pytest.importorskip("resource")

# What a run's `on_epoch` does after its first epoch: from then on no file grows beyond so many bytes.
SCRIPT = """
import resource, signal, sys
import torch
from splitfx.errors import SplitfxError
from tests.train import worker
torch.set_num_threads(1)
what, folder, out, limit = sys.argv[1:]

def fill():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))

kept = worker.finetune
def finetune(*args, **more):
    def after(epoch):
        if epoch.epoch == 1:
            fill()
    return kept(*args, **{**more, "on_epoch": after})
worker.finetune = finetune

def after_a_trial(text, **more):
    if "accuracy" in text:
        fill()
if what == "search":
    worker.print = after_a_trial
try:
    {"finetune": worker.finetuned, "search": worker.searched}[what](folder, out)
except SplitfxError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(f"{type(error).__name__}: {error}")
    sys.exit(7)
"""
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def full(what: str, folder: Path, out: Path, limit: int) -> str:
    """What a run says that meets a full disk."""
    command = [sys.executable, "-c", SCRIPT, what, str(folder), str(out), str(limit)]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, timeout=250)
    assert done.returncode == 7, done.stdout + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def resumed(what: str, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        {"finetune": worker.finetuned, "search": worker.searched}[what](str(folder), str(out))
    finally:
        torch.set_num_threads(threads)
    return load_file(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    return resumed("finetune", folder / "run", folder / "weights.safetensors")


@pytest.mark.parametrize("limit", [pytest.param(4096, marks=pytest.mark.slow), 20_000])
def test_finetune_keeps_the_last_checkpoint_and_goes_on(
    tmp_path: Path, expected: dict[str, torch.Tensor], limit: int
) -> None:
    """The disk is full from epoch 2 on, at the start of a checkpoint or inside it."""
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    told = full("finetune", folder, out, limit)
    assert told.startswith(f"TrainingError: {folder / 'checkpoint.pt'}: the checkpoint of epoch 2 cannot be written (")
    assert told.endswith("the checkpoint of epoch 1 is kept. Make room, then go on with resume=True (--resume)")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 1
    left = [p.name for p in folder.iterdir() if p.name != "tensorboard"]
    assert sorted(left) == ["checkpoint.pt", "metrics.csv"]
    found = resumed("finetune", folder, out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (folder / "metrics.csv").read_text().count("\n") == 6


def test_a_search_goes_on_where_the_disk_was_full(tmp_path: Path) -> None:
    """Full after its first trial; then the same plan, table and weights as without."""
    folder, out = tmp_path / "run", tmp_path / "weights.safetensors"
    told = full("search", folder, out, 4096)
    assert "cannot be written" in told
    assert str(folder / "trials") in told
    found = resumed("search", folder, out)
    expected = resumed("search", tmp_path / "whole", tmp_path / "expected.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert out.with_suffix(".json").read_text() == (tmp_path / "expected.json").read_text()
    assert not list(folder.glob("trials/*/run"))
