"""Compile time of two checkouts: ``python -m benchmarks.versus OTHER [model ...] [--rounds 5] [--calls]``.

OTHER is the folder of another checkout, such as ``git worktree add --detach OTHER COMMIT`` makes; it is compared with
the one where the command runs. Each figure is of a process of its own, and the two checkouts take turns. It is seconds
of the processor or, with ``--calls``, the number of function calls, which no neighbour on a busy machine disturbs and
one round is enough for. Printed are, for each model, the medians of trace, of Group and of Tile (with their oracles),
and how many times the other's figure this one's is.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "densenet201", "efficientnet_b7")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.versus", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, help="the folder of another checkout")
    parser.add_argument("models", nargs="*", default=MODELS, help="torchvision models, at 224 rows")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each checkout and model")
    parser.add_argument("--calls", action="store_true", help="count function calls instead of seconds")
    options = parser.parse_args()
    here, other = Path(__file__).resolve().parents[1], options.other.resolve()
    rounds, unit = (1, "M calls") if options.calls else (options.rounds, "s")
    for model in options.models:
        runs: dict[Path, list[dict[str, float]]] = {other: [], here: []}
        for turn in range(rounds):
            for checkout in (other, here) if turn % 2 else (here, other):
                runs[checkout].append(in_its_own_process(checkout, model, options.calls))
        for step in runs[here][0]:
            was, now = (statistics.median(run[step] for run in runs[checkout]) for checkout in (other, here))
            print(f"{model:>16} {step:>6} {was:8.2f} -> {now:8.2f} {unit}  x{now / was:.3f}", flush=True)


def in_its_own_process(checkout: Path, model: str, calls: bool) -> dict[str, float]:
    settings = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(Path(__file__).resolve()), model, *(["calls"] if calls else [])]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(model: str, figure: Callable[[Callable[[], Any]], tuple[Any, float]]) -> dict[str, float]:
    """The figure of each step in this process, after a small model has loaded what any first one loads."""
    import torch
    import torchvision

    import splitfx
    from splitfx.passes import Group, Tile

    torch.set_num_threads(1)
    image = torch.zeros(1, 3, 224, 224)
    found: dict[str, float] = {}
    for name in ("resnet18", model):
        network = torchvision.models.get_model(name, weights=None).eval()
        graph, found["trace"] = figure(lambda network=network: splitfx.trace(network, image))
        for step in (Group(factors=(2,) * 5, lowering="branches"), Tile()):
            _, found[step.name] = figure(lambda graph=graph, step=step: splitfx.transform(graph, step))
    return {**found, "all": sum(found.values())}


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def calls(work: Callable[[], Any]) -> tuple[Any, float]:
    profile = cProfile.Profile()
    result = profile.runcall(work)
    return result, pstats.Stats(profile).total_calls / 1e6  # type: ignore[attr-defined]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.path[0] == str(Path(__file__).resolve().parent):  # started by `in_its_own_process`, as a file
        print(json.dumps(measured(sys.argv[1], calls if sys.argv[2:] else seconds)))
    else:
        main()
