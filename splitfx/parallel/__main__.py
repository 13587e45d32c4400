"""``torchrun --nproc-per-node N -m splitfx.parallel FOLDER``: run a saved model on N processes and measure it.

Loads what `splitfx.save` wrote, runs random inputs in the traced sizes (or of ``--batch`` images) on all ranks, holds
the result to the whole model's on rank 0, and prints who runs what and the median time of a call beside the whole
model's on one process. The branches of a split are divided among the ranks, with ``--shard`` the image of any model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.errors import SplitfxError
from splitfx.ground.difference import relative_error
from splitfx.ground.table import seconds
from splitfx.ground.timing import synchronizer, took
from splitfx.ir.graph import random_inputs
from splitfx.parallel.link import ParallelError
from splitfx.parallel.ranks import Ranks
from splitfx.parallel.shard import Shard
from splitfx.storage import load

PARITY = 1e-4  # relative to the largest output


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m splitfx.parallel", description=__doc__)
    parser.add_argument("folder", help="what splitfx.save wrote")
    parser.add_argument("--batch", type=int, help="inputs of this many rows instead of the traced number")
    parser.add_argument("--runs", type=int, default=20, help="timed calls (default 20)")
    parser.add_argument("--shard", action="store_true", help="divide the image, not the branches")
    parser.add_argument("--stem", choices=("auto", "duplicate", "own"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another rank (default 60)")
    parser.add_argument("--compile", action="store_true", help="run through torch.compile")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except SplitfxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    split = load(options.folder).eval()
    args, kwargs = random_inputs(split, batch=options.batch)
    with _ranks(split, options) as ranks, torch.inference_mode():
        device = ranks.link.device
        output = ranks(*args, **kwargs)
        together = _median(lambda: ranks(*args, **kwargs), options.runs, ranks.link.barrier, device)
        said = ranks.plan(*args, **kwargs) if isinstance(ranks, Shard) else ranks.placement
        if ranks.rank:
            return 0
        whole = split.to(device)  # the ranks are done with it
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        wanted = whole(*args, **kwargs)
        alone = _median(lambda: whole(*args, **kwargs), options.runs, lambda: None, device)
        off = _off(_tensor(output), _tensor(wanted))
        print(said)
        print(
            f"{ranks.size} ranks {seconds(together)}, the whole model on one process {seconds(alone)}; off by {off:.1e}"
        )
    if not off <= PARITY:  # not a number either
        raise ParallelError(f"the ranks' output is off by {off:.1e} of its largest value; {PARITY:.0e} allowed")
    return 0


def _ranks(split: fx.GraphModule, options: argparse.Namespace) -> Ranks | Shard:
    if options.shard:
        return Shard(split, gather="first", device=options.device, timeout=options.timeout)
    return Ranks(split, stem=options.stem, device=options.device, timeout=options.timeout, compile=options.compile)


def _tensor(output: Any) -> torch.Tensor:
    """The logits, in whatever container the model returns them."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)).cpu()


def _off(output: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error; not a number where the model gives any that is none, which proves nothing."""
    return relative_error(output, wanted) if bool(wanted.isfinite().all()) else float("nan")


def _median(call: Callable[[], Any], runs: int, together: Callable[[], None], device: torch.device) -> float:
    found = []
    for _ in range(max(runs, 1)):
        together()
        found.append(took(call, synchronizer(device)))
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
