"""Shards on real processes: exact over gloo, and a rank that dies is an error on the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import splitfx
from tests.parallel.checks import require
from tests.parallel.networks import UNet
from tests.parallel.worker import TIMEOUT


def ran(size: int, job: str, folder: Path, patience: float = 100.0) -> list[Any]:
    """What each rank found; None of one that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.worker", job, str(folder)],
            env={**os.environ, **fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    try:
        for one in started:
            one.wait(patience)
    finally:
        for one in started:
            one.kill()
    files = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def test_two_processes_and_one_that_dies(tmp_path: Path) -> None:
    first, second = ran(2, "exact", tmp_path)
    assert second is None  # killed, when the networks had been checked
    death = first.pop("death")
    assert set(first) == {"U-Net", "decoder"}
    for found in first.values():
        require(found)
    assert "rank 1 died or did not answer within 3 s" in death["said"][0]
    assert "this job is over: rank 1 died" in death["said"][1]
    assert death["seconds"] < TIMEOUT + 20  # the bound is the timeout; the rest is for a loaded machine


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_large_networks(ranks: int, tmp_path: Path) -> None:
    for one in ran(ranks, "large", tmp_path, 500):
        assert set(one) == {"efficientnet_b0", "swin_t", "volume"}
        for found in one.values():
            require(found)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    graph = splitfx.trace(UNet().eval(), torch.zeros(1, 3, 37, 29))
    splitfx.save(graph, tmp_path / "model")
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "splitfx.parallel",
    ]
    done = subprocess.run(
        [*run, str(tmp_path / "model"), "--shard", "--runs", "2"],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks" in done.stdout
    assert "sent per call" in done.stdout
