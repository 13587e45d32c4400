"""`Shard`: a model run across the ranks of ``torch.distributed``, the image divided among them, forward and backward.

Each rank computes its rows of every map. What layers read beyond them comes from its neighbours, or is computed again
where that costs less than a message; reductions (norms, pools, gates) are merged in the order of the ranks; what reads
whole maps (attention) gets them whole. What lies outside of the stages (a classifier behind a global pool) runs on
every rank alike. The result is that of one process, exactly: the same numbers up to the order of summing.

Refuses (`UnsupportedError`): norms and dropout in train mode, random operators, models without a layer that works on
rows. `ParallelError`: ranks with different models or inputs, a rank that died or does not answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from splitfx.analysis.fingerprint import fingerprint
from splitfx.analysis.oracle import acts_as_in_eval
from splitfx.errors import UnsupportedError
from splitfx.ground.exclusive import autocasts
from splitfx.ground.notebook import Shown
from splitfx.ground.table import size
from splitfx.ir.graph import TensorSpec, info, layer
from splitfx.parallel.link import Link, ParallelError
from splitfx.parallel.shard.network import ROW_DIM, Network
from splitfx.parallel.shard.shares import Division
from splitfx.parallel.shard.stage import Gather, Rows
from splitfx.parallel.shard.tape import Entered, Job, Left

Given = Literal["whole", "rows"]


@dataclass(frozen=True)
class ShardPlan(Shown):
    """What one rank does with inputs of some size. ``inputs``, ``outputs``: the rows that are its own of each, None for
    what every rank has whole. ``sent_bytes`` in a call, ``backward_bytes`` in its backward pass; ``peak_bytes`` of
    live tensors in the stages, inputs counted. ``awaited``: layers behind which ranks wait for each other's rows."""

    inputs: tuple[Rows | None, ...]
    outputs: tuple[Rows | None, ...]
    sent_bytes: int
    backward_bytes: int
    peak_bytes: int
    awaited: tuple[str, ...]

    def __str__(self) -> str:
        waits = ", ".join(self.awaited) or "nowhere"
        return f"{size(self.sent_bytes)} sent per call, peak {size(self.peak_bytes)}; rows are sent behind {waits}"


class Shard:
    """This process's share of ``graph``, which `splitfx.trace` or `splitfx.transform` made, in eval mode.

    ``gather``: who gets outputs that are maps: "all" ranks, the "first" (the others get None), or each its own rows
    ("none"; `rows` says which). ``given``: every rank calls it with the "whole" inputs, or only with "rows" of its own
    of every map among them (dim 2; as many as it likes, rank 0's first), so that no rank ever holds a whole image.
    ``weights``: shares of the ranks, equal without. ``timeout``: seconds to wait for another rank. ``device``: "cpu",
    or "cuda" for the GPU of this process's LOCAL_RANK.

    Stages that `Tile` made run their schedule on each rank's rows, other stages one that is found here. Parameters are
    those of ``graph`` where it lies on the device already, else copies (`parameters`). Gradients: call ``backward`` on
    every rank, each on the loss of what it got: of whole outputs the same loss, of rows its part of the sum. Then
    `reduce_gradients` once before the optimizer's step. ``checkpoint`` of `Tile` has no effect here.

    ``rows``: of the last call, which rows each output holds, None for whole ones. Close it, or use it as a context
    manager. One call at a time.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        *,
        gather: Gather = "all",
        given: Given = "whole",
        weights: Sequence[float] = (),
        timeout: float = 60.0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        for name, one, allowed in (("gather", gather, ("all", "first", "none")), ("given", given, ("whole", "rows"))):
            if one not in allowed:
                raise UnsupportedError(f"{name} is {' or '.join(map(repr, allowed))}, not {one!r}")
        info(graph)
        if not acts_as_in_eval(graph):
            raise UnsupportedError(
                "a norm or dropout is in train mode: call graph.eval() first (frozen norms train well)"
            )
        self.link = Link(device, timeout)
        try:
            self.rank, self.size = self.link.rank, self.link.size
            self.division = Division.of(self.size, weights)
            self.link.agree(fingerprint(graph, f"{gather} {given} {tuple(weights)}"))
            self.gather, self.job = gather, Job(self.link)
            self.network = Network(graph, self.job, self.division, gather, given == "rows")
        except Exception:
            self.link.close()
            raise
        self.rows: tuple[Rows | None, ...] = ()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self.link.close()

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent since it was made, except to agree on the model."""
        return self.link.sent_bytes

    def parameters(self) -> list[nn.Parameter]:
        """Of the model, in its order: where they are on the device, those of ``graph``."""
        return self.network.parameters

    # ------------------------------------------------------------ running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output. Raises `ParallelError`, and `UnsupportedError` where inputs do not fit."""
        given = self.network.values(args, kwargs)
        values = [v.to(self.link.device) if isinstance(v, torch.Tensor) else v for v in given]
        wanting = [*self.parameters(), *(v for v in values if isinstance(v, torch.Tensor))]
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in wanting)
        if gradients and self.gather == "first" and self.size > 1:
            raise UnsupportedError("with gather='first' other ranks have no loss: use 'all' or 'none', or no_grad()")
        self._agree(values, gradients)
        try:
            if gradients:
                self.job.token = torch.zeros(1, device=self.link.device, requires_grad=True)
                values = [self._entered(i, v) for i, v in enumerate(values)]
            results = list(self.network.graph(*values))
            self.rows = self.network.rows()
            if gradients:
                results = self._left(results)
        finally:
            self.job.token = None
        return self.network.returned(results)

    def _agree(self, values: Sequence[Any], gradients: bool) -> None:
        """Every rank is called alike; who gives which rows is known from now on."""
        there = {i: int(values[i].shape[ROW_DIM]) for i in self.network.divided}
        told = [
            (
                tuple(v.shape[:ROW_DIM] + v.shape[ROW_DIM + 1 :]) if i in there else tuple(v.shape),
                v.dtype,
                v.requires_grad,
            )
            if isinstance(v, torch.Tensor)
            else v
            for i, v in enumerate(values)
        ]
        trains = [p.requires_grad for p in self.parameters()] if gradients else []
        said = hashlib.sha256(repr((told, gradients, trains, autocasts())).encode()).digest()
        own = torch.tensor([int.from_bytes(said[:7]), *there.values()], dtype=torch.int64, device=self.link.device)
        peers = self.job.peers
        came = self.link.swap([(r, own) for r in peers], [(r, ((len(own),), own.dtype)) for r in peers])
        heard = [one.tolist() for one in (*came[: self.rank], own, *came[self.rank :])]
        for rank, one in enumerate(heard):
            if one[0] != heard[0][0]:
                self.link.broken = f"rank {rank} was called with other inputs than rank 0"
                raise ParallelError(
                    f"{self.link.broken}: sizes, types and whether gradients are wanted have to be the same on all"
                )
        self.job.rows = {i: [one[1 + place] for one in heard] for place, i in enumerate(there)}
        if any(sum(rows) == 0 for rows in self.job.rows.values()):
            raise UnsupportedError("given='rows': no rank was given any row of an input")

    def _entered(self, number: int, value: Any) -> Any:
        if number in self.network.divided or not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        self.job.token, value = Entered.apply(self.link, self.job.token, value)  # type: ignore[misc]
        return value

    def _left(self, results: list[Any]) -> list[Any]:
        floats = [i for i, y in enumerate(results) if isinstance(y, torch.Tensor) and y.is_floating_point()]
        if not floats:
            return results
        apart = self.network.apart()
        own = [self.rank == 0 or apart[i] for i in floats]
        left = Left.apply(tuple(own), self.job.token, *(results[i] for i in floats))
        for place, y in zip(floats, left, strict=True):  # type: ignore[arg-type]
            results[place] = y
        return results

    def reduce_gradients(self) -> None:
        """Add up the gradients of the parameters over the ranks: call it on all of them, once, after ``backward``.
        Raises `ParallelError`."""
        trained = [p for p in self.parameters() if p.requires_grad]
        there = torch.tensor([float(p.grad is not None) for p in trained], device=self.link.device)
        there = self.link.summed(there).tolist() if trained else []
        for dtype in dict.fromkeys(p.dtype for p in trained):
            some = [p for p, n in zip(trained, there, strict=True) if p.dtype == dtype and n]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in some]
            if not grads:
                continue
            sums = self.link.summed(torch.cat([g.reshape(-1) for g in grads]))
            for p, part in zip(some, sums.split([p.numel() for p in some]), strict=True):
                p.grad = part.view_as(p).clone()

    # ------------------------------------------------------------ predictions

    def plan(self, *args: Any, gradients: bool = False, **kwargs: Any) -> ShardPlan:
        """What this rank does with whole inputs like these, of which only sizes and types are read (tensors on the
        "meta" device do), divided by ``weights``; nothing is computed. ``gradients``: parameters and inputs want some.
        """
        values = self.network.values(args, kwargs)
        specs = [
            TensorSpec(tuple(v.shape), v.dtype, str(self.link.device)) if isinstance(v, torch.Tensor) else v
            for v in values
        ]
        held = {i: self.network.counts(self.division, specs[i].shape[ROW_DIM]) for i in self.network.divided}
        wanting = {i for i, v in enumerate(values) if gradients and isinstance(v, torch.Tensor) and v.requires_grad}
        there, peak, waits = 8 * (1 + len(held)) * len(self.job.peers), 0, list[str]()
        back = sum(self._summed_bytes(values[i].numel(), values[i].itemsize) for i in wanting - set(held))
        for stage, share in self.network.planned(specs, wanting if gradients else None):
            sent, returned = stage.predicted(share)
            there, back, peak = there + sent, back + returned, max(peak, share.peak)
            waits += [layer(n) for n in share.stage.graph.graph.nodes if n in share.shares.awaited]
        inputs = tuple(self._input_rows(held[i]) if i in held else None for i in range(len(values)))
        return ShardPlan(inputs, self.network.rows(), there, back, peak, tuple(waits))

    def gradient_bytes(self) -> int:
        """What `reduce_gradients` sends from this rank, where every parameter has a gradient."""
        trained = [p for p in self.parameters() if p.requires_grad]
        counts: dict[torch.dtype, int] = {}
        for p in trained:
            counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
        flat = sum(self._summed_bytes(n, dtype.itemsize) for dtype, n in counts.items())
        return flat + self._summed_bytes(len(trained), torch.get_default_dtype().itemsize)

    def _summed_bytes(self, count: int, item: int) -> int:
        parts = [count * (r + 1) // self.size - count * r // self.size for r in range(self.size)]
        return item * (count - parts[self.rank] + (self.size - 1) * parts[self.rank])

    def _input_rows(self, counts: list[int]) -> Rows:
        first = sum(counts[: self.rank])
        return Rows(ROW_DIM, first, first + counts[self.rank], sum(counts))
