"""One rank of a real job, started as torchrun starts it: ``python -m tests.parallel.worker JOB FOLDER``. What the job
finds is written as JSON to FOLDER/RANK.json."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import fx

import splitfx
from splitfx.parallel import ParallelError, Shard
from tests.parallel.checks import checked
from tests.parallel.networks import Decoder, UNet

TIMEOUT = 3.0
DOUBLE = torch.float64


def traced(model: torch.nn.Module, *sizes: int) -> fx.GraphModule:
    return splitfx.trace(model.to(DOUBLE).eval(), torch.zeros(sizes, dtype=DOUBLE))


def image(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def exact(rank: int) -> Any:
    """Small networks, forward and backward; then the last rank dies."""
    found: dict[str, Any] = {}
    for name, model, x in (
        ("U-Net", UNet(), image(2, 3, 37, 29)),
        ("decoder", Decoder(), image(1, 4, 9, 7)),
    ):
        graph = traced(model, *x.shape)
        with Shard(graph, timeout=60) as shard:
            found[name] = checked(shard, graph, [x])
    x = image(1, 3, 37, 29)
    shard = Shard(traced(UNet(), *x.shape), timeout=TIMEOUT)
    with torch.no_grad():
        shard(x)
        if rank == shard.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        found["death"] = death(shard, x)
    return found


def death(shard: Shard, x: torch.Tensor) -> Any:
    """What is said when another rank is gone, and after how many seconds."""
    said, began, seconds = [], time.monotonic(), 0.0
    for _ in range(2):
        try:
            shard(x)
            said.append("no error")
        except ParallelError as error:
            said.append(str(error))
        seconds = seconds or time.monotonic() - began
    return {"said": said, "seconds": seconds}


def large(rank: int) -> Any:
    """Networks of torchvision and a volume, at odd sizes."""
    import torchvision

    found: dict[str, Any] = {}
    for name, model, x in (
        ("efficientnet_b0", torchvision.models.efficientnet_b0(weights=None), image(1, 3, 97, 75)),
        ("swin_t", torchvision.models.swin_t(weights=None), image(1, 3, 97, 75)),
        ("volume", UNet(3, 4, 3), image(1, 3, 19, 21, 18)),
    ):
        graph = traced(model, *x.shape)
        with Shard(graph, timeout=200) as shard:
            found[name] = checked(shard, graph, [x])
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same model on all ranks
    job, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    found = {"exact": exact, "large": large}[job](rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the group would wait for ranks that are dead


if __name__ == "__main__":
    main()
