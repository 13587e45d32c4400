"""Ranks as threads of one process, joined by queues: all of a rank but the transport, at no price."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx

from splitfx.parallel import ParallelError, Shard
from splitfx.parallel.link import Link
from splitfx.parallel.shard import model

PATIENCE = 20.0


class Wires:
    """What connects ``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.place = size, threading.local()
        self.lines = {(a, b): queue.Queue[Any]() for a in range(size) for b in range(size)}


class ThreadLink(Link):
    """A link whose transport is a queue for each pair of ranks."""

    def __init__(self, wires: Wires) -> None:
        self.wires, self.rank, self.size = wires, wires.place.rank, wires.size
        self.device, self.timeout, self.broken, self.sent_bytes = torch.device("cpu"), PATIENCE, "", 0

    def agree(self, held: str) -> None:
        own = torch.tensor(list(held.encode()), dtype=torch.uint8)
        others = [r for r in range(self.size) if r != self.rank]
        came = self.swap([(r, own) for r in others], [(r, (tuple(own.shape), torch.uint8)) for r in others])
        self.sent_bytes = 0
        if not all(torch.equal(one, own) for one in came):
            raise ParallelError("ranks hold different models")

    def _carry(self, sent: list[tuple[int, torch.Tensor]], wanted: list[tuple[int, torch.Tensor]]) -> None:
        for peer, tensor in sent:
            self.wires.lines[self.rank, peer].put(tensor.detach().clone())
        for peer, into in wanted:
            try:
                came = self.wires.lines[peer, self.rank].get(timeout=PATIENCE)
            except queue.Empty:
                raise ParallelError(f"rank {peer} sent nothing to rank {self.rank}") from None
            assert came.shape == into.shape, f"rank {peer} sends {came.shape}, rank {self.rank} wants {into.shape}"
            assert came.dtype == into.dtype
            into.copy_(came)

    def close(self) -> None:
        pass


def on_ranks(size: int, job: Callable[[int], Any]) -> list[Any]:
    """What ``job(rank)`` returns on each of ``size`` ranks. Raises the first error of any."""
    wires, found, errors = Wires(size), dict[int, Any](), list[BaseException]()

    def run(rank: int) -> None:
        wires.place.rank = rank
        try:
            found[rank] = job(rank)
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "Link", lambda device, timeout: ThreadLink(wires))
        threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(size)]


@contextmanager
def shard(graph: fx.GraphModule, **options: Any) -> Iterator[Shard]:
    """A rank's share of a copy of its own: ranks of one process would add up gradients in the same parameters."""
    with Shard(copy.deepcopy(graph), **options) as made:
        yield made
