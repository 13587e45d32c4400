"""Which samples a process sees, and when: a function of the seed and the epoch alone.

So a resumed epoch sees what the interrupted one did, and one process or many see the same batches in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from splitfx.errors import TrainingError

Batch = tuple[Any, Any, float, int]  # inputs, targets, share of the batch, samples here


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1


def shares(samples: int, batch_size: int, seed: int, process: Process) -> list[tuple[list[int], float]]:
    """This process's part of each batch of a shuffled epoch, with what it counts beside the other parts.

    Every sample is in exactly one part of one process. A rest too small for all processes to train on (a batch norm
    needs two values) joins the batch before it.
    """
    if samples < 2 * process.count:
        raise TrainingError(f"{samples} training samples are too few for {process.count} processes: each needs 2")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(batch_size, 2 * process.count)
    batches = [order[i : i + size] for i in range(0, samples, size)]
    if len(batches[-1]) < 2 * process.count:
        rest = batches.pop()
        batches[-1] += rest
    parts = [batch[process.rank :: process.count] for batch in batches]
    return [(part, len(part) * process.count / len(batch)) for part, batch in zip(parts, batches, strict=True)]


def epoch(data: Dataset[Any], batch_size: int, seed: int, process: Process, workers: int) -> Iterator[Batch]:
    """The batches of one epoch."""
    parts = shares(sized(data), batch_size, seed, process)
    for (part, share), batch in zip(parts, _loader(data, [p for p, _ in parts], seed, workers), strict=True):
        yield *_pair(batch), share, len(part)


def once(data: Dataset[Any], batch_size: int, process: Process, workers: int) -> Iterator[Batch]:
    """Every sample of this process's share once, in order."""
    mine = list(range(process.rank, sized(data), process.count))
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    for part, batch in zip(parts, _loader(data, parts, 0, workers), strict=True):
        yield *_pair(batch), 1.0, len(part)


def steps(samples: int, batch_size: int, process: Process) -> int:
    return len(shares(samples, batch_size, 0, process))


def sized(data: Dataset[Any]) -> int:
    """How many samples a data set has. Raises `TrainingError` where it does not say, or has none."""
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise TrainingError(
            f"{type(data).__name__} does not say how many samples it has: give a data set with a length, whose items "
            "are (input, class)"
        ) from None
    return int(count)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Training seeds the random generators; afterwards they are as the user left them."""
    plain, arrays = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def seeded(seed: int, epoch: int, process: Process) -> int:
    """Seed every generator for an epoch; returns the seed that all processes share."""
    common = (seed * 1_000_003 + epoch) % 2**31
    own = (common * 131 + process.rank) % 2**31
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    return common


def _loader(data: Dataset[Any], parts: list[list[int]], seed: int, workers: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)  # the workers' seeds
    try:
        yield from DataLoader(data, batch_sampler=parts, num_workers=workers, generator=generator)
    except TrainingError as error:  # that of a worker carries the worker's traceback, which ends with what was said
        raise TrainingError(str(error).rpartition("splitfx.errors.TrainingError: ")[2]) from error


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise TrainingError("an item of the data set must be (input, class)")
    return batch[0], batch[1]


def to(value: Any, device: torch.device) -> Any:
    """Every tensor in a value on a device."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), value)
