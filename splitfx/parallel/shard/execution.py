"""One rank's share of a stage, and a run of it."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from splitfx.parallel.link import Spec
from splitfx.parallel.shard.schedule import Cross
from splitfx.parallel.shard.shares import Shares
from splitfx.parallel.shard.tape import Job, Mail
from splitfx.tiling.plan.instructions import Instruction, Store
from splitfx.tiling.run.execution import Execution, Program
from splitfx.tiling.run.reductions import reduction_of
from splitfx.tiling.stage.kernel import Kernel


class Share(Program):
    """A stage at one size of its inputs, as one rank runs it. ``trained``: kernels through which gradients go."""

    def __init__(
        self, make: Callable[..., Any], shares: Shares, rank: int, schedule: Any, trained: set[Kernel]
    ) -> None:
        self.shares, self.rank, self.trained = shares, rank, trained
        super().__init__(shares.stage, schedule, make)

    def mail(self, cross: Cross) -> Mail:
        to = [(p.peer, self.spec(p.kernel, p.rows), p.kernel in self.trained) for p in cross.sent]
        come = [(p.peer, self.spec(p.kernel, p.rows), p.kernel in self.trained) for p in cross.received]
        for kernel in cross.reduced:
            spec, grads = self.totals(kernel), kernel in self.trained
            others = [r for r in range(self.shares.division.ranks) if r != self.rank]
            to += [(r, spec, grads) for r in others if self.adds(kernel, self.rank)]
            come += [(r, spec, grads) for r in others if self.adds(kernel, r)]
        return Mail(
            tuple(r for r, _, _ in to),
            tuple(spec for _, spec, _ in to),
            tuple(grads for _, _, grads in to),
            tuple((r, spec) for r, spec, _ in come),
            tuple(grads for _, _, grads in come),
        )

    def adds(self, kernel: Kernel, rank: int) -> bool:
        """A rank has rows of what a reduction takes in."""
        return kernel in self.shares.computed[rank]

    def spec(self, kernel: Kernel, rows: tuple[int, int]) -> Spec:
        value = self.stage.values[kernel.node]
        value = value[0] if isinstance(value, list | tuple) else value
        assert kernel.dims is not None
        sizes = [int(s) for s in value.shape]
        sizes[kernel.dims[0]] = (rows[1] - rows[0]) * kernel.unit
        return tuple(sizes), value.dtype

    def totals(self, kernel: Kernel) -> Spec:
        reduction = reduction_of(kernel, self.stage)
        return (reduction.held * prod(reduction.shape),), torch.float64


class ShareExecution(Execution):
    """One run of a rank's share."""

    program: Share

    def __init__(self, program: Share, functional: bool, job: Job) -> None:
        super().__init__(program, functional)
        self.job = job

    def run(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """The results, each whole or as the rows that this rank owns."""
        self.like = inputs[0]
        return super().run(inputs)

    def act(self, instruction: Instruction | Cross) -> None:
        if isinstance(instruction, Cross):
            self._cross(instruction)
        else:
            super().act(instruction)

    def store(self, one: Store) -> None:
        self.wholes[one.kernel] = one.src
        if one.kernel.exit >= 0:
            self.results[one.kernel.exit] = self.registers[one.src]

    def _joined(self, kernel: Kernel) -> torch.Tensor:
        """A result of which this rank owns no rows."""
        shape, dtype = self.program.spec(kernel, (0, 0))
        return self.like.new_zeros(shape, dtype=dtype)

    def _cross(self, one: Cross) -> None:
        mail = self.program.mail(one)
        sent = [self.registers[parcel.register] for parcel in one.sent]
        own = {k: self._flat(k) for k in one.reduced if self.program.adds(k, self.job.rank)}
        sent += [own[kernel] for kernel in one.reduced if kernel in own for _ in self.job.peers]
        came = iter(self.job.cross(mail, sent))
        for parcel in one.received:
            self.registers[parcel.register] = next(came)
        for kernel in one.reduced:
            theirs = {r: next(came) for r in self.job.peers if self.program.adds(kernel, r)}
            self._merge(kernel, {**theirs, self.job.rank: own[kernel]} if kernel in own else theirs)

    def _flat(self, kernel: Kernel) -> torch.Tensor:
        return torch.cat([part.double().reshape(-1) for part in self.reductions[kernel].totals])

    def _merge(self, kernel: Kernel, totals: dict[int, torch.Tensor]) -> None:
        """A reduction of the totals of all ranks, in their order, so it is the same on all."""
        merged = self.reductions[kernel] = reduction_of(kernel, self.stage)
        behind = prod(merged.sizes) // max(1, prod(merged.shape))  # values in each total, of the whole map
        for rank in sorted(totals):
            low, high = self.program.shares.own(kernel, rank)
            parts = tuple(part.reshape(merged.shape) for part in totals[rank].chunk(merged.held))
            merged.join(parts, _count(behind, high - low, kernel.rows))


def _count(behind: int, rows: int, whole: int) -> int:
    """Values in a total, of so many in that of the whole map."""
    return behind * rows // whole
