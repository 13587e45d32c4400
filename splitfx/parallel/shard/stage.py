"""A stage of the network divided among the ranks: a module of the graph, as `Tiled` is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx

from splitfx.analysis.shapes import shapes
from splitfx.ground.exclusive import Autocast, autocasts, exclusive
from splitfx.ir.graph import Staged, TensorSpec, attribute, module_of
from splitfx.parallel.shard.awaited import COSTS, awaited
from splitfx.parallel.shard.execution import Share, ShareExecution
from splitfx.parallel.shard.schedule import Cross, ShareScheduler
from splitfx.parallel.shard.shares import Division, Shares
from splitfx.parallel.shard.tape import Job
from splitfx.tiling.plan.candidates import strips
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.compiling import compile_stage
from splitfx.tiling.stage.kernel import KEEP_ALL, Kernel, Stage
from splitfx.tiling.stage.roles import Kind

Gather = Literal["all", "first", "none"]
PIECE = 2**21  # bytes of the largest piece of a step, about, where nobody has planned
FEWEST = 4  # pieces of the heaviest map on a rank


@dataclass(frozen=True)
class Rows:
    """Places [start, stop) of ``size`` along a dim, which one rank holds."""

    dim: int
    start: int
    stop: int
    size: int


class Sharded(Staged):
    """Runs this rank's rows of a stage. ``inputs``: of each source the model's input that it is, where ranks hold rows
    of that only. ``direct``: the results that the model returns and nothing else reads, gathered as ``gather`` says;
    all others are whole on all ranks.

    The schedule of a `Tiled` is kept, and its halos are computed, not sent; one without a schedule gets its own.
    """

    op_name = "sharded"
    called: Share  # in the last call

    def __init__(
        self,
        tiled: Tiled,
        job: Job,
        division: Division,
        inputs: Mapping[int, int],
        direct: Collection[int],
        gather: Gather,
    ) -> None:
        super().__init__()
        self.stage = tiled.stage
        self.training = tiled.training
        self.job, self.division, self.inputs, self.direct, self.gather = job, division, inputs, set(direct), gather
        by_hand = tiled.goal is not None or tiled.schedule != Schedule()
        self._schedule = tiled.schedule_for if by_hand else None  # the user's
        self._known: dict[Any, Share] = {}

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor | None]:
        rows = {place: self.job.rows[number] for place, number in self.inputs.items()}
        specs = [TensorSpec(tuple(t.shape), t.dtype, str(t.device)) for t in inputs]
        self.called = share = self.share(specs, rows, self._grads(inputs))
        execution = ShareExecution(share, self.job.token is not None, self.job)
        found = execution.run(inputs)
        return [self._delivered(share, place, y) for place, y in enumerate(found)]

    def _grads(self, inputs: Sequence[torch.Tensor]) -> tuple[bool, ...] | None:
        return None if self.job.token is None else tuple(t.requires_grad for t in inputs)

    # ------------------------------------------------------------ what a rank does at one size

    def share(
        self, specs: Sequence[TensorSpec], rows: Mapping[int, Sequence[int]], grads: tuple[bool, ...] | None
    ) -> Share:
        """What this rank does with inputs of these sizes. ``rows``: of the sources that are given in pieces, how many
        each rank has. ``grads``: which inputs want gradients; None: no tensor does."""
        whole = tuple(self._whole(spec, rows.get(place)) for place, spec in enumerate(specs))
        trains = tuple(p.requires_grad for p in self.stage.parameters()) if grads is not None else ()
        key = (whole, tuple(map(tuple, rows.values())), grads, trains, autocasts())
        if key not in self._known:
            if len(self._known) > 8:
                self._known.pop(next(iter(self._known)))
            with exclusive():
                self._known[key] = self._made(whole, rows, grads, key[-1])
        return self._known[key]

    def _whole(self, spec: TensorSpec, rows: Sequence[int] | None) -> TensorSpec:
        return spec if rows is None else replace(spec, shape=(*spec.shape[:2], sum(rows), *spec.shape[3:]))

    def _made(
        self,
        specs: tuple[TensorSpec, ...],
        rows: Mapping[int, Sequence[int]],
        grads: tuple[bool, ...] | None,
        cast: Autocast,
    ) -> Share:
        values = shapes(self.stage, specs, cast)
        given = {place: Division.given(counts) for place, counts in rows.items()}
        division = next(iter(given.values()), self.division)
        planned, waits = self._planned(specs), frozenset[fx.Node]()
        keeping = planned.keeping if planned is not None else KEEP_ALL
        stage = compile_stage(self.stage, values, keeping, cast)
        if planned is None and division.ranks > 1:
            waits = awaited(stage, division, COSTS[self.job.link.device.type])
            stage = compile_stage(self.stage, values, KEEP_ALL, cast, waits)
        heaviest = max((k.bytes for k in stage.kernels if k.kind is Kind.ROWS), default=0)
        piece = min(PIECE, heaviest // (FEWEST * division.ranks))
        at_once = Schedule() if grads is not None else strips(stage, KEEP_ALL, [piece] * stage.phases)
        pieces = {stage.sources[place]: one for place, one in given.items()}
        kept = [k for place, k in enumerate(stage.exits) if place not in self.direct]
        shares = Shares(stage, division, pieces, kept, waits)
        make = partial(ShareScheduler, shares=shares, rank=self.job.rank)
        trained = through(stage, grads) if grads is not None else set[Kernel]()
        return Share(make, shares, self.job.rank, planned or at_once, trained)

    def _planned(self, specs: tuple[TensorSpec, ...]) -> Schedule | None:
        """The schedule that a user's `Tile` asks for, without what is of no use on rows: column bands, spilled maps."""
        if self._schedule is None:
            return None
        found = self._schedule(specs)
        return replace(found, tiles=(1, 1), keeping=replace(found.keeping, spill=float("inf"), to=""))

    # ------------------------------------------------------------ results

    def _delivered(self, share: Share, place: int, y: torch.Tensor) -> torch.Tensor | None:
        kernel = share.stage.exits[place]
        if not self.lies_apart(share, place) or self.gather == "none":
            return y
        sent, wanted = self.gathering(share, kernel)
        link = self.job.link
        found = dict(zip((r for r, _ in wanted), link.swap([(r, y.detach()) for r in sent], wanted), strict=True))
        if self.gather == "first" and link.rank:
            return None
        if y.shape[_dim(kernel)]:
            found[link.rank] = y
        return torch.cat([found[r] for r in sorted(found)], _dim(kernel)) if len(found) > 1 else found.popitem()[1]

    def gathering(self, share: Share, kernel: Kernel) -> tuple[list[int], list[Any]]:
        """To whom this rank sends its rows of a result, and what it wants from whom."""
        own = {r: share.shares.own(kernel, r) for r in range(share.shares.division.ranks)}
        receivers = list(own) if self.gather == "all" else [0] if self.gather == "first" else []
        has = [r for r, (low, high) in own.items() if high > low]
        me = self.job.rank
        sent = [r for r in receivers if r != me] if me in has else []
        wanted = [(r, share.spec(kernel, own[r])) for r in has if r != me] if me in receivers else []
        return sent, wanted

    def lies_apart(self, share: Share, place: int) -> bool:
        """A result is on every rank the rows that it owns."""
        kernel = share.stage.exits[place]
        return kernel.kind is Kind.ROWS and kernel not in share.shares.kept

    def rows_of(self, share: Share, place: int) -> Rows | None:
        """Which rows of a result this rank gives; None where it gives the whole, or nothing."""
        if self.gather != "none" or not self.lies_apart(share, place):
            return None
        kernel = share.stage.exits[place]
        low, high = share.shares.own(kernel, self.job.rank)
        return Rows(_dim(kernel), low * kernel.unit, high * kernel.unit, kernel.rows * kernel.unit)

    # ------------------------------------------------------------ predictions

    def predicted(self, share: Share) -> tuple[int, int]:
        """Bytes that this rank sends in a call, and in its backward pass."""
        mails = [share.mail(one) for one in share.instructions() if isinstance(one, Cross)]
        there = sum(mail.bytes for mail in mails)
        for place, kernel in enumerate(share.stage.exits):
            if self.lies_apart(share, place):
                low, high = share.shares.own(kernel, self.job.rank)
                there += len(self.gathering(share, kernel)[0]) * kernel.row_bytes * (high - low)
        return there, sum(mail.backward_bytes for mail in mails)


def _dim(kernel: Kernel) -> int:
    assert kernel.dims is not None
    return kernel.dims[0]


def through(stage: Stage, grads: Sequence[bool]) -> set[Kernel]:
    """The kernels through whose values gradients go, where these sources want some."""
    found = {kernel for kernel, wanted in zip(stage.sources, grads, strict=True) if wanted}
    for kernel in stage.kernels:
        value = stage.values[kernel.node]
        value = value[0] if isinstance(value, list | tuple) else value
        module, attributes = module_of(kernel.node), [n for n in kernel.node.all_input_nodes if n.op == "get_attr"]
        held = [] if module is None or kernel.role == "statistics" else list(module.parameters())
        held += [attribute(stage.graph, str(n.target)) for n in attributes]
        learns = any(isinstance(t, torch.Tensor) and t.requires_grad for t in held)
        before = any(k in found for k in (*(k for k, _, _ in kernel.reads), *kernel.takes))
        if value.dtype.is_floating_point and (learns or before):
            found.add(kernel)
    return found
