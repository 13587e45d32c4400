"""Table 5 of the SplitNet paper: a deep split of WRN-16-8 on two processes against the unsplit network on one.

Batch 100, 32×32 images, one thread per process, random equal groups (the time does not depend on which). Two processes
are started; in every round rank 0 runs the unsplit network alone, the carved one alone and its own share of it alone,
while rank 1 sleeps in a barrier, and then both run their shares (`splitfx.parallel`). Medians of all rounds, ratios
within one run; eager, and through torch.compile where inductor finds a C++ compiler; with the C library's allocator as
it comes (``Ranks(keep_pages=False)``), and told to keep the pages it has, as `Ranks` does by itself (half of what a
narrow network gains is otherwise spent on fresh memory).
What one share alone gains is what two could. ``crossing`` is the exchange of ready logits, timed by itself
after a barrier, as a share of the parallel call; ``off`` how far the result is from the whole carved model's.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import splitfx
from benchmarks.networks import WideResNet
from splitfx.ground.table import number, seconds
from splitfx.parallel import Ranks
from splitfx.passes import SplitNet
from splitfx.report.profile import profile

NAME = "parallel"
LEVELS, BATCH, CLASSES = {"stage[23].*": 2, "fc": 2}, 100, 100
ROUNDS, WARM_UP, PATIENCE = 15, 3, 3600
COLUMNS = (
    ("engine", "engine", str),
    ("allocator", "allocator", str),
    ("who", "network, processes", str),
    ("macs", "MACs", number),
    ("seconds", "median", seconds),
    ("speedup", "faster", lambda v: f"×{v:.2f}" if v else "-"),
    ("bound", "bound", lambda v: f"×{v:.2f}" if v else "-"),
    ("crossing", "crossing", lambda v: "-" if v is None else f"{v:.2%}"),
    ("off", "off", lambda v: "-" if v is None else f"{v:.0e}"),
)
LEFT = (0, 1, 2)


def run(quick: bool) -> list[dict[str, Any]]:
    """Rows of both engines; the work is done by processes of `worker`, started as torchrun starts them."""
    size = {"depth": 10, "width": 2, "batch": 4, "rounds": 3} if quick else {}
    engines = ["eager"] if quick else ["eager", *compiled()]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "depth": 16,
            "width": 8,
            "batch": BATCH,
            "rounds": ROUNDS,
            "engines": engines,
            "folder": folder,
            **size,
        }
        carve(settings)
        found = [
            {**row, "allocator": name}
            for name in ("stock", "page-keeping")[: 1 if quick else 2]
            for row in rows_of(settings | {"keep_pages": name != "stock"}, {})
        ]
    return sorted(found, key=lambda row: engines.index(row["engine"]))


def rows_of(
    settings: dict[str, Any], environment: dict[str, str], module: str = "benchmarks.parallel"
) -> list[dict[str, Any]]:
    """What two processes of a module measure that were started with these variables."""
    started = [start(rank, port, settings, environment, module) for port in [free_port()] for rank in (0, 1)]
    try:
        codes = [one.wait(PATIENCE) for one in started]
    finally:
        for one in started:
            one.kill()
    if any(codes):
        raise RuntimeError(f"the ranks ended with {codes}; what they wrote is above")
    return json.loads((Path(settings["folder"]) / "rows.json").read_text())


def compiled() -> list[str]:
    """torch.compile, where inductor can build for a CPU; it says so where it cannot."""
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return ["torch.compile"]
    print("  no C++ compiler is here, so torch.compile is left out", flush=True)
    return []


def carve(settings: dict[str, Any]) -> None:
    """Both networks as saved folders: the unsplit one traced, the other carved, with the same weights."""
    torch.manual_seed(0)
    model = WideResNet(settings["depth"], settings["width"], CLASSES).eval()
    image = torch.zeros(settings["batch"], 3, 32, 32)
    split = SplitNet(levels=LEVELS, boundary="full", source="random", lowering="branches")
    splitfx.save(splitfx.trace(model, image), Path(settings["folder"]) / "dense")
    splitfx.save(splitfx.transform(model, split, image, verify=False), Path(settings["folder"]) / "split")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(
    rank: int, port: int, settings: dict[str, Any], environment: dict[str, str], module: str
) -> subprocess.Popen[bytes]:
    fixed = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, json.dumps(settings)]
    return subprocess.Popen(command, env={**os.environ, **fixed, **environment, **place})


# ---------------------------------------------------------------- one rank


def worker(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    place = Path(settings["folder"])
    dense, split = splitfx.load(place / "dense").eval(), splitfx.load(place / "split").eval()
    image = torch.randn(settings["batch"], 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    for engine in settings["engines"]:
        compile_ = engine == "torch.compile"
        keep = settings["keep_pages"]
        with Ranks(split, stem="duplicate", timeout=PATIENCE, compile=compile_, keep_pages=keep, verify=False) as ranks:
            alone = [torch.compile(one) if compile_ else one for one in (dense, split)]
            found = measured(ranks, alone, image, settings["rounds"])
            rows += table_of(engine, found, ranks, dense, split, image)
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        (place / "rows.json").write_text(json.dumps(rows))


def measured(ranks: Ranks, alone: list[Callable[..., Any]], image: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds on rank 0 of the dense network, the carved one, its share, both ranks, and the exchange alone."""
    times: dict[str, list[float]] = {"dense": [], "split": [], "share": [], "ranks": [], "exchange": []}
    calls: dict[str, Callable[[], Any]] = {
        "dense": lambda: alone[0](image),
        "split": lambda: alone[1](image),
        "share": lambda: ranks.pieces(image),
        "ranks": lambda: ranks(image),
    }
    with torch.inference_mode():
        for turn in range(-WARM_UP, rounds):
            names = list(calls) if turn % 2 == 0 else list(calls)[::-1]
            for name in names:
                ranks.link.barrier()
                if name == "ranks" or ranks.rank == 0:
                    taken = clocked(calls[name])
                    times[name] += [taken] if turn >= 0 else []
            pieces = ranks.pieces(image)
            ranks.link.barrier()
            taken = clocked(lambda: ranks.exchange(pieces))  # noqa: B023
            times["exchange"] += [taken] if turn >= 0 else []
        ranks.link.barrier()
    return {name: statistics.median(one) for name, one in times.items() if one}


def clocked(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def table_of(
    engine: str, found: dict[str, float], ranks: Ranks, dense: Any, split: Any, image: torch.Tensor
) -> list[dict[str, Any]]:
    output = ranks(image)
    if ranks.rank:
        return []
    with torch.inference_mode():
        wanted = split(image)
    off = float((output - wanted).abs().max() / wanted.abs().max())
    most = max(ranks.placement.macs)
    macs = [profile(dense, image).macs, profile(split, image).macs, most, most]
    return [
        {
            "engine": engine,
            "who": who,
            "macs": work,
            "seconds": found[key],
            "speedup": found["dense"] / found[key],
            "bound": macs[0] / work,
            "crossing": found["exchange"] / found[key] if key == "ranks" else None,
            "off": off if key == "ranks" else None,
        }
        for who, key, work in zip(
            ("unsplit, 1", "deep split, 1", "one share, 1", "deep split, 2"),
            ("dense", "split", "share", "ranks"),
            macs,
            strict=True,
        )
    ]


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
