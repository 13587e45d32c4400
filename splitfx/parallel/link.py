"""`Link`: tensors from rank to rank of a ``torch.distributed`` job, never waiting longer than the timeout.

Does: joins the job that ``torchrun`` started (or one that is there already), in a process group of its own; checks
that all ranks hold the same model; sends and receives tensors, with their sizes where the receiver cannot know them.
Raises `ParallelError` naming the rank that is gone, does not answer or differs, and for every call after that;
`UnsupportedError` where there is no torchrun or no GPU. Nothing is pickled.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from splitfx.errors import SplitfxError, UnsupportedError
from splitfx.text import first_line

START = 300.0  # seconds in which all ranks have to be there
_HEADER = 10  # numbers that announce a tensor: its type, how many sizes, the sizes
_TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
)

Spec = tuple[tuple[int, ...], torch.dtype]  # sizes and type of a tensor
Sent = list[tuple[int, Any, torch.Tensor]]  # receiver, what to wait for, what has to live until then


class ParallelError(SplitfxError):
    """A rank is gone, does not answer, or holds another model."""


class Link:
    """This process's place among ``size`` ranks. ``device``: "cpu" (gloo), or "cuda" (nccl), the GPU of LOCAL_RANK."""

    def __init__(self, device: str, timeout: float) -> None:
        if not dist.is_available():
            raise UnsupportedError("this torch is built without torch.distributed")
        if not dist.is_initialized() and "RANK" not in os.environ:
            raise UnsupportedError("this process is no rank of a job: start it with torchrun --nproc-per-node N")
        if timeout <= 0:
            raise UnsupportedError(f"a timeout is more than 0 seconds, not {timeout:g}")
        self.device = _place(device)
        self.timeout, self.broken, self.sent_bytes = timeout, "", 0
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        if backend == "nccl":
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # waiting raises instead of ending the process
        self.began = not dist.is_initialized()
        try:
            if self.began:
                dist.init_process_group(backend, timeout=datetime.timedelta(seconds=START))
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self.group: Any = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise ParallelError(f"the ranks did not come together within {START:g} s: {first_line(error)}") from error

    def agree(self, held: str) -> None:
        """Check that every rank holds the same, by a `digest` of it. Ranks may come up to `START` seconds late."""
        own = torch.frombuffer(bytearray(held.encode()), dtype=torch.uint8).clone().to(self.device)
        there = [torch.empty_like(own) for _ in range(self.size)]
        with self.guarded("another rank"):
            waiting: Any = (
                dist.group.WORLD if self.began else self.group
            )  # the one with the long timeout, where there is one
            dist.all_gather(there, own, group=waiting)
        other = next((r for r, found in enumerate(there) if not torch.equal(found, there[0])), None)
        if other is not None:
            raise ParallelError(
                f"rank {other} holds another model than rank 0: let all ranks load one folder, or transform by one plan"
            )

    def send(self, peer: int, tensors: Sequence[torch.Tensor], announce: bool = False) -> Sent:
        """Start sending; hand what is returned to `wait`. ``announce``: types and sizes go ahead."""
        held = [t.contiguous() for t in tensors]
        if announce:
            held.insert(0, torch.tensor([_header(t) for t in held], dtype=torch.int64).to(self.device))
        with self.guarded(f"rank {peer}"):
            return [(peer, dist.isend(t, group=self.group, group_dst=peer), t) for t in held]

    def wait(self, sent: Sent) -> None:
        for peer, work, _ in sent:
            with self.guarded(f"rank {peer}"):
                work.wait()

    def receive(self, peer: int, like: torch.Tensor) -> torch.Tensor:
        """One tensor of known type and sizes, written into ``like``."""
        with self.guarded(f"rank {peer}"):
            dist.irecv(like, group=self.group, group_src=peer).wait()  # type: ignore[union-attr]
        return like

    def receive_announced(self, peer: int, count: int) -> list[torch.Tensor]:
        headers = self.receive(peer, torch.empty((count, _HEADER), dtype=torch.int64, device=self.device)).tolist()
        wanted = [torch.empty(h[2 : 2 + h[1]], dtype=_TYPES[h[0]], device=self.device) for h in headers]
        return [self.receive(peer, one) for one in wanted]

    def swap(self, sent: Sequence[tuple[int, torch.Tensor]], wanted: Sequence[tuple[int, Spec]]) -> list[torch.Tensor]:
        """Send tensors to other ranks while as many as are wanted come from them, all at once.

        A receiver wants what is sent to it, in that order. One message for each rank and type; `sent_bytes` counts.
        """
        flat = {key: torch.cat([t.reshape(-1) for t in ts]) for key, ts in _by_peer((p, t.dtype, t) for p, t in sent)}
        came = {
            key: torch.empty(sum(map(prod, shapes)), dtype=key[1], device=self.device)
            for key, shapes in _by_peer((p, dtype, shape) for p, (shape, dtype) in wanted)
        }
        self.sent_bytes += sum(t.nbytes for t in flat.values())
        self._carry(
            [(p, t) for (p, _), t in flat.items() if t.numel()], [(p, t) for (p, _), t in came.items() if t.numel()]
        )
        places = dict.fromkeys(came, 0)
        found = []
        for peer, (shape, dtype) in wanted:
            first = places[peer, dtype]
            places[peer, dtype] = first + prod(shape)
            found.append(came[peer, dtype][first : first + prod(shape)].view(shape))
        return found

    def _carry(self, sent: list[tuple[int, torch.Tensor]], wanted: list[tuple[int, torch.Tensor]]) -> None:
        """Send vectors to other ranks while others are filled with what comes from them."""
        peers = [peer for peer, _ in (*sent, *wanted)]
        calls = [
            dist.P2POp(way, t, group=self.group, group_peer=peer)
            for way, some in ((dist.isend, sent), (dist.irecv, wanted))
            for peer, t in some
        ]
        if not calls:
            return
        with self.guarded("another rank"):
            under_way = dist.batch_isend_irecv(calls)
        alone = len(under_way) == len(calls)  # else they are waited for together
        for peer, one in zip(peers, under_way, strict=False):
            with self.guarded(f"rank {peer}" if alone else "another rank"):
                one.wait()

    def summed(self, flat: torch.Tensor) -> torch.Tensor:
        """The sum of a vector over the ranks, added in their order, so it is the same on all: each adds a part."""
        if self.size == 1:
            return flat
        cuts = [flat.numel() * r // self.size for r in range(self.size + 1)]
        parts = [flat[a:b] for a, b in pairwise(cuts)]
        others = [r for r in range(self.size) if r != self.rank]
        own = ((parts[self.rank].numel(),), flat.dtype)
        came = dict(zip(others, self.swap([(r, parts[r]) for r in others], [(r, own) for r in others]), strict=True))
        total = sum((came.get(r, parts[self.rank]) for r in range(1, self.size)), came.get(0, parts[self.rank]))
        specs = [(r, ((parts[r].numel(),), flat.dtype)) for r in others]
        sums = dict(zip(others, self.swap([(r, total) for r in others], specs), strict=True))
        return torch.cat([sums.get(r, total) for r in range(self.size)])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.guarded("another rank"):
            dist.barrier(group=self.group)

    @contextmanager
    def guarded(self, who: str) -> Iterator[None]:
        """What torch raises when ``who`` is gone, as a `ParallelError`; every later use raises it again."""
        if self.broken:
            raise ParallelError(f"this job is over: {self.broken}")
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self.broken = f"{who} died or did not answer within {self.timeout:g} s"
            raise ParallelError(f"{self.broken} ({first_line(error)}); stop the other ranks and start again") from error

    def close(self) -> None:
        """Leave the job; the process group that was there before stays."""
        if not dist.is_initialized():
            return
        if self.began:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self.group)


def _place(device: str) -> torch.device:
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(f"device is 'cpu' or 'cuda', not {device!r}; LOCAL_RANK chooses among GPUs")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError("there is no CUDA device here (torch.cuda.is_available() is False); use device='cpu'")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise UnsupportedError(f"local rank {number} needs a GPU of its own; there are {there}: start fewer processes")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _by_peer(given: Iterable[tuple[int, torch.dtype, Any]]) -> list[tuple[tuple[int, torch.dtype], list[Any]]]:
    """What goes to, or comes from, each rank in each type, in an order on which both sides agree."""
    found: dict[tuple[int, torch.dtype], list[Any]] = {}
    for peer, dtype, one in given:
        found.setdefault((peer, dtype), []).append(one)
    return sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1])))


def _header(tensor: torch.Tensor) -> list[int]:
    if tensor.dtype not in _TYPES or tensor.dim() > _HEADER - 2:
        raise UnsupportedError(f"a tensor of {tensor.dtype} with {tensor.dim()} dimensions cannot cross between ranks")
    sizes = list(tensor.shape)
    return [_TYPES.index(tensor.dtype), len(sizes), *sizes, *[0] * (_HEADER - 2 - len(sizes))]
